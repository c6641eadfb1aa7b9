"""Matching and combination of supports on a CUDA kernel (csrc/cuda/match_supports.cu), of all views at once."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.cuda_common import aligned, kernels
from bkd_fast.ops.layout import spans
from bkd_fast.ops.local_match import Arguments as Match
from bkd_fast.ops.local_match.cuda import local_match
from bkd_fast.ops.local_match.gpu import match_images
from bkd_fast.ops.match_supports import Arguments, in_turn
from bkd_fast.ops.neighbor_regression import Arguments as Regression
from bkd_fast.ops.neighbor_regression.cuda import neighbor_regression
from bkd_fast.ops.select_matches import Arguments as Selection
from bkd_fast.ops.select_matches.cuda import select_matches

MAX_VIEWS = 8  # of a launch (csrc/cuda/match_supports.h)
FEW = 6  # neighbors, whose system a warp solves in registers (csrc/cuda/neighbor_regression.h)


def match_supports(a: Arguments) -> list[Tensor]:
    """See :func:`bkd_fast.ops.match_supports`. More than six neighbors are found and combined by kernels in turn."""
    if a.neighbors > FEW:
        return in_turn(
            a,
            lambda *given: local_match(Match(*given)),
            lambda *given: select_matches(Selection(*given)),
            lambda *given: neighbor_regression(Regression(*given)),
        )
    pairs = [match_images(query, support) for query, support in zip(a.queries, a.supports, strict=True)]
    queries, supports = ([aligned(pair[side]) for pair in pairs] for side in (0, 1))
    outputs = [torch.empty_like(query) for query in queries]
    channels, shots = [query.shape[1] for query in a.queries], a.shots.contiguous()
    for part in spans(len(queries), MAX_VIEWS):
        kernels().match_supports(
            queries[part], supports[part], shots, channels[part], a.radius, a.neighbors, a.ridge, outputs[part]
        )
    return [output[:, :own] for output, own in zip(outputs, channels, strict=True)]
