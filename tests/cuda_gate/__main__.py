"""``python tests/cuda_gate --update``: the kernels of now become the budget and the table in docs/proof.md."""

import sys

from budget import faults, write_budget
from compiling import compiled
from table import PAGE, with_table

kernels = compiled()
if "--update" in sys.argv[1:]:
    write_budget(kernels)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), kernels), encoding="utf-8")
found = faults(kernels)
print("\n".join(found) or f"{len(kernels)} kernels, all within their budget")
sys.exit(bool(found))
