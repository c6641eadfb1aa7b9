"""What only a CUDA device can show, in four parts of under nine minutes, the most valuable first.

python benchmarks/gpu.py --part 1 --out DIR      # build, agreement with the reference, graphs, streams, determinism
python benchmarks/gpu.py --part 2 --out DIR      # the model: latency, peers, kernels and busy time of an image
python benchmarks/gpu.py --part 3 --out DIR      # operators against torchvision and cuDNN, native and Triton
python benchmarks/gpu.py --part 4 --out DIR      # compute-sanitizer, a training epoch, training steps

It needs torch, Triton, nvcc and the extra "test". DIR gets a log and a CSV of each step, and gpu.md, one page with the
results of all parts so far; and measured.csv, which backend was the fastest for each operator, type and size of part 3.
--write-table puts these lines into the package (bkd_fast/ops/measured.csv) in place of earlier ones of this device: its
operators then take that backend first. A step that fails or takes too long does not stop the next. The exit status is
1 if a step failed, or if there is no CUDA device. --before takes a checkout of the commit before, to compare with.
--device cpu --quick is a dry run: every step that needs no CUDA tool, in its smallest form.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from bkd_fast.benchmark.harness import Row, provider
from bkd_fast.benchmark.operators import WGMMA
from bkd_fast.benchmark.results import means, provenance, read, relative, write_lines
from bkd_fast.files import atomic_write
from bkd_fast.ops import measured
from bkd_fast.ops.backend import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
KERNEL_TESTS, MODEL_TESTS = "tests/ops/test_cuda.py", "tests/test_gpu.py"
SANITIZER = "tools/compute_sanitizer.py"
PART_SECONDS = 525
DRY_PATIENCE = 4  # limits of a dry run are longer: its CPU may be slow or busy
LOG_LINES = 15  # of a failed step, in the page
WGMMA_GOAL = 1.2  # times as fast as mma.sync, to be switched on by default
STEP_COLUMNS = ("part", "step", "outcome", "seconds")
MARGIN = 1.05  # by which a backend must be faster than one that is preferred to it: less is noise
NO_DEVICE = "gpu.py needs a CUDA device, and torch sees none; for a dry run add --device cpu --quick"


class Step(NamedTuple):
    """One command of a part.

    Attributes:
        command: arguments of the Python interpreter.
        seconds: after which it is stopped.
        quick: the command of a dry run; None where the step needs CUDA's tools.
        before: whether it runs in the checkout of the commit before.
    """

    part: int
    name: str
    seconds: int
    command: Sequence[str]
    quick: Sequence[str] | None = None
    before: bool = False


def steps(out: Path, images: Path) -> list[Step]:
    """Return the steps of all parts; they write into ``out`` and train on ``images``."""

    def tests(path: str, *options: str) -> list[str]:
        return ["-m", "pytest", "-q", "-p", "no:cacheprovider", path, *options]

    def script(name: str, csv: str, *options: str) -> list[str]:
        return [f"benchmarks/{name}.py", "--device", "cuda", "--csv", str(out / f"{csv}.csv"), *options]

    def dry(name: str, csv: str, *options: str) -> list[str]:
        return [f"benchmarks/{name}.py", "--csv", str(out / f"{csv}.csv"), *options]

    def kernels(part: int, name: str, seconds: int, selected: str) -> Step:
        command = tests(KERNEL_TESTS, "-k", selected)
        return Step(part, name, seconds, command, command)

    build, minimal = ["setup.py", "-q", "build_ext", "--inplace"], ["--quick", "--seconds", "1e-6"]
    inference, info = ["--quick", "--only", "inference"], ["-m", "bkd_fast", "info"]
    model = tests(MODEL_TESTS, "-m", "not slow")
    train = ["-m", "bkd_fast", "train", str(images), "--teacher", "resnet18", "--weights", "none", "--epochs", "1"]
    train += ["--set", "alignment=on", "--out", str(images.parent / "run")]
    small = ["--image-size", "64", "--accelerator", "cpu", "--set", "memory.items=16", "support.bank_size=8"]
    return [
        Step(1, "build", 90, build),
        Step(1, "versions and backends", 30, info, info),
        kernels(1, "agreement with the reference, native", 115, "native and agree"),
        kernels(1, "graph capture and streams, native", 40, "native and (captured or ordered)"),
        kernels(1, "determinism, native", 30, "native and same_bits"),
        Step(1, "model", 145, model, model),
        kernels(1, "agreement, graphs and streams, Triton", 75, "triton and (agree or captured or ordered)"),
        Step(
            2,
            "inference",
            270,
            script("model", "model", *inference, "--batch", "1", "32", "--teacher", "ResNet18", "Lite0", "WRN50"),
            dry("model", "model", *inference, *minimal, "--teacher", "ResNet18"),
        ),
        Step(
            2,
            "kernels of an image",
            90,
            script("profiling", "profile"),
            dry("profiling", "profile", "--teacher", "ResNet18", "--repeat", "1"),
        ),
        Step(2, "build of the commit before", 60, build, before=True),
        Step(2, "inference of the commit before", 90, script("model", "model-before", *inference), before=True),
        Step(3, "operators in float16", 230, script("ops", "ops-float16", "--dtype", "float16", "--seconds", "0.1")),
        Step(3, "operators in TF32", 110, script("ops", "ops-tf32", "--tf32", "--quick")),
        Step(
            3,
            "operators in float32",
            80,
            script("ops", "ops-float32", "--quick"),
            dry("ops", "ops-float32", "--only", "local_match", *minimal),
        ),
        Step(3, "operators in bfloat16", 80, script("ops", "ops-bfloat16", "--dtype", "bfloat16", "--quick")),
        *(
            Step(4, f"compute-sanitizer, {tool}", seconds, [SANITIZER, tool, "-k", "native and agree and dtype1"])
            for tool, seconds in (("racecheck", 140), ("memcheck", 100), ("synccheck", 80))
        ),
        Step(4, "a training epoch", 80, train, [*train, *small]),
        Step(4, "training steps", 100, script("model", "training", "--quick", "--only", "training_step")),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=(1, 2, 3, 4), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for CSVs, logs and gpu.md")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="of the commit before, to compare with")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="with --device cpu: the smallest form of every step")
    parser.add_argument("--write-table", action="store_true", help="put the fastest backends into the package")
    arguments = parser.parse_args(argv)
    if arguments.write_table and arguments.device == "cpu":
        parser.error("--write-table is for CUDA devices: nothing is chosen by measurements on a CPU")
    if (arguments.device == "cpu") != arguments.quick:
        parser.error("--device cpu and --quick go together: they are the dry run")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(NO_DEVICE, file=sys.stderr)
        return 1
    if arguments.before and not (arguments.before / "setup.py").is_file():
        parser.error(f"--before {arguments.before}: there is no setup.py: expected a checkout of this repository")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    for line in run(arguments.part, out, arguments.device, arguments.before):
        failed = failed or line["outcome"] not in ("passed", "skipped")
        print(f"{line['outcome']:10} {line['seconds']:>4} s  {line['step']}", flush=True)
        record(line, out, arguments.device)
    own = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    lines = fastest_backends([row for path in sorted(out.glob("ops-*.csv")) for row in read(path)], own)
    if lines:
        write_table(lines, out / "measured.csv")
    if lines and arguments.write_table:
        others = [line for line in read_lines(measured.FILE) if line["device"] != own]
        write_table([*others, *lines], measured.FILE)
    print(f"wrote {out / 'gpu.md'}")
    return int(failed)


def fastest_backends(rows: Sequence[Row], device: str) -> list[dict[str, str]]:
    """Return lines of :mod:`bkd_fast.ops.measured`: for each operator, dtype and size the fastest backend.

    Of passes without gradients, by the sum of the medians of all shapes of a size that several backends were timed for.
    """
    names = {provider(name): name for name in BACKENDS}
    cases: dict[measured.Problem, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.what == "forward" and row.provider in names and row.elements:
            problem = measured.Problem(row.op, row.dtype, measured.size_class(row.elements))
            cases.setdefault(problem, {}).setdefault(row.shape, {})[names[row.provider]] = row.p50
    lines = []
    for problem, shapes in sorted(cases.items()):
        common = [name for name in BACKENDS if all(name in times for times in shapes.values())]
        if len(common) < 2:
            continue
        times = {name: sum(times[name] for times in shapes.values()) for name in common}
        best = common[0]
        for name in common[1:]:
            best = name if times[name] * MARGIN < times[best] else best
        values = (device, problem.operator, problem.dtype, str(problem.size), best)
        lines.append(dict(zip(measured.COLUMNS, values, strict=True)))
    return lines


def write_table(lines: Sequence[Mapping[str, str]], path: Path) -> None:
    """Write a table that :func:`bkd_fast.ops.measured.read_table` reads."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, measured.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def run(part: int, out: Path, device: str, before: Path | None) -> Iterator[dict[str, str]]:
    """Run the steps of a part one after another, and yield a line of STEP_COLUMNS for each."""
    patience = 1 if device == "cuda" else DRY_PATIENCE
    end = time.monotonic() + PART_SECONDS * patience
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / "parts")
        for step in steps(out, images):
            if step.part != part:
                continue
            command = step.command if device == "cuda" else step.quick
            begin = time.monotonic()
            if command is None or (step.before and before is None):
                outcome = "skipped"
            elif (seconds := min(step.seconds * patience, end - begin)) <= 0:
                outcome = "no time"
            else:
                root = before.resolve() if step.before and before is not None else ROOT
                outcome = execute(command, root, log_of(out, str(part), step.name), seconds)
            values = (str(part), step.name, outcome, f"{time.monotonic() - begin:.0f}")
            yield dict(zip(STEP_COLUMNS, values, strict=True))


