"""What a detector says of an image, and the three stages that lead to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.data.inputs import ImageLike, Size, is_one_image, no_image, taken
from bkd_fast.errors import BKDError, check_int
from bkd_fast.inference.streaming import Outcome, pipeline
from bkd_fast.model.ambient import settled

A = TypeVar("A")


@dataclass(frozen=True)
class Prediction:
    """What the detector says of one image.

    ``score``: raw and unbounded, higher is more anomalous. ``label``: True where it is above the threshold.
    ``anomaly_map``: (H, W) float32, raw, at the image's own size. ``mask``: (H, W) bool, pixels above the pixel
    threshold. ``normalized_score``: the score from 0 to 1, 0.5 at the threshold. ``p_value``: share of good images that
    score as high, from 1 / (n + 1) for n good images to 1. ``heat``: the run's median normal pixel and the pixel
    threshold, which set the colours of the picture that a notebook shows; None: no picture. ``category``: of a model of
    several categories, the one whose thresholds decided.
    """

    score: float
    label: bool
    anomaly_map: np.ndarray
    mask: np.ndarray
    normalized_score: float
    p_value: float
    heat: tuple[float, float] | None = field(default=None, repr=False, compare=False)
    category: str | None = None

    def _repr_html_(self) -> str:
        from bkd_fast.inference.notebook import prediction_html  # here: only notebooks need it

        return prediction_html(self)


class Preprocessed(NamedTuple):
    """The network's input (3, H, W) float32 in [0, 1], and the ``size`` (H, W) of the image that it was made from.

    ``roi``: what of the image is looked at, (H, W) bool, where there is a region of interest. ``region``: the same at
    the network's size, where images differ in it.
    """

    input: Tensor
    size: Size
    roi: np.ndarray | None = None
    region: Tensor | None = None


class RawPrediction(NamedTuple):
    """A score, a raw anomaly map (h, w), and the ``size`` (H, W) that the map is resized to.

    ``roi``: see :class:`Preprocessed`. ``category``: the nearest, of a model of several.
    """

    score: float
    anomaly_map: Tensor
    size: Size
    roi: np.ndarray | None = None
    category: str | None = None


class Predictor(ABC, Generic[A]):
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
    def predict(self, batch: Sequence[A]) -> list[RawPrediction]:
        """Return the raw predictions of preprocessed images."""

    @abstractmethod
    def postprocess(self, raw: RawPrediction) -> Prediction:
        """Return the prediction at the image's own size, decided by the thresholds."""

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Prediction | list[Prediction]:
        """Predict one image, or each of a batch.

        Args:
            images: a path, the bytes of a file, a binary file object, a PIL image, an array ((H, W), (H, W, 1), (H, W,
                3) RGB or (H, W, 4) RGBA) or a tensor ((3, H, W) or (N, 3, H, W), floats in [0, 1]); or a sequence of
                these. Of arrays and tensors any type and stride will do; values of more than 8 bits are read as the
                run's images are (:class:`bkd_fast.config.DataConfig`).

        Returns:
            A :class:`Prediction`, or a list of them for a sequence or a 4-dimensional tensor.

        Raises:
            BKDError: something that is not an image; the message says what it was.
        """
        if is_one_image(images):
            return self._all([images])[0]  # type: ignore[list-item]
        if not isinstance(images, (Sequence, Tensor)):
            raise no_image(images)
        return self._all(list(images))  # type: ignore[arg-type]  # several, as is_one_image has found

    def stream(
        self, images: Iterable[ImageLike], *, batch: int | None = None, workers: int = 2
    ) -> Iterator[Outcome[ImageLike, Prediction]]:
        """Predict images as they arrive, in order: decoding, the network and what follows it overlap.

        Args:
            images: any iterable, of any length; see :meth:`__call__` for what an image is. It is iterated in a thread
                of its own, at most a few batches ahead of what has been received. Each image is copied when it is
                taken, so that the iterable may fill one buffer again and again.
            batch: images that go through the network together, where that many are waiting (default: 1 on a CPU,
                else 8).
            workers: threads that decode and finish.

        Yields:
            For each image an outcome: ``item``, the path or the copy of the image, and ``result``, a
            :class:`Prediction`, or ``error``, where the image cannot be read; the stream continues. What the iterable
            itself raises is raised.

        Raises:
            BKDError: ``batch`` or ``workers`` below one, or one image in place of several.
        """
        batch = self.batch if batch is None else check_int("batch", batch, 1, 65_536)
        workers = check_int("workers", workers, 1, 1024)
        if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
            images = list(images)
        if is_one_image(images) or not isinstance(images, Iterable):
            raise BKDError(f"a stream of type {type(images).__name__}: expected an iterable of images, as in [image]")
        return pipeline(
            map(taken, images),
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


@settled(inference=True)
def resize_map(anomaly_map: Tensor, size: Size) -> Tensor:
    """Return a map (h, w) at another size (H, W), on the CPU."""
    return F.interpolate(anomaly_map[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].cpu()
