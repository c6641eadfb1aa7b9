"""What kernels that match in a window are given: channels-last images of as many channels, and room for results."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.ops.gpu.layout import floats, last, whole_chunks


def match_images(query: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Return the query in float32 and the support in its own type, both with zeros up to whole chunks of the support.

    A bank of support images in channels-last layout and whole chunks is not copied.
    """
    images = last(whole_chunks(support, 1, support.shape[1]), support.dtype)
    filled = F.pad(query.float(), [0, 0, 0, 0, 0, images.shape[1] - query.shape[1]])
    return last(filled, torch.float32), images


def match_results(query: Tensor, shots: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for distance and displacement."""
    return floats((*shots.shape, *query.shape[2:]), query), floats((*shots.shape, 2, *query.shape[2:]), query)
