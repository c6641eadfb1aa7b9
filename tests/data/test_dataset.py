import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bkd_fast.data.dataset import (
    ImageDataset,
    Sample,
    check_samples,
    file_records,
    find_categories,
    image_files,
    split_normals,
    truth_of,
)
from bkd_fast.data.image import load_image, to_tensor
from bkd_fast.errors import BKDError, ImageError


def make_images(folder, *names, size=(10, 8), tone=90):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size, (tone, tone, tone)).save(folder / name)
    return folder


def make_mvtec(root, name, train=3):
    make_images(root / name / "train/good", *(f"{index:03}.png" for index in reversed(range(train))))
    make_images(root / name / "test/hole", "000.png", "001.png", "002.png")
    make_images(root / name / "test/good", "000.png", "001.png")
    make_images(root / name / "test/cut", "000.png")
    make_images(root / name / "ground_truth/hole", "000_mask.png", "001.png", size=(10, 8), tone=255)
    make_images(root / name / "ground_truth/cut", "000_mask.png", tone=255)
    return root / name


@pytest.fixture
def mvtec(tmp_path):
    root = tmp_path / "mvtec"
    for name in ("screw", "bottle", "metal_nut"):
        make_mvtec(root, name)
    (root / "readme.txt").write_text("not a category")
    (root / "empty").mkdir()
    make_mvtec(root, ".old")
    return root


@pytest.fixture
def plain(tmp_path):
    return make_images(tmp_path / "parts", *(f"part {index}.png" for index in range(10)))


def relative(samples, root):
    return [sample.path.relative_to(root).as_posix() for sample in samples]


def test_folder_of_categories_is_taken_by_name(mvtec, monkeypatch):
    assert [category.name for category in find_categories(mvtec)] == ["bottle", "metal_nut", "screw"]
    bottle, screw = find_categories(mvtec, ["bottle", "screw"])
    assert find_categories(mvtec, ["screw", "bottle"]) == [screw, bottle]
    assert find_categories(mvtec / "screw") == [screw]
    monkeypatch.chdir(mvtec / "screw")
    assert find_categories(Path("."))[0].name == "screw"
    shutil.rmtree("test")
    assert (len(screw.test), find_categories(mvtec / "screw")[0].test) == (6, ())


def test_category_holds_its_files_in_order_with_labels_and_defects(mvtec):
    (category,) = find_categories(mvtec, ["screw"])
    root = mvtec / "screw"
    assert relative(category.train, root) == [f"train/good/{index:03}.png" for index in range(3)]
    assert {(sample.label, sample.defect, sample.masks) for sample in category.train} == {(0, "good", ())}
    names = ["cut/000", "good/000", "good/001", "hole/000", "hole/001", "hole/002"]
    assert relative(category.test, root) == [f"test/{name}.png" for name in names]
    assert [sample.label for sample in category.test] == [1, 0, 0, 1, 1, 1]
    assert [sample.defect for sample in category.test] == [name.partition("/")[0] for name in names]
    masks = ["cut/000_mask", None, None, "hole/000_mask", "hole/001", None]  # with and without "_mask" in its name
    assert [sample.masks for sample in category.test] == [
        () if mask is None else (root / f"ground_truth/{mask}.png",) for mask in masks
    ]


def test_hidden_folder_is_no_kind_of_defect(mvtec):
    make_images(mvtec / "screw/test/.ipynb_checkpoints", "000-checkpoint.png")
    (category,) = find_categories(mvtec, ["screw"])
    assert {sample.defect for sample in category.test} == {"good", "cut", "hole"}


def test_plain_folder_is_one_category_of_training_images(plain):
    (category,) = find_categories(plain)
    assert category.name == "parts"
    assert relative(category.train, plain) == [f"part {index}.png" for index in range(10)]
    assert category.test == ()
    assert find_categories(plain, ["parts"]) == [category]
    assert find_categories(plain, []) == [category]


def test_plain_folder_with_defective_images_gets_disjoint_normal_test_images(plain, tmp_path):
    bad = make_images(tmp_path / "bad", "x.png", "y.png")
    (category,) = find_categories(plain, anomalous=bad)
    normal = [sample for sample in category.test if sample.label == 0]
    assert (len(category.train), len(normal)) == (8, 2)
    assert sorted(relative([*category.train, *normal], plain)) == [f"part {index}.png" for index in range(10)]
    defective = category.test[len(normal) :]
    assert relative(defective, bad) == ["x.png", "y.png"]
    assert {(sample.label, sample.defect, sample.masks) for sample in defective} == {(1, "anomalous", ())}
    assert find_categories(plain, anomalous=bad) == [category]


