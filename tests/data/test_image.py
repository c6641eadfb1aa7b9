import io
import logging
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from bkd_fast.config import DataConfig
from bkd_fast.data import image as module
from bkd_fast.data.image import (
    eight_bits,
    from_array,
    from_pil,
    infer_white,
    load_image,
    load_mask,
    resize_image,
    resize_mask,
    to_tensor,
)
from bkd_fast.data.inputs import Decoded, taken
from bkd_fast.errors import BKDError, ImageError

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
    grey = Image.merge("LA", [Image.fromarray(rgb[..., 0]), Image.fromarray(alpha[..., 0])])
    np.testing.assert_array_equal(
        load_image(saved(tmp_path / "b.png", grey))[1:], np.where(alpha[1:] == 255, rgb[1:, :, :1], 255).repeat(3, 2)
    )


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


@pytest.mark.parametrize("white", [1.0, 255.0, 300.0])
def test_float_tiff_is_read_by_the_runs_white(tmp_path, white):
    values = np.linspace(0, white, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    image = load_image(saved(tmp_path / "a.tiff", values), DataConfig(float_white=white))
    np.testing.assert_array_equal(image, three(np.rint(values.astype(float) * 255 / white).astype(np.uint8)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.01, 200])
def test_floats_that_are_no_intensities_are_refused(tmp_path, value):
    values = np.full((HEIGHT, WIDTH), 0.5, np.float32)
    values[0, 0] = value
    path = saved(tmp_path / "a.tiff", values)
    for read in (load_image, lambda path: from_array(np.asarray(Image.open(path)), name="a.tiff")):
        with pytest.raises(ImageError, match=r"a\.tiff has values outside \[0, 1\] or NaN"):
            read(path)
    with pytest.raises(ImageError, match=r"outside \[0, 1\] or NaN"):
        Decoded(torch.from_numpy(values))


@pytest.fixture
def warned(caplog, monkeypatch):
    """What is said once, in this test."""
    monkeypatch.setattr(module, "_said", set())
    caplog.set_level(logging.WARNING, "bkd_fast")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_integers_are_read_by_the_runs_white(tmp_path, bits):
    """The default is the upper byte of 16 bits."""
    values = np.random.default_rng(0).integers(0, 2**bits, (HEIGHT, WIDTH)).astype(np.uint16)
    values[0, :2] = 0, 2**bits - 1
    config = DataConfig(integer_white=2**bits - 1) if bits < 16 else DataConfig()
    expected = three((values >> (bits - 8)).astype(np.uint8))
    for suffix in ("png", "tif"):
        np.testing.assert_array_equal(load_image(saved(tmp_path / f"a.{suffix}", values), config), expected)
    for dtype in ("<u2", ">u2", np.int16 if bits < 16 else np.uint32, np.int32, np.int64, np.uint64):
        np.testing.assert_array_equal(from_array(values.astype(dtype), config), expected)


@pytest.mark.parametrize("dtype", ["i1", "u2", "i2", "u4", "i4", "u8", "i8"])
def test_integers_of_every_width_are_one_rule(dtype):
    values = np.full((4, 5), 100, dtype)
    for given in (values, torch.from_numpy(values)):
        assert (Decoded(given, DataConfig(integer_white=255)).array() == 100).all()
        assert (Decoded(given, DataConfig(integer_white=1023)).array() == 25).all()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "longdouble", "bfloat16", "float8_e5m2"])
def test_floats_of_every_width_are_one_rule(dtype):
    narrow = getattr(torch, dtype, None)
    values = np.full((4, 5), 0.5, "f4" if narrow else dtype)
    for given in (torch.from_numpy(values).to(narrow),) if narrow else (values,):
        assert (Decoded(given).array() == 128).all()
        assert (Decoded(given, DataConfig(float_white=2.0)).array() == 64).all()


def test_arrays_and_tensors_that_hold_no_intensities_are_refused():
    quantized = torch.quantize_per_tensor(torch.rand(3, 4, 5), 0.1, 0, torch.quint8)
    for array, words in ((np.array([[-1, 5]]), "negative"), (np.zeros((2, 2), complex), "complex128")):
        with pytest.raises(ImageError, match=words):
            eight_bits(array)
    for given in (torch.eye(3).to_sparse(), torch.zeros(3, 4, 5, device="meta"), quantized, torch.zeros(3, 4, 5) * 1j):
        with pytest.raises(ImageError, match="expected a dense one of numbers"):
            Decoded(given)


