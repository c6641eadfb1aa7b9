"""The student decoder that rebuilds the teacher's levels from the bottleneck's embedding (reverse distillation)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bkd_fast.config import StudentConfig
from bkd_fast.model.blocks import ResidualBlock, initialize
from bkd_fast.model.bottleneck import block_kind

# Blocks a stage from the deepest level up: the mirror of ResNet-50's first three stages, and of ResNet-18's.
BLOCKS = {"bottleneck": (3, 4, 6), "basic": (2, 2, 2)}


class StudentDecoder(nn.Module):
    """Three stages, each doubling the size, with the teacher's channels in reverse order.

    ``output="relu"`` returns the stages as they are (RD4AD); ``linear`` adds a 1 x 1 convolution a level, so
    that negative features can be reached.
    """

    def __init__(self, inputs: int, channels: Sequence[int], config: StudentConfig) -> None:
        super().__init__()
        kind = block_kind(channels, config)
        stages = []
        for width, count in zip(reversed(channels), BLOCKS[kind], strict=True):
            first = ResidualBlock(inputs, width, kind=kind, direction="up")
            rest = (ResidualBlock(width, width, kind=kind, direction="same") for _ in range(count - 1))
            stages.append(nn.Sequential(first, *rest))
            inputs = width
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(
            nn.Conv2d(width, width, 1) if config.output == "linear" else nn.Identity() for width in channels
        )
        initialize(self)
        if config.correction:
            # A correction starts from nothing: at first the student is the memory's read-out.
            for head in self.heads:
                if isinstance(head, nn.Conv2d):
                    nn.init.zeros_(head.weight)
                    assert head.bias is not None
                    nn.init.zeros_(head.bias)

    def forward(self, embedding: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """``embedding`` (N, C, h, w), ``sizes`` (H_l, W_l) of the teacher's levels -> levels of those sizes."""
        outputs: list[Tensor] = []
        features = embedding
        for index, stage in enumerate(self.stages):
            level = len(self.stages) - 1 - index
            height, width = sizes[level]
            # Doubling a size that was rounded up gives a row or column too many.
            features = stage(features)[..., :height, :width]
            outputs.append(self.heads[level](features))
        return outputs[::-1]
