"""Check the budget. ``--update``: accept the present resources. ``--table``: print registers and occupancy."""

import sys

from tools.cuda_gate.budget import faults, write_budget
from tools.cuda_gate.compiling import compiled
from tools.cuda_gate.table import table

kernels = compiled()
if "--update" in sys.argv[1:]:
    write_budget(kernels)
if "--table" in sys.argv[1:]:
    print(table(kernels))
messages = faults(kernels)
print("\n".join(messages) or f"{len(kernels)} kernels, all within their budget")
sys.exit(bool(messages))
