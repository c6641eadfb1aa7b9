"""What surrounds a program makes no difference to a detector: torch's modes, copies, pickles, processes, buffers."""

import copy
import multiprocessing
import pickle
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bkd_fast.artifact import load_trained
from bkd_fast.data import load_image
from bkd_fast.errors import BKDError
from bkd_fast.inference import cuda_graphs
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.explain import explain
from bkd_fast.training.train import train


@pytest.fixture(scope="module")
def image(tiny_data):
    return load_image(tiny_data / "test/hole/000.png")


def equal(first, second):
    assert first.score == second.score
    np.testing.assert_array_equal(first.anomaly_map, second.anomaly_map)
    assert first.anomaly_map.dtype == np.float32


class DefaultType:
    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_):
        assert torch.get_default_dtype() == torch.float64  # a detector leaves it as it was
        torch.set_default_dtype(self.before)


class Deterministic:
    def __enter__(self):
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_):
        assert torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)


AMBIENT = {
    "default type float64": DefaultType,
    "default device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": Deterministic,
}


@pytest.mark.parametrize("around", AMBIENT.values(), ids=AMBIENT)
@pytest.mark.parametrize("when", ["loading", "predicting"])
def test_torchs_modes_make_no_difference(around, when, any_run, tiny_data, image):
    def detect(detector):
        tensor = torch.from_numpy(image)
        [outcome] = detector.stream([image])
        explained = explain(detector, image) if when == "predicting" else None
        return detector(image), detector(tensor), detector(image, tile=48, overlap=8), outcome.result, explained

    expected = detect(Detector.load(any_run, device="cpu"))
    loading, predicting = (around, nullcontext) if when == "loading" else (nullcontext, around)
    with loading():
        detector = Detector.load(any_run, device="cpu")
    with predicting():
        found = detect(detector)
    for one, other in zip(found[:4], expected[:4], strict=True):
        equal(one, other)
    if expected[4] is not None:
        for stride, level in expected[4].kept.items():
            np.testing.assert_array_equal(found[4].kept[stride], level)


@pytest.mark.parametrize("around", AMBIENT.values(), ids=AMBIENT)
def test_supports_are_replaced_in_any_mode(around, tiny_run, tiny_data, image):
    files = sorted((tiny_data / "train/good").iterdir())[3:8]
    detector, other = (Detector.load(tiny_run, device="cpu") for _ in range(2))
    detector.set_support(files)
    with around():
        other.set_support(files)
        assert not any(level.is_inference() for level in other.support.features)
    equal(other(image), detector(image))


@pytest.mark.parametrize("name", ["default type float64", "default device meta", "inference mode", "autocast"])
def test_training_is_the_same_in_any_mode(name, tiny_run, tiny_data, tiny_config, tmp_path):
    with AMBIENT[name]():
        run = train(tiny_data, tmp_path / "run", tiny_config, progress=False)
    expected = load_trained(tiny_run).model.state_dict()
    for key, value in load_trained(run).model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_detector_is_pickled_and_copied_with_what_was_changed(tiny_run, tiny_data, image):
    detector = Detector.load(tiny_run, device="cpu", max_pixels=10_000)
    detector.threshold, detector.pixel_threshold = -3.5, 0.25
    detector.set_support(sorted((tiny_data / "train/good").iterdir())[3:8])
    for other in (pickle.loads(pickle.dumps(detector)), copy.deepcopy(detector), copy.copy(detector)):
        assert other is not detector
        assert (other.threshold, other.pixel_threshold) == (-3.5, 0.25)
        assert other.config == detector.config
        equal(other(image), detector(image))
        equal(copy.deepcopy(other)(image), detector(image))
        other.threshold = 9
        assert detector.threshold == -3.5


def test_a_pickle_of_a_run_that_is_gone_or_another_says_so(tiny_run, tiny_default_run, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_run, tmp_path / "run")
    detector = Detector.load(folder, device="cpu")
    content = pickle.dumps(detector)
    shutil.rmtree(folder)
    for use in (lambda: pickle.loads(content), lambda: copy.deepcopy(detector)):
        with pytest.raises(BKDError, match=r"run folder .*run cannot be read"):
            use()
    shutil.copytree(tiny_default_run, folder)
    with pytest.raises(BKDError, match="was trained or updated since"):
        pickle.loads(content)


