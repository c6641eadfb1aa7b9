"""An exported model beside the run that it came from: ``bkd-fast check``, and the last step of every export."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bkd_fast.artifact import SUPPORT, DataSource, read_category
from bkd_fast.data import Sample, image_files, load_support
from bkd_fast.data.dataset import GOOD, ImageDataset
from bkd_fast.errors import BKDError, check_int
from bkd_fast.export.formats import RUNS, Runner, format_of, read
from bkd_fast.export.settings import parse
from bkd_fast.files import checksum
from bkd_fast.inference.detector import Detector

AT_EXPORT = 16  # images that an export is checked with
MAX_IMAGES = 200  # that a check takes of a folder, evenly


class Tolerance(NamedTuple):
    """How far an exported model may be from its run; see :class:`Comparison` for the units.

    ``decisions``: share of the images that may be decided otherwise, one image at least where it is not 0. With 0 an
    image counts only if the run's score is further from the threshold than ``score_max``: on the threshold rounding
    decides.
    """

    map_max: float
    map_mean: float
    score_max: float
    score_mean: float
    decisions: float


TOLERANCES = {
    "float32": Tolerance(map_max=0.02, map_mean=0.001, score_max=0.02, score_mean=0.005, decisions=0.0),
    # Twice and more of what 8 bits cost on the real images of docs/deploy.md.
    "int8": Tolerance(map_max=0.2, map_mean=0.05, score_max=1.2, score_mean=0.4, decisions=0.05),
}


@dataclass(frozen=True)
class Comparison:
    """What differs between an exported model and its run, over the same images.

    ``map_max``, ``map_mean``: absolute error of map pixels, in units of the pixel threshold, or of the pixel's own
    value where the run's map is above that. ``score_max``, ``score_mean``: absolute error of scores, in units of the
    std of good images' scores (at least 1 % of the threshold). ``decisions``: images that are decided otherwise;
    ``wrong``: those that count, see :class:`Tolerance`. ``pixels``: share of pixels on the other side of the pixel
    threshold. ``run_ms``, ``model_ms``: p50 and p95 of the time of one image.
    """

    precision: str
    images: int
    map_max: float
    map_mean: float
    score_max: float
    score_mean: float
    decisions: int
    wrong: int
    pixels: float
    run_ms: tuple[float, float]
    model_ms: tuple[float, float]

    @property
    def tolerance(self) -> Tolerance:
        """What is allowed for the model's precision."""
        return TOLERANCES[self.precision]

    @property
    def failures(self) -> list[str]:
        """What is beyond its tolerance, a sentence each; empty where the model does what the run does."""
        allowed = self.tolerance
        found = [
            f"{what} is {value:.3g} {unit}, more than {limit:g}"
            for what, value, limit, unit in self._errors()
            if not value <= limit  # NaN too
        ]
        if self.wrong > _allowed(allowed.decisions, self.images):
            found.append(f"{self.wrong} of {self.images} images are decided otherwise")
        return found

    def table(self) -> str:
        """Return a line for each number, with its tolerance."""
        lines = [
            f"{what:<24} {value:>9.2g}  of at most {limit:g} {unit}{'' if value <= limit else '   FAILED'}"
            for what, value, limit, unit in self._errors()
        ]
        most = _allowed(self.tolerance.decisions, self.images)
        failed = "   FAILED" if self.wrong > most else ""
        ties = self.decisions - self.wrong
        near = f", {ties} on the threshold" if ties else ""
        lines += [
            f"{'images decided otherwise':<24} {self.decisions:>9}  of {self.images}, at most {most}{near}{failed}",
            f"{'pixels decided otherwise':<24} {100 * self.pixels:>9.2g}  %",
            f"{'ms an image, p50 and p95':<24} {self.model_ms[0]:>9.1f} {self.model_ms[1]:.1f}"
            f"  (the run here: {self.run_ms[0]:.1f} {self.run_ms[1]:.1f})",
        ]
        return "\n".join(lines)

    def _errors(self) -> list[tuple[str, float, float, str]]:
        allowed = self.tolerance
        pixel, score = "pixel thresholds", "std of good scores"
        return [
            ("map error, max", self.map_max, allowed.map_max, pixel),
            ("map error, mean", self.map_mean, allowed.map_mean, pixel),
            ("score error, max", self.score_max, allowed.score_max, score),
            ("score error, mean", self.score_mean, allowed.score_mean, score),
        ]