def test_masks_of_a_plain_folder_are_found_by_stem(plain, tmp_path):
    bad = make_images(tmp_path / "bad", "x.png", "y.jpg", "z.png")
    masks = make_images(tmp_path / "masks", "x_mask.png", "y.png", "w.png")
    (category,) = find_categories(plain, anomalous=bad, masks=masks)
    found = {sample.path.name: sample.masks for sample in category.test if sample.label}
    assert found == {"x.png": (masks / "x_mask.png",), "y.jpg": (masks / "y.png",), "z.png": ()}


def test_defective_images_and_masks_below_the_plain_folder_are_never_trained_on(plain):
    bad = make_images(plain / "bad", "x.png")
    masks = make_images(plain / "masks", "x.png")
    (category,) = find_categories(plain, anomalous=bad, masks=masks)
    assert len(category.train) == 8
    assert [sample.path for sample in category.test if sample.label] == [bad / "x.png"]
    assert all(sample.path.parent == plain for sample in [*category.train, *category.test] if not sample.label)


def test_folders_and_names_that_are_not_there_are_said_in_words(mvtec, plain, tmp_path):
    bad, bare, empty = make_images(tmp_path / "bad", "x.png"), tmp_path / "bare", tmp_path / "empty"
    (bare / "nut/train/good").mkdir(parents=True)
    empty.mkdir()
    for data, options, words in (
        (tmp_path / "gone", {}, r"there is no folder .*gone"),
        (empty, {}, r"there are no images in .*good images.*train/good"),
        (bare, {}, r"no images in .*nut.train.good"),
        (mvtec, {"names": ["bottle", "scerw"]}, r"'scerw'; did you mean 'screw'\? It has: bottle, metal_nut, screw$"),
        (mvtec, {"names": ["zipper"]}, r"no category 'zipper'\. It has: bottle, metal_nut, screw$"),
        (plain, {"names": ["parts", "part"]}, r"no category 'part'; did you mean 'parts'\?"),
        (mvtec, {"anomalous": bad}, "leave out --anomalous and --masks"),
        (mvtec, {"masks": bad}, "leave out --anomalous and --masks"),
        (plain, {"masks": bad}, "add --anomalous"),
        (plain, {"anomalous": empty}, r"no images in .*empty: expected pictures of defective parts"),
        (plain, {"anomalous": tmp_path / "gone"}, r"there is no folder .*gone"),
        (plain, {"anomalous": bad, "masks": tmp_path / "gone"}, r"there is no folder .*gone"),
    ):
        with pytest.raises(BKDError, match=words):
            find_categories(data, **options)


def normals(count, folder):
    return [Sample(folder / f"{index}.png", 0, "good") for index in range(count)]


def test_sound_samples_are_all_returned_in_order(mvtec):
    (category,) = find_categories(mvtec, ["screw"])
    assert check_samples(category.test) == list(category.test)


def truncate(path):
    path.write_bytes(path.read_bytes()[:40])


def test_truncated_image_is_named(plain):
    truncate(plain / "part 3.png")
    with pytest.raises(ImageError, match=r"1 of 10 images cannot be used: .*part 3\.png.*--skip-unreadable"):
        check_samples(find_categories(plain)[0].train)


def test_many_unreadable_images_are_counted_not_all_listed(plain):
    for index in range(8):
        truncate(plain / f"part {index}.png")
    with pytest.raises(ImageError, match=r"8 of 10 images.*part 4\.png.*and 3 more") as caught:
        check_samples(find_categories(plain)[0].train)
    assert "part 5.png" not in str(caught.value)


