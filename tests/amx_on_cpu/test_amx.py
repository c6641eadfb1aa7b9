"""AMX on a machine without it: the machine code of the kernels runs, and an emulation does what the CPU does not know.

The emulation (emulation/amx_emulation.cpp) refuses what the hardware would. `make mutations` plants faults in the
kernels, each of which must be caught.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from bkd_fast import extension
from bkd_fast.extension import cpu
from bkd_fast.ops.backend import available

ROOT = Path(__file__).resolve().parent.parent.parent
EMULATION = Path(__file__).resolve().parent / "emulation"
OPERATORS = ("deform_conv", "memory_attention")


@pytest.fixture(scope="module", autouse=True)
def possible():
    if reason := available("native"):
        pytest.skip(reason)
    if "amx" not in cpu.bfloat_tiers(extension.compiler() or ""):
        pytest.skip("the compiler has no AMX")
    from bkd_fast.ops.cpu_common import simd_tiers

    if "avx512bf16" not in simd_tiers():
        pytest.skip("this machine has no AVX512-BF16, which the kernels of AMX use too")


# The emulation itself.


@pytest.fixture(scope="module")
def selftest(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("amx") / "selftest"
    sources = [EMULATION / name for name in ("selftest.cpp", "amx_emulation.cpp")]
    subprocess.run([extension.compiler(), "-std=c++17", "-O2", "-Wall", "-Werror", "-mamx-tile", "-mamx-bf16",
                    *sources, "-o", program], check=True)  # fmt: skip
    return program


def test_the_emulation_multiplies_as_the_manual_says(selftest):
    ran = subprocess.run([selftest, "products"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no permission", "Linux was not asked for tiles"),
        ("not configured", "used before ldtilecfg"),
        ("released", "used before ldtilecfg"),
        ("palette", "no such palette"),
        ("reserved", "reserved bytes are not zero"),
        ("17 rows", "more than 16 rows"),
        ("65 bytes", "more than 64 bytes of a row"),
        ("rows alone", "rows without bytes"),
        ("unused tile", "not configured"),
        ("ninth tile", "there are eight tiles"),
        ("same tile", "two of its tiles are the same"),
        ("other depth", "shapes do not fit"),
    ],
)
def test_the_emulation_refuses_what_the_hardware_refuses(selftest, case, message):
    ran = subprocess.run([selftest, case], capture_output=True, text=True)
    assert ran.returncode < 0
    assert message in ran.stderr


# The kernels.

# What the operators' own tests say of bfloat16, and of threads.
CHOSEN = "(bfloat16 or any_number_of_threads) and (conv or attention or memories) and not (portable or avx or gather)"
RUN = """
import ctypes, sys
from pathlib import Path
from tools import sanitize
sanitize.load(Path(sys.argv[1]))
import pytest
status = pytest.main(["-x", "-p", "no:faulthandler", "-p", "no:cacheprovider", *sys.argv[2:]])
emulation = ctypes.CDLL(sys.argv[1])
if not emulation.amx_emulation_products():
    sys.exit("no tiles were multiplied")
if emulation.amx_emulation_configured():
    sys.exit("tiles were not released")
