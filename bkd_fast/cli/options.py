"""Command-line options that make a :class:`bkd_fast.config.BKDConfig`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkd_fast.errors import BKDError

if TYPE_CHECKING:
    from bkd_fast.config import BKDConfig

LOGGERS = ("csv", "tensorboard", "mlflow", "wandb")  # training.loggers.PACKAGES, which would import torch
# Command-line option -> option of the configuration.
SHORTCUTS = {
    "teacher": "teacher.name",
    "weights": "teacher.weights",
    "strides": "teacher.strides",
    "tile": "teacher.tile",
    "roi": "roi.mask",
    "shots": "support.shots",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "false_alarms": "training.false_alarms",
    "seed": "training.seed",
    "max_pixels": "data.max_pixels",
    "pages": "data.pages",
}


def add_options(parser: argparse.ArgumentParser, *, leave_out: Iterable[str] = ()) -> None:
    """Add ``--preset``, ``--config``, ``--set`` and shortcuts; ``leave_out`` names shortcuts that are not added."""
    skipped = set(leave_out)
    parser.add_argument("--preset", default="default", help="default, paper or rd4ad (default: %(default)s)")
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="options on top of the preset, a table a part")
    parser.add_argument("--teacher", help="any timm backbone, e.g. resnet18, tf_efficientnet_lite0 or a ViT")
    parser.add_argument("--weights", help="auto, or a local file with the teacher's ImageNet weights")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="feature levels: layers by timm's index or name")
    parser.add_argument("--strides", type=int, nargs="+", metavar="PIXELS", help="feature levels: by stride instead")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="height and width, or one for both")
    parser.add_argument("--epochs", type=int, help="passes over the training images (default: the preset's)")
    parser.add_argument("--batch-size", type=int, help="images a step, over all processes (default: the preset's)")
    if "shots" not in skipped:
        parser.add_argument("--shots", type=int, help="support images k")
    if "seed" not in skipped:
        parser.add_argument("--seed", type=int, help="of everything random (default: 0)")
    parser.add_argument("--false-alarms", type=float, metavar="RATE", help="of good images (default: 0.01)")
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="learn and predict in square tiles of this side")
    parser.add_argument(
        "--roi", metavar="MASK", help="an image, above zero where images are looked at, or their folder"
    )
    add_reading(parser)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="OPTION=VALUE", help="any option, e.g. memory.items=500"
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which images are read."""
    parser.add_argument("--max-pixels", type=int, metavar="N", help="largest image that is decoded (default: 32000000)")
    parser.add_argument("--pages", choices=("one", "first"), help="files of several pages: an error, or read the first")


def add_logger(parser: argparse.ArgumentParser) -> None:
    """Add ``--logger``."""
    parser.add_argument("--logger", dest="loggers", nargs="+", choices=LOGGERS, help="experiment trackers")


def config_from(arguments: argparse.Namespace) -> BKDConfig:
    """Return the configuration that the options of :func:`add_options` ask for.

    The preset comes first, then ``--config``, the shortcuts, and ``--set``.

    Raises:
        BKDError: an unreadable file, an unknown option, or a value that is not usable.
    """
    from bkd_fast.config import BKDConfig, read_toml

    config = BKDConfig.preset(arguments.preset)
    if arguments.config is not None:
        try:
            text = arguments.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BKDError(f"--config: {arguments.config} cannot be read ({error})") from error
        config = config.with_changes(read_toml(text))
    changes: dict[str, Any] = {
        option: value for name, option in SHORTCUTS.items() if (value := getattr(arguments, name, None)) is not None
    }
    if arguments.layers:
        changes["teacher.layers"] = [_value(layer) for layer in arguments.layers]
    if arguments.image_size:
        if len(arguments.image_size) > 2:
            raise BKDError(f"--image-size takes one number or two, not {len(arguments.image_size)}")
        changes["teacher.image_size"] = (arguments.image_size * 2)[:2]
    for item in arguments.set:
        name, text = _parts("--set", "OPTION=VALUE", item)
        changes[name] = _value(text)
    return config.with_changes(changes)


def grid_from(items: Iterable[str]) -> dict[str, list[Any]]:
    """Return option -> values of ``["support.shots=4,8", "anomaly_map.fusion=sum,geometric"]``.

    A comma inside brackets separates no values.
    """
    options = {}
    for item in items:
        name, text = _parts("--grid", "OPTION=VALUE,VALUE…", item)
        whole = _value(f"[{text}]")
        options[name] = whole if isinstance(whole, list) else [_value(part) for part in text.split(",")]
    return options


def _parts(option: str, form: str, item: str) -> tuple[str, str]:
    name, separator, text = item.partition("=")
    if not separator or not text:
        raise BKDError(f"{option} takes {form}, not {item!r}")
    return name, text


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)