def check(
    model: str | Path, run: str | Path, images: str | Path, *, limit: int = MAX_IMAGES, threads: int | None = None
) -> Comparison:
    """Compare an exported model in its run-time with its run, image by image on the CPU.

    Args:
        model: a file that :func:`bkd_fast.export.export` wrote, of any format.
        run: folder of the trained category that it came from.
        images: folder of images, good ones or others; none that the run was trained on, see :attr:`Comparison.wrong`.
        limit: how many of them to take at most, evenly spread over the sorted names.
        threads: of both run-times (default: torch's number of threads).

    Returns:
        What differs. ``failures`` of it is empty where all is within the tolerances.

    Raises:
        BKDError: an unusable model, run or image; a run-time that is not installed; a model of another run, or whose
            thresholds are not the run's.
    """
    model, folder = Path(model), Path(images)
    limit = check_int("limit", limit, 1)
    threads = torch.get_num_threads() if threads is None else check_int("threads", threads, 1, 1024)
    format = format_of(model)
    detector = Detector.load(run, device="cpu")
    files = image_files(folder) if folder.is_dir() else []
    if not files:
        raise BKDError(f"there are no images in {folder}: expected a folder of images that the run was not trained on")
    runner = load_runner(format, model, threads)
    settings = parse(runner.metadata, model)
    if (settings["teacher"], settings["input_size"]) != (detector.config.teacher.name, [*detector.config.teacher.size]):
        raise BKDError(
            f"{model} is of another run: it has the teacher {settings['teacher']} and images of "
            f"{settings['input_size']}, and {run} {detector.config.teacher.name} and {[*detector.config.teacher.size]}"
        )
    for name in ("threshold", "pixel_threshold"):
        if settings[name] != getattr(detector, name):
            raise BKDError(
                f"{model} has the {name} {settings[name]:.6g}, and {run} has {getattr(detector, name):.6g}: the run "
                "was calibrated or trained again since; export it again"
            )
    return compare(detector, runner, inputs(detector, spread(files, limit)), settings["precision"])


def load_runner(format: str, path: Path, threads: int | None = None) -> Runner:
    """Return an exported model in its run-time.

    Raises:
        BKDError: a run-time that is not installed, or that cannot read the file.
    """
    try:
        runner = read(format, path, threads)
    except Exception as error:  # whatever a run-time raises
        raise BKDError(f"{path} cannot be read by its run-time ({error}): export it again") from error
    if runner is None:
        raise BKDError(
            f"{path} needs {' and '.join(RUNS[format])}, which is not installed: pip install 'bkd_fast[export]'"
        )
    return runner


