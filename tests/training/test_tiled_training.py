import numpy as np
import pytest
import torch
from PIL import Image

from bkd_fast.artifact import load_trained
from bkd_fast.data import ImageDataset, Sample
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.evaluate import evaluate
from bkd_fast.inference.detector import Detector
from bkd_fast.training.train import train


def test_tiles_cover_every_image_and_share_a_quarter(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (80, 130, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    dataset = ImageDataset([Sample(tmp_path / "a.png", 0, "good")], (64, 64), 64)
    assert dataset.image_of == [0] * 6
    covered = np.zeros((80, 130), int)
    for index, (top, left) in enumerate(dataset.places):
        assert np.array_equal(dataset.array(index), image[top : top + 64, left : left + 64])
        covered[top : top + 64, left : left + 64] += 1
    assert covered.min() >= 1
    assert dataset.places[1].left - dataset.places[0].left == 48
    assert torch.equal(dataset[0][0], torch.from_numpy(image[:64, :64]).permute(2, 0, 1) / 255)


def test_an_image_smaller_than_a_tile_is_named(tmp_path):
    Image.new("RGB", (40, 80)).save(tmp_path / "a.png")
    with pytest.raises(BKDError, match=r"80 x 40 pixels is smaller than a tile"):
        ImageDataset([Sample(tmp_path / "a.png", 0, "good")], (64, 64), 64)


@pytest.fixture(scope="module")
def run(tiny_data, tiny_default, tmp_path_factory):
    config = tiny_default.with_changes({"support.shots": 2, "teacher.tile": 48})
    return train(tiny_data, tmp_path_factory.mktemp("runs") / "tiled", config, progress=False)


def test_thresholds_are_those_of_tiled_images(run, tiny_data):
    trained = load_trained(run)
    assert trained.calibration.source == "leave-one-out"
    assert len(trained.calibration.scores) == 10  # an image has one score, of all its tiles
    validation = trained.source.validation_files
    detector = Detector.load(run)
    own = [detector(tiny_data / "train/good" / name) for name in validation]
    for prediction in own:
        assert prediction.anomaly_map.shape == (72, 80)
        distance = np.abs(np.array(trained.calibration.scores) - prediction.score).min()
        assert distance < 2e-3 * max(1, abs(prediction.score))
    explicit = detector(tiny_data / "train/good" / next(iter(validation)), tile=48, overlap=12)
    assert explicit.score == pytest.approx(own[0].score, rel=1e-5)


def test_a_tiled_run_is_evaluated_in_tiles(run):
    metrics = evaluate(run, pictures=False, progress=False)
    means = metrics["categories"]["tile"]
    assert means["image_auroc"] is not None
    assert means["aupro"] is not None
    assert list(means["branches"]) == ["both"]
