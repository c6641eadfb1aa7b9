"""BKD inside anomalib: its habits, trained by its Engine, exported by it, and the same results as our own detector."""

import copy
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("anomalib", reason="the extra anomalib is not installed")

from anomalib import LearningType
from anomalib.data import Folder, InferenceBatch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, get_model, list_models
from anomalib.post_processing import PostProcessor

from bkd_fast.artifact import Calibration
from bkd_fast.data import load_image
from bkd_fast.decisions import NormalScores
from bkd_fast.errors import BKDError
from bkd_fast.inference.detector import Detector
from bkd_fast.integrations.anomalib import Bkd, NormalPostProcessor, _resize
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


def folder(tiny_data, **changes):
    options = {"mask_dir": "ground_truth/hole", "val_split_mode": "same_as_test"}
    folders = {"normal_dir": "train/good", "abnormal_dir": "test/hole", "normal_test_dir": "test/good"}
    sizes = {"train_batch_size": 4, "eval_batch_size": 2, "num_workers": 0}
    return Folder(name="tile", root=tiny_data, **folders, **sizes, **{**options, **changes})


@pytest.fixture
def data(tiny_data):
    return folder(tiny_data)


def engine(folder, epochs, **options):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return Engine(max_epochs=epochs, default_root_dir=folder, **quiet, **options)


@pytest.fixture(scope="module", params=[SETTINGS, LEARNS], ids=["default", "learns"])
def trained(request, tiny_data, tmp_path_factory):
    """A model that the Engine trained, its Engine and the data."""
    data = folder(tiny_data)
    made = engine(tmp_path_factory.mktemp("anomalib"), 3)
    model = Bkd(teacher="test_resnet", settings=request.param, visualizer=False)
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
    model = Bkd(teacher="test_resnet", settings=SETTINGS, visualizer=False)
    with pytest.raises(BKDError, match="datamodule="):
        engine(tmp_path, 1).fit(model=model, train_dataloaders=data.train_dataloader())


def test_a_wrong_setting_is_named():
    with pytest.raises(BKDError, match="did you mean 'memory.items'"):
        Bkd(teacher="test_resnet", settings={"memory.itens": 3})


def test_the_name_lookups_of_anomalib_find_it():
    assert "bkd" in list_models()
    model = get_model("bkd", teacher="test_resnet", settings=SETTINGS, visualizer=False)
    assert type(model) is Bkd
    assert model.learning_type == LearningType.ONE_CLASS
    assert model.trainer_arguments["max_epochs"] == 1
    assert model.input_size == (64, 64)
    assert {metric.name for metric in model.evaluator.test_metrics} == {
        "image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score",
    }  # fmt: skip


def test_a_pre_processor_sets_the_image_size():
    settings = {"teacher.weights": "none", "memory.items": 16}
    model = Bkd("test_resnet", settings=settings, pre_processor=Bkd.configure_pre_processor((96, 64)))
    assert model.config.teacher.size == model.input_size == (96, 64)
    with pytest.raises(BKDError, match=r"resizes to \(96, 64\), and teacher.image_size is \(64, 64\)"):
        Bkd("test_resnet", settings=SETTINGS, pre_processor=Bkd.configure_pre_processor((96, 64)))
    with pytest.raises(BKDError, match="leave Normalize out"):
        Bkd("test_resnet", settings=SETTINGS, pre_processor=AnomalibModule.configure_pre_processor((64, 64)))
    with pytest.raises(BKDError, match=r"expected \(N, 3, 64, 64\)"):
        Bkd("test_resnet", settings=SETTINGS, pre_processor=False)(torch.rand(1, 3, 65, 64))


