"""How the native extensions are built: sources and flags, for the wheel and for the just-in-time build.

Everything is written against torch's stable ABI, so that one file serves every torch from 2.10 on. ninja compiles in
parallel and only what has changed. Nothing of the package is imported here: setup.py loads it by its path.
"""

from .compiling import compiler, sources_folder
from .cpu import FILE, build, just_in_time
from .cuda import CUDA_FILE, build_cuda, wanted_toolkit

__all__ = [
    "CUDA_FILE",
    "FILE",
    "build",
    "build_cuda",
    "compiler",
    "just_in_time",
    "sources_folder",
    "wanted_toolkit",
]
