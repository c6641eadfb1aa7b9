"""Frozen convolutions on CUDA with bias, shortcut and activation in one kernel, or in one that follows.

PyTorch adds the bias of cuDNN's convolutions in a kernel of its own, then the shortcut, then activates: for one image
these small kernels take about as long as the convolutions.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.models import get_notrace_modules
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from bkd_fast.inference.packing import same
from bkd_fast.inference.precision import InPrecision
from bkd_fast.model.teacher import Teacher
from bkd_fast.ops.bias_activation import bias_activation

log = logging.getLogger("bkd_fast")
LIMITS: dict[type, tuple[float, float]] = {nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}
NO_LIMITS = (-math.inf, math.inf)
ADDITIONS = (operator.add, operator.iadd, torch.add)
CUDNN_TYPES = (torch.float32, torch.float16)  # of cuDNN's fused convolutions


class FusedConvolution(nn.Module):
    """``clamp(convolution(x) + residual, low, high)`` of a frozen convolution.

    With ReLU it is one kernel of cuDNN's on CUDA, unless it is depthwise, for which PyTorch has faster kernels of its
    own. Otherwise :func:`bkd_fast.ops.bias_activation.bias_activation` follows a convolution without bias. Where timm's
    ``Conv2dSame`` would pad one side more than the other, in two kernels, one more row and column are computed instead,
    which are left out.

    Args:
        convolution: whose weights and geometry it takes over; zero padding.
        bias: (C_out,), added in place of the convolution's own; None: the bare convolution, without limits.
        limits: (low, high).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, convolution: nn.Conv2d, bias: Tensor | None, limits: tuple[float, float]) -> None:
        super().__init__()
        c = convolution
        self.stride, self.dilation, self.groups = list(c.stride), list(c.dilation), c.groups
        self.padding = None if isinstance(c, Conv2dSame) else [int(each) for each in c.padding]
        self.limits = limits
        self.in_cudnn = bias is not None and limits == LIMITS[nn.ReLU] and not 1 < c.groups == c.in_channels
        self.register_buffer("weight", c.weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return (N, C_out, H', W') of (N, C_in, H, W) and a residual in the shape of the result."""
        padding, skipped = ([*self.padding], [0, 0]) if self.padding is not None else self._same(x.shape[-2:])
        geometry = (self.stride, padding, self.dilation, self.groups)
        if self.in_cudnn and not any(skipped) and _has_cudnn(x):
            if residual is None:
                return torch.cudnn_convolution_relu(x, self.weight, self.bias, *geometry)
            return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, self.bias, *geometry)
        product = F.conv2d(x, self.weight, None, *geometry)
        if self.padding is None:
            for axis, skip in zip((2, 3), skipped, strict=True):
                product = product.narrow(axis, skip, -(-x.shape[axis] // self.stride[axis - 2]))
        return product if self.bias is None else bias_activation(product, self.bias, residual, *self.limits)

    def _same(self, size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the padding on both sides of each axis, and how many results at the front there are too many."""
        padding, skipped = [], []
        for length, kernel, stride, dilation in zip(
            size, self.weight.shape[-2:], self.stride, self.dilation, strict=True
        ):
            total = max((-(-length // stride) - 1) * stride + (kernel - 1) * dilation + 1 - length, 0)
            # A step more in front moves each result by one; behind, one more is as much as is missing, or too much.
            padding.append(total // 2 + total % 2 * stride)
            skipped.append(total % 2)
        return padding, skipped


def fuse_teacher(teacher: Teacher, images: Tensor, tolerance: float = 1e-4) -> None:
    """Fuse the convolutions of a frozen teacher in place; see :func:`fused`.

    Args:
        images: (N, 3, H, W) in [0, 1], to compare with.
    """
    holder = teacher.network if isinstance(teacher.network, InPrecision) else teacher
    network = holder.network
    given: list[Tensor] = []
    handle = network.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        teacher(images)
    finally:
        handle.remove()
    holder.network = fused(network, given[0], tolerance)


@torch.no_grad()
def fused(network: nn.Module, example: Tensor, tolerance: float = 1e-4) -> nn.Module:
    """Return a frozen network with fused convolutions, or the network itself if it cannot be fused; a warning says why.

    A convolution takes in the shortcut that is added to it, if nothing else reads its result, and the ReLU or ReLU6
    after it. Of a sum of two convolutions, one takes over the other's bias.

    Args:
        network: in ``eval`` mode, batch normalisation folded; it returns tensors.
        example: (N, C, H, W), to compare both with, in float32 without TF32.
        tolerance: of the results, relative to the largest value of each.
    """
    try:
        graph = _Tracer().trace(network)
        result = fx.GraphModule(network, graph)
        _remove_identities(result)
        ShapeProp(result).propagate(example)
        _fuse(result)
        result.delete_all_unused_submodules()
        result.recompile()
        with _without_tf32():
            agree = same(network(example), result(example), tolerance)
    except Exception as error:  # of any network, in any way: what runs without being fused must go on doing so
        log.warning("convolutions are not fused with what follows them: %s: %s", type(error).__name__, error)
        return network
    if not agree:
        log.warning("convolutions are not fused with what follows them: that changes what the network computes")
        return network
    return result


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Convolutions of any kind, and what timm knows cannot be traced.
        opaque = (nn.Conv2d, *get_notrace_modules())
        return isinstance(m, opaque) or super().is_leaf_module(m, module_qualified_name)


def _remove_identities(network: fx.GraphModule) -> None:
    for node in list(network.graph.nodes):
        if isinstance(_module(network, node), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)


def _fuse(network: fx.GraphModule) -> None:
    """Replace each pattern by a FusedConvolution, a module ``fused_N`` of the network."""
    graph = network.graph
    for index, node in enumerate(list(graph.nodes)):
        convolution = _convolution(network, node)
        if convolution is None or node.kwargs:
            continue
        last, bias = node, convolution.bias
        residual = _shortcut(last)
        if residual is not None:
            (last,) = last.users
            other = _convolution(network, residual)
            if other is not None and other.bias is not None and list(residual.users) == [last]:
                bias = other.bias if bias is None else bias + other.bias
                network.add_submodule(f"fused_{index}_shortcut", FusedConvolution(other, None, NO_LIMITS))
                residual.target = f"fused_{index}_shortcut"
        limits = NO_LIMITS
        follower = _only(last)
        if follower is not None and (activation := type(_module(network, follower))) in LIMITS:
            last, limits = follower, LIMITS[activation]
        if last is node and not isinstance(convolution, Conv2dSame):
            continue  # a bias alone is a kernel of PyTorch's as well
        if bias is None:
            bias = convolution.weight.new_zeros(convolution.out_channels)
        network.add_submodule(f"fused_{index}", FusedConvolution(convolution, bias, limits))
        arguments = (node.args[0],) if residual is None else (node.args[0], residual)
        with graph.inserting_before(last):
            new = graph.call_module(f"fused_{index}", arguments)
        new.meta = last.meta
        last.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    graph.lint()


def _shortcut(node: fx.Node) -> fx.Node | None:
    """Return what is added to a result that nothing else reads, if it has its shape."""
    follower = _only(node)
    if follower is None or follower.op != "call_function" or follower.target not in ADDITIONS or follower.kwargs:
        return None
    others = [part for part in follower.args if part is not node]
    if len(follower.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    own, other = (part.meta.get("tensor_meta") for part in (node, others[0]))
    fits = own is not None and other is not None and (own.shape, own.dtype) == (other.shape, other.dtype)
    return others[0] if fits else None


def _only(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _module(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _convolution(network: fx.GraphModule, node: fx.Node) -> nn.Conv2d | None:
    module = _module(network, node)
    if type(module) not in (nn.Conv2d, Conv2dSame):
        return None
    assert isinstance(module, nn.Conv2d)
    return module if module.padding_mode == "zeros" and not isinstance(module.padding, str) else None


def _has_cudnn(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in CUDNN_TYPES and torch.backends.cudnn.enabled


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Convolve in float32: TF32 rounds more than what is to be compared."""
    settings = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
