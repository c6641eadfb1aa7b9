"""The main job on built-in data: make the data set, train, evaluate, report."""

from __future__ import annotations

import time
from pathlib import Path

from bkd_fast.config import BKDConfig
from bkd_fast.data.demo import make_demo
from bkd_fast.evaluation import evaluate, table
from bkd_fast.run import CONFIG
from bkd_fast.training import train

# A small teacher whose ImageNet weights come with a package. One good image in twenty may be called anomalous: 60
# images are too few for one in a hundred.
DEMO = BKDConfig(teacher="tf_efficientnet_lite0", false_alarms=0.05)


def demo(out: str | Path = "runs/demo", *, data: str | Path | None = None) -> Path:
    """Trains on the built-in textures and reports; an interrupted demo goes on where it stopped.

    Args:
        out: the run folder; a finished one is evaluated again, not trained again.
        data: where the data set is made; None = ``out/data``.

    Returns:
        The path of the report.
    """
    out = Path(out)
    started = time.monotonic()
    folder = make_demo(Path(data) if data is not None else out / "data")
    if (out / CONFIG).is_file():
        print(f"{out} is trained already: delete it to train again")
    else:
        print(f"training on {folder} with {DEMO.teacher} …", flush=True)
        train(folder, out, DEMO, resume=True)
    trained = time.monotonic()
    metrics = evaluate(out)
    print(table(metrics))
    print(f"data and training {trained - started:.0f} s, evaluation and report {time.monotonic() - trained:.0f} s")
    report = out / "report.html"
    print(f"report: {report}")
    return report
