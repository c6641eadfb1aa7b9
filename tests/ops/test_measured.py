"""The table of measured backends: its lines are checked, and calls on a CUDA device follow it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode

from bkd_fast.ops import backend, measured
from bkd_fast.ops.backend import BACKENDS, Kernels, implementation

HEADER = "device,operator,dtype,size,backend\n"
LINES = """\
NVIDIA Made-up,local_match,float32,12,triton
NVIDIA Made-up,local_match,tf32,12,reference
NVIDIA Made-up,local_match,float16,12,reference
9.0,local_match,float32,12,reference
9.0,local_match,float32,14,triton
9.0,modulated_deform_conv2d,tf32,12,triton
8.0,local_match,float32,16,triton
"""


@pytest.fixture
def each_backend():
    """Overrides the suite's: here nothing is chosen."""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table that stands in for the package's, on a device with a name and a compute capability."""
    monkeypatch.delenv("BKD_FAST_BACKEND", raising=False)

    def write(lines, name="NVIDIA Made-up", capability=(9, 0), available=True):
        path = tmp_path / "measured.csv"
        path.write_text(HEADER + lines)
        monkeypatch.setattr(measured, "FILE", path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        for kept in (measured.measured, measured.of_device):
            kept.cache_clear()

    yield write
    for kept in (measured.measured, measured.of_device):
        kept.cache_clear()


@pytest.fixture
def switch():
    """Sets the precision of float32 products, which are no attributes that monkeypatch can put back."""
    changed = []

    def change(products, value):
        changed.append((products, products.fp32_precision))
        products.fp32_precision = value

    yield change
    for products, value in reversed(changed):
        products.fp32_precision = value


@pytest.fixture
def everywhere(monkeypatch):
    """Every backend has ``local_match`` on CUDA: a function that is named after it."""
    module = sys.modules["bkd_fast.ops.backend"]
    for name in ("native", "triton"):
        devices = SimpleNamespace(DEVICES={"cuda": Kernels(f"made_up_{name}")})
        monkeypatch.setitem(module._loaded, name, devices)
        made = SimpleNamespace(local_match=name)
        monkeypatch.setitem(sys.modules, f"bkd_fast.ops.local_match.made_up_{name}", made)
    module._module.cache_clear()
    yield module
    module._module.cache_clear()


def call(elements, dtype=torch.float32, name="local_match"):
    """What runs for a call with a tensor of so many numbers on a CUDA device."""
    tensor = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, numel=lambda: elements)
    chosen = implementation(name, "cuda", dtype, tensor)
    return chosen if isinstance(chosen, str) else chosen.__module__.rpartition(".")[2]


def test_calls_follow_the_table_and_what_was_not_measured_the_order(table, everywhere, switch):
    assert call(4000) == "native"
    table(LINES)
    assert call(4000) == "triton"
    assert call(2**12) == "triton"
    assert call(2**12 + 1) == "triton"  # of the capability's line, for a larger size
    assert call(2**10) == "native"
    assert call(2**14 + 1) == "native"  # measured on another device
    assert call(4000, torch.float16) == "reference"
    assert call(4000, torch.bfloat16) == "native"
    switch(torch.backends.cuda.matmul, "tf32")
    assert call(4000) == "reference"


def test_the_name_of_a_device_goes_before_its_capability(table, everywhere):
    table(LINES, name="another")
    assert call(4000) == "reference"
    table(LINES, name="another", capability=(7, 5))
    assert call(4000) == "native"


def test_convolutions_round_by_their_own_switch(table, switch):
    table(LINES)
    tensor = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, numel=lambda: 4000)
    switch(torch.backends.cudnn.conv, "ieee")
    assert measured.fastest("modulated_deform_conv2d", tensor) is None
    switch(torch.backends.cudnn.conv, "tf32")
    assert measured.fastest("modulated_deform_conv2d", tensor) == "triton"


def test_a_choice_is_not_overruled(table, everywhere, monkeypatch):
    table(LINES)
    with backend("native"):
        assert call(4000) == "native"
    monkeypatch.setenv("BKD_FAST_BACKEND", "reference")
    assert call(4000) == "reference"


def test_a_measured_backend_that_is_not_there_is_passed_over(table, everywhere, monkeypatch):
    table(LINES)
    monkeypatch.setitem(everywhere._loaded, "triton", ImportError("it was not installed"))
    assert call(4000) == "native"


def test_other_devices_and_sizes_that_are_not_known_follow_the_order(table, everywhere):
    table(LINES)
    tensor = torch.zeros(4000)
    assert implementation("local_match", "cpu", torch.float32, tensor).__module__.endswith("reference")
    assert call(SimpleNamespace()) == "native"
    table(LINES, available=False)
    assert call(4000) == "native"


def test_an_operator_on_a_cuda_tensor_asks_the_table(table, everywhere, monkeypatch):
    """The whole way from the operator, on tensors without data."""
    asked = []
    monkeypatch.setattr(everywhere, "fastest", lambda name, tensor: asked.append((name, tensor.numel())) or "reference")
    with FakeTensorMode(), torch.no_grad():
        query, support = (torch.empty(1, 3, 4, 4, device="cuda") for _ in range(2))
        shots = torch.empty(1, 1, dtype=torch.int64, device="cuda")
        OPDEFS["bkd_fast::local_match"]._init_fn(query, support, shots, 1)
    assert asked == [("local_match", 48)]


@pytest.mark.parametrize("elements", [1, 4, 5, 16, 17, 1000, 2**20, 2**20 + 1])
def test_a_size_is_within_its_class(elements):
    size = measured.size_class(elements)
    assert size % 2 == 0
    assert elements <= 2**size
    assert elements == 1 or 2 ** (size - 2) < elements


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device,backend\n", "expected device, operator, dtype, size, backend"),
        (HEADER + "a,local_match,float32,12,cudnn\n", "line 2: there is no backend 'cudnn'"),
        (HEADER + "a,local_match,float32,,native\n", "line 2: size is '', expected a whole number"),
    ],
)
def test_a_wrong_table_names_its_line(text, message, tmp_path):
    path = tmp_path / "measured.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        measured.read_table(path)


def test_the_package_has_a_table():
    table = measured.read_table(measured.FILE)
    assert {name for lines in table.values() for name in lines.values()} <= set(BACKENDS)
