"""Every kernel, type and option against the reference, with threads in every order."""

import re
from contextlib import contextmanager

import activation_cases
import cases
import join_cases
import kernel_checks
import nearest_cases
import neighbor_cases
import pytest
import retrieval_cases
import standardize_cases
import top_mean_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_fast.ops import backend, modulated_deform_conv2d
from tools.cuda_gate import compiling
from tools.cuda_on_cpu import building, traffic

TYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@contextmanager
def precision(chosen):
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = chosen
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


# Every kernel that a file of csrc/cuda launches, by the name that it launches it under.
KERNELS = sorted(
    name
    for path in sorted((building.ROOT / "csrc" / "cuda").glob("*.cu"))
    for name in re.findall(r'\blaunch\("(\w+)"', path.read_text(encoding="utf-8"))
)

# With TF32 only what multiplies on tensor cores, and where no weight is so near the threshold that rounding decides.
CALLS = [
    (name, kind)
    for name in cases.CASES
    for kind in TYPES
    if kind != "tf32" or name.startswith(("conv", "attention: as", "attention: one"))
]


@pytest.fixture
def ieee():
    with precision("ieee"):
        yield


@pytest.mark.parametrize(("name", "kind"), CALLS)
def test_the_kernels_agree_with_the_reference(name, kind, order):
    dtype = TYPES[kind]
    case = cases.rounded(cases.CASES[name](), dtype)
    rounding = cases.TF32_ROUNDING if kind == "tf32" else cases.ROUNDING[dtype]
    exact, plain = cases.results(case, "reference", torch.float64), cases.results(case, "reference", dtype)
    with precision("tf32" if kind == "tf32" else "ieee"):
        cases.check(cases.results(case, "native", dtype), plain, exact, rounding)


@pytest.mark.parametrize("name", cases.MATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matching_agrees_with_the_reference(name, dtype, order):
    case = cases.MATCHES[name]()
    cases.check_match(cases.matched(case, "native", dtype), case, dtype)


def scaled(x, scale=2.5):
    """The template operator; what lies behind its output must stay."""
    buffer = torch.full((x.numel() + 16,), 7, dtype=x.dtype)
    torch.ops.bkd_fast_cuda_on_cpu.scaled_copy(x, scale, buffer[: x.numel()].view(x.shape))
    assert (buffer[x.numel() :] == 7).all()
    return buffer[: x.numel()].view(x.shape)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3, 5, 7), (4099,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_template_scales_every_element(shape, dtype, order):
    x = cases.random(*shape).to(dtype)
    assert torch.equal(scaled(x), (2.5 * x.float()).to(dtype))


def test_a_shot_that_is_no_image_is_not_read():
    kernel_checks.a_shot_that_is_no_image_is_not_read("native")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), inputs=st.integers(1, 40), outputs=st.integers(1, 70), height=st.integers(1, 6),
    width=st.integers(1, 9), tall=st.integers(1, 3), wide=st.integers(1, 3), half=st.booleans(),
)  # fmt: skip
def test_convolutions_of_any_size_agree(batch, inputs, outputs, height, width, tall, wide, half):
    dtype = torch.float16 if half else torch.float32
    size = (height + 2, width + 2)
    case = cases.rounded(cases.conv(batch, inputs, outputs, size, (tall, wide)), dtype)
    if batch == 0:
        results = cases.results(case, "native", dtype)
        assert results[0].shape[0] == 0
        assert not any(value.any() for value in results[1:])
        return
    exact, plain = cases.results(case, "reference", torch.float64), cases.results(case, "reference", dtype)
    with precision("ieee"):
        cases.check(cases.results(case, "native", dtype), plain, exact, cases.ROUNDING[dtype])


def test_more_groups_of_few_channels_than_a_block_has(order):
    case = cases.rounded(cases.conv(1, 272, 272, (3, 5), groups=34, kernel=(1, 1)), torch.float16)
    exact, plain = cases.results(case, "reference", torch.float64), cases.results(case, "reference", torch.float16)
    cases.check(cases.results(case, "native", torch.float16), plain, exact, cases.ROUNDING[torch.float16])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 80), items=st.integers(1, 140), channels=st.integers(1, 80),
    threshold=st.sampled_from([0.0, 0.5]), half=st.booleans(),
)  # fmt: skip
def test_memories_of_any_size_agree(rows, items, channels, threshold, half):
    dtype = torch.float16 if half else torch.float32
    case = cases.rounded(cases.attention(rows, items, channels, threshold), dtype)
    exact = cases.results(case, "reference", torch.float64)
    # A weight at the threshold may fall on either side of it.
    near = threshold and _nearest(case, threshold) < 1e-3
    if not near:
        results, plain = (cases.results(case, name, dtype) for name in ("native", "reference"))
        cases.check(results, plain, exact, cases.ROUNDING[dtype])


def _nearest(case, threshold):
    from bkd_fast.ops.memory_attention.reference import memory_attention_weights

    return (memory_attention_weights(*case[1], 0.0, 0.3, False) - threshold).abs().min().item()


@pytest.mark.parametrize("name", ["conv", "conv: groups", "gather: shared", "gather"])
def test_deterministic_sums_agree_and_do_not_depend_on_the_order(name, ieee):
    orders = (("forward", 1), ("reversed", 1), ("random", 1))
    kernel_checks.deterministic_sums_do_not_depend_on_the_order("native", cases.CASES[name](), orders)


