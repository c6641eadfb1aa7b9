"""Every script of benchmarks/ starts, and runs on its smallest case, compiled peers included."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = [path.name for path in sorted(BENCHMARKS.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
ONCE = ["--threads", "1", "--seconds", "1e-9"]
SMALLEST = {
    "accuracy.py": ["DATA", *["--only", "bkd", "--teacher", "resnet18", "--weights", "none", "--image-size", "64"]],
    "half_sums.py": ["--rows", "2"],
    "model.py": ["--quick", "--only", "inference", *ONCE],
    "ops.py": ["--only", "cosine_anomaly_map", *ONCE],
    "plot.py": [str(BENCHMARKS / "results" / "cpu.csv"), "--out", "plot.svg"],
}


def run(script, folder, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_takes(script, tmp_path):
    assert "usage:" in run(script, tmp_path, "--help")


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALLEST)
def test_a_script_runs_on_its_smallest_case(script, tiny_data, tmp_path):
    arguments = [str(tiny_data) if argument == "DATA" else argument for argument in SMALLEST[script]]
    said = run(script, tmp_path, *arguments)
    assert (tmp_path / "plot.svg").is_file() if script == "plot.py" else said
    assert script != "ops.py" or "torch.compile" in said
