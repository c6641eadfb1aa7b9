"""A scaled copy in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.registration import memory_format
from bkd_fast.ops.template import Arguments
from bkd_fast.ops.triton_common import Tuned, config, operator


@triton.jit
def scaled_copy_kernel(input, output, count, scale, BLOCK: tl.constexpr):
    """BLOCK numbers, wherever they are in memory: both tensors have one layout."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(input + index, mask=index < count, other=0.0).to(tl.float32)
    tl.store(output + index, (scale * value).to(output.dtype.element_ty), mask=index < count)


KERNEL = Tuned(scaled_copy_kernel, {"any": (config(4, BLOCK=1024), config(8, BLOCK=4096))}, key=())


@operator
def scaled_copy(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.template.scaled_copy`."""
    return _scaled(a.input, a.scale)


@operator
def scaled_copy_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    return [_scaled(grad, a.scale) if needs[0] else grad.new_empty(0)]


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    input = tensor.contiguous(memory_format=memory_format(tensor))
    output, count = torch.empty_like(input), input.numel()
    kernel = KERNEL()
    if count:
        wrap_triton(kernel)[lambda meta: (triton.cdiv(count, meta["BLOCK"]),)](input, output, count, scale)
    return output
