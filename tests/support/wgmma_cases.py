"""Convolutions that fill a device with the large tiles that may run on wgmma, and their check."""

from __future__ import annotations

import math

import cases
import torch
from torch import Tensor

from bkd_fast.ops import backend
from bkd_fast.ops.deform_conv.cuda import wgmma

# Channels, outputs, and more arguments of cases.conv.
SHAPES = {
    "wgmma": (40, 130, {}),
    "wgmma: one step": (24, 130, {"kernel": (1, 1)}),
    "wgmma: two tiles of outputs": (16, 270, {"kernel": (2, 2), "batch": 2, "mask": False, "bias": False}),
    "wgmma: groups": (96, 272, {"kernel": (1, 1), "groups": 2, "offset_groups": 4}),
    "wgmma: up to 128 outputs": (40, 100, {"kernel": (1, 1), "offsets_last": True}),
    "wgmma: more groups than offset groups": (96, 400, {"kernel": (1, 1), "groups": 4, "offset_groups": 2}),
}


def make(name: str, multiprocessors: int = 4) -> cases.Case:
    """Return a convolution of at least two tiles of 128 pixels for each multiprocessor."""
    channels, outputs, options = SHAPES[name]
    side = math.ceil(math.sqrt(256 * multiprocessors))
    return cases.conv(**{"batch": 1, **options}, channels=channels, outputs=outputs, size=(side, side + 1))


def check(case: cases.Case, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Check the result with wgmma by the rule of :func:`cases.check`, and return it."""
    call, tensors = cases.rounded(case, dtype)
    inputs = [tensor.to(device, dtype) for tensor in tensors]
    with torch.no_grad():
        with backend("native"), wgmma(True):
            own = call(*inputs)
        with backend("reference"):
            plain, exact = call(*inputs), call(*(value.double() for value in inputs))
    cases.check([own.cpu()], [plain.cpu()], [exact.cpu()], cases.ROUNDING[dtype])
    return own
