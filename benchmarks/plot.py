"""Time relative to the native kernels, from CSV files: python benchmarks/plot.py CSV... --out docs/kernels.svg.

A row is a geometric mean over the levels of a teacher. Of two layouts channels_last is shown; where two files have the
same case, the later one counts. Numbers of threads are not told apart. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D

from bkd_fast.benchmark.harness import Row
from bkd_fast.benchmark.results import Group, read, relative

INK, FAINT = "#1f2933", "#d7dde3"
# Provider -> name in the legend, colour, marker. Hollow: less work than the operator's own, a bound of its speed.
STYLES = {
    "torchvision": ("torchvision", "#c2410c", "o"),
    "reference, torchvision's operator inside": ("torchvision", "#c2410c", "o"),
    "onnxruntime": ("ONNX Runtime", "#1d4ed8", "s"),
    "openvino": ("OpenVINO", "#7e22ce", "D"),
    "PyTorch reference": ("PyTorch reference", "#0f766e", "^"),
    "torch.compile": ("torch.compile of it", "#65a30d", "v"),
    "anomalib": ("anomalib, RD4AD", "#be185d", "P"),
    "conv2d (dense)": ("bound: conv2d, GEMMs, copy", "white", "o"),
    "bare GEMMs": ("bound: conv2d, GEMMs, copy", "white", "o"),
    "copy the features": ("bound: conv2d, GEMMs, copy", "white", "o"),
}
WIDTH, ROW, HEAD = 9.0, 0.235, 1.25  # inches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+", help="written by ops.py or model.py")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, .svg or .png")
    arguments = parser.parse_args()
    latest: dict[tuple[str, ...], dict[str, Row]] = {}
    for path in arguments.csv:
        found: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in read(path):
            found.setdefault((row.op, row.shape, row.what), {})[row.provider] = row._replace(threads=0)
        latest.update(found)
    draw(relative([row for rows in latest.values() for row in rows.values()]), arguments.out)


def draw(means: dict[Group, float], out: Path) -> None:
    """A panel for each operator, a line for each label and pass, a mark for each peer."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    passes = {op: {group.what for group in means if group.op == op} for op in {group.op for group in means}}
    for group, mean in means.items():
        if group.provider in STYLES and "NCHW" not in group.label:
            label = group.label.replace(" channels_last", "")
            label += f", {group.what}" if len(passes[group.op]) > 1 else ""
            title = group.op if len(passes[group.op]) > 1 else f"{group.op}, {group.what}"
            panels.setdefault(title, {}).setdefault(label, {})[group.provider] = mean
    if not panels:
        raise SystemExit("none of the files has a provider that is drawn: expected some of " + ", ".join(STYLES))
    counts = [len(lines) for lines in panels.values()]
    height = HEAD + ROW * sum(count + 1.6 for count in counts)
    pyplot.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK})
    figure, every = pyplot.subplots(
        len(panels), sharex=True, squeeze=False, figsize=(WIDTH, height), height_ratios=[c + 0.2 for c in counts]
    )
    for axis, (op, lines) in zip(every[:, 0], panels.items(), strict=True):
        _panel(axis, op, lines)
    _scale(every[-1, 0], [mean for lines in panels.values() for peers in lines.values() for mean in peers.values()])
    used = [provider for provider in STYLES if any(provider in peers for p in panels.values() for peers in p.values())]
    named = {STYLES[provider][0]: _mark(provider) for provider in used}
    figure.legend(
        [Line2D([], [], linestyle="", **mark) for mark in named.values()], list(named),
        loc="upper center", bbox_to_anchor=(0.5, 1 - 0.28 / height), ncols=4, frameon=False,
    )  # fmt: skip
    figure.suptitle("Time relative to bkd_fast on its native kernels", y=1 - 0.12 / height, va="top", weight="bold")
    figure.subplots_adjust(
        left=0.33,
        right=0.975,
        top=1 - (HEAD - 0.2) / height,
        bottom=0.5 / height,
        hspace=1.6 / (sum(counts) / len(counts)),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200, facecolor="white", metadata={"Date": None} if out.suffix == ".svg" else None)


def _panel(axis: pyplot.Axes, op: str, lines: dict[str, dict[str, float]]) -> None:
    axis.set_title(op, loc="left", x=-0.48, fontsize=9, weight="bold", pad=3)
    axis.set_yticks(range(len(lines)), list(lines))
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.axvline(1, color=INK, linewidth=1.2, zorder=1)
    for place, peers in enumerate(lines.values()):
        axis.axhline(place, color=FAINT, linewidth=0.6, zorder=0)
        for provider, mean in peers.items():
            axis.plot([mean], [place], linestyle="", zorder=3, **_mark(provider))
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, colors=INK)
    axis.spines[:].set_visible(False)


def _scale(axis: pyplot.Axes, values: list[float]) -> None:
    axis.set_xscale("log")
    low, high = min(0.5, *values), max(2.0, *values)
    axis.set_xlim(low / 1.25, high * 1.25)
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low / 1.25 <= t <= high * 1.25]
    axis.set_xticks(ticks, [f"{tick:g} ×" for tick in ticks], minor=False)
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    at = axis.get_xaxis_transform()  # times along x, shares of the panel along y; the texts lie below its ticks
    for x, text, side in ((0.95, "← faster than bkd_fast", "right"), (1.05, "slower than bkd_fast →", "left")):
        axis.annotate(text, (x, 0), (0, -20), at, textcoords="offset points", ha=side, va="top", color=INK)


def _mark(provider: str) -> dict[str, object]:
    _, colour, marker = STYLES[provider]
    edge = INK if colour == "white" else "white"
    return {"marker": marker, "color": colour, "markeredgecolor": edge, "markersize": 7.5, "markeredgewidth": 0.9}


if __name__ == "__main__":
    main()
