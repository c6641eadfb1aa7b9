"""``python -m tools.triton_gate --update``: what the kernels of now need becomes their budget."""

import sys

from tools.triton_gate.budget import faults, growth, write
from tools.triton_gate.kernels import compiled

if __name__ == "__main__":  # the processes that compile import this file too
    kernels = compiled()
    if "--update" in sys.argv[1:]:
        write(kernels)
    found = faults(kernels) + growth(kernels)
    print("\n".join(found) or f"{len(kernels)} kernels, all within their budget")
    sys.exit(bool(found))
