"""The sparse read-out of a memory."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bkd_fast.ops.checks import check_index, check_shape, check_tensors, check_types
from bkd_fast.ops.registration import Result, register

__all__ = ["sparse_memory_attention"]


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    query: Tensor
    memory: Tensor
    threshold: float
    temperature: float
    renormalize: bool


def sparse_memory_attention(
    query: Tensor, memory: Tensor, threshold: float, temperature: float = 1.0, renormalize: bool = False
) -> Tensor:
    """Replace each query by its sparse, attention-weighted sum of memory items (BKD Eq. 6-10; Gong et al., MemAE).

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
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: forward-mode or second derivatives.
    """
    check_types(_NAME, {"query": query, "memory": memory})
    return _operator(query, memory, float(threshold), float(temperature), renormalize)


def _check(a: Arguments) -> None:
    check_tensors(_NAME, {"query": a.query, "memory": a.memory})
    if a.query.ndim == 0:
        raise ValueError(f"{_NAME}: query has shape (), expected (..., N)")
    check_shape(_NAME, "memory", a.memory, ("I", a.query.shape[-1]))
    if 0 in a.memory.shape:
        raise ValueError(
            f"{_NAME}: memory has shape {tuple(a.memory.shape)}, expected at least one item of one channel"
        )
    check_index(_NAME, "the number of queries", a.query.shape[:-1])
    check_index(_NAME, "the number of items", a.memory.shape[:1])
    if not 0 <= a.threshold <= 1:
        raise ValueError(f"{_NAME}: threshold is {a.threshold}, expected 0 to 1")
    if not a.temperature > 0:
        raise ValueError(f"{_NAME}: temperature is {a.temperature}, expected a positive number")


def _results(a: Arguments) -> list[Result]:
    return [Result(a.query.shape, a.query.dtype)]


_NAME = "sparse_memory_attention"
_operator = register(_NAME, Arguments, check=_check, results=_results)
