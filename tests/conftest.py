"""Fixtures for the whole suite: a tiny data set and a tiny configuration that train in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bkd_fast.config import BKDConfig

TINY: dict[str, Any] = {
    "teacher.name": "resnet18",
    "teacher.weights": "none",
    "teacher.image_size": (64, 64),
    "memory.items": 16,
    "training.epochs": 2,
    "training.batch_size": 4,
    "training.validation_share": 0.2,
}


@pytest.fixture(scope="session")
def tiny_config() -> BKDConfig:
    """ResNet-18 with random weights at 64 x 64: the default model, its match refined by an alignment that learns."""
    return BKDConfig().with_changes({"alignment.kernel": "full", **TINY})


@pytest.fixture(scope="session")
def tiny_default() -> BKDConfig:
    """The same as it is by default: nothing is learned."""
    return BKDConfig().with_changes(TINY)


@pytest.fixture(scope="session")
def tiny_student(tiny_config) -> BKDConfig:
    """The same with what else can be learned: memory items, read by attention, and a student; level by level."""
    return tiny_config.with_changes(
        {"teacher.levels": "separate", "memory.read": "attention", "memory.learned": True, "student": "on"}
    )


def _make_category(
    root: Path, *, train: int = 10, good: int = 3, bad: int = 3, size: tuple[int, int] = (72, 80)
) -> Path:
    """A category in the MVTec layout: noise on a gradient, defects are bright squares with exact masks."""
    generator = np.random.default_rng(0)

    def image() -> np.ndarray:
        ramp = np.linspace(60, 140, size[1])[None, :, None] * np.ones((*size[:1], 1, 3))
        return np.clip(ramp + generator.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)

    for folder, count in (("train/good", train), ("test/good", good)):
        for index in range(count):
            path = root / folder / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image()).save(path)
    for index in range(bad):
        picture, mask = image(), np.zeros(size, np.uint8)
        top = 10 + 10 * index
        picture[top : top + 16, 20:40] = 250
        mask[top : top + 16, 20:40] = 255
        for folder, name, array in (
            ("test/hole", f"{index:03}.png", picture),
            ("ground_truth/hole", f"{index:03}_mask.png", mask),
        ):
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return root


@pytest.fixture
def make_category():
    """Makes further categories like ``tiny_data``, of other sizes."""
    return _make_category


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """One category, ``tile``."""
    return _make_category(tmp_path_factory.mktemp("data") / "tile")


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tiny_config, tmp_path_factory) -> Path:
    """A trained run of the tiny category."""
    return _trained(tiny_data, tmp_path_factory, tiny_config)


@pytest.fixture(scope="session")
def tiny_default_run(tiny_data, tiny_default, tmp_path_factory) -> Path:
    """A run of the tiny category as it is by default."""
    return _trained(tiny_data, tmp_path_factory, tiny_default)


@pytest.fixture(scope="session")
def tiny_student_run(tiny_data, tiny_student, tmp_path_factory) -> Path:
    """A trained run of the tiny category with a student."""
    return _trained(tiny_data, tmp_path_factory, tiny_student)


@pytest.fixture(params=["tiny_run", "tiny_default_run", "tiny_student_run"])
def any_run(request) -> Path:
    """Each of the three."""
    return request.getfixturevalue(request.param)


def _trained(data: Path, tmp_path_factory, config: BKDConfig) -> Path:
    from bkd_fast.training.train import train

    return train(data, tmp_path_factory.mktemp("runs") / "tile", config, progress=False)
