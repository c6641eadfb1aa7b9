"""Published results on MVTec AD and MPDD, to compare with a run.

The BKD paper's numbers are as printed; docs/published.md says which of them contradict each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bkd_fast.data.public import COUNTS, Counts
from bkd_fast.evaluation.metrics import percent

DATA_SETS: dict[str, Counts] = {"MVTec AD": COUNTS["mvtec"], "MPDD": COUNTS["mpdd"]}

# BKD, Table 1 at 256 x 256: "image-level/pixel-level", but more likely pixel AUROC and PRO (docs/published.md).
TABLE_1 = {
    "carpet": (97.6, 95.9),
    "grid": (98.3, 96.8),
    "leather": (97.3, 99.0),
    "tile": (96.4, 95.1),
    "wood": (94.9, 95.1),
    "bottle": (98.0, 97.0),
    "cable": (96.8, 90.5),
    "capsule": (98.8, 94.7),
    "hazelnut": (98.8, 94.5),
    "metal_nut": (96.9, 92.0),
    "pill": (98.0, 96.3),
    "screw": (98.6, 98.0),
    "toothbrush": (99.0, 93.3),
    "transistor": (92.1, 68.0),
    "zipper": (98.1, 95.1),
}
# BKD, Table 2: F1 with k = 2, 4 and 8.
TABLE_2 = {
    "carpet": (61.4, 68.9, 69.0),
    "tile": (58.5, 60.6, 67.8),
    "wood": (55.7, 60.2, 66.3),
    "toothbrush": (74.8, 79.3, 83.8),
    "transistor": (80.3, 68.0, 81.2),
    "zipper": (68.9, 70.4, 74.5),
}
# BKD, Table 3: mean F1 with k = 2.
TABLE_3 = {"MVTec AD": 87.4, "MPDD": 62.8}


class Method(NamedTuple):
    """Means over a data set, in percent (image AUROC, pixel AUROC, PRO), and their source and conditions."""

    name: str
    image: float
    pixel: float | None
    pro: float | None
    source: str


METHODS = {
    "MVTec AD": (
        Method("RD4AD, WRN50", 98.5, 97.8, 93.9, "arXiv 2201.10703; 256, PRO image by image"),
        Method("RD++, WRN50", 99.4, 98.3, 95.0, "CVPR 2023; 256, the best epoch on the test images"),
        Method("PatchCore, WRN50", 99.2, 98.1, 94.4, "its README; 224 cropped from 256"),
        Method("STFPM, ResNet-18", 95.5, 97.0, 92.8, "its README; 256"),
        Method("RegAD, k = 2", 85.7, 94.6, None, "its README; trained on the other classes"),
        Method("RegAD, k = 8", 91.2, 96.8, None, "its README; trained on the other classes"),
    ),
    "MPDD": (
        Method("RD4AD, WRN50", 91.3, 98.3, 95.5, "ADer; 256, one model for all classes"),
        Method("RD++, WRN50", 90.2, 98.5, 95.5, "ADer; 256, one model for all classes"),
        Method("PatchCore, WRN50", 94.6, 98.9, 95.7, "ADer; 256, one model for all classes"),
    ),
}


def recognize(counts: Counts) -> str | None:
    """Return the data set of these categories; None if it is unknown, or fewer than half of the file counts match."""
    for name, expected in DATA_SETS.items():
        if counts and all(category in expected for category in counts):
            matching = sum(counts[category] == expected[category] for category in counts)
            return name if 2 * matching >= len(counts) else None
    return None


def differences(data_set: str, counts: Counts) -> list[str]:
    """Return a sentence for each category whose file counts differ from the data set's."""
    expected = DATA_SETS[data_set]
    return [
        f"{category} has {train} training and {test} test images, {data_set} has {expected[category][0]} and "
        f"{expected[category][1]}: the results are not comparable"
        for category, (train, test) in counts.items()
        if (train, test) != expected[category]
    ]


def comparison(metrics: Mapping[str, Any]) -> str:
    """Return the metrics of :func:`~bkd_fast.evaluation.evaluate.evaluate` beside published ones, as text.

    The text is empty for other data sets.
    """
    categories = metrics["categories"]
    counts = {
        name: (category["images"]["train"] + category["images"]["validation"], category["images"]["test"])
        for name, category in categories.items()
    }
    data_set = recognize(counts)
    if data_set is None:
        return ""
    lines = [f"{data_set}, {len(counts)} of {len(DATA_SETS[data_set])} categories, beside published results (percent)"]
    lines += [f"  note: {sentence}" for sentence in differences(data_set, counts)]
    if data_set == "MVTec AD":
        lines += [
            "",
            f"{'':14}image AUROC  pixel AUROC  AUPRO  BKD Table 1, 256   image F1-max  BKD Table 2, k = 2/4/8",
        ]
        for name, category in categories.items():
            own = [percent(category[key]) for key in ("image_auroc", "pixel_auroc", "aupro", "image_f1_max")]
            printed = " / ".join(f"{value:.1f}" for value in TABLE_1[name])
            f1 = " / ".join(f"{value:.1f}" for value in TABLE_2.get(name, ())) or "–"
            lines.append(f"{name:14}{own[0]:>11}  {own[1]:>11}  {own[2]:>5}  {printed:>16}   {own[3]:>12}  {f1:>22}")
    mean = metrics["mean"]
    own = [percent(mean[key]) for key in ("image_auroc", "pixel_auroc", "aupro")]
    lines += [
        "",
        f"{'mean':24}image AUROC  pixel AUROC    PRO",
        f"{'this run':24}{own[0]:>11}  {own[1]:>11}  {own[2]:>5}",
    ]
    lines += [
        f"{method.name:24}{method.image:>11.1f}  {_shown(method.pixel):>11}  {_shown(method.pro):>5}  {method.source}"
        for method in METHODS[data_set]
    ]
    if data_set == "MVTec AD":
        lines.append(
            f"{'BKD, Table 1, 256':24}{97.2:>11.1f}  {93.0:>11.1f}      –  as printed; 15-class means are 97.3, 93.4"
        )
    lines.append(f"mean image F1-max: {percent(mean['image_f1_max'])}; BKD, Table 3, k = 2: {TABLE_3[data_set]:.1f}")
    lines.append("docs/published.md says what the paper's numbers are, and which of them contradict each other")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
