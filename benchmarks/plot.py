"""Peers' times relative to the native kernels, from CSV files: python benchmarks/plot.py CSV... --out docs/kernels.svg.

A row is a geometric mean over the levels of a teacher, a column a peer. Of two layouts channels_last is shown; of two
files with the same case, the later one. Numbers of threads are not told apart. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import math
from io import StringIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from bkd_fast.benchmark.harness import Row
from bkd_fast.benchmark.results import Group, read, relative

# Column -> providers. A bound does less work than the operator: it limits its speed.
COLUMNS = {
    "torchvision": ("torchvision", "reference, torchvision's operator inside"),
    "ONNX Runtime": ("onnxruntime", "exported, onnx"),
    "OpenVINO": ("openvino", "exported, openvino"),
    "Inductor": ("torch.compile", "exported, aoti"),
    "PyTorch\nreference": ("PyTorch reference",),
    "anomalib\nRD4AD": ("anomalib ReverseDistillation", "anomalib"),
    "anomalib\nPatchCore": ("anomalib PatchCore",),
    "bound: conv2d,\nGEMMs, copy": ("conv2d (dense)", "bare GEMMs", "copy the features"),
}
COLUMN_OF = {provider: column for column, providers in COLUMNS.items() for provider in providers}
INK, FAINT, PAPER, SLOWER, FASTER = "#1f2933", "#d7dde3", "#ffffff", "#0f766e", "#c2410c"
DARK = {INK: "#e6edf3", FAINT: "#30363d", PAPER: "#0d1117", SLOWER: "#2dd4bf", FASTER: "#fb923c"}
WIDTH, LABELS, COLUMN, ROW, HEAD = 11.1, 2.5, 1.06, 0.19, 0.95  # inches
LOW, HIGH = 0.1, 200.0  # times at the ends of a column's bars
BARS = (0.04, 0.64)  # of a column's width; the number stands beside them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+", help="written by ops.py or model.py")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, .svg or .png")
    arguments = parser.parse_args()
    latest: dict[tuple[str, ...], dict[str, Row]] = {}
    for path in arguments.csv:
        rows: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in read(path):
            rows.setdefault((row.op, row.shape, row.what), {})[row.provider] = row._replace(threads=0)
        latest.update(rows)
    save(draw(relative([row for rows in latest.values() for row in rows.values()])), arguments.out)


def draw(means: dict[Group, float]) -> Figure:
    """Draw a block of rows for each operator, and in each row a bar and a number for each peer."""
    blocks: dict[str, dict[str, dict[str, float]]] = {}
    passes = {op: {group.what for group in means if group.op == op} for op in {group.op for group in means}}
    for group, mean in means.items():
        if group.provider in COLUMN_OF and "NCHW" not in group.label:
            title, label = group.op, group.label.replace(" channels_last", "")
            if len(passes[group.op]) > 1:
                label += f", {group.what}"
            else:
                title += f", {group.what}"
            blocks.setdefault(title, {}).setdefault(label, {})[COLUMN_OF[group.provider]] = mean
    if not blocks:
        raise SystemExit("none of the files has a provider that is drawn: expected some of " + ", ".join(COLUMN_OF))
    height = HEAD + ROW * sum(len(lines) + 1.6 for lines in blocks.values())
    style = {"font.family": "DejaVu Sans", "font.size": 8, "text.color": INK, "svg.hashsalt": "bkd_fast"}
    pyplot.rcParams.update(style)
    figure = pyplot.figure(figsize=(WIDTH, height), facecolor=PAPER)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))  # in inches, from the upper left corner
    axis.axis("off")
    axis.text(0.1, 0.2, "Time relative to bkd_fast on its native kernels", weight="bold", size=11, va="center")
    keys = (("slower than bkd_fast", SLOWER), ("faster", FASTER))
    for x, (text, colour) in zip((5.2, 7.2), keys, strict=True):
        axis.barh(0.2, 0.25, 0.11, x, color=colour)
        axis.text(x + 0.32, 0.2, text, va="center")
    used = [name for name in COLUMNS if any(name in peers for lines in blocks.values() for peers in lines.values())]
    for index, name in enumerate(used):
        axis.text(LABELS + (index + 0.5) * COLUMN, 0.58, name, ha="center", va="center", weight="bold", linespacing=1.1)
    y = HEAD - 0.05
    for op, lines in blocks.items():
        axis.text(0.1, y, op, weight="bold", va="center")
        for label, peers in lines.items():
            y += ROW
            axis.plot((0.1, WIDTH - 0.1), (y + ROW / 2, y + ROW / 2), color=FAINT, linewidth=0.5)
            axis.text(0.25, y, label, va="center")
            for index, name in enumerate(used):
                if name in peers:
                    _bar(axis, LABELS + index * COLUMN, y, peers[name])
        y += 1.6 * ROW
    return figure


def save(figure: Figure, out: Path) -> None:
    """Write a picture; an .svg follows the browser's light or dark colours."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".svg":
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        out.write_text(_with_dark_colours(text.getvalue()), encoding="utf-8")
    else:
        figure.savefig(out, dpi=200)
    pyplot.close(figure)


def _bar(axis: pyplot.Axes, left: float, y: float, value: float) -> None:
    """A bar from 1 to ``value`` on a logarithmic scale, and the value."""
    low, high = (left + share * COLUMN for share in BARS)

    def position(number: float) -> float:
        share = math.log(min(max(number, LOW), HIGH) / LOW) / math.log(HIGH / LOW)
        return low + share * (high - low)

    one = position(1)
    axis.barh(y, position(value) - one, 0.55 * ROW, one, color=SLOWER if value >= 1 else FASTER)
    axis.plot((one, one), (y - ROW / 2, y + ROW / 2), color=INK, linewidth=0.8)
    digits = 2 if value < 10 else 1 if value < 100 else 0
    axis.text(left + 0.97 * COLUMN, y, f"{value:.{digits}f}", ha="right", va="center")


def _with_dark_colours(svg: str) -> str:
    """Add the colours of a dark page, which browsers choose by themselves."""
    rules = [
        f'[style*="{name}: {light}"] {{ {name}: {dark} !important; }}'
        for light, dark in DARK.items()
        for name in ("fill", "stroke")
    ]
    style = "<style>@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}</style>"
    return svg.replace("<defs>", f"{style}\n <defs>", 1)


if __name__ == "__main__":
    main()