def test_deterministic_sums_of_what_is_not_finite_are_not_numbers(ieee):
    call, tensors = cases.conv()
    tensors[0][0, 0, 0, 0] = float("inf")
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with cases.deterministic(), backend("native"):
        (gradient,) = torch.autograd.grad(call(*leaves), leaves[0], torch.full((2, 13, 7, 9), float("inf")))
    assert gradient.isnan().all()


def test_the_order_of_floating_point_sums_shows_without_that(ieee):
    """What the test above would not catch if additions were always in the same order."""
    runs = []
    for order in ("forward", "reversed"):
        torch.ops.cuda_on_cpu.order(order, 1)
        runs.append(cases.results(cases.gather(), "native", torch.float32)[1])
    assert not torch.equal(*runs)


@pytest.mark.parametrize("name", ["conv", "gather", "gather: shared"])
def test_more_images_than_a_launch_takes(name, ieee, monkeypatch):
    kernel_checks.more_images_than_a_launch_takes("native", name, monkeypatch)


def test_more_queries_than_a_launch_takes(monkeypatch):
    from bkd_fast.ops.memory_attention import cuda

    kernel_checks.more_queries_than_a_launch_takes("native", cuda, monkeypatch)


def test_logits_of_a_small_temperature_overflow_nothing():
    kernel_checks.logits_of_a_small_temperature_overflow_nothing("native")


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_gradients_that_are_asked_for(wanted, ieee):
    call, tensors = cases.conv()
    every = cases.results((call, tensors), "native", torch.float32)
    leaves = [tensor.detach().requires_grad_(index == wanted) for index, tensor in enumerate(tensors)]
    with backend("native"):
        output = call(*leaves)
        (gradient,) = torch.autograd.grad(output, leaves[wanted], cases.random(*output.shape, seed=9))
    assert torch.equal(gradient, every[1 + wanted])


def test_offsets_and_masks_of_another_type_keep_their_precision(monkeypatch):
    kernel_checks.offsets_and_masks_of_another_type_keep_their_precision("native")


def test_not_a_number_stays_where_it_is_read(ieee):
    kernel_checks.not_a_number_stays_where_it_is_read("native")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["conv", "gather", "gather: shared"])
def test_what_lies_outside_is_zero_whatever_the_border_holds(name, value, ieee):
    kernel_checks.what_lies_outside_is_zero_whatever_the_border_holds("native", name, value)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stays_where_it_belongs(value, ieee):
    """Groups of fewer channels than a tile has: the next group's are beside them."""
    case = cases.conv(1, 48, 12, groups=3, offset_groups=3)
    kernel_checks.a_gradient_that_is_not_finite_stays_where_it_belongs("native", case, value, exact=False)


def test_a_gradient_of_the_output_beyond_the_image_goes_nowhere(ieee):
    kernel_checks.a_gradient_of_the_output_beyond_the_image_goes_nowhere("native")


def test_offsets_that_are_not_numbers_show_in_exact_sums(ieee):
    kernel_checks.offsets_that_are_not_numbers_show_in_exact_sums("native")


def test_levels_of_different_types_are_compared_in_float32():
    kernel_checks.levels_of_different_types_are_compared_in_float32("native")


def test_not_a_number_stays_where_distances_are_raised():
    kernel_checks.not_a_number_stays_where_distances_are_raised("native")


def test_too_wide_a_smoothing_is_refused():
    call, tensors = cases.anomaly(sigma=2000.0)
    with backend("native"), pytest.raises(RuntimeError, match="CUDA kernels take up to 8 levels and sigma up to 1450"):
        call(*tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_launches_are_as_the_compile_gate_has_them(dtype):
    """The compiler knows neither the block size nor the dynamic shared memory."""
    for name in (
        "conv",
        "conv: a split depth",
        "conv: depthwise",
        "gather",
        "attention: a row that keeps all",
        "anomaly",
        "loss: flat",
        "loss: pixel",
    ):
        cases.results(cases.CASES[name](), "native", dtype)
    cases.matched(cases.match(), "native", dtype)
    for name in ("few neighbours", "many neighbours"):
        neighbor_cases.check_regression(name, "native", dtype)
    neighbor_cases.check_matches("some", "native")
    retrieval_cases.check_grid("whole cells", "native", dtype)
    retrieval_cases.check_match("two views", "native", dtype, False)
    retrieval_cases.check_residual("some", "native", dtype)
    nearest_cases.check("some", "native")
    standardize_cases.check("features", "channels_last", "native", dtype)
    join_cases.check("odd channels", "native", dtype)
    top_mean_cases.check("some", "normal", "native")
    activation_cases.check("odd channels", "contiguous", "native", dtype)
    scaled(torch.ones(9, dtype=dtype))
    launches = traffic.launches()
    assert set(KERNELS) <= set(launches)
    for kernel in KERNELS:
        threads, shared, _ = launches[kernel]
        assert threads == compiling.THREADS.get(kernel, 256)
        # Dynamic shared memory depends on the radius of the smoothing, and on the taps of a convolution.
        assert kernel in ("map_rows", "map_columns", "deform_conv") or shared == 0


def test_float64_runs_on_the_reference_and_a_chosen_backend_says_so():
    tensors = [tensor.double() for tensor in cases.conv()[1]]
    i, w, o, m, b = tensors
    modulated_deform_conv2d(i, o, w, b, padding=1, mask=m)
    message = "native backend has no modulated_deform_conv2d for cpu tensors of torch.float64"
    with backend("native"), pytest.raises(RuntimeError, match=message):
        modulated_deform_conv2d(i, o, w, b, padding=1, mask=m)
