"""Modulated deformable convolution (BKD Eq. 2 and 5, DCNv2) in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.deform_conv import Arguments
from bkd_fast.ops.registration import wide
from bkd_fast.ops.sampling import Grid, chunks, images_of, joined, sample, sample_backward, to_channels_first


def modulated_deform_conv2d(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_conv2d`."""
    table, grid, kernel = _convolution(a)
    parts = []
    for images in chunks(a.offset, a.input.shape[1]):
        columns = _columns(sample(table[images], a.offset[images], images_of(a.mask, images), grid), kernel)
        parts.append(torch.einsum("nhwkgc,gock->ngohw", columns, kernel).flatten(1, 2))
    output = torch.cat(parts) if parts else kernel.new_zeros(0, a.weight.shape[0], *a.offset.shape[2:])
    if a.bias is not None:
        output = output + a.bias.to(output.dtype).view(1, -1, 1, 1)
    return output.to(a.input.dtype)


def modulated_deform_conv2d_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    table, grid, kernel = _convolution(a)
    widened = grad.to(kernel.dtype)
    sampled: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])  # with respect to input, offset and mask
    grad_kernel = torch.zeros_like(kernel)
    for images in chunks(a.offset, a.input.shape[1]):
        outputs = widened[images].unflatten(1, kernel.shape[:2])
        if needs[2]:
            columns = _columns(sample(table[images], a.offset[images], images_of(a.mask, images), grid), kernel)
            grad_kernel += torch.einsum("ngohw,nhwkgc->gock", outputs, columns)
        if needs[0] or needs[1] or needs[4]:
            grad_columns = torch.einsum("ngohw,gock->nhwkgc", outputs, kernel)
            # (N, Ho, Wo, K, groups, C / groups) -> taps by offset group, in the order of the samples
            grad_samples = grad_columns.flatten(4).unflatten(4, table.shape[3:]).transpose(3, 4).flatten(3, 4)
            parts = sample_backward(
                grad_samples,
                table[images],
                a.offset[images],
                images_of(a.mask, images),
                grid,
                (needs[0], needs[1], needs[4]),
            )
            for kept, part in zip(sampled, parts, strict=True):
                if part is not None:
                    kept.append(part)
    return [
        joined(sampled[0], a.input, needs[0], to_channels_first),
        joined(sampled[1], a.offset, needs[1]),
        joined([grad_kernel.flatten(0, 1).unflatten(2, a.weight.shape[2:])], a.weight, needs[2]),
        joined([widened.sum((0, 2, 3))], grad, needs[3]),
        joined(sampled[2], grad if a.mask is None else a.mask, needs[4]),
    ]


def _convolution(a: Arguments) -> tuple[Tensor, Grid, Tensor]:
    """Return the input as (N, H, W, G, C / G), the sampling grid, and (groups, O / groups, C / groups, K) weights."""
    taps = a.weight.shape[2] * a.weight.shape[3]
    offset_groups = a.offset.shape[1] // (2 * taps)
    groups = a.input.shape[1] // a.weight.shape[1]
    slots = torch.arange(offset_groups, device=a.input.device).repeat_interleave(taps)
    table = a.input.permute(0, 2, 3, 1).unflatten(3, (offset_groups, -1))
    kernel = a.weight.flatten(2).unflatten(0, (groups, -1))
    return table, Grid(a.weight.shape[2:], a.stride, a.padding, a.dilation, slots), kernel.to(wide(kernel))


def _columns(samples: Tensor, kernel: Tensor) -> Tensor:
    """(N, Ho, Wo, G K, C / G) -> (N, Ho, Wo, K, groups, C / groups)."""
    groups, _, channels, taps = kernel.shape
    by_tap = samples.unflatten(3, (-1, taps)).transpose(3, 4)  # (N, Ho, Wo, K, G, C / G)
    return by_tap.flatten(4).unflatten(4, (groups, channels))
