"""The emulation catches what a device would not forgive; and its tensor cores multiply as the PTX manual says."""

import itertools

import pytest
import torch


def run(name, x=None):
    x = torch.arange(64.0) if x is None else x
    torch.ops.cuda_on_cpu.run(name, x)
    return x


def test_shared_memory_and_barriers(order):
    assert torch.equal(run("mirror"), torch.arange(64.0).flip(0))


def test_a_missing_barrier_shows_in_some_order():
    wrong = []
    for order in ("forward", "reversed", "random"):
        torch.ops.cuda_on_cpu.order(order, 1)
        wrong.append(not torch.equal(run("no barrier"), torch.arange(64.0).flip(0)))
    assert all(wrong)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent", "divergent barrier: thread 0 waits at .*selftest.cu"),
        ("early end", "divergent barrier: .* thread 32 has ended"),
        ("half a warp", "deadlock: thread 0 waits at .*device.cuh"),
        ("too many", "mirror needs more blocks than a grid has"),
    ],
)
def test_what_never_ends_or_is_undefined_is_reported(name, message, order):
    with pytest.raises(RuntimeError, match=message):
        run(name)
    assert torch.equal(run("mirror"), torch.arange(64.0).flip(0))  # and the next kernel runs


def test_a_copy_is_there_after_its_wait_and_not_before(order):
    x = torch.arange(256.0)
    expected = x.view(64, 4) * (torch.arange(64) % 2 == 0).unsqueeze(1)
    assert torch.equal(run("copy", x.clone()), expected.flatten())
    assert run("no wait", x.clone()).isnan().all()


def test_exchanges_within_a_warp(order):
    lanes = torch.arange(64)
    other = lanes % 32 + 30
    down = torch.where(other < 32, lanes + 30, lanes)
    expected = 100.0 * (lanes // 32 * 32 + (lanes + 1) % 32) + down
    assert torch.equal(run("warp"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tensor", [True, False])
@pytest.mark.parametrize(("a_rows", "b_rows"), list(itertools.product([True, False], repeat=2)))
def test_tiles_are_multiplied(dtype, tensor, a_rows, b_rows):
    """Small whole numbers, which every type and TF32 hold exactly."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (64, 96), generator=generator).to(dtype) for _ in range(2))
    c = torch.full((64, 64), float("nan"))
    torch.ops.cuda_on_cpu.product(
        a if a_rows else a.t().contiguous(), b if b_rows else b.t().contiguous(), a_rows, b_rows, tensor, c
    )
    assert torch.equal(c, a.float() @ b.float().t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_as_torch_rounds_them(dtype):
    """Through a kernel that only converts: a gather at whole pixels of a float mask of one."""
    from bkd_fast.ops import backend, modulated_deform_gather

    bits = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = bits[bits.isfinite()].view(1, 8, -1, 1)
    with backend("native"):
        output = modulated_deform_gather(values, torch.zeros(1, 2, *values.shape[2:]), None, 1, 1, 0, 1)
    assert torch.equal(output, values)
