"""Bilinear sampling at offset positions, and its gradient: what both deformable operators share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Corner(NamedTuple):
    """One of the four neighbours of every sample; all of shape (N, Ho, Wo, T).

    ``pixel``: y * W + x, clamped into the image. ``inside``: whether it is in the image; what is outside counts as
    zero, even where the border holds Inf or NaN. ``weight``: bilinear weight, 0 outside the image. ``by_y``, ``by_x``:
    derivative of the weight with respect to the sampling position.
    """

    pixel: Tensor
    inside: Tensor  # with a last dimension of 1
    weight: Tensor
    by_y: Tensor
    by_x: Tensor


def corners(
    offset: Tensor,
    size: tuple[int, int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Iterator[Corner]:
    """The four neighbours of p0 * stride - padding + p_m * dilation + offset.

    Args:
        offset: (N, 2 T, Ho, Wo), (y, x) per tap; T is a multiple of the kernel's taps.
        size: (H, W) of the image that is sampled.
    """
    count, _, rows, columns = offset.shape
    taps = offset.shape[1] // 2
    height, width = size
    tap = torch.arange(taps, device=offset.device) % (kernel_size[0] * kernel_size[1])
    moves = offset.unflatten(1, (taps, 2)).permute(0, 3, 4, 1, 2)
    wide = moves.float() if moves.dtype in (torch.float16, torch.bfloat16) else moves
    y = torch.arange(rows, device=offset.device).view(-1, 1, 1) * stride[0] - padding[0]
    x = torch.arange(columns, device=offset.device).view(1, -1, 1) * stride[1] - padding[1]
    y = wide[..., 0] + (y + tap // kernel_size[1] * dilation[0])
    x = wide[..., 1] + (x + tap % kernel_size[1] * dilation[1])
    # Positions this far out have no neighbour inside; clamping keeps the integer conversion defined.
    y, x = y.clamp(-2, height + 1), x.clamp(-2, width + 1)
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    for below in (0, 1):
        for beside in (0, 1):
            row, column = top + below, left + beside
            # NaN is neither: it stays a weight of NaN.
            outside = (row < 0) | (row >= height) | (column < 0) | (column >= width)
            inside = (~outside).to(wide.dtype)
            vertical = down if below else 1 - down
            horizontal = right if beside else 1 - right
            # Clamped as integers: a NaN position gives a NaN weight, and must not give an index outside.
            index = row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)
            yield Corner(
                index,
                ~outside.unsqueeze(-1),
                vertical * horizontal * inside,
                (1 if below else -1) * horizontal * inside,
                (1 if beside else -1) * vertical * inside,
            )


class Grid(NamedTuple):
    """Where to sample: the arguments of a convolution, and ``slots`` (T,), the part of a pixel that each tap reads."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    slots: Tensor


def sample(table: Tensor, offset: Tensor, mask: Tensor | None, grid: Grid) -> Tensor:
    """Masked bilinear samples of every tap.

    Args:
        table: (B, H, W, S, C), B = N or 1 (shared by all), S parts a pixel.
        offset: (N, 2 T, Ho, Wo). mask: (N, T, Ho, Wo) or None.

    Returns:
        (N, Ho, Wo, T, C) in the table's dtype, float32 at least.
    """
    rows, base = _rows(table, offset, grid)
    total: Tensor | None = None
    modulation = None if mask is None else mask.permute(0, 2, 3, 1)
    for corner in corners(offset, (table.shape[1], table.shape[2]), *grid[:4]):
        weight = corner.weight if modulation is None else corner.weight * modulation
        values = rows[base + corner.pixel * table.shape[3]].where(corner.inside, 0.0)
        part = values * weight.unsqueeze(-1)
        total = part if total is None else total + part
    assert total is not None
    return total


def sample_backward(
    grad: Tensor, table: Tensor, offset: Tensor, mask: Tensor | None, grid: Grid, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`sample` by table, offset and mask; None where ``needs`` says so.

    Args:
        grad: (N, Ho, Wo, T, C), by the samples; may be expanded over T.
    """
    rows, base = _rows(table, offset, grid)
    grad_rows = torch.zeros_like(rows) if needs[0] else None
    modulation = None if mask is None else mask.permute(0, 2, 3, 1)
    moves = by_mask = None
    for corner in corners(offset, (table.shape[1], table.shape[2]), *grid[:4]):
        index = base + corner.pixel * table.shape[3]
        if grad_rows is not None:
            weight = corner.weight if modulation is None else corner.weight * modulation
            part = (grad * weight.unsqueeze(-1)).where(corner.inside, 0.0)
            grad_rows.index_add_(0, index.flatten(), part.flatten(0, -2).to(grad_rows.dtype))
        if needs[1] or needs[2]:
            by_weight = (rows[index].where(corner.inside, 0.0) * grad).sum(-1)
            if needs[2]:
                part = by_weight * corner.weight
                by_mask = part if by_mask is None else by_mask + part
            if needs[1]:
                step = torch.stack([by_weight * corner.by_y, by_weight * corner.by_x], -1)
                moves = step if moves is None else moves + step
    if moves is not None:
        if modulation is not None:
            moves = moves * modulation.unsqueeze(-1)
        moves = moves.permute(0, 3, 4, 1, 2).flatten(1, 2)
    grad_table = None if grad_rows is None else grad_rows.view(table.shape)
    return grad_table, moves, None if by_mask is None else by_mask.permute(0, 3, 1, 2)


def _rows(table: Tensor, offset: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The table as rows (B H W S, C), and the row of pixel 0 that each image and tap reads, (N, 1, 1, T)."""
    batch, height, width, parts, _ = table.shape
    image = torch.arange(offset.shape[0], device=offset.device) * (height * width * parts if batch > 1 else 0)
    wide = table.float() if table.dtype in (torch.float16, torch.bfloat16) else table
    return wide.flatten(0, 3), image.view(-1, 1, 1, 1) + grid.slots
