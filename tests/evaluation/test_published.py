"""Published results: data sets are recognized by their file counts, and the comparison is complete."""

import pytest

from bkd_fast.evaluation.metrics import METRIC_NAMES
from bkd_fast.evaluation.published import DATA_SETS, TABLE_1, TABLE_2, comparison, differences, recognize


def metrics(counts):
    def of(count):
        train, test = count
        images = {"train": train - 10, "validation": 10, "test": test}
        return {**dict.fromkeys(METRIC_NAMES, 0.5), "images": images}

    return {
        "mean": dict.fromkeys(METRIC_NAMES, 0.5),
        "categories": {name: of(count) for name, count in counts.items()},
    }


def test_the_data_sets_are_as_large_as_their_authors_say():
    totals = {name: tuple(map(sum, zip(*counts.values(), strict=True))) for name, counts in DATA_SETS.items()}
    assert totals == {"MVTec AD": (3629, 1725), "MPDD": (888, 458)}
    assert TABLE_1.keys() == DATA_SETS["MVTec AD"].keys() > TABLE_2.keys()


def test_the_papers_averages_are_those_the_docs_recompute():
    means = [sum(values) / 15 for values in zip(*TABLE_1.values(), strict=True)]
    assert means == pytest.approx([97.3, 93.4], abs=0.05)
    assert sum(values[2] for values in TABLE_2.values()) / 6 == pytest.approx(73.8, abs=0.05)


def test_a_data_set_is_told_by_its_files():
    mvtec = DATA_SETS["MVTec AD"]
    assert recognize(mvtec) == recognize({"tile": mvtec["tile"]}) == "MVTec AD"
    assert recognize({"tile": (785, 256)}) is None  # somebody's own tiles
    assert recognize({"grass": (60, 45)}) is None
    changed = {**mvtec, "screw": (320, 159)}
    assert recognize(changed) == "MVTec AD"
    (sentence,) = differences("MVTec AD", changed)
    assert "screw has 320 training and 159 test" in sentence


def test_the_comparison_has_the_papers_metrics_and_those_of_others():
    text = comparison(metrics(DATA_SETS["MVTec AD"]))
    assert "92.1 / 68.0" in text
    assert "80.3 / 68.0 / 81.2" in text
    assert "PatchCore" in text
    assert "87.4" in text
    assert "62.8" in comparison(metrics(DATA_SETS["MPDD"]))
    assert comparison(metrics({"tile": (785, 256)})) == ""
    assert "not comparable" in comparison(metrics({**DATA_SETS["MVTec AD"], "screw": (320, 159)}))
