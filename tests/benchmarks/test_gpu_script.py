"""benchmarks/gpu.py without a GPU: it says so, its parts fit their time, and every step that can run on a CPU does."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu
import profiling
import pytest
import torch
from torch.autograd import DeviceType

from bkd_fast.benchmark import results
from bkd_fast.benchmark.harness import REFERENCE, Row
from bkd_fast.ops import measured

STEPS = gpu.steps(Path("out"), Path("images"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--part", "1", "--out", "never"],
        cwd=gpu.ROOT,
        env={**os.environ, "PYTHONPATH": str(gpu.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", gpu.NO_DEVICE + "\n")
    assert not (gpu.ROOT / "never").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "go together"),
        (["--device", "cpu", "--quick", "--write-table"], "--write-table is for CUDA devices"),
        (["--device", "cpu", "--quick", "--before", "nowhere"], "expected a checkout"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--part", "1", "--out", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_a_part_takes_less_than_nine_minutes(part):
    assert 0 < sum(step.seconds for step in STEPS if step.part == part) <= gpu.PART_SECONDS < 540


def test_every_file_that_a_step_runs_is_there():
    for name in {gpu.KERNEL_TESTS, gpu.MODEL_TESTS, gpu.SANITIZER, *(step.command[0] for step in STEPS)} - {"-m"}:
        assert (gpu.ROOT / name).is_file(), name
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_steps_fail_and_time_out_with_all_that_they_started(tmp_path):
    log = tmp_path / "log"
    assert gpu.execute(["-c", "print('fine')"], gpu.ROOT, log, 60) == "passed"
    assert log.read_text() == "fine\n"
    assert gpu.execute(["-c", "raise SystemExit(3)"], gpu.ROOT, log, 60) == "failed"
    late = tmp_path / "late"
    child = f"import time; time.sleep(4); open({str(late)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.execute(["-c", parent], gpu.ROOT, log, 1) == "timed out"
    time.sleep(4)
    assert not late.exists()


def test_a_part_out_of_time_says_so_and_the_page_has_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PART_SECONDS", 0)
    assert gpu.main(["--part", "1", "--out", str(tmp_path), "--device", "cpu", "--quick"]) == 1
    lines = gpu.read_lines(tmp_path / "steps.csv")
    assert [line["outcome"] for line in lines] == ["skipped", *["no time"] * 6]
    assert {"commit", "machine", "threads", "torch"} <= set(lines[0])
    assert "| 1 | determinism, native | no time | 0 |" in (tmp_path / "gpu.md").read_text()
    gpu.record({"part": "1", "step": "determinism, native", "outcome": "passed", "seconds": "9"}, tmp_path, "cpu")
    text = (tmp_path / "gpu.md").read_text()
    assert "| 1 | determinism, native | passed | 9 |" in text
    assert text.count("determinism") == 1
    (tmp_path / "1-determinism-native.log").write_text("E  not equal")
    gpu.record({"part": "1", "step": "determinism, native", "outcome": "failed", "seconds": "9"}, tmp_path, "cpu")
    assert "E  not equal" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_every_step_that_needs_no_cuda_tool_runs_on_a_cpu(part, tmp_path):
    status = gpu.main(["--part", str(part), "--out", str(tmp_path), "--device", "cpu", "--quick"])
    outcomes = {line["step"]: line["outcome"] for line in gpu.read_lines(tmp_path / "steps.csv")}
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert status == 0, f"{outcomes}\n{logs}"
    assert outcomes == {step.name: "passed" if step.quick else "skipped" for step in STEPS if step.part == part}
    if part == 3:  # of what ran on a CPU, for which no call looks it up
        assert set(measured.read_table(tmp_path / "measured.csv")) == {"cpu"}
    page = (tmp_path / "gpu.md").read_text()
    titles = {1: [], 2: ["Inference", "Kernels of an image"], 3: ["Operators, float32"], 4: []}[part]
    assert all(f"## {title}\n" in page for title in ["Steps", *titles])


def test_the_page_says_whether_wgmma_wins(tmp_path):
    """Relative to the first provider, which runs on mma.sync."""
    times = {"WRN50 N=16 C=256 H=W=64": (1.5, 1.0), "WRN50 N=8 C=256 H=W=64": (1.5, 1.4)}
    rows = [
        Row("modulated_deform_conv2d", shape, "forward", name, 1, time, time, time, 0.0, "float16")
        for shape, both in times.items()
        for name, time in zip(("bkd_fast native", "bkd_fast native, wgmma"), both, strict=True)
    ]
    results.write(rows, tmp_path / "ops-float16.csv")
    page = gpu.page(tmp_path, "cpu")
    assert "wgmma, WRN50 N=16: 1.50 times as fast as mma.sync, so switch it on." in page
    assert "wgmma, WRN50 N=8: 1.07 times as fast as mma.sync, so leave it off." in page


def test_kernels_are_summed_by_the_innermost_part():
    def event(name, *children, kernels=(), device=DeviceType.CPU, own=0.0):
        made = SimpleNamespace(
            name=name,
            device_type=device,
            cpu_parent=None,
            cpu_children=list(children),
            self_cpu_time_total=own,
            self_device_time_total=own,
            kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        )
        for child in children:
            child.cpu_parent = made
        return made

    student = event("student", event("conv", kernels=[("gemm", 2000)]))
    outer = event("memory", student, event("pad", kernels=[("Memset", 500)]))
    stray = event("copy_", kernels=[("kernel", 1000)])
    times = {"gemm": 2000, "Memset": 500, "kernel": 1000, "memory": 9e9}
    device = [event(name, device=DeviceType.CUDA, own=own) for name, own in times.items()]
    found = profiling.summary([outer, *outer.cpu_children, stray, *device], "cuda", packed=False)
    assert found == {"memory": [0, 1, 0.5], "student": [1, 0, 2], "other": [1, 0, 1], "sum": [2, 1, 3.5]}
    assert profiling.summary([outer, *device], "cuda", packed=True) == {"graph": [2, 1, 3.5]}


def test_the_fastest_backends_of_forward_passes_make_a_table(tmp_path):
    def row(provider, median, shape="N=1", what="forward", dtype="float16", elements=4000, op="local_match"):
        return Row(op, shape, what, provider, 1, median, median, median, 0.0, dtype, elements)

    native, triton, plain = "bkd_fast native", "bkd_fast triton", REFERENCE
    rows = [
        row(native, 2.0), row(triton, 1.0), row(plain, 9.0),
        row(native, 1.0, "N=2"), row(triton, 1.9, "N=2"),  # a shape of the same size: 3.0 against 2.9 is noise
        row(native, 1.0, elements=5000), row(triton, 0.9, elements=5000), row("torchvision", 0.1, elements=5000),
        row(native, 1.0, dtype="tf32"), row(plain, 0.5, dtype="tf32"), row(f"{native}, NCHW", 0.1, dtype="tf32"),
        row(native, 1.0, op="alone"),
        *(row(name, median, op="gradient", what="forward+backward") for name, median in ((native, 1.0), (triton, 0.1))),
        row(native, 1.0, op="unknown size", elements=0), row(triton, 0.1, op="unknown size", elements=0),
    ]  # fmt: skip
    lines = gpu.fastest_backends(rows, "a device")
    found = {(line["operator"], line["dtype"], line["size"]): line["backend"] for line in lines}
    assert found == {
        ("local_match", "float16", "12"): "native",
        ("local_match", "float16", "14"): "triton",
        ("local_match", "tf32", "12"): "reference",
    }
    gpu.write_table(lines, tmp_path / "measured.csv")
    table = measured.read_table(tmp_path / "measured.csv")
    assert table == {
        "a device": {measured.Problem(op, dtype, int(size)): name for (op, dtype, size), name in found.items()}
    }


def test_a_run_leaves_its_table_and_puts_it_into_the_package_where_asked(tmp_path, monkeypatch):
    package = tmp_path / "package.csv"
    package.write_text("device,operator,dtype,size,backend\nother,a,float16,2,native\nmade up,b,float16,2,native\n")
    monkeypatch.setattr(measured, "FILE", package)
    monkeypatch.setattr(gpu, "run", lambda *_: iter(()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "made up")
    rows = [
        Row("local_match", "N=1", "forward", provider, 1, median, median, median, 0.0, "float16", 4000)
        for provider, median in (("bkd_fast native", 2.0), ("bkd_fast triton", 1.0))
    ]
    results.write(rows, tmp_path / "ops-float16.csv")
    arguments = ["--part", "3", "--out", str(tmp_path)]
    before = package.read_text()
    assert gpu.main(arguments) == 0
    own = "made up,local_match,float16,12,triton\n"
    assert (tmp_path / "measured.csv").read_text() == f"device,operator,dtype,size,backend\n{own}"
    assert package.read_text() == before
    assert gpu.main([*arguments, "--write-table"]) == 0
    assert package.read_text() == f"device,operator,dtype,size,backend\nother,a,float16,2,native\n{own}"
