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
    assert (paper.memory_items, paper.memory_threshold, paper.memory_temperature) == (200, 0.002, 1.0)
    assert (paper.offset_activation, paper.cascade, paper.fusion) == ("softmax", "product", "product")
    assert (paper.learning_rate, paper.betas, paper.epochs, paper.batch_size) == (0.005, (0.5, 0.999), 200, 16)
    assert not paper.modulated


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shot": 3}, "did you mean 'shots'"),
        ({"fusion": "max"}, "expected one of 'geometric', 'product', 'sum'"),
        ({"epochs": 0}, "epochs is 0: expected a value from 1"),
        ({"epochs": "many"}, "epochs is 'many': expected a value of type int"),
        ({"epochs": True}, "expected a value of type int"),
        ({"image_size": (256,)}, "image_size is .*expected 2 values"),
        ({"image_size": (16, 256)}, "at least 32 pixels"),
        ({"pool": 2}, "odd number"),
        ({"forward_branch": False, "reverse_branch": False}, "keep at least one"),
        ({"levels": "separate", "student": True, "student_output": "relu"}, "needs student_output='linear'"),
        ({"border": 1.5}, "border is 1.5: expected a value from 0 to 1"),
        ({"match_radius": 9}, "match_radius is 9: expected a value from 0 to 8"),
        ({"match_neighbors": 0}, "match_neighbors is 0: expected a value from 1"),
        ({"memory_neighbors": 0}, "memory_neighbors is 0: expected a value from 1"),
        ({"false_alarms": 0.0}, "false_alarms is 0.0: expected a value from 1e-05 to 0.5"),
        ({"scale": "image"}, "expected one of 'level', 'channel', 'none'"),
        ({"student": True}, "student rebuilds each level by itself: set levels='separate'"),
        ({"student": True, "memory_items": 0}, "needs a memory"),
        ({"memory_items": 0}, "needs one of them"),
        ({"support_draw": "step"}, "shot_aggregation is 'regression' and support_draw 'step': .*drawn ones"),
        ({"shot_aggregation": "mean"}, "shot_aggregation is 'mean' and support_draw 'nearest': .*looked up"),
        ({"support_augmentation": "rotation"}, "supports that are looked up are not augmented"),
        ({"fusion": "product"}, "fusion='product' adds the branches level by level, and with levels='joint'"),
        ({"betas": (0.5, 1.5)}, "betas"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_unusable_values_are_named(changes, words):
    with pytest.raises(BKDError, match=words):
        BKDConfig().with_changes(**changes)


def test_the_default_learns_nothing_and_the_presets_do():
    """Teacher, matching and memory need no gradient; an alignment, items or a student do."""
    small = {"teacher": "resnet18", "weights": "none"}
    assert BKD(BKDConfig(**small)).learned_branches() == ()
    assert BKD(BKDConfig(alignment_kernel="full", **small)).learned_branches() == ("forward",)
    assert BKD(BKDConfig(memory_learned=True, **small)).learned_branches() == ("reverse",)
    assert BKD(BKDConfig.preset("paper", **small)).learned_branches() == ("forward", "reverse")
    assert BKD(BKDConfig.preset("rd4ad", **small)).learned_branches() == ("reverse",)


def test_unknown_preset_lists_presets():
    with pytest.raises(BKDError, match="default, paper, rd4ad"):
        BKDConfig.preset("best")
