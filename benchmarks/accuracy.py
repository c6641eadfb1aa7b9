"""Detection quality beside other methods: python benchmarks/accuracy.py DATA [--seeds 3] [--csv FILE].

DATA is in MVTec AD's layout, one category or a folder of them; without masks there are no pixel metrics. The same
images (the split of bkd-fast: no method trains on validation normals), teacher weights, size and metric code for
all. --teacher, --weights and --image-size are everyone's, the other fields of BKDConfig (--preset, --set …) BKD's.
Methods: anomalib's PatchCore, PaDiM, STFPM, ReverseDistillation (where it knows the teacher) and EfficientAd (with a
teacher of its own, which has to be brought), and the comparators of the paper, US, MKD and DifferNet, written for this
script. Settings are the papers' or, where they would take hours on a CPU, those that each method's docstring names.
Needs the extra "accuracy".
"""

from __future__ import annotations

import argparse
import csv
import inspect
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from comparators import BKD, METHODS
from comparators.anomalib_methods import PDN_FILE
from comparators.common import Made, Predict, Settings
from torch import Tensor

from bkd_fast.artifact import load_trained
from bkd_fast.benchmark.results import provenance, write_lines
from bkd_fast.cli.options import add_options, config_from
from bkd_fast.config import SIZE, BKDConfig
from bkd_fast.data import ImageDataset, Sample, check_samples, find_categories, resize_mask, split_normals, truth_of
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.metrics import METRIC_NAMES, PixelMetrics, image_metrics, mean_metrics, percent
from bkd_fast.inference.detector import Detector
from bkd_fast.model.teacher import with_image_size
from bkd_fast.training.train import train

TEACHER = "tf_efficientnet_lite0"
SHOWN = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_f1_max": "pixel F1-max", "aupro": "AUPRO"}
FIELDS = ("method", "category", "seed", "teacher", "options")  # what tells rows apart
COSTS = ("train_seconds", "image_ms", "megabytes")  # image: median, one at a time, without decoding
Line = dict[str, str]  # a row of the CSV


class Case(NamedTuple):
    """One method on one category with one seed."""

    method: str
    category: str
    settings: Settings
    options: Mapping[str, Any]  # of the method, those that are not its defaults

    def key(self) -> Line:
        """What tells its row apart."""
        config = self.settings.config
        named = [f"{name}={value}" for name, value in self.options.items()]
        if config.teacher.size != SIZE:
            named.append("image_size={}x{}".format(*config.teacher.size))
        if config.teacher.weights == "none":
            named.append("random weights")
        if self.method == "efficientad" and self.settings.imagenet is None:
            named.append("without penalty")
        seed, teacher = str(config.training.seed), config.teacher.name
        values = (METHODS[self.method].name, self.category, seed, teacher, "; ".join(named))
        return dict(zip(FIELDS, values, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    logging.getLogger("timm").setLevel(logging.ERROR)
    lines = _earlier(arguments.csv, resume=arguments.resume)
    seen = {_key(line) for line in lines}
    left_out: dict[str, str] = {}
    where = provenance()  # now: files may change while this runs
    for case, normals, test in _cases(arguments):
        key, name = case.key(), METHODS[case.method].name
        if _key(key) in seen or name in left_out:
            continue
        started = time.monotonic()
        made = _bkd(arguments.data, case) if case.method == BKD else _peer(case, normals)
        if isinstance(made, str):
            left_out[name] = made
            print(f"{name}: left out, {made}", flush=True)
            continue
        predict, megabytes = made
        seconds = time.monotonic() - started
        metrics, milliseconds = _measure(predict, test, case.settings.config.teacher.size)
        costs = dict(zip(COSTS, (f"{seconds:.0f}", f"{milliseconds:.1f}", f"{megabytes:.1f}"), strict=True))
        lines.append({**key, **_written(metrics), **costs, **where})
        print(_shown(lines[-1]), flush=True)
        if arguments.csv:
            write_lines(lines, arguments.csv)
    print(table(lines))
    for name, reason in left_out.items():
        print(f"\n{name}: left out, {reason}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data set in MVTec AD's layout")
    parser.add_argument("--category", nargs="+", help="some categories (default: all)")
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help=f"some of: {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 (default: %(default)s)")
    parser.add_argument("--peer-epochs", type=int, help="of other trained methods (default: each one's own)")
    parser.add_argument("--coreset", type=float, help="PatchCore's share of patches (default: 0.01)")
    option = {"metavar": "METHOD.NAME=VALUE", "help": "e.g. differnet.views=64 us.students=5"}
    parser.add_argument("--option", nargs="+", default=[], **option)
    parser.add_argument("--efficientad-weights", type=Path, metavar="FILE", help=f"EfficientAd's teacher, {PDN_FILE}")
    parser.add_argument(
        "--imagenet-folder", type=Path, metavar="DIR", help="images for EfficientAd's penalty (default: no penalty)"
    )
    parser.add_argument("--csv", type=Path, help="file to write, row by row")
    parser.add_argument("--resume", action="store_true", help="resume --csv: what has a row is not run again")
    add_options(parser, leave_out=("seed",))
    parser.set_defaults(teacher=TEACHER)  # small enough for a CPU, and its weights come with the extra
    return parser


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[Case, list[Sample], list[Sample]]]:
    """Every case with its normal images to train on and its test images."""
    config, asked = config_from(arguments), _options(arguments.option)
    config = config.with_changes(teacher=with_image_size(config.teacher))
    for seed in range(arguments.seeds):
        own = config.with_changes({"training.seed": seed})
        for category in find_categories(arguments.data, arguments.category):
            test = check_samples(category.test)
            if not test:
                raise BKDError(f"{arguments.data} has no test images for {category.name!r}")
            defective = [sample for sample in test if sample.label]
            masked = sum(bool(sample.masks) for sample in defective)
            if seed == 0 and masked < len(defective):
                print(f"{category.name}: {masked} of {len(defective)} defective images have a mask for pixel metrics")
            normals, held_out = split_normals(check_samples(category.train), own.training.validation_share, seed)
            validation = ImageDataset(held_out, own.teacher.size)
            settings = Settings(own, validation, arguments.efficientad_weights, arguments.imagenet_folder)
            for method in arguments.only or METHODS:
                options = _changed(arguments, own) if method == BKD else _chosen(method, arguments, asked)
                yield Case(method, category.name, settings, options), normals, test


