from typing import get_args

import numpy as np
import pytest
import torch
from scipy import ndimage

from bkd_fast.config import Augmentation
from bkd_fast.data.augment import ROTATION, SCALE, TRANSLATION, augment

TABLE_5 = get_args(Augmentation)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count=2, height=40, width=56, dtype=torch.float32):
    return torch.rand(count, 3, height, width, generator=seeded(7)).to(dtype)


def coordinates(height, width):
    """(1, 3, H, W) in pixels from the centre: x, y and one. Warping it shows where each pixel was taken from."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])[None].double()


def sampling(mode, seed, height=64, width=96):
    """The affine map from an output pixel to where it was read, (2, 3), fitted in the middle of the image."""
    points = coordinates(height, width)
    taken = augment(points, mode, seeded(seed))
    middle = (0, slice(None), slice(height // 4, -height // 4), slice(width // 4, -width // 4))
    inputs, outputs = points[middle].reshape(3, -1).T, taken[middle][:2].reshape(2, -1).T
    fit = torch.linalg.lstsq(inputs, outputs)
    torch.testing.assert_close(inputs @ fit.solution, outputs, atol=1e-6, rtol=0)
    return fit.solution.T


def test_none_is_identity():
    images = noise()
    assert torch.equal(augment(images, "none", seeded()), images)


@pytest.mark.parametrize("mode", TABLE_5[1:])
def test_view_is_the_same_for_a_generator_state_and_new_for_the_next(mode):
    generator = seeded(3)
    first, second = augment(noise(), mode, generator), augment(noise(), mode, generator)
    assert torch.equal(augment(noise(), mode, seeded(3)), first)
    own = augment(noise(1).repeat(2, 1, 1, 1), mode, seeded())  # every image has its own view
    assert not torch.allclose(*own, atol=0.05)
    assert not torch.allclose(first, second, atol=0.05)
    assert not torch.allclose(first, noise(), atol=0.05)


@pytest.mark.parametrize("mode", TABLE_5)
def test_values_are_finite_and_keep_their_range_and_type(mode):
    for seed in range(10):
        images = noise(dtype=torch.float64 if seed % 2 else torch.float32)
        before = images.clone()
        view = augment(images, mode, seeded(seed))
        assert torch.equal(images, before)
        assert mode != "none" or torch.equal(view, images)
        assert (view.shape, view.dtype) == (images.shape, images.dtype)
        assert view.isfinite().all()
        assert view.min() >= 0
        assert view.max() <= 1
    assert torch.allclose(augment(torch.ones(2, 3, 40, 56), mode, seeded()), torch.ones(1))  # no dark corners


@pytest.mark.parametrize("seed", range(4))
def test_translation_alone_is_a_pure_shift(seed):
    height, width = 64, 96
    matrix = sampling("translation", seed, height, width)
    torch.testing.assert_close(matrix[:, :2], torch.eye(2).double(), atol=1e-6, rtol=0)
    right, down = matrix[:, 2].tolist()
    assert 0 < abs(right) <= TRANSLATION * width
    assert 0 < abs(down) <= TRANSLATION * height
    images = noise(1, height, width, torch.float64)
    shifted = ndimage.shift(images[0].numpy(), (0, -down, -right), order=1, mode="mirror")
    inner = (slice(None), slice(12, -12), slice(12, -12))
    np.testing.assert_allclose(
        augment(images, "translation", seeded(seed))[0].numpy()[inner], shifted[inner], atol=1e-6
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
def test_rotation_alone_turns_rigidly_about_the_centre(seed, size):
    """Whatever the image's aspect: a disc stays a disc."""
    matrix = sampling("rotation", seed, *size)
    turn = matrix[:, :2]
    torch.testing.assert_close(turn @ turn.T, torch.eye(2).double(), atol=1e-6, rtol=0)
    assert torch.linalg.det(turn) > 0
    assert 0 < torch.atan2(turn[1, 0].abs(), turn[0, 0]).rad2deg() <= ROTATION
    torch.testing.assert_close(matrix[:, 2], torch.zeros(2).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_scale_alone_keeps_the_centre(seed):
    matrix = sampling("scale", seed)
    factor = 1 / matrix[0, 0]
    assert 0 < abs(factor - 1) <= SCALE + 1e-9
    torch.testing.assert_close(matrix, torch.tensor([[1.0, 0, 0], [0, 1, 0]]).double() / factor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_shear_alone_keeps_the_centre_and_slants_both_axes(seed):
    matrix = sampling("shear", seed)
    torch.testing.assert_close(matrix[:, 2], torch.zeros(2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix[[0, 1], [0, 1]], torch.ones(2).double(), atol=1e-6, rtol=0)
    assert (matrix[[0, 1], [1, 0]].abs() > 0).all()


def test_combined_modes_draw_each_kind_from_its_own_stream():
    turn, shift = sampling("rotation", 1), sampling("translation", 1)
    both = sampling("translation_rotation", 1)
    torch.testing.assert_close(both[:, :2], turn[:, :2], atol=1e-6, rtol=0)
    torch.testing.assert_close(both[:, 2], shift[:, 2], atol=1e-6, rtol=0)
