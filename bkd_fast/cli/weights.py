"""``bkd-fast weights``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "download a teacher's ImageNet weights into a file, to bring to a machine without a network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a timm model, e.g. resnet18 or vit_small_patch14_dinov2")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="file to write")


def run(arguments: argparse.Namespace) -> None:
    from bkd_fast.training.weights import save_weights

    path = save_weights(arguments.name, arguments.out)
    size = f"{path.stat().st_size / 1e6:.0f} MB"
    print(f"{path} ({size})\nuse it: bkd-fast train DATA --teacher {arguments.name} --weights {path} --out RUN")
