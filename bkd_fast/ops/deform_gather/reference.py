"""The sampling half of a deformable convolution in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.deform_gather import Arguments
from bkd_fast.ops.sampling import Grid, chunks, images_of, joined, sample, sample_backward, to_channels_first


def modulated_deform_gather(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_gather`."""
    table, grid = _table(a)
    parts = [
        sample(table if len(table) == 1 else table[images], a.offset[images], images_of(a.mask, images), grid).sum(3)
        for images in chunks(a.offset, table.shape[4])
    ]
    output = torch.cat(parts) if parts else a.projected.new_zeros(0, *a.offset.shape[2:], table.shape[4])
    return output.permute(0, 3, 1, 2).to(a.projected.dtype)


def modulated_deform_gather_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    table, grid = _table(a)
    sampled: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])  # w.r.t. projected, offset and mask
    for images in chunks(a.offset, table.shape[4]):
        outputs = grad[images].permute(0, 2, 3, 1).unsqueeze(3).expand(-1, -1, -1, len(grid.slots), -1)
        part = table if len(table) == 1 else table[images]
        parts = sample_backward(outputs, part, a.offset[images], images_of(a.mask, images), grid, needs)
        for kept, value in zip(sampled, parts, strict=True):
            if value is not None:
                kept.append(value)
    grad_table = [torch.stack(sampled[0]).sum(0)] if len(table) == 1 and sampled[0] else sampled[0]
    return [
        joined(grad_table, a.projected, needs[0], to_channels_first),
        joined(sampled[1], a.offset, needs[1]),
        joined(sampled[2], grad if a.mask is None else a.mask, needs[2]),
    ]


def _table(a: Arguments) -> tuple[Tensor, Grid]:
    """Return the projected images as (B, H, W, T, C), and the sampling grid."""
    taps = a.offset.shape[1] // 2
    table = a.projected.permute(0, 2, 3, 1).unflatten(3, (taps, -1))
    slots = torch.arange(taps, device=a.projected.device)
    return table, Grid(a.kernel_size, a.stride, a.padding, a.dilation, slots)
