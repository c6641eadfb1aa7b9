"""Grids at batch 1 on a device of an H100's size, small shared memory, and sectors of memory."""

import math

import cases
import pytest
import torch

from bkd_fast.ops import backend, modulated_deform_conv2d
from tools.cuda_gate import compiling
from tools.cuda_on_cpu import traffic

H100 = 132  # multiprocessors
LEVELS = ((256, 64), (512, 32), (1024, 16))  # channels and side of WideResNet50's levels
RESNET18 = ((64, 64), (128, 32), (256, 16))


@pytest.fixture
def h100(on_cpu):
    """Launches are recorded, not run."""
    torch.ops.cuda_on_cpu.device(H100, 228 * 1024, True)
    yield
    torch.ops.cuda_on_cpu.device(4, 164 * 1024, False)


@pytest.mark.parametrize(("channels", "side"), LEVELS)
@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_convolution_of_one_image_fills_the_device(channels, side, group, dtype, h100):
    assert blocks(channels, side, group or channels, dtype) >= 2 * H100


@pytest.mark.parametrize(("channels", "side"), LEVELS + RESNET18)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_triton_splits_the_depth_by_the_same_rule(channels, side, groups, h100):
    pytest.importorskip("triton")
    from bkd_fast.ops.deform_conv.triton import parts_of_depth

    part = channels // groups
    programs = math.ceil(side**2 / 64) * groups * math.ceil(part / 128)
    parts = parts_of_depth(side**2, groups, part, 9 * part, H100)
    assert blocks(channels, side, part, torch.float16) == programs * parts


def blocks(channels, side, group, dtype):
    """Of the forward pass of a convolution of one image."""

    def zeros(*shape):
        return torch.zeros(shape, dtype=dtype)

    weight = zeros(channels, group, 3, 3)
    image, offset, mask = (zeros(1, count, side, side) for count in (channels, 18, 9))
    with backend("native"):
        modulated_deform_conv2d(image, offset, weight, None, padding=1, mask=mask)
    return traffic.launches()["deform_conv"][2]


@pytest.mark.parametrize(("batch", "rows", "blocks"), [(1, 64, 256), (16, 128, 512)])
def test_the_first_level_of_resnet18_has_the_tile_that_fills_the_device(batch, rows, blocks, h100):
    image, offset, mask = (torch.zeros(batch, count, 64, 64, dtype=torch.float16) for count in (64, 18, 9))
    weight = torch.zeros(64, 64, 3, 3, dtype=torch.float16)
    with backend("native"):
        modulated_deform_conv2d(image, offset, weight, None, padding=1, mask=mask)
    unused = {1: 5 * 32 * rows, 16: 0}[batch]  # a part of the depth has the neighbours of four taps
    shared = compiling.dynamic_shared(f"deform_conv<half, yes, {rows}, 64>") - unused
    assert traffic.launches()["deform_conv"] == (256, shared, blocks)


@pytest.mark.parametrize("name", ["conv", "conv: groups", "conv: large tiles"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolutions_agree_with_the_reference_in_small_shared_memory(name, dtype, order):
    """64 KB, as on Turing: the taps' neighbours are computed in several windows."""
    case = cases.rounded(cases.CASES[name](), dtype)
    exact, plain = cases.results(case, "reference", torch.float64), cases.results(case, "reference", dtype)
    torch.ops.cuda_on_cpu.device(4, 64 * 1024, False)
    try:
        cases.check(cases.results(case, "native", dtype), plain, exact, cases.ROUNDING[dtype])
    finally:
        torch.ops.cuda_on_cpu.device(4, 164 * 1024, False)


def test_a_convolution_and_its_gradients_move_whole_sectors():
    forward, backward = traffic.conv(128, (8, 8)), traffic.gradients(128, (8, 8), [True, True, False, False, True])
    with backend("native"), torch.no_grad():
        for call in (forward, backward):
            moved = traffic.count(call)
            assert moved.sectors * 32 <= 1.05 * moved.asked
            assert moved.passes == moved.least


@pytest.mark.parametrize("groups", [256, 32])
def test_convolutions_of_few_channels_move_whole_sectors(groups, on_cpu):
    """A group is a channel, or eight."""
    size = (8, 8)
    backward = traffic.gradients(256, size, [True, True, False, False, True], groups)
    weights = traffic.gradients(256, size, [False, False, True, False, False], groups)
    # Both halves of a warp ask for the outputs' gradients and the weights, each of which moves once.
    twice = 64 * 9 * 256 * 2 * (1 + 256 // groups)
    with backend("native"), torch.no_grad():
        for call, again, most in ((traffic.conv(256, size, groups), 0, 1.1), (backward, twice, 1.1), (weights, 0, 1.4)):
            moved = traffic.count(call)
            assert moved.sectors * 32 <= 1.05 * (moved.asked - again)
            assert moved.passes <= most * moved.least
    assert {"deform_conv_few", "deform_conv_few_backward", "deform_conv_few_weight"} <= set(traffic.launches())
