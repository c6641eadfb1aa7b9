"""Every Triton kernel, option and block size against the reference, in Triton's interpreter.

float32 and float16; of bfloat16 the interpreter makes something else (its 16 bits are taken for a number), so that
type is left to the compile gate (tools/triton_gate) and to a device (tests/ops/test_cuda.py).
"""

from functools import partial

import activation_cases
import cases
import join_cases
import kernel_checks
import nearest_cases
import neighbor_cases
import pytest
import standardize_cases
import top_mean_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_fast.ops import backend, cosine_anomaly_map, modulated_deform_conv2d, sparse_memory_attention, triton_common
from bkd_fast.ops.deform_gather import triton as gather_kernels
from bkd_fast.ops.memory_attention import triton as attention_kernels
from bkd_fast.ops.neighbor_regression import neighbor_regression
from bkd_fast.ops.neighbor_regression.reference import combined

pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide):RuntimeWarning")  # numpy, of NaN and infinity
TYPES = [torch.float32, torch.float16]


def agree(case, dtype):
    case = cases.rounded(case, dtype)
    exact, plain = cases.results(case, "reference", torch.float64), cases.results(case, "reference", dtype)
    cases.check(cases.results(case, "triton", dtype), plain, exact, cases.ROUNDING[dtype])


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("dtype", TYPES, ids=["float32", "float16"])
def test_the_kernels_agree_with_the_reference(name, dtype):
    agree(cases.CASES[name](), dtype)


@pytest.mark.parametrize("name", cases.MATCHES)
@pytest.mark.parametrize("dtype", TYPES, ids=["float32", "float16"])
def test_matching_agrees_with_the_reference(name, dtype):
    case = cases.MATCHES[name]()
    cases.check_match(cases.matched(case, "triton", dtype), case, dtype)


@pytest.mark.parametrize("number", range(1, 4))
def test_matching_in_other_block_sizes_agrees_too(number, monkeypatch):
    monkeypatch.setattr(triton_common.Tuned, "__call__", lambda tuned, kind="any": other(tuned, kind, number))
    case = cases.match(channels=70, size=(6, 7))
    cases.check_match(cases.matched(case, "triton", torch.float16), case, torch.float16)


def test_a_shot_that_is_no_image_is_not_read():
    kernel_checks.a_shot_that_is_no_image_is_not_read("triton")


def other(tuned, kind, number):
    """A kernel in its configuration of a number, or in its last one."""
    configs = tuned.kinds[kind]
    return triton_common.triton.autotune([configs[min(number, len(configs) - 1)]], key=[])(tuned.kernel)


@pytest.mark.parametrize("number", range(1, 5))
@pytest.mark.parametrize(
    "name", ["conv: more groups than offset groups", "gather", "attention", "anomaly", "loss: pixel"]
)
def test_other_block_sizes_agree_too(name, number, monkeypatch):
    """The first configuration of each kernel is what the interpreter takes; these are the others."""
    monkeypatch.setattr(triton_common.Tuned, "__call__", lambda tuned, kind="any": other(tuned, kind, number))
    agree(cases.CASES[name](), torch.float16)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 2), inputs=st.integers(1, 36), outputs=st.integers(1, 70), height=st.integers(1, 4),
    width=st.integers(1, 5), tall=st.integers(1, 2), wide=st.integers(1, 2), half=st.booleans(),
)  # fmt: skip
def test_convolutions_of_any_size_agree(batch, inputs, outputs, height, width, tall, wide, half):
    dtype = torch.float16 if half else torch.float32
    case = cases.conv(batch, inputs, outputs, (height + 1, width + 2), (tall, wide))
    if batch == 0:
        found = cases.results(case, "triton", dtype)
        assert found[0].shape[0] == 0
        assert not any(value.any() for value in found[1:])
    else:
        agree(case, dtype)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 80), items=st.integers(1, 140), channels=st.integers(1, 80), renormalize=st.booleans(),
    half=st.booleans(),
)  # fmt: skip
def test_memories_of_any_size_agree(rows, items, channels, renormalize, half):
    agree(
        cases.attention(rows, items, channels, 0.0, renormalize=renormalize), torch.float16 if half else torch.float32
    )


@pytest.mark.parametrize("name", ["gather", "gather: shared", "attention", "anomaly", "loss: flat", "loss: pixel"])
def test_an_empty_batch_gives_empty_results(name):
    call, tensors = cases.CASES[name]()
    shared = {"gather: shared": (0,), "attention": (1,)}.get(name, ())
    leaves = [tensor if index in shared else tensor[:0] for index, tensor in enumerate(tensors)]
    found = cases.results((call, leaves), "triton", torch.float32)
    assert found[0].numel() == 0 or found[0] == 0
    assert [value.shape for value in found[1:]] == [leaf.shape for leaf in leaves]
    assert not any(value.any() for value in found[1:])


