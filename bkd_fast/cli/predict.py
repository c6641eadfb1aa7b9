"""``bkd-fast predict``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bkd_fast.cli.options import add_reading

SUMMARY = "predict images with a trained run"
ANOMALOUS, UNREADABLE = 3, 4  # exit status with --fail-on-defects


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="image files or folders of images")
    parser.add_argument("--out", type=Path, required=True, help="folder of tables and pictures to write; new or empty")
    parser.add_argument("--roi", type=Path, metavar="DIR", help="of a run with a mask for each image: their masks")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--precision", default="32", help="32, bf16 or (GPUs) fp16 (default: %(default)s)")
    parser.add_argument("--tile", type=int, nargs="+", metavar="N", help="predict in tiles: side, or height and width")
    parser.add_argument("--overlap", type=int, default=0, help="pixels that neighbouring tiles share (default: 0)")
    parser.add_argument("--threshold", type=float, help="decide with this threshold instead of the run's")
    parser.add_argument("--report", action="store_true", help="also write report.html: the pictures by falling score")
    add_reading(parser)
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be predicted")
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="write the tables alone, faster")
    parser.add_argument("--resume", action="store_true", help="add the images that OUT has no row for")
    parser.add_argument("--drift", action="store_true", help="warn once when images stop being like the normal ones")
    parser.add_argument("--watch", dest="watching", action="store_true", help="go on with what arrives, until Ctrl-C")
    parser.add_argument("--watch-seconds", type=float, metavar="S", help="stop watching after S seconds")
    parser.add_argument("--watch-idle", type=float, metavar="S", help="stop after S seconds without a new image")
    parser.add_argument(
        "--fail-on-defects",
        action="store_true",
        help=f"exit with status {ANOMALOUS} if an image in OUT is anomalous, else {UNREADABLE} if one was unreadable",
    )


def run(arguments: argparse.Namespace) -> int:
    from bkd_fast.evaluation.predict import predict

    fail_on_defects, tile = vars(arguments).pop("fail_on_defects"), vars(arguments).pop("tile")
    summary = predict(**vars(arguments), tile=tile and (tile[0] if len(tile) == 1 else tuple(tile)))
    print(summary.sentence())
    if not fail_on_defects:
        return 0
    return ANOMALOUS if summary.anomalous else UNREADABLE if summary.unreadable else 0
