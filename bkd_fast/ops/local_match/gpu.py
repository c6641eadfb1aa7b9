"""The arguments of the GPU kernels: channels-last images with the same number of channels, and result buffers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.ops.layout import floats, to_channels_last, whole_chunks


def match_images(query: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Return the query in float32 and the support in its own type, both with zeros up to whole chunks of the support.

    A bank of support images in channels-last layout and whole chunks is not copied.
    """
    images = to_channels_last(whole_chunks(support, 1, support.shape[1]), support.dtype)
    missing = images.shape[1] - query.shape[1]
    filled = F.pad(query.float(), [0, 0, 0, 0, 0, missing]) if missing else query.float()
    return to_channels_last(filled, torch.float32), images


def match_results(query: Tensor, shots: Tensor) -> tuple[Tensor, Tensor]:
    """Return buffers for distance and displacement."""
    return floats((*shots.shape, *query.shape[2:]), query), floats((*shots.shape, 2, *query.shape[2:]), query)
