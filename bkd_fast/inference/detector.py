"""The trained detector: an image in, score, label, anomaly map and mask out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bkd_fast.artifact import Trained, Unified, copy_run, load_trained, read_category
from bkd_fast.data import FileRecord, Sample, fit_roi, load_roi, shrink_roi
from bkd_fast.data.inputs import Decoded, ImageLike, Masked, OneImage, is_one_image
from bkd_fast.data.roi import check_roi
from bkd_fast.data.tiles import Size, overlap_of
from bkd_fast.decisions import normalized, p_value
from bkd_fast.errors import BKDError, ImageError, check_bool, check_float, check_int
from bkd_fast.inference.compilation import CompiledModel, check_mode
from bkd_fast.inference.cuda_graphs import GraphedModel
from bkd_fast.inference.fusing import fuse_teacher
from bkd_fast.inference.packing import can_pack, pack_convolutions, same
from bkd_fast.inference.precision import InPrecision, check_precision
from bkd_fast.inference.prediction import Prediction, Predictor, Preprocessed, RawPrediction, resize_map
from bkd_fast.inference.streaming import Outcome
from bkd_fast.inference.tiling import TiledDetector
from bkd_fast.model.ambient import settled
from bkd_fast.model.bkd import BRANCHES, Distillation
from bkd_fast.model.folding import fold_batch_norm
from bkd_fast.model.support import Support, SupportBank, describe, nearest

if TYPE_CHECKING:
    from bkd_fast.inference.drift import DriftMonitor

log = logging.getLogger("bkd_fast")
GPU_BATCH = 8  # images that go through the network together; on a CPU each alone is faster, its features stay in cache


class Detector(Predictor[Preprocessed]):
    """A trained category, ready to predict. Make one with :meth:`load`.

    ``threshold`` and ``pixel_threshold`` come from normal images and may be set to other values at any time.

    What a program has set in torch (default type and device, autocast, gradients, inference mode) makes no difference.
    TF32 and precision switches, deterministic mode and the number of threads have their usual effect: rounding.

    It can be pickled, deep-copied and passed to spawned processes: what travels is the path of the run folder, the
    options, the thresholds and a replaced support, and the run is loaded again. A process that was forked after torch
    has computed something must not use it (torch's thread pools do not survive a fork): spawn.
    """

    threshold: float
    pixel_threshold: float

    @settled(build=True)
    def __init__(
        self,
        trained: Trained,
        device: str | torch.device = "auto",
        *,
        precision: str = "32",
        compile: str | None = None,
        pack: bool = True,
        max_pixels: int | None = None,
        pages: str | None = None,
    ) -> None:
        """Prepare a trained model for prediction.

        Args:
            trained: what :func:`bkd_fast.artifact.load_trained` returns. Its model then belongs to the detector, which
                folds batch normalisation, packs convolutions on a CPU, and on a GPU fuses those of the teacher with
                what follows them and records CUDA graphs.
            device, precision, compile, max_pixels, pages: see :meth:`load`.
            pack: False leaves the network as it is, for a model that is exported.
        """
        self.device = check_device(device)
        dtype = check_precision(precision, self.device)
        if compile is not None:
            check_mode(compile, self.device)
        reading = {"data.max_pixels": max_pixels, "data.pages": pages}
        self.config = trained.config.with_changes({key: value for key, value in reading.items() if value is not None})
        self._run, self._files = trained.folder, trained.files
        self._temporary: TemporaryDirectory[str] | None = None  # that holds the run
        self.trained_on = len(trained.source.all_train)  # images
        self._options: dict[str, Any] = {
            "device": "auto" if device == "auto" else str(self.device),
            "precision": precision,
            "compile": compile,
            "pack": check_bool("pack", pack),
            "max_pixels": max_pixels,
            "pages": pages,
        }
        self._replaced = False
        if trained.unified is not None and compile is not None:
            raise BKDError(f"compile is {compile!r}, and a model of several categories is not compiled: leave it out")
        self.batch = 1 if self.device.type == "cpu" else GPU_BATCH
        self.calibration, self.roi = trained.calibration, trained.roi
        self.threshold = trained.calibration.threshold
        self.pixel_threshold = trained.calibration.pixel_threshold
        self.unified = trained.unified
        self.model = trained.model.to(self.device).eval()
        # A normal image to try the network with, mirrored: one that is its own support has distances of rounding alone.
        self.sample = trained.sample.flip(-1)
        self._fold(self.sample.to(self.device))
        if dtype != torch.float32:
            self._narrow(dtype)
        if pack:
            self.model.prepare()
        self.support = self.model.make_support([level.to(self.device) for level in trained.support], own=True)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        self._program: CompiledModel | GraphedModel | None = None
        if compile is not None:
            self._take(CompiledModel(self.model, compile), f"compile={compile!r}", tolerance)
        elif pack and self.device.type == "cuda":
            fuse_teacher(self.model.teacher, self.sample.to(self.device), tolerance)
            if self.unified is None:
                self._take(GraphedModel(self.model, self.device, GPU_BATCH), "the CUDA graph", tolerance)
        elif pack and self.device.type == "cpu" and can_pack():
            self._pack(self.sample, tolerance)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("threshold", "pixel_threshold"):
            if self.__dict__.get("unified") is not None:
                raise BKDError(f"the run is one model of several categories, each with thresholds: {name} is not one")
            value = check_float(name, value)
        super().__setattr__(name, value)

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        device: str | torch.device = "auto",
        precision: str = "32",
        compile: str | None = None,
        max_pixels: int | None = None,
        pages: str | None = None,
    ) -> Detector:
        """Reads the run folder of one category.

        Args:
            device: ``auto`` takes CUDA where there is a device.
            precision: ``32``; or ``bf16``, on GPUs also ``fp16``: the convolutions of teacher, bottleneck and student
                in that type, all else in float32. Scores then differ a little, and the thresholds are those of float32.
            compile: None; or a mode of ``torch.compile``: ``default``, ``max-autotune``, on GPUs also
                ``reduce-overhead``, which records CUDA graphs of what was compiled. Loading then takes a minute or
                more, and each further number of images in a batch another one. It needs a C++ compiler, and what it
                makes is compared with the network that is not compiled. None on a GPU: CUDA graphs of the kernels as
                they are, one for each number of images up to 8.
            max_pixels: the largest image that is decoded; None: the run's ``data.max_pixels``.
            pages: ``one`` refuses files of several pages or frames, ``first`` reads the first; None: the run's.

        Raises:
            BKDError: not a whole run folder, or one of several categories (:func:`bkd_fast.artifact.load_trained`). A
                device that is not there; a precision or a mode that the device does not have.
            RuntimeError: the compiled network does not compute what it should.
        """
        check_precision(precision, check_device(device))  # its error before anything is read
        with settled(build=True):
            trained = load_trained(run)
        return cls(trained, device, precision=precision, compile=compile, max_pixels=max_pixels, pages=pages)

    def set_support(self, images: Sequence[ImageLike]) -> None:
        """Replaces the support by other normal images, without training; any number of them.

        The thresholds stay: they were measured with the former support.
        """
        if self.unified is not None:
            raise BKDError("the run is one model of several categories: its support belongs to them, train again")
        if not len(images):
            raise BKDError("the support is empty: expected at least one image of a normal part")
        size = self.config.teacher.size
        with settled():  # not inference mode, whose tensors torch.compile does not take
            decoded = [Decoded(image, self.config.data).within(self.roi_of(image), image) for image in images]
            stacked = torch.stack([image.fitted(size).to(self.device) for image in decoded])
            parts = [self.model.support_levels(part) for part in stacked.split(GPU_BATCH)]
            self.support = self.model.make_support([torch.cat(level, 1) for level in zip(*parts, strict=True)])
        self._replaced = True

    def add_normals(self, images: Sequence[ImageLike] | Tensor) -> Detector:
        """Return a detector that has taken in further normal images without training; this one stays as it is.

        Supports, memory, thresholds and the statistics of drift change as by `bkd-fast update`
        (:func:`bkd_fast.normals.update.add_normals`), warnings included; thresholds that were set by hand do not carry
        over. The new run is in a temporary folder that lasts as long as the new detector: :meth:`save` keeps it.

        Args:
            images: paths, or what :meth:`__call__` takes. At least one that the run does not have.

        Raises:
            BKDError: not images, none that is new, a run folder that is gone or has changed, or supports that
                :meth:`set_support` has replaced.
        """
        from bkd_fast.normals.update import add_normals  # here, since a detector that only predicts needs none of it

        self._check_run("images are added to the run's supports")
        several: Sequence[Any] = [images] if is_one_image(images) else list(images)
        temporary = TemporaryDirectory(prefix="bkd_fast-", ignore_cleanup_errors=True)
        run, when = Path(temporary.name, "run"), datetime.now(timezone.utc).isoformat()
        copy_run(self._run, run, self.calibration)
        samples: dict[str, Sample] = {}
        for index, image in enumerate(several):
            array = self.read(image)  # its error, which names it
            if isinstance(image, (str, Path)):
                path = Path(image).resolve()
                name = str(path)
            else:
                path, name = Path(temporary.name, f"{index:06}.png"), f"given {when}/{index:06}.png"
                Image.fromarray(array).save(path, compress_level=1)
            samples[name] = Sample(path, 0, "good", name=name)
        log.info("%s", add_normals(run, list(samples.values()), "", self.device, progress=False))
        with settled(build=True):
            detector = Detector(load_trained(run), **self._options)
        detector._temporary = temporary
        return detector

    def save(self, folder: str | Path) -> None:
        """Write the run folder of this detector, with its thresholds as they are now.

        Args:
            folder: new or empty, or a run of the same training, which is replaced in one step.

        Raises:
            BKDError: a folder that holds something else or cannot be written, a run folder that is gone or has changed,
                supports that :meth:`set_support` has replaced, or a pixel threshold that is not positive.
        """
        self._check_run("a run holds the images of its supports")
        if self.pixel_threshold <= 0:
            raise BKDError(f"pixel_threshold is {self.pixel_threshold}: expected a positive number to save")
        if self.unified is not None:  # whose thresholds are not set, and this may be the detector of one category
            calibration = read_category(self._run).calibration
        else:
            calibration = replace(
                self.calibration,
                threshold=self.threshold,
                pixel_threshold=self.pixel_threshold,
                normal_level=min(self.calibration.normal_level, 0.5 * self.pixel_threshold),
            )
        copy_run(self._run, Path(folder), calibration)

    def roi_of(self, image: ImageLike) -> np.ndarray | None:
        """Return what of an image is looked at, (H, W) bool at the size of the mask; None: everything.

        Raises:
            BKDError: an image without a mask of its own where the run has none for all, or the reverse; or a mask that
                cannot be used.
        """
        each = self.config.roi is not None and self.roi is None
        if isinstance(image, Masked) != each:
            raise BKDError(
                "this run looks at another region of each image: give bkd_fast.data.inputs.Masked(image, mask), or a "
                "folder of masks with --roi"
                if each
                else "this run has no mask for each image: give images without one"
            )
        if not isinstance(image, Masked):
            return self.roi
        return check_roi(image.roi) if isinstance(image.roi, np.ndarray) else load_roi(image.roi, self.config.data)

    def region(self, size: Size, image: ImageLike = b"") -> np.ndarray | None:
        """Return what is looked at of maps of the network's size or of an image's (H, W), bool; None: everything.

        Args:
            image: see :meth:`roi_of`; not needed where one mask is for all.
        """
        roi = self.roi_of(image)
        if roi is None:
            return None
        if size == self.config.teacher.size and not self.config.teacher.tile:
            return shrink_roi(roi, size).numpy()
        return fit_roi(roi, size, "the map")

    def read(self, image: ImageLike) -> np.ndarray:
        """Return an image as (H, W, 3) uint8 RGB, its values read as the run's images are.

        Raises:
            ImageError: something that is not an image.
        """
        return Decoded(image, self.config.data).array()

    @property
    def is_eager(self) -> bool:
        """Whether the network runs module by module, so that a module's hooks see every image."""
        return self._program is None

    def preprocess(self, image: ImageLike) -> Preprocessed:
        """Return an image as the network takes it; see :meth:`Predictor.preprocess`."""
        roi, size = self.roi_of(image), self.config.teacher.size
        decoded = Decoded(image, self.config.data).within(roi, image)
        region = None if roi is None or self.model.roi is not None else shrink_roi(roi, size)
        if region is not None and not region.any():
            raise ImageError(f"nothing of the region of interest is left at the network's size of {size}")
        return Preprocessed(decoded.fitted(size), decoded.size, decoded.roi, region)

    def predict(self, batch: Sequence[Preprocessed]) -> list[RawPrediction]:
        """Return raw scores, and maps at the network's size."""
        inputs, sizes, rois, regions = zip(*batch, strict=True)
        images = torch.stack([image.to(inputs[0].device) for image in inputs])
        if self.unified is not None:
            values, raw_maps, names = self._by_category(images, self.unified)
            return [RawPrediction(*each) for each in zip(values, raw_maps, sizes, rois, names, strict=True)]
        region = None if regions[0] is None else torch.stack(regions)
        scores, maps = self.score(images, region=region)
        return [RawPrediction(*each) for each in zip(scores.tolist(), maps, sizes, rois, strict=True)]

    def postprocess(self, raw: RawPrediction) -> Prediction:
        """Return the prediction: above ``threshold`` an image is anomalous, above ``pixel_threshold`` a pixel."""
        own = self.for_category(raw.category)
        anomaly_map = resize_map(raw.anomaly_map, raw.size).numpy()
        mask = anomaly_map > own.pixel_threshold
        if raw.roi is not None:
            anomaly_map, mask = anomaly_map * raw.roi, mask & raw.roi
        return Prediction(
            raw.score,
            raw.score > own.threshold,
            anomaly_map,
            mask,
            normalized(raw.score, own.threshold, own.calibration.spread),
            p_value(raw.score, own.calibration.scores),
            (own.calibration.normal_level, own.pixel_threshold),
            raw.category,
        )

    def for_category(self, category: str | None) -> Detector:
        """Return this detector with the thresholds of one category of its run, which is one model of several.

        Args:
            category: of a prediction; None, as of a run of one category, returns the detector itself.

        Raises:
            BKDError: no such category.
        """
        if category is None:
            return self
        if self.unified is None or category not in self.unified.names:
            names = ", ".join(self.unified.names) if self.unified else "the run is of a single one"
            raise BKDError(f"there is no category {category!r}: {names}")
        calibration = self.unified.calibrations[self.unified.names.index(category)]
        other = object.__new__(type(self))
        other.__dict__.update(
            self.__dict__,
            calibration=calibration,
            threshold=calibration.threshold,
            pixel_threshold=calibration.pixel_threshold,
        )
        return other

    @settled(inference=True)
    def _by_category(self, images: Tensor, unified: Unified) -> tuple[list[float], Tensor, list[str]]:
        """Return scores, maps and categories of images: the category of the nearest support sets an image's scale."""
        levels = self.levels(images)
        result = self.model.distill(levels, self.support)
        maps = self.model.anomaly_map(result, self.config.teacher.size)
        assert isinstance(self.support, SupportBank)
        assert result.image is not None
        assert result.expected is not None
        closest = nearest(describe(levels[-1].float()), self.support, 1).flatten().tolist()
        numbers = [unified.bank[support] for support in closest]
        rows = zip(self.model.top_mean(maps).split(1), result.image.split(1), result.expected.split(1), strict=True)
        scores = [
            self.model.score_of(*row, unified.scales[number]).item() for row, number in zip(rows, numbers, strict=True)
        ]
        return scores, maps, [unified.names[number] for number in numbers]

    def predictor(self, tile: int | Size | None = None, overlap: int = 0) -> Detector | TiledDetector:
        """Return what predicts whole images or tiles: as asked, or else as the run was trained.

        Args:
            tile: (height, width) of tiles in pixels of the image, or one number for both.
            overlap: pixels that neighbouring tiles share, at least; without ``tile`` the run's own.

        Raises:
            BKDError: an ``overlap`` without ``tile``; see :func:`bkd_fast.data.tiles.check_tiles`.
        """
        trained = self.config.teacher.tile
        if tile is None and check_int("overlap", overlap) != 0:
            raise BKDError(f"overlap is {overlap} and tile is None: set tile too, or leave overlap out")
        if tile is None and trained is not None:
            return TiledDetector(self, trained, overlap_of(trained))
        return self if tile is None else TiledDetector(self, tile, overlap)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence too: of the two, it is the path
        self, images: OneImage, *, tile: int | Size | None = ..., overlap: int = ...
    ) -> Prediction: ...

    @overload
    def __call__(
        self, images: Tensor, *, tile: int | Size | None = ..., overlap: int = ...
    ) -> Prediction | list[Prediction]: ...

    @overload
    def __call__(
        self, images: Sequence[ImageLike], *, tile: int | Size | None = ..., overlap: int = ...
    ) -> list[Prediction]: ...

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], *, tile: int | Size | None = None, overlap: int = 0
    ) -> Prediction | list[Prediction]:
        """Predict one image, or each of a batch; see :meth:`Predictor.__call__`.

        Args:
            images: an image or several.
            tile, overlap: predict in tiles, for details that would be lost in an image that is resized whole; see
                :meth:`predictor`.
        """
        predictor = self.predictor(tile, overlap)
        return super().__call__(images) if predictor is self else predictor(images)

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        batch: int | None = None,
        workers: int = 2,
        tile: int | Size | None = None,
        overlap: int = 0,
        monitor: DriftMonitor | None = None,
    ) -> Iterator[Outcome[ImageLike, Prediction]]:
        """Predict images as they arrive; see :meth:`Predictor.stream`, and :meth:`predictor` for tiles.

        A ``monitor`` follows the images, and drift is logged once. It changes no prediction.
        """
        predictor = self.predictor(tile, overlap)
        if monitor is not None:
            from bkd_fast.inference.drift import watch  # which imports this module

            return watch(self, predictor, monitor).stream(images, batch=batch, workers=workers)
        stream = super().stream if predictor is self else predictor.stream
        return stream(images, batch=batch, workers=workers)

    @settled(inference=True)
    def score(
        self, images: Tensor, branches: Sequence[str] = BRANCHES, region: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return scores (N,) and raw maps (N, H, W) of images (N, 3, H, W) in [0, 1] of the configured size.

        ``region``: what of each is looked at, where they are tiles; see :meth:`BKD.distill`. A model of several
        categories scores all of them on one scale here: :meth:`predict` takes that of each image's category.
        """
        if self._program is not None and tuple(branches) == BRANCHES and region is None:
            return self._program(images.to(self.device), self.support)
        return self.score_features(self.distill(images, region), branches)

    @settled(inference=True)
    def levels(self, images: Tensor) -> list[Tensor]:
        """Return the teacher's levels of images (N, 3, H, W) in [0, 1] of the configured size."""
        return self.model.teacher(images.to(self.device))

    @settled(inference=True)
    def distill(self, images: Tensor, region: Tensor | None = None) -> Distillation:
        """Return both branches' features, for :meth:`score_features`."""
        if region is None:
            return self.model.distill(self.levels(images), self.support)
        levels = self.model.teacher(images.to(self.device), blank=False)
        return self.model.distill(levels, self.support, region=region.to(self.device))

    @settled(inference=True)
    def score_features(self, result: Distillation, branches: Sequence[str] = BRANCHES) -> tuple[Tensor, Tensor]:
        """Return scores (N,) and maps (N, H, W) of the given branches."""
        maps = self.model.anomaly_map(result, self.config.teacher.size, branches)
        whole = (result.image, result.expected) if "forward" in branches else (None, None)
        region = None if result.region is self.model.roi else result.region
        return self.model.image_score(maps, *whole, region), maps

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_files()
        return _loaded_again, (str(self._run.resolve()), self._files, self._options, self.kept())

    def _repr_html_(self) -> str:
        from bkd_fast.inference.notebook import detector_html  # here: only notebooks need it

        return detector_html(self)

    def kept(self) -> dict[str, Any]:
        """Return what differs, or may differ, from the detector that its run folder gives; for :meth:`restore`."""
        return {
            "calibration": self.calibration,
            "threshold": self.threshold,
            "pixel_threshold": self.pixel_threshold,
            "support": _moved(self.support, torch.device("cpu")) if self._replaced else None,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Take over what :meth:`kept` returned of a detector of the same run."""
        self.calibration = kept["calibration"]
        self.__dict__.update(threshold=kept["threshold"], pixel_threshold=kept["pixel_threshold"])
        if kept["support"] is not None:
            self.support, self._replaced = _moved(kept["support"], self.device), True

    def _check_files(self) -> None:
        if _files(self._run) != self._files:
            raise BKDError(f"{self._run} was trained or updated since this detector was loaded: load the new run")

    def _check_run(self, why: str) -> None:
        if self._replaced:
            raise BKDError(f"set_support has replaced the supports, and {why}: load the run again")
        self._check_files()

    def _fold(self, image: Tensor) -> None:
        if self.config.student is not None:
            levels = self.model.teacher(image)
            fold_batch_norm(self.model.bottleneck, levels)
            sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
            fold_batch_norm(self.model.student, self.model.bottleneck(levels), sizes)

    def _narrow(self, dtype: torch.dtype) -> None:
        self.model.teacher.network = InPrecision(self.model.teacher.network, dtype)
        if self.config.student is not None:
            for name in ("bottleneck", "student"):
                self.model.set_submodule(name, InPrecision(self.model.get_submodule(name), dtype))

    def _pack(self, image: Tensor, tolerance: float) -> None:
        # Compare on teacher features computed once: rounding could change which supports are retrieved.
        levels = self.model.teacher(image)

        def run() -> list[Tensor]:
            result = self.model.distill(levels, self.support)
            return [*self.model.teacher(image), *result.aligned, *result.reconstruction]

        pack_convolutions(self.model, run, tolerance)

    def _take(self, program: CompiledModel | GraphedModel, what: str, tolerance: float) -> None:
        image = self.sample.to(self.device)
        expected = self.score(image)
        if not same(expected, program(image, self.support), tolerance):
            raise RuntimeError(f"{what} changed what the network computes")
        self._program = program


def check_device(device: str | torch.device) -> torch.device:
    """Return a device that is there; ``auto`` takes CUDA where there is one.

    Raises:
        BKDError: an unknown or missing device.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BKDError(f"device is {device!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:0' and so on") from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    module: Any = getattr(torch, chosen.type, None)
    if not hasattr(module, "device_count") or not module.is_available():
        raise BKDError(f"device is {str(chosen)!r}, and torch sees no {chosen.type.upper()} device: use 'cpu'")
    if chosen.index is not None and chosen.index >= module.device_count():
        raise BKDError(f"device is {str(chosen)!r}, and there are {module.device_count()}, from {chosen.type}:0")
    return chosen


def _files(run: Path) -> dict[str, FileRecord]:
    """Return sizes and checksums of a run's files, which tell whether it is still the same.

    Raises:
        BKDError: the folder is gone.
    """
    try:
        return read_category(run).files
    except BKDError as error:
        raise BKDError(f"the detector's run folder {run} cannot be read ({error}): copies need it") from error


def _loaded_again(run: str, files: dict[str, FileRecord], options: dict[str, Any], kept: dict[str, Any]) -> Detector:
    """Return the detector that was pickled or copied.

    Raises:
        BKDError: its run folder is gone, or holds another model by now.
    """
    if _files(Path(run)) != files:
        raise BKDError(f"{run} was trained or updated since this detector was pickled or copied: load the new run")
    with settled(build=True):
        detector = Detector(load_trained(run), **options)
    detector.restore(kept)
    return detector


def _moved(support: Support, device: torch.device) -> Support:
    """Return a support on another device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), support)
