"""What other libraries have: deformable convolution and reverse distillation; each is there if its package is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from bkd_fast.ops import backend
from bkd_fast.ops.deform_conv import Arguments, reference


def deform_conv_peers(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> dict[str, Callable]:
    """Name -> call, for a 3 x 3 kernel with padding 1."""
    peers: dict[str, Callable[[], Any]] = {}
    arrays = [value.detach().contiguous().numpy() for value in (x, weight, offset, bias, mask)]
    # A package that is not installed is left out.
    with suppress(ImportError):
        peers["onnxruntime"] = _onnxruntime(arrays)
    with suppress(ImportError):
        peers["openvino"] = _openvino(arrays)
    return peers


def torchvision_inside(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` on the reference backend, whose deformable convolution is torchvision's, forward and backward."""

    def run() -> Any:
        forward, backward = "modulated_deform_conv2d", "modulated_deform_conv2d_backward"
        with backend("reference"), patch.multiple(reference, **{forward: _forward, backward: _backward}):
            return call()

    return run


def anomalib_inference(backbone: str, images: Tensor) -> Callable[[], Any] | None:
    """Anomaly map and score of anomalib's reverse distillation with random weights; None where there is none."""
    try:
        from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
        from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel
    except ImportError:
        return None
    size, layers = (images.shape[2], images.shape[3]), ["layer1", "layer2", "layer3"]
    try:
        mode = AnomalyMapGenerationMode.MULTIPLY
        model = ReverseDistillationModel(backbone, size, layers, mode, pre_trained=False)
    except (ValueError, RuntimeError, AssertionError, KeyError):  # it knows ResNets alone
        return None
    model = model.to(images.device).eval()
    return torch.inference_mode()(lambda: model(images))


def _forward(a: Arguments) -> Tensor:
    return deform_conv2d(
        a.input, a.offset, a.weight, a.bias, tuple(a.stride), tuple(a.padding), tuple(a.dilation), a.mask
    )


def _backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """What torchvision's own autograd calls; it computes every gradient, needed or not."""
    taps = a.weight.shape[2] * a.weight.shape[3]
    groups, offset_groups = a.input.shape[1] // a.weight.shape[1], a.offset.shape[1] // (2 * taps)
    mask = grad.new_zeros(len(grad), 1) if a.mask is None else a.mask
    grad_input, grad_weight, grad_offset, grad_mask, grad_bias = torch.ops.torchvision._deform_conv2d_backward(
        grad, a.input, a.weight, a.offset, mask, grad.new_zeros(a.weight.shape[0]),
        *a.stride, *a.padding, *a.dilation, groups, offset_groups, a.mask is not None,
    )  # fmt: skip
    gradients = (grad_input, grad_offset, grad_weight, grad_bias, grad_mask)
    return [value if need else grad.new_empty(0) for value, need in zip(gradients, needs, strict=True)]


def _onnxruntime(arrays: list[np.ndarray]) -> Callable[[], Tensor]:
    import onnxruntime
    from onnx import TensorProto, checker, helper

    names = ["X", "W", "offset", "B", "mask"]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        for name, value in zip(names, arrays, strict=True)
        if name != "W" and name != "B"
    ]
    constants = [
        helper.make_tensor(name, TensorProto.FLOAT, value.shape, value.tobytes(), raw=True)
        for name, value in zip(names, arrays, strict=True)
        if name in ("W", "B")
    ]
    node = helper.make_node("DeformConv", names, ["Y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["N", "O", "H", "W"])
    graph = helper.make_graph([node], "deform_conv", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads must not slow the others
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {name: value for name, value in zip(names, arrays, strict=True) if name not in ("W", "B")}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(arrays: list[np.ndarray]) -> Callable[[], Tensor]:
    import openvino
    from openvino import opset8

    x, weight, offset, bias, mask = arrays
    places = [opset8.parameter(value.shape, np.float32) for value in (x, offset, mask)]
    node = opset8.deformable_convolution(
        places[0], places[1], opset8.constant(weight), [1, 1], [1, 1], [1, 1], [1, 1], places[2],
        bilinear_interpolation_pad=True,
    )  # fmt: skip
    model = openvino.Model([opset8.add(node, opset8.constant(bias.reshape(1, -1, 1, 1)))], places, "deform_conv")
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: torch.from_numpy(np.array(request.infer([x, offset, mask], share_inputs=True)[0]))
