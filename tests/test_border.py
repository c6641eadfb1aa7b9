"""Defects along the border are found as those inside are, and the border of good images is no defect."""

import numpy as np
import pytest

from bkd_fast.config import BKDConfig
from bkd_fast.data import load_image
from bkd_fast.data.demo import make_demo
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.prediction import Prediction
from bkd_fast.training.train import train
from bkd_fast.training.weights import PACKAGES

SIDE, PATCH = 256, 22
PLACES = {
    "border": [(0, 40), (0, 150), (SIDE - PATCH, 90), (SIDE - PATCH, 200), (60, 0), (180, 0), (30, SIDE - PATCH),
               (140, SIDE - PATCH), (0, 0), (SIDE - PATCH, SIDE - PATCH)],
    "inside": [(60, 60), (60, 170), (110, 110), (170, 60), (170, 170)],
}  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("skimage", reason="the demo extra is not installed")
    pytest.importorskip(PACKAGES["tf_efficientnet_lite0"][1], reason="the demo extra is not installed")
    return make_demo(tmp_path_factory.mktemp("border") / "demo", train=30, good=12, bad=0)


@pytest.fixture(scope="module", params=["brick", "gravel"])
def trained(request, demo, tmp_path_factory):
    """A detector, good images that it has not seen, and what it says of them."""
    config = BKDConfig().with_changes({"teacher.name": "tf_efficientnet_lite0", "memory.items": 500})
    run = train(demo / request.param, tmp_path_factory.mktemp("border") / "run", config, progress=False)
    detector = Detector.load(run, device="cpu")
    images = [load_image(path) for path in sorted((demo / request.param / "test/good").iterdir())]
    return detector, images, detector(images)


def planted(image: np.ndarray, place: tuple[int, int], tone: int) -> np.ndarray:
    """A patch that is brighter or darker, through which the texture is seen."""
    found = image.astype(float)
    rows, columns = (slice(start, start + PATCH) for start in place)
    found[rows, columns] += tone
    return np.clip(found, 0, 255).astype(np.uint8)


def peak(prediction: Prediction) -> tuple[int, int]:
    """Row and column of the largest pixel."""
    row, column = np.unravel_index(prediction.anomaly_map.argmax(), prediction.anomaly_map.shape)
    return int(row), int(column)


@pytest.mark.slow
@pytest.mark.parametrize("tone", [80, -80])
@pytest.mark.parametrize("where", PLACES)
def test_patches_are_found_where_they_are(trained, where, tone):
    detector, images, _ = trained
    found, located = 0, 0
    for index, place in enumerate(PLACES[where]):
        prediction = detector(planted(images[index % len(images)], place, tone))
        found += prediction.label
        located += all(start - 12 <= at < start + PATCH + 12 for start, at in zip(place, peak(prediction), strict=True))
    assert located >= 0.9 * len(PLACES[where])
    assert found >= (0.7 if where == "border" else 0.9) * len(PLACES[where])


@pytest.mark.slow
def test_the_border_of_good_images_is_no_defect(trained):
    """Maps are as high at the border as elsewhere, and not all of their peaks lie there."""
    _, _, predictions = trained
    rows, columns = np.mgrid[:SIDE, :SIDE]
    depth = np.minimum(np.minimum(rows, columns), SIDE - 1 - np.maximum(rows, columns))
    maps = np.stack([prediction.anomaly_map for prediction in predictions])
    for low, high in ((0, 4), (4, 8), (8, 16)):
        ring = maps[:, (depth >= low) & (depth < high)].mean()
        assert ring == pytest.approx(maps.mean(), rel=0.2)  # without border=1 the outermost is half as high again
    assert not any(prediction.label for prediction in predictions)
    assert sum(depth[peak(prediction)] < 16 for prediction in predictions) < len(predictions)
