import json

import pytest

from bkd_fast.config import PRESETS, BKDConfig
from bkd_fast.errors import BKDError


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
        ({"student": True, "student_output": "relu"}, "needs student_output='linear'"),
        ({"margin": 20}, "multiple of 16"),
        ({"margin": 256}, "below both sides"),
        ({"student": True, "memory_items": 0}, "needs a memory"),
        ({"memory_items": 0}, "needs one of them"),
        ({"support_draw": "step"}, "shot_aggregation='regression' combines the shots that suit a query"),
        ({"support_augmentation": "rotation"}, "supports that are looked up are not augmented"),
        ({"fusion": "product"}, "forward_levels='deep' leaves one out"),
        ({"betas": (0.5, 1.5)}, "betas"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_unusable_values_are_named(changes, words):
    with pytest.raises(BKDError, match=words):
        BKDConfig().with_changes(**changes)


def test_unknown_preset_lists_presets():
    with pytest.raises(BKDError, match="default, paper, rd4ad"):
        BKDConfig.preset("best")