def test_values_beyond_white_and_eight_bits_in_sixteen_are_said_once_with_the_name(tmp_path, warned):
    path = saved(tmp_path / "glare.png", np.full((4, 4), 3000, np.uint16))
    for _ in range(2):
        assert (load_image(path, DataConfig(integer_white=1023)) == 255).all()
    assert len(warned()) == 1
    assert "glare.png has values up to 3000, and white is 1023 (data.integer_white)" in warned()[0]
    load_image(saved(tmp_path / "dark.png", np.full((4, 4), 200, np.uint16)))
    assert "dark.png has values up to 200 only, and white is 65535" in warned()[1]
    from_array(np.full((4, 4), 0.7), DataConfig(float_white=255.0))
    assert "0.7 only, and white is 255 (data.float_white" in warned()[2]


def test_black_images_and_eight_bit_ones_warn_of_nothing(warned):
    from_array(np.zeros((4, 4), np.uint16))
    from_array(np.full((4, 4), 3, np.uint8), DataConfig(integer_white=4095))
    assert not warned()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([np.uint16(900), np.uint16(1000)], (1023, None)),
        ([np.uint16(900), np.uint16(1024)], (4095, None)),
        ([np.uint16(200)], (255, None)),
        ([np.uint16(0)], (None, None)),
        ([np.float32(0.9)], (None, 1.0)),
        ([np.float32(0.9), np.float32(254)], (None, 255.0)),
        ([np.uint8(9)], (None, None)),
        ([], (None, None)),
    ],
)
def test_white_is_inferred_from_all_images(tmp_path, values, expected):
    arrays = [np.full((4, 5), value) for value in values]
    paths = [saved(tmp_path / f"{index}.tiff", array) for index, array in enumerate(arrays)]
    (tmp_path / "broken.png").write_bytes(b"no image")
    for images in (arrays, [*paths, tmp_path / "broken.png"], [Image.open(path) for path in paths]):
        found = infer_white(images, DataConfig(max_pixels=1000))
        assert (found.integer_white, found.float_white, found.max_pixels) == (*expected, 1000)
    chosen = infer_white(arrays, DataConfig(integer_white=16383, float_white=7.0))
    assert (chosen.integer_white, chosen.float_white) == (16383, 7.0)


def test_floats_of_no_common_range_need_a_white():
    with pytest.raises(BKDError, match=r"floats up to 1e\+06: set data\.float_white"):
        infer_white([np.full((4, 4), 1e6)], DataConfig())


def layouts(rgb):
    """The same picture in every layout, stride and type that programs have."""
    grey_first = np.ascontiguousarray(rgb.transpose(2, 0, 1))
    frozen = rgb.copy()
    frozen.flags.writeable = False
    yield from (rgb, rgb[::-1, ::-1].copy()[::-1, ::-1], np.asfortranarray(rgb), rgb[:, :, ::-1].copy()[:, :, ::-1])
    yield from (grey_first, frozen, np.dstack([rgb, np.full_like(rgb[..., 0], 255)]), np.repeat(rgb, 2, 1)[:, ::2])
    yield from (rgb.astype(np.uint16) * 257, rgb.astype(np.int64) * 257, rgb / 255, (rgb / 255).astype(np.float32))
    for tensor in (torch.from_numpy(rgb), torch.from_numpy(grey_first)):
        yield from (tensor, tensor.float() / 255, tensor.double() / 255, tensor.int() * 257)
    yield (torch.from_numpy(grey_first).float() / 255).requires_grad_()
    yield torch.from_numpy(grey_first).transpose(1, 2).contiguous().transpose(1, 2)


