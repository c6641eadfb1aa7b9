"""Groups of few channels: forward and all gradients on kernels of their own, which the tests of every operator reach
with few of their shapes."""

import cases
import kernel_checks
import pytest
import torch

from bkd_fast.ops import backend
from tools.cuda_on_cpu import traffic

TYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = ("deform_conv_few", "deform_conv_few_backward", "deform_conv_few_weight")

FEW = {
    "depthwise": lambda: cases.conv(1, 72, 72, groups=72),
    "depthwise, offset groups": lambda: cases.conv(1, 30, 30, (4, 5), groups=30, offset_groups=3, offsets_last=True),
    "depthwise, 24 outputs": lambda: cases.conv(1, 6, 144, (4, 5), groups=6, mask=False),
    "depthwise, many taps": lambda: cases.conv(1, 40, 40, (7, 6), (5, 7), groups=40),
    "depthwise, no padding of 1 x 1": lambda: cases.conv(2, 16, 16, (3, 4), (1, 1), groups=16, bias=False),
    "two channels": lambda: cases.conv(1, 20, 30, (9, 8), groups=10, offset_groups=2, stride=2, dilation=2),
    "three channels": lambda: cases.conv(1, 42, 56, (5, 6), groups=14, offset_groups=2, last=False),
    "four channels": lambda: cases.conv(1, 72, 36, (5, 6), groups=18, offset_groups=3),
    "five channels": lambda: cases.conv(1, 15, 33, (5, 6), groups=3, offset_groups=3),
    "eight channels": lambda: cases.conv(2, 80, 80, (4, 5), groups=10),
    "eight channels, 24 outputs": lambda: cases.conv(1, 16, 48, (4, 5), groups=2, offset_groups=2),
    "one group": lambda: cases.conv(1, 7, 3, (4, 5)),
}


@pytest.fixture
def only_few(on_cpu):
    """Nothing may run on tiles."""
    torch.ops.cuda_on_cpu.wgmma(False)  # forgets the launches so far
    yield
    launched = [name for name in traffic.launches() if name.startswith("deform_conv")]
    assert set(launched) <= set(KERNELS)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", TYPES)
def test_few_channels_agree_with_the_reference(name, dtype, order, only_few):
    case = cases.rounded(FEW[name](), dtype)
    exact, plain = cases.results(case, "reference", torch.float64), cases.results(case, "reference", dtype)
    cases.check(cases.results(case, "native", dtype), plain, exact, cases.ROUNDING[dtype])
    assert set(KERNELS) <= set(traffic.launches())


@pytest.mark.parametrize("name", ["three channels", "eight channels, 24 outputs"])
def test_gradients_of_few_channels_are_derivatives(name, only_few):
    """Of the kernels' own output, by central differences in random directions; positions keep away from pixels."""
    call, tensors = FEW[name]()
    tensors[2] = (
        tensors[2].round() + 0.2 + 0.6 * torch.rand(tensors[2].shape, generator=torch.Generator().manual_seed(5))
    )
    output, *gradients = cases.results((call, tensors), "native", torch.float32)
    grad = cases.random(*output.shape, seed=9).double()
    for index, gradient in enumerate(gradients):
        direction, step = cases.random(*tensors[index].shape, seed=20 + index), 0.02
        moved = []
        for sign in (1, -1):
            others = [*tensors]
            others[index] = tensors[index] + sign * step * direction
            with backend("native"), torch.no_grad():
                moved.append((call(*others).double() * grad).sum())
        slope = (moved[0] - moved[1]).item() / (2 * step)
        expected = (gradient.double() * direction.double()).sum().item()
        size = gradient.double().norm().item() * direction.double().norm().item()
        assert abs(slope - expected) <= 2e-3 * size, f"gradient {index} is {expected}, the slope {slope}"


@pytest.mark.parametrize("name", ["depthwise", "three channels", "eight channels, 24 outputs"])
def test_deterministic_sums_of_few_channels_do_not_depend_on_the_order(name, only_few):
    orders = (("forward", 1), ("reversed", 1), ("random", 1), ("random", 2))
    kernel_checks.deterministic_sums_do_not_depend_on_the_order("native", FEW[name](), orders)


@pytest.mark.parametrize("wanted", range(5))
def test_few_channels_have_only_the_gradients_that_are_asked_for(wanted, only_few):
    call, tensors = FEW["three channels"]()
    every = cases.results((call, tensors), "native", torch.float32)
    torch.ops.cuda_on_cpu.wgmma(False)
    leaves = [tensor.detach().requires_grad_(index == wanted) for index, tensor in enumerate(tensors)]
    with backend("native"):
        output = call(*leaves)
        (gradient,) = torch.autograd.grad(output, leaves[wanted], cases.random(*output.shape, seed=9))
    assert torch.equal(gradient, every[1 + wanted])
    launched = {"deform_conv_few"} | ({KERNELS[2]} if wanted == 1 else set() if wanted == 4 else {KERNELS[1]})
    assert {name for name in traffic.launches() if name.startswith("deform_conv")} == launched


def test_no_images_of_few_channels():
    results = cases.results(cases.conv(0, 8, 8, groups=8), "native", torch.float16)
    assert results[0].shape[0] == 0
    assert not any(value.any() for value in results[1:])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["conv: few channels a group", "conv: groups of eight channels"])
def test_few_channels_outside_are_zero_whatever_the_border_holds(name, value, only_few, monkeypatch):
    monkeypatch.setitem(cases.CASES, name, lambda: FEW["three channels" if "few" in name else "eight channels"]())
    kernel_checks.what_lies_outside_is_zero_whatever_the_border_holds("native", name, value)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["three channels", "five channels", "depthwise, offset groups"])
def test_a_gradient_that_is_not_finite_stays_where_it_belongs(name, value, only_few):
    kernel_checks.a_gradient_that_is_not_finite_stays_where_it_belongs("native", FEW[name](), value)


def test_more_images_of_few_channels_than_a_launch_takes(monkeypatch, only_few):
    monkeypatch.setitem(cases.CASES, "conv: depthwise", lambda: cases.conv(2, 5, 10, groups=5))
    kernel_checks.more_images_than_a_launch_takes("native", "conv: depthwise", monkeypatch)


def test_pixels_of_few_channels_are_split_over_multiprocessors(order, only_few):
    """Parts of the gradient by the weights, each with more pixels than a table has neighbours for."""
    case = cases.conv(1, 16, 16, (23, 29), (1, 1), groups=16, offset_groups=2)
    exact, plain = cases.results(case, "reference", torch.float64), cases.results(case, "reference", torch.float32)
    cases.check(cases.results(case, "native", torch.float32), plain, exact, cases.ROUNDING[torch.float32])
    assert traffic.launches()["deform_conv_few_weight"][2] == 3
