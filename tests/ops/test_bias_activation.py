"""Bias, shortcut and activation of a convolution, on every backend of the CPU."""

import math

import activation_cases
import pytest
import torch
from torch import nn

from bkd_fast.ops.bias_activation import bias_activation


@pytest.mark.parametrize("shape", activation_cases.SHAPES)
@pytest.mark.parametrize("layout", activation_cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_reference(shape, layout, dtype, each_backend):
    activation_cases.check(shape, layout, each_backend, dtype)


def test_not_a_number_stays(each_backend):
    activation_cases.check_not_a_number(each_backend)


def test_views_give_what_copies_give(each_backend):
    activation_cases.check_views(each_backend)


@pytest.mark.parametrize(
    ("activation", "limits"), [(nn.ReLU(), "relu"), (nn.ReLU6(), "relu6"), (nn.Identity(), "none")]
)
def test_is_what_follows_a_convolution(activation, limits):
    convolution, x = nn.Conv2d(3, 5, 3), 9 * torch.randn(2, 3, 8, 7)
    with torch.no_grad():
        shortcut = torch.randn_like(convolution(x))
        expected = activation(convolution(x) + shortcut)
        product = nn.functional.conv2d(x, convolution.weight)
        result = bias_activation(product, convolution.bias, shortcut, *activation_cases.LIMITS[limits])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 3, 4)}, ValueError, r"x has shape \(2, 3, 4\), expected \(N, C, H, W\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\), expected \(3\)"),
        ({"bias": torch.ones(3).half()}, TypeError, "bias is torch.float16, expected torch.float32, the dtype of x"),
        ({"bias": torch.ones(3).double()}, TypeError, "float64 cannot be mixed"),
        ({"residual": torch.ones(2, 3, 1, 1)}, ValueError, r"residual has shape .* expected \(2, 3, 4, 5\)"),
        ({"residual": 1.0}, TypeError, "residual is of type float, expected a tensor"),
        ({"low": 2.0, "high": 1.0}, ValueError, "low is 2.0 and high is 1.0, expected two numbers, low at most high"),
        ({"high": math.nan}, ValueError, "high is nan"),
        ({"x": None}, TypeError, "x is of type NoneType, expected a tensor"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    arguments = {"x": torch.ones(2, 3, 4, 5), "bias": torch.ones(3), "residual": None, "low": 0.0, "high": 6.0}
    with pytest.raises(error, match=message):
        bias_activation(**{**arguments, **change})
