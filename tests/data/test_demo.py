import json
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from bkd_fast.data import demo
from bkd_fast.data.dataset import check_samples, find_categories
from bkd_fast.data.defects import DEFECTS
from bkd_fast.data.demo import CATEGORIES, SIDE, make_demo
from bkd_fast.data.image import load_image, load_mask
from bkd_fast.errors import BKDError

pytest.importorskip("skimage", reason="the demo set is made from scikit-image's photographs")

SMALL = {"train": 4, "good": 2, "bad": 1}


def digests(root):
    return {
        path.relative_to(root).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def state(root):
    return {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("small") / "demo", **SMALL)


def test_set_has_the_mvtec_layout(small):
    categories = find_categories(small)
    assert [category.name for category in categories] == list(CATEGORIES)
    for category in categories:
        assert [sample.path.name for sample in category.train] == ["000.png", "001.png", "002.png", "003.png"]
        assert [sample.defect for sample in category.test] == sorted([*DEFECTS, "good", "good"])
        assert all(bool(sample.masks) == bool(sample.label) for sample in category.test)
        samples = [*category.train, *category.test]
        assert check_samples(samples) == samples
        assert {load_image(sample.path).shape for sample in samples} == {(SIDE, SIDE, 3)}
        assert len({load_image(sample.path).tobytes() for sample in samples}) == len(samples)


def test_defective_image_and_mask_show_the_same_place(small):
    """A hole is dark: the image must be darker where the mask says so. Masks are black and white."""
    masks = sorted(small.glob("*/ground_truth/*/*_mask.png"))
    assert len(masks) == len(CATEGORIES) * len(DEFECTS)
    assert all(np.unique(np.asarray(Image.open(mask))).tolist() == [0, 255] for mask in masks)
    for mask in small.glob("*/ground_truth/hole/*_mask.png"):
        name = mask.name.replace("_mask", "")
        image = load_image(mask.parents[2] / "test/hole" / name).mean(axis=2)
        inside = load_mask(mask)
        assert image[inside].mean() < 0.7 * image[~inside].mean()


def test_same_seed_gives_the_same_bytes(small, tmp_path):
    assert digests(make_demo(tmp_path / "again", **SMALL)) == digests(small)


def test_another_seed_gives_other_images(small, tmp_path):
    first, second = digests(small), digests(make_demo(tmp_path / "other", seed=1, **SMALL))
    assert first.keys() == second.keys()
    assert not {name for name in first if first[name] == second[name]}


def test_making_more_images_keeps_those_there_were(small, tmp_path):
    more = digests(make_demo(tmp_path / "more", train=5, good=2, bad=1))
    fewer = digests(small)
    assert {name for name in fewer if fewer[name] != more[name]} == {demo.MARKER}


def test_set_that_is_made_is_returned_untouched(small, monkeypatch):
    monkeypatch.setattr(demo, "_photographs", lambda: pytest.fail("made again"))
    before = state(small)
    assert make_demo(small, **SMALL) == small
    assert state(small) == before


def test_empty_folder_is_filled(tmp_path):
    make_demo(tmp_path, train=1, good=1, bad=1)
    assert [category.name for category in find_categories(tmp_path)] == list(CATEGORIES)


@pytest.mark.parametrize("change", [{"seed": 1}, {"train": 5}, {"good": 3}, {"bad": 2}])
def test_set_of_another_recipe_is_not_overwritten(small, change):
    before = state(small)
    with pytest.raises(BKDError, match="is not empty and not this demo set"):
        make_demo(small, **{**SMALL, **change})
    assert state(small) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("holiday.jpg", "photo"), (demo.MARKER, json.dumps({"version": 0})), (demo.MARKER, "not json")],
)
def test_foreign_folder_is_not_overwritten(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    before = state(tmp_path)
    with pytest.raises(BKDError, match="is not empty and not this demo set"):
        make_demo(tmp_path, **SMALL)
    assert state(tmp_path) == before


def test_file_in_place_of_the_folder_is_named(tmp_path):
    path = tmp_path / "demo"
    path.write_text("mine")
    with pytest.raises(BKDError, match=r"demo is a file"):
        make_demo(path, **SMALL)
    assert path.read_text() == "mine"


def test_missing_scikit_image_says_how_to_install_it(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(demo, "import_module", missing)
    with pytest.raises(BKDError, match=r"scikit-image.*pip install 'bkd_fast\[demo\]'"):
        make_demo(tmp_path / "demo", **SMALL)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind_when_making_fails(tmp_path, monkeypatch):
    planted = []

    def broken(*_):
        planted.append(list(tmp_path.rglob("*.png")))
        raise RuntimeError("interrupted")

    monkeypatch.setitem(DEFECTS, "stain", broken)
    with pytest.raises(RuntimeError, match="interrupted"):
        make_demo(tmp_path / "demo", **SMALL)
    assert planted[0]  # it did fail in the middle
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def textures():
    photographs = demo._photographs()
    random = np.random.default_rng(0)
    return {name: demo._crop(photograph, random) for name, photograph in photographs.items()}


def planted(defect, textures, count=12):
    names = list(textures)
    for index in range(count):
        clean, other = textures[names[index % 3]], textures[names[(index + 1) % 3]]
        before = clean.copy()
        image, mask = DEFECTS[defect](clean, other, np.random.default_rng([index, len(defect)]))
        np.testing.assert_array_equal(clean, before)
        yield clean, image, mask


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_changes_the_image_inside_its_mask_and_nowhere_far_outside(defect, textures):
    for clean, image, mask in planted(defect, textures):
        assert (mask.dtype, mask.shape) == (bool, clean.shape)
        assert 0.002 < mask.mean() < 0.2
        change = np.abs(image - clean)
        assert change[mask].mean() > 8
        assert (change[mask] > 2).mean() > 0.6
        far = ndimage.distance_transform_edt(~mask) > 10
        assert change[far].max() < 1e-6
        assert change[~mask].mean() < 0.1 * change[mask].mean()


def roughness(image):
    """Mean of the std in a window of 15 x 15 pixels."""
    mean = ndimage.uniform_filter(image, 15)
    return np.sqrt(np.clip(ndimage.uniform_filter(image**2, 15) - mean**2, 0, None)).mean()


@pytest.fixture(scope="module")
def default_set(tmp_path_factory):
    """Grey pictures of the set of the default size: {category: (training, test, labels)}."""
    categories = find_categories(make_demo(tmp_path_factory.mktemp("default") / "demo"))

    def pictures(samples):
        return [load_image(sample.path)[..., 0].astype(np.float32) for sample in samples]

    return {
        category.name: (pictures(category.train), pictures(category.test), [sample.label for sample in category.test])
        for category in categories
    }


def test_default_set_has_its_documented_size(default_set):
    for train, test, labels in default_set.values():
        assert (len(train), len(test), sum(labels)) == (60, 20 + 5 * len(DEFECTS), 5 * len(DEFECTS))


@pytest.mark.parametrize("statistic", [np.mean, roughness])
def test_one_global_statistic_does_not_tell_defective_images(default_set, statistic):
    """Otherwise the set would say nothing about a detector."""
    scores = {}
    for name, (train, test, labels) in default_set.items():
        normal = np.array([statistic(image) for image in train])
        values = np.array([statistic(image) for image in test])
        scores[name] = roc_auc_score(labels, np.abs(values - normal.mean()) / normal.std())
    assert max(scores.values()) < 0.75, scores
    assert np.mean(list(scores.values())) < 0.75, scores
