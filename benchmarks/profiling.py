"""Where an image's time goes, by torch.profiler: python benchmarks/profiling.py [--device cuda] [--csv FILE].

On a CUDA device: kernels, copies and busy time of one image, kernel by kernel and by part of the model, then of the
CUDA graph that the detector replays. On a CPU: operations and their own time. ``--nvtx`` runs the images under NVTX
ranges instead, for Nsight Systems: ``nsys profile python benchmarks/profiling.py --device cuda --nvtx``.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bkd_fast.benchmark.model import TEACHERS, random_detector
from bkd_fast.benchmark.parts import PARTS, in_parts, nvtx_ranges
from bkd_fast.benchmark.results import write_lines

WARM_UP = 3
COLUMNS = ("teacher", "part", "kernels", "copies", "busy_ms")
COPIES = ("Memcpy", "Memset")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--teacher", nargs="+", choices=TEACHERS, default=list(TEACHERS), help="some of them")
    parser.add_argument("--repeat", type=int, default=20, help="images that are averaged (default: %(default)s)")
    parser.add_argument("--nvtx", action="store_true", help="mark ranges, measure nothing")
    parser.add_argument("--csv", type=Path, help="file to write")
    arguments = parser.parse_args()
    if (arguments.nvtx or arguments.device == "cuda") and not torch.cuda.is_available():
        parser.error("--nvtx and --device cuda need a CUDA device, and torch sees none")
    lines: list[dict[str, object]] = []
    for label in arguments.teacher:
        for packed in (False, True) if arguments.device == "cuda" else (False,):
            detector, images = random_detector(label, arguments.device, pack=packed)
            for _ in range(WARM_UP):
                detector.score(images)
            if arguments.nvtx:
                with nvtx_ranges(detector.model), torch.cuda.nvtx.range(f"{label}, {'graph' if packed else 'kernels'}"):
                    for _ in range(arguments.repeat):
                        detector.score(images)
                continue
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if arguments.device == "cuda" else [])]
            # A graph replays without its parts.
            inside = nullcontext() if packed else in_parts(detector.model, record_function)
            with inside, profile(activities=activities) as profiled:
                for _ in range(arguments.repeat):
                    detector.score(images)
                if arguments.device == "cuda":
                    torch.cuda.synchronize()
            for name, total in summary(profiled.events(), arguments.device, packed=packed).items():
                count, copies, milliseconds = (value / arguments.repeat for value in total)
                values = (f"{count:.1f}", f"{copies:.1f}", f"{milliseconds:.4f}")
                lines.append(dict(zip(COLUMNS, (TEACHERS[label], name, *values), strict=True)))
                print("{:24} {:16} {:>8} kernels {:>6} copies {:>9} ms".format(*lines[-1].values()))
        if arguments.csv and lines:
            write_lines(lines, arguments.csv, arguments.device)


def summary(events: Any, device: str, *, packed: bool) -> dict[str, list[float]]:
    """Return kernels, copies and their milliseconds by part, and of everything that the device ran.

    On a CPU operations count, by the time that is their own.
    """
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for root in events if not packed else ():
        if root.device_type == DeviceType.CPU and root.cpu_parent is None:
            for part, event in _in_part(root, "other"):
                if device == "cpu":
                    _add(totals[part], event.name, event.self_cpu_time_total)
                for kernel in event.kernels:
                    _add(totals[part], kernel.name, kernel.duration)
    whole = "graph" if packed else "sum"
    if device == "cpu":
        totals[whole] = [sum(values) for values in zip(*totals.values(), strict=True)]
    else:
        for event in events:
            if event.device_type == DeviceType.CUDA and event.name not in PARTS:
                _add(totals[whole], event.name, event.self_device_time_total)
    return dict(totals)


def _in_part(event: Any, part: str) -> Iterator[tuple[str, Any]]:
    """An event and those inside it, each with the innermost part around it."""
    if event.name in PARTS:
        part = event.name
    else:
        yield part, event
    for child in event.cpu_children:
        yield from _in_part(child, part)


def _add(total: list[float], name: str, microseconds: float) -> None:
    total[1 if name.startswith(COPIES) else 0] += 1
    total[2] += microseconds / 1e3


if __name__ == "__main__":
    main()
