"""The trained detector: an image in, score, label, anomaly map and mask out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bkd_fast.artifact import Trained, load_trained
from bkd_fast.data.inputs import Decoded, ImageLike
from bkd_fast.data.tiles import Size, overlap_of
from bkd_fast.decisions import normalized, p_value
from bkd_fast.errors import BKDError
from bkd_fast.inference.compilation import CompiledModel, check_mode
from bkd_fast.inference.cuda_graphs import GraphedModel
from bkd_fast.inference.packing import can_pack, pack_convolutions, same
from bkd_fast.inference.precision import InPrecision, check_precision
from bkd_fast.inference.prediction import Prediction, Predictor, Preprocessed, RawPrediction, resize_map
from bkd_fast.inference.streaming import Outcome
from bkd_fast.inference.tiling import TiledDetector
from bkd_fast.model.bkd import BRANCHES, Distillation
from bkd_fast.model.folding import fold_batch_norm

if TYPE_CHECKING:
    from bkd_fast.inference.drift import DriftMonitor

GPU_BATCH = 8  # images that go through the network together; on a CPU each alone is faster, its features stay in cache


class Detector(Predictor[Preprocessed, RawPrediction]):
    """A trained category, ready to predict. Make one with :meth:`load`.

    ``threshold`` and ``pixel_threshold`` come from normal images and may be set to other values at any time.
    """

    def __init__(
        self,
        trained: Trained,
        device: str | torch.device = "auto",
        *,
        precision: str = "32",
        compile: str | None = None,
        pack: bool = True,
    ) -> None:
        """
        Args:
            trained: what :func:`bkd_fast.artifact.load_trained` returns. Its model then belongs to the detector, which
                folds batch normalisation, packs convolutions on a CPU, and records CUDA graphs on a GPU.
            device, precision, compile: see :meth:`load`.
            pack: False leaves the network as it is, for a model that is exported.
        """
        self.device = _device(device)
        dtype = check_precision(precision, self.device)
        if compile is not None:
            check_mode(compile, self.device)
        self.batch = 1 if self.device.type == "cpu" else GPU_BATCH
        self.config = trained.config
        self.calibration = trained.calibration
        self.threshold = trained.calibration.threshold
        self.pixel_threshold = trained.calibration.pixel_threshold
        self.model = trained.model.to(self.device).eval()
        # A normal image to try the network with, mirrored: one that is its own support has distances of rounding alone.
        self.sample = trained.sample.flip(-1)
        self._fold(self.sample.to(self.device))
        if dtype != torch.float32:
            self._narrow(dtype)
        self._set_support(trained.support)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        self._program: CompiledModel | GraphedModel | None = None
        if compile is not None:
            self._take(CompiledModel(self.model, compile), f"compile={compile!r}", tolerance)
        elif pack and self.device.type == "cuda":
            self._take(GraphedModel(self.model, self.device, GPU_BATCH), "the CUDA graph", tolerance)
        elif pack and self.device.type == "cpu" and can_pack():
            self._pack(self.sample, tolerance)

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        device: str | torch.device = "auto",
        precision: str = "32",
        compile: str | None = None,
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

        Raises:
            BKDError: not a whole run folder, or one of several categories (:func:`bkd_fast.artifact.load_trained`). A
                precision or a mode that the device does not have.
            RuntimeError: the compiled network does not compute what it should.
        """
        return cls(load_trained(run), device, precision=precision, compile=compile)

    def set_support(self, images: Sequence[ImageLike]) -> None:
        """Replaces the support by other normal images, without training; any number of them.

        The thresholds stay: they were measured with the former support.
        """
        if not len(images):
            raise BKDError("the support is empty: expected at least one image of a normal part")
        size = self.config.teacher.image_size
        stacked = torch.stack([Decoded(image).fitted(size) for image in images]).to(self.device)
        with torch.inference_mode():
            parts = [self.model.support_levels(part) for part in stacked.split(GPU_BATCH)]
        self._set_support([torch.cat(level, 1) for level in zip(*parts, strict=True)])

    @property
    def is_eager(self) -> bool:
        """Whether the network runs module by module, so that a module's hooks see every image."""
        return self._program is None

    def preprocess(self, image: ImageLike) -> Preprocessed:
        """Return an image as the network takes it; see :meth:`Predictor.preprocess`."""
        decoded = Decoded(image)
        return Preprocessed(decoded.fitted(self.config.teacher.image_size), decoded.size)

    def predict(self, batch: Sequence[Preprocessed]) -> list[RawPrediction]:
        """Return raw scores, and maps at the network's size."""
        inputs, sizes = zip(*batch, strict=True)
        scores, maps = self.score(torch.stack(inputs))
        return [RawPrediction(*each) for each in zip(scores.tolist(), maps, sizes, strict=True)]

    def postprocess(self, raw: RawPrediction) -> Prediction:
        """Return the prediction: above ``threshold`` an image is anomalous, above ``pixel_threshold`` a pixel."""
        anomaly_map = resize_map(raw.anomaly_map, raw.size).numpy()
        return Prediction(
            raw.score,
            raw.score > self.threshold,
            anomaly_map,
            anomaly_map > self.pixel_threshold,
            normalized(raw.score, self.threshold, self.calibration.spread),
            p_value(raw.score, self.calibration.scores),
        )

    def predictor(self, tile: int | Size | None = None, overlap: int = 0) -> Detector | TiledDetector:
        """Return what predicts whole images or tiles: as asked, or else as the run was trained.

        Args:
            tile: (height, width) of tiles in pixels of the image, or one number for both.
            overlap: pixels that neighbouring tiles share, at least; without ``tile`` the run's own.

        Raises:
            BKDError: see :func:`bkd_fast.data.tiles.check_tiles`.
        """
        trained = self.config.teacher.tile
        if tile is None and trained is not None:
            return TiledDetector(self, trained, overlap_of(trained))
        return self if tile is None else TiledDetector(self, tile, overlap)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence too: of the two, it is the path
        self, images: str | Path | Image.Image | np.ndarray, *, tile: int | Size | None = ..., overlap: int = ...
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

    @torch.inference_mode()
    def score(self, images: Tensor, branches: Sequence[str] = BRANCHES) -> tuple[Tensor, Tensor]:
        """Return scores (N,) and raw maps (N, H, W) of images (N, 3, H, W) in [0, 1] of the configured size."""
        if self._program is not None and tuple(branches) == BRANCHES:
            return self._program(images.to(self.device), self.support)
        return self.score_features(self.distill(images), branches)

    @torch.inference_mode()
    def levels(self, images: Tensor) -> list[Tensor]:
        """Return the teacher's levels of images (N, 3, H, W) in [0, 1] of the configured size."""
        return self.model.teacher(images.to(self.device))

    @torch.inference_mode()
    def distill(self, images: Tensor) -> Distillation:
        """Return both branches' features, for :meth:`score_features`."""
        return self.model.distill(self.levels(images), self.support)

    @torch.inference_mode()
    def score_features(self, result: Distillation, branches: Sequence[str] = BRANCHES) -> tuple[Tensor, Tensor]:
        """Return scores (N,) and maps (N, H, W) of the given branches."""
        maps = self.model.anomaly_map(result, self.config.teacher.image_size, branches)
        return self.model.image_score(maps, result.image if "forward" in branches else None), maps

    @torch.no_grad()
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

    @torch.no_grad()
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

    @torch.no_grad()
    def _set_support(self, levels: list[Tensor]) -> None:
        self.support = self.model.make_support([level.to(self.device) for level in levels])


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BKDError("device 'cuda' was asked for, and torch sees no CUDA device: use device='cpu' or 'auto'")
    return chosen
