"""Modulated deformable convolution, and its sampling half for a fixed support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.ops.checks import check_shape, check_tensors, pair
from bkd_fast.ops.registration import empty_like, memory_format, refuse_double_backward, register


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution v2 (Zhu et al. 2019; BKD Eq. 2 and 5), a drop-in for ``torchvision.ops.deform_conv2d``.

    Each tap of the kernel samples the input bilinearly at its own place plus an offset and is scaled by its mask.
    Samples outside the image are zero, and so is the part of a border sample that reaches outside. Positions and sums
    are float32 for half-precision input.

    Args:
        input: (N, C, H, W).
        offset: (N, 2 G K, Ho, Wo), (y, x) per tap in input pixels; K = kh kw, G offset groups of channels, read
            off the shape.
        weight: (O, C / groups, kh, kw); groups are read off the shape.
        bias: (O,) or None.
        stride, padding, dilation: an integer or a (vertical, horizontal) pair.
        mask: (N, G K, Ho, Wo), the modulation; None = all ones.

    Returns:
        (N, O, Ho, Wo) in the dtype of ``input``, channels_last where ``input`` is.

    Raises:
        TypeError, ValueError: the message names the argument, what it was and what it should be.
    """
    name = "modulated_deform_conv2d"
    check_tensors(name, {"input": input, "offset": offset, "weight": weight}, {"bias": bias, "mask": mask})
    strides, paddings, dilations = _geometry(name, stride, padding, dilation)
    check_shape(name, "input", input, ("N", "C", "H", "W"))
    check_shape(name, "weight", weight, ("O", "C / groups", "kh", "kw"))
    if 0 in weight.shape:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}, expected no size 0")
    channels, outputs, part = input.shape[1], weight.shape[0], weight.shape[1]
    if channels % part or outputs % (channels // part) or not channels:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)} and input {channels} channels; expected weight.shape[1] "
            "to divide the input's channels into groups, and the groups to divide weight.shape[0]"
        )
    rows, columns = _output_size(name, input, list(weight.shape[2:]), strides, paddings, dilations)
    taps = weight.shape[2] * weight.shape[3]
    check_shape(name, "offset", offset, (input.shape[0], "2 * offset groups * kh * kw", rows, columns))
    groups = offset.shape[1] // (2 * taps)
    if not groups or offset.shape[1] % (2 * taps) or channels % groups:
        raise ValueError(
            f"{name}: offset has {offset.shape[1]} channels, expected 2 * G * {taps} with a number of offset groups G "
            f"that divides the input's {channels} channels"
        )
    if mask is not None:
        check_shape(name, "mask", mask, (input.shape[0], groups * taps, rows, columns))
    if bias is not None:
        check_shape(name, "bias", bias, (outputs,))
    return _conv(input, offset, weight, bias, strides, paddings, dilations, mask)


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
        TypeError, ValueError: the message names the argument, what it was and what it should be.
    """
    name = "modulated_deform_gather"
    check_tensors(name, {"projected": projected, "offset": offset}, {"mask": mask})
    kernel = pair(name, "kernel_size", kernel_size, 1)
    strides, paddings, dilations = _geometry(name, stride, padding, dilation)
    check_shape(name, "projected", projected, ("B", "T * C", "H", "W"))
    rows, columns = _output_size(name, projected, kernel, strides, paddings, dilations)
    check_shape(name, "offset", offset, ("N", "2 * T", rows, columns))
    taps = offset.shape[1] // 2
    if not taps or offset.shape[1] % (2 * kernel[0] * kernel[1]):
        raise ValueError(
            f"{name}: offset has {offset.shape[1]} channels, expected a multiple of 2 * {kernel[0]} * {kernel[1]}"
        )
    if projected.shape[0] not in (1, offset.shape[0]):
        raise ValueError(f"{name}: projected has batch {projected.shape[0]}, expected 1 or offset's {offset.shape[0]}")
    if projected.shape[1] % taps or not projected.shape[1]:
        raise ValueError(
            f"{name}: projected has {projected.shape[1]} channels, expected a multiple of the {taps} taps of offset"
        )
    if mask is not None:
        check_shape(name, "mask", mask, (offset.shape[0], taps, rows, columns))
    return _gather(projected, offset, mask, kernel, strides, paddings, dilations)


def project_support(support: Tensor, weight: Tensor) -> Tensor:
    """W_m * S of Eq. 2 for every tap m: the input of :func:`modulated_deform_gather`.

    Args:
        support: (B, C, H, W).
        weight: (O, C / groups, kh, kw).

    Returns:
        (B, kh kw O, H, W).

    Raises:
        ValueError: shapes that do not fit.
    """
    check_tensors("project_support", {"support": support, "weight": weight})
    check_shape("project_support", "support", support, ("B", "C", "H", "W"))
    check_shape("project_support", "weight", weight, ("O", "C / groups", "kh", "kw"))
    groups = support.shape[1] // weight.shape[1] if weight.shape[1] else 0
    if not groups or support.shape[1] % weight.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"project_support: weight has shape {tuple(weight.shape)}, expected (O, C / groups, kh, kw) with "
            f"groups that divide O and the support's {support.shape[1]} channels"
        )
    # Each group's outputs come tap by tap; the result has taps first.
    outputs, taps = weight.shape[0] // groups, weight.shape[2] * weight.shape[3]
    kernels = weight.unflatten(0, (groups, outputs)).permute(0, 3, 4, 1, 2).flatten(0, 3)[:, :, None, None]
    found = F.conv2d(support, kernels, groups=groups)
    return found.unflatten(1, (groups, taps, outputs)).transpose(1, 2).flatten(1, 3)


def _geometry(name: str, stride: Any, padding: Any, dilation: Any) -> tuple[list[int], list[int], list[int]]:
    return pair(name, "stride", stride, 1), pair(name, "padding", padding, 0), pair(name, "dilation", dilation, 1)


def _output_size(
    name: str, input: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, int]:
    sizes = []
    for axis in (0, 1):
        room = input.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1
        if room < 0 or not input.shape[2 + axis]:
            raise ValueError(
                f"{name}: an input of {tuple(input.shape[2:])} with padding {padding} is smaller than the kernel "
                f"{kernel} with dilation {dilation}"
            )
        sizes.append(room // stride[axis] + 1)
    return sizes[0], sizes[1]


def _empty(shape: Any, like: Any) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def _conv_fake(input: Any, offset: Any, weight: Any, *_: Any) -> Tensor:
    return _empty((input.shape[0], weight.shape[0], *offset.shape[2:]), input)


def _conv_backward_fake(
    grad: Any, input: Any, offset: Any, weight: Any, mask: Any, stride: Any, padding: Any, dilation: Any, needs: Any
) -> tuple[Tensor, ...]:
    return (
        empty_like(input, needs[0]),
        empty_like(offset, needs[1]),
        empty_like(weight, needs[2]),
        grad.new_empty(weight.shape[0] if needs[3] else 0),
        empty_like(grad if mask is None else mask, needs[4]),
    )


def _gather_fake(projected: Any, offset: Any, *_: Any) -> Tensor:
    return _empty((offset.shape[0], 2 * projected.shape[1] // offset.shape[1], *offset.shape[2:]), projected)


def _gather_backward_fake(
    grad: Any, projected: Any, offset: Any, mask: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, needs: Any
) -> tuple[Tensor, ...]:
    modulation = empty_like(grad if mask is None else mask, needs[2])
    return empty_like(projected, needs[0]), empty_like(offset, needs[1]), modulation


_GEOMETRY = "int[] stride, int[] padding, int[] dilation"
CONV_SCHEMA = f"(Tensor input, Tensor offset, Tensor weight, Tensor? bias, {_GEOMETRY}, Tensor? mask) -> Tensor"
CONV_BACKWARD_SCHEMA = (
    f"(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, {_GEOMETRY}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
GATHER_SCHEMA = f"(Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, {_GEOMETRY}) -> Tensor"
GATHER_BACKWARD_SCHEMA = (
    f"(Tensor grad, Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, {_GEOMETRY}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)"
)
_conv = register("modulated_deform_conv2d", CONV_SCHEMA, _conv_fake)
_conv_backward = register("modulated_deform_conv2d_backward", CONV_BACKWARD_SCHEMA, _conv_backward_fake)
_gather = register("modulated_deform_gather", GATHER_SCHEMA, _gather_fake)
_gather_backward = register("modulated_deform_gather_backward", GATHER_BACKWARD_SCHEMA, _gather_backward_fake)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, bias, *geometry, mask = inputs
    ctx.save_for_backward(input, offset, weight, mask)
    ctx.geometry = geometry
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[1], wanted[2], wanted[3], wanted[7]]
    results = _conv_backward(grad, input, offset, weight, mask, *ctx.geometry, needs)
    i, o, w, b, m = (value if need else None for value, need in zip(results, needs, strict=True))
    return i, o, w, None if b is None else b.to(ctx.bias_dtype), None, None, None, m


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    projected, offset, mask, *geometry = inputs
    ctx.save_for_backward(projected, offset, mask)
    ctx.geometry = geometry


def _gather_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    projected, offset, mask = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    results = _gather_backward(grad, projected, offset, mask, *ctx.geometry, needs)
    return *(value if need else None for value, need in zip(results, needs, strict=True)), None, None, None, None


_conv.register_autograd(_conv_autograd, setup_context=_conv_setup)
_gather.register_autograd(_gather_autograd, setup_context=_gather_setup)
refuse_double_backward(_conv_backward, "modulated_deform_conv2d")
refuse_double_backward(_gather_backward, "modulated_deform_gather")