@pytest.mark.parametrize("name", ["conv", "gather", "attention", "anomaly", "loss: flat", "loss: pixel"])
def test_any_strides_are_accepted(name):
    call, tensors = cases.CASES[name]()
    spread = [
        tensor.repeat_interleave(2, -1)[..., ::2].transpose(0, -1).contiguous().transpose(0, -1) for tensor in tensors
    ]
    assert not all(tensor.is_contiguous() for tensor in spread)
    found, expected = (cases.results((call, given), "triton", torch.float32) for given in (spread, tensors))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["conv: groups", "gather: shared", "gather"])
def test_deterministic_sums_agree(name):
    torch.use_deterministic_algorithms(True)
    try:
        agree(cases.CASES[name](), torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_sums_are_whole_numbers(monkeypatch):
    """So that no order of the additions can show; and of what is not finite they are no numbers."""
    accumulators = []
    original = gather_kernels.Accumulator

    def kept(*arguments):
        accumulators.append(original(*arguments))
        return accumulators[-1]

    monkeypatch.setattr(gather_kernels, "Accumulator", kept)
    call, tensors = cases.gather()
    torch.use_deterministic_algorithms(True)
    try:
        cases.results((call, tensors), "triton", torch.float32)
        tensors[2][0, 0, 0, 0] = float("inf")
        found = cases.results((call, tensors), "triton", torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [sums.buffer.dtype for sums in accumulators] == [torch.int64] * 2
    assert accumulators[0].buffer.any()
    assert found[1].isnan().all()


@pytest.mark.parametrize("name", ["conv", "gather", "gather: shared"])
def test_more_images_than_a_launch_takes(name, monkeypatch):
    kernel_checks.more_images_than_a_launch_takes("triton", name, monkeypatch)


def test_more_queries_than_a_launch_takes(monkeypatch):
    kernel_checks.more_queries_than_a_launch_takes("triton", attention_kernels, monkeypatch)


def test_logits_of_a_small_temperature_overflow_nothing():
    kernel_checks.logits_of_a_small_temperature_overflow_nothing("triton")


def test_more_levels_than_are_fused_at_a_time():
    teacher = [cases.random(1, 5, size, size, seed=size) for size in range(2, 8)]
    student = [cases.random(1, 5, size, size, seed=10 + size) for size in range(2, 8)]
    for fusion in ("product", "sum"):
        found, expected = [], []
        for name, kept in (("triton", found), ("reference", expected)):
            with backend(name):
                kept.append(cosine_anomaly_map(teacher, student, (9, 11), fusion=fusion, sigma=1.0))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["conv", "gather", "attention", "anomaly", "loss: flat"])
def test_only_the_gradients_that_are_asked_for(name):
    call, tensors = cases.CASES[name]()
    every = cases.results((call, tensors), "triton", torch.float32)
    for wanted in range(len(tensors)):
        leaves = [tensor.detach().requires_grad_(index == wanted) for index, tensor in enumerate(tensors)]
        with backend("triton"):
            output = call(*leaves)
            grad = cases.random(*output.shape, seed=9) if output.shape else torch.ones_like(output)
            (found,) = torch.autograd.grad(output, leaves[wanted], grad)
        torch.testing.assert_close(found, every[1 + wanted])


def test_offsets_and_masks_of_another_type_keep_their_precision():
    kernel_checks.offsets_and_masks_of_another_type_keep_their_precision("triton")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["conv", "gather", "gather: shared"])
def test_what_lies_outside_is_zero_whatever_the_border_holds(name, value):
    kernel_checks.what_lies_outside_is_zero_whatever_the_border_holds("triton", name, value)


def test_a_gradient_of_the_output_beyond_the_image_goes_nowhere():
    kernel_checks.a_gradient_of_the_output_beyond_the_image_goes_nowhere("triton")


def test_offsets_that_are_not_numbers_show_in_exact_sums():
    kernel_checks.offsets_that_are_not_numbers_show_in_exact_sums("triton")


