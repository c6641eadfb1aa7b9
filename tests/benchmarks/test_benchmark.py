"""The benchmarks: checked before they are timed, exact about memory, and written for others to read."""

import csv
import datetime
import itertools
import sys
from contextlib import contextmanager

import ops
import pytest
import torch

from bkd_fast.benchmark import harness, operators
from bkd_fast.benchmark.harness import REFERENCE, Case, Row, measure
from bkd_fast.benchmark.memory import CLEAR, extra_memory
from bkd_fast.benchmark.model import CONFIGS, INFERENCE, TRAINING, Training, inference, random_detector
from bkd_fast.benchmark.parts import PARTS, in_parts
from bkd_fast.benchmark.results import COLUMNS, Group, means, read, relative, show, write
from bkd_fast.cli import main
from bkd_fast.ops.backend import usable

MB = 2**20
SMALL = {"teacher.name": "resnet18", "teacher.image_size": (64, 64), "memory.items": 16}
linux = pytest.mark.skipif(not CLEAR.exists(), reason="temporary memory is measured on Linux alone")


def case(**providers):
    return Case("sum", "N=1", "forward", providers)


def row(shape, provider, median, *, op="conv", threads=1):
    return Row(op, shape, "forward", provider, threads, median - 1, median, median + 1, 0.5)


def test_unequal_providers_are_refused_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(harness, "_in_turns", lambda *_: pytest.fail("was timed"))
    ours, theirs = torch.ones(3), torch.tensor([1.0, 1.0, 1.01])
    with pytest.raises(AssertionError, match=r"sum, N=1, forward: theirs is not equal to ours: (?s:.*)0\.0099"):
        measure(case(ours=lambda: ours, theirs=lambda: theirs), 0.001)
    with pytest.raises(AssertionError, match="theirs gives 2 tensors, ours 1"):
        measure(case(ours=lambda: ours, theirs=lambda: [ours, ours]), 0.001)


def test_small_results_are_compared_by_their_own_size():
    with pytest.raises(AssertionError, match="is not equal"):
        measure(case(ours=lambda: torch.tensor(1e-6), theirs=lambda: torch.tensor(2e-6)), 0.001)


def test_quantiles_and_number_of_calls(monkeypatch):
    # A clock that makes calls last 1, 2, 3, … ms; it is read at the start of a turn, around each call, and after it.
    monkeypatch.setattr(harness, "TURNS", 1)
    monkeypatch.setattr(harness, "extra_memory", lambda *_: 0.25)
    lasts = itertools.count(1)
    calls = ((0.0, ended, ended) for ended in (number * 1e-3 for number in lasts))
    ticks = itertools.chain([0.0], itertools.chain.from_iterable(calls))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(ticks))
    (found,) = measure(case(ours=lambda: torch.ones(1)), 0.011)
    assert (found.p20, found.p50, found.p80) == pytest.approx((3.0, 6.0, 9.0))  # of 1 to 11
    assert found.extra == 0.25


def test_a_slow_provider_is_called_three_times_and_threads_are_put_back():
    calls = []
    before = torch.get_num_threads()
    rows = measure(case(ours=lambda: calls.append(torch.get_num_threads()) or torch.ones(1)), 1e-9, threads=(1, 2))
    assert torch.get_num_threads() == before
    assert [found.threads for found in rows] == [1, 2]
    # One call to compare, two for the memory, three for the time.
    assert calls[1:] == [1, 1, 2, 2, 1, 2, 1, 2, 1, 2]


def test_gradients_are_off_in_a_forward_pass():
    seen = []
    for what in ("forward", "forward+backward"):
        measure(case(ours=lambda: seen.append(torch.is_grad_enabled()) or torch.ones(1))._replace(what=what), 1e-9)
    assert seen == [False] * 6 + [True] * 6


@linux
@pytest.mark.parametrize("kept", [0, 16])
def test_extra_memory_finds_a_known_temporary(kept):
    def call():
        temporary = torch.empty(64 * MB, dtype=torch.uint8).fill_(1)
        return temporary[: kept * MB].clone()

    assert extra_memory(call) == pytest.approx(64, rel=0.1)


@linux
def test_extra_memory_finds_nothing_where_there_is_nothing():
    x, buffer = torch.rand(8 * MB), torch.empty(8 * MB).fill_(1)
    assert extra_memory(lambda: x.add_(1)) < 1
    assert extra_memory(lambda: torch.mul(x, 2, out=buffer)) < 1  # a result that was there before
    assert extra_memory(lambda: x + 1) < 1  # 32 MB, all of them the result


