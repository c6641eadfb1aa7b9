"""``bkd-fast train``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bkd_fast.cli.options import add_logger, add_options, config_from

SUMMARY = "learn what good parts look like"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="folder of good images, or a data set in MVTec AD's layout")
    parser.add_argument("--out", type=Path, required=True, help="run folder to write; new or empty")
    parser.add_argument("--category", nargs="+", help="categories to train (default: all)")
    parser.add_argument("--unified", action="store_true", help="one model of all categories, each with its thresholds")
    parser.add_argument("--anomalous", type=Path, help="with a plain folder: defective images, for evaluation only")
    parser.add_argument("--masks", type=Path, help="with --anomalous: their masks, found by relative path")
    add_options(parser)
    parser.add_argument("--resume", action="store_true", help="resume an interrupted run")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be decoded")
    parser.add_argument("--devices", type=int, default=1, help="processes (GPUs) to train with (default: %(default)s)")
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "32", "bf16", "fp16"), help="auto: bf16 where the GPU has it"
    )
    parser.add_argument("--cache-gb", type=float, default=2.0, help="GB of features to cache (default: %(default)s)")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep the cache there instead of in memory")
    add_logger(parser)


def run(arguments: argparse.Namespace) -> None:
    from bkd_fast.data import find_categories
    from bkd_fast.training.train import train

    train(
        arguments.data,
        arguments.out,
        config_from(arguments),
        categories=arguments.category,
        unified=arguments.unified,
        anomalous=arguments.anomalous,
        masks=arguments.masks,
        devices=arguments.devices,
        accelerator=arguments.accelerator,
        precision=arguments.precision,
        resume=arguments.resume,
        skip_unreadable=arguments.skip_unreadable,
        cache_gb=arguments.cache_gb,
        cache_dir=arguments.cache_dir,
        loggers=arguments.loggers,
    )
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one of several processes speaks
        found = find_categories(
            arguments.data, arguments.category, anomalous=arguments.anomalous, masks=arguments.masks
        )
        tested = any(category.test for category in found)
        then = f"evaluate {arguments.out}" if tested else f"predict {arguments.out} IMAGES --out predictions/"
        print(f"trained: {arguments.out}\nnext: bkd-fast {then}")
