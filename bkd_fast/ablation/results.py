"""Results of an ablation: a CSV row a run, mean and spread in Markdown, and a plot."""

from __future__ import annotations

import csv
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bkd_fast.ablation.variants import Variant
from bkd_fast.evaluation.metrics import METRIC_NAMES, mean_metrics
from bkd_fast.files import atomic_path, atomic_write

log = logging.getLogger("bkd_fast")
BOTH = "both"
SHOWN = ("image_auroc", "image_f1_max", "pixel_auroc", "pixel_f1_max", "aupro")
Finished = tuple[Variant, str, int, Mapping[str, Any]]  # variant, category, seed, the run's result.json
Cell = tuple[float, float | None, int]  # mean, standard deviation over the seeds (None of one), seeds


def write_results(out: Path, title: str, finished: Sequence[Finished]) -> Path:
    """Writes ``results.csv``, ``results.md`` and, with matplotlib, ``results.svg``; returns the path of the second."""
    path = out / "results.md"
    with atomic_write(path) as file:
        file.write(render(title, finished))
    if not finished:
        return path
    labels = list(finished[0][0].labels)
    head = [*labels, "category", "seed", "branch", *METRIC_NAMES, "epochs", "seconds"]
    with atomic_write(out / "results.csv") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for variant, category, seed, result in finished:
            for branch, metrics in result["metrics"]["branches"].items():
                values = ["" if metrics[name] is None else f"{metrics[name]:.6f}" for name in METRIC_NAMES]
                writer.writerow(
                    [*variant.labels.values(), category, seed, branch, *values, result["epochs"], result["seconds"]]
                )
    try:
        import matplotlib
    except ImportError:
        log.warning("results.svg was not drawn: it needs matplotlib (pip install matplotlib)")
        return path
    matplotlib.use("Agg")
    _draw(out / "results.svg", title, finished)
    return path


def summarize(finished: Sequence[Finished]) -> dict[tuple[str, str], dict[str, Cell]]:
    """(variant, branch) -> metric -> its mean and spread over the seeds, each seed averaged over the categories.

    A seed counts once it has every category that any seed of the variant has.
    """
    gathered: dict[tuple[str, str], dict[int, dict[str, Mapping[str, float | None]]]] = {}
    for variant, category, seed, result in finished:
        for branch, metrics in result["metrics"]["branches"].items():
            gathered.setdefault((variant.name, branch), {}).setdefault(seed, {})[category] = metrics
    cells: dict[tuple[str, str], dict[str, Cell]] = {}
    for key, seeds in gathered.items():
        whole = max(len(categories) for categories in seeds.values())
        full = [categories for categories in seeds.values() if len(categories) == whole]
        means = [mean_metrics(categories.values()) for categories in full]
        for name in METRIC_NAMES:
            present = [value for mean in means if (value := mean[name]) is not None]
            if present:
                spread = statistics.stdev(present) if len(present) > 1 else None
                cells.setdefault(key, {})[name] = (statistics.fmean(present), spread, len(present))
    return cells


def render(title: str, finished: Sequence[Finished]) -> str:
    """The Markdown page: the table, then protocol, versions and hardware."""
    if not finished:
        return f"# {title}\n\nNo run has finished yet.\n"
    cells = summarize(finished)
    variants = {variant.name: variant for variant, *_ in finished}
    labels = list(next(iter(variants.values())).labels)
    head = [*labels, "branches", *(name.replace("_", " ") for name in SHOWN), "seeds"]
    lines = [f"# {title}", "", _row(head), _row(["---"] * len(head))]
    for name, variant in variants.items():
        for index, (branch, metrics) in enumerate((key[1], cells[key]) for key in cells if key[0] == name):
            first = list(variant.labels.values()) if index == 0 else [""] * len(labels)
            shown = [_shown(metrics.get(metric)) for metric in SHOWN]
            lines.append(_row([*first, branch, *shown, str(max(cell[2] for cell in metrics.values()))]))
    return "\n".join([*lines, "", *_protocol(finished), ""])


def _protocol(finished: Sequence[Finished]) -> list[str]:
    categories = sorted({category for _, category, _, _ in finished})
    config = finished[0][0].config
    size = config.teacher.size
    first = finished[0][3]
    environment = first["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    hardware = environment["cuda"]["devices"] or [f"CPU with {environment['cpu']['threads']} threads a run"]
    seconds = statistics.fmean(result["seconds"] for *_, result in finished)
    return [
        f"Percent; mean ± standard deviation over the seeds, each the mean over the categories "
        f"{', '.join(categories)}. Runs: {len(finished)}.",
        "",
        f"- Protocol: {first['train_images']} training and {first['validation_images']} validation "
        f"normals in {finished[0][1]}; test images for measuring only, F1-max over all thresholds, the last epoch's "
        f"weights; {size[0]} × {size[1]} pixels, teacher {config.teacher.name}, "
        f"{config.training.epochs} epochs at most, batch size {config.training.batch_size}.",
        f"- Seeds: {', '.join(map(str, sorted({seed for _, _, seed, _ in finished})))}; each sets which normals are "
        "kept for validation, initial weights and the order of the images.",
        f"- Time: {seconds:.0f} s of training and preparation a run, mean.",
        f"- Versions: bkd_fast {environment['bkd_fast']}, Python {environment['python']}, {packages}.",
        f"- Hardware: {', '.join(hardware)}, {environment['platform']}.",
    ]


def _draw(path: Path, title: str, finished: Sequence[Finished]) -> None:
    """A panel for each figure, a line for each variant, its mean and spread for each branch."""
    from matplotlib import pyplot

    cells = summarize(finished)
    variants = {variant.name: ", ".join(variant.labels.values()) for variant, *_ in finished}
    branches = list(dict.fromkeys(branch for _, branch in cells))
    figure, axes = pyplot.subplots(
        1, len(SHOWN), figsize=(2.6 * len(SHOWN) + 1.5, 1.6 + 0.35 * len(variants)), sharey=True, layout="constrained"
    )
    for panel, name in zip(axes, SHOWN, strict=True):
        for index, branch in enumerate(branches):
            points = [
                (line + 0.2 * (index - (len(branches) - 1) / 2), *cells[variant, branch][name][:2])
                for line, variant in enumerate(variants)
                if name in cells.get((variant, branch), {})
            ]
            if points:
                heights, means, spreads = zip(*points, strict=True)
                panel.errorbar(
                    [100 * mean for mean in means],
                    heights,
                    xerr=[100 * (spread or 0) for spread in spreads],
                    fmt="o" if branch == BOTH else "s",
                    markersize=6 if branch == BOTH else 4,
                    capsize=2,
                    label=branch,
                )
        panel.set_title(name.replace("_", " "), fontsize=9)
        panel.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(variants)), list(variants.values()))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(branches), fontsize=8)
    figure.suptitle(f"{title}: percent, mean ± standard deviation over seeds", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    pyplot.close(figure)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    mean, spread, _ = cell
    return f"{100 * mean:.1f}" if spread is None else f"{100 * mean:.1f} ± {100 * spread:.1f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
