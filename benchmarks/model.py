"""Whole training steps and inference: python benchmarks/model.py [--quick] [--scaling] [--only CASE] [--csv FILE].

A training step (batch 4) is the teacher on queries and supports where its features are not kept (as by default), both
branches, losses, gradients and update, against the reference and against the reference with torchvision's deformable
convolution inside. Inference is Detector.score of --batch images, against the reference and anomalib's
ReverseDistillation, PatchCore and EfficientAd with the same backbone; on a CPU also against the same model exported to
other run-times, on a GPU in IEEE float32, TF32, float16 and bfloat16, and compiled. --quick leaves out WideResNet50,
unless --teacher names it, and what takes minutes to compile.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from options import fp32_precision, parse, parser, run
from peers import anomalib_models, torchvision_inside
from torch import Tensor

from bkd_fast.benchmark.harness import Call, Case
from bkd_fast.benchmark.model import (
    CONFIGS,
    INFERENCE,
    TEACHERS,
    TRAINING,
    Training,
    inference,
    random_detector,
    trainings,
)
from bkd_fast.errors import BKDError
from bkd_fast.export.formats import SUFFIXES, read, write
from bkd_fast.export.graph import program

BATCH = 4  # of a training step


def main() -> None:
    made = parser(__doc__, (TRAINING, INFERENCE))
    made.add_argument("--teacher", nargs="+", choices=TEACHERS, help="some of them")
    made.add_argument("--batch", nargs="+", type=int, default=[1], help="images of inference (default: 1)")
    arguments = parse(made)
    run(_cases(arguments), arguments)


def _cases(arguments: argparse.Namespace) -> Iterator[Case]:
    wanted, device, compiled = arguments.only or (TRAINING, INFERENCE), arguments.device, not arguments.quick
    labels = [label for label in TEACHERS if label != "WRN50" or not arguments.quick]
    if TRAINING in wanted:
        trained = arguments.teacher or [label for label in labels if label != "ResNet18"]
        for training in trainings(trained, list(CONFIGS), BATCH, device):
            yield _with_torchvision(training)
    for label in arguments.teacher or labels if INFERENCE in wanted else ():
        for batch in arguments.batch:
            case = inference(label, device, batch=batch)
            others: dict[str, Call] = dict(anomalib_models(TEACHERS[label], *case.inputs))
            if device == "cuda":
                yield case._replace(unchecked={**others, **_on_a_gpu(label, batch, others, compiled)})
                continue
            others |= _narrow(label, device, batch, "bf16")
            if batch > 1:
                yield case._replace(unchecked=others)
                continue
            with tempfile.TemporaryDirectory() as folder:
                exported = _exported(label, *case.inputs, Path(folder)) if compiled else {}
                yield case._replace(providers={**case.providers, **exported}, unchecked=others)


def _narrow(label: str, device: str, batch: int, precision: str) -> dict[str, Call]:
    """The detector with its convolutions in half precision; empty where the device has none."""
    try:
        detector, images = random_detector(label, device, batch=batch, precision=precision)
    except BKDError as error:
        print(f"no {precision}: {error}")
        return {}
    return {f"bkd_fast native, {precision}": partial(detector.score, images)}


def _on_a_gpu(label: str, batch: int, peers: dict[str, Call], compiled: bool) -> dict[str, Call]:
    """Other precisions, and compiled networks, which are CUDA graphs too."""
    calls = _narrow(label, "cuda", batch, "fp16") | _narrow(label, "cuda", batch, "bf16")
    calls |= {f"{name}, fp16": torch.autocast("cuda", torch.float16)(peer) for name, peer in peers.items()}
    for precision in ("ieee", "tf32"):
        with fp32_precision(precision):  # a graph is recorded with the precision of that moment
            detector, images = random_detector(label, "cuda", batch=batch)
        calls[f"bkd_fast native, {precision}"] = fp32_precision(precision)(partial(detector.score, images))
    for precision in ("32", "fp16") if compiled and batch == 1 else ():
        detector, images = random_detector(label, "cuda", precision=precision, compile="reduce-overhead")
        calls[f"bkd_fast native, {precision}, reduce-overhead"] = partial(detector.score, images)
    return calls


def _exported(label: str, images: Tensor, folder: Path) -> dict[str, Call]:
    """The same model in the run-times that are installed."""
    detector, _ = random_detector(label, pack=False)
    graph, array = program(detector), images.numpy()
    calls: dict[str, Call] = {}
    for format, suffix in SUFFIXES.items():
        write(graph, format, folder / f"model{suffix}")
        predict = read(format, folder / f"model{suffix}", torch.get_num_threads())
        if predict is not None:
            calls[f"exported, {format}"] = lambda predict=predict: [torch.from_numpy(value) for value in predict(array)]
    return calls


def _with_torchvision(training: Training) -> Case:
    case = training.case()
    if training.model.alignment.config.kernel == "identity":
        return case  # a warp: there is no convolution in it
    # torchvision's convolution shares no products between queries, so each has its own supports.
    call = torchvision_inside(partial(training, each=True))
    return case._replace(providers={**case.providers, "reference, torchvision's operator inside": call})


if __name__ == "__main__":
    main()
