"""Matching and combination of supports in plain PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.local_match import Arguments as Match
from bkd_fast.ops.local_match.reference import local_match
from bkd_fast.ops.match_supports import Arguments, in_turn
from bkd_fast.ops.neighbor_regression import Arguments as Regression
from bkd_fast.ops.neighbor_regression.reference import neighbor_regression
from bkd_fast.ops.select_matches.reference import selected


def match_supports(a: Arguments) -> list[Tensor]:
    """See :func:`bkd_fast.ops.match_supports`."""
    return in_turn(
        a,
        lambda *given: local_match(Match(*given)),
        selected,
        lambda *given: neighbor_regression(Regression(*given)),
    )
