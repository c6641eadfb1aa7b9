"""Register an operator with PyTorch: schema, fake kernel, autograd and dispatch to a backend, from one declaration.

An operator declares its arguments once, as the fields of a NamedTuple that every backend is given; a function that
checks them; and a function that says what the results look like. Everything else follows from these.

To compilers an operator is one opaque call, dispatched when it runs; on the Triton backend they see its kernels.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.library import CustomOpDef

from bkd_fast.ops.backend import add_operator, implementation
from bkd_fast.ops.checks import check_shape


class Result(NamedTuple):
    """What a result will look like: the fake kernel allocates it, and a backend's result is converted to it."""

    shape: Sequence[int]
    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format


class Operator(NamedTuple):
    """One registered operator.

    Attributes:
        schema: its arguments and results, ``(Tensor query, …) -> Tensor``.
        pack: makes of the schema's flat arguments those of a backend's function.
    """

    schema: str
    pack: Callable[[Sequence[Any]], tuple[Any, ...]]


OPERATORS: dict[str, Operator] = {}


class _OwnCall(threading.local):
    """Whether autograd calls the gradient, with what was checked before and, by its counters, not changed since."""

    active = False


_own_call = _OwnCall()
_SLOTS = (Tensor, Tensor | None, list[Tensor])  # types of the arguments that have gradients


