"""Every Triton kernel compiles in every configuration for three architectures, and keeps to what they have.

This is also where bfloat16 is covered without a GPU: the interpreter cannot do it.
"""

import pytest

from tools.triton_gate import budget as triton_budget
from tools.triton_gate import kernels as triton_kernels

reason = triton_kernels.why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(reason is not None, reason=str(reason))]


@pytest.fixture(scope="module")
def kernels():
    return triton_kernels.compiled()


def test_all_that_tuning_may_choose_fits_every_architecture(kernels):
    """No spill, shared memory of the smallest, and tensor cores where there are products."""
    assert not triton_budget.faults(kernels)


def test_every_kernel_keeps_to_its_budget(kernels):
    import triton

    if not triton.__version__.startswith(f"{triton_budget.TRITON}."):
        pytest.skip(f"the budget is of Triton {triton_budget.TRITON}, this is {triton.__version__}")
    found = triton_budget.growth(kernels)
    assert not found, "\n".join([*found, "if that is meant: python -m tools.triton_gate --update"])


def test_a_kernel_that_needs_more_is_found(kernels):
    one = next(kernel for kernel in kernels if kernel.name == "deform_conv_kernel" and kernel.kind == "bfloat16")
    worse = one._replace(registers=256, shared=100 * 1024 + 1, spills=8, tensor_cores=False)
    others = [kernel for kernel in kernels if kernel != one]
    faults = "\n".join(triton_budget.faults([worse, *others]))
    assert "spills registers, in 8 instructions" in faults
    assert "needs 102401 bytes of shared memory, there are 101376" in faults
    assert "does not use tensor cores" in faults
    growth = "\n".join(triton_budget.growth([worse, *others]))
    assert "needs 256 registers, allowed are" in growth
    assert "has a budget and does not exist" in "\n".join(triton_budget.growth(others))
    assert "has no budget" in "\n".join(triton_budget.growth([*kernels, one._replace(kind="another")]))
    same = [kernel for kernel in kernels if (kernel.name, kernel.config) != (one.name, one.config)]
    assert f"{one.name} in {one.config} (half) was not compiled" in "\n".join(triton_budget.faults(same))
