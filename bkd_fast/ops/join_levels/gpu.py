"""What the GPU kernels are given: levels in float32, channels last, and how each is resized."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.join_levels import Arguments, ratios
from bkd_fast.ops.join_levels.reference import averaged
from bkd_fast.ops.layout import to_channels_last


def sources(a: Arguments) -> tuple[list[Tensor], list[list[int]], Tensor]:
    """Return the levels, the blocks of each (height, width; 0 where it is interpolated), and a buffer for the result.

    A level whose blocks are not as many as the result has pixels is averaged by PyTorch, and then interpolated.
    """
    levels, blocks = [], []
    for level in a.levels:
        own = ratios(level, a.size) or [1, 1]
        fits = [-(-length // block) for length, block in zip(level.shape[2:], own, strict=True)] == list(a.size)
        levels.append(to_channels_last(level if fits else averaged(level.float(), a.size), torch.float32))
        blocks.append(own if fits else [0, 0])
    shape = (levels[0].shape[0], sum(level.shape[1] for level in levels), *a.size)
    output = torch.empty(shape, dtype=torch.float32, device=levels[0].device, memory_format=torch.channels_last)
    return levels, blocks, output
