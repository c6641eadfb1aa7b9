"""The trained detector: an image in, score, label, anomaly map and mask out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bkd_fast.artifact import Trained, load_trained
from bkd_fast.data.inputs import Decoded, ImageLike, no_image
from bkd_fast.data.tiles import overlap_of
from bkd_fast.decisions import normalized, p_value
from bkd_fast.errors import BKDError
from bkd_fast.inference.compilation import CompiledJudge, check_mode
from bkd_fast.inference.cuda_graphs import GraphedJudge
from bkd_fast.inference.packing import can_pack, pack_convolutions, same
from bkd_fast.inference.precision import InPrecision, check_precision
from bkd_fast.inference.stages import Prediction, Stages, tiled, whole
from bkd_fast.inference.streaming import Outcome, pipeline
from bkd_fast.model.bkd import BRANCHES, Distillation
from bkd_fast.model.folding import fold_batch_norm

GPU_BATCH = 8  # images that go through the network together; on a CPU each alone is faster, its features stay in cache


class Detector:
    """A trained category, ready to judge images. Make one with :meth:`load`.

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
        self._prepare(trained.support)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        self._program: CompiledJudge | GraphedJudge | None = None
        if compile is not None:
            self._take(CompiledJudge(self.model, compile), f"compile={compile!r}", tolerance)
        elif pack and self.device.type == "cuda":
            self._take(GraphedJudge(self.model, self.device, GPU_BATCH), "the CUDA graph", tolerance)
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
        size = self.config.image_size
        stacked = torch.stack([Decoded(image).fitted(size) for image in images]).to(self.device)
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
            tile: predict in tiles of this (height, width) in pixels of the image, each as an image of its own, for
                details that would be lost in an image that is resized whole. The map is blended from theirs, and the
                score is the highest of a tile. None: as the run was trained (``tile`` of its configuration).
            overlap: pixels that neighbouring tiles have in common, at least; without ``tile`` the run's own.

        Returns:
            A :class:`Prediction`, or a list of them for a sequence or a 4-dimensional tensor.

        Raises:
            BKDError: something that is not an image, or is smaller than a tile; the message says what it was.
        """
        stages = self.stages(tile, overlap)
        if isinstance(images, (str, Path, Image.Image, np.ndarray)) or (
            isinstance(images, Tensor) and images.ndim != 4
        ):
            return stages.run([images], 1)[0]
        if not isinstance(images, (Sequence, Tensor)):
            raise no_image(images)
        # Of images in tiles each is a batch of its own.
        return stages.run(list(images), self.batch if tile is None and not self.config.tile else 1)

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        batch: int | None = None,
        workers: int = 2,
        tile: int | tuple[int, int] | None = None,
        overlap: int = 0,
    ) -> Iterator[Outcome[ImageLike, Prediction]]:
        """Judges images as they come, in order: decoding, the network and what follows it work at the same time.

        Args:
            images: anything that can be iterated over, of any length; see :meth:`__call__` for what an image is. It is
                iterated in a thread of its own, at most a few batches ahead of what has been received.
            batch: images that go through the network together, where that many are there (default: 1 on a CPU, else 8).
            workers: threads that decode and finish.
            tile, overlap: see :meth:`__call__`.

        Yields:
            For each image an outcome: ``item``, the image as it was given, and ``result``, a :class:`Prediction`, or
            ``error``, where the image cannot be read; the stream goes on. What the iterable itself raises is raised.

        Raises:
            BKDError: ``batch`` or ``workers`` below one.
        """
        batch = self.batch if batch is None else batch
        if batch < 1 or workers < 1:
            raise BKDError(f"stream: batch is {batch} and workers {workers}, expected at least 1 of each")
        stages = self.stages(tile, overlap)
        return pipeline(
            images,
            stages.prepare,
            stages.judge,
            lambda _, judged: stages.finish(judged),
            batch=batch,
            workers=workers,
        )

    def stages(self, tile: int | tuple[int, int] | None = None, overlap: int = 0) -> Stages:
        """What becomes of an image, for a pipeline of one's own; see :meth:`__call__` for ``tile`` and ``overlap``."""

        normal, spread = self.calibration.scores, self.calibration.spread

        def decide(score: float, anomaly_map: np.ndarray) -> Prediction:
            return Prediction(
                score,
                score > self.threshold,
                anomaly_map,
                anomaly_map > self.pixel_threshold,
                normalized(score, self.threshold, spread),
                p_value(score, normal),
            )

        if tile is None and self.config.tile:
            tile, overlap = self.config.tile, overlap_of(self.config.tile)
        if tile is None:
            return whole(self.config.image_size, self.score, decide)
        return tiled(self.config.image_size, self.score, decide, self.batch, tile, overlap)

    @torch.inference_mode()
    def score(self, images: Tensor, branches: Sequence[str] = BRANCHES) -> tuple[Tensor, Tensor]:
        """Scores (N,) and raw anomaly maps (N, H, W) of images (N, 3, H, W) in [0, 1] of the configured size."""
        if self._program is not None and tuple(branches) == BRANCHES:
            return self._program(images.to(self.device), self.prepared)
        return self.judge(self.distill(images), branches)

    @torch.inference_mode()
    def levels(self, images: Tensor) -> list[Tensor]:
        """Return the teacher's levels of images (N, 3, H, W) in [0, 1] of the configured size."""
        return self.model.teacher(images.to(self.device))

    @torch.inference_mode()
    def distill(self, images: Tensor) -> Distillation:
        """Return both branches' features, for :meth:`judge`."""
        return self.model.distill(self.levels(images), self.prepared)

    @torch.inference_mode()
    def judge(self, result: Distillation, branches: Sequence[str] = BRANCHES) -> tuple[Tensor, Tensor]:
        """Scores (N,) and maps (N, H, W) that the given branches make of ``result``."""
        maps = self.model.anomaly_map(result, self.config.image_size, branches)
        return self.model.image_score(maps, result.image if "forward" in branches else None), maps

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

    def _take(self, judge: CompiledJudge | GraphedJudge, what: str, tolerance: float) -> None:
        image = self.sample.to(self.device)
        expected = self.score(image)
        if not same(expected, judge(image, self.prepared), tolerance):
            raise RuntimeError(f"{what} changed what the network computes")
        self._program = judge

    def _prepare(self, support: list[Tensor]) -> None:
        # Whatever depends on the support alone is computed once, here.
        with torch.no_grad():
            self.prepared = self.model.prepare([level.to(self.device) for level in support])


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BKDError("device 'cuda' was asked for, and torch sees no CUDA device: use device='cpu' or 'auto'")
    return chosen
