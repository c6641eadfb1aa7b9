"""Matching and combination of supports in Triton: three kernels in turn, for one view after the other."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.local_match import Arguments as Match
from bkd_fast.ops.local_match.triton import window_match
from bkd_fast.ops.match_supports import Arguments, in_turn
from bkd_fast.ops.neighbor_regression import Arguments as Regression
from bkd_fast.ops.neighbor_regression.triton import combined_rows
from bkd_fast.ops.select_matches import Arguments as Selection
from bkd_fast.ops.select_matches.triton import best_positions
from bkd_fast.ops.triton_common import operator


@operator
def match_supports(a: Arguments) -> list[Tensor]:
    """See :func:`bkd_fast.ops.match_supports`."""
    return in_turn(
        a,
        lambda *given: window_match(Match(*given)),
        lambda *given: best_positions(Selection(*given)),
        lambda *given: combined_rows(Regression(*given)),
    )
