"""The native extension is compiled just in time where it is missing, and what hinders it is said.

And the compiled file takes from torch only what stays the same from version to version.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest

from bkd_fast import extension
from bkd_fast.extension import cpu

# An installation without the compiled extension.
WITHOUT = "import sys; sys.modules['bkd_fast._C'] = None; "
CALL = """
import torch
from bkd_fast.ops import backend, distillation_loss
with backend("native"):
    print(distillation_loss([torch.ones(1, 2, 3, 3)], [torch.ones(1, 2, 3, 3)]).item())
"""


def run(code, **environment):
    found = {key: value for key, value in os.environ.items() if not key.startswith("BKD_FAST")}
    command = [sys.executable, "-c", WITHOUT + code]
    return subprocess.run(command, env={**found, **environment}, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.skipif(extension.compiler() is None, reason="no C++ compiler")
def test_compiled_just_in_time_once(tmp_path):
    first = run(CALL, BKD_FAST_JIT="1", XDG_CACHE_HOME=str(tmp_path))
    assert first.returncode == 0, first.stderr
    assert float(first.stdout) == pytest.approx(0, abs=1e-6)
    assert "compiling the native kernels once" in first.stderr
    second = run(CALL, BKD_FAST_JIT="1", XDG_CACHE_HOME=str(tmp_path))
    assert float(second.stdout) == pytest.approx(0, abs=1e-6)
    assert "compiling" not in second.stderr


def test_without_the_extension_the_reference_runs_and_info_says_so(tmp_path):
    found = run("from bkd_fast import ops; facts = ops.describe(); print(facts['backends']['native'], facts['runs'])")
    assert found.returncode == 0, found.stderr
    assert "set BKD_FAST_JIT=1 to compile" in found.stdout
    assert "cpu reference" in found.stdout


def test_a_missing_compiler_is_named(tmp_path):
    found = run(CALL, BKD_FAST_JIT="1", XDG_CACHE_HOME=str(tmp_path), PATH="", CXX="")
    assert found.returncode
    assert "there is no C++ compiler: install g++ or clang++, or name one with CXX" in found.stderr


def test_what_the_compiler_says_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    with pytest.raises(RuntimeError, match="compiling the native kernels failed"):
        extension.build(tmp_path)


def test_a_compiler_without_amx_builds_the_other_instruction_sets(tmp_path):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho no -mamx-tile >&2\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    for compiler in (str(old), f"{old} -pipe", str(tmp_path / "none"), ""):
        assert "amx" not in cpu.bfloat_tiers(compiler)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("objdump") is None, reason="no objdump")
def test_the_built_extension_multiplies_tiles():
    built = importlib.util.find_spec("bkd_fast._C")
    if built is None or "amx" not in cpu.bfloat_tiers(extension.compiler() or ""):
        pytest.skip("installed without these kernels")
    code = subprocess.run(["objdump", "-d", built.origin], capture_output=True, text=True, check=True).stdout
    tiles = ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease")
    assert [name for name in tiles if f"\t{name}" not in code] == []


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="no nm that reads ELF files")
@pytest.mark.parametrize("name", ["bkd_fast._C", "bkd_fast._cuda"])
def test_nothing_of_torchs_cpp_classes_is_linked_to(name):
    """One file serves every torch from 2.10 on as long as it uses the C functions of the stable ABI alone."""
    built = importlib.util.find_spec(name)
    if built is None:
        pytest.skip("installed without these kernels")
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", "--format=posix", built.origin]
    needed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [symbol for symbol in needed if re.search(r"\b(at|c10|torch)::", symbol)] == []
    assert [symbol for symbol in needed if symbol.startswith("aoti_torch_")]  # nm did list what there is
