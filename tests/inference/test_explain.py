"""What is shown of the inside of a model is what the model computes."""

import numpy as np
import pytest

from bkd_fast.data import load_image
from bkd_fast.data.inputs import Decoded
from bkd_fast.evaluation.report import render_inside
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.explain import explain
from bkd_fast.training.train import train

STUDENT = {"memory": None, "student": "on", "student.correction": False, "teacher.levels": "separate"}


@pytest.fixture
def detector(any_run):
    return Detector.load(any_run, device="cpu")


@pytest.fixture(scope="module")
def image(tiny_data):
    return load_image(next((tiny_data / "test" / "hole").iterdir()))


def test_every_part_has_its_views(detector, image):
    """The joint one has the stride of the level in the middle."""
    found, joint = explain(detector, image), detector.config.teacher.levels == "joint"
    strides = [4, 8] if joint else [4, 8, 16]
    remembered = [8] if joint else [4, 8, 16]
    assert {branch: list(levels) for branch, levels in found.distances.items()} == {
        "forward": strides,
        "reverse": remembered,
    }
    assert list(found.aligned) == list(found.unaligned) == strides
    aligns = detector.config.alignment is not None
    assert list(found.offsets) == (strides if aligns else [])
    assert {stride: kept.shape for stride, kept in found.kept.items()} == {
        stride: (64 // stride, 64 // stride) for stride in remembered
    }
    assert not aligns or found.offsets[8].shape == (2, 8, 8)
    for stride in remembered:
        assert found.strongest[stride].min() >= 0
        assert 0 < found.weight[stride].max() <= 1.5
        if detector.config.memory.read == "neighbors":
            assert (found.kept[stride] == detector.config.memory.neighbors).all()
        else:
            assert found.kept[stride].max() <= detector.config.memory.items


def test_a_detector_is_at_its_distances(detector, image):
    """What is shown of the support is the squared distance that the branch's map is made of, before smoothing."""
    found = explain(detector, image)
    result = detector.distill(Decoded(image).fitted(detector.config.teacher.size).unsqueeze(0))
    for index, stride in enumerate(found.aligned):
        expected = (result.teacher[index] - result.aligned[index]).square().mean(1)[0]
        np.testing.assert_allclose(found.aligned[stride], expected.numpy(), rtol=1e-5)
        if detector.config.alignment is None:
            np.testing.assert_array_equal(found.unaligned[stride], found.aligned[stride])


def test_the_map_is_what_the_distances_say_together(detector, image):
    """But for what is raised before it is enlarged and smoothed after: about their geometric mean."""
    model = detector.model
    found = explain(detector, image)
    # Branches count the same, and of joint views the finer one half of the other.
    means = []
    for branch in model.branches():
        levels = [np.log(level) for level in found.distances[branch].values()]
        halved = model.config.teacher.levels == "joint" and len(levels) == 2
        means.append(np.average(levels, axis=0, weights=[0.5, 1] if halved else None))
    mean = np.mean(means, axis=0)
    result = detector.distill(Decoded(image).fitted(detector.config.teacher.size).unsqueeze(0))
    fused = np.log(detector.score_features(result)[1][0].numpy())
    assert np.corrcoef(mean.ravel(), fused.ravel())[0, 1] > 0.95
    assert abs(mean.mean() - fused.mean()) < 0.2


def test_without_learning_alignment_changes_nothing(tiny_data, tiny_config, tmp_path, image):
    """Offsets start from zero and the kernel from a copy."""
    run = train(
        tiny_data, tmp_path / "run", tiny_config.with_changes({"training.epochs": 1, "training.learning_rate": 0.0})
    )
    found = explain(Detector.load(run, device="cpu"), image)
    for stride in (4, 8):
        assert found.unaligned[stride].max() > 0.1
        np.testing.assert_allclose(found.aligned[stride], found.unaligned[stride], atol=1e-4)
        assert not found.offsets[stride].any()


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"support": None, "alignment": None}, 2),
        ({"memory": None, "student": None}, 2),
        ({**STUDENT, "support": "sampled", "support.per": "step", "support.shots": 2}, 2),
        ({"alignment": None, "support.shots": 2}, 3),
    ],
)
def test_a_row_for_every_part_there_is(tiny_data, tiny_config, tmp_path, image, changes, rows):
    run = train(tiny_data, tmp_path / "run", tiny_config.with_changes({"training.epochs": 1, **changes}))
    picture = render_inside(image, explain(Detector.load(run, device="cpu"), image))
    assert (picture.shape[0] - 24) // rows == round(180 * 72 / 80) + 34
    assert picture.dtype == np.uint8
