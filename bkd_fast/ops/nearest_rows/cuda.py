"""The nearest rows on CUDA devices: cuBLAS multiplies, and PyTorch selects."""

from __future__ import annotations

from bkd_fast.ops.nearest_rows.reference import nearest_rows

__all__ = ["nearest_rows"]
