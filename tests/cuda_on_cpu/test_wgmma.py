"""The convolution on wgmma: the emulation itself, agreement with the reference, and when it runs."""

import cases
import pytest
import torch
import wgmma_cases

from bkd_fast.ops import backend, modulated_deform_conv2d
from bkd_fast.ops.deform_conv import cuda
from tools.cuda_gate import compiling
from tools.cuda_on_cpu import traffic

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def hopper(on_cpu):
    """A device of 9.0a, and an extension with code for it. No launches are recorded yet."""
    torch.ops.cuda_on_cpu.wgmma(True)
    yield
    torch.ops.cuda_on_cpu.wgmma(False)
    torch.ops.cuda_on_cpu.device(4, 164 * 1024, False)


@pytest.mark.parametrize("dtype", HALVES)
def test_wgmma_multiplies_as_the_manual_says(dtype, order):
    """Small whole numbers, which both types hold exactly."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (rows, 32), generator=generator).to(dtype) for rows in (64, 128))
    c = torch.ones(64, 128)
    torch.ops.cuda_on_cpu.wgmma_product(a, b, "", c)
    assert torch.equal(c, 1 + a.float() @ b.float().t())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no fence", "no fence before the products of a group"),
        ("a changes", "a changed before the wait"),
        ("b changes", "b changed before the wait"),
        ("no wait", "a block ended before its products"),
    ],
)
def test_what_wgmma_does_not_forgive_is_reported(fault, message, order):
    c = torch.zeros(64, 128)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cuda_on_cpu.wgmma_product(torch.ones(64, 32).half(), torch.ones(128, 32).half(), fault, c)


def test_accumulators_are_not_there_before_the_wait(order):
    c = torch.zeros(64, 128)
    torch.ops.cuda_on_cpu.wgmma_product(torch.ones(64, 32).half(), torch.ones(128, 32).half(), "read early", c)
    assert c.isnan().all()


def bulk(fault):
    x = torch.arange(256.0)
    torch.ops.cuda_on_cpu.bulk_copy(x, fault)
    return x


def test_bulk_copies_arrive_at_their_barriers(order):
    assert torch.equal(bulk(""), torch.arange(256.0).flip(0))


def test_bulk_copies_are_not_there_before_the_wait(order):
    with pytest.raises(RuntimeError, match="ended before its bulk copies arrived"):
        bulk("no wait")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no barrier", "it is not initialized"),
        ("few bytes", "deadlock: thread 0 waits at .*selftest_wgmma.cu"),
        ("one too many", "more threads arrive than it counts"),
    ],
)
def test_what_barriers_do_not_forgive_is_reported(fault, message, order):
    with pytest.raises(RuntimeError, match=message):
        bulk(fault)


@pytest.mark.parametrize("name", wgmma_cases.SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
def test_wgmma_agrees_with_the_reference(name, dtype, order, hopper):
    wgmma_cases.check(wgmma_cases.make(name), dtype)
    assert set(traffic.launches()) == {"deform_conv_arrange", "deform_conv_wgmma"}


@pytest.mark.parametrize("dtype", HALVES)
def test_wgmma_agrees_where_the_taps_need_several_windows(dtype, order, hopper):
    torch.ops.cuda_on_cpu.device(4, 102 * 1024, False)
    wgmma_cases.check(wgmma_cases.make("wgmma"), dtype)
    assert traffic.launches()["deform_conv_wgmma"][1] == 5 * 16384 + 128 + 5 * 4096


@pytest.mark.parametrize("name", ["wgmma", "wgmma: up to 128 outputs"])
def test_wgmma_agrees_where_a_warp_runs_ahead_of_the_others(name, hopper):
    """The first warp copies weights; it must not overwrite what the last one has not multiplied by."""
    torch.ops.cuda_on_cpu.order("eager", 0)
    wgmma_cases.check(wgmma_cases.make(name), torch.float16)


def test_weights_beyond_the_channels_of_a_step_do_not_count(hopper):
    """The depth of a step is filled with zeros, not with what follows: zero times infinity is no number."""
    call, tensors = wgmma_cases.make("wgmma: groups")  # 24 channels an offset group
    inputs = [tensor.half() for tensor in tensors]
    inputs[0][:, 24:48] = inputs[0][:, 72:] = 1
    inputs[1][:, 24:] = torch.inf
    with torch.no_grad():
        with backend("native"), cuda.wgmma(True):
            own = call(*inputs)
        with backend("reference"):
            expected = call(*inputs)
    assert torch.equal(own.isnan(), expected.isnan())
    assert own.isinf().any()


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(("channels", "side"), [(256, 64), (512, 32), (1024, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_wgmma_runs_where_large_tiles_fill_an_h100(batch, channels, side, dtype, hopper):
    torch.ops.cuda_on_cpu.device(132, 228 * 1024, True)
    image, offset, mask = (torch.zeros(batch, count, side, side, dtype=dtype) for count in (channels, 18, 9))
    weight = torch.zeros(channels, channels, 3, 3, dtype=dtype)
    with backend("native"), cuda.wgmma(True):
        modulated_deform_conv2d(image, offset, weight, None, padding=1, mask=mask)
    launched = traffic.launches()
    if dtype == torch.float32 or batch == 1:
        assert "deform_conv_wgmma" not in launched
    else:
        # As the compile gate has it.
        shared = compiling.dynamic_shared("deform_conv_wgmma<half, 256>")
        tiles = batch * side * side // 128 * channels // 256
        assert launched == {
            "deform_conv_arrange": (256, 0, 9 * channels // 32 * channels // 256),
            "deform_conv_wgmma": (256, shared, tiles),
        }


def test_tiles_of_64_outputs_do_not_run_on_wgmma(hopper):
    torch.ops.cuda_on_cpu.device(4, 164 * 1024, True)
    call, tensors = cases.conv(1, 40, 64, (32, 33))
    with backend("native"), cuda.wgmma(True), torch.no_grad():
        call(*(tensor.half() for tensor in tensors))
    assert set(traffic.launches()) == {"deform_conv"}


@pytest.mark.parametrize(
    ("device", "variable", "runs"),
    [(True, None, False), (True, "0", False), (True, "1", True), (False, "1", False)],
)
def test_it_is_off_by_default_and_the_variable_switches_it_on(device, variable, runs, hopper, monkeypatch):
    torch.ops.cuda_on_cpu.wgmma(device)
    torch.ops.cuda_on_cpu.device(4, 164 * 1024, True)
    if variable is None:
        monkeypatch.delenv(cuda.WGMMA, raising=False)
    else:
        monkeypatch.setenv(cuda.WGMMA, variable)
    call, tensors = wgmma_cases.make("wgmma: one step")
    inputs = [tensor.half() for tensor in tensors]
    assert cuda.has_wgmma(inputs[0]) is device
    with backend("native"), torch.no_grad():
        call(*inputs)
    assert ("deform_conv_wgmma" in traffic.launches()) is runs
    assert ("deform_conv" in traffic.launches()) is not runs


def test_another_value_of_the_variable_is_refused(on_cpu, monkeypatch):
    monkeypatch.setenv(cuda.WGMMA, "yes")
    call, tensors = wgmma_cases.make("wgmma: one step")
    with (
        backend("native"),
        torch.no_grad(),
        pytest.raises(RuntimeError, match="BKD_FAST_WGMMA is 'yes', expected 0 or 1"),
    ):
        call(*(tensor.half() for tensor in tensors))