def test_every_layout_stride_and_type_is_the_same_picture(rgb):
    expected = Decoded(rgb).fitted((8, 9))
    for index, given in enumerate(layouts(rgb)):
        decoded = Decoded(given)
        assert decoded.size == (HEIGHT, WIDTH), index
        np.testing.assert_array_equal(decoded.array(), rgb, err_msg=str(index))
        torch.testing.assert_close(decoded.fitted((8, 9)), expected, atol=2e-7, rtol=0)


def test_grey_in_every_shape_and_type(grey):
    whole = torch.from_numpy(grey)
    black = grey > 127
    for given in (grey, grey[:, :, None], grey[None], whole, whole[None], whole[..., None], whole.float() / 255):
        np.testing.assert_array_equal(Decoded(given).array(), three(grey))
    for given in (black, black[..., None], torch.from_numpy(black)):
        np.testing.assert_array_equal(Decoded(given).array(), three(black * np.uint8(255)))
    np.testing.assert_array_equal(Decoded((grey / 255).astype(np.float16)).array(), three(grey))


def test_transparent_arrays_are_laid_over_white(rgb):
    clear = np.dstack([rgb, np.zeros((HEIGHT, WIDTH), np.uint8)])
    for given in (clear, clear / 255, torch.from_numpy(clear)):
        assert (Decoded(given).array() == 255).all()


@pytest.mark.parametrize("shape", [(0, 5), (5,), (2, 5, 6, 3), (4, 5, 6), (5, 6, 2), (5, 6, 5)])
def test_shapes_of_no_image_are_named(shape):
    for given in (np.zeros(shape, np.uint8), torch.zeros(shape)):
        with pytest.raises(ImageError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
            Decoded(given)
    with pytest.raises(ImageError, match="masked"):
        Decoded(np.ma.masked_equal(np.zeros((4, 4), np.uint8), 0))


def test_files_come_as_paths_bytes_and_file_objects(tmp_path, rgb):
    path = saved(tmp_path / "a.png", rgb)
    content = path.read_bytes()
    sources = [path, str(path), content, bytearray(content), memoryview(content), io.BytesIO(content)]
    with path.open("rb") as file:
        for source in (*sources, file):
            np.testing.assert_array_equal(Decoded(source).array(), rgb)
    with pytest.raises(ImageError, match=r"an image in memory is empty"):
        load_image(b"")
    with pytest.raises(ImageError, match=r"an image in memory is not an image"):
        load_image(b"text")


def test_files_that_are_no_images_are_named(tmp_path, rgb):
    saved(tmp_path / "Prüfling nº 1.png", rgb)
    (tmp_path / "nothing.png").touch()
    (tmp_path / "notes.png").write_text("no image at all")
    for load in (load_image, load_mask):
        assert load(tmp_path / "Prüfling nº 1.png").shape[:2] == (HEIGHT, WIDTH)
        for name, words in (
            ("nothing.png", r"nothing\.png is empty \(0 bytes\)"),
            ("notes.png", r"notes\.png is not an image"),
            ("gone.png", r"gone\.png"),
            (".", str(tmp_path)),
        ):
            with pytest.raises(ImageError, match=words):
                load(tmp_path / name)


def test_what_is_taken_stays_as_it_was(tmp_path, rgb):
    buffer, tensor, picture = rgb.copy(), torch.from_numpy(rgb.copy()), Image.fromarray(rgb)
    path = saved(tmp_path / "a.png", rgb)
    with Image.open(path) as lazy, path.open("rb") as file:
        copies = [taken(image) for image in (buffer, tensor, picture, lazy, file, bytearray(path.read_bytes()))]
        assert copies[3].filename == lazy.filename
    buffer[:], tensor[:] = 0, 0
    picture.paste(0, (0, 0, WIDTH, HEIGHT))
    for copy in copies:
        np.testing.assert_array_equal(Decoded(copy).array(), rgb)
    assert taken(path) is path


@pytest.mark.parametrize("suffix", ["eps", "pdf"])
def test_formats_that_run_programs_are_never_opened(tmp_path, rgb, suffix, monkeypatch):
    path = saved(tmp_path / f"a.{suffix}", rgb)
    path = path.rename(tmp_path / "a.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    for load in (load_image, load_mask):
        with pytest.raises(ImageError, match=r"a\.png is not an image that can be decoded: expected one of PNG"):
            load(path)


def pages(path, count, kind):
    images = [Image.fromarray(np.full((8, 8), 60 * index, np.uint8)) for index in range(count)]
    images[0].save(path, format=kind, save_all=True, append_images=images[1:])
    return path


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_files_of_several_pages_are_refused_unless_the_first_is_asked_for(tmp_path, kind):
    path = pages(tmp_path / "many.img", 3, kind)
    with pytest.raises(ImageError, match=r"many\.img has 3 pages or frames: expected one.*--pages"):
        load_image(path)
    np.testing.assert_allclose(load_image(path, DataConfig(pages="first")), np.zeros((8, 8, 3)), atol=3)
    assert load_image(pages(tmp_path / "one.img", 1, kind)).shape == (8, 8, 3)


def test_a_damaged_exif_is_an_error_with_the_name(tmp_path, rgb, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "camera.jpg", Image.fromarray(rgb), exif=exif)

    def broken(image, **_):
        raise SyntaxError("not a TIFF file (header b'xx' not valid)")

    monkeypatch.setattr(module.ImageOps, "exif_transpose", broken)
    for load in (load_image, load_mask):
        with pytest.raises(ImageError, match=r"camera\.jpg cannot be decoded, its pixels or EXIF"):
            load(path)


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


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "gif", "webp", "ppm"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.4, 0.6, 0.9])
def test_truncated_file_is_named(tmp_path, suffix, share):
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"cut.{suffix}", noise)
    content = path.read_bytes()
    path.write_bytes(content[: max(1, int(share * len(content)))])
    with pytest.raises(ImageError, match=rf"cut\.{suffix}"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "gif", "webp", "ppm", "avif", "jp2"])
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


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "gif", "webp", "ppm", "avif", "jp2"])
def test_image_above_the_pixel_limit_is_refused_before_it_is_decoded(tmp_path, rgb, monkeypatch, suffix):
    path = saved(tmp_path / f"huge.{suffix}", rgb)
    load_image(path, DataConfig(max_pixels=HEIGHT * WIDTH))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=rf"huge\.{suffix} has more pixels than is safe.*20 x 12.*--max-pixels"):
        load_image(path, DataConfig(max_pixels=HEIGHT * WIDTH - 1))