def scored(detector, image, answers):
    answers.put(detector(image).score)


def test_a_detector_crosses_to_a_spawned_process(tiny_run, image):
    detector, context = Detector.load(tiny_run, device="cpu"), multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=scored, args=(detector, image, answers))
    process.start()
    assert answers.get(timeout=300) == pytest.approx(detector(image).score, rel=1e-5)
    process.join()


def test_a_stream_of_one_refilled_buffer_is_of_every_frame(tiny_run, tiny_data):
    detector = Detector.load(tiny_run, device="cpu")
    frames = [load_image(path) for path in sorted((tiny_data / "train/good").iterdir())]

    def camera(make):
        buffer = make(frames[0].copy())
        for frame in frames:
            buffer[:] = make(frame)
            yield buffer
        buffer[:] = 0

    expected = [detector(frame) for frame in frames]
    for make in (lambda array: array, torch.from_numpy):
        outcomes = list(detector.stream(camera(make), batch=4))
        for outcome, frame, prediction in zip(outcomes, frames, expected, strict=True):
            equal(outcome.result, prediction)
            np.testing.assert_array_equal(np.asarray(outcome.item), frame)


def test_a_detector_is_called_from_many_threads_in_different_modes(tiny_run, image):
    detector = Detector.load(tiny_run, device="cpu")
    expected, wrong = detector(image), []

    def work(around):
        try:
            with around():
                for _ in range(3):
                    equal(detector(image), expected)
        except Exception as error:
            wrong.append(error)

    names = ["default device meta", "inference mode", "gradients", "autocast"]
    threads = [threading.Thread(target=work, args=(AMBIENT[name],)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_graph_is_recorded_for_type_shape_backend_and_switches(monkeypatch):
    images = torch.zeros(2, 3, 8, 8)
    monkeypatch.setattr(cuda_graphs, "implementation", lambda *_: "one")
    keys = [cuda_graphs.graph_key(images)]
    assert cuda_graphs.graph_key(images.clone()) == keys[0]
    keys += [cuda_graphs.graph_key(other) for other in (images.half(), images.bfloat16(), images[:1], images[..., :4])]
    matmul = {
        "fp32_precision": torch.backends.cuda.matmul.fp32_precision,
        "allow_fp16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "allow_bf16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    }
    for name in matmul:
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(**{**matmul, name: "changed"}))
            keys.append(cuda_graphs.graph_key(images))
    for name, value in (
        ("conv", SimpleNamespace(fp32_precision="changed")),
        ("deterministic", not torch.backends.cudnn.deterministic),
        ("benchmark", not torch.backends.cudnn.benchmark),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cudnn, name, value)
            keys.append(cuda_graphs.graph_key(images))
    with Deterministic():
        keys.append(cuda_graphs.graph_key(images))
    monkeypatch.setattr(cuda_graphs, "implementation", lambda *_: "other")
    keys.append(cuda_graphs.graph_key(images))
    assert len(set(keys)) == len(keys)


def test_branches_run_on_two_streams_that_fork_and_join(monkeypatch):
    """The order of what CUDA is told: without a device, by streams that note it."""
    said, current = [], []

    class Stream:
        device = "cuda:0"

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            current.append(self)

        def __exit__(self, *_):
            current.pop()

    class Noted(torch.Tensor):
        def record_stream(self, stream):
            said.append(f"{int(self.sum())} is used on {stream.name}")

    main, side = Stream("main"), Stream("side")
    current.append(main)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)

    def branch(name, value):
        said.append(f"{name} runs on {current[-1].name}")
        return [torch.full((1,), value).as_subclass(Noted)]

    first, second = cuda_graphs.Forked(side)(lambda: branch("forward", 1), lambda: branch("reverse", 2))
    assert (int(first[0]), int(second[0])) == (1, 2)
    assert said == [
        "side waits for main",
        "reverse runs on side",
        "forward runs on main",
        "main waits for side",
        "2 is used on main",
    ]
