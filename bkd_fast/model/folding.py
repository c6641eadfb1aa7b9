"""Batch normalisation of a frozen network folded into the convolutions before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

Convolution = nn.Conv2d | nn.ConvTranspose2d


def fold_batch_norm(network: nn.Module, *example: Any) -> None:
    """Folds every batch normalisation that directly follows a convolution into it, in place.

    The pairs are read off a run on ``example``: a normalisation folds when its input is the very tensor that a
    convolution returned. What follows the normalisation inside its module (timm's fused activation) stays.

    Args:
        network: in ``eval`` mode, frozen.
        example: the arguments of a call, e.g. an image (1, 3, 64, 64). It returns a tensor or several.

    Raises:
        RuntimeError: the folded network does not compute what it did (a convolution whose output is also read
            elsewhere); the network must then not be used.
    """
    pairs: dict[str, Convolution] = {}
    produced: dict[int, tuple[Convolution, Tensor]] = {}  # holds the tensor too, so that no id is used twice

    def remember(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, Convolution)
        produced[id(output)] = (module, output)

    def pair_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def pair(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if id(inputs[0]) in produced:
                pairs[name] = produced[id(inputs[0])][0]

        return pair

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, Convolution):
            handles.append(module.register_forward_hook(remember))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(pair_of(name)))
    with torch.no_grad():
        before = _tensors(network(*example))
    for handle in handles:
        handle.remove()

    for name, convolution in pairs.items():
        norm = network.get_submodule(name)
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
            transpose=isinstance(convolution, nn.ConvTranspose2d),
        )  # fmt: skip
        network.set_submodule(name, _after_norm(norm))

    with torch.no_grad():
        after = _tensors(network(*example))
    for old, new in zip(before, after, strict=True):
        scale = old.abs().max().clamp_min(1e-6)
        # On the meta device there are shapes and no values.
        if not old.is_meta and not (old - new).abs().max() <= 1e-3 * scale:
            raise RuntimeError("folding batch normalisation changed what the network computes")


def _tensors(result: Tensor | list[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else result


def _after_norm(norm: _BatchNorm) -> nn.Module:
    """What remains of a normalisation module: timm's ``BatchNormAct2d`` also drops and activates."""
    rest = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    return nn.Sequential(*rest) if rest else nn.Identity()