def test_not_a_number_stays_where_it_is_read():
    kernel_checks.not_a_number_stays_where_it_is_read("triton")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_positions_far_out_read_nothing_and_unknown_ones_are_not_numbers(value):
    call, tensors = cases.conv(1, 8, 4, (6, 6), kernel=(1, 1), bias=False)
    tensors[2][0, :, 3, 3] = value
    found, expected = (cases.results((call, tensors), name, torch.float32) for name in ("triton", "reference"))
    assert found[0][0, :, 3, 3].isnan().all() == (value != value)
    # Where a position is unknown the reference gives its gradient to the image's first pixel, the kernel to none.
    for one, other in zip(found[:1] if value != value else found, expected, strict=False):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_levels_of_different_types_are_compared_in_float32():
    kernel_checks.levels_of_different_types_are_compared_in_float32("triton")


def test_not_a_number_stays_where_distances_are_raised():
    kernel_checks.not_a_number_stays_where_distances_are_raised("triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_that_it_cannot_do_are_refused(dtype):
    i, w, o, m, b = (tensor.to(dtype) for tensor in cases.conv()[1])
    message = f"triton backend has no modulated_deform_conv2d for cpu tensors of {dtype}"
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        modulated_deform_conv2d(i, o, w, b, padding=1, mask=m)


@pytest.mark.parametrize("name", ["conv", "gather", "attention", "anomaly", "loss: pixel"])
def test_operators_are_as_pytorch_wants_them(name):
    call, tensors = cases.CASES[name]()
    for function, arguments in cases.recorded(call, [tensor.requires_grad_() for tensor in tensors], "triton"):
        with backend("triton"):
            torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))


def test_memory_larger_than_a_block_of_shared_memory_agrees():
    query, memory = cases.random(3, 8), cases.random(2000, 8, seed=1)
    with backend("triton"):
        found = sparse_memory_attention(query, memory, 0.0005, 0.5, True)
    with backend("reference"):
        torch.testing.assert_close(found, sparse_memory_attention(query, memory, 0.0005, 0.5, True))


def test_vectors_shorter_than_the_least_norm_have_its_gradient():
    """The product of their lengths is below 1e-8, which the cosine then divides by: a constant."""
    call, (query, memory) = cases.attention(7, 9, 8)
    found, expected = (
        cases.results((call, [1e-5 * query, 1e-5 * memory]), name, torch.float32) for name in ("triton", "reference")
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", activation_cases.LAYOUTS)
@pytest.mark.parametrize("shape", activation_cases.SHAPES)
def test_bias_and_activation(shape, layout, dtype):
    activation_cases.check(shape, layout, "triton", dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", join_cases.SHAPES)
def test_levels_are_joined(name, dtype):
    join_cases.check(name, "triton", dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", standardize_cases.LAYOUTS)
@pytest.mark.parametrize("name", standardize_cases.SHAPES)
def test_features_are_standardized(name, layout, dtype):
    standardize_cases.check(name, layout, "triton", dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", neighbor_cases.REGRESSIONS)
def test_rows_are_combined(name, dtype):
    neighbor_cases.check_regression(name, "triton", dtype)


def test_more_neighbours_than_the_kernel_takes_are_combined_too():
    query, bank, _ = neighbor_cases.regression("many neighbours")
    neighbors = torch.arange(20).expand(len(query), -1)
    with backend("triton"):
        result = neighbor_regression(query, bank, neighbors)
    torch.testing.assert_close(result, combined(query, bank, neighbors, 0.3))


@pytest.mark.parametrize("name", neighbor_cases.MATCHES)
def test_matches_are_selected(name):
    neighbor_cases.check_matches(name, "triton")


@pytest.mark.parametrize("name", nearest_cases.SHAPES)
def test_the_nearest_rows_are_found_in_order(name):
    nearest_cases.check(name, "triton")


@pytest.mark.parametrize("kind", top_mean_cases.KINDS)
@pytest.mark.parametrize("name", top_mean_cases.SHAPES)
def test_the_mean_of_the_largest(name, kind):
    top_mean_cases.check(name, kind, "triton")


@pytest.mark.parametrize(
    "check",
    [
        activation_cases.check_not_a_number,
        activation_cases.check_views,
        standardize_cases.check_not_a_number,
        neighbor_cases.check_missing_rows,
        neighbor_cases.check_not_a_number,
        nearest_cases.check_not_finite,
        top_mean_cases.check_not_finite,
        top_mean_cases.check_repeats,
        partial(nearest_cases.check, "some", dtype=torch.float16),
        partial(top_mean_cases.check, "some", "normal", dtype=torch.float16),
    ],
)
def test_what_every_backend_must_do(check):
    check(chosen="triton")


def test_parts_of_the_queries_give_the_same(monkeypatch):
    nearest_cases.check_parts("triton", monkeypatch)
