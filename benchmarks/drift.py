"""How soon drift is seen, and how often it is said of nothing: python benchmarks/drift.py RUN DATA [--images 20].

DATA is the set that RUN was trained on, in MVTec AD's layout. Its good test images are changed as light, lens and
camera change them. Streams are drawn with replacement: unchanged ones from one half of the run's normal images, the
other half being what the monitor knows; changed ones after 300 images from the run's normal images. Prints a Markdown
table.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

from bkd_fast import Detector
from bkd_fast.artifact import Calibration
from bkd_fast.data import image_files
from bkd_fast.decisions import NormalScores
from bkd_fast.inference.drift import Drift, DriftMonitor, Observed
from bkd_fast.model.calibration import statistics_of

Rows = list[tuple[float, np.ndarray]]
BEFORE, AFTER, UNCHANGED = 300, 400, 10_000  # images of a stream
CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "other good images": lambda image: image,
    "brightness × 0.95": lambda image: ImageEnhance.Brightness(image).enhance(0.95),
    "brightness × 0.8": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "blur, σ = 0.2 % of the width": lambda image: image.filter(ImageFilter.GaussianBlur(0.002 * image.width)),
    "blur, σ = 0.4 % of the width": lambda image: image.filter(ImageFilter.GaussianBlur(0.004 * image.width)),
    "camera moved by 2 % of the width": lambda image: ImageChops.offset(image, round(0.02 * image.width), 0),
    "camera moved by 5 % of the width": lambda image: ImageChops.offset(image, round(0.05 * image.width), 0),
}


def rows_of(detector: Detector, images: list[Image.Image]) -> Rows:
    """Return the score and the teacher's statistics of each image."""
    rows: Rows = []
    observed = Observed(detector, detector.predictor(), lambda score, row: rows.append((score, row)), every=1)
    for outcome in observed.stream(images):
        if outcome.error is not None:
            raise outcome.error
    return rows


def half(calibration: Calibration, normal: np.ndarray, generator: np.random.Generator) -> tuple[Calibration, Rows]:
    """Return what is known of a random half of the normal images, and rows of the other half."""
    order, scores = generator.permutation(len(normal)), generator.permutation(calibration.scores)
    count = len(normal) // 2
    known = NormalScores(calibration.source, scores[:count].tolist(), scores[:count].tolist())
    statistics = statistics_of(torch.from_numpy(normal[order[:count]]))
    reference = Calibration.of(known, calibration.normal_level, calibration.false_alarms, statistics)
    return reference, list(zip(scores[count:], normal[order[count:]], strict=False))


def drawn(rows: Rows, count: int, generator: np.random.Generator) -> Rows:
    return [rows[index] for index in generator.integers(len(rows), size=count)]


def followed(calibration: Calibration, stream: Rows) -> Drift | None:
    monitor = DriftMonitor(calibration)
    for score, row in stream:
        if monitor.update(score, row) is not None:
            break
    return monitor.drift


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=20, help="good test images that are changed (default: 20)")
    parser.add_argument("--seeds", type=int, default=20, help="streams of each kind (default: 20)")
    parser.add_argument("--unchanged", type=int, default=UNCHANGED, help="images of an unchanged stream")
    arguments = parser.parse_args()
    detector = Detector.load(arguments.run)
    calibration = detector.calibration
    files = image_files(arguments.data / "train" / "good")
    normal = np.stack([row for _, row in rows_of(detector, [Image.fromarray(detector.read(path)) for path in files])])
    others = [Image.fromarray(detector.read(path)) for path in image_files(arguments.data / "test" / "good")]
    said = 0
    for seed in range(arguments.seeds):
        generator = np.random.default_rng(seed)
        reference, rows = half(calibration, normal, generator)
        said += followed(reference, drawn(rows, arguments.unchanged, generator)) is not None
    print(f"unchanged: drift said in {said} of {arguments.seeds} streams of {arguments.unchanged} images\n")
    print("| from image 301 on | drift said | images until then, median (largest) | since, off by | first statistic |")
    print("|---|---|---|---|---|")
    # The scores of training images are those that leave themselves out: they belong to the images in no known order.
    before = [(score, row) for score, row in zip(calibration.scores, normal, strict=False)]
    for name, change in CHANGES.items():
        changed = rows_of(detector, [change(image) for image in others[: arguments.images]])
        drifts = []
        for seed in range(arguments.seeds):
            generator = np.random.default_rng(seed)
            own = replace(calibration, teacher=statistics_of(torch.from_numpy(normal)))
            drifts.append(followed(own, drawn(before, BEFORE, generator) + drawn(changed, AFTER, generator)))
        seen = [drift for drift in drifts if drift is not None and drift.image > BEFORE]
        if not seen:
            print(f"| {name} | 0 of {arguments.seeds} | – | – | – |")
            continue
        delays = [drift.image - BEFORE for drift in seen]
        onset = np.median([abs(drift.since - BEFORE - 1) for drift in seen])
        statistic = Counter(drift.shifts[0].statistic for drift in seen).most_common(1)[0][0]
        print(
            f"| {name} | {len(seen)} of {arguments.seeds} | {np.median(delays):.0f} ({max(delays)}) | {onset:.0f} | "
            f"{statistic} |"
        )


if __name__ == "__main__":
    main()
