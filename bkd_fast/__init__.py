"""Fast bidirectional knowledge distillation: defects found after seeing good parts only.

The public names are imported when they are first used, so that a program that only detects does not load what
training needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bkd_fast.version import __version__

if TYPE_CHECKING:
    from bkd_fast.config import BKDConfig
    from bkd_fast.errors import BKDError
    from bkd_fast.evaluation.evaluate import evaluate
    from bkd_fast.inference.detector import Detector
    from bkd_fast.inference.prediction import Prediction
    from bkd_fast.integrations.sklearn import BKDDetector
    from bkd_fast.integrations.torchvision import patch_torchvision
    from bkd_fast.model import BKD
    from bkd_fast.ops import backend
    from bkd_fast.training.train import train

_HOMES = {
    "BKD": "bkd_fast.model",
    "BKDConfig": "bkd_fast.config",
    "BKDDetector": "bkd_fast.integrations.sklearn",
    "BKDError": "bkd_fast.errors",
    "Detector": "bkd_fast.inference.detector",
    "Prediction": "bkd_fast.inference.prediction",
    "backend": "bkd_fast.ops",
    "evaluate": "bkd_fast.evaluation.evaluate",
    "patch_torchvision": "bkd_fast.integrations.torchvision",
    "train": "bkd_fast.training.train",
}

__all__ = [
    "BKD",
    "BKDConfig",
    "BKDDetector",
    "BKDError",
    "Detector",
    "Prediction",
    "__version__",
    "backend",
    "evaluate",
    "patch_torchvision",
    "train",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bkd_fast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