@linux
def test_extra_memory_does_not_miss_pages_that_the_allocator_kept():
    def call():
        return sum(float(part.sum()) for part in [torch.empty(MB // 8).fill_(1) for _ in range(64)])  # 32 MB of heap

    call()
    assert extra_memory(call) == pytest.approx(32, rel=0.1)


def test_extra_memory_is_unknown_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[extra_memory.__module__], "CLEAR", tmp_path / "none" / "clear_refs")
    assert extra_memory(lambda: torch.ones(1)) != extra_memory(lambda: torch.ones(1))  # NaN


def test_rows_become_csv_and_come_back(tmp_path):
    rows = [row("N=1 C=8 H=W=4", "ours", 2.0), row("N=1 C=8 H=W=4", "theirs, NCHW", 8.0)]
    write(rows, tmp_path / "new.csv")
    with (tmp_path / "new.csv").open(newline="") as file:
        text = file.read()
    assert "\r" not in text
    first, second = csv.DictReader(text.splitlines())
    assert tuple(first)[: len(COLUMNS)] == tuple(COLUMNS)
    assert {"commit", "date", "machine", "threads", "torch", "triton", "bkd_fast"} <= set(first)
    assert datetime.date.fromisoformat(first["date"]) <= datetime.date.today()
    assert (second["provider"], second["p50_ms"], second["dtype"]) == ("theirs, NCHW", "8.000", "float32")
    assert read(tmp_path / "new.csv") == rows
    assert "4.00 x" in show(rows)


def test_means_are_geometric_and_by_label_regime_and_threads():
    rows = []
    for channels, ratio in ((8, 2.0), (16, 8.0)):
        for regime, factor in (("dense", 1.0), ("sparse", 3.0)):
            shape = f"L N=1 C={channels} H=W=4 I=5 {regime}"
            rows += [row(shape, "ours", 10.0), row(shape, "theirs", 10.0 * ratio * factor)]
    found = relative(rows)
    assert found[Group("conv", "L N=1 dense", "forward", "theirs")] == pytest.approx(4)
    assert found[Group("conv", "L N=1 sparse", "forward", "theirs")] == pytest.approx(12)
    assert "12.00 x" in means(rows)
    scaling = relative([row("L", "ours", 10.0), row("L", "ours", 5.0, threads=2)])
    assert scaling[Group("conv", "L", "forward", "ours, threads: 2")] == pytest.approx(0.5)


def test_the_parts_of_a_model_are_entered_and_left():
    detector, images = random_detector("ResNet18", changes=SMALL)
    entered = []

    @contextmanager
    def enter(part):
        entered.append(part)
        yield
        entered.append(f"/{part}")

    expected = detector.score(images)
    with in_parts(detector.model, enter):
        inside = detector.score(images)
    assert all(torch.equal(one, other) for one, other in zip(inside, expected, strict=True))
    assert set(entered) == {*(PARTS), *(f"/{part}" for part in PARTS)} - {"student", "/student"}
    assert entered[:4] == ["normalization", "teacher network", "/teacher network", "/normalization"]
    count = len(entered)
    detector.score(images)
    assert len(entered) == count


@pytest.mark.parametrize("name", operators.OPERATORS)
def test_every_operator_has_cases_on_which_all_agree(name, monkeypatch):
    monkeypatch.setattr(operators, "TEACHERS", {"tiny": ((8, 8), (8, 6), (12, 4))})
    scope = operators.Scope(batches=(1, 2), items=((20,), (30,)))
    found = list(operators.cases(scope, only=[name]))
    assert found
    for made in found:
        assert set(made.providers) >= {harness.provider(backend) for backend in usable(name, "cpu")[:1]}
        rows = measure(made, 1e-9)
        assert all(line.p50 > 0 for line in rows)


@pytest.mark.parametrize("setting", CONFIGS)
def test_a_training_step_repeats_itself(setting):
    training = Training("ResNet18", setting, 2, changes=SMALL)
    before = {name: value.clone() for name, value in training.model.named_parameters()}
    first = training()
    torch.testing.assert_close(training(), first)
    # Supports that every query has for itself are the other way through the alignment.
    torch.testing.assert_close(training(each=True), first, rtol=1e-4, atol=1e-5)
    gradients = [value.grad for value in training.model.parameters() if value.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    assert all(torch.equal(value, before[name]) for name, value in training.model.named_parameters())
    assert training.case().op == TRAINING
    assert REFERENCE in training.case().providers


@pytest.mark.parametrize("batch", [1, 3])
def test_a_detector_of_random_weights_gets_as_many_images_as_asked(batch):
    detector, images = random_detector("ResNet18", changes=SMALL, batch=batch)
    scores = detector.score(images)[0]
    assert images.shape == (batch, 3, 64, 64)
    assert scores.shape == (batch,)
    assert torch.equal(images[:1], random_detector("ResNet18", changes=SMALL)[1])


def test_inference_is_the_default_model_on_every_backend():
    case = inference("ResNet18", changes=SMALL)
    assert case.op == INFERENCE
    assert set(case.providers) == {harness.provider(name) for name in usable("cosine_anomaly_map", "cpu")}
    assert all(line.p50 > 0 for line in measure(case, 1e-9))


def test_bench_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "bench.csv"
    assert main(["bench", "--only", "cosine_anomaly_map", "--seconds", "1e-6", "--csv", str(out)]) == 0
    text = capsys.readouterr().out
    assert "PyTorch reference" in text
    assert "torchvision" in text
    assert "cosine_anomaly_map" in text
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {line["op"] for line in rows} == {"cosine_anomaly_map"}


@pytest.mark.slow
def test_the_compiled_peer_of_the_anomaly_map_agrees():
    for each in ops.with_peers(operators.cases(operators.QUICK, "cpu", ["cosine_anomaly_map"]), compiled=True):
        if each.what == "forward":
            rows = measure(each, 0.001)  # compares all providers before it times them
            assert "torch.compile" in {row.provider for row in rows}
            return
    pytest.fail("the anomaly map has no forward case")
