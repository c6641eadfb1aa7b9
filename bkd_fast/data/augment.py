"""Random affine views of support images: the modes of the paper's Table 5."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.config import Augmentation

# Largest change of each kind. The paper gives none; RegAD turns by up to 45 degrees and shifts by up to a fifth.
TRANSLATION = 0.1  # of the image's side
ROTATION = 30.0  # degrees
SCALE = 0.15  # 0.85 to 1.15 times
SHEAR = 0.15  # tangent of the angle, both axes

KINDS = ("translation", "rotation", "scale", "shear")


def augment(images: Tensor, mode: Augmentation, generator: torch.Generator) -> Tensor:
    """Return one random view of each image, bilinear, mirrored at the borders; the same for the same generator state.

    Args:
        images: (k, 3, H, W).
        mode: ``none``, ``affine`` (all of KINDS), or some of KINDS joined by ``_``.
        generator: on the CPU.
    """
    if mode == "none":
        return images
    count, _, height, width = images.shape
    # Drawn whatever the mode, so that each kind of change has its own stream.
    draw = (2 * torch.rand(count, 6, generator=generator) - 1).to(images)
    kinds = KINDS if mode == "affine" else mode.split("_")
    angle = draw[:, 0] * math.radians(ROTATION) * ("rotation" in kinds)
    factor = 1 + draw[:, 1] * SCALE * ("scale" in kinds)
    shift = 2 * TRANSLATION * draw[:, 2:4] * ("translation" in kinds)  # grid units: the image is 2 wide
    shear = draw[:, 4:6] * SHEAR * ("shear" in kinds)
    cosine, sine = angle.cos() / factor, angle.sin() / factor
    turn = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    one = torch.ones_like(angle)
    slant = torch.stack([torch.stack([one, shear[:, 0]], 1), torch.stack([shear[:, 1], one], 1)], 1)
    matrix = turn @ slant
    # affine_grid measures both axes in half-sides; pixels are square, so a turn must know the aspect ratio.
    aspect = torch.tensor([[1.0, height / width], [width / height, 1.0]]).to(images)
    theta = torch.cat([matrix * aspect, shift.unsqueeze(2)], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
