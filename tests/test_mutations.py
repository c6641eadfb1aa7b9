"""The planted faults of `make mutations`: each can be planted, and one that cannot is an error."""

from tools.cuda_on_cpu import mutations
from tools.cuda_on_cpu.faults import FAULTS


def test_every_fault_can_be_planted():
    assert not [message for fault in FAULTS if (message := mutations.inapplicable(fault))]
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_a_fault_that_cannot_be_planted_is_an_error(monkeypatch, capsys):
    faults = [
        FAULTS[0]._replace(name="gone", text="no such text"),
        FAULTS[0]._replace(name="twice", text="int64_t"),
        FAULTS[0]._replace(name="no unit", unit="tile.cuh"),
    ]
    monkeypatch.setattr(mutations, "FAULTS", faults)
    assert mutations.main([]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "gone: 'no such text' occurs 0 times in scaled_copy.cu" in errors
    assert "no unit: tile.cuh is not compiled" in errors


def test_a_fault_is_planted_in_a_copy(tmp_path):
    fault = next(fault for fault in FAULTS if fault.unit == "selftest.cu")
    source = mutations.planted(fault, tmp_path)
    assert source == tmp_path / "tests" / "cuda_on_cpu" / "emulation" / "selftest.cu"
    faulty = (tmp_path / "csrc" / "cuda" / fault.file).read_text(encoding="utf-8")
    assert fault.text not in faulty
    assert fault.instead in faulty
