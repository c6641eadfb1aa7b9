"""What a detector says of an image, and the three stages that lead to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bkd_fast.data.inputs import ImageLike, Size, no_image
from bkd_fast.errors import BKDError
from bkd_fast.inference.streaming import Outcome, pipeline

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Prediction:
    """What the detector says of one image.

    ``score``: raw and unbounded, higher is more anomalous. ``label``: True where it is above the threshold.
    ``anomaly_map``: (H, W) float32, raw, at the image's own size. ``mask``: (H, W) bool, pixels above the pixel
    threshold. ``normalized_score``: the score from 0 to 1, 0.5 at the threshold. ``p_value``: share of good images that
    score as high, from 1 / (n + 1) for n good images to 1.
    """

    score: float
    label: bool
    anomaly_map: np.ndarray
    mask: np.ndarray
    normalized_score: float
    p_value: float


class Preprocessed(NamedTuple):
    """The network's input (3, H, W) float32 in [0, 1], and the ``size`` (H, W) of the image that it was made from."""

    input: Tensor
    size: Size


class RawPrediction(NamedTuple):
    """A score, a raw anomaly map (h, w), and the ``size`` (H, W) that the map is resized to."""

    score: float
    anomaly_map: Tensor
    size: Size


class Predictor(ABC, Generic[A, B]):
    """Images to predictions in three stages: ``preprocess`` and ``postprocess`` in any thread, ``predict`` in one.

    ``batch``: images that go through the network together.
    """

    batch: int

    @abstractmethod
    def preprocess(self, image: ImageLike) -> A:
        """Return what the network needs of an image; see :meth:`__call__` for what an image is.

        Raises:
            BKDError: something that is not an image; the message says what it was.
        """

    @abstractmethod
    def predict(self, batch: Sequence[A]) -> list[B]:
        """Return the raw predictions of preprocessed images."""

    @abstractmethod
    def postprocess(self, raw: B) -> Prediction:
        """Return the prediction at the image's own size, decided by the thresholds."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence too: of the two, it is the path
        self, images: str | Path | Image.Image | np.ndarray
    ) -> Prediction: ...

    @overload
    def __call__(self, images: Tensor) -> Prediction | list[Prediction]: ...

    @overload
    def __call__(self, images: Sequence[ImageLike]) -> list[Prediction]: ...

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Prediction | list[Prediction]:
        """Predict one image, or each of a batch.

        Args:
            images: a path, a PIL image, an array ((H, W) grey or (H, W, 3) RGB, uint8), a tensor ((3, H, W) or
                (N, 3, H, W), uint8 or float in [0, 1]), or a sequence of these.

        Returns:
            A :class:`Prediction`, or a list of them for a sequence or a 4-dimensional tensor.

        Raises:
            BKDError: something that is not an image; the message says what it was.
        """
        if isinstance(images, (str, Path, Image.Image, np.ndarray)) or (
            isinstance(images, Tensor) and images.ndim != 4
        ):
            return self._all([images])[0]
        if not isinstance(images, (Sequence, Tensor)):
            raise no_image(images)
        return self._all(list(images))

    def stream(
        self, images: Iterable[ImageLike], *, batch: int | None = None, workers: int = 2
    ) -> Iterator[Outcome[ImageLike, Prediction]]:
        """Predict images as they arrive, in order: decoding, the network and what follows it overlap.

        Args:
            images: any iterable, of any length; see :meth:`__call__` for what an image is. It is iterated in a thread
                of its own, at most a few batches ahead of what has been received.
            batch: images that go through the network together, where that many are waiting (default: 1 on a CPU,
                else 8).
            workers: threads that decode and finish.

        Yields:
            For each image an outcome: ``item``, the image as it was given, and ``result``, a :class:`Prediction`, or
            ``error``, where the image cannot be read; the stream continues. What the iterable itself raises is raised.

        Raises:
            BKDError: ``batch`` or ``workers`` below one.
        """
        batch = self.batch if batch is None else batch
        if batch < 1 or workers < 1:
            raise BKDError(f"stream: batch is {batch} and workers {workers}, expected at least 1 of each")
        return pipeline(
            images,
            self.preprocess,
            self.predict,
            lambda _, raw: self.postprocess(raw),
            batch=batch,
            workers=workers,
        )

    def _all(self, images: list[ImageLike]) -> list[Prediction]:
        predictions: list[Prediction] = []
        for start in range(0, len(images), self.batch):
            batch = [self.preprocess(image) for image in images[start : start + self.batch]]
            predictions += [self.postprocess(raw) for raw in self.predict(batch)]
        return predictions


@torch.inference_mode()
def resize_map(anomaly_map: Tensor, size: Size) -> Tensor:
    """Return a map (h, w) at another size (H, W), on the CPU."""
    return F.interpolate(anomaly_map[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].cpu()
