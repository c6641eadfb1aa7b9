"""Levels side by side on the CPU: PyTorch's kernels."""

from __future__ import annotations

from bkd_fast.ops.join_levels.reference import join_levels

__all__ = ["join_levels"]
