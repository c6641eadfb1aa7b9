"""What only the compiled kernels have: instruction sets, threads, tails of vectors, and errors of their own."""

import multiprocessing
import threading

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_fast.ops import (
    backend,
    cosine_anomaly_map,
    distillation_loss,
    local_match,
    modulated_deform_conv2d,
    modulated_deform_gather,
    sparse_memory_attention,
)
from bkd_fast.ops.backend import available

pytestmark = pytest.mark.skipif(available("native") is not None, reason=str(available("native")))
TIERS = ("portable", "avx2", "avx512")


@pytest.fixture(autouse=True)
def each_backend():
    """Overrides the suite's: each test says what it compares."""


@pytest.fixture(params=TIERS)
def tier(request, monkeypatch):
    from bkd_fast.ops.cpu_common import simd_tiers

    if request.param not in simd_tiers():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("BKD_FAST_SIMD", request.param)
    return request.param


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conv(dtype=torch.float32, batch=2, channels=(19, 13), size=(7, 9), layout=torch.channels_last):
    input = random(batch, channels[0], *size, dtype=dtype).contiguous(memory_format=layout)
    weight = random(channels[1], channels[0], 3, 3, dtype=dtype, seed=1) / 10
    offset, mask = random(batch, 18, *size, dtype=dtype, seed=2), random(batch, 9, *size, dtype=dtype, seed=3)
    tensors = [input, offset, weight, mask, random(channels[1], dtype=dtype, seed=4)]
    return lambda i, o, w, m, b: modulated_deform_conv2d(i, o, w, b, padding=1, mask=m), tensors


def gather(dtype=torch.float32, batch=2, shared=False):
    projected = random(1 if shared else batch, 9 * 77, 6, 5, dtype=dtype)
    offset, mask = random(batch, 18, 6, 5, dtype=dtype, seed=2), random(batch, 9, 6, 5, dtype=dtype, seed=3)
    return modulated_deform_gather, [projected, offset, mask]


def attention(dtype=torch.float32, rows=37, items=21, threshold=0.02, temperature=0.3, channels=19):
    tensors = [random(rows, channels, dtype=dtype), random(items, channels, dtype=dtype, seed=1)]
    return lambda q, m: sparse_memory_attention(q, m, threshold, temperature, True), tensors


LEVELS = ((2, 19, 9, 7), (2, 40, 5, 5), (2, 3, 1, 2))


def anomaly(dtype=torch.float32, size=(37, 21)):
    tensors = [random(*shape, dtype=dtype, seed=seed) for seed in range(3) for shape in LEVELS]
    return lambda *levels: cosine_anomaly_map(
        levels[:3], levels[3:], size, sigma=2.0, value_share=0.2, weights=range(1, 7)
    ), tensors


def loss(dtype=torch.float32, direction="flat"):
    tensors = [random(*shape, dtype=dtype, seed=seed) for seed in range(2) for shape in LEVELS]
    return lambda *levels: distillation_loss(levels[:3], levels[3:], direction=direction), tensors


CALLS = {
    "conv": conv, "conv, channels first": lambda dtype=torch.float32: conv(dtype, layout=torch.contiguous_format),
    # rows of the gradient that lie whole pages apart
    "conv, many outputs": lambda dtype=torch.float32: conv(dtype, channels=(70, 1024), size=(5, 5)),
    "gather": gather, "shared gather": lambda dtype=torch.float32: gather(dtype, shared=True),
    "attention": attention,
    # few weights stay: products one by one
    "attention, sparse": lambda dtype=torch.float32: attention(dtype, 50, 90, 0.02, 0.05, 300),
    "anomaly": anomaly, "small anomaly map": lambda dtype=torch.float32: anomaly(dtype, (4, 3)),
    "flat loss": loss, "pixel loss": lambda dtype=torch.float32: loss(dtype, "pixel"),
}  # fmt: skip


