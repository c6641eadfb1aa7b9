"""Bilinear sampling at offset positions, and its gradient, in plain PyTorch, for both deformable operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.registration import wide

COLUMN_BYTES = 64 * 2**20  # samples that are held at a time


class Neighbour(NamedTuple):
    """One of the four neighbours of every sample; all of shape (N, Ho, Wo, T).

    ``pixel``: y * W + x, clamped into the image. ``inside``: whether it is in the image; values outside count as
    zero, even where the border holds Inf or NaN. ``weight``: bilinear weight, 0 outside the image. ``grad_y``,
    ``grad_x``: derivative of the weight with respect to the sampling position.
    """

    pixel: Tensor
    inside: Tensor  # with a last dimension of 1
    weight: Tensor
    grad_y: Tensor
    grad_x: Tensor


def neighbours(
    offset: Tensor,
    size: tuple[int, int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Iterator[Neighbour]:
    """Yield the four neighbours of p0 * stride - padding + p_m * dilation + offset.

    Args:
        offset: (N, 2 T, Ho, Wo), (y, x) per tap; T is a multiple of the kernel's taps.
        size: (H, W) of the sampled image.
    """
    count, _, rows, columns = offset.shape
    taps = offset.shape[1] // 2
    height, width = size
    tap = torch.arange(taps, device=offset.device) % (kernel_size[0] * kernel_size[1])
    offsets = offset.unflatten(1, (taps, 2)).permute(0, 3, 4, 1, 2)
    offsets = offsets.to(wide(offsets))
    y = torch.arange(rows, device=offset.device).view(-1, 1, 1) * stride[0] - padding[0]
    x = torch.arange(columns, device=offset.device).view(1, -1, 1) * stride[1] - padding[1]
    y = offsets[..., 0] + (y + tap // kernel_size[1] * dilation[0])
    x = offsets[..., 1] + (x + tap % kernel_size[1] * dilation[1])
    # Positions this far out have no neighbour inside; clamping keeps the integer conversion defined.
    y, x = y.clamp(-2, height + 1), x.clamp(-2, width + 1)
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    for below in (0, 1):
        for beside in (0, 1):
            row, column = top + below, left + beside
            # A NaN position is not outside: its weight stays NaN.
            outside = (row < 0) | (row >= height) | (column < 0) | (column >= width)
            inside = (~outside).to(offsets.dtype)
            vertical = down if below else 1 - down
            horizontal = right if beside else 1 - right
            # Clamped as integers: a NaN position gives a NaN weight, and must not give an index outside.
            index = row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)
            yield Neighbour(
                index,
                ~outside.unsqueeze(-1),
                vertical * horizontal * inside,
                (1 if below else -1) * horizontal * inside,
                (1 if beside else -1) * vertical * inside,
            )


class Grid(NamedTuple):
    """The arguments of a convolution, and ``slots`` (T,), the part of a pixel that each tap reads."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    slots: Tensor


def sample(table: Tensor, offset: Tensor, mask: Tensor | None, grid: Grid) -> Tensor:
    """Return the masked bilinear samples of every tap.

    Args:
        table: (B, H, W, S, C), B = N or 1 (shared by all), S parts a pixel.
        offset: (N, 2 T, Ho, Wo). mask: (N, T, Ho, Wo) or None.

    Returns:
        (N, Ho, Wo, T, C) in the table's dtype, float32 at least.
    """
    rows, base = _rows(table, offset, grid)
    total: Tensor | None = None
    modulation = None if mask is None else mask.permute(0, 2, 3, 1)
    for neighbour in neighbours(offset, (table.shape[1], table.shape[2]), *grid[:4]):
        weight = neighbour.weight if modulation is None else neighbour.weight * modulation
        values = rows[base + neighbour.pixel * table.shape[3]].where(neighbour.inside, 0.0)
        part = values * weight.unsqueeze(-1)
        total = part if total is None else total + part
    assert total is not None
    return total


def sample_backward(
    grad: Tensor, table: Tensor, offset: Tensor, mask: Tensor | None, grid: Grid, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of :func:`sample` with respect to table, offset and mask; None where ``needs`` is False.

    Args:
        grad: (N, Ho, Wo, T, C), with respect to the samples; may be expanded over T.
    """
    rows, base = _rows(table, offset, grid)
    grad_rows = torch.zeros_like(rows) if needs[0] else None
    modulation = None if mask is None else mask.permute(0, 2, 3, 1)
    grad_offset = grad_mask = None
    for neighbour in neighbours(offset, (table.shape[1], table.shape[2]), *grid[:4]):
        index = base + neighbour.pixel * table.shape[3]
        if grad_rows is not None:
            weight = neighbour.weight if modulation is None else neighbour.weight * modulation
            part = (grad * weight.unsqueeze(-1)).where(neighbour.inside, 0.0)
            grad_rows.index_add_(0, index.flatten(), part.flatten(0, -2).to(grad_rows.dtype))
        if needs[1] or needs[2]:
            grad_weight = (rows[index].where(neighbour.inside, 0.0) * grad).sum(-1)
            if needs[2]:
                part = grad_weight * neighbour.weight
                grad_mask = part if grad_mask is None else grad_mask + part
            if needs[1]:
                step = torch.stack([grad_weight * neighbour.grad_y, grad_weight * neighbour.grad_x], -1)
                grad_offset = step if grad_offset is None else grad_offset + step
    if grad_offset is not None:
        if modulation is not None:
            grad_offset = grad_offset * modulation.unsqueeze(-1)
        grad_offset = grad_offset.permute(0, 3, 4, 1, 2).flatten(1, 2)
    grad_table = None if grad_rows is None else grad_rows.view(table.shape)
    return grad_table, grad_offset, None if grad_mask is None else grad_mask.permute(0, 3, 1, 2)


def chunks(offset: Tensor, channels: int) -> list[slice]:
    """Return slices of images whose samples stay within COLUMN_BYTES."""
    each = max(1, channels * offset[:1].numel() // 2 * 4)
    step = max(1, COLUMN_BYTES // each)
    return [slice(start, start + step) for start in range(0, offset.shape[0], step)]


def images_of(mask: Tensor | None, images: slice) -> Tensor | None:
    """Return the mask of some images."""
    return None if mask is None else mask[images]


def joined(
    parts: list[Tensor], like: Tensor, needed: bool, arranged: Callable[[Tensor], Tensor] = lambda value: value
) -> Tensor:
    """Return a gradient of which there are ``parts``, in the dtype of its tensor; empty if it is not needed."""
    if not needed:
        return like.new_empty(0)
    if not parts:
        return torch.zeros_like(like)
    return arranged(torch.cat(parts) if len(parts) > 1 else parts[0]).to(like.dtype)


def to_channels_first(table: Tensor) -> Tensor:
    """Return (N, H, W, S, C) as (N, S C, H, W)."""
    return table.flatten(3).permute(0, 3, 1, 2)


def _rows(table: Tensor, offset: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the table as rows (B H W S, C), and the row of pixel 0 that each image and tap reads, (N, 1, 1, T)."""
    batch, height, width, parts, _ = table.shape
    image = torch.arange(offset.shape[0], device=offset.device) * (height * width * parts if batch > 1 else 0)
    return table.to(wide(table)).flatten(0, 3), image.view(-1, 1, 1, 1) + grid.slots
