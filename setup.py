"""Builds the native extension; everything else is in pyproject.toml.

BKD_FAST_NATIVE=0 leaves it out, =1 makes a missing compiler an error; without it a machine that has no compiler gets
a package that runs on the PyTorch reference and on Triton.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
# By its path: importing the package would need all it depends on.
spec = importlib.util.spec_from_file_location("bkd_fast_build", HERE / "bkd_fast" / "_build.py")
assert spec is not None
assert spec.loader is not None
description = importlib.util.module_from_spec(spec)
spec.loader.exec_module(description)

WANTED = os.environ.get("BKD_FAST_NATIVE", "auto")
if WANTED not in ("auto", "0", "1"):
    sys.exit(f"bkd_fast: BKD_FAST_NATIVE is {WANTED!r}, expected auto, 0 or 1")
NATIVE = WANTED == "1" or (WANTED == "auto" and description.compiler() is not None)
if not NATIVE:
    print("bkd_fast: built without native kernels (no C++ compiler, or BKD_FAST_NATIVE=0)", file=sys.stderr)


class Build(build_ext):
    """Compiles with the package's own description, which the just-in-time build shares."""

    def build_extension(self, extension: Extension) -> None:
        built = description.build(Path(self.build_temp).resolve())
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], description.FILE)


setup(
    ext_modules=[Extension("bkd_fast._C", sources=[], py_limited_api=True)] if NATIVE else [],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if NATIVE else {},
)
