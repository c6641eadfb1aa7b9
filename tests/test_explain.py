"""What is shown of the inside of a model is what the model computes."""

import numpy as np
import pytest
import torch

from bkd_fast.data import load_image
from bkd_fast.detector import Detector
from bkd_fast.explain import explain
from bkd_fast.inputs import Decoded
from bkd_fast.model.memory import SparseMemory
from bkd_fast.report import render_inside
from bkd_fast.training import train


@pytest.fixture(scope="module")
def detector(tiny_run):
    return Detector.load(tiny_run, device="cpu")


@pytest.fixture(scope="module")
def image(tiny_data):
    return load_image(next((tiny_data / "test" / "hole").iterdir()))


def test_every_part_has_its_levels(detector, image):
    found = explain(detector, image)
    assert {branch: list(levels) for branch, levels in found.distances.items()} == {
        "forward": [8, 16],
        "reverse": [4, 8, 16],
    }
    assert list(found.offsets) == list(found.aligned) == list(found.unaligned) == [8, 16]
    assert {stride: kept.shape for stride, kept in found.kept.items()} == {4: (16, 16), 8: (8, 8), 16: (4, 4)}
    assert found.offsets[8].shape == (2, 8, 8)
    assert all(0 < weight.max() <= 1 for weight in found.weight.values())


def test_the_map_is_what_the_distances_say_together(detector, image):
    """But for what is raised before it is enlarged and smoothed after: about their geometric mean."""
    model = detector.model
    found = explain(detector, image)
    powers = [power for branch in model.branches() for power in model.map_exponent[branch]]
    levels = [level for branch in model.branches() for level in found.distances[branch].values()]
    mean = sum(power * np.log(level) for power, level in zip(powers, levels, strict=True)) / sum(powers)
    result = detector.distill(Decoded(image).fitted(detector.config.image_size).unsqueeze(0))
    fused = np.log(detector.judge(result)[1][0].numpy())
    assert np.corrcoef(mean.ravel(), fused.ravel())[0, 1] > 0.95
    assert abs(mean.mean() - fused.mean()) < 0.2


def test_attention_is_what_the_memory_reads_with(tiny_config):
    torch.manual_seed(0)
    memory = SparseMemory(6, tiny_config)
    features = torch.randn(2, 6, 3, 5)
    weights = memory.attention(features)
    assert weights.shape == (2, 3, 5, 16)
    torch.testing.assert_close((weights @ memory.items).permute(0, 3, 1, 2), memory(features))


def test_without_learning_alignment_changes_nothing(tiny_data, tiny_config, tmp_path, image):
    """Offsets start from zero and the kernel from a copy."""
    run = train(tiny_data, tmp_path / "run", tiny_config.with_changes(epochs=1, learning_rate=0.0))
    found = explain(Detector.load(run, device="cpu"), image)
    for stride in (8, 16):
        assert found.unaligned[stride].max() > 0.1
        np.testing.assert_allclose(found.aligned[stride], found.unaligned[stride], atol=1e-4)
        assert not found.offsets[stride].any()


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"forward_branch": False}, 2),
        ({"reverse_branch": False}, 2),
        (
            {
                "memory_items": 0,
                "student_correction": False,
                "support_draw": "step",
                "shot_aggregation": "mean",
                "shots": 2,
            },
            2,
        ),
        ({"alignment_kernel": "none", "shots": 2}, 3),
    ],
)
def test_a_row_for_every_part_there_is(tiny_data, tiny_config, tmp_path, image, changes, rows):
    run = train(tiny_data, tmp_path / "run", tiny_config.with_changes(epochs=1, **changes))
    picture = render_inside(image, explain(Detector.load(run, device="cpu"), image))
    whole = render_inside(image, explain(Detector.load(run, device="cpu"), image))
    assert np.array_equal(picture, whole)
    assert (picture.shape[0] - 24) // rows == round(180 * 72 / 80) + 34
    assert picture.dtype == np.uint8
