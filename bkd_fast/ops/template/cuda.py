"""A scaled copy on a CUDA kernel (csrc/cuda/scaled_copy.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.cuda_common import aligned, kernels
from bkd_fast.ops.registration import memory_format
from bkd_fast.ops.template import Arguments


def scaled_copy(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.template.scaled_copy`."""
    input = aligned(a.input.contiguous(memory_format=memory_format(a.input)))
    output = torch.empty_like(input)
    kernels().scaled_copy(input, a.scale, output)
    return output


def scaled_copy_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    return [scaled_copy(a._replace(input=grad)) if needs[0] else grad.new_empty(0)]
