"""What every method of accuracy.py gets and gives, and the teacher as the comparators see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bkd_fast.config import BKDConfig
from bkd_fast.data import ImageDataset
from bkd_fast.model.teacher import Teacher
from bkd_fast.ops.standardize.reference import standardized
from bkd_fast.training.weights import load_weights

Predict = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (1, 3, H, W) in [0, 1] -> score (1,), map of H * W values
Made = tuple[Predict, float] | str  # and megabytes kept beside the teacher; or why there is none
BATCH = 8


class Settings(NamedTuple):
    """What all methods share, and what is asked of some."""

    config: BKDConfig  # teacher, weights, image_size and seed are read
    validation: ImageDataset  # normal images that nobody trains on, for methods that normalise their scores
    efficientad_weights: Path | None = None
    imagenet: Path | None = None  # folder of images for EfficientAd's penalty


class FrozenLevels(nn.Module):
    """The levels of :class:`Teacher` without its pooling, which the papers do not have.

    Gradients reach the images, which :meth:`Teacher.forward` does not let through.
    """

    def __init__(self, config: BKDConfig) -> None:
        super().__init__()
        self.teacher = Teacher(replace(config.teacher, patch_size=1), load_weights(config.teacher))
        self.channels = self.teacher.channels

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) in [0, 1] -> levels [(N, C_l, H_l, W_l)] at strides 4, 8 and 16, as the network gives them."""
        return list(self.teacher.network(self.normalized(images)))

    @torch.no_grad()
    def standardize(self, data: ImageDataset) -> None:
        """Takes mean and std of every level's channels from normal images."""
        moments = [Moments(axis=1) for _ in self.channels]
        for images in batches(data, shuffle=False):
            for moment, level in zip(moments, self(images), strict=True):
                moment.add(level)
        for index, moment in enumerate(moments, start=1):
            self.teacher.set_statistics(index, *moment.compute())

    def standardized(self, images: Tensor) -> list[Tensor]:
        """The same levels with channels of mean 0 and std 1 over the images of :meth:`standardize`."""
        statistics = self.teacher.get_buffer
        # Not by the operator, which has no gradient.
        return [
            standardized(level, statistics(f"mean_{number}").flatten(), statistics(f"std_{number}").flatten(), 1, 1.0)
            for number, level in enumerate(self(images), start=1)
        ]

    def normalized(self, images: Tensor) -> Tensor:
        """Images as the teacher's network was trained on them."""
        return (images - self.teacher.get_buffer("image_mean")) / self.teacher.get_buffer("image_std")


class Moments:
    """Running mean and std of what is added, over all axes but ``axis`` (None: over all)."""

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self._sums: Tensor | None = None  # count, sum and sum of squares, in float64

    def add(self, values: Tensor) -> None:
        rows = values.reshape(1, -1) if self.axis is None else values.movedim(self.axis, 0).flatten(1)
        rows = rows.double()
        count = torch.full((len(rows),), rows.shape[1], dtype=torch.float64)
        sums = torch.stack([count, rows.sum(1), rows.square().sum(1)])
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and std in float32, (C,), or (1,) without an axis; a std of zero comes out as 1."""
        assert self._sums is not None, "nothing was added"
        count, total, squares = self._sums
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        return mean.float(), torch.where(std > 1e-6, std, torch.ones_like(std)).float()


def batches(data: ImageDataset, *, shuffle: bool, size: int = BATCH) -> Iterator[Tensor]:
    """Images (N, 3, H, W) in [0, 1]; shuffled by torch's global generator, the incomplete last batch left out then."""
    drop = shuffle and len(data) >= size
    for images, _ in torch.utils.data.DataLoader(data, size, shuffle=shuffle, drop_last=drop):
        yield images


def megabytes(module: nn.Module) -> float:
    return sum(value.nbytes for value in module.state_dict().values()) / 1e6


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Maps (N, C, H, W) after a Gaussian of ``sigma`` pixels, mirrored at the borders."""
    reach = min(max(1, round(4 * sigma)), min(maps.shape[-2:]) - 1)
    steps = torch.arange(-reach, reach + 1, dtype=maps.dtype)
    kernel = (-0.5 * (steps / sigma).square()).exp()
    kernel = kernel / kernel.sum()
    flat = F.pad(maps.flatten(0, 1).unsqueeze(1), (reach,) * 4, mode="reflect")
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return flat.view(maps.shape)


def graded(images: Tensor) -> Tensor:
    """A copy that gradients can reach, whichever mode the images were made in; call it where gradients are enabled."""
    return images.detach().clone().requires_grad_()
