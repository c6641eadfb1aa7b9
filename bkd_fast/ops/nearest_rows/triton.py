"""The nearest rows beside Triton kernels: PyTorch multiplies and selects."""

from __future__ import annotations

from bkd_fast.ops.nearest_rows.reference import nearest_rows

__all__ = ["nearest_rows"]
