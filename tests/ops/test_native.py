"""What only the compiled kernels have: instruction sets, threads, tails of vectors, and errors of their own."""

import multiprocessing
import threading

import cases
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bkd_fast.ops import backend, local_match, modulated_deform_conv2d
from bkd_fast.ops.backend import available
from bkd_fast.ops.cpu_common import simd_tier, simd_tiers
from bkd_fast.ops.memory_attention.reference import memory_attention_weights

pytestmark = pytest.mark.skipif(available("native") is not None, reason=str(available("native")))
TIERS = ("portable", "avx2", "avx512", "avx512bf16", "amx")


@pytest.fixture(autouse=True)
def each_backend():
    """Overrides the suite's: each test says what it compares."""


@pytest.fixture(params=TIERS)
def tier(request, monkeypatch):
    if request.param not in simd_tiers():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("BKD_FAST_SIMD", request.param)
    return request.param


CASES = {
    **cases.CASES,
    # rows of the gradient are whole pages apart
    "conv: many outputs": lambda: cases.conv(channels=70, outputs=1024, size=(5, 5)),
    "gather: tails": lambda: cases.gather(channels=77, shared=True),
    "attention: listed weights": lambda: cases.attention(50, 90, 300, 0.02, 0.05),
}


def native(case):
    """The output and all gradients in float32."""
    return cases.results(case, "native", torch.float32)


def check_float64(case):
    """Assert that the compiled kernels agree with the reference."""
    for actual, expected in zip(*(cases.results(case, name, torch.float64) for name in ("native", "reference")),
                                strict=True):  # fmt: skip
        torch.testing.assert_close(actual, expected)


def same_bits(runs):
    return all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


def for_thread_counts(call):
    """Return the results of a call with 1, 2 and 5 threads."""
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(call())
    finally:
        torch.set_num_threads(threads)
    return runs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_agrees_with_the_reference(tier, name, dtype):
    """Sizes leave tails behind every vector width."""
    case = CASES[name]()
    if dtype == torch.float64:
        check_float64(case)
    else:
        exact, plain = (cases.results(case, "reference", kind) for kind in (torch.float64, dtype))
        cases.check(native(case), plain, exact, cases.ROUNDING[dtype])


BFLOAT_CASES = {
    **{name: make for name, make in CASES.items() if name.startswith(("conv", "gather", "attention"))},
    # the weights of 25 taps have no pattern of whole vectors, and those of two taps one that repeats
    "conv: many taps": lambda: cases.conv(1, 37, 17, (6, 40), (5, 5)),
    "conv: two taps": lambda: cases.conv(1, 67, 30, (5, 9), (1, 2)),
    "conv: blocks of channels": lambda: cases.conv(1, 300, 40, (9, 13)),
    "attention: odd channels and items": lambda: cases.attention(50, 91, 131, 0.0, 1.0, False),
}


def check_bfloat16(case, roundings=1, gradients=True):
    """Assert that bfloat16 obeys the rule for inputs that it holds exactly.

    Of few results PyTorch's largest error says little, and may be zero: ``roundings`` of the largest one may be added.
    """
    case = cases.rounded(case, torch.bfloat16)
    runs = (("native", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float64))
    own, plain, exact = (cases.results(case, *run)[: None if gradients else 1] for run in runs)
    cases.check(own, plain, exact, roundings * cases.ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("name", BFLOAT_CASES)
def test_every_instruction_set_obeys_the_rule_in_bfloat16(tier, name):
    check_bfloat16(BFLOAT_CASES[name]())


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 2), inputs=st.integers(1, 200), outputs=st.integers(1, 40), height=st.integers(1, 9),
    width=st.integers(1, 20), kernel=st.tuples(st.integers(1, 3), st.integers(1, 6)), last=st.booleans(),
)  # fmt: skip
def test_convolutions_of_any_size_obey_the_rule_in_bfloat16(batch, inputs, outputs, height, width, kernel, last):
    kernel = tuple(size - 1 + size % 2 for size in kernel)  # whose padding keeps every image large enough
    check_bfloat16(cases.conv(batch, inputs, outputs, (height, width), kernel, last=last), roundings=2)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 150), items=st.integers(1, 130), channels=st.integers(1, 100),
    threshold=st.sampled_from([0.0, 0.01, 0.5]), temperature=st.sampled_from([0.02, 1.0]),
)  # fmt: skip
def test_memories_of_any_size_obey_the_rule_in_bfloat16(rows, items, channels, threshold, temperature):
    call, (query, memory) = cases.attention(rows, items, channels, threshold, temperature)
    # A weight beside the threshold is kept by one precision and dropped by the other.
    weights = memory_attention_weights(query.bfloat16(), memory.bfloat16(), 0.0, temperature, False)
    assume(((weights - threshold).abs() > 1e-4).all())
    # Of one channel a cosine is a sign: its gradient is zero, and what is computed is nothing but rounding.
    check_bfloat16((call, [query, memory]), roundings=2, gradients=channels > 1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ("conv", "attention") for dtype in (torch.float32, torch.float64, torch.float16)),
        # which has no products, and sums in float32 like the others
        *((name, torch.bfloat16) for name in CASES if name.startswith("gather")),
    ],
)
def test_products_of_bfloat16_change_no_other_result(name, dtype, monkeypatch):
    if "avx512bf16" not in simd_tiers():
        pytest.skip("this machine has no avx512bf16")
    runs = []
    for chosen in simd_tiers()[TIERS.index("avx512") :]:
        monkeypatch.setenv("BKD_FAST_SIMD", chosen)
        runs.append(cases.results(CASES[name](), "native", dtype))
    assert same_bits(runs)


