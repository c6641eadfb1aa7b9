"""Means over the cells of a grid on the CPU: PyTorch's kernels."""

from __future__ import annotations

from bkd_fast.ops.grid_means.reference import grid_means

__all__ = ["grid_means"]
