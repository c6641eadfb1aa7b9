import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from bkd_fast.config import GROUPS, PRESETS, BKDConfig
from bkd_fast.errors import BKDError
from bkd_fast.model import BKD


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = BKDConfig.preset(name)
    assert BKDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_paper_preset_is_the_paper():
    paper = BKDConfig.preset("paper")
    memory, alignment, training = paper.memory, paper.alignment, paper.training
    assert (memory.items, memory.threshold / memory.items, memory.temperature) == (200, 0.002, 1.0)
    assert (alignment.activation, alignment.cascade, paper.anomaly_map.fusion) == ("softmax", "product", "product")
    assert (training.learning_rate, training.betas) == (0.005, (0.5, 0.999))
    assert (training.epochs, training.batch_size) == (200, 16)
    assert not alignment.modulated


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
    for preset, changes, learned in (
        ("default", {}, ()),
        ("default", {"alignment.kernel": "full"}, ("forward",)),
        ("default", {"memory.learned": True}, ("reverse",)),
        ("paper", {}, ("forward", "reverse")),
        ("rd4ad", {}, ("reverse",)),
    ):
        config = BKDConfig.preset(preset, {"teacher.name": "test_resnet", "teacher.weights": "none", **changes})
        assert BKD(config, weights=None).learned_branches() == learned


OPTIONS = [(kind, each) for kinds in GROUPS.values() for kind in kinds for each in fields(kind)]


@pytest.mark.parametrize(("kind", "each"), OPTIONS, ids=lambda value: getattr(value, "name", ""))
def test_every_option_takes_numpy_and_refuses_what_is_no_value(kind, each):
    default, name = each.default, f"{kind.group}.{each.name}"
    scalars = {bool: np.bool_, int: np.int64, float: np.float64, str: np.str_}
    if default is not None and not isinstance(default, tuple):
        given = kind(**{each.name: scalars[type(default)](default)})
        assert type(getattr(given, each.name)) is type(default)
        assert given == kind()
    for wrong in (math.nan, math.inf, -math.inf, 10**400, 1j, [], {}, np.zeros(3), b"x", object()):
        with pytest.raises(BKDError, match=name.replace(".", r"\.")):
            kind(**{each.name: wrong})


def test_sizes_and_paths_come_as_programs_have_them():
    given = BKDConfig().with_changes({"teacher.image_size": np.array([64, 96]), "teacher.weights": Path("w.pth")})
    assert given.teacher.image_size == (64, 96)
    assert given.teacher.weights == "w.pth"
    assert BKDConfig.from_toml(given.to_toml()) == given


JUNK = [2.5, math.nan, "x", b"x", [], [1, 2], {"a": 1}, {1: 2}, np.zeros(2), np.array([None, 1]), object(), range(2)]


@pytest.mark.parametrize("junk", JUNK, ids=lambda value: repr(value)[:12])
def test_nonsense_in_place_of_a_part_or_all_is_an_error(junk):
    calls = [BKDConfig, lambda junk: BKDConfig().with_changes({"memory": {"items": junk}})]
    calls += [lambda junk, name=name: BKDConfig().with_changes({name: junk}) for name in GROUPS]
    calls += [BKDConfig.preset, BKDConfig.from_dict, BKDConfig.from_toml]
    for call in calls:
        with pytest.raises(BKDError):
            call(junk)


@pytest.mark.parametrize("kind", ["['sampled']", "1", '"drawn"'])
def test_a_kind_that_there_is_not_is_refused_whatever_its_type(kind):
    with pytest.raises(BKDError, match=r"support\.kind is"):
        BKDConfig.from_toml(f"[support]\nkind = {kind}")


@pytest.mark.parametrize("value", ["1" * 400, "1" * 5000, "[" * 5000, "nan"])
def test_a_value_that_no_float_holds_is_refused(value):
    with pytest.raises(BKDError):
        BKDConfig.from_toml(f"[training]\nlearning_rate = {value}")
