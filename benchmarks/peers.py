"""Deformable convolution as other libraries have it; each is there if its package is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import deform_conv2d


def deform_conv_peers(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> dict[str, Callable]:
    """Name -> call, for a 3 x 3 kernel with padding 1."""
    peers: dict[str, Callable[[], Any]] = {"torchvision": lambda: torchvision_conv(x, offset, weight, bias, mask)}
    arrays = [value.detach().contiguous().numpy() for value in (x, weight, offset, bias, mask)]
    # A package that is not installed is left out.
    with suppress(ImportError):
        peers["onnxruntime"] = _onnxruntime(arrays)
    with suppress(ImportError):
        peers["openvino"] = _openvino(arrays)
    return peers


def torchvision_conv(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """torchvision is one of the package's own requirements."""
    return deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)


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
