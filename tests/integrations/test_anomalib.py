"""BKD inside anomalib: trained by its Engine, and the same scores as our own detector."""

import copy
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("anomalib", reason="the extra anomalib is not installed")

from anomalib.data import Folder
from anomalib.engine import Engine

from bkd_fast.data import load_image
from bkd_fast.errors import BKDError
from bkd_fast.inference.detector import Detector
from bkd_fast.integrations.anomalib import Bkd
from bkd_fast.normals.thresholds import measure_normals

SETTINGS = {
    "teacher.weights": "none",
    "teacher.image_size": [64, 64],
    "memory.items": 16,
    "training.validation_share": 0.2,
}
LEARNS = {**SETTINGS, "alignment.kernel": "full"}


@pytest.fixture(autouse=True)
def quiet():
    for name in ("anomalib", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def folder(tiny_data):
    return Folder(
        name="tile",
        root=tiny_data,
        normal_dir="train/good",
        abnormal_dir="test/hole",
        normal_test_dir="test/good",
        mask_dir="ground_truth/hole",
        train_batch_size=4,
        eval_batch_size=2,
        num_workers=0,
        val_split_mode="same_as_test",
    )


@pytest.fixture
def data(tiny_data):
    return folder(tiny_data)


def engine(folder, epochs):
    return Engine(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False
    )


@pytest.fixture(scope="module", params=[SETTINGS, LEARNS], ids=["default", "learns"])
def trained(request, tiny_data, tmp_path_factory):
    """A model that the Engine trained, its Engine and the data."""
    data = folder(tiny_data)
    made = engine(tmp_path_factory.mktemp("anomalib"), 3)
    model = Bkd(teacher="resnet18", settings=request.param, visualizer=False)
    made.fit(model=model, datamodule=data)
    return model, made, data


@pytest.mark.slow
def test_the_engine_trains_and_measures(trained):
    model, made, data = trained
    assert len(model.validation) == 2
    assert len(model.index_in_bank) == 8
    kernels = model.model.network.alignment.kernels
    assert len(kernels) == (0 if model.config.alignment is None else 2)
    # Learned: no longer a copy, which has nothing but zeros and ones.
    assert all(not bool(((kernel == 0) | (kernel == 1)).all()) for kernel in kernels)
    (metrics,) = made.test(model=model, datamodule=data, verbose=False)
    assert 0 <= metrics["image_AUROC"] <= 1
    assert metrics["pixel_AUROC"] > 0.8  # bright squares


@pytest.mark.slow
def test_scales_are_those_that_training_finds(trained):
    """Maps by the validation images, scores by all of them, each compared with the others alone."""
    model, _, data = trained
    network = copy.deepcopy(model.model.network).eval()
    paths = [str(path) for path in data.train_data.samples.image_path]

    class Images:
        def __init__(self, held):
            self.places = [index for index, path in enumerate(paths) if (path in model.validation) == held]
            self.image_of = range(len(self.places))

        def __len__(self):
            return len(self.places)

        def levels(self, indices):
            images = [data.train_data[self.places[index]].image for index in indices]
            return network.teacher(torch.stack([model.pre_processor(image) for image in images]))

    scales = copy.deepcopy((network.map_scale, network.score_scale))
    network.map_scale, network.score_scale = (
        {"forward": [1.0] * 2, "reverse": [1.0]},
        {"map": [0.0, 1.0], "image": [0.0, 1.0]},
    )
    with torch.no_grad():
        prepared = network.make_support([level.float().cpu() for level in model.model.support_levels])
    measured = measure_normals(network, prepared, Images(False), Images(True), list(range(8)))
    assert measured.scores.source == "leave-one-out"
    assert len(measured.scores.scores) == 10
    for found, expected in zip(scales, (network.map_scale, network.score_scale), strict=True):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=1e-3)
    scores = model.model.eval()(torch.stack([model.pre_processor(data.train_data[0].image)])).pred_score
    assert torch.isfinite(scores).all()


@pytest.mark.slow
def test_a_checkpoint_predicts_as_the_model_did(trained, tiny_data):
    model, made, _ = trained
    again = Bkd.load_from_checkpoint(made.best_model_path or made.trainer.checkpoint_callback.last_model_path)
    assert (again.index_in_bank, again.validation) == (model.index_in_bank, model.validation)
    for name in ("map_scale", "score_scale"):
        assert getattr(again.model.network, name) == getattr(model.model.network, name)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected, found = model.model.eval()(images), again.model.eval()(images)
    torch.testing.assert_close(found.pred_score, expected.pred_score)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map)


@pytest.mark.slow
def test_a_run_gets_the_detectors_scores_in_anomalib(any_run, data, tmp_path):
    model = Bkd(run=str(any_run), post_processor=False, visualizer=False)
    predictions = engine(tmp_path, 1).predict(model=model, datamodule=data)
    detector = Detector.load(any_run, device="cpu")
    seen = 0
    for batch in predictions:
        for path, score, anomaly_map in zip(batch.image_path, batch.pred_score, batch.anomaly_map, strict=True):
            expected = detector(path)
            assert float(score) == pytest.approx(expected.score, rel=1e-3, abs=1e-3)
            own = detector.score_features(detector.distill(torch.from_numpy(_network_input(path))))[1][0]
            torch.testing.assert_close(anomaly_map.squeeze(), own, rtol=1e-3, atol=1e-5)
            seen += 1
    assert seen == 6


def _network_input(path):
    from bkd_fast.data.image import to_tensor

    return np.stack([to_tensor(load_image(path), (64, 64)).numpy()])


def test_a_model_without_a_data_module_says_what_it_needs(tmp_path, data):
    data.setup()
    model = Bkd(teacher="resnet18", settings=SETTINGS, visualizer=False)
    with pytest.raises(BKDError, match="datamodule="):
        engine(tmp_path, 1).fit(model=model, train_dataloaders=data.train_dataloader())


def test_a_wrong_setting_is_named():
    with pytest.raises(BKDError, match="did you mean 'memory.items'"):
        Bkd(teacher="resnet18", settings={"memory.itens": 3})


@pytest.mark.slow
def test_anomalibs_command_line_knows_the_model(tiny_data, tmp_path):
    config = tmp_path / "model.yaml"
    config.write_text(
        "model:\n  class_path: bkd_fast.integrations.anomalib.Bkd\n  init_args:\n    teacher: resnet18\n"
        "    visualizer: false\n    settings: {teacher.weights: none, teacher.image_size: [64, 64], memory.items: 16}\n"
        f"data:\n  class_path: anomalib.data.Folder\n  init_args:\n    name: tile\n    root: {tiny_data}\n"
        "    normal_dir: train/good\n    abnormal_dir: test/hole\n    normal_test_dir: test/good\n"
        "    mask_dir: ground_truth/hole\n    train_batch_size: 4\n    num_workers: 0\n"
        "    val_split_mode: same_as_test\n"
        "trainer: {max_epochs: 1, accelerator: cpu, logger: false, enable_progress_bar: false}\n"
        f"default_root_dir: {tmp_path / 'results'}\n"
    )
    done = subprocess.run(
        [str(Path(sys.executable).with_name("anomalib")), "train", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "image_AUROC" in done.stdout + done.stderr