def test_skip_unreadable_leaves_an_image_out_and_warns_of_it(plain, caplog, monkeypatch):
    truncate(plain / "part 3.png")
    monkeypatch.setattr(logging.getLogger("bkd_fast"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="bkd_fast"):
        kept = check_samples(find_categories(plain)[0].train, skip_unreadable=True)
    assert relative(kept, plain) == [f"part {index}.png" for index in range(10) if index != 3]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "part 3.png" in record.getMessage()


@pytest.mark.parametrize("skip", [False, True])
def test_masks_of_another_size_or_unreadable_are_named(tmp_path, skip):
    image = make_images(tmp_path / "images", "a.png", size=(10, 8)) / "a.png"
    mask = make_images(tmp_path / "masks", "a_mask.png", size=(12, 9)) / "a_mask.png"
    with pytest.raises(BKDError, match=r"a_mask\.png is 12 x 9 pixels and its image .*a\.png 10 x 8"):
        check_samples([Sample(image, 1, "hole", (mask,))], skip_unreadable=skip)
    truncate(mask)
    with pytest.raises(ImageError, match=r"a_mask\.png"):
        check_samples([Sample(image, 1, "hole", (mask,))], skip_unreadable=skip)


@pytest.mark.parametrize(
    ("count", "share", "held"), [(2, 0.1, 1), (20, 0.0, 1), (20, 0.1, 2), (20, 0.25, 5), (20, 1.0, 19)]
)
def test_split_is_disjoint_complete_and_in_order(tmp_path, count, share, held):
    samples = normals(count, tmp_path)
    kept, out = split_normals(samples, share, seed=3)
    assert (len(kept), len(out)) == (count - held, held)
    assert [sample for sample in samples if sample in kept] == kept
    assert [sample for sample in samples if sample in out] == out
    assert set(kept) | set(out) == set(samples)
    assert not set(kept) & set(out)


def test_split_depends_on_its_seed_alone(tmp_path):
    samples = normals(30, tmp_path)
    first = split_normals(samples, 0.3, seed=1)
    torch.manual_seed(99)
    assert split_normals(samples, 0.3, seed=1) == first
    assert split_normals(samples, 0.3, seed=2) != first


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_cannot_be_split(tmp_path, count):
    with pytest.raises(BKDError, match=rf"{count} training image\(s\): expected at least 2"):
        split_normals(normals(count, tmp_path), 0.2, seed=0)


def test_dataset_item_is_the_resized_image_and_its_index(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    make_images(tmp_path, "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.png")
    dataset = ImageDataset([Sample(tmp_path / "a.png", 0, "good"), Sample(tmp_path / "b.png", 1, "hole")], (16, 24))
    assert len(dataset) == 2
    image, index = dataset[1]
    assert index == 1
    assert (image.shape, image.dtype) == ((3, 16, 24), torch.float32)
    assert torch.equal(image, to_tensor(load_image(tmp_path / "b.png"), (16, 24)))


def names_of(samples):
    return [sample.name for sample in samples]


def test_the_same_name_in_two_folders_is_two_images(tmp_path):
    make_images(tmp_path / "tile/train/good", "a.png")
    for camera in ("cam1", "cam2"):
        make_images(tmp_path / "tile/test/hole" / camera, "000.png")
        make_images(tmp_path / "tile/ground_truth/hole" / camera, "000_mask.png", tone=255)
    (category,) = find_categories(tmp_path / "tile")
    assert [sample.key for sample in category.test] == ["hole/cam1/000.png", "hole/cam2/000.png"]
    assert [sample.masks[0].parent.name for sample in category.test] == ["cam1", "cam2"]


def test_an_image_can_have_a_folder_of_masks(plain, tmp_path):
    bad = make_images(tmp_path / "bad", "x.png", "y.png")
    masks = make_images(tmp_path / "masks", "y.png", tone=255)
    for index in range(2):
        pixels = np.zeros((8, 10), np.uint8)
        pixels[index] = 255
        (masks / "x").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(masks / f"x/{index:03}.png")
    (category,) = find_categories(plain, anomalous=bad, masks=masks)
    x = next(sample for sample in category.test if sample.name == "x.png")
    assert len(x.masks) == 2
    assert truth_of(x).sum() == 20


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (["x.png"], ("x.png", "x_mask.png")),
        (["x.png"], ("x.png", "x/0.png")),
        (["x.png"], ("x.bmp", "x.png")),
        (["x.png", "x.jpg"], ("x.png",)),
    ],
)
def test_ambiguous_masks_are_refused(images, names, plain, tmp_path):
    bad = make_images(tmp_path / "bad", *images)
    for name in names:
        make_images((tmp_path / "masks" / name).parent, Path(name).name, tone=255)
    with pytest.raises(BKDError, match=r"ambiguous which mask .*x"):
        find_categories(plain, anomalous=bad, masks=tmp_path / "masks")


def test_masks_that_match_nothing_are_an_error_that_shows_both(plain, tmp_path):
    bad = make_images(tmp_path / "bad", "b0.png", "b1.png")
    masks = make_images(tmp_path / "masks", "b0_gt.png", "b1_gt.png", tone=255)
    with pytest.raises(BKDError, match=r"b0_gt\.png, b1_gt\.png, expected b0_mask\.png, b1_mask\.png"):
        find_categories(plain, anomalous=bad, masks=masks)


def test_images_without_mask_and_masks_without_image_are_named(plain, tmp_path, caplog):
    bad = make_images(tmp_path / "bad", "x.png", "y.png")
    masks = make_images(tmp_path / "masks", "x.png", "z.png", tone=255)
    with caplog.at_level(logging.WARNING, "bkd_fast"):
        find_categories(plain, anomalous=bad, masks=masks)
    assert "have no mask: y.png" in caplog.text
    assert "belong to no image: z.png" in caplog.text


def test_masks_inside_the_folder_of_defective_images_are_no_images(plain, tmp_path):
    bad = make_images(tmp_path / "bad", "x.png")
    masks = make_images(bad / "masks", "x.png", tone=255)
    (category,) = find_categories(plain, anomalous=bad, masks=masks)
    assert [sample.path for sample in category.test if sample.label] == [bad / "x.png"]


