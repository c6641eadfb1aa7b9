"""Triton kernels as operators of PyTorch, and the tuning of their block sizes.

Every kernel is tuned when a problem of a new kind first runs: each of its configurations is timed once, and Triton
keeps the result on disk. All of them compile for every architecture that tools/triton_gate names, within its registers
and shared memory, so that none is tried in vain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from bkd_fast.ops.backend import Kernels
from bkd_fast.ops.registration import OPERATORS

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on the CPU, slowly, as numpy does
NAMESPACE = "bkd_fast_triton"
_HALF = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)  # the interpreter is wrong for bfloat16
DEVICES = dict.fromkeys(("cuda", "cpu") if INTERPRETED else ("cuda",), Kernels("triton", (torch.float32, *_HALF)))

Kinds = Mapping[str, Sequence[triton.Config]]


def operator(function: Callable[..., Any]) -> Any:
    """Register a function of PyTorch operators and Triton kernels, so that ``torch.compile`` sees through it.

    Its name is the operator's, from which its schema follows.
    """
    if INTERPRETED:  # the interpreter needs data, which a compiler's tensors lack: to compilers it stays opaque
        return function
    schema, pack = OPERATORS[function.__name__]

    @functools.wraps(function)
    def flat(*arguments: Any) -> Any:
        return function(*pack(arguments))

    return triton_op(f"{NAMESPACE}::{function.__name__}", flat, mutates_args=(), schema=schema)


class Tuned:
    """A kernel with one set of configurations for each kind of arithmetic.

    ``half``: float16 and bfloat16, ``tf32`` and ``ieee``: float32 with and without the tensor cores' rounding; kernels
    without products have the one kind ``any``.
    """

    def __init__(
        self, kernel: Any, kinds: Kinds, key: Sequence[str], sums: Sequence[str] = (),
        prune: Callable[..., list[triton.Config]] | None = None,
    ) -> None:  # fmt: skip
        """Make an autotuner for each kind.

        Args:
            kernel: made by ``triton.jit``.
            kinds: configurations by kind.
            key: arguments that a new tuning depends on, beside the types of the tensors.
            sums: arguments that the kernel adds to, which tuning must reset.
            prune: takes configurations and arguments by name, of which those in ``key`` may count, and returns the
                configurations worth timing, at least one.
        """
        self.kernel, self.kinds = kernel, kinds
        self._tuners = {
            # The interpreter has no clock: it takes the first.
            kind: triton.autotune(
                list(configs[:1] if INTERPRETED else configs), key=list(key), reset_to_zero=list(sums) or None,
                cache_results=True, prune_configs_by=None if prune is None else {"early_config_prune": prune},
            )(kernel)
            for kind, configs in kinds.items()
        }  # fmt: skip

    def __call__(self, kind: str = "any") -> Any:
        """Return the autotuner of a kind, to be wrapped and launched."""
        return self._tuners[kind]


def config(warps: int, stages: int = 1, **blocks: int) -> triton.Config:
    """Return block sizes as the kernels name them: ``config(4, 3, BLOCK_M=64)``."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def kind_of(tensor: Tensor, tf32: bool) -> str:
    """Return the kind of configurations for products of a tensor's dtype."""
    if tensor.dtype != torch.float32:
        return "half"
    return "tf32" if tf32 else "ieee"


def bucket(count: int) -> int:
    """Return a number that grows with the logarithm of ``count``: problems of one bucket share a tuning.

    0 where the count is a symbol, so that a compiled program does not depend on its value.
    """
    return count.bit_length() if isinstance(count, int) else 0


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Return the strides of images, channels and pixels of a tensor whose rows are adjacent."""
    channels, pixels = tensor.shape[1], tensor.shape[2] * tensor.shape[3]
    if tensor.is_contiguous():
        return channels * pixels, pixels, 1
    return channels * pixels, 1, channels
