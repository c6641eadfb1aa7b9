"""A trained detector in a file for another run-time: ``bkd-fast export``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bkd_fast.artifact import load_trained
from bkd_fast.errors import BKDError
from bkd_fast.export.formats import INPUT, OUTPUTS, RUNTIME, SUFFIXES, check_packages, read, write
from bkd_fast.export.graph import program
from bkd_fast.export.translations import onnx_translations
from bkd_fast.files import locked, write_json
from bkd_fast.inference.detector import Detector
from bkd_fast.version import __version__

TOLERANCE = 1e-3  # of the largest value of a map, and of a score

__all__ = ["description", "export", "onnx_translations"]


def export(
    run: str | Path, format: str, out: str | Path | None = None, *, deform_conv: bool = False
) -> tuple[Path, float | None]:
    """Write a run's model for another run-time, and beside it ``<file>.json``, which says how it is used.

    The graph takes float32 images (N, 3, H, W) in [0, 1] of the run's size, for any N, and gives scores (N,) and
    anomaly maps (N, H, W), both raw: thresholds are in the description, and can be changed without a new export.

    Args:
        run: folder of one trained category.
        format: ``pt2``, ``aoti``, ``onnx`` or ``openvino``.
        out: the file to write (default: ``model`` with the format's suffix, in the run folder).
        deform_conv: ``onnx`` only: DeformConv (opset 19) instead of GridSample.

    Returns:
        The file, and how far it is from the detector in its run-time, relative to the largest value; None where that
        run-time is not installed.

    Raises:
        BKDError: an unknown format, an unusable run, a package that is not installed, a file that cannot be written,
            or one that does not compute what the detector does.
    """
    if format not in SUFFIXES:
        raise BKDError(f"there is no export format {format!r}: choose one of {', '.join(SUFFIXES)}")
    if deform_conv and format != "onnx":
        raise BKDError(f"deform_conv is an option of the format onnx, not of {format}")
    detector = Detector(load_trained(run), "cpu", pack=False)
    usual = Path(run) / f"model{SUFFIXES[format]}"
    if detector.config.roi is not None and (detector.roi is None or detector.config.teacher.tile):
        raise BKDError(
            f"{run} looks at another region of each image or tile, which a graph cannot know: only one mask for whole "
            "images is exported"
        )
    path = usual if out is None else Path(out)
    if path.suffix != usual.suffix:
        raise BKDError(f"{path} does not end in {usual.suffix}, as files of the format {format} do")
    check_packages(format)
    # The run folder is ours; of any other one we only write our own files.
    with locked(path.parent, sweep=path.parent.resolve() == Path(run).resolve()):
        write(program(detector), format, path, deform_conv=deform_conv)
        try:
            difference = _difference(detector, format, path)
        except RuntimeError as error:  # whatever a run-time raises
            raise BKDError(f"{path} was written, and its run-time cannot read it ({error}): do not use it") from error
        if difference is not None and not difference <= TOLERANCE:
            raise BKDError(
                f"{path} was written, and in its run-time it differs from the detector by {difference:.2g} of the "
                f"largest value, more than {TOLERANCE:g}: do not use it, and please report this"
            )
        rows, columns = detector.config.teacher.size
        values = "float32, RGB in [0, 1], resized with antialiasing"
        write_json(
            description(path),
            {
                "bkd_fast": __version__,
                "format": format,
                "input": {INPUT: ["N", 3, rows, columns], "values": values},
                "outputs": {OUTPUTS[0]: ["N"], OUTPUTS[1]: ["N", rows, columns]},
                "runtime": RUNTIME.get(format, {}),  # settings without which the thresholds do not fit
                "threshold": detector.threshold,
                "pixel_threshold": detector.pixel_threshold,
                "difference": difference,
            },
        )
    return path, difference


def description(path: Path) -> Path:
    """Return the file beside an exported one that says how it is used: one for each format."""
    return path.with_name(f"{path.name}.json")


def _difference(detector: Detector, format: str, path: Path) -> float | None:
    run = read(format, path)
    if run is None:
        return None
    # Normal images, the second with a mark: on noise, far from what it was trained on, a model is all rounding.
    images = detector.sample.repeat(3, 1, 1, 1)
    rows, columns = detector.config.teacher.size
    images[1, :, rows // 4 : rows // 2, columns // 4 : columns // 2] = 0.9
    images[2] = images[2].flip(-1)
    expected = [value.numpy() for value in detector.score(images)]
    outputs = run(images.numpy())
    return max(
        float(np.abs(own - other).max() / np.abs(other).max()) for own, other in zip(outputs, expected, strict=True)
    )
