import importlib
import subprocess
import sys
import threading
from typing import ClassVar

import pytest
import torch

from bkd_fast.ops import backend, describe, distillation_loss
from bkd_fast.ops.backend import BACKENDS, VARIABLE, Kernels, available, implementation, operators

MISSING = [name for name in BACKENDS if available(name) is not None]
MODULE = sys.modules["bkd_fast.ops.backend"]
CONV = "modulated_deform_conv2d"


def function(name, module):
    """The function of a module in an operator's folder."""
    return getattr(importlib.import_module(f"{MODULE._folders[name]}.{module}"), name)


@pytest.fixture
def each_backend():
    """Overrides the suite's: here nothing is chosen."""


@pytest.fixture
def without(monkeypatch):
    """Makes a backend unavailable, whatever is built here."""

    def remove(name):
        monkeypatch.setitem(MODULE._loaded, name, ImportError("it was not compiled"))

    return remove


def test_the_reference_has_every_operator_everywhere():
    with backend("reference"):
        for name in operators():
            for device in ("cpu", "cuda"):
                assert implementation(name, device) is function(name, "reference")


def test_a_choice_ends_with_its_block(monkeypatch, without):
    monkeypatch.delenv(VARIABLE, raising=False)
    before = implementation(CONV, "cpu")

    def fail():
        with backend("reference"):
            assert implementation(CONV, "cpu") is function(CONV, "reference")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert implementation(CONV, "cpu") is before


def test_the_environment_chooses(monkeypatch, without):
    monkeypatch.setenv(VARIABLE, "reference")
    assert implementation(CONV, "cpu") is function(CONV, "reference")
    assert describe()["chosen"] == "reference"
    without("triton")
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="triton backend is not available: it was not compiled"):
        implementation(CONV, "cpu")


def test_a_backend_that_is_not_there_says_why(without):
    without("native")
    with pytest.raises(RuntimeError, match="native backend is not available: it was not compiled"), backend("native"):
        pytest.fail("the block must not run")
    assert describe()["backends"]["native"] == "the native backend is not available: it was not compiled"


def test_unknown_backends_are_named():
    with pytest.raises(ValueError, match="no backend 'cuda': choose one of native, triton, reference"), backend("cuda"):
        pytest.fail("the block must not run")


def test_an_operator_that_a_chosen_backend_lacks_is_an_error(monkeypatch):
    class Partial:
        DEVICES: ClassVar = {"cpu": Kernels("partial")}

    class Module:
        distillation_loss = staticmethod(lambda *_: None)

    monkeypatch.setitem(MODULE._loaded, "native", Partial)
    monkeypatch.setitem(sys.modules, "bkd_fast.ops.distillation_loss.partial", Module)
    monkeypatch.delenv(VARIABLE, raising=False)
    # Without a choice the next backend has it; a choice is not overruled in silence.
    assert implementation("distillation_loss", "cpu") is Module.distillation_loss
    assert implementation("cosine_anomaly_map", "cpu") is function("cosine_anomaly_map", "reference")
    with backend("native"):
        assert implementation("distillation_loss", "cpu") is Module.distillation_loss
        for name, device in (("cosine_anomaly_map", "cpu"), ("distillation_loss", "cuda")):
            with pytest.raises(RuntimeError, match=f"native backend has no {name} for {device} tensors"):
                implementation(name, device)


def test_cuda_tensors_go_to_triton_where_there_are_no_cuda_kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv(VARIABLE, raising=False)

    class CPUAlone:
        DEVICES: ClassVar = {"cpu": Kernels("absent")}

    class Both:
        DEVICES: ClassVar = {"cpu": Kernels("cpu"), "cuda": Kernels("cuda")}

    for name in operators():
        monkeypatch.setitem(MODULE._loaded, "native", CPUAlone)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert implementation(name, "cuda", dtype) is function(name, "triton")
        assert implementation(name, "cuda", torch.float64) is function(name, "reference")
        assert implementation(name, "cpu", torch.float32) is function(name, "reference")
    monkeypatch.setitem(MODULE._loaded, "native", Both)
    assert implementation("distillation_loss", "cuda", torch.float16) is function("distillation_loss", "cuda")


def test_triton_on_the_cpu_is_refused():
    pytest.importorskip("triton")
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match="triton backend has no distillation_loss for cpu tensors"),
    ):
        distillation_loss([torch.ones(1, 2, 3, 3)], [torch.ones(1, 2, 3, 3)])


PROGRAM = """
import sys
{before}
import torch, bkd_fast.ops, bkd_fast.evaluation.environment
assert not sys.modules.get("triton"), "it was imported"
x = torch.ones(1, 2, 3, 3)
print(bkd_fast.ops.distillation_loss([x], [x]).item())
assert not any("triton" in name and name.startswith("bkd_fast.ops.") for name in sys.modules), "by the CPU's kernels"
print(bkd_fast.evaluation.environment.render(bkd_fast.evaluation.environment.describe()))
"""


@pytest.mark.skipif("native" in MISSING, reason="without compiled kernels Triton is asked for")
@pytest.mark.parametrize(
    ("before", "shown"),
    [
        ("", "triton: available"),
        ("sys.modules['triton'] = None", "the triton backend is not available: import of triton halted"),
    ],
)
def test_triton_is_imported_by_those_who_ask_for_it(before, shown):
    """And on machines without it the library works, and says what is missing."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM.format(before=before)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("0.0")
    assert shown in ran.stdout


def test_every_operator_is_described():
    assert set(describe()["runs"]) == set(operators())


def test_threads_choose_for_themselves(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    seen = []
    with backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(describe()["chosen"]))
        thread.start()
        thread.join()
    assert seen == ["automatic"]
