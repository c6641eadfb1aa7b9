"""The BKD network: teacher, alignment, memory, bottleneck, student, and the whole."""

from bkd_fast.model.bkd import BKD, Distillation

__all__ = ["BKD", "Distillation"]