def register(
    name: str,
    arguments: type[Any],
    *,
    check: Callable[[Any], None],
    results: Callable[[Any], Sequence[Result]],
    outputs: int | None = 1,
    gradient: str | None = None,
) -> Any:
    """Register ``bkd_fast::name`` and, if it has a gradient, ``bkd_fast::name_backward``; return the operator.

    A backend has a function ``name(arguments)``. Its gradient is ``name_backward(grad, *saved, arguments, needs)``, a
    list with one tensor for each tensor that was given, empty where ``needs`` is False; ``saved`` are the results
    after the first, which have no gradient of their own.

    Args:
        arguments: a NamedTuple whose fields are the operator's arguments.
        check: raises where arguments do not fit. It sees real and fake tensors, before anything is computed.
        results: describes the ``outputs`` results.
        outputs: how many; None for a list of them, which has no gradient.
        gradient: why there is none, if there is none.
    """
    fields = get_type_hints(arguments)
    folder = arguments.__module__
    returns = (
        list[Tensor] if outputs is None else Tensor if outputs == 1 else tuple[(Tensor,) * outputs]  # type: ignore[misc]
    )
    forward = _define(
        name, folder, fields, returns, lambda flat: (arguments(*flat),), lambda packed: check(*packed),
        lambda packed: list(results(*packed)),
    )  # fmt: skip
    if gradient is not None:
        _refuse_backward(forward, gradient)
        return getattr(torch.ops.bkd_fast, name).default

    assert outputs is not None, f"{name}: a list of results has no gradient"
    extra = outputs - 1
    saved = {f"saved_{index}": Tensor for index in range(extra)}
    backward_name = f"{name}_backward"

    def pack(flat: Sequence[Any]) -> tuple[Any, ...]:
        given, needs = arguments(*flat[1 + extra : -1]), list(flat[-1])
        slots = _slots(fields, given)
        if len(needs) == len(slots):  # otherwise the check refuses them
            needs = [need and tensor is not None for need, tensor in zip(needs, slots, strict=True)]
        return *flat[: 1 + extra], given, needs

    def check_backward(grad: Tensor, *others: Any) -> None:
        if _own_call.active:
            return
        *kept, given, needs = others
        check(given)
        for label, tensor, result in zip(["grad", *saved], [grad, *kept], results(given), strict=True):
            check_shape(backward_name, label, tensor, tuple(result.shape))
            first = _first(given)
            if not tensor.is_floating_point() or (tensor.dtype == torch.float64) != (result.dtype == torch.float64):
                raise TypeError(f"{backward_name}: {label} is {tensor.dtype}, expected {result.dtype}")
            if tensor.device != first.device:
                raise ValueError(f"{backward_name}: {label} is on {tensor.device}, expected {first.device}")
        count = len(_slots(fields, given))
        if len(needs) != count:
            raise ValueError(f"{backward_name}: needs has {len(needs)} values, expected {count}, one for each tensor")

    def gradients(packed: tuple[Any, ...]) -> list[Result]:
        grad, given, needs = packed[0], packed[-2], packed[-1]
        return [
            Result(tensor.shape, tensor.dtype, memory_format(tensor))
            if tensor is not None and need
            else Result((0,), grad.dtype if tensor is None else tensor.dtype)
            for tensor, need in zip(_slots(fields, given), needs, strict=True)
        ]

    backward = _define(
        backward_name, folder, {"grad": Tensor, **saved, **fields, "needs": list[bool]}, list[Tensor], pack,
        lambda packed: check_backward(*packed), gradients,
    )  # fmt: skip
    _refuse_backward(
        backward,
        f"{name} has no second derivative: its gradient cannot be differentiated again (create_graph=True); "
        f"differentiate the function of {folder}.reference instead, which is plain PyTorch",
    )
    call = getattr(torch.ops.bkd_fast, backward_name).default

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = output[1:] if extra else ()
        ctx.mark_non_differentiable(*kept)
        given = arguments(*inputs)
        ctx.save_for_backward(*kept, *_slots(fields, given))
        # Tensors are kept by save_for_backward alone; of a list its length is kept here.
        ctx.settings = [
            len(value) if kind == list[Tensor] else None if kind in _SLOTS else value
            for value, kind in zip(inputs, fields.values(), strict=True)
        ]

    def derivative(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        kept, tensors = ctx.saved_tensors[:extra], iter(ctx.saved_tensors[extra:])
        kinds = list(fields.values())
        inputs = [
            [next(tensors) for _ in range(value)]
            if kind == list[Tensor]
            else next(tensors)
            if kind in _SLOTS
            else value
            for value, kind in zip(ctx.settings, kinds, strict=True)
        ]
        wanted = [need for need, kind in zip(ctx.needs_input_grad, kinds, strict=True) if kind in _SLOTS]
        needs = [one for need in wanted for one in (need if isinstance(need, (list, tuple)) else [need])]
        _own_call.active = True
        try:
            found = call(grad, *kept, *inputs, needs)
        finally:
            _own_call.active = False
        rest = iter([value if need else None for value, need in zip(found, needs, strict=True)])
        return tuple(
            [next(rest) for _ in range(value)] if kind == list[Tensor] else next(rest) if kind in _SLOTS else None
            for value, kind in zip(ctx.settings, kinds, strict=True)
        )

    forward.register_autograd(derivative, setup_context=setup)
    return getattr(torch.ops.bkd_fast, name).default


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a tensor is computed: float64 or float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Return channels_last for a tensor with that layout, otherwise contiguous."""
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _define(
    name: str,
    folder: str,
    parameters: Mapping[str, Any],
    returns: Any,
    pack: Callable[[Sequence[Any]], tuple[Any, ...]],
    check: Callable[[tuple[Any, ...]], None],
    results: Callable[[tuple[Any, ...]], list[Result]],
) -> CustomOpDef:
    schema = _schema(parameters, returns)
    one, listed = returns is Tensor, returns == list[Tensor]

    def gathered(tensors: list[Tensor]) -> Any:
        return tensors[0] if one else tensors if listed else tuple(tensors)

    def chosen(flat: Sequence[Any]) -> Callable[..., Any]:
        tensor = _first(flat)
        return implementation(name, tensor.device.type, tensor.dtype, tensor)

    def kernel(*flat: Any) -> Any:
        packed = pack(flat)
        check(packed)
        _refuse_tangents(name, flat)
        function = chosen(flat)
        found = function(*flat) if isinstance(function, CustomOpDef) else function(*packed)
        tensors = [found] if one else found
        return gathered(
            [
                (tensor if tensor.dtype == result.dtype else tensor.to(result.dtype)).contiguous(
                    memory_format=result.layout
                )
                for tensor, result in zip(tensors, results(packed), strict=True)
            ]
        )

    def fake(*flat: Any) -> Any:
        packed = pack(flat)
        check(packed)
        device = _first(flat).device
        return gathered(
            [
                torch.empty(result.shape, dtype=result.dtype, device=device, memory_format=result.layout)
                for result in results(packed)
            ]
        )

    def compiled(mode: Any, call: Any, types: Any, flat: Any, keywords: Any) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        # torch.compile, on its way to a graph: an operator made of Triton kernels is taken apart into them. An
        # exported program keeps the call, since it may run on another backend.
        if custom_triton_ops_decomposition_disabled() or not isinstance(chosen(flat), CustomOpDef):
            return mode.__torch_dispatch__(call, types, flat, keywords)
        with mode:
            return kernel(*flat, **keywords)

    operator = torch.library.custom_op(f"bkd_fast::{name}", kernel, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    operator.register_torch_dispatch(FunctionalTensorMode, compiled)
    OPERATORS[name] = Operator(schema, pack)
    add_operator(name, folder)
    return operator


def no_gradient(name: str) -> str:
    """Return why an operator has no gradient that has a use in inference alone, and what to do."""
    return (
        f"{name} has no gradient; call it under torch.no_grad(), detach its inputs, or use "
        f"bkd_fast.ops.{name}.reference, which is plain PyTorch"
    )


def _schema(parameters: Mapping[str, Any], returns: Any) -> str:
    def prototype() -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    prototype.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()],
        return_annotation=returns,
    )
    # Strides, sizes and radii are constants of a graph.
    return torch.library.infer_schema(prototype, mutates_args=()).replace("SymInt", "int")


def _refuse_backward(operator: CustomOpDef, message: str) -> None:
    def backward(*_: Any) -> None:
        raise RuntimeError(message)

    operator.register_autograd(backward)


def _refuse_tangents(name: str, flat: Sequence[Any]) -> None:
    """Refuse tensors with a tangent: below autograd it would be lost, and the result silently constant.

    Under torch.func.jvp tangents are out of sight here, so that every call is refused.
    """
    if forward_ad._current_level < 0:
        return
    with forward_ad._set_fwd_grad_enabled(True):
        tangent = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in _tensors(flat))
    if tangent or eager_transforms.JVP_NESTING:
        raise RuntimeError(
            f"{name} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): use reverse mode, "
            "torch.autograd.grad or backward()"
        )


def _slots(fields: Mapping[str, Any], given: Sequence[Any]) -> list[Tensor | None]:
    """Return all tensors of the arguments, None where an optional one is absent."""
    slots: list[Tensor | None] = []
    for value, kind in zip(given, fields.values(), strict=True):
        if kind == list[Tensor]:
            slots += value
        elif kind in _SLOTS:
            slots.append(value)
    return slots


def _first(values: Sequence[Any]) -> Tensor:
    for tensor in _tensors(values):
        return tensor
    raise ValueError("an operator needs a tensor, and was given none")


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (part for part in value if isinstance(part, Tensor))
