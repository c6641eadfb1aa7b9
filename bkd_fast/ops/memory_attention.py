"""The sparse read-out of a memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bkd_fast.ops.checks import check_shape, check_tensors
from bkd_fast.ops.registration import empty_like, refuse_double_backward, register


def sparse_memory_attention(
    query: Tensor, memory: Tensor, threshold: float, temperature: float = 1.0, renormalize: bool = False
) -> Tensor:
    """Replaces each query by its sparse, attention-weighted sum of memory items (BKD Eq. 6-10; Gong et al., MemAE).

    ``w = softmax(cos(query, items) / temperature)``, ``w' = relu(w - threshold) w / (|w - threshold| + 1e-12)``, and
    the result is ``w' memory``. The cosine is ``dot / max(|a| |b|, 1e-8)``, so that a zero vector is similar to
    nothing. Arithmetic is float32 for half precision.

    Args:
        query: (..., N).
        memory: (I, N).
        threshold: weights up to it are pruned, 0 to 1.
        temperature: positive; 1 = the paper's.
        renormalize: divide w' by its sum; a row whose weights are all pruned stays zero.

    Returns:
        (..., N) in the dtype of ``query``, contiguous.

    Raises:
        TypeError, ValueError: the message names the argument, what it was and what it should be.
    """
    name = "sparse_memory_attention"
    check_tensors(name, {"query": query, "memory": memory})
    if query.ndim == 0:
        raise ValueError(f"{name}: query has shape (), expected (..., N)")
    check_shape(name, "memory", memory, ("I", query.shape[-1]))
    if 0 in memory.shape:
        raise ValueError(f"{name}: memory has shape {tuple(memory.shape)}, expected at least one item of one channel")
    if not 0 <= threshold <= 1:
        raise ValueError(f"{name}: threshold is {threshold}, expected 0 to 1")
    if not temperature > 0:
        raise ValueError(f"{name}: temperature is {temperature}, expected a positive number")
    return _attention(query, memory, float(threshold), float(temperature), renormalize)


def _fake(query: Any, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def _backward_fake(
    grad: Any, query: Any, memory: Any, threshold: Any, temperature: Any, renormalize: Any, needs: Any
) -> Any:
    return query.new_empty(query.shape if needs[0] else 0), empty_like(memory, needs[1])


_SETTINGS = "float threshold, float temperature, bool renormalize"
SCHEMA = f"(Tensor query, Tensor memory, {_SETTINGS}) -> Tensor"
BACKWARD_SCHEMA = f"(Tensor grad, Tensor query, Tensor memory, {_SETTINGS}, bool[] needs) -> (Tensor, Tensor)"
_attention = register("sparse_memory_attention", SCHEMA, _fake)
_attention_backward = register("sparse_memory_attention_backward", BACKWARD_SCHEMA, _backward_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, memory, *ctx.settings = inputs
    ctx.save_for_backward(query, memory)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    by_query, by_memory = _attention_backward(grad, *ctx.saved_tensors, *ctx.settings, needs)
    return by_query if needs[0] else None, by_memory if needs[1] else None, None, None, None


_attention.register_autograd(_autograd, setup_context=_setup)
refuse_double_backward(_attention_backward, "sparse_memory_attention")
