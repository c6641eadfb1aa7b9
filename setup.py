"""Builds the native extensions; everything else is in pyproject.toml.

BKD_FAST_NATIVE=0 leaves them out, =1 makes a missing compiler an error; without it a machine that has no compiler gets
a package that runs on the PyTorch reference and on Triton. BKD_FAST_CUDA does the same for the CUDA kernels, which need
a toolkit that fits torch, and no GPU.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "bkd_fast" / "extension"
# By its path: importing the package would need all it depends on.
spec = importlib.util.spec_from_file_location(
    "bkd_fast_build", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
)
assert spec is not None
assert spec.loader is not None
description = importlib.util.module_from_spec(spec)
sys.modules["bkd_fast_build"] = description
spec.loader.exec_module(description)

WANTED = os.environ.get("BKD_FAST_NATIVE", "auto")
if WANTED not in ("auto", "0", "1"):
    sys.exit(f"bkd_fast: BKD_FAST_NATIVE is {WANTED!r}, expected auto, 0 or 1")
NATIVE = WANTED == "1" or (WANTED == "auto" and description.compiler() is not None)
TOOLKIT = None
if not NATIVE:
    print("bkd_fast: built without native kernels (no C++ compiler, or BKD_FAST_NATIVE=0)", file=sys.stderr)
else:
    try:
        TOOLKIT, reason = description.wanted_toolkit()
    except RuntimeError as error:
        sys.exit(str(error))
    if TOOLKIT is None:
        print(f"bkd_fast: built without CUDA kernels: {reason}", file=sys.stderr)


class Build(build_ext):
    """Compiles with the package's own description, which the just-in-time build shares."""

    def build_extension(self, extension: Extension) -> None:
        """Compile one extension and copy it to where setuptools expects it."""
        folder = Path(self.build_temp).resolve()
        if extension.name == "bkd_fast._cuda":
            built = description.build_cuda(folder, TOOLKIT)
        else:
            built = description.build(folder)
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)

    def get_ext_filename(self, fullname: str) -> str:
        """Return a file name without a Python version: the extensions use the stable ABI."""
        *folders, name = fullname.split(".")
        return os.path.join(*folders, f"{name}.abi3.so")


NAMES = (["bkd_fast._C"] if NATIVE else []) + (["bkd_fast._cuda"] if TOOLKIT else [])
setup(
    ext_modules=[Extension(name, sources=[], py_limited_api=True) for name in NAMES],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if NATIVE else {},
)
