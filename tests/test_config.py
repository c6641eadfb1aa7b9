import json

import pytest

from bkd_fast.config import PRESETS, BKDConfig
from bkd_fast.errors import BKDError
from bkd_fast.model import BKD


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = BKDConfig.preset(name)
    assert BKDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_paper_preset_is_the_paper():
    paper = BKDConfig.preset("paper")
    assert (paper.memory.items, paper.memory.threshold / paper.memory.items, paper.memory.temperature) == (
        200,
        0.002,
        1.0,
    )
    alignment, fusion = paper.alignment, paper.anomaly_map.fusion
    assert (alignment.activation, alignment.cascade, fusion) == ("softmax", "product", "product")
    training = paper.training
    assert (training.learning_rate, training.betas, training.epochs, training.batch_size) == (
        0.005,
        (0.5, 0.999),
        200,
        16,
    )
    assert not paper.alignment.modulated


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"support.shot": 3}, "did you mean 'support.shots'"),
        ({"anomaly_map.fusion": "max"}, "expected one of 'geometric', 'product', 'sum'"),
        ({"training.epochs": 0}, "epochs is 0: expected a value from 1"),
        ({"training.epochs": "many"}, "epochs is 'many': expected a value of type int"),
        ({"training.epochs": True}, "expected a value of type int"),
        ({"teacher.image_size": (256,)}, "image_size is .*expected 2 values"),
        ({"teacher.patch_size": 2}, "odd number"),
        ({"support": None, "memory": None, "student": None}, "keep at least one"),
        ({"teacher.levels": "separate", "student": "on", "student.output": "relu"}, "needs student.output 'linear'"),
        ({"teacher.border": 1.5}, "border is 1.5: expected a value from 0 to 1"),
        ({"support.match_radius": 9}, "match_radius is 9: expected a value from 0 to 8"),
        ({"support.neighbors": 0}, "support.neighbors is 0: expected a value from 1"),
        ({"memory.neighbors": 0}, "memory.neighbors is 0: expected a value from 1"),
        ({"training.false_alarms": 0.0}, "false_alarms is 0.0: expected a value from 1e-05 to 0.5"),
        ({"teacher.scale": "image"}, "expected one of 'level', 'channel', 'none'"),
        ({"student": "on"}, "student rebuilds each level alone: set teacher.levels='separate'"),
        ({"student": "on", "memory": None}, "needs a memory"),
        ({"support.aggregation": "mean"}, "expected one of 'regression', 'min'"),
        ({"support": "sampled", "support.aggregation": "regression"}, "expected one of 'mean', 'min'"),
        (
            {"support.augmentation": "rotation"},
            "support is 'retrieved' and has no option .*: set support=sampled first",
        ),
        ({"support": None, "alignment": "on"}, "alignment warps supports, and support is None"),
        ({"anomaly_map.fusion": "product"}, "fusion is 'product' and adds the branches level by level"),
        ({"teacher.image_size": (16, 256)}, "from 32"),
        ({"memory": "many"}, "memory is 'many': expected one of none, on"),
        ({"training": None}, "training cannot be off"),
        ({"memory_items": 500}, "no option 'memory_items': did you mean 'memory.items'"),
        ({"training.betas": (0.5, 1.5)}, "betas"),
        ({"training.learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_unusable_values_are_named(changes, words):
    with pytest.raises(BKDError, match=words):
        BKDConfig().with_changes(changes)


def test_the_default_learns_nothing_and_the_presets_do():
    """Teacher, matching and memory need no gradient; an alignment, items or a student do."""
    small = {"teacher.name": "resnet18", "teacher.weights": "none"}
    assert BKD(BKDConfig().with_changes(small), weights=None).learned_branches() == ()
    assert BKD(BKDConfig().with_changes({"alignment.kernel": "full", **small}), weights=None).learned_branches() == (
        "forward",
    )
    assert BKD(BKDConfig().with_changes({"memory.learned": True, **small}), weights=None).learned_branches() == (
        "reverse",
    )
    assert BKD(BKDConfig.preset("paper", small), weights=None).learned_branches() == ("forward", "reverse")
    assert BKD(BKDConfig.preset("rd4ad", small), weights=None).learned_branches() == ("reverse",)


def test_unknown_preset_lists_presets():
    with pytest.raises(BKDError, match="default, paper, rd4ad"):
        BKDConfig.preset("best")


@pytest.mark.parametrize("kind", ["['sampled']", "1", '"drawn"'])
def test_a_kind_that_there_is_not_is_refused_whatever_its_type(kind):
    with pytest.raises(BKDError, match=r"support\.kind is"):
        BKDConfig.from_toml(f"[support]\nkind = {kind}")


@pytest.mark.parametrize("value", ["1" * 400, "1" * 5000, "[" * 5000, "nan"])
def test_a_value_that_no_float_holds_is_refused(value):
    with pytest.raises(BKDError):
        BKDConfig.from_toml(f"[training]\nlearning_rate = {value}")
