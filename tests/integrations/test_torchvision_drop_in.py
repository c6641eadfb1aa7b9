"""In place of torchvision's deformable convolution: the module, the switch, and the way to ONNX."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import deform_conv2d  # imported before any switch, as libraries do

import bkd_fast
from bkd_fast.export import onnx_translations
from bkd_fast.ops import DeformConv2d, modulated_deform_conv2d

SETTINGS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 1), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 1), "bias": False},
    {"kernel_size": 3, "padding": 1, "groups": 2},
]


def inputs(settings, offset_groups=2, batch=2):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(batch, 4, 9, 10, generator=generator)
    plain = {name: value for name, value in settings.items() if name not in ("bias", "groups")}
    rows, columns = nn.Conv2d(4, 6, **plain)(input).shape[2:]
    taps = offset_groups * int(np.prod(np.broadcast_to(settings["kernel_size"], 2)))
    offset = 2 * torch.randn(batch, 2 * taps, rows, columns, generator=generator)
    return input, offset, torch.rand(batch, taps, rows, columns, generator=generator)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("masked", [True, False])
def test_the_module_takes_torchvisions_state_and_gives_its_results(settings, masked):
    theirs, ours = torchvision.ops.DeformConv2d(4, 6, **settings), DeformConv2d(4, 6, **settings)
    assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(ours.state_dict())
    input, offset, mask = inputs(settings)
    mask = mask if masked else None
    torch.testing.assert_close(ours(input, offset, mask), theirs(input, offset, mask))
    for name in ("kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert f"{name}={getattr(ours, name)}" in repr(ours)


def test_the_module_starts_as_torchvisions():
    torch.manual_seed(0)
    ours = DeformConv2d(4, 6, 3)
    torch.manual_seed(0)
    theirs = torchvision.ops.DeformConv2d(4, 6, 3)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(("arguments", "message"), [((4, 6, 3, 1, 0, 1, 4), "groups"), ((4, 6, 0), "kernel_size")])
def test_a_module_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeformConv2d(*arguments)


def gradients(call, tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    call(*leaves).square().sum().backward()
    return [leaf.grad for leaf in leaves]


def counted(monkeypatch):
    """How often bkd_fast computed."""
    from bkd_fast.integrations import torchvision as torchvision_switch

    calls = []

    def count(*arguments):
        calls.append(1)
        return modulated_deform_conv2d(*arguments)

    monkeypatch.setattr(torchvision_switch, "modulated_deform_conv2d", count)
    return calls


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_switch_reaches_every_caller_and_turns_back(settings, monkeypatch):
    calls = counted(monkeypatch)
    module = torchvision.ops.DeformConv2d(4, 6, **settings)
    arguments = inputs(settings)
    expected, by_theirs = module(*arguments), gradients(module, arguments)
    assert not calls
    with bkd_fast.patch_torchvision():
        torch.testing.assert_close(module(*arguments), expected)
        for one, other in zip(gradients(module, arguments), by_theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            torch.testing.assert_close(module(*arguments), expected.detach())
        assert len(calls) == 3
    assert torch.equal(module(*arguments), expected)
    assert len(calls) == 3


def test_functions_imported_before_are_switched_too_without_a_mask(monkeypatch):
    calls = counted(monkeypatch)
    input, offset, _ = inputs(SETTINGS[0])
    weight = torch.randn(6, 4, 3, 3)
    expected = deform_conv2d(input, offset, weight, padding=1)
    switch = bkd_fast.patch_torchvision()
    with pytest.raises(RuntimeError, match="already"):
        bkd_fast.patch_torchvision()
    torch.testing.assert_close(deform_conv2d(input, offset, weight, padding=1), expected, rtol=1e-4, atol=1e-4)
    switch.undo()
    switch.undo()
    assert torch.equal(deform_conv2d(input, offset, weight, padding=1), expected)
    assert len(calls) == 1


def test_compiled_models_are_switched(monkeypatch):
    module = torchvision.ops.DeformConv2d(4, 6, 3, padding=1)
    arguments = inputs(SETTINGS[0])
    expected = module(*arguments)
    with bkd_fast.patch_torchvision():
        torch.testing.assert_close(torch.compile(module, backend="aot_eager")(*arguments), expected)


def test_the_module_goes_to_onnx_as_deform_conv(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = DeformConv2d(4, 6, 3, padding=1).eval()
    arguments = inputs(SETTINGS[0])
    path = tmp_path / "module.onnx"
    torch.onnx.export(
        module, arguments, path, dynamo=True, opset_version=19, custom_translation_table=onnx_translations(),
        verbose=False,
    )  # fmt: skip
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("DeformConv") == 1
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {given.name: value.numpy() for given, value in zip(session.get_inputs(), arguments, strict=True)}
    (found,) = session.run(None, feeds)
    np.testing.assert_allclose(found, module(*arguments).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_model_written_for_torchvision_runs_on_our_kernels():
    example = Path(__file__).resolve().parents[2] / "examples" / "edvr_alignment.py"
    command = [sys.executable, str(example), "--size", "32", "--repetitions", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.count("times as fast") == 2