def test_only_an_instruction_set_with_products_of_bfloat16_is_given_them(tier):
    query, memory, output = (torch.ones(2, 3).bfloat16() for _ in range(3))
    arguments = (simd_tiers().index(tier), query, memory, 0.0, 1.0, False, output)
    if tier in ("avx512bf16", "amx"):
        torch.ops.bkd_fast_native.memory_attention(*arguments)
        assert torch.equal(output, query)
    else:
        with pytest.raises(ValueError, match="query is BFloat16, expected Float or Double"):
            torch.ops.bkd_fast_native.memory_attention(*arguments)


def test_bfloat16_outside_the_image_is_zero(tier):
    """Even where the border is infinite, and a NaN position is NaN."""
    image = torch.full((1, 33, 4, 5), torch.inf, dtype=torch.bfloat16)
    offset = torch.full((1, 2, 4, 5), 100.0)
    offset[0, :, 1, 2] = torch.nan
    with backend("native"):
        output = modulated_deform_conv2d(image, offset.bfloat16(), torch.ones(3, 33, 1, 1).bfloat16())
    assert output[..., 1, 2].isnan().all()
    assert (output.isnan().sum(), output.nan_to_num().abs().sum()) == (3, 0)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 2), inputs=st.integers(1, 70), outputs=st.integers(1, 20), height=st.integers(1, 9),
    width=st.integers(1, 20), last=st.booleans(),
)  # fmt: skip
def test_convolutions_of_any_size_agree(batch, inputs, outputs, height, width, last):
    check_float64(cases.conv(batch, inputs, outputs, (height, width), last=last))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40), items=st.integers(1, 130), channels=st.integers(1, 40),
    threshold=st.sampled_from([0.0, 0.01, 0.5]), temperature=st.sampled_from([0.02, 1.0]),
)  # fmt: skip
def test_memories_of_any_size_agree(rows, items, channels, threshold, temperature):
    """From weights that are all kept, through few, to none."""
    check_float64(cases.attention(rows, items, channels, threshold, temperature))


@pytest.mark.parametrize("name", cases.MATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_instruction_set_matches_as_the_reference_does(tier, name, dtype):
    case = cases.MATCHES[name]()
    cases.check_match(cases.matched(case, "native", dtype), case, dtype)


def test_every_instruction_set_matches_in_float64(tier):
    case = cases.match()
    case = case._replace(query=case.query.double(), support=case.support.double())
    for actual, expected in zip(
        *(cases.matched(case, name, torch.float64) for name in ("native", "reference")), strict=True
    ):
        torch.testing.assert_close(actual, expected)


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
    case = cases.match(size=(23, 70))
    assert same_bits(for_thread_counts(lambda: cases.matched(case, "native")))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(name, dtype):
    case = CASES[name]()
    # PyTorch's matrix products come between the gradients of a map and of its distances.
    compared = 1 if "anomaly" in name else None
    assert same_bits(for_thread_counts(lambda: cases.results(case, "native", dtype)[:compared]))


def test_python_threads_do_not_disturb_each_other():
    case = cases.conv(batch=3)
    expected = native(case)
    by_thread = {}

    def work(index):
        by_thread[index] = [native(case) for _ in range(5)]

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(by_thread) == 4
    assert all(same_bits([expected, *runs]) for runs in by_thread.values())


def _in_child(queue):
    torch.set_num_threads(1)  # as DataLoader's workers do
    queue.put([value.numpy() for value in native(cases.conv())])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_the_same():
    expected = native(cases.conv())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    values = queue.get(timeout=60)
    child.join()
    for one, other in zip(values, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other)


def test_an_instruction_set_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("BKD_FAST_SIMD", "mmx")
    call, tensors = cases.conv()
    with backend("native"), pytest.raises(RuntimeError, match="BKD_FAST_SIMD is 'mmx', expected one of portable"):
        call(*tensors)


def test_amx_that_is_not_there_is_explained(monkeypatch):
    """What a CPU with some of it says is tested in emulation (tests/amx_on_cpu)."""
    if "amx" in simd_tiers():
        pytest.skip("this machine has amx")
    monkeypatch.setenv("BKD_FAST_SIMD", "amx")
    with pytest.raises(RuntimeError, match=r"BKD_FAST_SIMD is 'amx' \((this CPU has no A|the extension was)"):
        simd_tier()


def test_nan_in_a_memory_shows():
    call, (query, memory) = cases.attention()
    memory[3, 2] = float("nan")
    with backend("native"):
        assert call(query, memory).isnan().all()
