"""Multi-scale feature fusion and one-class bottleneck embedding (MFF + OCBE, Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bkd_fast.config import StudentConfig
from bkd_fast.errors import BKDError
from bkd_fast.model.blocks import ResidualBlock, conv3, initialize


def block_kind(channels: Sequence[int], config: StudentConfig) -> str:
    """``basic`` or ``bottleneck``: that of the ResNet whose first level has as many channels (18/34 or 50 and up)."""
    if config.block != "auto":
        return config.block
    return "bottleneck" if channels[0] >= 256 else "basic"


def check_strides(teacher: str, strides: Sequence[int]) -> None:
    """Raise a BKDError unless there are three levels, each at twice the stride of the one before."""
    if len(strides) != 3 or any(2 * fine != coarse for fine, coarse in pairwise(strides)):
        raise BKDError(
            f"the student rebuilds three levels whose strides double, and those of {teacher} are "
            f"{', '.join(map(str, strides))}: choose others by teacher.layers or teacher.strides, another teacher, or "
            "student=none"
        )


class OneClassBottleneck(nn.Module):
    """Brings three levels to the deepest one's size, concatenates and embeds them at half that size.

    With WideResNet50-2 channels this is RD4AD's module without its two layers that are never called.
    """

    def __init__(self, channels: Sequence[int], config: StudentConfig) -> None:
        super().__init__()
        first, second, third = channels
        kind = block_kind(channels, config)
        self.from_first = nn.Sequential(
            *conv3(first, second, stride=2), nn.ReLU(), *conv3(second, third, stride=2), nn.ReLU()
        )
        self.from_second = nn.Sequential(*conv3(second, third, stride=2), nn.ReLU())
        self.channels = 2 * third
        if config.reduce:
            # "a convolutional layer is used for feature dimensionality reduction": the paper's text, RD's Figure.
            self.reduce: nn.Module = nn.Sequential(
                nn.Conv2d(3 * third, third, 1, bias=False), nn.BatchNorm2d(third), nn.ReLU()
            )
            width = third
        else:
            self.reduce = nn.Identity()
            width = 3 * third
        self.embed = nn.Sequential(
            ResidualBlock(width, self.channels, kind=kind, direction="down"),
            *(
                ResidualBlock(self.channels, self.channels, kind=kind, direction="same")
                for _ in range(2 if kind == "bottleneck" else 1)
            ),
        )
        initialize(self)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Three levels (N, C_l, H / s_l, W / s_l) -> embedding (N, 2 C_3, H / 32, W / 32), sizes rounded up."""
        first, second, third = levels
        fused = torch.cat([self.from_first(first), self.from_second(second), third], dim=1)
        return self.embed(self.reduce(fused))
