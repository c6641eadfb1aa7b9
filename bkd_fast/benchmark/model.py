"""Whole training steps and inference as cases of the harness. All weights are random; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from bkd_fast.artifact import Calibration, DataSource, Trained
from bkd_fast.benchmark.harness import Case, on_backends
from bkd_fast.config import BKDConfig
from bkd_fast.decisions import NormalScores
from bkd_fast.inference.detector import Detector
from bkd_fast.model import BKD
from bkd_fast.model.calibration import calibrate
from bkd_fast.model.retrieval import SupportPool
from bkd_fast.ops.backend import OPERATORS
from bkd_fast.training.step import TrainingStep, make_optimizer, train_step

TRAINING, INFERENCE = "training_step", "inference"
TEACHERS = {"Lite0": "tf_efficientnet_lite0", "ResNet18": "resnet18", "WRN50": "wide_resnet50_2"}
# What is trained; by default nothing is. What aligns: a deformable convolution of each query's own matched support; the
# gather of one support that all queries share, and a student decoder; the deformable convolution again, since the paper
# draws other supports for every query.
DRAWN: dict[str, Any] = {"support_draw": "step", "shots": 2, "shot_aggregation": "mean"}
STUDENT: dict[str, Any] = {"levels": "separate", "student": True, "memory_learned": True, "memory_read": "attention"}
MATCHED = "refined match"
CONFIGS = {
    MATCHED: BKDConfig(alignment_kernel="full"),
    "shared support, student": BKDConfig(alignment_kernel="full", **DRAWN, **STUDENT),
    "paper": BKDConfig.preset("paper"),
}


class Training:
    """A training step that can be repeated: its learning rate is zero, so that every call does the same work.

    Args:
        label: of TEACHERS.
        setting: of CONFIGS.
        batch: queries a step.
        changes: of the configuration.
    """

    def __init__(
        self, label: str, setting: str, batch: int, device: str = "cpu", changes: Mapping[str, Any] | None = None
    ) -> None:
        config = _config(label, CONFIGS[setting], changes)
        self.model, self.images = random_model(config, batch, device)
        self.support = _images(config.shots, config).to(device)
        self.each = config.support_draw == "query"
        # Where supports are looked up nothing is augmented, and training computes the teacher's features but once.
        self.frozen = self._features() if config.looks_up else None
        self.shape, self.device = f"{label} N={batch} {setting}", device
        self.fabric = Fabric(accelerator=device, devices=1)
        optimizer = make_optimizer(self.model, config)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.step, self.optimizer = self.fabric.setup(TrainingStep(self.model), optimizer)
        self.step.train()

    def __call__(self, *, each: bool | None = None) -> Tensor:
        """Teacher where its features are not kept, both branches, losses, gradients and update -> losses.

        Args:
            each: True gives every query supports of its own, though they are equal; None is as the configuration says,
                and where queries look theirs up it changes nothing.
        """
        query, support = self.frozen or self._features()
        if not isinstance(support, SupportPool) and (self.each if each is None else each):
            support = [level.expand(len(self.images), -1, -1, -1, -1) for level in support]
        losses, _ = train_step(
            self.fabric, self.step, self.optimizer, query, support, clip_norm=self.model.config.clip_norm
        )
        return torch.tensor(list(losses.values()))

    def _features(self) -> tuple[list[Tensor], list[Tensor] | SupportPool]:
        support = self.model.support_levels(self.support)
        prepared = self.model.prepare(support) if self.model.config.looks_up else None
        return self.model.teacher(self.images), prepared if isinstance(prepared, SupportPool) else support

    def case(self) -> Case:
        """The step on every backend."""
        own = on_backends(OPERATORS, self.device, self)
        return Case(TRAINING, self.shape, "forward+backward+update", own, tolerance=1e-3, device=self.device)


def inference(label: str, device: str = "cpu", changes: Mapping[str, Any] | None = None) -> Case:
    """One image through :meth:`bkd_fast.Detector.score`; the support is prepared, as it is in use."""
    detector, images = random_detector(label, device, changes)
    own = on_backends(OPERATORS, device, lambda: detector.score(images))
    # Random features are much alike: which supports and items are nearest hangs on last digits.
    return Case(INFERENCE, f"{label} N=1 default", "forward", own, tolerance=2e-2, inputs=(images,), device=device)


def random_detector(
    label: str, device: str = "cpu", changes: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Detector, Tensor]:
    """A detector (with its ``options``) of random weights, and an image (1, 3, H, W); the same in every call."""
    config = _config(label, BKDConfig(), changes)
    model, images = random_model(config, 1, device)
    support = model.support_levels(_images(4, config).to(device))
    if config.looks_up:
        # As many as are kept of a large training set; what they are does not matter for how long a query takes.
        support = [level.half().repeat(1, config.support_pool // 4, 1, 1, 1) for level in support]
    return Detector(untrained(model, support, images[:1].cpu()), device, **options), images


def untrained(model: BKD, support: list[Tensor], sample: Tensor) -> Trained:
    """Return a model as if read from a run, for a :class:`bkd_fast.Detector`; its thresholds mean nothing.

    Args:
        support: the teacher's levels (1, k, C_l, H_l, W_l) of the support images.
        sample: one of them, (1, 3, H, W) in [0, 1].
    """
    calibration = Calibration.of(model, NormalScores("validation", [1.0], [1.0]), 0.5, model.config.false_alarms)
    return Trained(Path(), model.config, calibration, DataSource("", ""), model, support, sample)


def trainings(
    labels: Sequence[str], settings: Sequence[str], batch: int = 4, device: str = "cpu", **changes: Any
) -> Iterator[Training]:
    """Every teacher with every configuration, made one after another."""
    for label in labels:
        for setting in settings:
            yield Training(label, setting, batch, device, changes)


def random_model(config: BKDConfig, batch: int, device: str) -> tuple[BKD, Tensor]:
    """A calibrated model of random weights, whose memory holds features of the images, and images (N, 3, H, W)."""
    torch.manual_seed(0)
    model = BKD(config).to(device)
    images = _images(batch, config).to(device)
    calibrate(model, [model.teacher.raw(images)], batch, torch.Generator().manual_seed(0))
    return model, images


def _config(label: str, config: BKDConfig, changes: Mapping[str, Any] | None) -> BKDConfig:
    # Offsets that start from zero would be all zero here: no trained model samples at the pixels themselves.
    return config.with_changes(
        **{"teacher": TEACHERS[label], "weights": "none", "offset_init": "default", **(changes or {})}
    )


def _images(count: int, config: BKDConfig) -> Tensor:
    """Random blots."""
    return F.interpolate(torch.rand(count, 3, 32, 32), size=config.image_size, mode="bilinear")
