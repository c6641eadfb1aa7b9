"""The runs of an ablation: every variant, category and seed, several at a time, each once."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bkd_fast.ablation.results import write_results
from bkd_fast.ablation.variants import Variant
from bkd_fast.ablation.worker import RESULT, SPECIFICATION
from bkd_fast.data import find_categories
from bkd_fast.errors import BKDError, few
from bkd_fast.files import write_json
from bkd_fast.model.teacher import Teacher
from bkd_fast.training.weights import load_weights
from bkd_fast.version import __version__

log = logging.getLogger("bkd_fast")
PLAN = "ablation.json"


@dataclass(frozen=True)
class Run:
    """One training and its evaluation: a variant, a category and a seed."""

    variant: Variant
    category: str
    seed: int
    folder: Path


def ablate(
    data: str | Path,
    out: str | Path,
    variants: Sequence[Variant],
    *,
    seeds: int = 3,
    categories: Sequence[str] | None = None,
    jobs: int | None = None,
    keep: bool = False,
    title: str = "Ablation",
) -> Path:
    """Train and evaluate every variant on every category with every seed, and writes the tables.

    A run that has finished is not repeated, so the same call resumes an interrupted ablation, and more seeds may
    be asked for later. Under ``torchrun``, on one machine or several that share ``out``, each process takes its part of
    the runs. Written into ``out``: ``results.csv`` (a row for each finished run), ``results.md`` (mean and spread over
    the seeds, with protocol, versions and hardware), ``results.svg`` where matplotlib is installed, and ``runs/``.

    Args:
        data: a data set in MVTec AD's layout, with test images.
        out: folder of the ablation: new, or of this same ablation.
        variants: what is compared; see :func:`table_variants` and :func:`grid_variants`.
        seeds: repetitions; the seeds are 0 to ``seeds`` - 1.
        categories: names; None = all.
        jobs: runs at a time in this process; None = one a GPU, or one a CPU core pair.
        keep: leave each run's folder (its model, scores) instead of its metrics alone.
        title: heading of ``results.md``.

    Returns:
        ``results.md``.

    Raises:
        BKDError: unusable data; ``out`` holds another ablation; runs that failed, once all others are done.
    """
    if seeds < 1 or not variants:
        raise BKDError(f"{len(variants)} variants with {seeds} seeds: expected at least one of each")
    if jobs is not None and jobs < 1:
        raise BKDError(f"jobs is {jobs}: expected at least 1")
    data, out = Path(data).resolve(), Path(out)
    chosen = find_categories(data, categories)
    for category in chosen:
        if not category.test:
            raise BKDError(f"{data} has no test images for {category.name!r}: an ablation measures on test images")
    plan = {
        "bkd_fast": __version__,
        "data": str(data),
        "variants": {variant.name: variant.config.to_dict() for variant in variants},
    }
    _check_output(out, plan)
    for config in {variant.config.teacher.name: variant.config for variant in variants}.values():
        Teacher(config.teacher, load_weights(config.teacher))  # its errors before anything is written
    write_json(out / PLAN, plan)
    runs = [
        Run(variant, category.name, seed, out / "runs" / variant.name / category.name / f"seed-{seed}")
        for seed in range(seeds)
        for variant in variants
        for category in chosen
    ]
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    failed = _execute([run for run in runs[rank::world] if not _finished(run)], data, jobs, keep, out, runs, title)
    path = write_results(out, title, _results(runs))
    if failed:
        raise BKDError(f"{len(failed)} of {len(runs)} runs failed (rerun to retry, see {path}): {few(failed, '; ')}")
    return path


def _execute(
    todo: Sequence[Run], data: Path, jobs: int | None, keep: bool, out: Path, runs: Sequence[Run], title: str
) -> list[str]:
    """Runs what is left, ``jobs`` at a time; returns what failed and why."""
    devices = torch.cuda.device_count()
    local, beside = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = max(1, len(os.sched_getaffinity(0)) // beside)
    jobs = jobs or (max(1, devices // beside) if devices else max(1, cores // 2))
    writing = threading.Lock()
    processes: list[subprocess.Popen] = []
    failed: list[str] = []

    def one(index: int) -> None:
        run = todo[index]
        environment = _environment(local + (index % jobs) * beside, devices, max(1, cores // jobs))
        config = run.variant.config.with_changes({"training.seed": run.seed})
        write_json(
            run.folder / SPECIFICATION,
            {"data": str(data), "category": run.category, "config": config.to_dict(), "keep": keep},
        )
        with (run.folder / "log.txt").open("w", encoding="utf-8") as report:
            process = subprocess.Popen(
                [sys.executable, "-m", "bkd_fast.ablation.worker", str(run.folder)],
                env=environment,
                stdout=report,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through this process alone, once
            )
            processes.append(process)
            status = process.wait()
        name = f"{run.variant.name}, {run.category}, seed {run.seed}"
        with writing:
            if status:
                lines = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                failed.append(f"{name}: {lines[-1] if lines else f'exit status {status}'} ({run.folder / 'log.txt'})")
                log.warning("failed: %s", failed[-1])
                return
            log.info("%d of %d runs done: %s", sum(map(_finished, runs)), len(runs), name)
            write_results(out, title, _results(runs))

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, index) for index in range(len(todo))]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for process in processes:
                process.send_signal(signal.SIGINT)  # it leaves a checkpoint, from which the same command resumes
            raise
    return failed


def _environment(slot: int, devices: int, threads: int) -> dict[str, str]:
    """Of one run: its own GPU or its share of the cores, and no part in a process group."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        name: value for name, value in os.environ.items() if name not in group and not name.startswith("TORCHELASTIC_")
    }
    if devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        kept["CUDA_VISIBLE_DEVICES"] = visible[slot % devices]
    return {**kept, "OMP_NUM_THREADS": str(threads)}


def _check_output(out: Path, plan: dict[str, Any]) -> None:
    """That ``out`` is free, or holds this ablation."""
    path = out / PLAN
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in ("data", "variants") if held.get(name) != plan[name]]
        if different:
            raise BKDError(f"{out} holds another ablation (see {path}), of other {' and '.join(different)}")
    elif out.exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise BKDError(f"{out} is not empty and holds no ablation: name a new folder with --out")


def _finished(run: Run) -> bool:
    return (run.folder / RESULT).is_file()


def _results(runs: Sequence[Run]) -> list[tuple[Variant, str, int, dict[str, Any]]]:
    """Return variant, category, seed and metrics of every finished run."""
    return [
        (run.variant, run.category, run.seed, json.loads((run.folder / RESULT).read_text(encoding="utf-8")))
        for run in runs
        if _finished(run)
    ]