def results(call, tensors, name):
    """The output and all gradients."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
    with backend(name):
        output = call(*leaves)
        grad = random(*output.shape, dtype=output.dtype, seed=9)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_agrees_with_the_reference(tier, name, dtype):
    """Sizes leave tails behind every vector width; float32 may err twice (gradients three times) what PyTorch errs."""
    call, tensors = CALLS[name](dtype)
    exact = results(call, [tensor.double() for tensor in tensors], "reference")
    plain = results(call, tensors, "reference")
    for index, (found, other, truth) in enumerate(zip(results(call, tensors, "native"), plain, exact, strict=True)):
        if dtype == torch.float64:
            torch.testing.assert_close(found, truth)
            continue
        allowed = (3 if index else 2) * (other - truth).abs().max().item()
        rounding = 4e-6 * max(1.0, truth.abs().max().item())  # where PyTorch happens to err very little
        assert (found - truth).abs().max().item() <= allowed + rounding


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 2), inputs=st.integers(1, 70), outputs=st.integers(1, 20), height=st.integers(1, 9),
    width=st.integers(1, 20), last=st.booleans(),
)  # fmt: skip
def test_convolutions_of_any_size_agree(batch, inputs, outputs, height, width, last):
    layout = torch.channels_last if last else torch.contiguous_format
    call, tensors = conv(torch.float64, batch, (inputs, outputs), (height, width), layout)
    for found, expected in zip(results(call, tensors, "native"), results(call, tensors, "reference"), strict=True):
        torch.testing.assert_close(found, expected)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40), items=st.integers(1, 130), channels=st.integers(1, 40),
    threshold=st.sampled_from([0.0, 0.01, 0.5]), temperature=st.sampled_from([0.02, 1.0]),
)  # fmt: skip
def test_memories_of_any_size_agree(rows, items, channels, threshold, temperature):
    """From weights that are all kept, through few, to none."""
    call, tensors = attention(torch.float64, rows, items, threshold, temperature, channels)
    for found, expected in zip(results(call, tensors, "native"), results(call, tensors, "reference"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", cases.MATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_instruction_set_matches_as_the_reference_does(tier, name, dtype):
    case = cases.MATCHES[name]()
    cases.check_match(cases.matched(case, "native", dtype), case, dtype)


def test_every_instruction_set_matches_in_float64(tier):
    case = cases.match()
    case = case._replace(query=case.query.double(), support=case.support.double())
    for found, expected in zip(
        *(cases.matched(case, name, torch.float64) for name in ("native", "reference")), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_is_widened_as_pytorch_does_it(tier, dtype):
    """Squared distances to zeros show their magnitudes, those to ones their signs."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    support = numbers.view(1, 1, 2**8, 2**8)
    for query in (torch.zeros(1, 1, 2**8, 2**8), torch.ones(1, 1, 2**8, 2**8)):
        with backend("native"):
            distance, _ = local_match(query, support, torch.zeros(1, 1, dtype=torch.int64), 0)
        assert torch.equal(distance[0].nan_to_num(-1), (query - support.float()).square()[0].nan_to_num(-1))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 2), channels=st.integers(1, 70), height=st.integers(1, 9), width=st.integers(1, 20),
    radius=st.integers(0, 4), shots=st.integers(1, 3),
)  # fmt: skip
def test_matches_of_any_size_agree(batch, channels, height, width, radius, shots):
    case = cases.match(batch, 3, channels, (height, width), shots, radius, whole=True)
    cases.check_match(cases.matched(case, "native"), case, torch.float32)


def test_matches_are_the_same_for_any_number_of_threads():
    case, threads = cases.match(size=(23, 70)), torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(cases.matched(case, "native"))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_for_any_number_of_threads(name):
    call, tensors = CALLS[name]()
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(results(call, tensors, "native"))
    finally:
        torch.set_num_threads(threads)
    # Between the gradient of a map and that of its distances there are matrix products of PyTorch's own.
    compared = 1 if "anomaly" in name else None
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0][:compared], run[:compared], strict=True))


def test_python_threads_do_not_disturb_each_other():
    call, tensors = conv(batch=3)
    expected = results(call, tensors, "native")
    found = {}

    def work(index):
        found[index] = [results(call, tensors, "native") for _ in range(5)]

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for runs in found.values():
        for run in runs:
            assert all(torch.equal(one, other) for one, other in zip(run, expected, strict=True))
    assert len(found) == 4


def _in_child(queue):
    torch.set_num_threads(1)  # as DataLoader's workers do
    call, tensors = conv()
    queue.put([value.numpy() for value in results(call, tensors, "native")])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_the_same():
    call, tensors = conv()
    expected = results(call, tensors, "native")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    found = queue.get(timeout=60)
    child.join()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other)


def test_an_instruction_set_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("BKD_FAST_SIMD", "mmx")
    call, tensors = conv()
    with backend("native"), pytest.raises(RuntimeError, match="BKD_FAST_SIMD is 'mmx', expected one of portable"):
        call(*tensors)


def test_nan_in_a_memory_shows():
    call, (query, memory) = attention()
    memory[3, 2] = float("nan")
    with backend("native"):
        assert call(query, memory).isnan().all()
