"""The trained detector: an image in, score, label, anomaly map and mask out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bkd_fast.data import load_image, to_tensor
from bkd_fast.data.image import from_pil
from bkd_fast.errors import BKDError
from bkd_fast.model.bkd import BRANCHES, Distillation
from bkd_fast.run import Trained, load_trained

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
BATCH = 8  # images that go through the network together


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

    def __init__(self, trained: Trained, device: str | torch.device = "auto") -> None:
        self.device = _device(device)
        self.config = trained.config
        self.calibration = trained.calibration
        self.threshold = trained.calibration.threshold
        self.pixel_threshold = trained.calibration.pixel_threshold
        self.model = trained.model.to(self.device).eval()
        self._prepare(trained.support)

    @classmethod
    def load(cls, run: str | Path, *, device: str | torch.device = "auto") -> Detector:
        """Reads the run folder of one category.

        Args:
            device: ``auto`` takes CUDA where there is a device.

        Raises:
            BKDError: not a whole run folder, or one of several categories; see :func:`bkd_fast.run.load_trained`.
        """
        return cls(load_trained(run), device)

    def set_support(self, images: Sequence[ImageLike]) -> None:
        """Replaces the support by other normal images, without training; any number of them.

        The thresholds stay: they were measured with the former support.
        """
        if not len(images):
            raise BKDError("the support is empty: expected at least one image of a normal part")
        self._prepare(torch.stack([self._tensor(image)[0] for image in images]))

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Prediction | list[Prediction]:
        """Judges one image, or each of a batch.

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
            return self._predict([images])[0]
        if not isinstance(images, (Sequence, Tensor)):
            raise BKDError(_no_image(images))
        return self._predict(list(images))

    def _predict(self, images: list[ImageLike]) -> list[Prediction]:
        predictions: list[Prediction] = []
        for start in range(0, len(images), BATCH):
            tensors, sizes = zip(*(self._tensor(image) for image in images[start : start + BATCH]), strict=True)
            scores, maps = self.score(torch.stack(tensors))
            for score, anomaly_map, size in zip(scores.tolist(), maps, sizes, strict=True):
                full = F.interpolate(anomaly_map[None, None], size=size, mode="bilinear", align_corners=False)
                own = full[0, 0].cpu().numpy()
                predictions.append(Prediction(score, score > self.threshold, own, own > self.pixel_threshold))
        return predictions

    @torch.inference_mode()
    def score(self, images: Tensor, branches: Sequence[str] = BRANCHES) -> tuple[Tensor, Tensor]:
        """Scores (N,) and raw anomaly maps (N, H, W) of images (N, 3, H, W) in [0, 1] of the configured size."""
        return self.judge(self.distill(images), branches)

    @torch.inference_mode()
    def distill(self, images: Tensor) -> Distillation:
        """Both branches' features, for :meth:`judge`."""
        return self.model.distill(self.model.teacher(images.to(self.device)), self._prepared)

    @torch.inference_mode()
    def judge(self, result: Distillation, branches: Sequence[str] = BRANCHES) -> tuple[Tensor, Tensor]:
        """Scores (N,) and maps (N, H, W) that the given branches make of ``result``."""
        maps = self.model.anomaly_map(result, self.config.image_size, branches)
        return self.model.image_score(maps), maps

    def _prepare(self, support: Tensor) -> None:
        # Whatever depends on the support alone is computed once, here.
        with torch.inference_mode():
            self._prepared = self.model.prepare(self.model.support_levels(support.to(self.device)))

    def _tensor(self, image: ImageLike) -> tuple[Tensor, tuple[int, int]]:
        """The network's input (3, H, W) and the image's own size."""
        if isinstance(image, Tensor):
            return self._from_tensor(image)
        if isinstance(image, (str, Path)):
            array = load_image(Path(image))
        elif isinstance(image, Image.Image):
            array = from_pil(image)
        elif isinstance(image, np.ndarray):
            array = _checked_array(image)
        else:
            raise BKDError(_no_image(image))
        return to_tensor(array, self.config.image_size), (array.shape[0], array.shape[1])

    def _from_tensor(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise BKDError(
                f"an image tensor of shape {tuple(image.shape)}: expected (3, H, W), or (N, 3, H, W) for a batch"
            )
        if image.dtype == torch.uint8:
            image = image.float() / 255
        elif not image.is_floating_point():
            raise BKDError(f"an image tensor of {image.dtype}: expected uint8, or floating point in [0, 1]")
        if not (torch.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise BKDError(
                "an image tensor with values outside [0, 1] or NaN: divide 8-bit values by 255; do not normalise"
            )
        size = (image.shape[1], image.shape[2])
        if size != self.config.image_size:
            image = F.interpolate(image[None].float(), size=self.config.image_size, mode="bilinear", antialias=True)[0]
        return image.float(), size


def _no_image(value: object) -> str:
    return f"an image of type {type(value).__name__}: expected a path, a PIL image, an array or a tensor, or several"


def _checked_array(array: np.ndarray) -> np.ndarray:
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or 0 in array.shape
        or (array.ndim == 3 and array.shape[2] != 3)
    ):
        raise BKDError(
            f"an image array of shape {array.shape}, {array.dtype}: expected uint8 of shape (H, W) or (H, W, 3) RGB"
        )
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BKDError("device 'cuda' was asked for, and torch sees no CUDA device: use device='cpu' or 'auto'")
    return chosen
