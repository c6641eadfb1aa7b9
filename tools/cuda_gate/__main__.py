"""``--update``: the kernels of now become the budget. ``--table``: print registers and blocks a multiprocessor."""

import sys

from tools.cuda_gate.budget import faults, write_budget
from tools.cuda_gate.compiling import compiled
from tools.cuda_gate.table import table

kernels = compiled()
if "--update" in sys.argv[1:]:
    write_budget(kernels)
if "--table" in sys.argv[1:]:
    print(table(kernels))
found = faults(kernels)
print("\n".join(found) or f"{len(kernels)} kernels, all within their budget")
sys.exit(bool(found))
