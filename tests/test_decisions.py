import numpy as np
import pytest

from bkd_fast.decisions import NormalScores, found_at_rates, normalized, p_value, sentence, threshold_for
from bkd_fast.errors import BKDError


@pytest.mark.parametrize(("count", "rate", "place"), [(99, 0.01, 99), (100, 0.05, 96), (199, 0.05, 190), (60, 0.2, 49)])
def test_the_threshold_is_the_order_statistic_of_split_conformal_prediction(count, rate, place):
    values = np.random.default_rng(0).permutation(np.arange(1.0, count + 1)).tolist()
    threshold = threshold_for(values, rate)
    assert threshold.value == place
    assert threshold.rate == pytest.approx((count + 1 - place) / (count + 1))
    assert threshold.rate <= rate < threshold.upper


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_good_images_exceed_it_as_often_as_promised(rate):
    """Over many sets of good images the rate is the expected one, and in 95 % of them below the upper bound."""
    generator = np.random.default_rng(1)
    rates, within = [], 0
    for _ in range(600):
        threshold = threshold_for(generator.normal(size=150).tolist(), rate)
        true = (generator.normal(size=4000) > threshold.value).mean()
        rates.append(true)
        within += true <= threshold.upper + 0.005
    assert np.mean(rates) == pytest.approx(threshold.rate, rel=0.1)
    assert within / 600 > 0.93


def test_too_few_images_give_the_largest_and_say_so():
    normal = NormalScores("leave-one-out", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    threshold = threshold_for(normal.scores, 0.01)
    assert (threshold.value, threshold.rate) == (3.0, 0.25)
    text = sentence(threshold, 0.01, normal)
    assert "Expect 25 % false alarms" in text
    assert "takes 99 good images" in text
    assert "You asked" not in sentence(threshold_for(normal.scores, 0.4), 0.4, normal)


@pytest.mark.parametrize(
    ("rate", "message"),
    [(0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (-0.1, "between 0 and 1"), (float("nan"), "a finite number")],
)
def test_a_rate_is_a_share(rate, message):
    with pytest.raises(BKDError, match=f"the false-alarm rate is .* expected .*{message}"):
        threshold_for([1.0, 2.0], rate)


def test_no_scores_give_no_threshold():
    with pytest.raises(BKDError, match="no scores"):
        threshold_for([], 0.1)


def test_p_values_count_the_good_images_that_score_as_high():
    normal = [1.0, 2.0, 2.0, 3.0]
    assert [p_value(score, normal) for score in (0.5, 1.0, 2.0, 2.5, 4.0)] == [1.0, 1.0, 0.8, 0.4, 0.2]


def test_normalized_scores_are_monotone_from_0_to_1_with_the_threshold_at_one_half():
    scores = np.linspace(-1e4, 1e4, 2001)
    values = [normalized(score, 3.0, 0.5) for score in scores]
    assert normalized(3.0, 3.0, 0.5) == 0.5
    assert all(0 <= value <= 1 for value in values)
    assert np.all(np.diff(values) >= 0)
    assert normalized(3.1, 3.0, 0.0) == 1.0


def test_known_defects_are_counted_at_every_rate():
    normal = np.arange(1000.0).tolist()
    rows = found_at_rates(normal, [500.0, 900.0, 2000.0])
    assert [found for _, _, found in rows] == [1, 1, 1, 1, 1, 1, 2]
    assert rows[0][0] == 0.001
    assert rows[-1][0] == 0.2
