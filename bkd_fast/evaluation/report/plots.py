"""Small charts as coordinates. ``template.html.jinja`` draws them, and ``style.css`` colours them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

FRAME = {"width": 320, "height": 220, "left": 46, "right": 308, "top": 12, "bottom": 180}  # SVG units, y down
BINS = 32
LOG_RATIO = 30.0  # values that span more than this are shown on a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """The values along one side of a chart."""

    low: float
    high: float
    label: str
    log: bool = False

    @classmethod
    def around(cls, values: np.ndarray, label: str) -> Axis:
        """Return an axis that holds all values, logarithmic if they are positive and far apart."""
        low, high = float(values.min()), float(values.max())
        if low > 0 and high / low > LOG_RATIO:
            return cls(low / 1.1, high * 1.1, f"{label} (log scale)", log=True)
        margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
        return cls(low - margin, high + margin, label)

    def share(self, value: float) -> float:
        """Return how far along the axis a value is: 0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def steps(self, count: int) -> np.ndarray:
        """Return ``count`` + 1 values, evenly spaced along the axis."""
        spaced = np.geomspace if self.log else np.linspace
        return spaced(self.low, self.high, count + 1)

    def ticks(self) -> list[float]:
        """Return round values: powers of ten, or 3 to 7 multiples of 1, 2 or 5."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            decades = [10.0**power for power in range(first, last + 1, max(1, (last - first) // 5))]
            return decades if len(decades) > 1 else [self.low, math.sqrt(self.low * self.high), self.high]
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Series:
    """A line: its name in the legend, its CSS class, and finite points."""

    name: str
    style: str
    x: np.ndarray
    y: np.ndarray


Point = tuple[float, float]


@dataclass
class Chart:
    """A chart in SVG units, inside :data:`FRAME`.

    Attributes:
        legend: (name, CSS class) of each key.
        lines: (CSS class, points); one point alone is drawn as a dot.
        bars, rules: (CSS class, start, end): opposite corners of a bar, ends of a straight line.
        whole: the y axis counts, so it has no ticks at fractions.
    """

    title: str
    x_axis: Axis
    y_axis: Axis
    legend: Sequence[tuple[str, str]]
    whole: bool = False
    lines: list[tuple[str, list[Point]]] = field(default_factory=list)
    bars: list[tuple[str, Point, Point]] = field(default_factory=list)
    rules: list[tuple[str, Point, Point]] = field(default_factory=list)

    def at(self, x: float, y: float) -> Point:
        """Return the position of a pair of values."""
        return (
            FRAME["left"] + self.x_axis.share(x) * (FRAME["right"] - FRAME["left"]),
            FRAME["bottom"] - self.y_axis.share(y) * (FRAME["bottom"] - FRAME["top"]),
        )

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """(x, label) of each tick."""
        return [(self.at(tick, self.y_axis.low)[0], f"{tick:.3g}") for tick in self.x_axis.ticks()]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """(y, label) of each tick."""
        ticks = [tick for tick in self.y_axis.ticks() if not self.whole or tick == round(tick)]
        return [(self.at(self.x_axis.low, tick)[1], f"{tick:.3g}") for tick in ticks]


def line_chart(title: str, x_axis: Axis, y_axis: Axis, series: Sequence[Series], *, diagonal: bool = False) -> Chart:
    """Return lines over two axes; ``diagonal`` adds the line of a random guess."""
    chart = Chart(title, x_axis, y_axis, [(line.name, line.style) for line in series])
    if diagonal:
        end = chart.at(x_axis.high, min(x_axis.high, y_axis.high))
        chart.rules.append(("guess", chart.at(x_axis.low, y_axis.low), end))
    for line in series:
        chart.lines.append(
            (line.style, [chart.at(x, y) for x, y in zip(line.x.tolist(), line.y.tolist(), strict=True)])
        )
    return chart


def histogram(title: str, groups: Sequence[tuple[str, str, np.ndarray]], threshold: float, label: str) -> Chart:
    """Return the counts of each group (name, CSS class, values) over a shared axis, with the threshold as a line."""
    x_axis = Axis.around(np.append(np.concatenate([group for _, _, group in groups]), threshold), label)
    edges = x_axis.steps(BINS)
    counts = [np.histogram(group, edges)[0] for _, _, group in groups]
    y_axis = Axis(0.0, float(max(count.max() for count in counts)) * 1.05, "images")
    legend = [(f"{name} ({len(group)})", style) for name, style, group in groups]
    chart = Chart(title, x_axis, y_axis, [*legend, (f"threshold {threshold:.4g}", "threshold")], whole=True)
    for (_, style, _), count in zip(groups, counts, strict=True):
        for index in np.flatnonzero(count):
            chart.bars.append((style, chart.at(edges[index], 0.0), chart.at(edges[index + 1], float(count[index]))))
    chart.rules.append(("threshold", chart.at(threshold, y_axis.high), chart.at(threshold, 0.0)))
    return chart
