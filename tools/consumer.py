"""A program of someone else's, as a type checker sees it: `make lint` and `make wheels` check it with mypy --strict."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from typing_extensions import assert_type

import bkd_fast
from bkd_fast import BKDConfig, BKDDetector, BKDError, Detector, Prediction, backend, evaluate, patch_torchvision, train
from bkd_fast.ops import (
    DeformConv2d,
    cosine_anomaly_map,
    distillation_loss,
    local_match,
    modulated_deform_conv2d,
    modulated_deform_gather,
    sparse_memory_attention,
)


def predict(run: Path, images: list[np.ndarray]) -> Iterator[Prediction]:
    detector = Detector.load(run, device="cpu", precision="32")
    detector.threshold = 0.5
    first = detector(images[0])
    assert_type(first, Prediction)
    assert_type(first.score, float)
    assert_type(first.label, bool)
    for outcome in detector.stream(images):
        if outcome.result is not None:
            yield outcome.result
    yield from detector(images, tile=256)


def learn(data: Path, out: Path) -> None:
    try:
        run = train(data, out, BKDConfig().with_changes({"teacher.name": "resnet18", "support.shots": 2}))
    except BKDError as error:
        raise SystemExit(str(error)) from error
    assert_type(run, Path)
    evaluate(run, data)


def single(x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with backend("reference"):
        assert_type(modulated_deform_conv2d(x, offset, weight, None, 1, 1, 1, mask), torch.Tensor)
        assert_type(sparse_memory_attention(x, weight, 0.01), torch.Tensor)
        assert_type(distillation_loss([x], [x]), torch.Tensor)
    assert_type(local_match(x, x, torch.zeros(1, 1, dtype=torch.int64), 1), tuple[torch.Tensor, torch.Tensor])
    assert_type(cosine_anomaly_map([x], [x], (8, 8)), torch.Tensor)
    assert_type(modulated_deform_gather(x, offset, weight), torch.Tensor)
    with patch_torchvision():
        return DeformConv2d(4, 4, 3).forward(x, offset, mask)


def notebook(images: list[np.ndarray]) -> np.ndarray:
    return BKDDetector().fit(images).score_samples(images)


version: str = bkd_fast.__version__