sys.exit(status)
"""
SAY = """
import sys, torch
from pathlib import Path
from tools import sanitize
sanitize.load(Path(sys.argv[1]))
from bkd_fast.ops import cpu_common
print(cpu_common.simd_tiers(), cpu_common.simd_tier())
"""
LOW_LEVEL = """
query = torch.ones(2, 3).bfloat16()
cpu_common.kernels.memory_attention(4, query, query, 0.0, 1.0, False, query.clone())
"""


def run(library, code, *arguments, **environment):
    found = {key: value for key, value in os.environ.items() if not key.startswith("BKD_FAST")}
    return subprocess.run(
        [sys.executable, "-c", code, str(library), *arguments],
        cwd=ROOT, env={**found, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def run_tests(library):
    return run(library, RUN, "tests/ops/test_native.py", "-k", CHOSEN, BKD_FAST_SIMD="amx")


class Emulated(NamedTuple):
    """Sources with the emulation among them, and what is built of them."""

    sources: Path
    folder: Path

    def build(self) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "sources_folder", lambda: self.sources)
            return extension.build(self.folder)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Emulated:
    """The operators with products of bfloat16; the others are left out, which saves time."""
    folder = tmp_path_factory.mktemp("amx")
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc" / "common", sources / "common")
    (sources / "cpu").mkdir()
    shutil.copy(ROOT / "csrc" / "library.cpp", sources)
    for name in ("*.h", "dispatch.cpp", *(f"{operator}*.cpp" for operator in OPERATORS)):
        for path in (ROOT / "csrc" / "cpu").glob(name):
            shutil.copy(path, sources / "cpu")
    for path in EMULATION.glob("amx_emulation.*"):
        shutil.copy(path, sources / "cpu")
    dispatch = sources / "cpu" / "dispatch.cpp"
    dispatch.write_text('#include "amx_emulation.h"\n' + dispatch.read_text(encoding="utf-8"), encoding="utf-8")
    return Emulated(sources, folder / "objects")


@pytest.mark.slow
def test_tiles_obey_the_rule_of_the_operators(emulated):
    ran = run_tests(emulated.build())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "passed" in ran.stdout
    assert "no amx" not in ran.stdout


@pytest.mark.slow
def test_tiles_are_used_only_where_they_are_asked_for(emulated):
    library = emulated.build()
    assert run(library, SAY).stdout.split()[-2:] == ["'amx')", "avx512bf16"]
    assert run(library, SAY, BKD_FAST_SIMD="amx").stdout.split()[-2:] == ["'amx')", "amx"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("no-tile", "this CPU has no AMX-TILE"),
        ("no-bf16", "this CPU has no AMX-BF16"),
        ("refused", "Linux does not permit tiles (No space left on device)"),
    ],
)
def test_what_is_missing_is_said(emulated, lacking, message):
    library = emulated.build()
    ran = run(library, SAY, BKD_FAST_SIMD="amx", AMX_EMULATION=lacking)
    assert ran.returncode
    expected = "expected one of portable, avx2, avx512, avx512bf16 on this machine"
    assert f"BKD_FAST_SIMD is 'amx' ({message}), {expected}" in ran.stderr
    # Nor do the kernels themselves run.
    ran = run(library, SAY + LOW_LEVEL, AMX_EMULATION=lacking)
    assert ran.returncode
    assert (message if lacking == "refused" else "tier is 4, expected 0 to 3") in ran.stderr


class Fault(NamedTuple):
    """A text that occurs once in a file, and what stands there instead."""

    name: str
    file: str
    text: str
    instead: str


FAULTS = (
    Fault("rows of A as if they were dense", "tiles.h", "(4, a, a_stride * sizeof", "(4, a, TILE * sizeof"),
    Fault("rows of B as if they were dense", "tiles.h", "(6, b, COLUMNS * sizeof", "(6, b, TILE * sizeof"),
    Fault("the left columns of B twice", "tiles.h", "_tile_loadd(7, b + TILE,", "_tile_loadd(7, b,"),
    Fault("the lower rows of A twice", "tiles.h", "(5, a + TILE * a_stride,", "(5, a,"),
    Fault("columns of C exchanged", "tiles.h", "_tile_dpbf16ps(1, 5, 6);", "_tile_dpbf16ps(1, 5, 7);"),
    Fault("sums that do not start at zero", "tiles.h", "    _tile_zero(2);\n", ""),
    Fault("sums that forget the channels before", "tiles.h", "if (c.add) {", "if (false) {"),
    Fault("without the last of the depth", "tiles.h", "      add_step<Tall>(a_end, TILE, b_end);\n", ""),
    Fault("the last of B not filled up with zeros", "tiles.h", "memset(b_end, 0,", "memset(b_end, 0xff,"),
    Fault(
        "the last of A not filled up with zeros",
        "tiles.h",
        "_mm512_maskz_loadu_epi32(last,",
        "_mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), last,",
    ),
    Fault("the last of the depth is that of the panel before", "tiles.h", "b.at + whole * COLUMNS, rest", "b.at, rest"),
    Fault("fewer rows in all that follows", "tiles.h", "  shape_tiles(ROWS);\n}\n", "}\n"),
    Fault("17 rows", "tiles.h", "tile >= 6 ? TILE :", "tile >= 6 ? TILE + 1 :"),
    Fault("tiles without a configuration", "tiles.h", "Multiplier() { shape_tiles(ROWS); }", "Multiplier() {}"),
    Fault("tiles are kept", "tiles.h", "~Multiplier() { _tile_release(); }", "~Multiplier() {}"),
    Fault("no permission", "dispatch.cpp", "syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) ? errno : 0", "0"),
    Fault("the kernels of the tier before", "dispatch.h", "if (tier_at(tier) == Tier::amx) return kernel.amx(p);", ""),
)  # fmt: skip


@pytest.mark.skipif("MUTATIONS" not in os.environ, reason="make mutations runs it")
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_planted_fault_is_caught(emulated, fault):
    path = emulated.sources / "cpu" / fault.file
    right = path.read_text(encoding="utf-8")
    assert right.count(fault.text) == 1
    try:
        path.write_text(right.replace(fault.text, fault.instead), encoding="utf-8")
        assert run_tests(emulated.build()).returncode
    finally:
        path.write_text(right, encoding="utf-8")
