"""The same work in other libraries: deformable convolution and whole models. Libraries not installed are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from bkd_fast.model.teacher import STRIDES
from bkd_fast.ops import backend
from bkd_fast.ops.deform_conv import Arguments, reference

PATCHES = 2_000  # of PatchCore's coreset: 1 % of 200 images at stride 8


def deform_conv_peers(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> dict[str, Callable]:
    """Name -> call, for a 3 x 3 kernel with padding 1."""
    peers: dict[str, Callable[[], Any]] = {}
    arrays = [value.detach().contiguous().numpy() for value in (x, weight, offset, bias, mask)]
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


def anomalib_models(backbone: str, images: Tensor) -> dict[str, Callable[[], Any]]:
    """Score and anomaly map of ``images`` by anomalib's methods with random weights: name -> call.

    ReverseDistillation, where anomalib has a decoder for the backbone; PatchCore with a coreset of PATCHES; and
    EfficientAd-S, which has its own network. Empty where anomalib is not installed.
    """
    try:
        from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    except ImportError:
        return {}
    size, layers = (images.shape[2], images.shape[3]), teacher_layers(backbone)
    models: dict[str, nn.Module] = {}
    with without_downloads():
        with suppress(UnknownBackboneError):
            models["ReverseDistillation"] = reverse_distillation_model(backbone, size, layers)
        models["PatchCore"] = PatchcoreModel(layers=layers[1:], backbone=backbone, pre_trained=False)
    if min(size) >= 256:  # what the encoder of its autoencoder needs
        models["EfficientAd"] = EfficientAdModel()
    for model in models.values():
        model.to(images.device).eval()
    with torch.inference_mode():
        features = models["PatchCore"].feature_extractor(images)
        width = sum(level.shape[1] for level in features.values())
        models["PatchCore"].memory_bank = torch.rand(PATCHES, width, device=images.device)
    return {f"anomalib {name}": torch.inference_mode()(partial(model, images)) for name, model in models.items()}


def teacher_layers(backbone: str) -> list[str]:
    """Return timm's names of a network's levels at strides 4, 8 and 16."""
    info: Any = timm.create_model(backbone, pretrained=False, features_only=True).feature_info
    names = dict(zip(info.reduction(), info.module_name(), strict=True))
    return [names[stride] for stride in STRIDES]


class UnknownBackboneError(Exception):
    """anomalib builds no decoder for a backbone."""


def reverse_distillation_model(backbone: str, size: tuple[int, int], layers: list[str]) -> nn.Module:
    """Return anomalib's reverse distillation, untrained.

    Raises:
        UnknownBackboneError: anomalib knows ResNets alone.
    """
    from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
    from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel

    try:
        with without_downloads():
            mode = AnomalyMapGenerationMode.ADD
            return ReverseDistillationModel(backbone.split(".")[0], size, layers, mode, pre_trained=False)
    except (ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise UnknownBackboneError(f"anomalib builds no decoder for {backbone} ({error})") from error


def without_downloads() -> AbstractContextManager[object]:
    """Build anomalib's models without ImageNet weights, for which it asks timm."""
    original = timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        return original(name, pretrained=False, **options)

    return patch("timm.create_model", create)


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
    inputs = [opset8.parameter(value.shape, np.float32) for value in (x, offset, mask)]
    node = opset8.deformable_convolution(
        inputs[0], inputs[1], opset8.constant(weight), [1, 1], [1, 1], [1, 1], [1, 1], inputs[2],
        bilinear_interpolation_pad=True,
    )  # fmt: skip
    model = openvino.Model([opset8.add(node, opset8.constant(bias.reshape(1, -1, 1, 1)))], inputs, "deform_conv")
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: torch.from_numpy(np.array(request.infer([x, offset, mask], share_inputs=True)[0]))
