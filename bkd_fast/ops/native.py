"""The compiled kernels: ``bkd_fast._C`` has those of the CPU, ``bkd_fast._cuda`` those of CUDA devices."""

from __future__ import annotations

import importlib
import os

import torch

from bkd_fast.ops.backend import Kernels

try:
    importlib.import_module("bkd_fast._C")  # which registers the kernels
except ImportError as error:
    if os.environ.get("BKD_FAST_JIT") != "1":
        raise ImportError(
            f"{error}; it was installed without a C++ compiler (install one and install again, or set BKD_FAST_JIT=1 "
            "to compile when the kernels are first used)"
        ) from error
    from bkd_fast.extension import just_in_time

    try:
        torch.ops.load_library(str(just_in_time()))
    except (RuntimeError, OSError) as failure:
        raise ImportError(str(failure)) from failure

CUDA = Kernels("cuda", (torch.float32, torch.float16, torch.bfloat16))
DEVICES = {"cpu": Kernels("cpu")}
without_cuda: str | None = None  # why there are no CUDA kernels

try:
    importlib.import_module("bkd_fast._cuda")
except ImportError as error:
    without_cuda = f"{error} (built without a CUDA toolkit that fits torch, or with BKD_FAST_CUDA=0)"
else:
    DEVICES["cuda"] = CUDA
