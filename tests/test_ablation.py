"""Ablations: which variants there are, runs that are done once, and what the tables say."""

import json

import pytest
from tiny import rows_of

from bkd_fast.ablation import ablate, grid_variants, table_variants
from bkd_fast.ablation.results import render, summarize
from bkd_fast.ablation.variants import Variant
from bkd_fast.cli import main
from bkd_fast.cli.options import grid_from
from bkd_fast.config import BKDConfig
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.metrics import METRIC_NAMES

PAPER, DEFAULT = BKDConfig.preset("paper"), BKDConfig()


def kernel(variant: Variant) -> str | None:
    alignment = variant.config.alignment
    return None if alignment is None else alignment.kernel


def test_table_2_varies_the_shots():
    assert [variant.config.support.shots for variant in table_variants(2, PAPER)] == [2, 4, 8]


def test_table_4_has_the_papers_rows():
    variants = table_variants(4, PAPER)
    assert len(variants) == 6 * 3
    assert len({variant.name for variant in variants}) == len(variants)
    bare, whole = variants[0].config, variants[-1].config
    assert (bare.support.augmentation, bare.memory, bare.alignment, bare.support.shots) == ("none", None, None, 2)
    assert whole == PAPER.with_changes({"support.shots": 8})


def test_table_4_of_retrieved_supports_compares_memory_and_alignment():
    variants = table_variants(4, DEFAULT)
    assert [tuple(variant.labels.values()) for variant in variants] == [
        (memory, alignment) for memory in ("–", "✓") for alignment in ("–", "warp", "DCN")
    ]
    bare, whole = variants[0].config, variants[3].config
    assert whole == DEFAULT
    # The memory is the whole reverse branch: without it the match predicts alone.
    assert bare == DEFAULT.with_changes({"memory": None, "student": None})
    assert [kernel(variant) for variant in variants] == [None, "identity", "full"] * 2
    student = DEFAULT.with_changes({"teacher.levels": "separate", "student": "on"})
    without = table_variants(4, student)[0].config
    assert without == student.with_changes({"memory": None, "student.correction": False, "alignment": None})
    for lacking in ({"memory": None}, {"memory": "none", "student": "none"}):
        with pytest.raises(BKDError, match="there is none: set memory=on"):
            table_variants(4, DEFAULT.with_changes(lacking))


def test_table_5_has_every_transformation_and_needs_sampled_supports():
    variants = table_variants(5, PAPER)
    assert [variant.config.support.augmentation for variant in variants][4:6] == ["shear", "rotation_scale"]
    assert variants[0].config.alignment is None
    assert len(variants) == 10
    # Something has to learn from what is augmented.
    sampled = table_variants(
        5, DEFAULT.with_changes({"support": "sampled", "support.per": "query", "support.aggregation": "mean"})
    )
    assert [kernel(variant) for variant in sampled] == [None] + ["full"] * 9
    with pytest.raises(BKDError, match="retrieved supports have none: use --preset paper"):
        table_variants(5, DEFAULT)


def test_a_grid_is_every_combination():
    fields = grid_from(["support.shots=4,8", "anomaly_map.fusion=sum,geometric", "training.betas=[0.5,0.999]"])
    variants = grid_variants(fields, PAPER)
    assert [(variant.config.support.shots, variant.config.anomaly_map.fusion) for variant in variants] == [
        (4, "sum"), (4, "geometric"), (8, "sum"), (8, "geometric"),
    ]  # fmt: skip
    assert variants[0].config.training.betas == (0.5, 0.999)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["training.seed=1,2"], "--seeds N"),
        (["shotz=1"], "did you mean 'support.shots'"),
        (["support.shots=0"], "shots is 0"),
        (["shots"], "OPTION=VALUE"),
        ([], "needs fields"),
    ],
)
def test_a_bad_grid_is_refused(items, message):
    with pytest.raises(BKDError, match=message):
        grid_variants(grid_from(items), DEFAULT)


