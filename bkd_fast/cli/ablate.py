"""``bkd-fast ablate``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bkd_fast.cli.options import add_options, config_from, grid_from

SUMMARY = "train and measure variants over several seeds: what pays"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="a data set in MVTec AD's layout, with test images")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results; the same one resumes")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=int, choices=(2, 4, 5), help="of the paper: shots, parts, or transformations")
    what.add_argument("--grid", nargs="+", metavar="OPTION=A,B", help="every combination of these options' values")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of each variant (default: %(default)s)")
    parser.add_argument("--category", nargs="+", help="categories to take (default: all)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a GPU, or one for two cores)")
    parser.add_argument("--keep", action="store_true", help="leave every run's model, scores and report")
    add_options(parser, leave_out=("seed",))


def run(arguments: argparse.Namespace) -> None:
    from bkd_fast.ablation import ablate, grid_variants, table_variants

    base = config_from(arguments)
    if arguments.table is not None:
        variants, what = table_variants(arguments.table, base), f"Table {arguments.table}"
    else:
        fields = grid_from(arguments.grid)
        variants, what = grid_variants(fields, base), ", ".join(fields)
    results = ablate(
        arguments.data,
        arguments.out,
        variants,
        seeds=arguments.seeds,
        categories=arguments.category,
        jobs=arguments.jobs,
        keep=arguments.keep,
        title=f"{what} on {arguments.data.resolve().name}, preset {arguments.preset}",
    )
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        print(results.read_text(encoding="utf-8"))
        print(f"results: {results}")
