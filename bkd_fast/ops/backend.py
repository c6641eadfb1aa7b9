"""Which implementation of the operators runs: compiled kernels, Triton, or the plain PyTorch reference."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

OPERATORS = (
    "modulated_deform_conv2d",
    "modulated_deform_conv2d_backward",
    "modulated_deform_gather",
    "modulated_deform_gather_backward",
    "sparse_memory_attention",
    "sparse_memory_attention_backward",
    "cosine_anomaly_map",
    "cosine_anomaly_map_backward",
    "distillation_loss",
    "distillation_loss_backward",
    "local_match",
)
VARIABLE = "BKD_FAST_BACKEND"
# Each backend is a module of bkd_fast.ops with functions named as OPERATORS, and the DEVICES it runs on; or for each
# device the module that has the functions, and its DTYPES where they are not all.
BACKENDS = ("native", "triton", "reference")

_chosen: ContextVar[str | None] = ContextVar("bkd_fast_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the operators inside the ``with`` block on one backend.

    Args:
        name: ``native``, ``triton`` or ``reference``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that is not there; the message says why.
    """
    _load(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def implementation(operator: str, device: str, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    """The function that computes ``operator`` on tensors of a device type and, if given, a dtype.

    Without a choice (:func:`backend`, or the environment variable BKD_FAST_BACKEND) that is the first backend
    which has it.

    Raises:
        RuntimeError: the chosen backend does not have the operator for this device and dtype.
    """
    tensors = f"{device} tensors" if dtype is None else f"{device} tensors of {dtype}"
    name = _chosen.get() or os.environ.get(VARIABLE) or None
    if name is not None:
        found = _find(_load(name), operator, device, dtype)
        if found is None:
            raise RuntimeError(
                f"the {name} backend has no {operator} for {tensors}; "
                f"choose another with bkd_fast.backend(…) or {VARIABLE}"
            )
        return found
    for candidate in BACKENDS:
        if available(candidate) is None:
            found = _find(_load(candidate), operator, device, dtype)
            if found is not None:
                return found
    raise RuntimeError(f"no backend has {operator} for {tensors}")  # the reference runs everywhere


def available(name: str) -> str | None:
    """None where a backend can be used, otherwise the reason why not."""
    try:
        _load(name)
    except RuntimeError as error:
        return str(error)
    return None


def usable(operator: str, device: str) -> list[str]:
    """The backends that have ``operator`` for tensors of a device type, in the order in which they are taken."""
    return [name for name in BACKENDS if available(name) is None and _find(_load(name), operator, device)]


def describe() -> dict[str, Any]:
    """For every backend whether it is there or why not; for every operator what runs on the CPU and on CUDA."""
    state = {name: available(name) or "available" for name in BACKENDS}
    runs = {}
    for operator in OPERATORS:
        runs[operator] = ", ".join(f"{device} {usable(operator, device)[0]}" for device in ("cpu", "cuda"))
    return {"chosen": _chosen.get() or os.environ.get(VARIABLE) or "automatic", "backends": state, "runs": runs}


_loaded: dict[str, Any] = {}


def _load(name: str) -> Any:
    """The module of a backend, imported once; failures are remembered too."""
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(f"bkd_fast.ops.{name}")
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == f"bkd_fast.ops.{name}"
            _loaded[name] = ImportError("this installation of bkd_fast has none") if absent else error
    found = _loaded[name]
    if isinstance(found, ImportError):
        raise RuntimeError(f"the {name} backend is not available: {found}")
    return found


def _find(module: Any, operator: str, device: str, dtype: torch.dtype | None = None) -> Callable[..., Any] | None:
    if device not in module.DEVICES:
        return None
    holder = module.DEVICES[device] if isinstance(module.DEVICES, Mapping) else module
    if dtype is not None and dtype not in getattr(holder, "DTYPES", (dtype,)):
        return None
    return getattr(holder, operator, None)
