"""``bkd-fast demo``: the main job on built-in data."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

TEACHER = "tf_efficientnet_lite0"  # small, and its ImageNet weights come with a package
SUMMARY = "train, evaluate and report on the built-in data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="where the data set is made (default: OUT/data)")


def run(arguments: argparse.Namespace) -> None:
    demo(arguments.out, data=arguments.data)


def demo(out: str | Path = "runs/demo", *, data: str | Path | None = None) -> Path:
    """Train on the built-in textures, evaluate and report; an interrupted demo resumes.

    Args:
        out: the run folder; a finished one is evaluated again, not trained again.
        data: where the data set is made; None = ``out/data``.

    Returns:
        The path of the report.
    """
    from bkd_fast.artifact import MANIFEST
    from bkd_fast.config import BKDConfig
    from bkd_fast.data.demo import make_demo
    from bkd_fast.evaluation.evaluate import evaluate, table
    from bkd_fast.training.train import train

    # One good image in twenty may be called anomalous: 60 images are too few for one in a hundred.
    config = BKDConfig().with_changes({"teacher.name": TEACHER, "training.false_alarms": 0.05})
    out = Path(out)
    started = time.monotonic()
    folder = make_demo(Path(data) if data is not None else out / "data")
    if (out / MANIFEST).is_file():
        print(f"{out} is trained already: delete it to train again")
    else:
        print(f"training on {folder} with {TEACHER} …", flush=True)
        train(folder, out, config, resume=True)
    trained = time.monotonic()
    metrics = evaluate(out)
    print(table(metrics))
    print(f"data and training {trained - started:.0f} s, evaluation and report {time.monotonic() - trained:.0f} s")
    report = out / "report.html"
    print(f"report: {report}")
    return report
