"""What the kernels of either GPU backend must do alike, whichever way the CPU runs them."""

import cases
import pytest
import torch

from bkd_fast.ops import backend, layout
from bkd_fast.ops.memory_attention import gpu


def more_images_than_a_launch_takes(chosen, name, monkeypatch):
    case = cases.CASES[name]()
    whole = cases.results(case, chosen, torch.float32)
    monkeypatch.setattr(layout, "MAX_PIXELS", 63)
    for one, other in zip(cases.results(case, chosen, torch.float32), whole, strict=True):
        torch.testing.assert_close(one, other)
    monkeypatch.setattr(layout, "MAX_PIXELS", 20)
    with pytest.raises(RuntimeError, match="images of up to 20 pixels, this one has .*: use tiles"):
        cases.results(case, chosen, torch.float32)


def more_queries_than_a_launch_takes(chosen, module, monkeypatch):
    """``module``: the backend's module of memory_attention."""
    case = cases.attention(150, 70)
    whole = cases.results(case, chosen, torch.float32)
    monkeypatch.setattr(module, "MAX_PRODUCTS", 70 * 40)
    monkeypatch.setattr(gpu, "MAX_PRODUCTS", 70 * 40)
    for one, other in zip(cases.results(case, chosen, torch.float32), whole, strict=True):
        torch.testing.assert_close(one, other)


def logits_of_a_small_temperature_overflow_nothing(chosen):
    """Cosines over it are beyond what the exponential of a float32 can be."""
    call, tensors = cases.attention(temperature=0.002)
    with backend(chosen):
        output = call(*tensors)
    with backend("reference"):
        torch.testing.assert_close(output, call(*tensors), rtol=1e-3, atol=1e-5)


def offsets_and_masks_of_another_type_keep_their_precision(chosen):
    """As under autocast, where they may be float32 beside float16 images."""
    call, tensors = cases.conv(channels=16, mask=True)
    halves = [tensor.half() for tensor in tensors]
    mixed = [halves[0], halves[1], tensors[2], tensors[3], halves[4]]
    exact = [tensor.double() for tensor in mixed]
    with backend(chosen):
        output = call(*mixed)
    with backend("reference"):
        plain, truth = call(*mixed), call(*exact)
    cases.check([output], [plain], [truth], cases.ROUNDING[torch.float16])


def a_shot_that_is_no_image_is_not_read(chosen, device="cpu"):
    """Nor is anything where there are no images or no queries."""
    case = cases.match(shots=3)
    wrong = case._replace(shots=torch.tensor([[1, -1, 0], [4, 3, 2**40]]))
    outside = torch.tensor([[False, True, False], [True, False, True]])
    distance, displacement = (value.cpu() for value in cases.matched(wrong, chosen, device=device))
    assert torch.equal(distance.isnan().all((2, 3)), outside)
    assert torch.equal(distance.isnan().any((2, 3)), outside)
    assert not displacement[outside].any()
    distance, displacement = cases.matched(case._replace(support=case.support[:0]), chosen, device=device)
    assert distance.isnan().all()
    assert not displacement.any()
    none = cases.matched(case._replace(query=case.query[:0], shots=case.shots[:0]), chosen, device=device)
    assert [tuple(value.shape) for value in none] == [(0, 3, 7, 9), (0, 3, 2, 7, 9)]


def not_a_number_stays_where_it_is_read(chosen):
    call, (input, *others) = cases.conv(1, 8, 4, (6, 6), kernel=(1, 1), bias=True)
    input[0, 0, 2, 2] = float("nan")
    others[1].zero_()
    with backend(chosen):
        output = call(input, *others)
    assert output[0, :, 2, 2].isnan().all()
    assert output.isnan().sum() <= 4 * 9  # the neighbours read it with a weight of zero


def deterministic_sums_do_not_depend_on_the_order(name, case, orders):
    """Of the threads in the emulation of CUDA, each order with its seed; and they obey the rule."""
    runs = []
    for order, seed in orders:
        torch.ops.cuda_on_cpu.order(order, seed)
        with cases.deterministic():
            runs.append(cases.results(case, name, torch.float32))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))
    exact = cases.results(case, "reference", torch.float64)
    cases.check(runs[0], cases.results(case, "reference", torch.float32), exact, cases.ROUNDING[torch.float32])


