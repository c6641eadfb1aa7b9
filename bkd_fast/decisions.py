"""From the scores of normal images to thresholds for a wanted rate of false alarms, and how sure they are."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from bkd_fast.errors import BKDError, check_float

CONFIDENCE = 0.95
RATES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # that a report of known defects goes through


@dataclass(frozen=True)
class NormalScores:
    """Scores of normal images that a model was not fitted to.

    ``source``: ``leave-one-out`` (training images, each compared with the others), ``validation`` (images kept out of
    training) or ``calibration`` (images given later). ``scores``: of the images. ``maxima``: the largest pixel of each
    map.
    """

    source: str
    scores: Sequence[float]
    maxima: Sequence[float]


@dataclass(frozen=True)
class Threshold:
    """``value``: above it is an anomaly. ``rate``: the expected false-alarm rate; ``upper``: its 95 % upper bound."""

    value: float
    rate: float
    upper: float


def check_rate(rate: float) -> float:
    """Return a false-alarm rate.

    Raises:
        BKDError: not a number between 0 and 1.
    """
    if not 0 < check_float("the false-alarm rate", rate) < 1:
        raise BKDError(f"the false-alarm rate is {rate}: expected a number between 0 and 1, such as 0.01")
    return float(rate)


def threshold_for(values: Sequence[float], rate: float) -> Threshold:
    """Return the threshold that good images exceed at ``rate``, from the values of n good images.

    It is their k-th smallest, k = ceil((n + 1) (1 - rate)): a further good image exceeds it with a probability of at
    most ``rate`` (split conformal prediction, Vovk et al. 2005; leave-one-out scores approximate it). The rate for one
    particular set of n images follows Beta(n + 1 - k, k). With fewer than 1 / rate - 1 images no order statistic is
    high enough: the largest is taken, and ``rate`` says what it gives.

    Raises:
        BKDError: no values, or a rate that is not between 0 and 1.
    """
    rate = check_rate(rate)
    if not len(values):
        raise BKDError("there are no scores of good images to take a threshold from")
    from scipy.stats import beta  # here, since a detector needs none of it and would load a second longer

    count = len(values)
    # The product is rounded first: 0.95 * 100 must not become 96.
    rank = min(count, max(1, math.ceil(round((count + 1) * (1 - rate), 9))))
    above = count + 1 - rank
    return Threshold(sorted(values)[rank - 1], above / (count + 1), float(beta.ppf(CONFIDENCE, above, rank)))


def p_value(score: float, normal: Sequence[float]) -> float:
    """Return the share of good images that score at least as high, this one counted: from 1 / (n + 1) to 1.

    Args:
        normal: scores of good images, ascending.
    """
    return (len(normal) - bisect_left(normal, score) + 1) / (len(normal) + 1)


def normalized(score: float, threshold: float, spread: float) -> float:
    """Return the score on a scale from 0 to 1 with the threshold at 0.5: a logistic function of their distance.

    Args:
        spread: std of the scores of good images, the unit of that distance.
    """
    distance = (score - threshold) / max(spread, 1e-12)
    return 1 / (1 + math.exp(-min(max(distance, -500.0), 500.0)))


def images_for(rate: float) -> int:
    """Return how many good images a threshold for a rate of false alarms takes at least."""
    return math.ceil(round(1 / rate - 1, 9))


def sentence(threshold: Threshold, asked: float, normal: NormalScores) -> str:
    """Return what a user is told: the rate to expect, from how many images, and how sure it is."""
    count = len(normal.scores)
    text = (
        f"Expect {_percent(threshold.rate)} false alarms on good images like these {count} "
        f"({normal.source}; 95 % sure of at most {_percent(threshold.upper)})."
    )
    needed = images_for(asked)
    if count < needed:
        text += (
            f" You asked for {_percent(asked)}: that takes {needed} good images. Train with more of them, or run "
            "`bkd-fast calibrate` with as many new ones."
        )
    return text


def found_at_rates(normal: Sequence[float], defective: Sequence[float]) -> list[tuple[float, float, int]]:
    """Return (false-alarm rate, threshold, how many of the defective images are found) for each of RATES."""
    rows = []
    for rate in RATES:
        value = threshold_for(normal, rate).value
        rows.append((rate, value, sum(score > value for score in defective)))
    return rows


def _percent(rate: float) -> str:
    return f"{100 * rate:.2g} %"
