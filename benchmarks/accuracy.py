"""Detection quality beside anomalib: python benchmarks/accuracy.py DATA [--seeds 3] [--csv FILE].

The same images (the split of bkd-fast: held-out normals are nobody's training images), teacher weights, size and metric
code for all. Peers: anomalib's PatchCore, STFPM and, where it knows the teacher, ReverseDistillation, with the
settings of their papers or, where anomalib's differ, anomalib's. Needs the extra "accuracy".
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accuracy_peers import PEERS, Judge, Settings
from torch import Tensor

from bkd_fast.benchmark.results import versions
from bkd_fast.config import BKDConfig
from bkd_fast.data import ImageDataset, Sample, check_samples, find_categories, load_mask, resize_mask, split_normals
from bkd_fast.detector import Detector
from bkd_fast.errors import BKDError
from bkd_fast.files import atomic_write
from bkd_fast.metrics import METRIC_NAMES, PixelMetrics, image_metrics, mean_metrics, percent
from bkd_fast.run import load_trained
from bkd_fast.training import train

BKD_NAME = "BKD (bkd_fast)"


class Row(NamedTuple):
    """One method on one category with one seed."""

    method: str
    category: str
    seed: int
    figures: dict[str, float | None]
    train_seconds: float
    image_ms: float  # median, one image at a time, without decoding
    megabytes: float  # of what is kept beside the teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data set in MVTec AD's layout")
    parser.add_argument("--teacher", default="tf_efficientnet_lite0", help="(default: %(default)s)")
    parser.add_argument("--weights", default="auto", help="auto, or a local file")
    parser.add_argument("--category", nargs="+", help="some categories (default: all)")
    parser.add_argument("--only", nargs="+", choices=[BKD_NAME, *PEERS], metavar="METHOD", help="some methods")
    parser.add_argument("--seeds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=BKDConfig.epochs, help="of BKD, at most (default: %(default)s)")
    parser.add_argument("--peer-epochs", type=int, default=40, help="of trained peers (default: %(default)s)")
    parser.add_argument("--coreset", type=float, default=0.01, help="PatchCore's share of patches (default: 0.01)")
    parser.add_argument("--csv", type=Path, help="file to write")
    arguments = parser.parse_args()
    logging.getLogger("timm").setLevel(logging.ERROR)
    rows: list[Row] = []
    for seed in range(arguments.seeds):
        config = BKDConfig(
            teacher=arguments.teacher, weights=arguments.weights, epochs=arguments.epochs, batch_size=8, seed=seed
        )
        settings = Settings(config, arguments.peer_epochs, arguments.coreset)
        for category in find_categories(arguments.data, arguments.category):
            test = check_samples(category.test)
            if not test:
                raise BKDError(f"{arguments.data} has no test images for {category.name!r}")
            normals, _ = split_normals(check_samples(category.train), config.holdout, seed)
            for method in arguments.only or [BKD_NAME, *PEERS]:
                started = time.monotonic()
                if method == BKD_NAME:
                    judge, megabytes = _bkd(arguments.data, category.name, config)
                else:
                    torch.manual_seed(seed)
                    made = PEERS[method](ImageDataset(normals, config.image_size), settings)
                    if isinstance(made, str):
                        print(f"{method}: left out, {made}")
                        continue
                    judge, megabytes = made
                seconds = time.monotonic() - started
                figures, milliseconds = _measure(judge, test, config.image_size)
                rows.append(Row(method, category.name, seed, figures, seconds, milliseconds, megabytes))
                print(_line(rows[-1]), flush=True)
                if arguments.csv:
                    _write(arguments.csv, rows, config)
    print(_table(rows))


def _bkd(data: Path, category: str, config: BKDConfig) -> tuple[Judge, float]:
    with tempfile.TemporaryDirectory() as folder:
        train(data, Path(folder) / "run", config, categories=[category], progress=False)
        detector = Detector(load_trained(Path(folder) / "run"), "cpu")
        files = sum(path.stat().st_size for path in (Path(folder) / "run").glob("*.safetensors"))
    teacher = sum(value.nbytes for value in detector.model.teacher.state_dict().values())

    def judge(images: Tensor) -> tuple[Tensor, Tensor]:
        return detector.judge(detector.distill(images))

    return judge, (files - teacher) / 1e6


@torch.inference_mode()
def _measure(judge: Judge, test: Sequence[Sample], size: tuple[int, int]) -> tuple[dict[str, float | None], float]:
    dataset, pixels = ImageDataset(test, size), PixelMetrics()
    scores, times = [], []
    for index, sample in enumerate(test):
        image = dataset[index][0].unsqueeze(0)
        started = time.perf_counter()
        score, anomaly_map = judge(image)
        times.append(1e3 * (time.perf_counter() - started))
        scores.append(float(score))
        if not sample.label or sample.mask is not None:
            truth = resize_mask(load_mask(sample.mask), size) if sample.mask else torch.zeros(size).bool().numpy()
            pixels.update(anomaly_map.reshape(size).numpy(), truth)
    figures = {**image_metrics([sample.label for sample in test], scores), **pixels.compute()}
    pixels.close()
    return figures, sorted(times)[len(times) // 2]


def _write(path: Path, rows: Sequence[Row], config: BKDConfig) -> None:
    where = versions()
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        fields = ["train_seconds", "image_ms", "megabytes", "teacher", "threads"]
        writer.writerow(["method", "category", "seed", *METRIC_NAMES, *fields, *where])
        for row in rows:
            figures = ["" if row.figures[name] is None else f"{row.figures[name]:.4f}" for name in METRIC_NAMES]
            costs = [f"{row.train_seconds:.0f}", f"{row.image_ms:.1f}", f"{row.megabytes:.1f}"]
            threads = torch.get_num_threads()
            writer.writerow(
                [row.method, row.category, row.seed, *figures, *costs, config.teacher, threads, *where.values()]
            )


def _line(row: Row) -> str:
    figures = "  ".join(f"{name} {percent(row.figures[name])}" for name in METRIC_NAMES)
    return (
        f"{row.method}, {row.category}, seed {row.seed}: {figures}  ({row.train_seconds:.0f} s, {row.image_ms:.0f} ms)"
    )


def _table(rows: Sequence[Row]) -> str:
    """Means over categories and seeds, as Markdown."""
    lines = [
        f"| method | {' | '.join(name.replace('_', ' ') for name in METRIC_NAMES)} | training s | image ms | MB |",
        f"|{'---|' * (len(METRIC_NAMES) + 4)}",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        means = mean_metrics(row.figures for row in own)
        cells = [percent(means[name]) for name in METRIC_NAMES]
        costs: list[tuple[str, Callable[[Row], float]]] = [
            ("{:.0f}", lambda row: row.train_seconds),
            ("{:.0f}", lambda row: row.image_ms),
            ("{:.1f}", lambda row: row.megabytes),
        ]
        cells += [form.format(sum(map(value, own)) / len(own)) for form, value in costs]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
