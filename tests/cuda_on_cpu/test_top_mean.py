"""The mean of the largest values: the CUDA kernel, run on the CPU."""

import pytest
import top_mean_cases
import torch


@pytest.mark.parametrize("kind", top_mean_cases.KINDS)
@pytest.mark.parametrize("name", top_mean_cases.SHAPES)
def test_is_the_mean_of_the_largest(name, kind, order):
    top_mean_cases.check(name, kind, "native")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, order):
    top_mean_cases.check("some", "normal", "native", dtype=dtype)


def test_not_a_number_and_infinities_stay_in_their_row(order):
    top_mean_cases.check_not_finite("native")


def test_a_call_repeats_bit_for_bit(order):
    top_mean_cases.check_repeats("native")


def test_the_order_of_threads_does_not_matter():
    values, count = top_mean_cases.problem("more than a buffer holds")
    results = []
    for order in ("forward", "reversed", "random"):
        torch.ops.cuda_on_cpu.order(order, 1)
        results.append(top_mean_cases.run(values, count, "native"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
