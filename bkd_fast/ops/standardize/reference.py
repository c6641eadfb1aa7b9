"""Averaged and standardised features in plain PyTorch: the specification."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.ops.registration import wide
from bkd_fast.ops.standardize import Arguments


def standardize(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.standardize`."""
    return standardized(*a)


def standardized(x: Tensor, mean: Tensor, std: Tensor, patch_size: int, border: float) -> Tensor:
    """Return the same; the arguments one by one."""
    dtype = wide(x)
    mean, std = (value.to(dtype).view(1, -1, 1, 1) for value in (mean, std))
    return (averaged(x.to(dtype), patch_size, border) - mean) / std


def averaged(features: Tensor, patch_size: int, border: float) -> Tensor:
    """Return the average over a square around each pixel, before it is standardised."""
    if patch_size == 1:
        return features
    features = features.contiguous(memory_format=torch.channels_last)
    average = partial(F.avg_pool2d, kernel_size=patch_size, stride=1, padding=patch_size // 2)
    if border in (0, 1):
        return average(features, count_include_pad=border == 1)
    share = average(torch.ones_like(features[:1, :1]))  # of each neighbourhood that lies inside the image
    return average(features, count_include_pad=False) * share**border
