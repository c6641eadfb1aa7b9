"""Convolutions of a frozen teacher fused with bias, shortcut and activation."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn

from bkd_fast.artifact import load_trained
from bkd_fast.config import BKDConfig
from bkd_fast.inference import fusing
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.fusing import FusedConvolution, fuse_teacher, fused
from bkd_fast.inference.precision import InPrecision
from bkd_fast.model.teacher import Teacher


@pytest.fixture(autouse=True)
def frozen():
    with torch.no_grad():
        yield


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's fused convolutions, in plain PyTorch; return how often each was called."""
    calls = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        calls.append("relu")
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        calls.append("add_relu")
        return (F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(fusing, "_has_cudnn", lambda x: True)
    return calls


def teacher_of(name):
    torch.manual_seed(0)
    teacher = Teacher(BKDConfig().with_changes({"teacher.name": name, "teacher.weights": "none"}).teacher)
    for module in teacher.modules():
        if isinstance(module, nn.Conv2d):  # random weights leave the biases at 0
            module.bias.copy_(torch.randn_like(module.bias) * 0.1)
    return teacher


def parts(network, kind=FusedConvolution):
    return [module for module in network.modules() if isinstance(module, kind)]


# Convolutions, and how many are fused. Of EfficientNet-Lite0's, 15 come after the last level, and are dropped; 5 have
# neither shortcut nor activation.
TEACHERS = {"resnet18": (15, 15), "wide_resnet50_2": (43, 43), "tf_efficientnet_lite0": (33, 28)}


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("through_cudnn", [False, True])
def test_teachers_compute_what_they_did(name, through_cudnn, request, caplog):
    calls = request.getfixturevalue("cudnn") if through_cudnn else []
    teacher = teacher_of(name)
    images = [torch.rand(1, 3, 64, 96), torch.rand(3, 3, 80, 72), torch.rand(1, 3, 67, 65)]
    before = [teacher(image) for image in images]
    count = len(parts(teacher, nn.Conv2d))
    fuse_teacher(teacher, images[0], tolerance=1e-5)
    assert not caplog.records
    assert (count, len(parts(teacher))) == TEACHERS[name]
    assert not parts(teacher, (nn.ReLU, nn.ReLU6))
    calls.clear()
    for image, expected in zip(images, before, strict=True):
        for level, own in zip(teacher(image), expected, strict=True):
            torch.testing.assert_close(level, own, rtol=1e-4, atol=1e-4)
    if through_cudnn and name != "tf_efficientnet_lite0":
        shortcuts = sum("shortcut" in target for target, _ in teacher.named_modules())
        assert len(calls) == 3 * (TEACHERS[name][1] - shortcuts)
        assert {"relu", "add_relu"} == set(calls)


@pytest.mark.parametrize(("groups", "count"), [(1, 1), (2, 1), (4, 0)])
def test_depthwise_convolutions_are_not_given_to_cudnn(groups, count, cudnn):
    convolution, x = nn.Conv2d(4, 8, 3, groups=groups), torch.randn(1, 4, 5, 5)
    result = FusedConvolution(convolution, convolution.bias, fusing.LIMITS[nn.ReLU])(x)
    torch.testing.assert_close(result, convolution(x).relu())
    assert len(cudnn) == count


def test_a_teacher_in_half_precision_is_fused_in_its_own():
    teacher = teacher_of("resnet18")
    image = torch.rand(1, 3, 64, 64)
    teacher.network = InPrecision(teacher.network, torch.bfloat16)
    before = teacher(image)
    fuse_teacher(teacher, image, 2e-2)
    assert isinstance(teacher.network, InPrecision)
    assert {part.weight.dtype for part in parts(teacher)} == {torch.bfloat16}
    for level, own in zip(teacher(image), before, strict=True):
        assert (level - own).abs().max() <= 2e-2 * own.abs().max()


@pytest.mark.parametrize("size", [(9, 9), (8, 8), (7, 10), (2, 3), (1, 1)])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [(3, 2, 1), (5, 2, 1), (3, 1, 1), (1, 2, 1), (4, 3, 1), (3, 2, 2), (2, 1, 1)],
)
def test_padding_as_tensorflow_does_needs_no_copy(size, kernel, stride, dilation):
    convolution = Conv2dSame(3, 6, kernel, stride=stride, dilation=dilation, groups=3)
    x = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last)
    result = FusedConvolution(convolution, convolution.bias, (0.0, 6.0))(x)
    torch.testing.assert_close(result, convolution(x).clamp(0, 6))