def compare(detector: Detector, runner: Runner, images: Iterable[Tensor], precision: str = "float32") -> Comparison:
    """Compare an exported model with a detector.

    Args:
        images: each (3, H, W), as the network takes them; at least one.
        precision: of the model, which decides about the tolerances.

    Raises:
        BKDError: the model cannot compute an image, or gives outputs of another shape.
    """
    allowed = TOLERANCES[precision]
    pixel_unit, threshold = detector.pixel_threshold, detector.threshold
    score_unit = max(detector.calibration.spread, 0.01 * abs(threshold), 1e-12)
    maps: list[float] = []
    means: list[float] = []
    scores: list[float] = []
    pixels: list[float] = []
    times: list[tuple[float, float]] = []
    decisions = wrong = 0
    for index, image in enumerate(images):
        batch = image[None]
        for _ in range(1 if index else 2):  # the first one twice: run-times prepare themselves on the first call
            begin = time.perf_counter()
            expected_score, expected_map = detector.score(batch)
            between = time.perf_counter()
            score, anomaly_map = _outputs(runner, batch.numpy())
            end = time.perf_counter()
        expected, own = expected_map.numpy(), expected_score.numpy()
        if anomaly_map.shape != expected.shape or score.shape != own.shape:
            raise BKDError(
                f"the exported model gives scores {score.shape} and maps {anomaly_map.shape}: expected {own.shape} and "
                f"{expected.shape}. Export it again"
            )
        error = np.abs(anomaly_map - expected) / np.maximum(expected, pixel_unit)
        apart = float(np.abs(score - own)[0]) / score_unit
        maps.append(float(error.max()))
        means.append(float(error.mean()))
        scores.append(apart)
        pixels.append(float(((anomaly_map > pixel_unit) != (expected > pixel_unit)).mean()))
        times.append((between - begin, end - between))
        if bool(score[0] > threshold) != bool(own[0] > threshold):
            decisions += 1
            wrong += bool(allowed.decisions or abs(float(own[0]) - threshold) > allowed.score_max * score_unit)
    if not scores:
        raise BKDError("there are no images to compare an exported model on")
    (run_p50, model_p50), (run_p95, model_p95) = (1000 * np.percentile(times, (50, 95), axis=0)).tolist()
    return Comparison(
        precision,
        images=len(scores),
        map_max=float(np.max(maps)),
        map_mean=float(np.mean(means)),
        score_max=float(np.max(scores)),
        score_mean=float(np.mean(scores)),
        decisions=decisions,
        wrong=wrong,
        pixels=float(np.mean(pixels)),
        run_ms=(run_p50, run_p95),
        model_ms=(model_p50, model_p95),
    )


def inputs(detector: Detector, files: Sequence[Path]) -> Iterable[Tensor]:
    """Yield images, or tiles of a run that is trained in tiles, as the exported graph takes them: (3, H, W) each."""
    config = detector.config
    samples = [Sample(path, 0, GOOD) for path in files]
    dataset = ImageDataset(samples, config.teacher.size, config.teacher.tile or 0, config.data)
    return (dataset[index][0] for index in range(len(dataset)))


def at_hand(detector: Detector, source: DataSource, run: Path, count: int = AT_EXPORT) -> list[Tensor]:
    """Return what an export is checked with: ``count`` validation images, or if they are gone mirrored supports.

    One is added with a bright mark, as a defect; a support is mirrored since an image that is its own support has
    distances of rounding alone.
    """
    files = validation_files(source)
    if files:
        images = list(islice(inputs(detector, spread(files, count)), count))
    else:
        shown = run / read_category(run).file(SUPPORT)
        images = list(load_support(shown, detector.config.teacher.size, count).flip(-1))
    rows, columns = images[0].shape[-2:]
    marked = images[0].clone()
    marked[:, rows // 4 : rows // 2, columns // 4 : columns // 2] = 0.9
    return [*images, marked]


def validation_files(source: DataSource) -> list[Path]:
    """Return the run's validation images that are still where they were, and what they were."""
    found: list[Path] = []
    for name, record in source.validation_files.items():
        for folder in source.homes:
            path = folder / name
            if path.is_file() and path.stat().st_size == record.size and checksum(path) == record.sha256:
                found.append(path)
                break
    return found


def spread(files: Sequence[Path], count: int) -> list[Path]:
    """Return at most ``count`` of the files, evenly spread."""
    chosen = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
    return [files[index] for index in chosen]


def _outputs(runner: Runner, batch: np.ndarray) -> Sequence[np.ndarray]:
    try:
        return runner(batch)
    except Exception as error:  # whatever a run-time raises
        raise BKDError(
            f"the exported model cannot compute images of {batch.shape} ({error}): export it again"
        ) from error


def _allowed(share: float, images: int) -> int:
    return 0 if share == 0 else max(1, int(share * images))
