"""Bias, shortcut and activation in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.bias_activation import Arguments, layout_of
from bkd_fast.ops.triton_common import Tuned, config, operator


@triton.jit
def bias_activation_kernel(
    x, bias, residual, output, count, channels, run, low, high, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK numbers; ``run`` adjacent ones have one channel: the pixels of an image, or 1 if it is channels_last."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = index < count
    value = tl.load(x + index, mask=within, other=0.0).to(tl.float32)
    value += tl.load(bias + index // run % channels, mask=within, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + index, mask=within, other=0.0).to(tl.float32)
    value = tl.where(value < low, low, tl.where(value > high, high, value))  # NaN stays
    tl.store(output + index, value.to(output.dtype.element_ty), mask=within)


KERNEL = Tuned(bias_activation_kernel, {"any": (config(4, BLOCK=1024), config(8, BLOCK=4096))}, key=("HAS_RESIDUAL",))


@operator
def bias_activation(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.bias_activation`."""
    layout = layout_of(a.x)
    x = a.x.contiguous(memory_format=layout)
    residual = x if a.residual is None else a.residual.contiguous(memory_format=layout)
    output, count = torch.empty_like(x), x.numel()
    kernel = KERNEL()
    if count:
        run = 1 if layout == torch.channels_last else x.shape[2] * x.shape[3]
        wrap_triton(kernel)[lambda meta: (triton.cdiv(count, meta["BLOCK"]),)](
            x, a.bias.contiguous(), residual, output, count, x.shape[1], run, a.low, a.high,
            HAS_RESIDUAL=a.residual is not None,
        )  # fmt: skip
    return output
