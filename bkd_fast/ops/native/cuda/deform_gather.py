"""The sampling half of a deformable convolution on CUDA kernels (csrc/cuda/deform_gather.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.gpu.layout import CHUNK_BYTES, floats, moves, parts, whole_chunks, without_chunks
from bkd_fast.ops.gpu.sums import Sums, exact_sums, gather_bound
from bkd_fast.ops.native.cuda.layout import kernels, last


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
    dtype, channels = projected.dtype, 2 * projected.shape[1] // offset.shape[1]
    whole = channels + -channels % (CHUNK_BYTES // projected.element_size())
    table, places = last(whole_chunks(projected, 1, channels), dtype), moves(offset, dtype)
    scale = None if mask is None else moves(mask, dtype)
    shape = (offset.shape[0], whole, *offset.shape[2:])
    output = torch.empty(shape, dtype=dtype, device=projected.device, memory_format=torch.channels_last)
    for part in parts(offset, projected):
        kernels().deform_gather(
            table if len(table) == 1 else table[part], places[part], None if scale is None else scale[part],
            kernel_size, stride, padding, dilation, output[part],
        )  # fmt: skip
    return output[:, :channels]


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
    dtype, channels = projected.dtype, grad.shape[1]
    whole = channels + -channels % (CHUNK_BYTES // projected.element_size())
    table, places = last(whole_chunks(projected, 1, channels), dtype), moves(offset, dtype)
    by_output = last(whole_chunks(grad.to(dtype), 1, channels), dtype)
    scale = None if mask is None else moves(mask, dtype)
    bound = gather_bound(by_output, mask, offset, len(table)) if exact_sums(needs[0]) else None
    by_table = Sums(table, needs[0], bound)
    by_offset = floats(offset.shape if needs[1] else (0,), grad)
    mask_shape = (0,) if mask is None or not needs[2] else mask.shape
    by_mask = floats(mask_shape, grad)
    for part in parts(offset, projected):
        own = part if len(table) > 1 else slice(None)
        kernels().deform_gather_backward(
            by_output[part], table[own], places[part], None if scale is None else scale[part], kernel_size, stride,
            padding, dilation, by_table.room[own], by_table.scale, by_offset[part], by_mask[part],
        )  # fmt: skip
    found = without_chunks(by_table.total(), 1, channels, whole) if needs[0] else by_table.total()
    like = grad if mask is None else mask
    return found.to(projected.dtype), by_offset.to(offset.dtype), by_mask.to(like.dtype)
