"""Every CUDA kernel compiles for every architecture, within its budget, with the instructions that make it fast."""

import pytest

from tools.cuda_gate import budget, compiling, table

reason = compiling.why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
COMMON = "80"  # the one architecture that `make test` compiles for


@pytest.fixture(scope="module", params=[COMMON, pytest.param("all", marks=pytest.mark.slow)])
def kernels(request):
    return compiling.compiled((COMMON,) if request.param == COMMON else compiling.ARCHITECTURES)


def test_every_kernel_keeps_to_its_budget(kernels):
    found = budget.faults(kernels)
    assert not found, "\n".join([*found, "if that is meant: python -m tools.cuda_gate --update"])


def test_a_kernel_that_needs_more_is_found(kernels):
    one = kernels[0]
    worse = one._replace(registers=256, spills=8, instructions=())
    found = budget.faults([worse, *kernels[1:]])
    assert f"{one.name} on {one.architecture} spills 8 bytes" in found
    assert any(f"{one.name} on {one.architecture} needs 256 registers" in fault for fault in found)
    assert f"{one.name} on {one.architecture} has a budget and does not exist" in budget.faults(kernels[1:])
    assert "a new one on 80 has no budget" in budget.faults(
        [*kernels, one._replace(name="a new one", architecture="80")]
    )
    plain = [kernel._replace(instructions=()) for kernel in kernels]
    assert "deform_conv<half, yes, 128, 128> on 80 has no HMMA" in budget.faults(plain)


def test_a_kernel_that_issues_more_is_found(kernels):
    name = "deform_conv<half, yes, 128, 256>"
    one = next(kernel for kernel in kernels if (kernel.name, kernel.architecture) == (name, COMMON))
    assert 0 < one.issued < 10
    for issued in (0.0, 17.6):
        found = budget.faults([one._replace(issued=issued), *(kernel for kernel in kernels if kernel != one)])
        assert [fault for fault in found if f"{one.name} on {one.architecture} issues {issued}" in fault]


def test_the_main_loop_is_the_shortest_with_products():
    """13 instructions for two products; the loop around it, and one without products, do not count."""
    code = ["MOV R1, R2", *["IADD3 R3, R3, 0x1, RZ"] * 10, "HMMA.16816.F32 R4, R8, R12, R4"]
    code = [*code, "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA 0x0010", "@!P1 BRA 0x00e0", "BRA.U UP0, 0x0000"]
    body = "\n".join(f"        /*{16 * index:04x}*/ {one} ;" for index, one in enumerate(code))
    assert compiling.issued(body) == 13 / 2
    assert compiling.issued("        /*0000*/ MOV R1, R2 ;\n        /*0010*/ BRA 0x0010 ;") == 0


def test_an_instruction_of_wgmma_counts_as_those_of_a_warp():
    """Ten instructions, one of which multiplies 16 rows of a warp by 128 columns: 16 tiles of 16 x 8."""
    code = [*["IADD3 R3, R3, 0x1, RZ"] * 8, "HGMMA.64x128x16.F32 R24, R156, gdesc[UR16], R24", "@P0 BRA 0x0000"]
    body = "\n".join(f"        /*{16 * index:04x}*/ {one} ;" for index, one in enumerate(code))
    assert compiling.issued(body) == pytest.approx(10 / 16, abs=0.01)


def test_a_rule_of_9_0a_holds_there_alone():
    assert [one for one in compiling.ARCHITECTURES if budget.concerns("90a", one)] == ["90a"]
    assert [one for one in compiling.ARCHITECTURES if budget.concerns("90", one)] == ["90", "90a", "100", "120"]


def test_products_that_ptxas_serializes_are_refused():
    log = "ptxas warning : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    with pytest.raises(RuntimeError, match="ptxas lets products wait for each other"):
        compiling._read(log, "", "90a")


@pytest.mark.slow
def test_wgmma_is_compiled_for_9_0a_and_there_alone():
    """Its products stay in flight while the next samples are interpolated, and its weights come by bulk copies."""
    kernels = [one for one in compiling.compiled(("90", "90a")) if one.name.startswith("deform_conv_wgmma")]
    assert {one.name: one.architecture for one in kernels} == {
        f"deform_conv_wgmma<{dtype}, {columns}>": "90a" for dtype in ("half", "bfloat16") for columns in (128, 256)
    }
    for one in kernels:
        assert {"HGMMA", "UBLKCP"} <= set(one.instructions)
        assert not {"HMMA", "LDSM", "LDGSTS"} & set(one.instructions)
        worse = budget.faults([one._replace(instructions=(), issued=9.0)])
        assert f"{one.name} on 90a has no HGMMA" in worse
        assert any(f"{one.name} on 90a issues 9.0 instructions" in fault for fault in worse)


def test_the_table_has_a_row_for_each_kernel(kernels):
    assert len(table.table(kernels).splitlines()) == 2 + len({kernel.name for kernel in kernels})


def test_blocks_follow_from_what_a_kernel_needs():
    """As the occupancy calculator has them for 128 registers, 40 KB and 256 threads."""
    kernel = compiling.Kernel("k", "80", 128, 40 * 1024, 0, 0, 256, ())
    assert table.blocks(kernel) == 2
    assert table.blocks(kernel._replace(registers=32)) == 4 == 164 // 41
    assert table.blocks(kernel._replace(registers=32, shared=0)) == 8
    assert table.blocks(kernel._replace(registers=64, shared=0, architecture="75")) == 4
