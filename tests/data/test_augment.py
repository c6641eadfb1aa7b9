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
    assert not torch.allclose(first, second, atol=0.05)
    assert not torch.allclose(first, noise(), atol=0.05)


@pytest.mark.parametrize("mode", TABLE_5[1:])
def test_every_image_has_its_own_view(mode):
    image = noise(1)
    first, second = augment(image.repeat(2, 1, 1, 1), mode, seeded())
    assert not torch.allclose(first, second, atol=0.05)


@pytest.mark.parametrize("mode", TABLE_5)
def test_values_are_finite_and_keep_their_range(mode):
    for seed in range(10):
        view = augment(noise(), mode, seeded(seed))
        assert view.shape == noise().shape
        assert view.isfinite().all()
        assert view.min() >= 0
        assert view.max() <= 1
    assert torch.allclose(augment(torch.ones(2, 3, 40, 56), mode, seeded()), torch.ones(1))  # no dark corners


@pytest.mark.parametrize("mode", TABLE_5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(mode, dtype):
    assert augment(noise(dtype=dtype), mode, seeded()).dtype == dtype


def test_images_are_not_changed_in_place():
    images = noise()
    augment(images, "affine", seeded())
    assert torch.equal(images, noise())


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
def test_rotation_alone_turns_rigidly_about_the_centre(seed):
    matrix = sampling("rotation", seed)
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


@pytest.mark.parametrize("mode", ["rotation", "rotation_scale"])
def test_centre_region_stays_at_the_centre(mode):
    images = torch.zeros(1, 3, 65, 97)
    images[..., 28:37, 44:53] = 1  # 9 x 9 about the middle pixel
    for seed in range(4):
        assert augment(images, mode, seeded(seed))[..., 30:35, 46:51].min() > 0.999


@pytest.mark.parametrize(("height", "width"), [(96, 192), (192, 96)])
@pytest.mark.parametrize("seed", range(4))
def test_disc_stays_a_disc_in_images_that_are_not_square(seed, height, width):
    x, y, _ = coordinates(height, width)[0]
    # Off the centre, so that a turn moves it; with a soft rim, so that sampling does not change its moments.
    disc = torch.sigmoid(14 - torch.hypot(x - 8, y + 5))
    turned = augment(disc.expand(1, 3, -1, -1), "rotation", seeded(seed))[0, 0]
    turned = turned * (torch.hypot(x, y) < 40)  # farther out, mirrored borders may show it again
    mass = turned.sum()
    right, down = x - (turned * x).sum() / mass, y - (turned * y).sum() / mass
    across, along = (turned * right**2).sum() / mass, (turned * down**2).sum() / mass
    assert (across / along).item() == pytest.approx(1, abs=0.005)
    assert ((turned * right * down).sum() / mass / across).item() == pytest.approx(0, abs=0.005)
    assert mass.item() == pytest.approx(disc.sum().item(), rel=0.005)
