"""The command line, ``bkd-fast``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bkd_fast.errors import BKDError
from bkd_fast.version import __version__

EPILOG = """examples:
  bkd-fast demo                                   train, evaluate and report on the built-in data
  bkd-fast train parts/ --out runs/parts          one model for a folder of good images (or MVTec AD's layout)
  bkd-fast evaluate runs/parts                    metrics, scores.csv and report.html on the test images
  bkd-fast predict runs/parts new/*.png --out out/  scores, decisions, heat maps and masks
  bkd-fast export runs/parts --format onnx          the model for another run-time
  bkd-fast bench                                  how fast this machine is, on every backend it has
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (0 done, 1 unusable input, 130 interrupted)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("lightning_fabric", "timm", "httpx", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        arguments.run(arguments)
    except BKDError as error:
        print(f"bkd-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; go on with the same command and --resume" if arguments.command == "train" else ""
        print(f"bkd-fast: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bkd-fast",
        description="Finds defects after seeing good parts only: bidirectional knowledge distillation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bkd_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "train, evaluate and report on the built-in data set")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: %(default)s)")
    demo.add_argument("--data", type=Path, help="where the data set is made (default: OUT/data)")
    demo.add_argument("--epochs", type=int, help="training epochs (default: the demo's own)")

    train = _command(commands, "train", _train, "learn what good parts look like")
    train.add_argument("data", type=Path, help="folder of good images, or a data set in MVTec AD's layout")
    train.add_argument("--out", type=Path, required=True, help="run folder to write; new or empty")
    train.add_argument("--category", nargs="+", help="categories to train (default: all)")
    train.add_argument("--anomalous", type=Path, help="with a plain folder: defective images, for evaluation only")
    train.add_argument("--masks", type=Path, help="with --anomalous: their masks, found by file name")
    train.add_argument("--preset", default="default", help="default, paper or rd4ad (default: %(default)s)")
    train.add_argument("--teacher", help="any timm CNN, e.g. resnet18 or tf_efficientnet_lite0")
    train.add_argument("--weights", help="auto, or a local file with the teacher's ImageNet weights")
    train.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="height and width, or one for both")
    train.add_argument("--epochs", type=int, help="passes over the training images (default: the preset's)")
    train.add_argument("--batch-size", type=int, help="images a step, over all processes (default: the preset's)")
    train.add_argument("--shots", type=int, help="support images k")
    train.add_argument("--seed", type=int, help="of everything random (default: 0)")
    train.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="any other field of BKDConfig, e.g. fusion=sum"
    )
    train.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    train.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be decoded")
    train.add_argument("--devices", type=int, default=1, help="processes (GPUs) to train with (default: %(default)s)")
    train.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    train.add_argument(
        "--precision", default="auto", choices=("auto", "32", "bf16", "fp16"), help="auto: bf16 where the GPU has it"
    )
    train.add_argument("--cache-gb", type=float, default=2.0, help="memory for teacher features (default: %(default)s)")

    evaluate = _command(commands, "evaluate", _evaluate, "measure a run on test images and write its report")
    evaluate.add_argument("run_folder", type=Path, metavar="RUN")
    evaluate.add_argument("data", type=Path, nargs="?", help="data set (default: the one the run was trained on)")
    evaluate.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    evaluate.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be decoded")

    predict = _command(commands, "predict", _predict, "judge images with a trained run")
    predict.add_argument("run_folder", type=Path, metavar="RUN")
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="image files or folders of images")
    predict.add_argument(
        "--out", type=Path, required=True, help="folder for scores.csv, heat maps and masks; new or empty"
    )
    predict.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    predict.add_argument("--precision", default="32", help="32, bf16 or (GPUs) fp16 (default: %(default)s)")
    predict.add_argument("--threshold", type=float, help="decide with this threshold instead of the run's")
    predict.add_argument(
        "--skip-unreadable", action="store_true", help="report images that cannot be decoded and go on"
    )

    export = _command(commands, "export", _export, "write a run's model for another run-time")
    export.add_argument("run_folder", type=Path, metavar="RUN")
    export.add_argument("--format", required=True, choices=("pt2", "aoti", "onnx", "openvino"), help="which run-time")
    export.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: RUN/model.…)")
    export.add_argument("--deform-conv", action="store_true", help="onnx: DeformConv (opset 19) instead of GridSample")

    info = _command(commands, "info", _info, "versions, devices and which kernels are built")
    info.add_argument("--json", action="store_true", help="as JSON")

    bench = _command(commands, "bench", _bench, "time operators, a training step and inference on this machine")
    bench.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default: %(default)s)")
    bench.add_argument("--threads", type=int, help="CPU threads (default: one a core)")
    bench.add_argument("--only", nargs="+", metavar="NAME", help="some operators, training_step or inference")
    bench.add_argument(
        "--seconds", type=float, default=0.2, help="time for each figure, three calls at least (default: %(default)s)"
    )
    bench.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the figures there too, with quantiles and memory"
    )
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run)
    return parser


# The commands import what they need when they run: `bkd-fast --help` does not wait for torch.


def _demo(arguments: argparse.Namespace) -> None:
    from bkd_fast.demo import demo

    demo(arguments.out, data=arguments.data, epochs=arguments.epochs)


def _train(arguments: argparse.Namespace) -> None:
    from bkd_fast.training import train

    train(
        arguments.data,
        arguments.out,
        _config(arguments),
        categories=arguments.category,
        anomalous=arguments.anomalous,
        masks=arguments.masks,
        devices=arguments.devices,
        accelerator=arguments.accelerator,
        precision=arguments.precision,
        resume=arguments.resume,
        skip_unreadable=arguments.skip_unreadable,
        cache_gb=arguments.cache_gb,
    )
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one of several processes speaks
        print(f"trained: {arguments.out}\nnext: bkd-fast evaluate {arguments.out}")


def _config(arguments: argparse.Namespace) -> Any:
    from bkd_fast.config import BKDConfig

    names = ("teacher", "weights", "epochs", "batch_size", "shots", "seed")
    changes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.image_size:
        if len(arguments.image_size) > 2:
            raise BKDError(f"--image-size takes one number or two, not {len(arguments.image_size)}")
        changes["image_size"] = (arguments.image_size * 2)[:2]
    for item in arguments.set:
        name, separator, text = item.partition("=")
        if not separator:
            raise BKDError(f"--set takes FIELD=VALUE, not {item!r}")
        try:
            changes[name] = json.loads(text)
        except json.JSONDecodeError:
            changes[name] = {"True": True, "False": False}.get(text, text)
    return BKDConfig.preset(arguments.preset, **changes)


def _evaluate(arguments: argparse.Namespace) -> None:
    from bkd_fast.evaluation import evaluate, table

    metrics = evaluate(
        arguments.run_folder, arguments.data, device=arguments.device, skip_unreadable=arguments.skip_unreadable
    )
    print(table(metrics))
    print(f"report: {arguments.run_folder / 'report.html'}")


def _predict(arguments: argparse.Namespace) -> None:
    from bkd_fast.predict import predict

    summary = predict(
        arguments.run_folder,
        arguments.images,
        arguments.out,
        device=arguments.device,
        precision=arguments.precision,
        threshold=arguments.threshold,
        skip_unreadable=arguments.skip_unreadable,
    )
    print(summary)


def _export(arguments: argparse.Namespace) -> None:
    from bkd_fast.export import export

    path, difference = export(arguments.run_folder, arguments.format, arguments.out, deform_conv=arguments.deform_conv)
    agrees = "its run-time is not installed: not checked" if difference is None else f"differs by {difference:.1g}"
    print(f"{path} ({agrees}); how to use it: {path.with_suffix('.json')}")


def _info(arguments: argparse.Namespace) -> None:
    from bkd_fast.info import describe, render

    facts = describe()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))


def _bench(arguments: argparse.Namespace) -> None:
    from bkd_fast.benchmark.short import bench

    bench(
        arguments.device,
        threads=arguments.threads,
        only=arguments.only,
        seconds=arguments.seconds,
        csv=arguments.csv,
    )


if __name__ == "__main__":
    sys.exit(main())
