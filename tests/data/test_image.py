import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from bkd_fast.data.image import (
    ImageError,
    from_pil,
    image_files,
    load_image,
    load_mask,
    resize_image,
    resize_mask,
    to_tensor,
)

HEIGHT, WIDTH = 12, 20


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def grey():
    return np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)


def three(grey):
    return np.repeat(grey[:, :, None], 3, axis=2)


def saved(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "ppm", "PNG", "TIFF"])
def test_rgb_is_read_unchanged(tmp_path, rgb, suffix):
    image = load_image(saved(tmp_path / f"a.{suffix}", rgb))
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, rgb)


@pytest.mark.parametrize(("suffix", "options"), [("webp", {"lossless": True}), ("JPG", {"quality": 100})])
def test_lossy_formats_are_read(tmp_path, suffix, options):
    ramp = np.linspace(20, 230, WIDTH)[None, :, None] * np.ones((HEIGHT, 1, 3))
    image = load_image(saved(tmp_path / f"a.{suffix}", ramp.astype(np.uint8), **options))
    np.testing.assert_allclose(image, ramp, atol=4)


@pytest.mark.parametrize("suffix", ["png", "pgm", "gif"])
def test_grey_is_repeated_on_three_channels(tmp_path, grey, suffix):
    np.testing.assert_array_equal(load_image(saved(tmp_path / f"a.{suffix}", grey)), three(grey))


