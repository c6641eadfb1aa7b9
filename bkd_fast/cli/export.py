"""``bkd-fast export``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write a run's model for another run-time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--format", required=True, choices=("pt2", "aoti", "onnx", "openvino"), help="which run-time")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: RUN/model.…)")
    parser.add_argument("--deform-conv", action="store_true", help="onnx: DeformConv (opset 19) instead of GridSample")
    parser.add_argument(
        "--int8",
        type=Path,
        metavar="GOOD",
        help="openvino: the teacher's convolutions in 8 bits, their ranges from this folder of good images "
        "(default file: RUN/model.int8.xml)",
    )


def run(arguments: argparse.Namespace) -> None:
    from bkd_fast.export import description, export

    path, comparison = export(
        arguments.run, arguments.format, arguments.out, deform_conv=arguments.deform_conv, int8=arguments.int8
    )
    print(f"{path}; how to use it: {description(path)}")
    print("its run-time is not installed: not checked" if comparison is None else comparison.table())
