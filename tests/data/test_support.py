import numpy as np
import pytest
import torch
from PIL import Image

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


def test_saving_replaces_the_folder_whole(tmp_path):
    folder = tmp_path / "support"
    save_support(folder, pictures(4))
    (folder / "stale.png").write_bytes(b"")
    images = pictures(2, seed=1)
    save_support(folder, images)
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", "001.png"]
    assert torch.equal(load_support(folder, (10, 14)), as_tensor(images))
    assert list(tmp_path.iterdir()) == [folder]


def test_failed_write_keeps_the_old_images_and_leaves_nothing_behind(tmp_path, monkeypatch):
    folder, images = tmp_path / "support", pictures(3)
    save_support(folder, images)
    save, written = Image.Image.save, []

    def full_disk(image, path, *args, **kwargs):
        if written:
            raise OSError("no space left on device")
        written.append(path)
        save(image, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_support(folder, pictures(3, seed=1))
    assert written
    assert list(tmp_path.iterdir()) == [folder]
    assert torch.equal(load_support(folder, (10, 14)), as_tensor(images))


@pytest.mark.parametrize("exists", [True, False])
def test_folder_without_images_is_named(tmp_path, exists):
    folder = tmp_path / "support"
    if exists:
        folder.mkdir()
    with pytest.raises(BKDError, match=r"no support images in .*support: the run is incomplete"):
        load_support(folder, (8, 8))
