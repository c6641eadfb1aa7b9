"""The temporary memory of a call."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # see proc_pid_clear_refs(5)


def extra_memory(call: Callable[[], Any], device: str = "cpu") -> float:
    """Return the peak memory of one call beyond what its result keeps, in MB (2^20 bytes).

    The call runs twice. What the first run keeps (threads, packed weights, a library's pool) is not temporary and not
    counted. Memory that the allocator merely cached is released before the second run, so that its reuse is counted. On
    a CPU these are the process's resident pages, which needs Linux; on CUDA, allocations of torch's allocator.

    Returns:
        MB, at least 0; NaN where the system cannot tell.
    """
    call()
    gc.collect(1)  # cycles that the call left; a whole collection would take a quarter of a second
    if device != "cpu":
        return _on_cuda(call)
    if not _reset_peak():
        return float("nan")
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    _trim()
    # Pages of the result that were touched: an alias of an input adds none, and so does a buffer that was never filled.
    kept = min(_bytes(result), max(0, _status("VmRSS") - before))
    return max(0, peak - before - kept) / 2**20


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors of a result, however nested, without their graph; other values are left out."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (list, tuple)) else []


def _on_cuda(call: Callable[[], Any]) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    kept = min(_bytes(result), max(0, torch.cuda.memory_allocated() - before))
    return max(0, torch.cuda.max_memory_allocated() - before - kept) / 2**20


def _bytes(result: Any) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors(result)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _reset_peak() -> bool:
    """Release free heap memory and reset the peak; return False where the system cannot."""
    _trim()
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _trim() -> None:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
