"""A trained detector in a file for another run-time: ``bkd-fast export`` and ``bkd-fast check``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from bkd_fast.artifact import load_trained
from bkd_fast.errors import BKDError
from bkd_fast.export.comparison import Comparison, at_hand, check, compare
from bkd_fast.export.formats import SUFFIXES, check_packages, read, staged, write
from bkd_fast.export.graph import program
from bkd_fast.export.quantization import calibration_images, quantized
from bkd_fast.export.settings import as_text, settings_of
from bkd_fast.export.translations import onnx_translations
from bkd_fast.files import locked, write_json
from bkd_fast.inference.detector import Detector

__all__ = ["Comparison", "check", "description", "export", "onnx_translations"]


def export(
    run: str | Path,
    format: str,
    out: str | Path | None = None,
    *,
    deform_conv: bool = False,
    int8: str | Path | None = None,
) -> tuple[Path, Comparison | None]:
    """Write a run's model for another run-time, and beside it ``<file>.json``, which says how it is used.

    The graph takes float32 images (N, 3, H, W) in [0, 1] of the run's size, for any N, and gives scores (N,) and
    anomaly maps (N, H, W), both raw. The same settings are in the model file (:mod:`bkd_fast.export.settings`).

    The file is loaded in its run-time and compared with the run before it replaces another: on validation images where
    they still are, else on mirrored support images, and on one with a mark.

    Args:
        run: folder of one trained category.
        format: ``pt2``, ``aoti``, ``onnx`` or ``openvino``.
        out: the file to write (default: ``model``, or with ``int8`` ``model.int8``, with the format's suffix, in the
            run folder).
        deform_conv: ``onnx`` only: DeformConv (opset 19) instead of GridSample.
        int8: ``openvino`` only: a folder of good images, from which the ranges of the teacher's convolutions are taken,
            which then compute in 8 bits (:mod:`bkd_fast.export.quantization`). All else is float32. Needs nncf.

    Returns:
        The file, and what differs from the detector; None where the format's run-time is not installed.

    Raises:
        BKDError: an unknown format, an unusable run or image, a package that is not installed, a teacher without
            convolutions to quantise, a file that cannot be written, or one that does not compute what the detector
            does. No file is then written or replaced.
    """
    if format not in SUFFIXES:
        raise BKDError(f"there is no export format {format!r}: choose one of {', '.join(SUFFIXES)}")
    if deform_conv and format != "onnx":
        raise BKDError(f"deform_conv is an option of the format onnx, not of {format}")
    if int8 is not None and format != "openvino":
        raise BKDError(f"int8 is an option of the format openvino, not of {format}")
    trained = load_trained(run)
    if trained.unified is not None:
        raise BKDError(
            f"{run} is one model of several categories, and an exported graph has one scale and one threshold: train "
            "a model for each category, or predict with bkd_fast"
        )
    detector = Detector(trained, "cpu", pack=False)
    usual = Path(run) / f"model{'' if int8 is None else '.int8'}{SUFFIXES[format]}"
    if detector.config.roi is not None and (detector.roi is None or detector.config.teacher.tile):
        raise BKDError(
            f"{run} looks at another region of each image or tile, which a graph cannot know: only one mask for whole "
            "images is exported"
        )
    path = usual if out is None else Path(out)
    if path.suffix != usual.suffix:
        raise BKDError(f"{path} does not end in {usual.suffix}, as files of the format {format} do")
    check_packages(format, int8=int8 is not None)
    precision, convert = "float32", None
    if int8 is not None:
        precision, convert = "int8", partial(quantized, images=calibration_images(detector, Path(int8)))
    settings = settings_of(detector, format, precision)
    # The run folder is ours; of any other one we only write our own files.
    with locked(path.parent, sweep=path.parent.resolve() == Path(run).resolve()), staged(path) as made:
        write(program(detector), format, made, deform_conv=deform_conv, metadata=as_text(settings), convert=convert)
        comparison = _compared(detector, format, made, at_hand(detector, trained.source, trained.folder), precision)
        write_json(description(made), {**settings, "check": None if comparison is None else asdict(comparison)})
    return path, comparison


def description(path: Path) -> Path:
    """Return the file beside an exported one that says how it is used: one for each format."""
    return path.with_name(f"{path.name}.json")


def _compared(
    detector: Detector, format: str, made: Path, images: Iterable[Tensor], precision: str
) -> Comparison | None:
    """Return what differs, where the run-time is installed.

    Raises:
        BKDError: the run-time cannot read the file, or computes something else.
    """
    try:
        runner = read(format, made)
    except Exception as error:  # whatever a run-time raises
        raise BKDError(f"nothing was written: the run-time of {format} cannot read the model ({error})") from error
    if runner is None:
        return None
    comparison = compare(detector, runner, images, precision)
    if comparison.failures:
        advice = "please report this" if precision == "float32" else f"{precision} is not for this run, leave it out"
        raise BKDError(
            f"nothing was written: the model differs from the run in its run-time. {'; '.join(comparison.failures)} "
            f"(over {comparison.images} images): {advice}"
        )
    return comparison
