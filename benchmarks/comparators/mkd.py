"""MKD, Multiresolution Knowledge Distillation (Salehi et al., CVPR 2021): a thin cloner of the teacher's levels.

As in the paper: the cloner, narrow but for its critical layers (16 channels between them), matches the teacher there in
value (squared error, weight ``value_weight`` = 0.5, the authors' for MVTec AD) and in direction (1 - cosine of the
whole flattened level). The image's score is this loss; its map is the gradient of the loss at the image, absolute,
summed over colours, smoothed by a Gaussian (4 pixels of a 128-pixel-high image) and opened by 3 x 3 pixels. Opening in
grey values equals opening at every threshold, which the authors do.

What differs: the teacher and its three levels at strides 4, 8 and 16 are the package's; the paper has VGG-16's last
layers before pooling. Channels get mean 0 and std 1 over the training images, as in the package's teacher: where levels
do not end in ReLU, a few channels and their means would make up nearly all of the cosine. The cloner's levels end
without ReLU for the same reason. Maps use plain gradients; the paper's best use guided backpropagation, and the authors
scale each map to 0..1, which no threshold for all images allows. Training: Adam at 1e-3 as the authors', 15 epochs of
batches of 4 (theirs: 600 of 64 at 128 pixels).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bkd_fast.data import ImageDataset
from comparators.common import FrozenLevels, Made, Settings, batches, graded, megabytes, smooth

SMOOTHING = 4 / 128  # sigma of the map, in heights of the image


def mkd(
    data: ImageDataset,
    settings: Settings,
    *,
    width: int = 16,
    value_weight: float = 0.5,
    epochs: int = 15,
    learning_rate: float = 1e-3,
    batch: int = 4,
) -> Made:
    """MKD; ``width``: channels between the cloner's critical layers."""
    model = Pair(FrozenLevels(settings.config), width, value_weight)
    model.teacher.standardize(data)
    optimizer = torch.optim.Adam(model.cloner.parameters(), lr=learning_rate)
    model.cloner.train()
    for _ in range(epochs):
        for images in batches(data, shuffle=True, size=batch):
            optimizer.zero_grad()
            with torch.no_grad():
                targets = model.teacher.standardized(images)
            model.losses(targets, images).mean().backward()
            optimizer.step()
    model.eval().requires_grad_(False)

    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            seen = graded(images)
            losses = model.losses(model.teacher.standardized(seen), seen)
            (gradient,) = torch.autograd.grad(losses.sum(), seen)
        maps = smooth(gradient.abs().sum(1, keepdim=True), SMOOTHING * images.shape[-2])
        eroded = -F.max_pool2d(-maps, 3, 1, 1)
        return losses.detach(), F.max_pool2d(eroded, 3, 1, 1)

    return predict, megabytes(model.cloner)


class Pair(nn.Module):
    """Teacher and cloner."""

    def __init__(self, teacher: FrozenLevels, width: int, value_weight: float) -> None:
        super().__init__()
        self.teacher, self.value_weight = teacher, value_weight
        self.cloner = Cloner(width, teacher.channels).to(memory_format=torch.channels_last)

    def losses(self, targets: list[Tensor], images: Tensor) -> Tensor:
        """(N,) from the teacher's levels: 1 - cosine and weighted squared error, summed over the levels."""
        total = torch.zeros(len(images))
        clones = self.cloner(self.teacher.normalized(images))
        for target, clone in zip(targets, clones, strict=True):
            truth, own = target.flatten(1), clone.flatten(1)
            direction = 1 - F.cosine_similarity(truth, own)
            total = total + direction + self.value_weight * (truth - own).square().mean(1)
        return total


class Cloner(nn.Module):
    """Pairs of thin 3 x 3 convolutions, halved in between; from stride 4 on each pair ends in a level as wide as the
    teacher's."""

    def __init__(self, width: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _thin(3, width), _thin(width, width), _halved(), _thin(width, width), _thin(width, width)
        )
        wide = (width, *channels[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(_halved(), _thin(inputs, width), _thin(width, width)) for inputs in wide
        )
        self.levels = nn.ModuleList(nn.Conv2d(width, outputs, 3, padding=1) for outputs in channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> [(N, C_l, H_l, W_l)] at strides 4, 8 and 16."""
        levels, features = [], self.stem(images.contiguous(memory_format=torch.channels_last))
        for stage, level in zip(self.stages, self.levels, strict=True):
            features = level(stage(features))
            levels.append(features)
            features = features.relu()
        return levels


def _halved() -> nn.MaxPool2d:
    return nn.MaxPool2d(2, ceil_mode=True)


def _thin(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )
