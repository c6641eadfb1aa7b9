"""Features averaged over their neighbourhood and standardised, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_index, check_shape, check_tensors, check_types
from bkd_fast.ops.registration import Result, no_gradient, register, wide

__all__ = ["standardize"]

MAX_PATCH = 255


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    x: Tensor
    mean: Tensor
    std: Tensor
    patch_size: int
    border: float


def standardize(x: Tensor, mean: Tensor, std: Tensor, patch_size: int = 1, border: float = 1.0) -> Tensor:
    """Return ``(a - mean) / std``, ``a`` the average of ``x`` over a square around each pixel.

    At the border of the image the average of what is inside is multiplied by ``share ** border``, ``share`` the part
    of the square that is inside: 1 counts zeros beyond the border, 0 averages what is inside. Arithmetic is float32 for
    half precision. There is no gradient.

    Args:
        x: (N, C, H, W), in either layout.
        mean: (C,).
        std: (C,), not 0.
        patch_size: side of the square, an odd number from 1 to 255.
        border: 0 to 1.

    Returns:
        (N, C, H, W), channels_last, float32, or float64 for float64 features.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: in backward.
    """
    check_types(_NAME, {"x": x, "mean": mean, "std": std})
    if not isinstance(patch_size, int) or isinstance(patch_size, bool):
        raise ValueError(f"{_NAME}: patch_size is {patch_size!r}, expected an odd integer from 1 to {MAX_PATCH}")
    return _operator(x, mean, std, patch_size, float(border))


def _check(a: Arguments) -> None:
    check_tensors(_NAME, {"x": a.x, "mean": a.mean, "std": a.std})
    check_shape(_NAME, "x", a.x, ("N", "C", "H", "W"))
    check_shape(_NAME, "mean", a.mean, (a.x.shape[1],))
    check_shape(_NAME, "std", a.std, (a.x.shape[1],))
    if 0 in a.x.shape[1:]:
        raise ValueError(f"{_NAME}: x has shape {tuple(a.x.shape)}, expected no size 0 but the batch")
    if not 1 <= a.patch_size <= MAX_PATCH or a.patch_size % 2 == 0:
        raise ValueError(f"{_NAME}: patch_size is {a.patch_size!r}, expected an odd integer from 1 to {MAX_PATCH}")
    if not 0 <= a.border <= 1:
        raise ValueError(f"{_NAME}: border is {a.border!r}, expected a number from 0 to 1")
    check_index(_NAME, "an image", a.x.shape[1:])


def _results(a: Arguments) -> list[Result]:
    return [Result(a.x.shape, wide(a.x), torch.channels_last)]


_NAME = "standardize"
_operator = register(
    _NAME, Arguments, check=_check, results=_results,
    gradient=no_gradient(_NAME),
)  # fmt: skip
