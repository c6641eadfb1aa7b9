"""The scikit-learn estimator: its conventions, its checks, and the scores of our own detector."""

import copy
import pickle

import numpy as np
import pytest
from PIL import Image
from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.utils import estimator_checks

from bkd_fast import BKDDetector, BKDError, Detector
from bkd_fast.data import load_image

SETTINGS = {
    "teacher": "test_resnet",
    "weights": "none",
    "image_size": (64, 64),
    "epochs": 1,
    "batch_size": 4,
    "settings": {"memory.items": 16},
    "device": "cpu",
}


def files(data, kind):
    return sorted((data / kind).iterdir())


@pytest.fixture(scope="module")
def fitted(tiny_data):
    return BKDDetector(**SETTINGS).fit(files(tiny_data, "train/good"))


@pytest.mark.parametrize(
    "name",
    [
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_estimators_unfitted",
        "check_do_not_raise_errors_in_init_or_set_param",
        "check_get_params_invariance",
        "check_mixin_order",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_set_params",
        "check_valid_tag_types",
    ],
)
def test_it_passes_scikit_learns_checks(name):
    """Those that pass no tables of numbers for X; what the others ask of fit is asked with images below."""
    checks = [check for known, check in vars(estimator_checks).items() if known.startswith(name)]
    assert checks
    for check in checks:
        check("BKDDetector", BKDDetector(**SETTINGS))


def test_fit_takes_labels_returns_itself_and_leaves_everything_as_it_was(tiny_data):
    images = np.stack([load_image(path) for path in files(tiny_data, "train/good")])
    images.flags.writeable = False
    before, detector = images.copy(), BKDDetector(**SETTINGS)
    assert detector.fit(images, y=np.ones(len(images))) is detector
    assert np.array_equal(images, before)
    assert detector.get_params() == BKDDetector(**SETTINGS).get_params()


def test_scores_are_lower_for_anomalous_images(fitted, tiny_data):
    good, bad = files(tiny_data, "test/good"), files(tiny_data, "test/hole")
    scores = fitted.score_samples([*good, *bad])
    assert scores.shape == (6,)
    assert roc_auc_score([1] * 3 + [0] * 3, scores) == 1
    decisions = fitted.decision_function([*good, *bad])
    np.testing.assert_allclose(decisions, scores - fitted.offset_)
    assert fitted.predict([*good, *bad]).tolist() == np.where(decisions < 0, -1, 1).tolist()
    assert fitted.predict(bad).tolist() == [-1] * 3


def test_images_in_memory_are_what_files_are(fitted, tiny_data):
    paths = files(tiny_data, "test/hole")
    arrays = [load_image(path) for path in paths]
    expected = fitted.score_samples(paths)
    for images in (arrays, np.stack(arrays), [Image.open(path) for path in paths], list(map(str, paths))):
        np.testing.assert_allclose(fitted.score_samples(images), expected, rtol=1e-6)
    assert [found.shape for found in fitted.anomaly_maps(arrays)] == [(72, 80)] * 3
    again = clone(fitted).fit([load_image(path) for path in files(tiny_data, "train/good")])
    np.testing.assert_allclose(again.score_samples(paths), expected, rtol=1e-5)


def test_it_can_be_pickled_and_saved(fitted, tiny_data, tmp_path):
    paths = files(tiny_data, "test/hole")
    expected = fitted.score_samples(paths)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(fitted)).score_samples(paths), expected, rtol=1e-6)
    detector = Detector.load(fitted.save(tmp_path / "run"), device="cpu")
    np.testing.assert_allclose([-detector(path).score for path in paths], expected, rtol=1e-6)
    with pytest.raises(BKDError, match="not empty"):
        fitted.save(tmp_path / "run")


def test_fitted_attributes_that_were_changed_are_pickled_and_copied(fitted, tiny_data):
    changed = copy.deepcopy(fitted)
    changed.offset_ = -1e9
    changed.detector_.threshold = 7.5
    for other in (pickle.loads(pickle.dumps(changed)), copy.deepcopy(changed)):
        assert other.offset_ == -1e9
        assert other.detector_.threshold == 7.5
        assert (other.predict(files(tiny_data, "test/hole")) == 1).all()
    assert fitted.offset_ != -1e9
    assert not hasattr(clone(changed), "offset_")


def test_numpys_numbers_are_settings(fitted, tiny_data):
    paths = files(tiny_data, "test/good")
    given = {
        "epochs": np.int64(1),
        "batch_size": np.int32(4),
        "image_size": np.array([64, 64]),
        "random_state": np.uint8(0),
    }
    other = BKDDetector(**{**SETTINGS, **given}).fit(files(tiny_data, "train/good"))
    np.testing.assert_allclose(other.score_samples(paths), fitted.score_samples(paths), rtol=1e-5)
    with pytest.raises(BKDError, match="device is 'nonsense'"):
        BKDDetector(**{**SETTINGS, "device": "nonsense"}).fit(files(tiny_data, "train/good"))


def test_twelve_bit_arrays_are_read_as_eight_bit_ones(fitted, tiny_data):
    normal, test = ([load_image(path) for path in files(tiny_data, kind)] for kind in ("train/good", "test/hole"))
    twelve = [image.astype(np.uint16) << 4 for image in normal]
    twelve[0] = twelve[0] | 15  # so that the whole range is seen
    twelve[0][0, 0] = 4095
    other = clone(fitted).fit(twelve)
    assert other.detector_.config.data.integer_white == 4095
    scores = other.score_samples([image.astype(np.uint16) << 4 for image in test])
    np.testing.assert_array_equal(scores, other.score_samples(test))


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ([], "X is empty"),
        ("one.png", "for one image"),
        (np.zeros((5, 7)), "has shape"),
        (np.full((2, 8, 8, 3), -1), "negative values"),
        ([np.zeros((8, 8, 3), np.uint8)], "at least 2"),
    ],
)
def test_bad_input_is_named(X, message):
    with pytest.raises(BKDError, match=message):
        BKDDetector(**SETTINGS).fit(X)


def test_it_has_to_be_fitted_first():
    with pytest.raises(NotFittedError, match="call fit"):
        BKDDetector(**SETTINGS).predict([np.zeros((8, 8, 3), np.uint8)])


def test_a_notebook_shows_scikit_learns_diagram_and_the_fitted_detector(fitted):
    diagram = BKDDetector(**SETTINGS)
    assert "sk-container" in diagram._repr_html_()
    assert "pixel threshold" not in diagram._repr_html_()
    for html in (fitted._repr_html_(), fitted._repr_mimebundle_()["text/html"]):
        assert "sk-container" in html
        assert "pixel threshold" in html
        assert "test_resnet" in html
    with config_context(display="text"):
        assert not hasattr(fitted, "_repr_html_")
        assert "text/html" not in fitted._repr_mimebundle_()