def test_the_mean_is_over_categories_and_the_spread_over_seeds():
    variant = Variant({"k": "2"}, DEFAULT)

    def result(value):
        return {"metrics": {"branches": {"both": dict.fromkeys(METRIC_NAMES, value)}}}

    finished = [
        (variant, category, seed, result(value))
        for category, seed, value in (("a", 0, 0.8), ("b", 0, 0.6), ("a", 1, 0.9), ("b", 1, 0.9), ("a", 2, 0.1))
    ]
    mean, spread, seeds = summarize(finished)["k-2", "both"]["image_auroc"]
    assert (mean, seeds) == (pytest.approx(0.8), 2)  # the third seed lacks a category
    assert spread == pytest.approx(0.2 / 2**0.5)


@pytest.fixture(scope="module")
def finished(tiny_data, tiny_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("ablation")
    variants = grid_variants({"support.shots": [1, 2]}, tiny_config.with_changes({"training.epochs": 1}))
    return out, variants, ablate(tiny_data, out, variants, seeds=2, jobs=2)


@pytest.mark.slow
def test_every_run_is_a_row_and_the_page_says_how(finished):
    out, _, page = finished
    rows = rows_of(out, "results.csv")
    assert {(row["support.shots"], row["seed"], row["branch"]) for row in rows} == {
        (shots, seed, branch) for shots in "12" for seed in "01" for branch in ("both", "forward", "reverse")
    }
    assert all(0 <= float(row["image_auroc"]) <= 1 for row in rows)
    text = page.read_text()
    assert "±" in text
    assert "Seeds: 0, 1" in text
    assert "torch " in text
    assert not list(out.glob("runs/*/*/*/model"))


@pytest.mark.slow
def test_what_is_done_is_not_done_again(finished, tiny_data, monkeypatch):
    out, variants, page = finished
    before = page.read_text()
    monkeypatch.setattr("subprocess.Popen", None)  # nothing is left to run
    assert ablate(tiny_data, out, variants, seeds=2).read_text() == before
    with pytest.raises(BKDError, match="another ablation"):
        ablate(tiny_data, out, variants[:1], seeds=2)


@pytest.mark.slow
def test_each_of_several_processes_takes_its_part(tiny_data, tiny_config, tmp_path, monkeypatch):
    variants = grid_variants({"support.shots": [1, 2]}, tiny_config.with_changes({"training.epochs": 1}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        ablate(tiny_data, tmp_path, variants, seeds=1)
        done = [json.loads(path.read_text())["epochs"] for path in tmp_path.glob("runs/*/*/*/result.json")]
        assert done == [1] * (2 - int(rank))


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_stand(make_category, tiny_config, tmp_path):
    data = make_category(tmp_path / "tile")
    variants = grid_variants(
        {"training.learning_rate": [0.001, 10.0]},
        tiny_config.with_changes({"training.epochs": 1, "training.clip_norm": None}),
    )
    (next((data / "test" / "good").iterdir())).write_bytes(b"no image")
    with pytest.raises(BKDError, match=r"2 of 2 runs failed.*no image|2 of 2 runs failed.*cannot be"):
        ablate(data, tmp_path / "out", variants, seeds=1)
    assert "No run has finished" in (tmp_path / "out" / "results.md").read_text()


def test_bad_input_is_refused_before_anything_runs(tiny_data, tmp_path):
    with pytest.raises(BKDError, match="holds no ablation"):
        ablate(tiny_data.parent, tiny_data, table_variants(2, DEFAULT))
    with pytest.raises(BKDError, match="no test images"):
        ablate(tiny_data / "train", tmp_path / "out", table_variants(2, DEFAULT))
    with pytest.raises(BKDError, match="expected at least one"):
        ablate(tiny_data, tmp_path / "out", [], seeds=1)
    assert not (tmp_path / "out").exists()
    assert main(["ablate", str(tiny_data), "--table", "5", "--out", str(tmp_path / "out")]) == 1


def test_no_run_no_table():
    assert "No run has finished" in render("title", [])
