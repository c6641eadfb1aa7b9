"""Ablations: the paper's tables and free grids over configuration fields, on any data set, over several seeds."""

from bkd_fast.ablation.ablate import ablate
from bkd_fast.ablation.variants import TABLES, Variant, grid_variants, table_variants

__all__ = ["TABLES", "Variant", "ablate", "grid_variants", "table_variants"]
