"""The sampling half of a deformable convolution on CUDA kernels (csrc/cuda/deform_gather.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.cuda_common import kernels, to_channels_last
from bkd_fast.ops.deform_gather import Arguments
from bkd_fast.ops.deterministic import Accumulator, exact_sums, gather_bound
from bkd_fast.ops.layout import CHUNK_BYTES, dense_offsets, floats, image_slices, whole_chunks, without_chunks


def modulated_deform_gather(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_gather`."""
    dtype, channels = a.projected.dtype, 2 * a.projected.shape[1] // a.offset.shape[1]
    whole = channels + -channels % (CHUNK_BYTES // a.projected.element_size())
    table, offsets = to_channels_last(whole_chunks(a.projected, 1, channels), dtype), dense_offsets(a.offset, dtype)
    scale = None if a.mask is None else dense_offsets(a.mask, dtype)
    shape = (a.offset.shape[0], whole, *a.offset.shape[2:])
    output = torch.empty(shape, dtype=dtype, device=a.projected.device, memory_format=torch.channels_last)
    for part in image_slices(a.offset, a.projected):
        kernels().deform_gather(
            table if len(table) == 1 else table[part], offsets[part], None if scale is None else scale[part],
            a.kernel_size, a.stride, a.padding, a.dilation, output[part],
        )  # fmt: skip
    return output[:, :channels]


def modulated_deform_gather_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    dtype, channels = a.projected.dtype, grad.shape[1]
    whole = channels + -channels % (CHUNK_BYTES // a.projected.element_size())
    table, offsets = to_channels_last(whole_chunks(a.projected, 1, channels), dtype), dense_offsets(a.offset, dtype)
    grad_output = to_channels_last(whole_chunks(grad.to(dtype), 1, channels), dtype)
    scale = None if a.mask is None else dense_offsets(a.mask, dtype)
    bound = gather_bound(grad_output, a.mask, a.offset, len(table)) if exact_sums(needs[0]) else None
    grad_table = Accumulator(table, needs[0], bound)
    grad_offset = floats(a.offset.shape if needs[1] else (0,), grad)
    mask_shape = (0,) if a.mask is None or not needs[2] else a.mask.shape
    grad_mask = floats(mask_shape, grad)
    for part in image_slices(a.offset, a.projected):
        own = part if len(table) > 1 else slice(None)
        kernels().deform_gather_backward(
            grad_output[part], table[own], offsets[part], None if scale is None else scale[part], a.kernel_size,
            a.stride, a.padding, a.dilation, grad_table.buffer[own], grad_table.scale, grad_offset[part],
            grad_mask[part],
        )  # fmt: skip
    grad_projected = without_chunks(grad_table.total(), 1, channels, whole) if needs[0] else grad_table.total()
    return [grad_projected, grad_offset, grad_mask]
