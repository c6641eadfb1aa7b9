"""How an operator is made known to PyTorch, and dispatched to a backend.

To compilers it is one opaque call, dispatched when it runs; where Triton is the backend they see its kernels instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.library import CustomOpDef

from bkd_fast.ops.backend import implementation


def register(name: str, schema: str, fake: Callable[..., Any]) -> CustomOpDef:
    """Defines ``bkd_fast::name`` with a kernel that asks the backend, and its fake kernel.

    The results get the layout that the fake kernel promises, whichever backend computed them.

    Args:
        schema: the operator's arguments and results, ``(Tensor query, …) -> Tensor``.
        fake: gives empty results of the right shape, dtype, device and memory format.
    """

    def chosen(arguments: Any) -> Callable[..., Any]:
        tensor = next(value for value in _flat(arguments) if isinstance(value, Tensor))
        return implementation(name, tensor.device.type, tensor.dtype)

    def kernel(*arguments: Any) -> Any:
        results = chosen(arguments)(*arguments)
        if isinstance(results, Tensor):
            return _laid_out(results, fake(*arguments))
        laid_out = [_laid_out(one, other) for one, other in zip(results, fake(*arguments), strict=True)]
        return laid_out if schema.endswith("[]") else tuple(laid_out)

    def compiled(mode: Any, call: Any, types: Any, arguments: Any, keywords: Any) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        # torch.compile, on its way to a graph: a backend of operators is taken apart into what they are made of. An
        # exported program keeps the call, since it may run where other backends are.
        if custom_triton_ops_decomposition_disabled() or not isinstance(chosen(arguments), CustomOpDef):
            return mode.__torch_dispatch__(call, types, arguments, keywords)
        with mode:
            return kernel(*arguments, **keywords)

    operator = torch.library.custom_op(f"bkd_fast::{name}", kernel, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    operator.register_torch_dispatch(FunctionalTensorMode, compiled)
    return operator


def refuse_backward(operator: CustomOpDef, message: str) -> None:
    """Derivatives of an operator are an error that says so."""

    def backward(*_: Any) -> None:
        raise RuntimeError(message)

    operator.register_autograd(backward)


def refuse_double_backward(operator: CustomOpDef, name: str) -> None:
    """Second derivatives are an error that says so."""
    refuse_backward(
        operator,
        f"{name} has no second derivative: its gradient cannot be differentiated again (create_graph=True); "
        "differentiate bkd_fast.ops.reference's function instead, which is plain PyTorch",
    )


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last for a tensor that is laid out so, else contiguous."""
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_like(tensor: Tensor, needed: bool = True) -> Tensor:
    """The fake gradient of ``tensor``: its shape, dense, in its memory format; no elements where it is not needed."""
    if not needed:
        return tensor.new_empty(0)
    return torch.empty_like(tensor, memory_format=memory_format(tensor))


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    return result.contiguous(memory_format=memory_format(like))


def _flat(arguments: Any) -> list[Any]:
    return [part for value in arguments for part in (value if isinstance(value, (list, tuple)) else [value])]
