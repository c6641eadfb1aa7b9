"""Choose the implementation of an operator: compiled kernels, Triton, or the plain PyTorch reference.

An operator is a folder of ``bkd_fast.ops``; what it registers is found there, and so are the modules with its kernels.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.measured import fastest

VARIABLE = "BKD_FAST_BACKEND"


class Kernels(NamedTuple):
    """The kernels of a backend for one device type.

    Attributes:
        module: the module of an operator's folder that has functions named as the operators.
        dtypes: that they take; None for all.
    """

    module: str
    dtypes: tuple[torch.dtype, ...] | None = None


# Each backend, in the order of preference, with the module of bkd_fast.ops that makes it available: its DEVICES are
# Kernels by device type.
BACKENDS: Mapping[str, str | Mapping[str, Kernels]] = {
    "native": "native",
    "triton": "triton_common",
    "reference": dict.fromkeys(("cpu", "cuda", "meta", "mps", "xpu"), Kernels("reference")),
}

_chosen: ContextVar[str | None] = ContextVar("bkd_fast_backend", default=None)
_folders: dict[str, str] = {}  # of the operators that are registered


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operators inside the ``with`` block on one backend.

    Args:
        name: ``native``, ``triton`` or ``reference``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that is not available; the message says why.
    """
    _devices(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def operators() -> tuple[str, ...]:
    """Return the names of all operators, which the folders of this package register."""
    for folder in pkgutil.iter_modules(importlib.import_module("bkd_fast.ops").__path__):
        if folder.ispkg:
            importlib.import_module(f"bkd_fast.ops.{folder.name}")
    return tuple(_folders)


def add_operator(name: str, folder: str) -> None:
    """Make an operator known.

    Args:
        name: of the operator, and of the functions in its modules.
        folder: the full name of its package.
    """
    _folders[name] = folder


def implementation(
    operator: str, device: str, dtype: torch.dtype | None = None, tensor: Tensor | None = None
) -> Callable[..., Any]:
    """Return the function that computes ``operator`` on tensors of a device type and, if given, a dtype.

    Unless a backend is chosen (:func:`backend`, or the environment variable BKD_FAST_BACKEND), that is the one which
    was measured to be the fastest (:mod:`bkd_fast.ops.measured`) for a call whose first tensor is ``tensor``; or else
    the first one which has the operator.

    Raises:
        RuntimeError: the chosen backend does not have the operator for this device and dtype.
    """
    name = _chosen.get() or os.environ.get(VARIABLE) or None
    if name is not None:
        function = _find(_devices(name), operator, device, dtype)
        if function is None:
            raise RuntimeError(
                f"the {name} backend has no {operator} for {_tensors(device, dtype)}; "
                f"choose another with bkd_fast.backend(…) or {VARIABLE}"
            )
        return function
    measured = fastest(operator, tensor) if tensor is not None and device == "cuda" else None
    for candidate in BACKENDS if measured is None else (measured, *BACKENDS):
        if available(candidate) is None:
            function = _find(_devices(candidate), operator, device, dtype)
            if function is not None:
                return function
    raise RuntimeError(f"no backend has {operator} for {_tensors(device, dtype)}")  # the reference runs everywhere


def _tensors(device: str, dtype: torch.dtype | None) -> str:
    return f"{device} tensors" if dtype is None else f"{device} tensors of {dtype}"


def available(name: str) -> str | None:
    """Return None if a backend can be used, otherwise the reason why not."""
    try:
        _devices(name)
    except RuntimeError as error:
        return str(error)
    return None


def usable(operator: str, device: str) -> list[str]:
    """Return the backends that have ``operator`` for tensors of a device type, the preferred one first."""
    return [name for name in BACKENDS if available(name) is None and _find(_devices(name), operator, device)]


def describe() -> dict[str, Any]:
    """Return for every backend whether it is available, and for every operator what runs on the CPU and on CUDA."""
    state = {name: available(name) or "available" for name in BACKENDS}
    runs = {}
    for operator in operators():
        runs[operator] = ", ".join(f"{device} {usable(operator, device)[0]}" for device in ("cpu", "cuda"))
    return {"chosen": _chosen.get() or os.environ.get(VARIABLE) or "automatic", "backends": state, "runs": runs}


_loaded: dict[str, Any] = {}


def _devices(name: str) -> Mapping[str, Kernels]:
    """Return the kernels of a backend by device type. Its module is imported once; failures are remembered too."""
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}: choose one of {', '.join(BACKENDS)}")
    home = BACKENDS[name]
    if not isinstance(home, str):
        return home
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(f"bkd_fast.ops.{home}")
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == f"bkd_fast.ops.{home}"
            _loaded[name] = ImportError("this installation of bkd_fast has none") if absent else error
    module = _loaded[name]
    if isinstance(module, ImportError):
        raise RuntimeError(f"the {name} backend is not available: {module}")
    return module.DEVICES


def _find(
    devices: Mapping[str, Kernels], operator: str, device: str, dtype: torch.dtype | None = None
) -> Callable[..., Any] | None:
    kernels = devices.get(device)
    if kernels is None or (dtype is not None and kernels.dtypes is not None and dtype not in kernels.dtypes):
        return None
    module = _module(operator, kernels.module)
    return None if module is None else getattr(module, operator, None)


@cache
def _module(operator: str, name: str) -> Any:
    """Return a module of an operator's folder, or None if the folder has none of that name."""
    if operator not in _folders and operator not in operators():
        raise RuntimeError(f"there is no operator {operator!r}: choose one of {', '.join(_folders)}")
    path = f"{_folders[operator]}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        return None
