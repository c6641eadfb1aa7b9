"""Modulated deformable convolution (BKD Eq. 2 and 5, DCNv2) in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bkd_fast.ops.reference.sampling import Grid, sample, sample_backward

COLUMN_BYTES = 64 * 2**20  # samples that are held at a time


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_conv2d`."""
    table, grid, kernel = _convolution(input, offset, weight, stride, padding, dilation)
    parts = []
    for images in _chunks(offset, input.shape[1]):
        columns = _columns(sample(table[images], offset[images], _of(mask, images), grid), kernel)
        parts.append(torch.einsum("nhwkgc,gock->ngohw", columns, kernel).flatten(1, 2))
    output = torch.cat(parts) if parts else kernel.new_zeros(0, weight.shape[0], *offset.shape[2:])
    if bias is not None:
        output = output + bias.to(output.dtype).view(1, -1, 1, 1)
    return output.to(input.dtype)


def modulated_deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by input, offset, weight, bias and mask; empty tensors where ``needs`` says so."""
    table, grid, kernel = _convolution(input, offset, weight, stride, padding, dilation)
    wide = grad.to(kernel.dtype)
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])  # by input, offset and mask
    by_kernel = torch.zeros_like(kernel)
    for images in _chunks(offset, input.shape[1]):
        outputs = wide[images].unflatten(1, kernel.shape[:2])
        if needs[2]:
            columns = _columns(sample(table[images], offset[images], _of(mask, images), grid), kernel)
            by_kernel += torch.einsum("ngohw,nhwkgc->gock", outputs, columns)
        if needs[0] or needs[1] or needs[4]:
            by_columns = torch.einsum("ngohw,gock->nhwkgc", outputs, kernel)
            # (N, Ho, Wo, K, groups, C / groups) -> taps by offset group, as the samples come
            by_samples = by_columns.flatten(4).unflatten(4, table.shape[3:]).transpose(3, 4).flatten(3, 4)
            parts = sample_backward(
                by_samples, table[images], offset[images], _of(mask, images), grid, (needs[0], needs[1], needs[4])
            )
            for kept, part in zip(found, parts, strict=True):
                if part is not None:
                    kept.append(part)
    return (
        _joined(found[0], input, needs[0], lambda value: value.flatten(3).permute(0, 3, 1, 2)),
        _joined(found[1], offset, needs[1]),
        _joined([by_kernel.flatten(0, 1).unflatten(2, weight.shape[2:])], weight, needs[2]),
        _joined([wide.sum((0, 2, 3))], grad, needs[3]),
        _joined(found[2], grad if mask is None else mask, needs[4]),
    )


def modulated_deform_gather(
    projected: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_gather`."""
    table, grid = _gathering(projected, offset, kernel_size, stride, padding, dilation)
    parts = [
        sample(table if len(table) == 1 else table[images], offset[images], _of(mask, images), grid).sum(3)
        for images in _chunks(offset, table.shape[4])
    ]
    output = torch.cat(parts) if parts else projected.new_zeros(0, *offset.shape[2:], table.shape[4])
    return output.permute(0, 3, 1, 2).to(projected.dtype)


def modulated_deform_gather_backward(
    grad: Tensor,
    projected: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by projected, offset and mask; empty tensors where ``needs`` says so."""
    table, grid = _gathering(projected, offset, kernel_size, stride, padding, dilation)
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])  # by projected, offset and mask
    for images in _chunks(offset, table.shape[4]):
        outputs = grad[images].permute(0, 2, 3, 1).unsqueeze(3).expand(-1, -1, -1, len(grid.slots), -1)
        part = table if len(table) == 1 else table[images]
        parts = sample_backward(outputs, part, offset[images], _of(mask, images), grid, needs)
        for kept, value in zip(found, parts, strict=True):
            if value is not None:
                kept.append(value)
    by_table = [torch.stack(found[0]).sum(0)] if len(table) == 1 and found[0] else found[0]
    return (
        _joined(by_table, projected, needs[0], lambda value: value.flatten(3).permute(0, 3, 1, 2)),
        _joined(found[1], offset, needs[1]),
        _joined(found[2], grad if mask is None else mask, needs[2]),
    )


def _convolution(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Grid, Tensor]:
    """Input as (N, H, W, G, C / G), where to sample it, and the kernel as (groups, O / groups, C / groups, K)."""
    taps = weight.shape[2] * weight.shape[3]
    offset_groups = offset.shape[1] // (2 * taps)
    groups = input.shape[1] // weight.shape[1]
    slots = torch.arange(offset_groups, device=input.device).repeat_interleave(taps)
    table = input.permute(0, 2, 3, 1).unflatten(3, (offset_groups, -1))
    kernel = weight.flatten(2).unflatten(0, (groups, -1))
    kernel = kernel.float() if kernel.dtype in (torch.float16, torch.bfloat16) else kernel
    return table, Grid(weight.shape[2:], stride, padding, dilation, slots), kernel


def _columns(samples: Tensor, kernel: Tensor) -> Tensor:
    """(N, Ho, Wo, G K, C / G) -> (N, Ho, Wo, K, groups, C / groups)."""
    groups, _, channels, taps = kernel.shape
    by_tap = samples.unflatten(3, (-1, taps)).transpose(3, 4)  # (N, Ho, Wo, K, G, C / G)
    return by_tap.flatten(4).unflatten(4, (groups, channels))


def _gathering(
    projected: Tensor,
    offset: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Grid]:
    """Projected as (B, H, W, T, C), and where to sample it."""
    taps = offset.shape[1] // 2
    table = projected.permute(0, 2, 3, 1).unflatten(3, (taps, -1))
    return table, Grid(kernel_size, stride, padding, dilation, torch.arange(taps, device=projected.device))


def _chunks(offset: Tensor, channels: int) -> list[slice]:
    """Images at a time, so that the samples of a chunk stay within COLUMN_BYTES."""
    each = max(1, channels * offset[:1].numel() // 2 * 4)
    step = max(1, COLUMN_BYTES // each)
    return [slice(start, start + step) for start in range(0, offset.shape[0], step)]


def _of(mask: Tensor | None, images: slice) -> Tensor | None:
    return None if mask is None else mask[images]


def _joined(
    parts: list[Tensor], like: Tensor, needed: bool, arranged: Callable[[Tensor], Tensor] = lambda value: value
) -> Tensor:
    """The parts of a gradient in the layout and dtype of what it belongs to; empty where it was not asked for."""
    if not needed:
        return like.new_empty(0)
    if not parts:
        return torch.zeros_like(like)
    return arranged(torch.cat(parts) if len(parts) > 1 else parts[0]).to(like.dtype)
