"""The sampling half of a deformable convolution, for a fixed input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from bkd_fast.ops.checks import check_shape, check_tensors, check_types, output_size, pair
from bkd_fast.ops.registration import Result, memory_format, register

__all__ = ["modulated_deform_gather", "project_support"]


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    projected: Tensor
    offset: Tensor
    mask: Tensor | None
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]


def modulated_deform_gather(
    projected: Tensor,
    offset: Tensor,
    mask: Tensor | None = None,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Deformable convolution of an input whose products with the weights are known: it samples and sums, no GEMM.

    ``modulated_deform_gather(project_support(x, w), offset, mask, …)`` equals
    ``modulated_deform_conv2d(x, offset, w, mask=mask, …)`` with one offset group, since the convolution is linear in
    its input (BKD Eq. 2). The projection of a support is computed once for all queries. ``kernel_size=1, padding=0``
    is a plain warp.

    Args:
        projected: (B, T C, H, W), channels t C to (t + 1) C for tap t; B = N, or 1 for the same input in every image.
        offset: (N, 2 T, Ho, Wo), (y, x) per tap in pixels; T a multiple of kh kw: further groups of taps (k
            support images, say, each with its own C channels) are summed too.
        mask: (N, T, Ho, Wo) or None.
        kernel_size, stride, padding, dilation: of the convolution.

    Returns:
        (N, C, Ho, Wo) in the dtype of ``projected``, channels_last where ``projected`` is.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: forward-mode or second derivatives.
    """
    check_types(_NAME, {"projected": projected, "offset": offset}, {"mask": mask})
    return _operator(
        projected, offset, mask, pair(_NAME, "kernel_size", kernel_size, 1), pair(_NAME, "stride", stride, 1),
        pair(_NAME, "padding", padding, 0), pair(_NAME, "dilation", dilation, 1),
    )  # fmt: skip


def project_support(support: Tensor, weight: Tensor) -> Tensor:
    """W_m * S of Eq. 2 for every tap m: the input of :func:`modulated_deform_gather`.

    Args:
        support: (B, C, H, W).
        weight: (O, C / groups, kh, kw).

    Returns:
        (B, kh kw O, H, W).

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
    """
    name = "project_support"
    check_types(name, {"support": support, "weight": weight})
    check_tensors(name, {"support": support, "weight": weight})
    check_shape(name, "support", support, ("B", "C", "H", "W"))
    check_shape(name, "weight", weight, ("O", "C / groups", "kh", "kw"))
    groups = support.shape[1] // weight.shape[1] if weight.shape[1] else 0
    if not groups or support.shape[1] % weight.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}, expected (O, C / groups, kh, kw) with "
            f"groups that divide O and the support's {support.shape[1]} channels"
        )
    # Each group's outputs come tap by tap; the result has taps first.
    outputs, taps = weight.shape[0] // groups, weight.shape[2] * weight.shape[3]
    kernels = weight.unflatten(0, (groups, outputs)).permute(0, 3, 4, 1, 2).flatten(0, 3)[:, :, None, None]
    projected = F.conv2d(support, kernels, groups=groups)
    return projected.unflatten(1, (groups, taps, outputs)).transpose(1, 2).flatten(1, 3)


def _check(a: Arguments) -> None:
    check_tensors(_NAME, {"projected": a.projected, "offset": a.offset}, {"mask": a.mask})
    check_shape(_NAME, "projected", a.projected, ("B", "T * C", "H", "W"))
    rows, columns = output_size(_NAME, a.projected, a.kernel_size, a.stride, a.padding, a.dilation)
    check_shape(_NAME, "offset", a.offset, ("N", "2 * T", rows, columns))
    taps = a.offset.shape[1] // 2
    if not taps or a.offset.shape[1] % (2 * a.kernel_size[0] * a.kernel_size[1]):
        raise ValueError(
            f"{_NAME}: offset has {a.offset.shape[1]} channels, expected a multiple of "
            f"2 * {a.kernel_size[0]} * {a.kernel_size[1]}"
        )
    if a.projected.shape[0] not in (1, a.offset.shape[0]):
        raise ValueError(
            f"{_NAME}: projected has batch {a.projected.shape[0]}, expected 1 or offset's {a.offset.shape[0]}"
        )
    if a.projected.shape[1] % taps or not a.projected.shape[1]:
        raise ValueError(
            f"{_NAME}: projected has {a.projected.shape[1]} channels, expected a multiple of the {taps} taps of offset"
        )
    if a.mask is not None:
        check_shape(_NAME, "mask", a.mask, (a.offset.shape[0], taps, rows, columns))


def _results(a: Arguments) -> list[Result]:
    shape = (a.offset.shape[0], 2 * a.projected.shape[1] // a.offset.shape[1], *a.offset.shape[2:])
    return [Result(shape, a.projected.dtype, memory_format(a.projected))]


_NAME = "modulated_deform_gather"
_operator = register(_NAME, Arguments, check=_check, results=_results)
