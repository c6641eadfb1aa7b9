"""Scores of normal images: each compared with the others alone, as an image that is not among them would be."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from bkd_fast.config import BKDConfig
from bkd_fast.model import BKD
from bkd_fast.model.calibration import calibrate
from bkd_fast.model.memory import SparseMemory
from bkd_fast.model.support import describe
from bkd_fast.normals.thresholds import can_leave_out, measure_normals, near_duplicates

SMALL = {"teacher.name": "test_resnet", "teacher.weights": "none", "teacher.image_size": (64, 64), "memory.items": 60}


class Images:
    """Normal images in memory; ``tiles`` after each other are of one image."""

    def __init__(self, model: BKD, images: torch.Tensor, tiles: int = 1) -> None:
        self.model, self.images = model, images
        self.image_of = [index // tiles for index in range(len(images))]

    def __len__(self) -> int:
        return len(self.images)

    def levels(self, indices):
        return self.model.teacher(self.images[list(indices)])


def parts(count: int, seed: int) -> torch.Tensor:
    """Blots, so that images differ as a whole."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=(64, 64), mode="bilinear")


def trained(images: torch.Tensor, changes=None) -> BKD:
    torch.manual_seed(0)
    model = BKD(BKDConfig().with_changes(SMALL).with_changes(changes), weights=None).eval()
    calibrate(model, [model.teacher.raw(images)], len(images), torch.Generator().manual_seed(0))
    return model


def measure(model: BKD, images: torch.Tensor, validation: torch.Tensor, pool: list[int], tiles: int = 1):
    support = images[pool] if model.config.retrieves else images[:2]
    prepared = model.make_support(model.support_levels(support))
    return measure_normals(model, prepared, Images(model, images, tiles), Images(model, validation, tiles), pool)


def without(model: BKD, images: torch.Tensor, pool: list[int], hidden: set[int]):
    """A model and a support that never had some images."""
    lacking = copy.deepcopy(model)
    if model.config.reverse_branch:
        (memory,) = model.memories
        kept = torch.tensor([int(origin) not in hidden for origin in memory.origin])
        items = memory.items[kept]
        lacking.memories[0] = SparseMemory(items.shape[1], replace(model.config.memory, items=len(items)))
        lacking.memories[0].items.data.copy_(items)
    left = [position for position, index in enumerate(pool) if index not in hidden]
    support = images[[pool[position] for position in left]]
    if model.config.retrieves:
        lacking.support_excess[: len(left)] = model.support_excess[left]
    with torch.no_grad():
        return lacking, lacking.make_support(lacking.support_levels(support), own=True)


def scored_without(
    model: BKD, images: torch.Tensor, pool: list[int], hidden: set[int], row: int
) -> tuple[float, float]:
    """Score and largest pixel of an image from a model that never had some images."""
    lacking, support = without(model, images, pool, hidden)
    with torch.no_grad():
        score, found = lacking.predict(images[row : row + 1], support)
    return float(score), float(found.max())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory": None, "student": None},
        {"support": None},
        {"support.aggregation": "min"},
        {"anomaly_map.image_weight": 0.0},
    ],
)
def test_a_training_image_is_scored_as_by_a_model_without_it(changes):
    images, pool = parts(9, 0), [0, 1, 2, 4, 5, 7, 8]
    model = trained(images, changes)
    measured = measure(model, images, parts(3, 1), pool)
    assert measured.scores.source == "leave-one-out"
    assert measured.duplicates == 0
    assert len(measured.scores.scores) == len(measured.scores.maxima) == 3 + 9
    with torch.no_grad():
        prepared = model.make_support(model.support_levels(images[pool]), own=True)
        itself = model.predict(images, prepared)[0].tolist()
    for row in range(9):
        score, largest = scored_without(model, images, pool, {row}, row)
        assert measured.scores.scores[3 + row] == pytest.approx(score, rel=1e-3, abs=1e-3)
        assert measured.scores.maxima[3 + row] == pytest.approx(largest, rel=1e-3)
    assert np.mean(itself) < np.mean(measured.scores.scores[3:])


