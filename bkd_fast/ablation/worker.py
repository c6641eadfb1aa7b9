"""One run of an ablation, in a process of its own: ``python -m bkd_fast.ablation.worker FOLDER``."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from pathlib import Path

from bkd_fast.artifact import LOG, read_category
from bkd_fast.config import BKDConfig
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.environment import describe
from bkd_fast.evaluation.evaluate import evaluate
from bkd_fast.files import write_json
from bkd_fast.training.checkpoint import read_log
from bkd_fast.training.train import train

SPECIFICATION, RESULT, MODEL = "run.json", "result.json", "model"


def work(folder: Path) -> None:
    """Train and evaluate what ``folder/run.json`` says; its metrics become ``folder/result.json``.

    An interrupted training resumes from its checkpoint.
    """
    given = json.loads((folder / SPECIFICATION).read_text(encoding="utf-8"))
    model = folder / MODEL
    started = time.monotonic()
    train(
        given["data"],
        model,
        BKDConfig.from_dict(given["config"]),
        categories=[given["category"]],
        resume=True,
        progress=False,
    )
    seconds = time.monotonic() - started
    metrics = evaluate(model, given["data"], pictures=given["keep"], progress=False)
    source = read_category(model).source
    rows = read_log(model / LOG)
    result = {
        "metrics": metrics["categories"][given["category"]],
        "train_images": len(source.train_files),
        "validation_images": len(source.validation_files),
        "epochs": len(rows),
        "epoch_seconds": sum(row["seconds"] for row in rows),
        "seconds": round(seconds, 1),
        "environment": describe(),
    }
    if not given["keep"]:
        shutil.rmtree(model)
    write_json(folder / RESULT, result)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        work(Path(sys.argv[1]))
    except BKDError as error:
        sys.exit(f"bkd-fast: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
