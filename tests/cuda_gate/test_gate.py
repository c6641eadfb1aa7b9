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


def test_the_table_has_a_row_for_each_kernel(kernels):
    assert len(table.table(kernels).splitlines()) == 2 + len({kernel.name for kernel in kernels})


def test_blocks_follow_from_what_a_kernel_needs():
    """As the occupancy calculator has them for 128 registers, 40 KB and 256 threads."""
    kernel = compiling.Kernel("k", "80", 128, 40 * 1024, 0, 0, 256, ())
    assert table.blocks(kernel) == 2
    assert table.blocks(kernel._replace(registers=32)) == 4 == 164 // 41
    assert table.blocks(kernel._replace(registers=32, shared=0)) == 8
    assert table.blocks(kernel._replace(registers=64, shared=0, architecture="75")) == 4
