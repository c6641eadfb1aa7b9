"""A scaled copy on a CPU kernel (csrc/cpu/scaled_copy.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.cpu_common import dense, kernels, tier
from bkd_fast.ops.registration import memory_format
from bkd_fast.ops.template import Arguments


def scaled_copy(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.template.scaled_copy`."""
    input = dense(a.input, memory_format(a.input))
    output = torch.empty_like(input)
    kernels.scaled_copy(tier(), input, a.scale, output)
    return output


def scaled_copy_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    return [scaled_copy(a._replace(input=grad)) if needs[0] else grad.new_empty(0)]
