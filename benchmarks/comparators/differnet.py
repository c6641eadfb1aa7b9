"""DifferNet (Rudolph et al., WACV 2021): the likelihood of an image's pooled features under a normalising flow.

As in the paper: a frozen CNN's deepest level at three sizes of the image (1, 1/2, 1/4), averaged over positions and
joined; 8 coupling blocks of two affine halves whose scales are clamped by ``2 * alpha / pi * arctan(s / alpha)``,
alpha = 3, with fixed permutations between them; subnets of fully connected layers; Adam (2e-4, betas 0.8, eps 1e-4,
weight decay 1e-5); images turned at random in training. The image's score is ``-log p(z)`` (without the determinant, as
in the paper) averaged over turned views; its map is the likelihood's gradient at the image, smoothed by 3 pixels,
absolute, averaged over views and colours, squared.

What differs: the CNN is the package's teacher (the paper: AlexNet) and images have the size of the other methods (448).
Pooled features get mean 0 and std 1 over the training views. Training views are drawn once, ``train_views`` an image,
not anew each epoch; subnets are ``width`` = 256 wide (2048), there are 8 test views, evenly turned (64), and 40 epochs
(192). All four are options.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bkd_fast.data import ImageDataset
from comparators.common import FrozenLevels, Made, Moments, Settings, batches, graded, megabytes, smooth

SCALES = (1, 2, 4)  # what the image's sides are divided by
SIGMA = 3.0  # pixels


def differnet(
    data: ImageDataset,
    settings: Settings,
    *,
    width: int = 256,
    blocks: int = 8,
    alpha: float = 3.0,
    train_views: int = 8,
    views: int = 8,
    epochs: int = 40,
    learning_rate: float = 2e-4,
    batch: int = 96,
) -> Made:
    """DifferNet; ``views``: turned views of a test image, ``batch``: views a step."""
    model = DifferNet(FrozenLevels(settings.config), width, blocks, alpha)
    features = model.fit_scale(data, train_views)
    parameters = list(model.flow.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.8, 0.8), eps=1e-4, weight_decay=1e-5)
    for _ in range(epochs):
        for chosen in torch.randperm(len(features)).split(batch):
            optimizer.zero_grad()
            z, log_determinant = model.flow(features[chosen])
            (0.5 * z.square().sum(1) - log_determinant).mean().div(z.shape[1]).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    angles = torch.arange(views) * (2 * math.pi / views)

    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            seen = graded(images.expand(views, -1, -1, -1))
            z, log_determinant = model(turned(seen, angles))
            surprise = 0.5 * z.square().mean(1)
            likelihood = surprise - log_determinant / z.shape[1]
            (gradient,) = torch.autograd.grad(likelihood.mean(), seen)
        maps = smooth(gradient, SIGMA).abs().mean((0, 1)).square()
        return surprise.detach().mean().view(1), maps

    return predict, megabytes(model.flow)


class DifferNet(nn.Module):
    """Pooled features of several scales, and the flow over them."""

    def __init__(self, teacher: FrozenLevels, width: int, blocks: int, alpha: float) -> None:
        super().__init__()
        self.teacher = teacher
        size = len(SCALES) * teacher.channels[-1]
        self.flow = Flow(size, width, blocks, alpha)
        self.mean, self.std = torch.zeros(size), torch.ones(size)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> latent (N, D) and log-determinant (N,)."""
        z, log_determinant = self.flow((self.pooled(images) - self.mean) / self.std)
        return z, log_determinant

    def pooled(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, D)."""
        features = []
        for scale in SCALES:
            size = [max(16, side // scale) for side in images.shape[-2:]]
            smaller = images if scale == 1 else F.interpolate(images, size=size, mode="bilinear", align_corners=False)
            features.append(self.teacher(smaller)[-1].mean((2, 3)))
        return torch.cat(features, 1)

    @torch.no_grad()
    def fit_scale(self, data: ImageDataset, views: int) -> Tensor:
        """Standardised features (images * views, D) of images turned at random, whose mean and std are kept."""
        pooled = [
            self.pooled(turned(images, 2 * math.pi * torch.rand(len(images))))
            for _ in range(views)
            for images in batches(data, shuffle=False)
        ]
        features, moments = torch.cat(pooled), Moments(axis=1)
        moments.add(features)
        self.mean, self.std = moments.compute()
        return (features - self.mean) / self.std


class Flow(nn.Module):
    """Blocks of Glow: a fixed permutation, then an affine coupling of each half by the other."""

    def __init__(self, size: int, width: int, blocks: int, alpha: float) -> None:
        super().__init__()
        self.alpha, self.cut = alpha, size // 2
        rest = size - self.cut
        self.first = nn.ModuleList(_subnet(rest, width, self.cut) for _ in range(blocks))
        self.second = nn.ModuleList(_subnet(self.cut, width, rest) for _ in range(blocks))
        for block in range(blocks):
            self.register_buffer(f"order_{block}", torch.randperm(size))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> latent (N, D) and the log-determinant (N,) of the map's Jacobian."""
        log_determinant = torch.zeros(len(features))
        for block, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            features = features[:, self.get_buffer(f"order_{block}")]
            one, two = features[:, : self.cut], features[:, self.cut :]
            one, change = self._coupled(one, first(two))
            two, other = self._coupled(two, second(one))
            features, log_determinant = torch.cat([one, two], 1), log_determinant + change + other
        return features, log_determinant

    def _coupled(self, values: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = predicted.chunk(2, 1)
        scale = 2 * self.alpha / math.pi * torch.atan(scale / self.alpha)
        return values * scale.exp() + shift, scale.sum(1)


def turned(images: Tensor, angles: Tensor) -> Tensor:
    """Images (N, 3, H, W) turned by ``angles`` (N,) in radians around their centres, bilinear, black outside."""
    cosine, sine = angles.cos(), angles.sin()
    ratio, nil = images.shape[-2] / images.shape[-1], torch.zeros_like(angles)
    rows = [torch.stack([cosine, -sine * ratio, nil], 1), torch.stack([sine / ratio, cosine, nil], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _subnet(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Scale and shift of ``outputs`` values; zero at first, so that the flow starts as the identity."""
    layers: list[nn.Module] = []
    for size in (inputs, width, width):
        layers += [nn.Linear(size, width), nn.LeakyReLU()]
    last = nn.Linear(width, 2 * outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