@pytest.mark.parametrize("shape", [(64, 64), (63, 130), (200, 47), (500, 333)])
def test_exported_models_resize_as_torch_does(shape):
    images = torch.rand(2, 3, *shape)
    expected = torch.nn.functional.interpolate(images, (64, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(_resize(images, (64, 48)), expected, rtol=1e-4, atol=1e-5)


def test_normalized_scores_keep_their_order_and_have_the_threshold_in_the_middle():
    processor = NormalPostProcessor()
    maxima = [1.0, 1.2, 1.5]
    scores = [0.5, 1.0, 2.0, 3.0]
    processor.set_calibration(Calibration.of(NormalScores("validation", scores, maxima), 0.5, 0.3))
    raw = torch.tensor([[-5.0], [2.9], [3.1], [50.0], [1000.0]])
    result = processor(InferenceBatch(pred_score=raw, anomaly_map=torch.full((5, 1, 2, 2), 1.6)))
    assert float(processor.image_threshold) == 3.0
    assert result.pred_label.flatten().tolist() == [False, False, True, True, True]
    assert result.pred_mask.all()
    assert result.pred_score.diff(dim=0).min() > 0
    assert 0 < result.pred_score.min() < result.pred_score.max() < 1


def test_a_model_that_is_not_trained_says_so():
    with pytest.raises(BKDError, match="not trained"):
        Bkd("test_resnet", settings=SETTINGS)(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("changes", [{"teacher.tile": 64}, {"data.integer_white": 4095}])
def test_what_anomalib_would_read_otherwise_is_refused(changes):
    with pytest.raises(BKDError, match=f"{next(iter(changes))} is .*bkd_fast.Detector"):
        Bkd("test_resnet", settings={**SETTINGS, **changes})


@pytest.mark.slow
def test_other_images_than_those_it_learned_from_are_refused(trained, tiny_data, tmp_path):
    model, _, _ = trained
    other = Folder(name="other", root=tiny_data, normal_dir="test/good", abnormal_dir="test/hole", num_workers=0)
    with pytest.raises(BKDError, match="the model learned from 10 images"):
        engine(tmp_path, 1).fit(model=copy.deepcopy(model), datamodule=other)


@pytest.mark.slow
def test_labels_are_those_of_the_runs_thresholds(tiny_default_run, data, tmp_path):
    model = Bkd(run=str(tiny_default_run), visualizer=False)
    detector = Detector.load(tiny_default_run, device="cpu")
    detector.threshold = float(model.post_processor.image_threshold)
    assert detector.threshold == pytest.approx(detector.calibration.threshold)
    assert float(model.post_processor.pixel_threshold) == pytest.approx(detector.pixel_threshold)
    (metrics,) = engine(tmp_path, 1).test(model=model, datamodule=data, verbose=False)
    labels, truth = [], []
    for batch in engine(tmp_path, 1).predict(model=model, datamodule=data):
        for path, label, mask in zip(batch.image_path, batch.pred_label, batch.pred_mask, strict=True):
            prediction = detector(path)
            assert bool(label) == prediction.label
            own = detector.score(torch.from_numpy(_network_input(path)))[1][0] > detector.pixel_threshold
            assert (mask.squeeze() != own).float().mean() < 0.01
            labels.append(bool(label))
            truth.append("hole" in str(path))
    assert any(labels)
    right = sum(a and b for a, b in zip(labels, truth, strict=True))
    assert metrics["image_F1Score"] == pytest.approx(2 * right / (sum(labels) + sum(truth)))


@pytest.mark.slow
def test_training_without_validation_leaves_a_whole_checkpoint(tiny_data, tmp_path):
    """In another process it gives bit-identical scores, without the teacher's file of weights."""
    weights = tmp_path / "teacher.pth"
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    data = folder(tiny_data)
    model = Bkd("test_resnet", settings={**SETTINGS, "teacher.weights": str(weights)}, visualizer=False)
    made = engine(tmp_path, 1, limit_val_batches=0)
    made.fit(model=model, datamodule=data)
    weights.unlink()
    images = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        expected = model.eval()(images)
    assert float(model.post_processor.image_threshold) > 0
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import torch\nfrom bkd_fast.integrations.anomalib import Bkd\n"
        f"model = Bkd.load_from_checkpoint({made.best_model_path!r}).eval()\n"
        f"with torch.inference_mode():\n    found = model(torch.load({str(tmp_path / 'images.pt')!r}))\n"
        f"torch.save(found._asdict(), {str(tmp_path / 'found.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, value in torch.load(tmp_path / "found.pt").items():
        assert torch.equal(value, getattr(expected, name)), name


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(trained, data, tmp_path):
    _, made, _ = trained
    other = Bkd("test_resnet", settings={**SETTINGS, "support.shots": 3}, visualizer=False)
    with pytest.raises(BKDError, match="other options than this Bkd: .*support"):
        engine(tmp_path, 1).test(model=other, datamodule=data, ckpt_path=made.best_model_path, verbose=False)
    with pytest.raises(BKDError, match="not of a Bkd"):
        other.on_load_checkpoint({"hyper_parameters": {}})


@pytest.mark.slow
def test_anomalibs_own_post_processor_is_kept(data, tmp_path):
    model = Bkd("test_resnet", settings=SETTINGS, post_processor=PostProcessor(), visualizer=False)
    made = engine(tmp_path, 1)
    made.fit(model=model, datamodule=data)
    assert float(model.post_processor.image_max) > float(model.post_processor.image_min)
    with pytest.raises(BKDError, match="another post-processor"):
        Bkd.load_from_checkpoint(made.best_model_path)
    again = Bkd.load_from_checkpoint(made.best_model_path, post_processor=PostProcessor())
    assert again.post_processor.image_threshold == model.post_processor.image_threshold


@pytest.mark.slow
@pytest.mark.parametrize("export_type", ["torch", "onnx", "openvino"])
def test_exported_models_give_the_engines_results(trained, tiny_data, tmp_path, monkeypatch, export_type):
    """Through anomalib's inferencers, from image files of another size than the network's."""
    if export_type != "torch":
        pytest.importorskip("onnxscript")
        pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)  # anomalib puts a cache there
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model, made, _ = trained
    path = made.export(copy.deepcopy(model), export_type, export_root=tmp_path)
    # OpenVINO would take bfloat16 where the CPU has it.
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    inferencer = TorchInferencer(path, "cpu") if export_type == "torch" else OpenVINOInferencer(path, "CPU", precision)
    for batch in engine(tmp_path, 1).predict(model=copy.deepcopy(model), data_path=tiny_data / "test"):
        (file,) = batch.image_path
        result = inferencer.predict(file)
        for name, tolerance in (("pred_score", 1e-3), ("anomaly_map", 5e-3)):
            expected = np.asarray(getattr(batch, name)).squeeze()
            np.testing.assert_allclose(np.asarray(getattr(result, name)).squeeze(), expected, atol=tolerance)
        assert bool(np.asarray(result.pred_label).squeeze()) == bool(batch.pred_label)
        assert (np.asarray(result.pred_mask).squeeze() != np.asarray(batch.pred_mask).squeeze()).mean() < 0.01


@pytest.mark.slow
def test_every_step_of_the_engine_works_from_a_checkpoint(trained, tiny_data, tmp_path):
    """The steps of anomalib's own tests of its models (tests/integration/model/test_models.py)."""
    model, made, data = trained
    checkpoint = made.best_model_path
    settings = model.config.to_dict()

    def fresh():
        made = get_model("bkd", "test_resnet", settings=settings, visualizer=False)
        return made, engine(tmp_path, 3), folder(tiny_data)

    (expected,) = made.test(model=model, datamodule=data, verbose=False)
    for step in ("test", "train"):
        other, new, images = fresh()
        (metrics,) = getattr(new, step)(model=other, datamodule=images, ckpt_path=checkpoint)
        assert metrics == pytest.approx(expected), step
    other, new, images = fresh()
    before = float(model.post_processor.image_threshold)
    new.validate(model=other, datamodule=images, ckpt_path=checkpoint)
    assert float(other.post_processor.image_threshold) == before
    other, new, images = fresh()
    predictions = new.predict(model=other, datamodule=images, ckpt_path=checkpoint)
    assert sum(len(batch.pred_score) for batch in predictions) == 6
    other, new, _ = fresh()
    assert new.export(model=other, export_type="torch", ckpt_path=checkpoint, export_root=tmp_path).is_file()


@pytest.mark.slow
def test_images_without_masks_give_image_metrics(tiny_data, tmp_path):
    data = folder(tiny_data, mask_dir=None)
    (metrics,) = engine(tmp_path, 1).train(model=Bkd("test_resnet", settings=SETTINGS), datamodule=data)
    assert metrics.keys() == {"image_AUROC", "image_F1Score"}
    assert list((tmp_path / "Bkd").rglob("*.png"))  # of the visualiser


@pytest.mark.slow
def test_anomalibs_command_line_knows_the_model(tiny_data, tmp_path):
    config = tmp_path / "model.yaml"
    config.write_text(
        "model:\n  class_path: bkd_fast.integrations.anomalib.Bkd\n  init_args:\n    teacher: test_resnet\n"
        "    visualizer: false\n    settings: {teacher.weights: none, teacher.image_size: [64, 64], memory.items: 16}\n"
        f"data:\n  class_path: anomalib.data.Folder\n  init_args:\n    name: tile\n    root: {tiny_data}\n"
        "    normal_dir: train/good\n    abnormal_dir: test/hole\n    normal_test_dir: test/good\n"
        "    mask_dir: ground_truth/hole\n    train_batch_size: 4\n    num_workers: 0\n"
        "    val_split_mode: same_as_test\n"
        "trainer: {max_epochs: 1, accelerator: cpu, logger: false, enable_progress_bar: false}\n"
        f"default_root_dir: {tmp_path / 'results'}\n"
    )
    command = [str(Path(sys.executable).with_name("anomalib")), "train", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "image_AUROC" in done.stdout + done.stderr
