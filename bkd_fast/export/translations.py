"""How the operators look in ONNX, for ``torch.onnx.export(…, dynamo=True, custom_translation_table=…)``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

import bkd_fast.ops  # noqa: F401 (registers the operators)

DEFORM_OPSET = 19  # the first with DeformConv


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For models that hold :class:`bkd_fast.ops.DeformConv2d` or call its function: the standard DeformConv.

    Use ``torch.onnx.export(model, args, path, dynamo=True, opset_version=19,
    custom_translation_table=onnx_translations())``; needs onnxscript.
    """
    return {torch.ops.bkd_fast.modulated_deform_conv2d.default: _deform_conv}


def _deform_conv(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Any = None,
) -> Any:
    """ONNX's DeformConv, whose arguments are those of ``modulated_deform_conv2d`` in another order."""
    op = importlib.import_module("onnxscript").opset19
    return op.DeformConv(
        input,
        weight,
        offset,
        bias,
        mask,
        dilations=list(dilation),
        group=input.shape[1] // weight.shape[1],
        kernel_shape=list(weight.shape[2:]),
        offset_group=offset.shape[1] // (2 * weight.shape[2] * weight.shape[3]),
        pads=[*padding, *padding],
        strides=list(stride),
    )