def execute(command: Sequence[str], root: Path, log: Path, seconds: float) -> str:
    """Run a command of the Python interpreter in a checkout and return how it ended; its output goes to ``log``."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    if command[0] == "setup.py":
        major, minor = torch.cuda.get_device_capability()
        # 9.0a adds wgmma, which runs where it is switched on.
        name = "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"
        environment |= {"BKD_FAST_CUDA": "1", "BKD_FAST_NATIVE": "1", "TORCH_CUDA_ARCH_LIST": name}
    with log.open("w", encoding="utf-8") as file:
        run = [sys.executable, *command]
        process = subprocess.Popen(
            run, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started: it would disturb the next step
                process.wait()


def record(line: dict[str, str], out: Path, device: str) -> None:
    """Add a step to ``steps.csv``, replacing an earlier run of it, and rewrite the page."""
    path = out / "steps.csv"
    earlier = [other for other in read_lines(path) if other["step"] != line["step"]]
    write_lines(sorted([*earlier, line], key=lambda each: int(each["part"])), path, device)
    (out / "gpu.md").write_text(page(out, device), encoding="utf-8")


def page(out: Path, device: str) -> str:
    """Return the results in a folder as Markdown."""
    about = provenance(device)
    versions = ", ".join(f"{name} {about[name]}" for name in ("bkd_fast", "torch", "triton", "torchvision", "anomalib"))
    lines = [
        f"# bkd_fast on {about['machine']}",
        f"{about['date']}, commit {about['commit'] or 'unknown'}; {versions}; driver: {driver()}.",
        "## Steps",
        table(read_lines(out / "steps.csv"), STEP_COLUMNS),
    ]
    for line in read_lines(out / "steps.csv"):
        log = log_of(out, line["part"], line["step"])
        if line["outcome"] in ("failed", "timed out") and log.exists():
            end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
            lines += [f"The end of {line['step']}, which {line['outcome']}:", f"```text\n{end}\n```"]
    titles = {"model": "Inference", "model-before": "Inference, the commit before", "training": "Training steps"}
    for name, title in titles.items():
        if (out / f"{name}.csv").exists():
            rows = [
                {
                    "case": f"{row.shape}, {row.what}",
                    "provider": row.provider,
                    "median ms": f"{row.p50:.3f}",
                    "20 %": f"{row.p20:.3f}",
                    "80 %": f"{row.p80:.3f}",
                    "extra MB": f"{row.extra:.0f}",
                }
                for row in read(out / f"{name}.csv")
            ]
            lines += [f"## {title}", table(rows, tuple(rows[0]))]
    if kernels := read_lines(out / "profile.csv"):
        lines += ["## Kernels of an image", table(kernels, ("teacher", "part", "kernels", "copies", "busy_ms"))]
    for path in sorted(out.glob("ops-*.csv")):
        lines += [f"## Operators, {path.stem.removeprefix('ops-')}", f"```text\n{means(read(path))}\n```"]
        lines += wgmma_against_mma(read(path))
    return "\n\n".join(lines) + "\n"


def wgmma_against_mma(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each group of shapes that was measured with wgmma and without."""
    lines = []
    for group, share in relative(rows).items():
        if group.provider.endswith(WGMMA):
            verdict = "switch it on" if share * WGMMA_GOAL <= 1 else "leave it off"
            lines.append(f"wgmma, {group.label}: {1 / share:.2f} times as fast as mma.sync, so {verdict}.")
    return lines


def log_of(out: Path, part: str, step: str) -> Path:
    """Return the file of a step's output."""
    return out / f"{part}-{step.replace(',', '').replace(' ', '-')}.log"


def table(lines: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    """Return lines as a Markdown table."""
    rows = [columns, ["---"] * len(columns), *([line[name] for name in columns] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def read_lines(path: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def driver() -> str:
    """Return the version of the GPU's driver and its highest clock."""
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def write_images(folder: Path) -> Path:
    """Write normal images to train on: grey ramps with noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(24):
        ramp = np.linspace(60, 140, 256)[None, :, None] + random.normal(0, 8, (256, 256, 3))
        Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).save(folder / f"{index:02}.png")
    return folder


if __name__ == "__main__":
    sys.exit(main())