def _changed(arguments: argparse.Namespace, config: BKDConfig) -> dict[str, Any]:
    """BKD's preset if it is another than the default, and the fields that differ from it."""
    base, preset = BKDConfig.preset(arguments.preset).flat(), {"preset": arguments.preset}
    elsewhere = ("teacher.name", "teacher.weights", "teacher.image_size", "training.seed")
    changed = {name: value for name, value in config.flat().items() if name not in base or value != base[name]}
    return {
        **(preset if arguments.preset != "default" else {}),
        **{name: value for name, value in changed.items() if name not in elsewhere},
    }


def _chosen(method: str, arguments: argparse.Namespace, asked: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Another method's options that are not its defaults; ``--option`` goes before ``--peer-epochs``."""
    defaults = _defaults(method)
    general = {"epochs": arguments.peer_epochs, "coreset": arguments.coreset}
    named = {name: value for name, value in general.items() if name in defaults and value is not None}
    named.update(asked.get(method, {}))
    return {name: value for name, value in named.items() if value != defaults[name]}


def _bkd(data: Path, case: Case) -> tuple[Predict, float]:
    with tempfile.TemporaryDirectory() as folder:
        train(data, Path(folder) / "run", case.settings.config, categories=[case.category], progress=False)
        detector = Detector(load_trained(Path(folder) / "run"), "cpu")
        files = sum(path.stat().st_size for path in (Path(folder) / "run").glob("*.safetensors"))
    teacher = sum(value.nbytes for value in detector.model.teacher.state_dict().values())

    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        return detector.score_features(detector.distill(images))

    return predict, (files - teacher) / 1e6


def _peer(case: Case, normals: Sequence[Sample]) -> Made:
    make = METHODS[case.method].make
    assert make is not None
    config = case.settings.config
    np.random.seed(config.training.seed)  # anomalib's coreset draws its projection from it
    torch.manual_seed(config.training.seed)
    return make(ImageDataset(normals, config.teacher.size), case.settings, **case.options)


@torch.inference_mode()
def _measure(predict: Predict, test: Sequence[Sample], size: tuple[int, int]) -> tuple[dict[str, float | None], float]:
    """Return all metrics, pixel metrics only over defective images with a mask, and the median ms of an image."""
    dataset, pixels = ImageDataset(test, size), PixelMetrics()
    scores, times = [], []
    for index, sample in enumerate(test):
        image = dataset[index][0].unsqueeze(0)
        started = time.perf_counter()
        score, anomaly_map = predict(image)
        times.append(1e3 * (time.perf_counter() - started))
        scores.append(float(score))
        mask = truth_of(sample)
        if not sample.label or mask is not None:
            truth = torch.zeros(size).bool().numpy() if mask is None else resize_mask(mask, size)
            pixels.update(anomaly_map.reshape(size).numpy(), truth)
    metrics = {**image_metrics([sample.label for sample in test], scores), **pixels.compute()}
    pixels.close()
    return metrics, sorted(times)[len(times) // 2]


def _defaults(method: str) -> dict[str, Any]:
    """Names and defaults of a method's own options."""
    make = METHODS[method].make
    named = {} if make is None else inspect.signature(make).parameters
    return {name: each.default for name, each in named.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}


def _options(items: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``["us.students=5"]`` -> ``{"us": {"students": 5}}``, of the type of the option's default."""
    chosen: dict[str, dict[str, Any]] = {}
    for item in items:
        whole, separator, text = item.partition("=")
        method, _, name = whole.partition(".")
        if not separator or method not in METHODS or method == BKD:
            raise BKDError(f"--option takes METHOD.NAME=VALUE, not {item!r} (and BKD's fields are set with --set)")
        defaults = _defaults(method)
        if name not in defaults:
            raise BKDError(f"{method} has no option {name!r}: choose one of {', '.join(defaults) or 'none'}")
        try:
            chosen.setdefault(method, {})[name] = type(defaults[name])(text)
        except ValueError as error:
            raise BKDError(f"--option {item}: expected a value like {defaults[name]}") from error
    return chosen


def _earlier(path: Path | None, *, resume: bool) -> list[Line]:
    """The rows of an earlier run."""
    if resume and path is None:
        raise BKDError("--resume needs the CSV to resume: name it with --csv FILE")
    if path is None or not path.exists():
        return []
    if not resume:
        raise BKDError(f"there is already a file {path}: add --resume to continue it, or name another")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in (*FIELDS, *METRIC_NAMES, *COSTS) if name not in (reader.fieldnames or ())]
        if missing:
            raise BKDError(f"{path} was not written by this script: it has no column {missing[0]!r}")
        return list(reader)


def _key(line: Line) -> tuple[str, ...]:
    return tuple(line[name] for name in FIELDS)


def _written(metrics: Mapping[str, float | None]) -> Line:
    return {name: "" if (value := metrics[name]) is None else f"{value:.4f}" for name in METRIC_NAMES}


def _read(line: Line) -> dict[str, float | None]:
    return {name: float(line[name]) if line[name] else None for name in METRIC_NAMES}


def _label(line: Line) -> str:
    return f"{line['method']}; {line['options']}" if line["options"] else line["method"]


def _shown(line: Line) -> str:
    metrics = "  ".join(f"{name} {percent(value)}" for name, value in _read(line).items())
    costs = f"({line['train_seconds']} s, {line['image_ms']} ms)"
    return f"{_label(line)}, {line['category']}, seed {line['seed']}: {metrics}  {costs}"


def table(lines: Sequence[Line]) -> str:
    """Markdown: mean ± std over the seeds, each seed averaged over the categories it has."""
    heads = ["method", *SHOWN.values(), "training s", "image ms", "MB", "seeds"]
    rows = [heads, ["---"] * len(heads)]
    several = len({line["teacher"] for line in lines}) > 1
    groups: dict[str, list[Line]] = {}
    for line in lines:
        label = f"{_label(line)}; {line['teacher']}" if several else _label(line)
        groups.setdefault(label, []).append(line)
    for label, own in groups.items():
        seeds = sorted({line["seed"] for line in own}, key=int)
        means = [mean_metrics(_read(line) for line in own if line["seed"] == seed) for seed in seeds]
        metrics = [_spread([value for mean in means if (value := mean[name]) is not None]) for name in SHOWN]
        costs = [statistics.fmean(float(line[name]) for line in own) for name in COSTS]
        rows.append([label, *metrics, *(f"{cost:.0f}" for cost in costs[:2]), f"{costs[2]:.1f}", str(len(seeds))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _spread(values: Sequence[float]) -> str:
    """Percent: the mean, and the sample's std if there is more than one value."""
    if not values:
        return "–"
    mean = percent(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {percent(statistics.stdev(values))}"


if __name__ == "__main__":
    try:
        main()
    except BKDError as error:
        sys.exit(f"accuracy.py: {error}")