def test_transparency_is_laid_over_white(tmp_path, rgb):
    alpha = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    alpha[:, : WIDTH // 2] = 255
    alpha[0, -1] = 128
    image = load_image(saved(tmp_path / "a.png", np.concatenate([rgb, alpha], axis=2)))
    np.testing.assert_array_equal(image[:, : WIDTH // 2], rgb[:, : WIDTH // 2])
    assert (image[1:, WIDTH // 2 :] == 255).all()
    half = 255 + (rgb[0, -1].astype(float) - 255) * 128 / 255
    np.testing.assert_allclose(image[0, -1], half, atol=1)


def test_grey_with_alpha_is_laid_over_white(tmp_path, grey):
    alpha = np.zeros_like(grey)
    alpha[:, : WIDTH // 2] = 255
    image = load_image(saved(tmp_path / "a.png", Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])))
    np.testing.assert_array_equal(image[:, : WIDTH // 2], three(grey)[:, : WIDTH // 2])
    assert (image[:, WIDTH // 2 :] == 255).all()


def palette_image():
    indices = np.random.default_rng(2).integers(0, 3, (HEIGHT, WIDTH), dtype=np.uint8)
    colours = np.array([[10, 20, 30], [200, 0, 90], [0, 250, 40]], np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colours.tobytes())
    image.putdata(indices.ravel().tolist())
    return image, indices, colours


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp"])
def test_palette_gives_its_colours(tmp_path, suffix):
    image, indices, colours = palette_image()
    np.testing.assert_array_equal(load_image(saved(tmp_path / f"a.{suffix}", image)), colours[indices])


def test_transparent_palette_entry_is_white(tmp_path):
    image, indices, colours = palette_image()
    colours[1] = 255
    np.testing.assert_array_equal(load_image(saved(tmp_path / "a.png", image, transparency=1)), colours[indices])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_the_upper_byte(tmp_path, suffix):
    values = np.random.default_rng(3).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    values[0, :2] = 0, 65535
    np.testing.assert_array_equal(
        load_image(saved(tmp_path / f"a.{suffix}", values)), three((values >> 8).astype(np.uint8))
    )


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_tiff_is_read_in_either_range(tmp_path, top):
    values = np.linspace(0, top, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    image = load_image(saved(tmp_path / "a.tiff", values))
    np.testing.assert_allclose(image, three(values * 255 / top), atol=1)


def test_float_tiff_with_missing_values_is_read(tmp_path):
    values = np.full((HEIGHT, WIDTH), 0.5, np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    image = load_image(saved(tmp_path / "a.tiff", values))
    assert image[0, :3, 0].tolist() == [0, 255, 0]


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    colour = Image.new("RGB", (WIDTH, HEIGHT), (200, 60, 30))
    path = saved(tmp_path / "a.jpg", colour.convert("CMYK"), quality=100)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    np.testing.assert_allclose(load_image(path).reshape(-1, 3).mean(0), [200, 60, 30], atol=6)


def test_one_bit_image_is_black_and_white(tmp_path, grey):
    bits = grey > 127
    np.testing.assert_array_equal(load_image(saved(tmp_path / "a.png", bits)), three(bits * np.uint8(255)))


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
@pytest.mark.parametrize(("orientation", "turns"), [(6, -1), (3, 2), (8, 1)])
def test_exif_orientation_turns_the_image(tmp_path, suffix, orientation, turns):
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:8, :16] = 255  # one bright corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(picture), exif=exif))
    expected = np.rot90(picture, turns)
    assert image.shape == expected.shape
    np.testing.assert_allclose(image.astype(int), expected, atol=12)


def test_from_pil_does_not_change_its_argument(rgb):
    image = Image.fromarray(rgb)
    array = from_pil(image)
    array[:] = 0
    np.testing.assert_array_equal(np.asarray(image), rgb)


def test_names_with_spaces_and_unicode_are_read(tmp_path, rgb):
    folder = tmp_path / "gute Teile – 良品"
    folder.mkdir()
    np.testing.assert_array_equal(load_image(saved(folder / "Prüfling nº 1.png", rgb)), rgb)


def test_empty_file_is_named(tmp_path):
    path = tmp_path / "nothing.png"
    path.touch()
    with pytest.raises(ImageError, match=r"nothing\.png is empty \(0 bytes\)"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "gif", "webp", "ppm"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.4, 0.6, 0.9])
def test_truncated_file_is_named(tmp_path, suffix, share):
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"cut.{suffix}", noise)
    content = path.read_bytes()
    path.write_bytes(content[: max(1, int(share * len(content)))])
    with pytest.raises(ImageError, match=rf"cut\.{suffix}"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "gif", "webp", "ppm"])
def test_damaged_file_is_read_or_named_but_never_another_error(tmp_path, suffix):
    random = np.random.default_rng(5)
    content = saved(tmp_path / f"a.{suffix}", random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).read_bytes()
    path, failed = tmp_path / f"damaged.{suffix}", []
    for _ in range(60):
        damaged = bytearray(content)
        for place in random.integers(0, min(len(content), 200), 6):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert load_image(path).ndim == 3
            except ImageError as error:
                failed.append(str(error))
    assert failed
    assert all(str(path) in message for message in failed)


def test_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no image at all")
    with pytest.raises(ImageError, match=r"notes\.png is not an image"):
        load_image(path)


@pytest.mark.parametrize("load", [load_image, load_mask])
def test_missing_file_is_named(tmp_path, load):
    with pytest.raises(ImageError, match=r"gone\.png"):
        load(tmp_path / "gone.png")


def test_folder_instead_of_a_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=str(tmp_path)):
        load_image(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [HEIGHT * WIDTH // 3, HEIGHT * WIDTH - 1], ids=["over twice", "just over"])
def test_image_above_the_pixel_limit_is_refused(tmp_path, rgb, monkeypatch, limit):
    path = saved(tmp_path / "huge.png", rgb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=r"huge\.png has more pixels than is safe.*MAX_IMAGE_PIXELS"):
        load_image(path)


@pytest.mark.parametrize("limit", [HEIGHT * WIDTH, None])
def test_image_within_the_pixel_limit_is_read(tmp_path, rgb, monkeypatch, limit):
    path = saved(tmp_path / "large.png", rgb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    np.testing.assert_array_equal(load_image(path), rgb)


def test_loading_leaves_the_warning_filters_of_other_threads_alone(tmp_path, rgb, monkeypatch):
    path, before, seen = saved(tmp_path / "a.png", rgb), list(warnings.filters), []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: (seen.append(list(warnings.filters)), load(image))[1])
    load_image(path)
    assert seen
    assert all(filters == before for filters in seen)


@pytest.mark.parametrize("size", [(24, 24), (64, 40), (7, 9), (12, 50), (30, 20)])
def test_to_tensor_equals_torchvision(rgb, size):
    tensor = to_tensor(rgb, size)
    reference = torch.from_numpy(rgb).permute(2, 0, 1).float() / 255
    assert tensor.shape == (3, *size)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, TF.resize(reference, list(size), antialias=True), atol=1e-5, rtol=0)


def test_to_tensor_at_the_same_size_is_exact(rgb):
    tensor = to_tensor(rgb, (HEIGHT, WIDTH))
    assert torch.equal(tensor, torch.from_numpy(rgb).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (33, 17)])
def test_resize_image_is_to_tensor_in_eight_bits(rgb, size):
    image = resize_image(rgb, size)
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image.transpose(2, 0, 1) / 255, to_tensor(rgb, size), atol=0.5001 / 255)


def test_resize_mask_is_nearest():
    mask = np.random.default_rng(6).random((6, 10)) > 0.5
    np.testing.assert_array_equal(resize_mask(mask, (12, 30)), mask.repeat(2, axis=0).repeat(3, axis=1))
    np.testing.assert_array_equal(resize_mask(mask.repeat(3, axis=0), (6, 10)), mask)
    assert resize_mask(mask, (4, 7)).dtype == bool
    np.testing.assert_array_equal(resize_mask(mask, (6, 10)), mask)


@pytest.mark.parametrize("top", [1, 255])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16"])
def test_mask_is_true_above_zero(tmp_path, grey, mode, top):
    mask = grey > 127
    values = mask.astype(np.uint8) * np.uint8(top)
    image = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else Image.fromarray(values).convert(mode)
    loaded = load_mask(saved(tmp_path / "mask.png", image))
    assert loaded.dtype == bool
    np.testing.assert_array_equal(loaded, mask)


def test_mask_of_one_channel_of_three_counts(tmp_path, grey):
    mask = grey > 127
    values = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    values[..., 2] = mask * 200
    np.testing.assert_array_equal(load_mask(saved(tmp_path / "mask.png", values)), mask)


def test_one_bit_mask_is_itself(tmp_path, grey):
    mask = grey > 127
    np.testing.assert_array_equal(load_mask(saved(tmp_path / "mask.png", mask)), mask)


def test_palette_mask_counts_colours_not_indices(tmp_path, grey):
    mask = grey > 127
    image = Image.fromarray(np.uint8(~mask)).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])  # entry 0 is white
    image.putdata(np.uint8(~mask).ravel().tolist())
    np.testing.assert_array_equal(load_mask(saved(tmp_path / "mask.png", image)), mask)


def test_image_files_are_images_only_in_order(tmp_path, rgb):
    names = ["b.png", "A.JPG", "sub/c.tiff", "sub dir/ü 1.bmp", "a.10.png"]
    others = ["Thumbs.db", ".DS_Store", "notes.txt", ".hidden.png", ".cache/x.png", "sub/.trash/y.png", "png"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert image_files(tmp_path) == sorted(tmp_path / name for name in names)


def test_image_files_are_found_below_a_hidden_folder_that_is_asked_for(tmp_path):
    folder = tmp_path / ".data"
    folder.mkdir()
    (folder / "a.png").touch()
    assert image_files(folder) == [folder / "a.png"]
