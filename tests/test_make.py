"""The Makefile: which tests `make quick` chooses."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def planned(target, **variables):
    """Return the words of the commands that a target would run."""
    given = [f"{name}={value}" for name, value in variables.items()]
    done = subprocess.run(["make", "-n", target, *given], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("changed", "chosen"),
    [
        ("bkd_fast/ops/triton/pairs.py", {"tests/ops"}),
        ("csrc/cpu/pairs.cpp", {"tests/ops"}),
        ("bkd_fast/cli/train.py bkd_fast/benchmark/short.py", {"tests/test_cli.py", "tests/benchmarks"}),
        ("bkd_fast/artifact.py tests/support/cases.py tests/cuda_on_cpu/conftest.py", {"tests/test_artifact.py"}),
        ("tests/model/test_bkd.py", {"tests/model"}),
    ],
)
def test_quick_runs_the_tests_near_a_change(changed, chosen):
    smoke = {"tests/test_config.py", "tests/test_house.py", "tests/test_files.py"}
    assert {word for word in planned("quick", CHANGED=changed) if word.startswith("tests/")} == smoke | chosen


def test_kernel_tests_run_apart_from_those_in_parallel():
    words = planned("test")
    ignored = {word.removeprefix("--ignore=") for word in words if word.startswith("--ignore=")}
    assert ignored <= set(words)
    assert len(ignored) == 4
