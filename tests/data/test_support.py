import numpy as np
import pytest
import torch

from bkd_fast.data.support import draw_support, load_support, save_support
from bkd_fast.errors import BKDError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, size=(10, 14), seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(count)]


def as_tensor(images):
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image in images])


def test_draw_reaches_every_image():
    generator = seeded()
    assert {index for _ in range(100) for index in draw_support(8, 2, generator)} == set(range(8))


def test_draw_leaves_out_the_excluded():
    for seed in range(20):
        assert sorted(draw_support(6, 6, seeded(seed))) == list(range(6))  # without replacement
        assert sorted(draw_support(6, 4, seeded(seed), exclude=[1, 4, 4, 77])) == [0, 2, 3, 5]


def test_draw_is_the_same_for_a_generator_state():
    generator = seeded(5)
    first = [draw_support(50, 4, generator) for _ in range(3)]
    generator = seeded(5)
    assert [draw_support(50, 4, generator) for _ in range(3)] == first
    assert first[0] != first[1]


@pytest.mark.parametrize(("count", "exclude", "left"), [(3, (), 3), (5, (0, 2), 3), (0, (), 0)])
def test_too_few_images_names_both_numbers(count, exclude, left):
    with pytest.raises(BKDError, match=rf"^{left} normal image\(s\) to draw 4 support images \(shots\)"):
        draw_support(count, 4, seeded(), exclude)


def test_saved_images_are_loaded_exactly_and_in_order(tmp_path):
    images = pictures(12)
    save_support(tmp_path / "run/support", images)
    loaded = load_support(tmp_path / "run/support", (10, 14))
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, as_tensor(images))


def test_loading_at_another_size_resizes(tmp_path):
    save_support(tmp_path / "support", pictures(2))
    assert load_support(tmp_path / "support", (32, 20)).shape == (2, 3, 32, 20)


@pytest.mark.parametrize("exists", [True, False])
def test_folder_without_images_is_named(tmp_path, exists):
    folder = tmp_path / "support"
    if exists:
        folder.mkdir()
    with pytest.raises(BKDError, match=r"no support images in .*support: the run is incomplete"):
        load_support(folder, (8, 8))
