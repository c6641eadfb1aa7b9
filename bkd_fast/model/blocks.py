"""The residual blocks that the bottleneck and the student are stacked from, going down or up by a factor of two."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Direction = Literal["down", "same", "up"]


class ResidualBlock(nn.Module):
    """A ResNet block, ``basic`` (two 3 x 3) or ``bottleneck`` (1 x 1, 3 x 3, 1 x 1 at half the output width).

    ``down`` halves the size by stride in the 3 x 3 and the shortcut; ``up`` doubles it by 2 x 2 transposed
    convolutions in
    their place (RD4AD's encoder and decoder blocks, of which one is the mirror of the other).
    """

    def __init__(self, inputs: int, outputs: int, *, kind: str, direction: Direction) -> None:
        super().__init__()
        if kind == "basic":
            self.body = nn.Sequential(
                resize(inputs, outputs, direction), nn.BatchNorm2d(outputs), nn.ReLU(), *conv3(outputs, outputs)
            )
        else:
            width = outputs // 2  # a wide ResNet: base width 128
            self.body = nn.Sequential(
                nn.Conv2d(inputs, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                resize(width, width, direction),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
        self.shortcut: nn.Module
        if direction == "up":
            self.shortcut = nn.Sequential(resize(inputs, outputs, "up"), nn.BatchNorm2d(outputs))
        elif direction == "down" or inputs != outputs:
            stride = 2 if direction == "down" else 1
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        else:
            self.shortcut = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Return the block's output for (N, C, H, W)."""
        return F.relu(self.body(features) + self.shortcut(features))


def resize(inputs: int, outputs: int, direction: Direction) -> nn.Module:
    """The convolution of a block that may change the size."""
    if direction == "up":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
    return nn.Conv2d(inputs, outputs, 3, stride=2 if direction == "down" else 1, padding=1, bias=False)


def conv3(inputs: int, outputs: int, *, stride: int = 1) -> list[nn.Module]:
    """3 x 3 convolution and batch normalisation."""
    return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs)]


def initialize(module: nn.Module) -> None:
    """Kaiming fan-out for convolutions, as in ResNet; transposed ones keep torch's default, as in RD4AD."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
