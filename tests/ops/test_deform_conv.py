import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import deform_conv2d

from bkd_fast.ops import modulated_deform_conv2d, modulated_deform_gather, project_support
from bkd_fast.ops.deform_conv import Arguments, reference


def output_size(size, kernel, stride, padding, dilation):
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )


def case(
    batch=2, channels=6, outputs=4, size=(7, 8), kernel=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1),
    groups=2, offset_groups=3, reach=2.0, dtype=torch.float64, device="cpu", seed=0,
):  # fmt: skip
    """Arguments of one call, as torchvision's own tests have them; offsets keep away from whole pixels."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, columns = output_size(size, kernel, stride, padding, dilation)
    taps = offset_groups * kernel[0] * kernel[1]
    offset = (
        (reach * random(batch, 2 * taps, rows, columns)).round()
        + 0.1
        + 0.8 * torch.rand(batch, 2 * taps, rows, columns, generator=generator, dtype=torch.float64)
    )
    tensors = {
        "input": random(batch, channels, *size),
        "offset": offset,
        "weight": random(outputs, channels // groups, *kernel),
        "bias": random(outputs),
        "mask": torch.rand(batch, taps, rows, columns, generator=generator, dtype=torch.float64),
    }
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    return {name: value.to(device, dtype) for name, value in tensors.items()}, geometry


ONE, NONE = (1, 1), (0, 0)
CASES = {
    "groups, offset groups, stride, dilation": {},
    "plain 3 x 3": {"kernel": (3, 3), "stride": ONE, "padding": ONE, "dilation": ONE, "groups": 1, "offset_groups": 1},
    "even kernel": {"kernel": (2, 4), "stride": (1, 2), "padding": (2, 1), "dilation": ONE, "groups": 1},
    "1 x 1 kernel": {"kernel": ONE, "stride": ONE, "padding": NONE, "dilation": ONE, "groups": 1, "offset_groups": 1},
    "batch 0": {"batch": 0},
    "batch 33": {"batch": 33, "size": (5, 5)},
    "single pixel": {"size": ONE, "kernel": ONE, "stride": ONE, "padding": NONE, "dilation": ONE},
    "far outside": {"reach": 50.0},
}


def loop(input, offset, weight, bias, mask, stride, padding, dilation):
    """Eq. 2 and bilinear interpolation, one output at a time."""
    input, offset, weight, bias, mask = (value.numpy() for value in (input, offset, weight, bias, mask))
    batch, channels, height, width = input.shape
    outputs, part, kh, kw = weight.shape
    groups, offset_groups = channels // part, mask.shape[1] // (kh * kw)
    result = np.zeros((batch, outputs, *offset.shape[2:]))

    def pixel(n, c, y, x):
        return input[n, c, y, x] if 0 <= y < height and 0 <= x < width else 0.0

    for n, o, i, j in np.ndindex(*result.shape):
        total = bias[o]
        for p, (a, b) in itertools.product(range(part), itertools.product(range(kh), range(kw))):
            c = o // (outputs // groups) * part + p
            tap = c // (channels // offset_groups) * kh * kw + a * kw + b
            y = i * stride[0] - padding[0] + a * dilation[0] + offset[n, 2 * tap, i, j]
            x = j * stride[1] - padding[1] + b * dilation[1] + offset[n, 2 * tap + 1, i, j]
            top, left = int(np.floor(y)), int(np.floor(x))
            value = sum(
                (1 - abs(y - yy)) * (1 - abs(x - xx)) * pixel(n, c, yy, xx)
                for yy in (top, top + 1)
                for xx in (left, left + 1)
            )
            total += weight[o, p, a, b] * value * mask[n, tap, i, j]
        result[n, o, i, j] = total
    return torch.from_numpy(result)


@pytest.mark.parametrize(
    "name", ["groups, offset groups, stride, dilation", "plain 3 x 3", "even kernel", "far outside"]
)
def test_equals_a_loop_over_the_equation(name):
    tensors, geometry = case(**{"size": (5, 6), **CASES[name]})
    torch.testing.assert_close(modulated_deform_conv2d(**tensors, **geometry), loop(**tensors, **geometry))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("absent", [(), ("mask",), ("bias",), ("mask", "bias")])
def test_equals_torchvision_forward_and_backward(name, absent, device):
    tensors, geometry = case(device=device, **CASES[name])
    tensors = {key: None if key in absent else value.requires_grad_() for key, value in tensors.items()}
    given_ = [value for value in tensors.values() if value is not None]
    ours, theirs = modulated_deform_conv2d(**tensors, **geometry), deform_conv2d(**tensors, **geometry)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, given_, grad), torch.autograd.grad(theirs, given_, grad), strict=True
    ):
        torch.testing.assert_close(mine, other)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_equals_torchvision_on_any_small_shape(data):
    def pair(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups, offset_groups = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    kernel, dilation, padding = pair(1, 3), pair(1, 2), pair(0, 2)
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    tensors, geometry = case(
        batch=data.draw(st.integers(0, 3)), channels=2 * groups * offset_groups, outputs=2 * groups,
        size=tuple(n + data.draw(st.integers(0, 4)) for n in smallest), kernel=kernel, stride=pair(1, 2),
        padding=padding, dilation=dilation, groups=groups, offset_groups=offset_groups,
        seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    torch.testing.assert_close(modulated_deform_conv2d(**tensors, **geometry), deform_conv2d(**tensors, **geometry))


def test_gradients_are_derivatives():
    tensors, geometry = case(size=(5, 5), batch=1)
    inputs = [value.requires_grad_() for value in tensors.values()]

    def call(input, offset, weight, bias, mask):
        return modulated_deform_conv2d(input, offset, weight, bias, mask=mask, **geometry)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=False, atol=1e-6)


def test_only_the_gradients_asked_for_are_computed():
    tensors, geometry = case()
    grad = modulated_deform_conv2d(**tensors, **geometry)
    for wanted in range(5):
        needs = [index == wanted for index in range(5)]
        gradients = reference.modulated_deform_conv2d_backward(grad, Arguments(**tensors, **geometry), needs)
        assert [value.numel() > 0 for value in gradients] == needs


@pytest.mark.parametrize("value", [1e9, -1e9, 1e30, float("inf"), float("-inf")])
def test_offsets_beyond_everything_sample_nothing(value):
    tensors, geometry = case(dtype=torch.float32)
    tensors["offset"] = torch.full_like(tensors["offset"], value).requires_grad_()
    output = modulated_deform_conv2d(**tensors, **geometry)
    torch.testing.assert_close(output, tensors["bias"].view(1, -1, 1, 1).expand_as(output))
    (grad,) = torch.autograd.grad(output.sum(), tensors["offset"])
    assert not grad.any()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_gather_of_the_projection_is_the_convolution(shared, groups, device):
    """The convolution is linear in its input; further groups of taps (shots) add up."""
    batch, shots = 2, groups
    supports = torch.randn(shots, 1 if shared else batch, 4, 6, 7, dtype=torch.float64, device=device)
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64, device=device)
    offset = torch.randn(batch, shots, 18, 6, 7, dtype=torch.float64, device=device)
    mask = torch.rand(batch, shots, 9, 6, 7, dtype=torch.float64, device=device)
    projected = torch.cat([project_support(support, weight) for support in supports], dim=1)
    output = modulated_deform_gather(projected, offset.flatten(1, 2), mask.flatten(1, 2))
    expected = sum(
        deform_conv2d(support.expand(batch, -1, -1, -1), offset[:, shot], weight, padding=1, mask=mask[:, shot])
        for shot, support in enumerate(supports)
    )
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("groups", [2, 4])
def test_the_projection_of_a_convolution_with_groups(groups, device):
    support = torch.randn(2, 8, 6, 7, dtype=torch.float64, device=device)
    weight = torch.randn(12, 8 // groups, 3, 3, dtype=torch.float64, device=device)
    offset = torch.randn(2, 18, 6, 7, dtype=torch.float64, device=device)
    output = modulated_deform_gather(project_support(support, weight), offset)
    torch.testing.assert_close(output, modulated_deform_conv2d(support, offset, weight, padding=1))


@pytest.mark.parametrize("shape", [(12, 3, 3, 3), (9, 4, 3, 3), (12, 16, 3, 3)])
def test_weights_that_do_not_fit_a_support_are_refused(shape):
    with pytest.raises(ValueError, match=r"weight has shape .*, expected \(O, C / groups, kh, kw\)"):
        project_support(torch.randn(2, 8, 6, 7), torch.randn(shape))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_gather_gradients_are_derivatives(batch, masked):
    tensors, _ = case(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), offset_groups=2, size=(4, 5))
    projected = torch.randn(batch, 18 * 2, 4, 5, dtype=torch.float64, requires_grad=True)
    inputs = [projected, tensors["offset"].requires_grad_()] + ([tensors["mask"].requires_grad_()] if masked else [])
    assert torch.autograd.gradcheck(modulated_deform_gather, inputs, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_rounding(dtype, each_backend):
    """Positions and sums are float32, so that only inputs and output are rounded; torchvision rounds every sample.

    So do products of bfloat16 on a CPU, which sum in float32.
    """
    tensors, geometry = case(size=(12, 12), dtype=torch.float32, reach=4.0)
    rounded = {name: value if name == "offset" else value.to(dtype) for name, value in tensors.items()}
    exact = modulated_deform_conv2d(**{name: value.float() for name, value in rounded.items()}, **geometry)
    output = modulated_deform_conv2d(**rounded, **geometry)
    assert output.dtype == dtype
    if each_backend == "native" and dtype == torch.bfloat16:
        assert (output - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    else:
        torch.testing.assert_close(output, exact.to(dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_are_kept_and_do_not_matter(layout):
    tensors, geometry = case(dtype=torch.float32)
    expected = modulated_deform_conv2d(**tensors, **geometry)
    tensors["input"] = tensors["input"].contiguous(memory_format=layout).requires_grad_()
    output = modulated_deform_conv2d(**tensors, **geometry)
    assert output.is_contiguous(memory_format=layout)
    torch.testing.assert_close(output, expected)
    output.sum().backward()  # an expanded gradient
    assert tensors["input"].grad.is_contiguous(memory_format=layout)


def test_strided_arguments_are_taken_as_they_are():
    tensors, geometry = case()
    expected = modulated_deform_conv2d(**tensors, **geometry)
    strided = {
        name: value.repeat_interleave(2, dim=-1)[..., ::2] if value.ndim > 1 else value
        for name, value in tensors.items()
    }
    strided["input"] = tensors["input"].permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    torch.testing.assert_close(modulated_deform_conv2d(**strided, **geometry), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": torch.zeros(2, 6, 7, dtype=torch.float64)}, r"input has shape \(2, 6, 7\), expected \(N, C, H, W\)"),
        ({"input": torch.zeros(2, 6, 7, 8, dtype=torch.int64)}, "input is torch.int64"),
        ({"input": torch.zeros(2, 6, 7, 8, dtype=torch.float32)}, "float64 cannot be mixed"),
        ({"input": torch.zeros(2, 6, 7, 8, dtype=torch.float64, device="meta")}, "move both to one device"),
        ({"input": torch.zeros(2, 5, 7, 8, dtype=torch.float64)}, "expected weight.shape"),
        ({"offset": torch.zeros(2, 35, 3, 7, dtype=torch.float64)}, "offset has 35 channels, expected 2"),
        ({"offset": torch.zeros(2, 36, 4, 7, dtype=torch.float64)}, r"offset has shape \(2, 36, 4, 7\)"),
        ({"offset": torch.zeros(1, 36, 3, 7, dtype=torch.float64)}, r"offset has shape \(1, 36, 3, 7\)"),
        ({"mask": torch.zeros(2, 17, 3, 7, dtype=torch.float64)}, r"mask has shape .* expected \(2, 18, 3, 7\)"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, r"bias has shape \(3,\), expected \(4\)"),
        ({"stride": 0}, "stride is 0"),
        ({"padding": (1, 2, 3)}, r"padding is \(1, 2, 3\)"),
        ({"dilation": 9}, "smaller than the kernel"),
        ({"weight": None}, "weight is of type NoneType, expected a tensor"),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    tensors, geometry = case()
    with pytest.raises((TypeError, ValueError), match=words):
        modulated_deform_conv2d(**{**tensors, **geometry, **changes})


@pytest.mark.parametrize(
    ("shape", "offset", "words"),
    [
        ((2, 20, 4, 5), (2, 18, 4, 5), "20 channels, expected a multiple of the 9 taps"),
        ((3, 18, 4, 5), (2, 18, 4, 5), "batch 3, expected 1 or offset's 2"),
        ((1, 18, 4, 5), (2, 16, 4, 5), "expected a multiple of 2"),
        ((1, 18, 4, 5), (2, 18, 5, 5), r"offset has shape \(2, 18, 5, 5\)"),
    ],
)
def test_what_does_not_fit_the_gather_is_named(shape, offset, words):
    with pytest.raises(ValueError, match=words):
        modulated_deform_gather(torch.zeros(shape), torch.zeros(offset))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("channels", [3, 19])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_lies_outside_is_zero_as_torchvision_has_it(value, channels, layout, device):
    """The border holds Inf or NaN, and samples reach beyond it: forward and all gradients."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    input, weight, bias = random(2, channels, 7, 9), random(5, channels, 3, 3), random(5)
    offset, mask = 3 * random(2, 18, 7, 9), random(2, 9, 7, 9)
    input[:, 1, 0, 0], input[:, 0, -1, :], input[:, 2, :, -1] = value, value, value
    offset[0, :, 2, 3] = -100.0
    grad = random(2, 5, 7, 9).to(device)
    results = []
    for function in (modulated_deform_conv2d, deform_conv2d):
        tensors = [input.contiguous(memory_format=layout), offset, weight, bias, mask]
        leaves = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
        output = function(*leaves[:4], padding=1, mask=leaves[4])
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    assert results[1][0].isfinite().any()
    assert not results[1][0].isfinite().all()
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, equal_nan=True)