@pytest.mark.parametrize("relative", [0.0, 0.5, 1.0])
def test_scores_are_relative_to_those_of_the_supports(relative):
    """What the supports score without themselves, and half of it, or all, or nothing, off the score of a new image."""
    images, pool = parts(9, 0), [0, 1, 2, 4, 5, 7, 8]
    model = trained(images, {"support.shots": 2, "anomaly_map.relative": relative})
    measure(model, images, parts(3, 1), pool)
    model.score_scale = {"map": [0.0, 1.0], "image": [0.0, 1.0]}

    @torch.no_grad()
    def logarithms(lacking, support, image):
        result = lacking.distill(lacking.teacher(image), support)
        top = lacking.top_mean(lacking.anomaly_map(result, (64, 64)))
        return torch.stack([top, result.image], 1).log()

    alone = [logarithms(*without(model, images, pool, {row}), images[row : row + 1]) for row in range(9)]
    support = model.make_support(model.support_levels(images[pool]), own=True)
    held = logarithms(model, support, parts(3, 1))
    mean = torch.cat([held, *alone]).mean(0)
    excess = torch.cat([alone[row] for row in pool]) - mean
    torch.testing.assert_close(model.support_excess[: len(pool)], excess, rtol=1e-3, atol=1e-3)
    assert not model.support_excess[len(pool) :].any()
    descriptors = [describe(model.teacher(each)[-1]) for each in (images[pool], parts(1, 5))]
    nearest = torch.cdist(*descriptors[::-1]).topk(2, largest=False).indices[0]
    new = logarithms(model, support, parts(1, 5))[0] - relative * excess[nearest].mean(0)
    expected = torch.logaddexp(new[0], new[1] + np.log(0.15))
    assert float(model.predict(parts(1, 5), support)[0]) == pytest.approx(float(expected), rel=2e-3, abs=2e-3)


