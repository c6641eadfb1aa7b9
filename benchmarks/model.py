"""Whole training steps and inference: python benchmarks/model.py [--quick] [--scaling] [--only CASE] [--csv FILE].

A training step (batch 4) is the teacher on queries and supports where its features are not kept (as by default), both
branches, losses, gradients and update, against the reference and against the reference with torchvision's deformable
convolution inside. Inference (batch 1) is Detector.score, against the reference and against anomalib's reverse
distillation with the same backbone, which has no forward branch and no memory; on a CPU also against the same model
exported to other run-times, on a GPU compiled. --quick leaves out WideResNet50, and what takes minutes to compile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from options import own_alone, parser, run
from peers import anomalib_inference, torchvision_inside
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

BATCH = 4


def main() -> None:
    arguments = parser(__doc__, (TRAINING, INFERENCE))
    labels = [label for label in TEACHERS if label != "WRN50" or not arguments.quick]
    wanted = arguments.only or (TRAINING, INFERENCE)
    cases = _cases(labels, wanted, arguments.device, not arguments.quick)
    if arguments.scaling:
        run(map(own_alone, cases), arguments, threads=(1, torch.get_num_threads()))
    else:
        run(cases, arguments)


def _cases(labels: list[str], wanted: list[str], device: str, compiled: bool) -> Iterator[Case]:
    if TRAINING in wanted:
        trained = [label for label in labels if label != "ResNet18"]
        for training in trainings(trained, list(CONFIGS), BATCH, device):
            yield _with_torchvision(training)
    if INFERENCE in wanted:
        for label in labels:
            case = inference(label, device)
            peer = anomalib_inference(TEACHERS[label], *case.inputs)
            others: dict[str, Call] = {} if peer is None else {"anomalib": peer}
            if device == "cuda":
                yield case._replace(unchecked={**others, **_on_a_gpu(label, peer, compiled)})
                continue
            others |= _narrow(label, device, "bf16")
            case = case._replace(unchecked=others)
            with tempfile.TemporaryDirectory() as folder:
                yield case._replace(providers={**case.providers, **_exported(label, *case.inputs, Path(folder))})


def _narrow(label: str, device: str, precision: str) -> dict[str, Call]:
    try:
        detector, images = random_detector(label, device, precision=precision)
    except BKDError as error:
        print(f"no {precision}: {error}")
        return {}
    return {f"bkd_fast native, {precision}": partial(detector.score, images)}


def _on_a_gpu(label: str, peer: Call | None, compiled: bool) -> dict[str, Call]:
    """Half precision; compiled, the network is a CUDA graph too, which spares the CPU the launches."""
    found = _narrow(label, "cuda", "fp16")
    if peer is not None:
        found["anomalib, fp16"] = torch.autocast("cuda", torch.float16)(peer)
    for precision in ("32", "fp16") if compiled else ():
        detector, images = random_detector(label, "cuda", precision=precision, compile="reduce-overhead")
        found[f"bkd_fast native, {precision}, reduce-overhead"] = partial(detector.score, images)
    return found


def _exported(label: str, images: Tensor, folder: Path) -> dict[str, Call]:
    """The same model in the run-times that are installed."""
    detector, _ = random_detector(label, pack=False)
    graph, array = program(detector), images.numpy()
    found: dict[str, Call] = {}
    for format, suffix in SUFFIXES.items():
        write(graph, format, folder / f"model{suffix}")
        predict = read(format, folder / f"model{suffix}", torch.get_num_threads())
        if predict is not None:
            found[f"exported, {format}"] = lambda predict=predict: [torch.from_numpy(value) for value in predict(array)]
    return found


def _with_torchvision(training: Training) -> Case:
    case = training.case()
    if training.model.alignment.config.kernel == "identity":
        return case  # a warp: there is no convolution in it
    # torchvision's convolution shares no products between queries, so each has supports of its own.
    call = torchvision_inside(partial(training, each=True))
    return case._replace(providers={**case.providers, "reference, torchvision's operator inside": call})


if __name__ == "__main__":
    main()
