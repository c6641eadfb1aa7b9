"""The mean of the largest values, on every backend of the CPU."""

import pytest
import top_mean_cases
import torch

from bkd_fast.ops.cpu_common import simd_tiers
from bkd_fast.ops.top_mean import top_mean


@pytest.mark.parametrize("kind", top_mean_cases.KINDS)
@pytest.mark.parametrize("name", top_mean_cases.SHAPES)
def test_is_the_mean_of_the_largest(name, kind, each_backend):
    top_mean_cases.check(name, kind, each_backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["some", "more than a buffer holds"])
def test_other_types_give_their_results(name, dtype, each_backend):
    top_mean_cases.check(name, "normal", each_backend, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_not_a_number_and_infinities_stay_in_their_row(dtype, each_backend):
    top_mean_cases.check_not_finite(each_backend, dtype=dtype)


def test_a_call_repeats_bit_for_bit(each_backend):
    top_mean_cases.check_repeats(each_backend)


@pytest.mark.parametrize("tier", simd_tiers())
@pytest.mark.parametrize("kind", top_mean_cases.KINDS)
def test_every_instruction_set_selects_the_same(kind, tier, monkeypatch):
    monkeypatch.setenv("BKD_FAST_SIMD", tier)
    for name in ("more than a buffer holds", "most of many"):
        top_mean_cases.check(name, kind, "native")
    top_mean_cases.check_not_finite("native")


def test_rows_need_not_be_adjacent(each_backend):
    values, count = top_mean_cases.problem("some")
    expected = top_mean_cases.run(values, count, each_backend)
    assert torch.equal(top_mean_cases.run(values.T.contiguous().T, count, each_backend), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": 1}, TypeError, "values is of type int, expected a tensor"),
        ({"values": torch.ones(2, 3).long()}, TypeError, "values is torch.int64, expected float16"),
        ({"values": torch.ones(3)}, ValueError, r"values has shape \(3,\), expected \(N, P\)"),
        ({"count": 0}, ValueError, "count is 0, expected an integer from 1 to 3"),
        ({"count": 4}, ValueError, "count is 4, expected an integer from 1 to 3"),
        ({"count": -(2**62)}, ValueError, "expected an integer from 1 to 3"),
        ({"count": True}, ValueError, "count is True, expected an integer"),
        ({"count": 1.0}, ValueError, "count is 1.0, expected an integer"),
        ({"values": torch.ones(2, 0)}, ValueError, "count is 1, expected an integer from 1 to 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    with pytest.raises(error, match=message):
        top_mean(**{"values": torch.ones(2, 3), "count": 1, **change})
