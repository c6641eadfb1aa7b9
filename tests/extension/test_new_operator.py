"""A copy of the template under another name is a complete operator: no existing file is edited.

And what is compiled with wide instructions stays where it belongs: no function of it can take the place of another's.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bkd_fast import extension

ROOT = Path(extension.sources_folder()).parent
pytestmark = [
    pytest.mark.skipif(extension.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(importlib.util.find_spec("ninja") is None, reason="no ninja"),
]
TIERS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
NEW = (("scaled_copy", "plain_copy"), ("ScaledCopy", "PlainCopy"), ("ops.template", "ops.plain_copy"))
BUILD = """
import shutil, sys
from pathlib import Path
from bkd_fast import extension
assert extension.sources_folder() == Path(sys.argv[1]) / "csrc"
shutil.copy(extension.build(Path(sys.argv[1]) / "objects"), Path(sys.argv[1]) / "bkd_fast" / "_C.abi3.so")
"""
CALL = """
import torch, bkd_fast._C
kernels = torch.ops.bkd_fast_native
for tier in range(len(kernels.cpu_tiers().split())):
    for dtype in (torch.float32, torch.float64):
        for count in (0, 1, 7, 40_000):
            x = torch.randn(count, dtype=dtype)
            for function in (kernels.scaled_copy, kernels.plain_copy):
                output = torch.empty_like(x)
                function(tier, x, 2.5, output)
                assert torch.equal(output, 2.5 * x)
"""
CALL_PYTHON = """
import torch
from bkd_fast import ops
from bkd_fast.ops.plain_copy import plain_copy
x = torch.randn(2, 3, 5, 7, requires_grad=True)
for name in ("native", "reference"):
    with ops.backend(name):
        output = plain_copy(x, 2.5)
        (grad,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(output, 2.5 * x)
    assert torch.equal(grad, torch.full_like(x, 2.5))
assert {"plain_copy", "plain_copy_backward"} <= set(ops.describe()["runs"])
"""


def run(tree, code):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BKD_FAST")}
    command = [sys.executable, "-c", code, str(tree)]
    ran = subprocess.run(
        command, cwd=tree, env={**environment, "PYTHONPATH": str(tree)}, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def renamed(path, target):
    text = path.read_text(encoding="utf-8")
    for old, new in NEW:
        text = text.replace(old, new)
    assert not target.exists()
    target.parent.mkdir(exist_ok=True)
    target.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A built tree with the template and its copy; the other operators' kernels are left out, which saves time."""
    folder = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "bkd_fast", folder / "bkd_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "csrc" / "common", folder / "csrc" / "common")
    (folder / "csrc" / "cpu").mkdir()
    for path in [*(ROOT / "csrc" / "cpu").glob("*.h"), *(ROOT / "csrc" / "cpu").glob("scaled_copy*.cpp")]:
        shutil.copy(path, folder / "csrc" / "cpu")
    shutil.copy(ROOT / "csrc" / "cpu" / "dispatch.cpp", folder / "csrc" / "cpu")
    shutil.copy(ROOT / "csrc" / "library.cpp", folder / "csrc")
    for path in (ROOT / "csrc" / "cpu").glob("scaled_copy.*"):
        renamed(path, folder / "csrc" / "cpu" / path.name.replace("scaled_copy", "plain_copy"))
    for path in (ROOT / "bkd_fast" / "ops" / "template").glob("*.py"):
        renamed(path, folder / "bkd_fast" / "ops" / "plain_copy" / path.name)
    run(folder, BUILD)
    return folder


def test_a_copy_of_the_template_is_an_operator(tree):
    run(tree, CALL)
    run(tree, CALL_PYTHON)


def check_symbols(folder):
    """No function of a tier is weak: the linker would keep any one of equal ones, with any instructions."""
    objects = sorted([*folder.glob("*.simd.cpp.*.o"), *folder.glob("*.bfloat.cpp.*.o")])
    assert {path.name.split(".")[-2] for path in objects} <= set(TIERS)
    for path in objects:
        tier = path.name.split(".")[-2]
        command = ["nm", "--defined-only", "--demangle", str(path)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        symbols = [(name, kind) for _, kind, name in (line.split(" ", 2) for line in lines)]
        assert [name for name, kind in symbols if kind in "Wu"] == []
        assert [name for name, kind in symbols if kind == "V" and not name.startswith("DW.ref.")] == []
        shared = [name for name, kind in symbols if kind == "T"]
        assert shared
        assert [name for name in shared if not name.startswith(f"bkd::{tier}::")] == []
    return objects


needs_nm = pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="no nm of ELF files")


@needs_nm
def test_no_function_of_an_instruction_set_can_replace_another(tree):
    assert len(check_symbols(tree / "objects")) in (2, 6)


@needs_nm
@pytest.mark.slow
def test_no_kernel_of_an_instruction_set_can_replace_another(tmp_path):
    extension.build(tmp_path)
    simd, bfloat = (len(list((ROOT / "csrc" / "cpu").glob(f"*.{kind}.cpp"))) for kind in ("simd", "bfloat"))
    assert len(check_symbols(tmp_path)) in (simd, 3 * simd + bfloat, 3 * simd + 2 * bfloat)


@needs_nm
def test_a_weak_function_is_seen(tmp_path):
    source = tmp_path / "weak.cpp"
    source.write_text("namespace bkd { template <class T> __attribute__((noinline)) T twice(T x) { return 2 * x; }\n"
                      "namespace avx2 { float weak(float x) { return twice(x); } } }\n")  # fmt: skip
    subprocess.run([extension.compiler(), "-O3", "-c", source, "-o", tmp_path / "weak.simd.cpp.avx2.o"], check=True)
    with pytest.raises(AssertionError, match="twice"):
        check_symbols(tmp_path)
