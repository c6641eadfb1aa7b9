"""Command-line options that make a :class:`bkd_fast.config.BKDConfig`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bkd_fast.errors import BKDError

if TYPE_CHECKING:
    from bkd_fast.config import BKDConfig

FIELDS = ("teacher", "weights", "epochs", "batch_size", "shots", "seed", "false_alarms", "tile")


def add_options(parser: argparse.ArgumentParser, *, leave_out: Iterable[str] = ()) -> None:
    """Adds ``--preset``, ``--set`` and the fields most often changed; ``leave_out`` names those that are not added."""
    skipped = set(leave_out)
    parser.add_argument("--preset", default="default", help="default, paper or rd4ad (default: %(default)s)")
    parser.add_argument("--teacher", help="any timm CNN, e.g. resnet18 or tf_efficientnet_lite0")
    parser.add_argument("--weights", help="auto, or a local file with the teacher's ImageNet weights")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="height and width, or one for both")
    parser.add_argument("--epochs", type=int, help="passes over the training images (default: the preset's)")
    parser.add_argument("--batch-size", type=int, help="images a step, over all processes (default: the preset's)")
    if "shots" not in skipped:
        parser.add_argument("--shots", type=int, help="support images k")
    if "seed" not in skipped:
        parser.add_argument("--seed", type=int, help="of everything random (default: 0)")
    parser.add_argument(
        "--false-alarms",
        type=float,
        metavar="RATE",
        help="share of good images that may be called anomalous (default: 0.01)",
    )
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="learn and predict in square tiles of this side")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="any other field of BKDConfig, e.g. fusion=sum"
    )


def config_from(arguments: argparse.Namespace) -> BKDConfig:
    """The configuration that the options of :func:`add_options` ask for."""
    from bkd_fast.config import BKDConfig

    changes = {name: value for name in FIELDS if (value := getattr(arguments, name, None)) is not None}
    if arguments.image_size:
        if len(arguments.image_size) > 2:
            raise BKDError(f"--image-size takes one number or two, not {len(arguments.image_size)}")
        changes["image_size"] = (arguments.image_size * 2)[:2]
    for item in arguments.set:
        name, text = _parts("--set", "FIELD=VALUE", item)
        changes[name] = _value(text)
    return BKDConfig.preset(arguments.preset, **changes)


def grid_from(items: Iterable[str]) -> dict[str, list[Any]]:
    """``["shots=4,8", "fusion=sum,geometric"]`` -> field -> values; a comma inside brackets separates no values."""
    fields = {}
    for item in items:
        name, text = _parts("--grid", "FIELD=VALUE,VALUE…", item)
        whole = _value(f"[{text}]")
        fields[name] = whole if isinstance(whole, list) else [_value(part) for part in text.split(",")]
    return fields


def _parts(option: str, form: str, item: str) -> tuple[str, str]:
    name, separator, text = item.partition("=")
    if not separator or not text:
        raise BKDError(f"{option} takes {form}, not {item!r}")
    return name, text


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False}.get(text, text)
