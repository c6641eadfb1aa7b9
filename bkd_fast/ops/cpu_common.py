"""What the operators need to call the CPU kernels: the instruction set, and the layout of arguments and results.

The kernels compute in float32 or float64; float16 and bfloat16 are converted, except where :func:`product_dtype` is
bfloat16. They read images channels-last.
BKD_FAST_SIMD chooses an instruction set (see :func:`simd_tiers`); without it the best one of this machine is used that
is not in UNPROVEN.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from bkd_fast.ops.registration import memory_format, wide

SIMD = "BKD_FAST_SIMD"
# Instruction sets that run only where BKD_FAST_SIMD names them: no machine that has them has run their kernels.
UNPROVEN = ("amx",)

kernels = torch.ops.bkd_fast_native


@cache
def simd_tiers() -> tuple[str, ...]:
    """Return the instruction sets that are compiled in and that this machine has, the slowest first."""
    return tuple(kernels.cpu_tiers().split())


def simd_tier() -> str:
    """Return the instruction set in use.

    Raises:
        RuntimeError: BKD_FAST_SIMD names one that is not available.
    """
    return simd_tiers()[tier()]


def tier() -> int:
    """Return the index of the instruction set in use, the first argument of every kernel."""
    chosen = os.environ.get(SIMD)
    proven = [name for name in simd_tiers() if name not in UNPROVEN]
    if not chosen:
        return len(proven) - 1
    missing = _amx_missing() if chosen == "amx" else ""
    if missing or chosen not in simd_tiers():
        reason = f" ({missing})" if missing else ""
        raise RuntimeError(f"{SIMD} is {chosen!r}{reason}, expected one of {', '.join(proven)} on this machine")
    return simd_tiers().index(chosen)


@cache
def _amx_missing() -> str:
    """Return why AMX cannot be used, or an empty string; asks Linux for its tiles."""
    return str(kernels.amx_missing())


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the factors of a product: bfloat16 where all are and the instruction set has it, else wide.

    float16 is always converted: AVX512-FP16 would also sum in float16.
    """
    if simd_tier() in ("avx512bf16", "amx") and all(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return torch.bfloat16
    return wide(tensors[0])


def dense(
    tensor: Tensor, layout: torch.memory_format = torch.contiguous_format, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a tensor in a dtype, by default its wide one, and in a layout."""
    dtype = dtype or wide(tensor)
    converted = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return converted.contiguous(memory_format=layout)


def optional(tensor: Tensor | None) -> Tensor | None:
    """Return :func:`dense` of a tensor, or None."""
    return None if tensor is None else dense(tensor)


def to_channels_last(tensor: Tensor) -> Tensor:
    """Return an image in its wide dtype and channels-last layout."""
    return dense(tensor, torch.channels_last)


def zeros_channels_last(like: Tensor, needed: bool) -> Tensor:
    """Return channels-last zeros that a kernel adds to; no elements if they are not needed."""
    if not needed:
        return torch.empty(0, dtype=wide(like))
    return torch.empty(like.shape, dtype=wide(like), memory_format=torch.channels_last).zero_()


def empty(like: Tensor, needed: bool) -> Tensor:
    """Return a contiguous buffer for a gradient; no elements if it is not needed."""
    return torch.empty(like.shape if needed else 0, dtype=wide(like))


def dense_levels(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return dense levels; those of a student get the layout of the teacher's."""
    levels = [dense(level, memory_format(level)) for level in teacher]
    others = [dense(level, memory_format(levels[index % len(levels)])) for index, level in enumerate(student)]
    return levels, others


def empty_levels(levels: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Return buffers for the gradients of dense levels; no elements if they are not needed."""
    return [
        torch.empty_like(level) if need else torch.empty(0, dtype=level.dtype)
        for level, need in zip(levels, needs, strict=True)
    ]
