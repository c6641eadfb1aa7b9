"""The mean of the largest values in plain PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.registration import wide
from bkd_fast.ops.top_mean import Arguments


def top_mean(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.top_mean`."""
    return mean_of_largest(*a)


def mean_of_largest(values: Tensor, count: int) -> Tensor:
    """Return the same; the arguments one by one."""
    # NaN counts as larger than every number: of a row that has one, it is among the largest.
    values = values.to(wide(values))
    return values.topk(count, dim=1, sorted=False).values.mean(dim=1)
