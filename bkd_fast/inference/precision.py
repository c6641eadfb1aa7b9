"""The convolutions of a frozen model in half precision; everything else stays float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bkd_fast.errors import BKDError, check_choice

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class InPrecision(nn.Module):
    """A network in a type of its own: what it is given is converted, and what it gives is float32 again."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, features: Any, *others: Any) -> Any:
        """``features``: a tensor or several; ``others`` are handed on as they are."""
        several = isinstance(features, (list, tuple))
        narrow = [level.to(self.dtype) for level in features] if several else features.to(self.dtype)
        found = self.network(narrow, *others)
        return found.float() if isinstance(found, Tensor) else [level.float() for level in found]


def check_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type of a precision.

    Raises:
        BKDError: an unknown one, or one that the device does not compute in: it would be slower than float32.
    """
    check_choice("precision", precision, PRECISIONS)
    if device.type == "cpu" and precision == "fp16":
        raise BKDError("precision 'fp16' is for GPUs: on a CPU use '32' or 'bf16'")
    if device.type == "cpu" and precision == "bf16" and not _cpu_multiplies_bf16():
        raise BKDError("precision 'bf16': this CPU has no instructions for bfloat16 (AVX512-BF16 or AMX): use '32'")
    return PRECISIONS[precision]


def _cpu_multiplies_bf16() -> bool:
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16")) or torch.cpu._is_avx512_bf16_supported()
