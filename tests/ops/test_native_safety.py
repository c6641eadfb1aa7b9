"""Wrong arguments of torch.ops.bkd_fast_native raise; they never end the process, nor reach memory of others."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bkd_fast.ops.backend import available

pytestmark = pytest.mark.skipif(available("native") is not None, reason=str(available("native")))


@pytest.fixture(autouse=True)
def each_backend():
    """Overrides the suite's: these calls know no backend."""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected as on Linux")
@pytest.mark.parametrize(("first", "count"), [(0, 2_000), pytest.param(2_000, 10_000, marks=pytest.mark.slow)])
def test_random_wrong_calls_are_refused(first, count):
    command = [sys.executable, str(Path(__file__).with_name("native_fuzz.py")), str(first), str(count)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900)
    last = ran.stdout.splitlines()[-1:]
    assert ran.returncode == 0, f"{last} ended the process with {ran.returncode}: {ran.stderr[-2000:]}"
    assert int(last[0].removeprefix("refused ")) > count / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 9}, r"tier is 9, expected 0 to \d \(portable"),
        (
            {1: torch.ones(2, 3)[:, ::2]},
            "scaled_copy: input has gaps .*, expected a contiguous or channels_last tensor",
        ),
        ({1: torch.ones(2, 3).half()}, "scaled_copy: input is Half, expected Float or Double"),
        ({3: torch.ones(2, 3).double()}, "scaled_copy: output is Double, expected Float"),
        ({3: torch.ones(3, 2)}, r"scaled_copy: output has shape \(3, 2\), expected \(2, 3\)"),
    ],
)
def test_an_error_names_function_argument_and_what_was_expected(change, message):
    arguments = [0, torch.ones(2, 3), 2.0, torch.ones(2, 3)]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.bkd_fast_native.scaled_copy(*arguments)
