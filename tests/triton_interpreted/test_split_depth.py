"""The depth of a convolution in parts: the Triton kernels, interpreted, and faults that the checks must see."""

import importlib.util
from pathlib import Path

import cases
import pytest
import torch

from bkd_fast.ops import backend, triton_common
from bkd_fast.ops.deform_conv import Arguments
from bkd_fast.ops.deform_conv import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide):RuntimeWarning")  # numpy, of NaN
MANY = 64  # multiprocessors, more than these convolutions have programs: the least depth of a part decides
# Arguments of cases.conv, and the parts in float32 and float16 (whose channels are filled up to 4 and to 8).
CASES = {
    "conv": ({"channels": 70, "size": (3, 4), "groups": 1}, (5, 5)),
    "parts within taps": ({"channels": 96, "outputs": 70, "size": (3, 4), "bias": False}, (6, 6)),
    "parts within one tap": ({"channels": 300, "kernel": (1, 1), "mask": False}, (2, 2)),
    "groups": ({"channels": 120, "outputs": 12, "size": (3, 4), "groups": 2, "offset_groups": 3}, (4, 5)),
    "offset groups": ({"channels": 72, "size": (3, 4), "offset_groups": 2, "mask": False, "bias": False}, (5, 5)),
    "two blocks of outputs": ({"channels": 30, "outputs": 130, "size": (5, 14), "batch": 1}, (2, 2)),
}
TYPES = {"float32": torch.float32, "float16": torch.float16}


@pytest.fixture
def split(monkeypatch):
    """The parts of every launch, on a device with many multiprocessors."""
    parts = []
    original = kernels.parts_of_depth

    def kept(*arguments):
        parts.append(original(*arguments))
        return parts[-1]

    monkeypatch.setattr(kernels, "multiprocessors", lambda tensor: MANY)
    monkeypatch.setattr(kernels, "parts_of_depth", kept)
    return parts


def forward(case, name, dtype):
    call, tensors = case
    with backend(name), torch.no_grad():
        return call(*(tensor.to(dtype) for tensor in tensors))


def check(found, case, dtype):
    exact, plain = forward(case, "reference", torch.float64), forward(case, "reference", dtype)
    cases.check([found], [plain], [exact], cases.ROUNDING[dtype])


@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TYPES)
def test_split_depths_agree_with_the_reference(name, dtype, tile, split, monkeypatch):
    given, parts = CASES[name]
    dtype = TYPES[dtype]
    if tile:
        monkeypatch.setattr(triton_common.Tuned, "__call__", _second_tile)
    case = cases.rounded(cases.conv(**given), dtype)
    found = forward(case, "triton", dtype)
    check(found, case, dtype)
    assert torch.equal(found, forward(case, "triton", dtype))
    assert split == [parts[dtype == torch.float16]] * 2


def _second_tile(tuned, kind="any"):
    """A kernel in its other tile of 64 pixels, where it has one."""
    small = [one for one in tuned.kinds[kind] if one.kwargs["BLOCK_M"] == kernels.SMALL] or tuned.kinds[kind]
    return triton_common.triton.autotune(small[-1:], key=[])(tuned.kernel)


def test_a_whole_depth_has_one_launch_and_no_sums(split, monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda tensor: 1)
    monkeypatch.setattr(kernels, "SUMS", None)
    monkeypatch.setattr(kernels, "floats", None)
    forward(cases.conv(channels=70, size=(8, 9)), "triton", torch.float16)
    assert split == [1]


# What is replaced by what: in the kernel, in the sum of the parts, and where they are launched.
FAULTS = {
    "none": ("UNIT", "UNIT"),
    "a part starts with its tap": ("tl.maximum(first_unit - step * units, 0)", "0"),
    "a part starts a unit late": ("first_unit - step * units, 0", "first_unit - step * units, 1"),
    "a part ends with its tap": ("tl.minimum((last_unit - step * units) * UNIT, piece)", "piece"),
    "a part ends before its last tap": ("tl.cdiv(last_unit, units)", "last_unit // units"),
    "a tap's last channels are no unit": ("tl.cdiv(piece, UNIT)", "piece // UNIT"),
    "parts overlap": ("* (tl.program_id(2) + 1) //", "* (tl.program_id(2) + 2) //"),
    "every part goes to one place": ("line += tl.program_id(2)", "line += 0 * tl.program_id(2)"),
    "a part is not added": ("range(1, parts)", "range(2, parts)"),
    "a part is added for another": ("tl.cast(part, tl.int64)", "tl.cast(part - 1, tl.int64)"),
    "the bias is in every part": ("a.bias is not None and parts == 1", "a.bias is not None"),
    "the bias is left out": ("parts, BIAS=a.bias is not None", "parts, BIAS=False"),
    "sums of the first outputs alone": ("triton.cdiv(outputs, meta", "1 + 0 * triton.cdiv(outputs, meta"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name, tmp_path, monkeypatch):
    before, after = FAULTS[name]
    source = Path(kernels.__file__).read_text(encoding="utf-8")
    assert before in source
    path = tmp_path / "faulty.py"
    path.write_text(source.replace(before, after), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("bkd_fast.ops.faulty", path)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    monkeypatch.setattr(faulty, "multiprocessors", lambda tensor: MANY)
    case = cases.rounded(cases.conv(1, 70, 70, (3, 4)), torch.float16)
    i, w, o, m, b = (tensor.half() for tensor in case[1])
    found = faulty.modulated_deform_conv2d(Arguments(i, o, w, b, [1, 1], [1, 1], [1, 1], m))
    if name == "none":
        check(found, case, torch.float16)
    else:
        with pytest.raises(AssertionError, match="errs by"):
            check(found, case, torch.float16)
