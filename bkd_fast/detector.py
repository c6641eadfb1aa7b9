"""The trained detector: an image in, score, label, anomaly map and mask out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bkd_fast.errors import BKDError
from bkd_fast.inputs import Decoded, ImageLike, network_input, no_image
from bkd_fast.model.bkd import BRANCHES, Distillation
from bkd_fast.model.folding import fold_batch_norm
from bkd_fast.model.packing import can_pack, pack_convolutions
from bkd_fast.model.precision import InPrecision, check_precision
from bkd_fast.run import Trained, load_trained
from bkd_fast.streaming import Outcome, pipeline
from bkd_fast.tiling import Mosaic, check_tiles

GPU_BATCH = 8  # images that go through the network together; on a CPU each alone is faster, its features stay in cache


@dataclass(frozen=True)
class Prediction:
    """What the detector says of one image.

    ``score``: raw and unbounded, higher is more anomalous. ``label``: True where it is above the threshold.
    ``anomaly_map``: (H, W) float32, raw, at the image's own size. ``mask``: (H, W) bool, pixels above the pixel
    threshold.
    """

    score: float
    label: bool
    anomaly_map: np.ndarray
    mask: np.ndarray


class Detector:
    """A trained category, ready to judge images. Make one with :meth:`load`.

    ``threshold`` and ``pixel_threshold`` come from held-out normal images and may be set to other values at any time.
    """

    def __init__(
        self, trained: Trained, device: str | torch.device = "auto", *, precision: str = "32", pack: bool = True
    ) -> None:
        """
        Args:
            trained: as :func:`bkd_fast.run.load_trained` reads it. Its model then belongs to the detector, which folds
                batch normalisation and, on the CPU, packs convolutions.
            device, precision: see :meth:`load`.
            pack: False leaves the convolutions as they are, for a model that is exported.
        """
        self.device = _device(device)
        dtype = check_precision(precision, self.device)
        self.batch = 1 if self.device.type == "cpu" else GPU_BATCH
        self.config = trained.config
        self.calibration = trained.calibration
        self.threshold = trained.calibration.threshold
        self.pixel_threshold = trained.calibration.pixel_threshold
        self.model = trained.model.to(self.device).eval()
        self.sample = trained.sample  # a normal image, to try the network with
        self._fold(self.sample.to(self.device))
        if dtype != torch.float32:
            self._narrow(dtype)
        self._prepare(trained.support)
        if pack and self.device.type == "cpu" and can_pack():
            self._pack(self.sample, 1e-4 if dtype == torch.float32 else 2e-2)

    @classmethod
    def load(cls, run: str | Path, *, device: str | torch.device = "auto", precision: str = "32") -> Detector:
        """Reads the run folder of one category.

        Args:
            device: ``auto`` takes CUDA where there is a device.
            precision: ``32``; or ``bf16``, on GPUs also ``fp16``: the convolutions of teacher, bottleneck and student
                in that type, all else in float32. Scores then differ a little, and the thresholds are those of float32.

        Raises:
            BKDError: not a whole run folder, or one of several categories; see :func:`bkd_fast.run.load_trained`. A
                precision that the device does not have.
        """
        return cls(load_trained(run), device, precision=precision)

    def set_support(self, images: Sequence[ImageLike]) -> None:
        """Replaces the support by other normal images, without training; any number of them.

        The thresholds stay: they were measured with the former support.
        """
        if not len(images):
            raise BKDError("the support is empty: expected at least one image of a normal part")
        stacked = torch.stack([self._input(image)[0] for image in images]).to(self.device)
        with torch.inference_mode():
            parts = [self.model.support_levels(part) for part in stacked.split(GPU_BATCH)]
        self._prepare([torch.cat(level, 1) for level in zip(*parts, strict=True)])

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence too: of the two, it is the path
        self,
        images: str | Path | Image.Image | np.ndarray,
        *,
        tile: int | tuple[int, int] | None = ...,
        overlap: int = ...,
    ) -> Prediction: ...

    @overload
    def __call__(
        self, images: Tensor, *, tile: int | tuple[int, int] | None = ..., overlap: int = ...
    ) -> Prediction | list[Prediction]: ...

    @overload
    def __call__(
        self, images: Sequence[ImageLike], *, tile: int | tuple[int, int] | None = ..., overlap: int = ...
    ) -> list[Prediction]: ...

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], *, tile: int | tuple[int, int] | None = None, overlap: int = 0
    ) -> Prediction | list[Prediction]:
        """Judges one image, or each of a batch.

        Args:
            images: a path, a PIL image, an array ((H, W) grey or (H, W, 3) RGB, uint8), a tensor ((3, H, W) or
                (N, 3, H, W), uint8 or float in [0, 1]), or a sequence of these.
            tile: judge images in tiles of this (height, width) in pixels of the image, each as an image of its own, for
                details that would be lost in an image that is resized whole. The map is blended from theirs, and the
                score is the highest of a tile. The run should have been trained on images of that size and scale.
            overlap: pixels that neighbouring tiles have in common, at least.

        Returns:
            A :class:`Prediction`, or a list of them for a sequence or a 4-dimensional tensor.

        Raises:
            BKDError: something that is not an image, or is smaller than a tile; the message says what it was.
        """
        size = None if tile is None else check_tiles(tile, overlap)

        def judge(batch: list[ImageLike]) -> list[Prediction]:
            if size is None:
                return self._predict(batch)
            return [self._in_tiles(Decoded(image), size, overlap) for image in batch]

        if isinstance(images, (str, Path, Image.Image, np.ndarray)) or (
            isinstance(images, Tensor) and images.ndim != 4
        ):
            return judge([images])[0]
        if not isinstance(images, (Sequence, Tensor)):
            raise no_image(images)
        return judge(list(images))

    def _in_tiles(self, image: Decoded, tile: tuple[int, int], overlap: int) -> Prediction:
        """Batch by batch: of the tiles no more than a batch is held at a time."""
        mosaic = Mosaic(image.size, tile, overlap)
        places = list(mosaic.tiles())
        score = -math.inf
        for start in range(0, len(places), self.batch):
            group = places[start : start + self.batch]
            parts = [image.fitted(self.config.image_size, *place, tile) for place in group]
            for place, judged in zip(group, self.judge_inputs([(part, tile) for part in parts]), strict=True):
                score = max(score, judged[0])
                mosaic.add(place, self._resized(judged[1], tile))
        return self._decided(score, mosaic.blended().numpy())

    def _predict(self, images: list[ImageLike]) -> list[Prediction]:
        predictions: list[Prediction] = []
        for start in range(0, len(images), self.batch):
            inputs = [self._input(image) for image in images[start : start + self.batch]]
            predictions += [self.prediction(*judged) for judged in self.judge_inputs(inputs)]
        return predictions

    def stream(
        self, images: Iterable[ImageLike], *, batch: int | None = None, workers: int = 2
    ) -> Iterator[Outcome[ImageLike, Prediction]]:
        """Judges images as they come, in order: decoding, the network and what follows it work at the same time.

        Args:
            images: anything that can be iterated over, of any length; see :meth:`__call__` for what an image is. It is
                iterated in a thread of its own, at most a few batches ahead of what has been received.
            batch: images that go through the network together, where that many are there (default: 1 on a CPU, else 8).
            workers: threads that decode and finish.

        Yields:
            For each image an outcome: ``item``, the image as it was given, and ``result``, a :class:`Prediction`, or
            ``error``, where the image cannot be read; the stream goes on. What the iterable itself raises is raised.

        Raises:
            BKDError: ``batch`` or ``workers`` below one.
        """
        batch = self.batch if batch is None else batch
        if batch < 1 or workers < 1:
            raise BKDError(f"stream: batch is {batch} and workers {workers}, expected at least 1 of each")
        return pipeline(
            images,
            self._input,
            self.judge_inputs,
            lambda _, judged: self.prediction(*judged),
            batch=batch,
            workers=workers,
        )

    def _input(self, image: ImageLike) -> tuple[Tensor, tuple[int, int]]:
        return network_input(image, self.config.image_size)

    def judge_inputs(self, inputs: list[tuple[Tensor, tuple[int, int]]]) -> list[tuple[float, Tensor, tuple[int, int]]]:
        """Score, map and own size of each of a batch, of what :func:`bkd_fast.inputs.network_input` gives."""
        tensors, sizes = zip(*inputs, strict=True)
        scores, maps = self.score(torch.stack(tensors))
        return list(zip(scores.tolist(), maps, sizes, strict=True))

    def prediction(self, score: float, anomaly_map: Tensor, size: tuple[int, int]) -> Prediction:
        """Of one image of ``size`` (H, W), its score and its map (h, w)."""
        return self._decided(score, self._resized(anomaly_map, size).numpy())

    def _decided(self, score: float, anomaly_map: np.ndarray) -> Prediction:
        return Prediction(score, score > self.threshold, anomaly_map, anomaly_map > self.pixel_threshold)

    @torch.inference_mode()
    def _resized(self, anomaly_map: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(anomaly_map[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].cpu()

    @torch.inference_mode()
    def score(self, images: Tensor, branches: Sequence[str] = BRANCHES) -> tuple[Tensor, Tensor]:
        """Scores (N,) and raw anomaly maps (N, H, W) of images (N, 3, H, W) in [0, 1] of the configured size."""
        return self.judge(self.distill(images), branches)

    @torch.inference_mode()
    def distill(self, images: Tensor) -> Distillation:
        """Both branches' features, for :meth:`judge`."""
        return self.model.distill(self.model.teacher(images.to(self.device)), self.prepared)

    @torch.inference_mode()
    def judge(self, result: Distillation, branches: Sequence[str] = BRANCHES) -> tuple[Tensor, Tensor]:
        """Scores (N,) and maps (N, H, W) that the given branches make of ``result``."""
        maps = self.model.anomaly_map(result, self.config.image_size, branches)
        return self.model.image_score(maps), maps

    @torch.no_grad()
    def _fold(self, image: Tensor) -> None:
        if self.config.reverse_branch and self.config.student:
            levels = self.model.teacher(image)
            fold_batch_norm(self.model.bottleneck, levels)
            sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
            fold_batch_norm(self.model.student, self.model.bottleneck(levels), sizes)

    def _narrow(self, dtype: torch.dtype) -> None:
        self.model.teacher.network = InPrecision(self.model.teacher.network, dtype)
        if self.config.reverse_branch and self.config.student:
            for name in ("bottleneck", "student"):
                self.model.set_submodule(name, InPrecision(self.model.get_submodule(name), dtype))

    @torch.no_grad()
    def _pack(self, image: Tensor, tolerance: float) -> None:
        # What follows the teacher starts from the same features before and after: which supports are the most similar
        # may hang on their last digit.
        levels = self.model.teacher(image)

        def run() -> list[Tensor]:
            result = self.model.distill(levels, self.prepared)
            return [*self.model.teacher(image), *result.aligned, *result.student]

        pack_convolutions(self.model, run, tolerance)

    def _prepare(self, support: list[Tensor]) -> None:
        # Whatever depends on the support alone is computed once, here.
        with torch.inference_mode():
            self.prepared = self.model.prepare([level.to(self.device) for level in support])


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BKDError("device 'cuda' was asked for, and torch sees no CUDA device: use device='cpu' or 'auto'")
    return chosen
