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
from bkd_fast.config import BKDConfig, RetrievedSupport, SampledSupport
from bkd_fast.decisions import NormalScores
from bkd_fast.inference.detector import Detector
from bkd_fast.model import BKD
from bkd_fast.model.calibration import calibrate
from bkd_fast.model.support import Support
from bkd_fast.ops.backend import operators
from bkd_fast.training.step import TrainingStep, make_optimizer, train_step

TRAINING, INFERENCE = "training_step", "inference"
TEACHERS = {"Lite0": "tf_efficientnet_lite0", "ResNet18": "resnet18", "WRN50": "wide_resnet50_2"}
# What is trained; by default nothing is. What aligns: a deformable convolution of each query's own matched support; the
# gather of one support that all queries share, and a student decoder; the deformable convolution again, since the paper
# draws other supports for every query.
SAMPLED: dict[str, Any] = {"support": "sampled", "support.per": "step"}
STUDENT: dict[str, Any] = {
    "teacher.levels": "separate",
    "student": "on",
    "memory.learned": True,
    "memory.read": "attention",
}
MATCHED = "refined match"
CONFIGS = {
    MATCHED: BKDConfig().with_changes(alignment="on"),
    "shared support, student": BKDConfig().with_changes({"alignment": "on", **SAMPLED, **STUDENT}),
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
        assert config.support is not None
        self.support = _images(config.support.shots, config).to(device)
        self.each = isinstance(config.support, SampledSupport) and config.support.per == "query"
        # Where supports are retrieved nothing is augmented, and training computes the teacher's features only once.
        self.frozen = self._features() if config.retrieves else None
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
            each: True gives every query its own supports, though they are equal; None does as the configuration says.
                It changes nothing where queries retrieve theirs.
        """
        query, support = self.frozen or self._features(self.each if each is None else each)
        losses, _ = train_step(
            self.fabric, self.step, self.optimizer, query, support, clip_norm=self.model.config.training.clip_norm
        )
        return torch.tensor(list(losses.values()))

    def _features(self, each: bool = False) -> tuple[list[Tensor], Support]:
        levels = self.model.support_levels(self.support)
        if each and not self.model.config.retrieves:
            levels = [level.expand(len(self.images), -1, -1, -1, -1) for level in levels]
        return self.model.teacher(self.images), self.model.make_support(levels, frozen=False)

    def case(self) -> Case:
        """The step on every backend."""
        own = on_backends(operators(), self.device, self)
        return Case(TRAINING, self.shape, "forward+backward+update", own, tolerance=1e-3, device=self.device)


def inference(label: str, device: str = "cpu", changes: Mapping[str, Any] | None = None, *, batch: int = 1) -> Case:
    """Images through :meth:`bkd_fast.Detector.score`; the support is prepared, as it is in use."""
    detector, images = random_detector(label, device, changes, batch=batch)
    own = on_backends(operators(), device, lambda: detector.score(images))
    # Random features are much alike: which supports and items are nearest depends on last digits.
    return Case(
        INFERENCE, f"{label} N={batch} default", "forward", own, tolerance=2e-2, inputs=(images,), device=device
    )


def random_detector(
    label: str, device: str = "cpu", changes: Mapping[str, Any] | None = None, *, batch: int = 1, **options: Any
) -> tuple[Detector, Tensor]:
    """Return a detector (with its ``options``) of random weights and images (N, 3, H, W), the same in every call."""
    config = _config(label, BKDConfig(), changes)
    model, images = random_model(config, 1, device)
    support = model.support_levels(_images(4, config).to(device))
    if isinstance(config.support, RetrievedSupport):
        # As many as are kept of a large training set; what they are does not matter for how long a query takes.
        support = [level.half().repeat(1, config.support.bank_size // 4, 1, 1, 1) for level in support]
    detector = Detector(untrained(model, support, images.cpu()), device, **options)
    return detector, torch.cat([images, _images(batch - 1, config).to(device)])


def untrained(model: BKD, support: list[Tensor], sample: Tensor) -> Trained:
    """Return a model as if read from a run, for a :class:`bkd_fast.Detector`; its thresholds mean nothing.

    Args:
        support: the teacher's levels (1, k, C_l, H_l, W_l) of the support images.
        sample: one of them, (1, 3, H, W) in [0, 1].
    """
    calibration = Calibration.of(NormalScores("validation", [1.0], [1.0]), 0.5, model.config.training.false_alarms)
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
    model = BKD(config, weights=None).to(device)
    images = _images(batch, config).to(device)
    calibrate(model, [model.teacher.raw(images)], batch, torch.Generator().manual_seed(0))
    return model, images


def _config(label: str, config: BKDConfig, changes: Mapping[str, Any] | None) -> BKDConfig:
    # Offsets that start from zero would be all zero here: no trained model samples at the pixels themselves.
    offsets = {} if config.alignment is None else {"alignment.offset_init": "default"}
    return config.with_changes(
        {"teacher.name": TEACHERS[label], "teacher.weights": "none", **offsets, **(changes or {})}
    )


def _images(count: int, config: BKDConfig) -> Tensor:
    """Random blots."""
    return F.interpolate(torch.rand(count, 3, 32, 32), size=config.teacher.size, mode="bilinear")
