"""Matching and combination of supports on the CPU: three kernels in turn, for one view after the other."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.local_match import Arguments as Match
from bkd_fast.ops.local_match.cpu import local_match
from bkd_fast.ops.match_supports import Arguments, in_turn
from bkd_fast.ops.neighbor_regression import Arguments as Regression
from bkd_fast.ops.neighbor_regression.cpu import neighbor_regression
from bkd_fast.ops.select_matches import Arguments as Selection
from bkd_fast.ops.select_matches.cpu import select_matches


def match_supports(a: Arguments) -> list[Tensor]:
    """See :func:`bkd_fast.ops.match_supports`."""
    return in_turn(
        a,
        lambda *given: local_match(Match(*given)),
        lambda *given: select_matches(Selection(*given)),
        lambda *given: neighbor_regression(Regression(*given)),
    )