def test_the_limit_is_far_below_pillows(tmp_path, rgb, monkeypatch):
    assert 2 * DataConfig().max_pixels < Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match="a PIL image has more pixels"):
        from_pil(Image.fromarray(rgb), DataConfig(max_pixels=10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match=r"huge\.png has more pixels than is safe"):
        load_image(saved(tmp_path / "huge.png", rgb))


@pytest.mark.parametrize("mode", ["LAB", "La", "HSV", "YCbCr", "CMYK", "RGBa", "PA", "1", "I", "F", "I;16", "RGBX"])
def test_every_mode_is_a_picture_or_an_image_error(mode):
    try:
        assert from_pil(Image.new(mode, (5, 4))).shape == (4, 5, 3)
    except ImageError as error:
        assert mode in str(error)  # noqa: PT017


def test_sixteen_bit_colour_of_fewer_bits_is_said(tmp_path, warned):
    cv2 = pytest.importorskip("cv2")
    for name, value in (("full", 40_000), ("twelve", 4000)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((4, 4, 3), value, np.uint16))
    assert (load_image(tmp_path / "full.png") == 40_000 >> 8).all()
    assert not warned()
    load_image(tmp_path / "twelve.png")
    assert "twelve.png: of 16-bit colour the upper byte is read, and here it is at most 15 of 255" in warned()[0]


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
    assert torch.equal(to_tensor(rgb, (HEIGHT, WIDTH)), reference)


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
    for marks in (values, mask):  # or one of one bit
        np.testing.assert_array_equal(load_mask(saved(tmp_path / "mask.png", marks)), mask)


def test_palette_mask_counts_colours_not_indices(tmp_path, grey):
    mask = grey > 127
    image = Image.fromarray(np.uint8(~mask)).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])  # entry 0 is white
    image.putdata(np.uint8(~mask).ravel().tolist())
    np.testing.assert_array_equal(load_mask(saved(tmp_path / "mask.png", image)), mask)