def test_near_duplicates_are_hidden_from_each_other():
    images = parts(9, 0)
    images[3] = (images[1] + 0.002 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    pool = list(range(9))
    model = trained(images)
    measured = measure(model, images, parts(3, 1), pool)
    assert measured.duplicates == 2
    for row, hidden in ((0, {0}), (1, {1, 3}), (3, {1, 3})):
        score, largest = scored_without(model, images, pool, hidden, row)
        assert measured.scores.scores[3 + row] == pytest.approx(score, rel=1e-3, abs=1e-3)
        assert measured.scores.maxima[3 + row] == pytest.approx(largest, rel=1e-3)
    # Compared with its twin it would be no anomaly at all.
    assert scored_without(model, images, pool, {1}, 1)[0] < measured.scores.scores[3 + 1] - 1


def test_tiles_are_scored_without_those_of_their_image_whose_score_is_of_all():
    images, validation, pool = parts(9, 0), parts(6, 1), list(range(9))
    model = trained(images)
    measured = measure(model, images, validation, pool, tiles=3)
    assert measured.duplicates == 0
    assert len(measured.scores.scores) == len(measured.scores.maxima) == 2 + 3
    for image in range(3):
        tiles = range(3 * image, 3 * image + 3)
        scored = [scored_without(model, images, pool, set(tiles), row) for row in tiles]
        scores, maxima = zip(*scored, strict=True)
        assert measured.scores.scores[2 + image] == pytest.approx(np.logaddexp.reduce(scores), rel=1e-3, abs=1e-3)
        assert measured.scores.maxima[2 + image] == pytest.approx(max(maxima), rel=1e-3)


def test_images_of_one_part_are_those_much_closer_than_others():
    descriptors = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    descriptors[7] = descriptors[2] + 0.01
    descriptors[11] = descriptors[2] - 0.01
    found = near_duplicates(descriptors)
    assert torch.equal(found, found.T)
    expected = torch.eye(20, dtype=torch.bool)
    rows = torch.tensor([2, 7, 11])
    expected[rows.unsqueeze(1), rows] = True
    assert torch.equal(found, expected)
    # Of two images nothing says how far apart others are.
    assert torch.equal(near_duplicates(descriptors[[2, 7]]), torch.eye(2, dtype=torch.bool))
    # All the same: nothing is closer than the rest.
    assert torch.equal(near_duplicates(descriptors[:1].expand(5, -1)), torch.eye(5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("changes", "can"),
    [
        ({}, True),
        ({"memory": None, "student": None}, True),
        ({"support": None}, True),
        ({"alignment.kernel": "full"}, True),
        (
            {"support": "sampled", "support.per": "step", "support.aggregation": "mean"},
            False,
        ),  # which images are the support is for all
        ({"memory.learned": True}, False),  # an item is no image's any more
        ({"memory.read": "attention"}, False),
        ({"teacher.levels": "separate"}, False),  # three memories
        ({"teacher.levels": "separate", "memory": None, "student": None}, True),
        ({"teacher.levels": "separate", "student": "on"}, False),
    ],
)
def test_what_can_be_left_out(changes, can):
    model = trained(parts(4, 0), changes)
    assert can_leave_out(model) is can
    pool = list(range(4)) if model.config.retrieves else []
    measured = measure(model, parts(4, 0), parts(3, 1), pool)
    assert measured.scores.source == ("leave-one-out" if can else "validation")
    assert len(measured.scores.scores) == (7 if can else 3)


def test_scales_are_those_of_the_normals():
    images, validation = parts(6, 0), parts(3, 1)
    model = trained(images)
    measured = measure(model, images, validation, list(range(6)))
    with torch.no_grad():
        prepared = model.make_support(model.support_levels(images))
        result = model.distill(model.teacher(validation), prepared)
        for branch, maps in model.level_maps(result, (64, 64)).items():
            assert model.map_scale[branch] == pytest.approx([float(level.mean()) for level in maps], rel=1e-3)
        medians = model.anomaly_map(result, (64, 64)).flatten(1).median(1).values
    assert medians.min() * 0.5 < measured.normal_level < medians.max() * 2
    # Each part of the score has mean zero and std one over the normals that it was measured on.
    scores = {}
    for name in ("map", "image"):
        alone = copy.deepcopy(model)
        original = alone.score_of

        def score_of(top, image, expected, name=name, original=original):
            if name == "map":
                return original((top.log() - expected[:, 0]).exp(), None)
            return image.log() - expected[:, 1]

        alone.score_of = score_of
        scores[name] = torch.tensor(measure(alone, images, validation, list(range(6))).scores.scores)
        assert alone.score_scale == model.score_scale
    assert float(scores["map"].mean()) == pytest.approx(0, abs=1e-3)
    assert float(scores["map"].std(unbiased=False)) == pytest.approx(1, rel=1e-3)
    assert float(scores["image"].mean()) == pytest.approx(model.score_scale["image"][0], rel=1e-3)
    assert float(scores["image"].std(unbiased=False)) == pytest.approx(model.score_scale["image"][1], rel=1e-3)


def test_an_image_that_nothing_is_left_for_is_not_scored():
    """One training image, whose features are all the items; and items of which all but a few are one image's."""
    images, validation = parts(1, 0), parts(3, 1)
    model = trained(images, {"support": None})
    assert measure(model, images, validation, []).scores.source == "validation"
    images = parts(4, 0)
    model = trained(images, {"support": None, "memory.items": 20})
    model.memories[0].origin[:] = torch.tensor([0] * 17 + [1, 2, 3])
    measured = measure(model, images, validation, [])
    assert len(measured.scores.scores) == 3 + 3  # without the first one's there are three, and five are read
