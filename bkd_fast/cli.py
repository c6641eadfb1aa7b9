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

from bkd_fast.config_options import add_options, config_from, grid_from
from bkd_fast.errors import BKDError
from bkd_fast.version import __version__

EPILOG = """examples:
  bkd-fast demo                                   train, evaluate and report on the built-in data
  bkd-fast train parts/ --out runs/parts          one model for a folder of good images (or MVTec AD's layout)
  bkd-fast evaluate runs/parts                    metrics, scores.csv and report.html on the test images
  bkd-fast calibrate runs/parts good/ --false-alarms 0.02  thresholds from new good images
  bkd-fast predict runs/parts new/*.png --out out/  scores, decisions, heat maps and masks
  bkd-fast ablate mvtec/ --table 4 --out runs/table4   the paper's ablations, over several seeds
  bkd-fast export runs/parts --format onnx          the model for another run-time
  bkd-fast bench                                  how fast this machine is, on every backend it has
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (0 done, 1 unusable input, 130 interrupted)."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("lightning_fabric", "timm", "httpx", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        arguments.run(arguments)
    except BKDError as error:
        print(f"bkd-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hints = {"train": "; go on with the same command and --resume", "ablate": "; the same command goes on"}
        print(f"bkd-fast: interrupted{hints.get(arguments.command, '')}", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
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

    train = _command(commands, "train", _train, "learn what good parts look like")
    train.add_argument("data", type=Path, help="folder of good images, or a data set in MVTec AD's layout")
    train.add_argument("--out", type=Path, required=True, help="run folder to write; new or empty")
    train.add_argument("--category", nargs="+", help="categories to train (default: all)")
    train.add_argument("--anomalous", type=Path, help="with a plain folder: defective images, for evaluation only")
    train.add_argument("--masks", type=Path, help="with --anomalous: their masks, found by file name")
    add_options(train)
    train.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    train.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be decoded")
    train.add_argument("--devices", type=int, default=1, help="processes (GPUs) to train with (default: %(default)s)")
    train.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    train.add_argument(
        "--precision", default="auto", choices=("auto", "32", "bf16", "fp16"), help="auto: bf16 where the GPU has it"
    )
    train.add_argument("--cache-gb", type=float, default=2.0, help="room for teacher features (default: %(default)s)")
    train.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep them there, on disk, instead of in memory")

    evaluate = _command(commands, "evaluate", _evaluate, "measure a run on test images and write its report")
    evaluate.add_argument("run_folder", type=Path, metavar="RUN")
    evaluate.add_argument("data", type=Path, nargs="?", help="data set (default: the one the run was trained on)")
    evaluate.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    evaluate.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be decoded")

    calibrate = _command(commands, "calibrate", _calibrate, "set a run's thresholds from new good images")
    calibrate.add_argument("run_folder", type=Path, metavar="RUN")
    calibrate.add_argument(
        "good", type=Path, nargs="?", metavar="GOOD", help="folder of new good images (default: the scores in the run)"
    )
    calibrate.add_argument("--false-alarms", type=float, metavar="RATE", help="wanted rate (default: the run's)")
    calibrate.add_argument(
        "--defects", type=Path, metavar="DIR", help="report how many of these defective images would be found"
    )
    calibrate.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")

    predict = _command(commands, "predict", _predict, "judge images with a trained run")
    predict.add_argument("run_folder", type=Path, metavar="RUN")
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="image files or folders of images")
    predict.add_argument(
        "--out", type=Path, required=True, help="folder for scores.csv, heat maps and masks; new or empty"
    )
    predict.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    predict.add_argument("--precision", default="32", help="32, bf16 or (GPUs) fp16 (default: %(default)s)")
    predict.add_argument("--tile", type=int, nargs="+", metavar="N", help="judge in tiles: side, or height and width")
    predict.add_argument("--overlap", type=int, default=0, help="pixels that neighbouring tiles share (default: 0)")
    predict.add_argument("--threshold", type=float, help="decide with this threshold instead of the run's")
    predict.add_argument(
        "--skip-unreadable", action="store_true", help="report images that cannot be decoded and go on"
    )

    ablate = _command(commands, "ablate", _ablate, "train and measure variants over several seeds: what pays")
    ablate.add_argument("data", type=Path, help="a data set in MVTec AD's layout, with test images")
    ablate.add_argument("--out", type=Path, required=True, help="folder for runs and results; the same one goes on")
    what = ablate.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=int, choices=(2, 4, 5), help="of the paper: shots, parts, or transformations")
    what.add_argument("--grid", nargs="+", metavar="FIELD=A,B", help="every combination of these fields' values")
    ablate.add_argument("--seeds", type=int, default=3, help="repetitions of each variant (default: %(default)s)")
    ablate.add_argument("--category", nargs="+", help="categories to take (default: all)")
    ablate.add_argument("--jobs", type=int, help="runs at a time (default: one a GPU, or one for two cores)")
    ablate.add_argument("--keep", action="store_true", help="leave every run's model, scores and report")
    add_options(ablate, leave_out=("seed",))

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

    demo(arguments.out, data=arguments.data)


def _train(arguments: argparse.Namespace) -> None:
    from bkd_fast.training import train

    train(
        arguments.data,
        arguments.out,
        config_from(arguments),
        categories=arguments.category,
        anomalous=arguments.anomalous,
        masks=arguments.masks,
        devices=arguments.devices,
        accelerator=arguments.accelerator,
        precision=arguments.precision,
        resume=arguments.resume,
        skip_unreadable=arguments.skip_unreadable,
        cache_gb=arguments.cache_gb,
        cache_dir=arguments.cache_dir,
    )
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one of several processes speaks
        print(f"trained: {arguments.out}\nnext: bkd-fast evaluate {arguments.out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from bkd_fast.evaluation import evaluate, table
    from bkd_fast.published import comparison

    metrics = evaluate(
        arguments.run_folder, arguments.data, device=arguments.device, skip_unreadable=arguments.skip_unreadable
    )
    print(table(metrics))
    beside = comparison(metrics)
    if beside:
        print(f"\n{beside}\n")
    print(f"report: {arguments.run_folder / 'report.html'}")


def _calibrate(arguments: argparse.Namespace) -> None:
    from bkd_fast.calibrate import calibrate

    print(
        calibrate(
            arguments.run_folder,
            arguments.good,
            false_alarms=arguments.false_alarms,
            defects=arguments.defects,
            device=arguments.device,
        )
    )


def _ablate(arguments: argparse.Namespace) -> None:
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


def _predict(arguments: argparse.Namespace) -> None:
    from bkd_fast.predict import predict

    tile = arguments.tile and (arguments.tile[0] if len(arguments.tile) == 1 else tuple(arguments.tile))
    summary = predict(
        arguments.run_folder,
        arguments.images,
        arguments.out,
        device=arguments.device,
        precision=arguments.precision,
        tile=tile,
        overlap=arguments.overlap,
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
