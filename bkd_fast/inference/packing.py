"""Frozen convolutions on the CPU: weights packed once in oneDNN's layout, activations fused.

PyTorch otherwise repacks the weights in every call. For one small image of many channels that takes as long as the
convolution itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

log = logging.getLogger("bkd_fast")
# oneDNN's name and scalars of an activation.
ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
}


class PackedConvolution(nn.Module):
    """A convolution, or a transposed one, with weights in oneDNN's layout for one input size.

    Other input sizes give correct results, perhaps more slowly. It runs on the CPU in the dtype of its weights, and
    cannot be trained, saved, moved or exported.

    Args:
        convolution: source of weights and geometry; zero padding.
        size: (N, C, H, W) of its input.
        activation: see ACTIVATIONS; None = none.
    """

    def __init__(
        self, convolution: nn.Conv2d | nn.ConvTranspose2d, size: Sequence[int], activation: type[nn.Module] | None
    ) -> None:
        super().__init__()
        c = convolution
        self.transposed = isinstance(c, nn.ConvTranspose2d)
        extra = [c.output_padding] if self.transposed else []
        self.geometry = [c.padding, *extra, c.stride, c.dilation, c.groups]
        self.activation = ACTIVATIONS[activation] if activation else ("none", [])
        ops = torch.ops.mkldnn
        reorder = ops._reorder_convolution_transpose_weight if self.transposed else ops._reorder_convolution_weight
        self.weight = reorder(c.weight.detach(), *self.geometry, list(size))
        self.bias = None if c.bias is None else c.bias.detach()

    def forward(self, features: Tensor) -> Tensor:
        """Return the convolution of (N, C, H, W), with its bias and activation."""
        ops = torch.ops.mkldnn
        multiply = ops._convolution_transpose_pointwise if self.transposed else ops._convolution_pointwise
        return multiply(features, self.weight, self.bias, *self.geometry, *self.activation, "")


def can_pack() -> bool:
    """Return whether this torch was built with oneDNN's packed convolutions."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def pack_convolutions(network: nn.Module, run: Callable[[], Sequence[Tensor]], tolerance: float = 1e-4) -> int:
    """Replace the convolutions of a frozen network on the CPU, in place.

    An activation is fused into the convolution whose output it reads in a run. If that changes the network's results,
    because another module reads the tensor too, no activation is fused.

    Args:
        run: runs the network on an example and returns the outputs that must stay the same.
        tolerance: relative to the largest value of each output.

    Returns:
        The number of convolutions replaced.

    Raises:
        RuntimeError: the packed network gives other results; it must not be used.
    """
    sizes, followers, before = _observed(network, run)
    packed = {name: (network.get_submodule(name), size) for name, size in sizes.items()}
    kinds = {name: type(network.get_submodule(follower)) for name, follower in followers.items()}
    activations = {follower: network.get_submodule(follower) for follower in followers.values()}
    for name, (convolution, size) in packed.items():
        assert isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d)
        network.set_submodule(name, PackedConvolution(convolution, size, kinds.get(name)))
    for follower in activations:
        network.set_submodule(follower, nn.Identity())
    if not same(before, run(), tolerance):
        log.info("activations are not fused: another module reads the same tensor")
        for follower, activation in activations.items():
            network.set_submodule(follower, activation)
        for name in followers:
            module = network.get_submodule(name)
            assert isinstance(module, PackedConvolution)
            module.activation = ("none", [])
        if not same(before, run(), tolerance):
            raise RuntimeError("packing the convolutions changed what the network computes")
    return len(packed)


def _observed(
    network: nn.Module, run: Callable[[], Sequence[Tensor]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str], Sequence[Tensor]]:
    """Return the input size of each convolution that can be packed, the activation after it, and the run's outputs."""
    sizes: dict[str, tuple[int, ...]] = {}
    followers: dict[str, str] = {}
    # By output id: its convolution, the output (kept alive, so that ids are unique) and its version.
    produced: dict[int, tuple[str, Tensor, int]] = {}
    taken: list[Tensor] = []
    handles = []
    for name, module in network.named_modules():
        if type(module) in (nn.Conv2d, nn.ConvTranspose2d) and module.padding_mode == "zeros":

            def remember(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                sizes[name] = tuple(inputs[0].shape)
                produced[id(output)] = (name, output, output._version)

            if not isinstance(module.padding, str):
                handles.append(module.register_forward_hook(remember))
        elif type(module) in ACTIVATIONS:

            def follow(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if id(inputs[0]) in produced:
                    convolution, output, changes = produced.pop(id(inputs[0]))
                    taken.append(output)
                    if output._version == changes:  # a shortcut may have been added to it
                        followers[convolution] = name

            handles.append(module.register_forward_pre_hook(follow))
    results = run()
    for handle in handles:
        handle.remove()
    # Activations that several convolutions share are not fused.
    shared = [follower for follower in followers.values() if list(followers.values()).count(follower) > 1]
    return sizes, {name: follower for name, follower in followers.items() if follower not in shared}, results


def same(expected: Sequence[Tensor], actual: Sequence[Tensor], tolerance: float) -> bool:
    """Return whether all agree within ``tolerance`` times the largest value; NaN never agrees."""
    return all(
        bool((one - other).abs().max() <= tolerance * one.abs().max().clamp_min(1e-6))
        for one, other in zip(expected, actual, strict=True)
    )
