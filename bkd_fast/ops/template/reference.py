"""A scaled copy in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bkd_fast.ops.template import Arguments


def scaled_copy(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.template.scaled_copy`."""
    return a.scale * a.input


def scaled_copy_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    return [a.scale * grad if needs[0] else grad.new_empty(0)]
