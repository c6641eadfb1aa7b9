"""What users do with the functions: export with a dynamic batch, and autocast. See also test_operators.py."""

import pytest
import torch

from bkd_fast.ops import (
    cosine_anomaly_map,
    distillation_loss,
    modulated_deform_conv2d,
    modulated_deform_gather,
    sparse_memory_attention,
)


def random(*shape):
    return torch.randn(*shape).requires_grad_()


def calls():
    """A public function of one or two tensors for every operator, with its inputs."""
    torch.manual_seed(0)
    level = (2, 3, 6, 5)
    return {
        "conv": (
            lambda x, o, w: modulated_deform_conv2d(x, o, w, padding=1),
            (random(2, 4, 6, 5), random(2, 18, 6, 5), random(6, 4, 3, 3)),
        ),
        "gather": (modulated_deform_gather, (random(1, 36, 6, 5), random(2, 18, 6, 5), random(2, 9, 6, 5))),
        "attention": (lambda q, m: sparse_memory_attention(q, m, 0.05, 0.5, True), (random(2, 6, 4), random(5, 4))),
        "map": (lambda t, s: cosine_anomaly_map([t], [s], (8, 9)), (random(*level), random(*level))),
        "loss": (lambda t, s: distillation_loss([t], [s]), (random(*level), random(*level))),
    }


@pytest.mark.parametrize("name", calls())
def test_exports_with_a_dynamic_batch(name):
    function, inputs = calls()[name]
    inputs = tuple(value.detach() for value in inputs)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({0: batch} if value.shape[0] == 2 else None for value in inputs)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    program = torch.export.export(Module(), inputs, dynamic_shapes=(shapes,))
    larger = tuple(torch.cat([value] * 3) if shape else value for value, shape in zip(inputs, shapes, strict=True))
    torch.testing.assert_close(program.module()(*larger), function(*larger))


@pytest.mark.parametrize("name", calls())
def test_autocast_mixes_bfloat16_features_and_float32_positions(name):
    function, inputs = calls()[name]
    exact = function(*inputs)
    # The first argument arrives as a convolution under autocast would have made it.
    mixed = (inputs[0].detach().bfloat16().requires_grad_(), *inputs[1:])
    with torch.autocast("cpu", torch.bfloat16):
        output = function(*mixed)
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert mixed[0].grad.dtype == torch.bfloat16
    assert inputs[1].grad.dtype == torch.float32