@pytest.mark.parametrize(("tone", "words"), [(0, "mark nothing"), (255, "mark the whole image")])
def test_masks_that_mean_nothing_are_named(tone, words, tmp_path, caplog):
    image = make_images(tmp_path / "images", "a.png") / "a.png"
    mask = make_images(tmp_path / "masks", "a.png", tone=tone) / "a.png"
    with caplog.at_level(logging.WARNING, "bkd_fast"):
        check_samples([Sample(image, 1, "hole", (mask,))])
    assert words in caplog.text
    assert str(mask) in caplog.text


def test_the_test_folder_of_a_data_set_is_no_folder_of_defective_images(mvtec, plain):
    root = mvtec / "screw"
    with pytest.raises(BKDError, match=rf"looks like the test folder.*bkd-fast train {root}`.*--anomalous .*cut"):
        find_categories(plain, anomalous=root / "test", masks=root / "ground_truth")
    for folder in (root, mvtec):
        with pytest.raises(BKDError, match=r"is a data set in MVTec AD's layout"):
            find_categories(plain, anomalous=folder)


def test_a_folder_with_good_and_other_images_is_not_trained_on_as_a_whole(tmp_path):
    make_images(tmp_path / "parts/good", "a.png", "b.png")
    make_images(tmp_path / "parts/bad", "c.png")
    with pytest.raises(BKDError, match=r"pass .*parts.good, and defective images with --anomalous"):
        find_categories(tmp_path / "parts")
    (category,) = find_categories(tmp_path / "parts", anomalous=tmp_path / "parts/bad")
    assert len(category.train) == 1


def test_links_are_followed_once_and_loops_end(plain, tmp_path):
    other = make_images(tmp_path / "other", "z.png")
    (plain / "linked").symlink_to(other)
    (plain / "again").symlink_to(other)
    (plain / "loop").symlink_to(plain)
    (other / "up").symlink_to(plain)
    (plain / "part 0 copy.png").symlink_to(plain / "part 0.png")
    (plain / "broken.png").symlink_to(tmp_path / "gone")
    names = names_of(find_categories(plain)[0].train)
    assert names == ["again/z.png", *(f"part {index}.png" for index in range(10))]


def test_what_the_package_wrote_is_no_data(plain, caplog):
    for folder in ("run", "deep/run"):
        make_images(plain / folder / "support", "000.png")
        (plain / folder / "manifest.json").write_text('{"format": 5, "bkd_fast": "0.1.0"}')
    make_images(plain / "other", "x.png")
    (plain / "other/manifest.json").write_text('{"name": "an app"}')
    with caplog.at_level(logging.INFO, "bkd_fast"):
        names = names_of(find_categories(plain)[0].train)
    assert names == ["other/x.png", *(f"part {index}.png" for index in range(10))]
    assert caplog.text.count("its images are left out") == 2
    with pytest.raises(BKDError, match="a folder that bkd_fast wrote"):
        find_categories(plain / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_folder_that_cannot_be_read_is_an_error(plain):
    make_images(plain / "closed", "x.png")
    (plain / "closed").chmod(0)
    with pytest.raises(PermissionError):
        find_categories(plain)


def test_images_smaller_than_a_tile_are_named(plain):
    with pytest.raises(ImageError, match=r"10 of 10 images.*part 0\.png has 10 x 8 pixels, less than a tile of 9 x 9"):
        check_samples(find_categories(plain)[0].train, tile=9)


def test_files_that_a_run_used_are_no_test_images(plain, tmp_path, caplog):
    bad = make_images(tmp_path / "bad", "x.png")
    for index in range(10):  # each with its own content
        make_images(plain, f"part {index}.png", tone=10 * index)
    (before,) = find_categories(plain, anomalous=bad)
    used = file_records(before.train)
    shutil.copy(before.train[0].path, plain / "copy.png")
    make_images(plain, "new.png", tone=211)
    with caplog.at_level(logging.WARNING, "bkd_fast"):
        (after,) = find_categories(plain, anomalous=bad, used=used)
    good = {sample.name for sample in after.test if not sample.label}
    assert good == {*(sample.name for sample in before.test if not sample.label), "new.png"}
    assert "are copies of training images" in caplog.text
    assert "copy.png" in caplog.text


def test_image_files_are_images_only_in_order(tmp_path):
    names = ["b.png", "A.JPG", "sub/c.tiff", "sub dir/ü 1.bmp", "a.10.png"]
    others = ["Thumbs.db", ".DS_Store", "notes.txt", ".hidden.png", ".cache/x.png", "sub/.trash/y.png", "png"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert image_files(tmp_path) == sorted(tmp_path / name for name in names)
    assert image_files(tmp_path / ".cache") == [tmp_path / ".cache/x.png"]  # hidden, and asked for