def a_gradient_that_is_not_finite_stays_where_it_belongs(name, case, value, exact=True):
    """Also where groups are filled up with zeros, which it is multiplied by; unless ``exact``, Inf may become NaN."""
    call, tensors = case
    tensors = [tensor.abs() + 0.1 for tensor in tensors]  # so that infinite sums are no differences
    tensors[2][0, :, 1, 2] = 0.3  # all neighbours are inside: beyond, nothing is read or added
    results = []
    for chosen in (name, "reference"):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with backend(chosen):
            output = call(*leaves)
            grad = cases.random(*output.shape, seed=9)
            grad[0, 1, 1, 2] = value
            gradients = torch.autograd.grad(output, leaves, grad)
        results.append([one if exact else one.masked_fill(~one.isfinite(), torch.nan) for one in gradients])
    assert results[1][3].isfinite().any()
    assert not results[1][3].isfinite().all()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-4, atol=1e-4)


def what_lies_outside_is_zero_whatever_the_border_holds(chosen, name, value):
    """Output and gradients are not numbers exactly where those of the reference are not, and agree elsewhere."""
    call, tensors = cases.CASES[name]()
    image = tensors[0]
    image[:, 1, 0, 0], image[:, 0, -1, :], image[:, 2, :, -1] = value, value, value
    offset = tensors[2 if name.startswith("conv") else 1]
    offset[0, :, 2, 3] = -100.0
    offset[0, :, 1, 1] = 1.5
    own, truth = (cases.results((call, tensors), one, torch.float32) for one in (chosen, "reference"))
    assert truth[0].isfinite().any()
    assert not truth[0].isfinite().all()
    for one, other in zip(own, truth, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-4, atol=1e-4)


def a_gradient_of_the_output_beyond_the_image_goes_nowhere(chosen):
    """A sample outside adds nothing to the border's gradient, even where the gradient is infinite."""
    call, tensors = cases.gather(1, 8, 1)
    offset = tensors[1]
    offset[0, 0] = 0.25
    offset[0, 1] = 0.25
    offset[0, :, 0, 0] = -100.0
    image = tensors[0].requires_grad_()
    with backend(chosen):
        output = call(*tensors)
        grad = torch.zeros_like(output)
        grad[..., 0, 0] = float("inf")
        (gradient,) = torch.autograd.grad(output, image, grad)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def offsets_that_are_not_numbers_show_in_exact_sums(chosen):
    """Fixed-point sums cannot hold NaN: without care two NaN would cancel."""
    for name, index in (("conv", 2), ("gather", 1)):
        call, tensors = cases.CASES[name]()
        with cases.deterministic():
            tensors[index][0, 0, :2, 2] = float("nan")
            assert cases.results((call, tensors), chosen, torch.float32)[1].isnan().any()
            tensors[index][0, 0, :2, 2] = float("inf")  # outside the image: nothing is read or added
            assert cases.results((call, tensors), chosen, torch.float32)[1].isfinite().all()


def levels_of_different_types_are_compared_in_float32(chosen):
    call, tensors = cases.anomaly()
    mixed = [tensor.half() if index < 3 else tensor for index, tensor in enumerate(tensors)]
    with backend(chosen):
        output = call(*mixed)
    with backend("reference"):
        expected = call(*[tensor.float() for tensor in mixed])
    torch.testing.assert_close(output, expected)


def not_a_number_stays_where_distances_are_raised(chosen):
    """NaN is not the smallest distance."""
    call, tensors = cases.anomaly(sigma=0.0, fusion="sum", powers=True)
    tensors[0][1, 3, 2, 2] = float("nan")
    with backend(chosen):
        output = call(*tensors)
    with backend("reference"):
        expected = call(*tensors)
    assert expected.isnan().any()
    torch.testing.assert_close(output, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
