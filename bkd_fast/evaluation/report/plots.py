"""Small charts as inline SVG. Colours come from the page's style sheet and follow its light and dark themes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 320, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 40
BINS = 32
LOG_RATIO = 30.0  # values that span more than this are shown on a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """Values to pixels along one side of a chart."""

    low: float
    high: float
    label: str
    log: bool = False

    @classmethod
    def around(cls, values: np.ndarray, label: str) -> Axis:
        """An axis that holds all values, logarithmic if they are positive and far apart."""
        low, high = float(values.min()), float(values.max())
        if low > 0 and high / low > LOG_RATIO:
            return cls(low / 1.1, high * 1.1, f"{label} (log scale)", log=True)
        margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
        return cls(low - margin, high + margin, label)

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def steps(self, count: int) -> np.ndarray:
        """``count`` + 1 values, evenly spaced along the axis."""
        spaced = np.geomspace if self.log else np.linspace
        return spaced(self.low, self.high, count + 1)

    def ticks(self) -> list[float]:
        """Round values: powers of ten, or 3 to 7 multiples of 1, 2 or 5."""
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


def line_chart(title: str, x_axis: Axis, y_axis: Axis, series: Sequence[Series], *, diagonal: bool = False) -> str:
    """Lines over two axes, as an HTML figure; ``diagonal`` marks what guessing would give."""
    at = _placer(x_axis, y_axis)
    body = [_frame(x_axis, y_axis)]
    if diagonal:
        (x0, y0), (x1, y1) = at(x_axis.low, y_axis.low), at(x_axis.high, min(x_axis.high, y_axis.high))
        body.append(f'<line class="guess" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>')
    for line in series:
        points = [at(x, y) for x, y in zip(line.x.tolist(), line.y.tolist(), strict=True)]
        if len(points) == 1:
            body.append(f'<circle class="dot {line.style}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3"/>')
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            body.append(f'<polyline class="line {line.style}" points="{path}"/>')
    return _figure(title, body, [(line.name, line.style) for line in series])


def histogram(title: str, groups: Sequence[tuple[str, str, np.ndarray]], threshold: float, label: str) -> str:
    """Counts of each group (name, CSS class, values) over a shared axis, with the threshold as a line."""
    values = np.concatenate([group for _, _, group in groups])
    x_axis = Axis.around(np.append(values, threshold), label)
    edges = x_axis.steps(BINS)
    counts = [np.histogram(group, edges)[0] for _, _, group in groups]
    y_axis = Axis(0.0, float(max(count.max() for count in counts)) * 1.05, "images")
    at = _placer(x_axis, y_axis)
    body = [_frame(x_axis, y_axis, whole=True)]
    for (_, style, _), count in zip(groups, counts, strict=True):
        for index in np.flatnonzero(count):
            (x0, y0), (x1, y1) = at(edges[index], 0.0), at(edges[index + 1], float(count[index]))
            body.append(
                f'<rect class="bar {style}" x="{x0 + 0.4:.1f}" y="{y1:.1f}" width="{x1 - x0 - 0.8:.1f}" '
                f'height="{y0 - y1:.1f}"/>'
            )
    x, bottom = at(threshold, 0.0)
    body.append(f'<line class="threshold" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom:.1f}"/>')
    legend = [(f"{name} ({len(group)})", style) for name, style, group in groups]
    return _figure(title, body, [*legend, (f"threshold {threshold:.4g}", "threshold")])


def _placer(x_axis: Axis, y_axis: Axis) -> Callable[[float, float], tuple[float, float]]:
    def at(x: float, y: float) -> tuple[float, float]:
        across, up = x_axis.share(x), y_axis.share(y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    return at


def _frame(x_axis: Axis, y_axis: Axis, *, whole: bool = False) -> str:
    """Grid, ticks and axis labels; ``whole``: the y axis counts things, so fractions get no tick."""
    at = _placer(x_axis, y_axis)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y_axis.ticks():
        if whole and tick != round(tick):
            continue
        y = at(x_axis.low, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{tick:.3g}</text>')
    for tick in x_axis.ticks():
        x = at(tick, y_axis.low)[0]
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{bottom + 15}">{tick:.3g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
    parts.append(f'<text class="label middle" x="{middle_x:.1f}" y="{HEIGHT - 6}">{escape(x_axis.label)}</text>')
    parts.append(
        f'<text class="label middle" transform="translate(11 {middle_y:.1f}) rotate(-90)">{escape(y_axis.label)}</text>'
    )
    return "".join(parts)


def _figure(title: str, body: Sequence[str], legend: Sequence[tuple[str, str]]) -> str:
    keys = "".join(f'<span class="key"><i class="swatch {style}"></i>{escape(name)}</span>' for name, style in legend)
    return (
        f'<figure class="chart"><h4>{escape(title)}</h4>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
        f"<figcaption>{keys}</figcaption></figure>"
    )