class Block(nn.Module):
    """Two convolutions that are added, and ``rest`` of them and what they are added to."""

    def __init__(self, rest):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1, bias=False)
        self.activation, self.rest = nn.ReLU(inplace=True), rest

    def forward(self, x):
        return [self.rest(self, x, self.first(x), self.second(x))]


PATTERNS = {  # what is computed, and how many convolutions are fused
    "sum of two": (lambda own, x, a, b: own.activation(a + b), 1),
    "the other first": (lambda own, x, a, b: own.activation(b + a), 1),
    "read twice": (lambda own, x, a, b: own.activation(a) + a - b, 0),
    "a number is added": (lambda own, x, a, b: own.activation(a + 1) + own.activation(b * 2), 0),
    "added to itself": (lambda own, x, a, b: own.activation(a + a) - b, 0),
    "of another shape": (lambda own, x, a, b: own.activation(a + b.mean((2, 3), keepdim=True)), 0),
    "subtracted": (lambda own, x, a, b: own.activation(a - b), 0),
    "each activated": (lambda own, x, a, b: own.activation(a) * own.activation(b), 2),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_only_what_nothing_else_reads_is_fused(pattern, caplog):
    rest, count = PATTERNS[pattern]
    network, x = Block(rest).eval(), torch.randn(2, 3, 6, 5)
    expected = network(x)
    result = fused(network, x, 1e-5)
    torch.testing.assert_close(result(x), expected)
    assert len(parts(result)) == count
    assert not caplog.records


def test_what_cannot_be_traced_stays_and_says_so(caplog):
    class Branch(nn.Module):
        def forward(self, x):
            return [x if x.sum() > 0 else -x]

    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Branch()).eval()
    with caplog.at_level(logging.WARNING, "bkd_fast"):
        assert fused(network, torch.randn(1, 3, 4, 4)) is network
    assert "convolutions are not fused with what follows them: TraceError" in caplog.text


@pytest.mark.parametrize("wrong", ["result", "error"])
def test_a_fused_network_that_differs_is_not_used(wrong, monkeypatch, caplog):
    def broken(x, bias, residual, low, high):
        if wrong == "error":
            raise RuntimeError("no kernel")
        return (x + 1.01 * bias.view(1, -1, 1, 1)).clamp(low, high)

    monkeypatch.setattr(fusing, "bias_activation", broken)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval()
    with caplog.at_level(logging.WARNING, "bkd_fast"):
        assert fused(network, torch.randn(1, 3, 4, 4)) is network
    assert ("no kernel" if wrong == "error" else "that changes what the network computes") in caplog.text


def test_the_precision_of_convolutions_is_what_it_was():
    def settings():
        return torch.backends.cudnn.allow_tf32, torch.backends.cudnn.conv.fp32_precision

    before = settings()
    fused(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval(), torch.randn(1, 3, 4, 4))
    assert settings() == before


def test_a_detector_predicts_as_it_did(any_run, tiny_data):
    detector = Detector(load_trained(any_run), "cpu", pack=False)
    files = sorted((tiny_data / "test").rglob("*.png"))
    before = detector(files)
    fuse_teacher(detector.model.teacher, detector.sample)
    assert parts(detector.model.teacher)
    for one, other in zip(detector(files), before, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-4)
        np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_teachers_compute_what_they_did_on_cuda(name, dtype, caplog):
    teacher, image = teacher_of(name).cuda(), torch.rand(2, 3, 96, 64, device="cuda")
    if dtype != torch.float32:
        teacher.network = InPrecision(teacher.network, dtype)
    fuse_teacher(teacher, image, 1e-4 if dtype == torch.float32 else 2e-2)
    assert not caplog.records
    assert len(parts(teacher)) == TEACHERS[name][1]
