"""How Triton kernels become operators of PyTorch, and how their block sizes are found.

Every kernel is tuned when a problem of a new kind first runs: each of its configurations is timed once, and Triton
keeps the result on disk. All of them compile for every architecture that tools/triton_gate names, within the smallest
shared memory among those, so that none is tried in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on the CPU, slowly, as numpy does
NAMESPACE = "bkd_fast_triton"

Kinds = Mapping[str, Sequence[triton.Config]]


def operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function of PyTorch operators and Triton kernels, so that ``torch.compile`` sees through it."""

    def register(function: Callable[..., Any]) -> Any:
        if INTERPRETED:  # which cannot run on the tensors without data that compilers have: to them it stays opaque
            return function
        return triton_op(f"{NAMESPACE}::{function.__name__}", function, mutates_args=(), schema=schema)

    return register


class Tuned:
    """A kernel with one set of configurations for each kind of arithmetic.

    ``half``: float16 and bfloat16, ``tf32`` and ``ieee``: float32 with and without the tensor cores' rounding; kernels
    without products have the one kind ``any``.
    """

    def __init__(self, kernel: Any, kinds: Kinds, key: Sequence[str], sums: Sequence[str] = ()) -> None:
        """
        Args:
            kernel: what ``triton.jit`` made.
            kinds: configurations by kind.
            key: arguments that a new tuning depends on, beside the types of the tensors.
            sums: arguments that the kernel adds to, which tuning must leave as they were.
        """
        self.kernel, self.kinds = kernel, kinds
        self._tuners = {
            # The interpreter has no clock: it takes the first.
            kind: triton.autotune(
                list(configs[:1] if INTERPRETED else configs), key=list(key), reset_to_zero=list(sums) or None,
                cache_results=True,
            )(kernel)
            for kind, configs in kinds.items()
        }  # fmt: skip

    def __call__(self, kind: str = "any") -> Any:
        """The autotuner of a kind, to be wrapped and launched."""
        return self._tuners[kind]


def config(warps: int, stages: int = 1, **blocks: int) -> triton.Config:
    """Block sizes as the kernels name them: ``config(4, 3, BLOCK_M=64)``."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def kind_of(tensor: Tensor, tf32: bool) -> str:
    """Which configurations products of a tensor's type take."""
    if tensor.dtype != torch.float32:
        return "half"
    return "tf32" if tf32 else "ieee"


def bucket(count: int) -> int:
    """A number that grows with the logarithm of ``count``: problems of one bucket share a tuning.

    0 where the count is a symbol, so that a compiled program does not depend on its value.
    """
    return count.bit_length() if isinstance(count, int) else 0


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Of images, channels and pixels, for a tensor whose rows lie one behind the other."""
    channels, pixels = tensor.shape[1], tensor.shape[2] * tensor.shape[3]
    if tensor.is_contiguous():
        return channels * pixels, pixels, 1
    return channels * pixels, 1, channels
