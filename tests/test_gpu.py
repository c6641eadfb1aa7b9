"""What users do with a GPU: train on one, predict with what was trained on either device, compile, export."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bkd_fast.artifact import load_trained
from bkd_fast.data import load_image, to_tensor
from bkd_fast.export.formats import read, write
from bkd_fast.export.graph import program
from bkd_fast.inference.detector import Detector
from bkd_fast.ops import backend, local_match
from bkd_fast.training.train import train

DEVICE, ACCELERATOR = "cuda", "gpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def without_tf32():
    # Not fp32_precision, with which torch.export does not get along: it reads allow_tf32.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def files(tiny_data):
    return sorted((tiny_data / "test").rglob("*.png"))


def close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert one.score == pytest.approx(other.score, rel=tolerance)
        np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, atol=tolerance * other.anomaly_map.max())


def test_a_gpu_predicts_as_the_cpu_does(any_run, files):
    close(Detector.load(any_run, device=DEVICE)(files), Detector.load(any_run, device="cpu")(files), 1e-3)


@pytest.mark.parametrize("name", ["native", "triton", "reference"])
def test_every_backend_predicts_alike(any_run, files, name):
    detector = Detector.load(any_run, device=DEVICE)
    expected = detector(files)
    with backend(name):
        close(detector(files), expected, 1e-3)


def test_features_are_matched_on_a_gpu_as_on_the_cpu():
    torch.manual_seed(0)
    query, bank = torch.randn(1, 40, 32, 32), torch.randn(20, 40, 32, 32).half()
    shots = torch.randperm(20)[:16].unsqueeze(0)
    expected = local_match(query, bank, shots, 1)
    for one, other in zip(local_match(query.to(DEVICE), bank.to(DEVICE), shots.to(DEVICE), 1), expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)


def test_graphs_predict_as_single_kernels_do(any_run, tiny_data):
    graphs, kernels = (Detector(load_trained(any_run), DEVICE, pack=pack) for pack in (True, False))
    files = sorted((tiny_data / "train/good").iterdir())
    images = torch.stack([to_tensor(load_image(file), graphs.config.teacher.size) for file in files])
    for support in (files[:3], files[5:]):
        for detector in (graphs, kernels):
            detector.set_support(support)
        for count in (1, 8, 3, 9, 1):
            for own, other in zip(graphs.score(images[:count]), kernels.score(images[:count]), strict=True):
                torch.testing.assert_close(own, other)
    scores, _ = kernels.score(images)

    def predict(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            return graphs.score(images[index : index + 1])[0].item()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(predict, [*range(len(images))] * 5))
    assert found == pytest.approx(scores.tolist() * 5, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_networks_predict_much_alike(any_run, files, precision):
    narrow = Detector.load(any_run, device=DEVICE, precision=precision)(files)
    expected = Detector.load(any_run, device=DEVICE)(files)
    assert [one.score for one in narrow] != [one.score for one in expected]
    close(narrow, expected, 0.2 if precision == "bf16" else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compiled_networks_predict_alike(tiny_run, tiny_data, files, mode):
    compiled = Detector.load(tiny_run, device=DEVICE, compile=mode)
    plain = Detector.load(tiny_run, device=DEVICE)
    for _ in range(2):  # a graph is recorded, then replayed
        close([compiled(file) for file in files], [plain(file) for file in files], 1e-3)
    close(compiled(files), plain(files), 1e-3)  # another batch
    normals = sorted((tiny_data / "train/good").iterdir())[:4]
    for detector in (compiled, plain):
        detector.set_support(normals)
    close([compiled(file) for file in files], [plain(file) for file in files], 1e-3)


def test_a_stream_on_a_gpu_is_the_images_one_by_one(tiny_run, files):
    detector = Detector.load(tiny_run, device=DEVICE)
    outcomes = list(detector.stream(files * 5))
    assert [outcome.item for outcome in outcomes] == files * 5
    close([outcome.result for outcome in outcomes], [detector(file) for file in files] * 5, 1e-3)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("tiny_config", {}),
        (
            "tiny_config",
            {"support": "sampled", "support.per": "query", "support.shots": 2, "support.aggregation": "mean"},
        ),
        ("tiny_default", {}),
        ("tiny_student", {}),
    ],
)
def test_what_was_trained_on_a_gpu_predicts_anywhere(kind, changes, request, tiny_data, tmp_path, files):
    config = request.getfixturevalue(kind).with_changes(changes)
    run = train(tiny_data, tmp_path / "run", config, accelerator=ACCELERATOR, progress=False)
    close(Detector.load(run, device="cpu")(files), Detector.load(run, device=DEVICE)(files), 1e-3)


def test_what_was_trained_on_a_gpu_is_exported(tiny_data, tiny_config, tmp_path, files):
    run = train(tiny_data, tmp_path / "run", tiny_config, accelerator=ACCELERATOR, progress=False)
    detector = Detector(load_trained(run), "cpu", pack=False)
    write(program(detector), "pt2", tmp_path / "model.pt2")
    images = torch.stack([to_tensor(load_image(file), detector.config.teacher.size) for file in files])
    scores, maps = (torch.as_tensor(value) for value in read("pt2", tmp_path / "model.pt2", 1)(images.numpy()))
    expected = Detector.load(run, device=DEVICE).score(images)
    torch.testing.assert_close(scores, expected[0].cpu(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(maps, expected[1].cpu(), rtol=1e-3, atol=1e-3 * expected[1].max().item())
