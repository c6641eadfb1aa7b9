"""BKD as a scikit-learn estimator, for notebooks: images in memory or by path, scores out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.exceptions import NotFittedError

from bkd_fast.config import BKDConfig, TeacherConfig, TrainingConfig
from bkd_fast.data import infer_white
from bkd_fast.data.inputs import Decoded, ImageLike
from bkd_fast.errors import BKDError
from bkd_fast.files import write_files
from bkd_fast.inference.detector import Detector, check_device
from bkd_fast.inference.notebook import detector_html
from bkd_fast.inference.prediction import Prediction
from bkd_fast.training.train import train


class BKDDetector(OutlierMixin, BaseEstimator):
    """Learn from images of good parts and score others, with scikit-learn's conventions for outlier detection.

    ``X`` is a sequence of images everywhere: paths, PIL images, arrays ((H, W) grey or (H, W, 3) RGB of any type; see
    :class:`bkd_fast.config.DataConfig`), or one array (N, H, W) or (N, H, W, 3). ``score_samples`` is lower the more
    anomalous an image is, and ``predict`` gives 1 for normal ones and -1 for anomalous ones, as in scikit-learn's own
    detectors; labels given to ``fit`` are ignored.

    Args:
        teacher, weights, image_size, epochs, batch_size: see :class:`bkd_fast.BKDConfig`.
        preset: ``default``, ``paper`` or ``rd4ad``.
        settings: any other option of :class:`bkd_fast.BKDConfig`, as in ``{"memory.items": 500}``.
        device: where images are scored: ``auto``, ``cpu`` or ``cuda``.
        random_state: seed of everything random, an integer.

    Attributes:
        detector_: the :class:`bkd_fast.Detector`, once fitted.
        offset_: minus the threshold: ``decision_function`` is ``score_samples - offset_``.
    """

    def __init__(
        self,
        teacher: str = TeacherConfig.name,
        *,
        weights: str = TeacherConfig.weights,
        image_size: tuple[int, int] | None = TeacherConfig.image_size,
        epochs: int = TrainingConfig.epochs,
        batch_size: int = TrainingConfig.batch_size,
        preset: str = "default",
        settings: Mapping[str, Any] | None = None,
        device: str = "auto",
        random_state: int = 0,
    ) -> None:
        self.teacher = teacher
        self.weights = weights
        self.image_size = image_size
        self.epochs = epochs
        self.batch_size = batch_size
        self.preset = preset
        self.settings = settings
        self.device = device
        self.random_state = random_state

    def fit(self, X: Sequence[ImageLike] | np.ndarray, y: ArrayLike | None = None) -> BKDDetector:
        """Train on normal images, at least two.

        Args:
            X: see the class.
            y: ignored.

        Raises:
            BKDError: not images, too few of them, or a wrong setting.
        """
        given = {
            "teacher.name": self.teacher,
            "teacher.weights": self.weights,
            "teacher.image_size": self.image_size,
            "training.epochs": self.epochs,
            "training.batch_size": self.batch_size,
            "training.seed": self.random_state,
        }
        config = BKDConfig.preset(self.preset, {**given, **(self.settings or {})})
        images = _images(X)
        check_device(self.device)
        config = replace(config, data=infer_white(images, config.data))
        with tempfile.TemporaryDirectory(prefix="bkd_fast-") as folder:
            good = Path(folder) / "images"
            good.mkdir()
            for index, image in enumerate(images):
                # Decoded and checked like any other input, and written losslessly.
                Image.fromarray(Decoded(image, config.data).array()).save(good / f"{index:06}.png", compress_level=1)
            accelerator = "auto" if self.device == "auto" else check_device(self.device).type
            run = train(good, Path(folder) / "run", config, accelerator=accelerator, progress=False)
            self._files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
        self._load()
        self.offset_ = -self.detector_.threshold
        return self

    def score_samples(self, X: Sequence[ImageLike] | np.ndarray) -> np.ndarray:
        """Return (N,) float64, higher for more normal images: minus the detector's raw scores."""
        return -np.array([prediction.score for prediction in self._predictions(X)], float)

    def decision_function(self, X: Sequence[ImageLike] | np.ndarray) -> np.ndarray:
        """Return (N,) float64, negative for anomalous images."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Sequence[ImageLike] | np.ndarray) -> np.ndarray:
        """Return (N,) int: 1 for normal images, -1 for anomalous ones."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def anomaly_maps(self, X: Sequence[ImageLike] | np.ndarray) -> list[np.ndarray]:
        """Return a raw map (H, W) float32 per image, at its size; higher is more anomalous."""
        return [prediction.anomaly_map for prediction in self._predictions(X)]

    def save(self, folder: str | Path) -> Path:
        """Write a run folder, for :meth:`bkd_fast.Detector.load` and the command line; new or empty."""
        self._check_fitted()
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise BKDError(f"{folder} is not empty: name a new folder")
        write_files(self._files, folder)
        return folder

    def _predictions(self, X: Sequence[ImageLike] | np.ndarray) -> list[Prediction]:
        self._check_fitted()
        predictions = self.detector_(_images(X))
        assert isinstance(predictions, list)
        return predictions

    def _check_fitted(self) -> None:
        if not hasattr(self, "detector_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit with images of good parts")

    def _load(self) -> None:
        with tempfile.TemporaryDirectory(prefix="bkd_fast-") as folder:
            write_files(self._files, Path(folder))
            self.detector_ = Detector.load(folder, device=self.device)

    def __getstate__(self) -> dict[str, Any]:
        # Pickle the run's files; packed weights and prepared features are rebuilt.
        state = {name: value for name, value in super().__getstate__().items() if name != "detector_"}
        if hasattr(self, "detector_"):
            state["_detector"] = self.detector_.kept()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state.pop("_detector", None)
        super().__setstate__(state)
        if kept is not None:
            self._load()
            self.detector_.restore(kept)

    def _repr_html_inner(self) -> str:
        fitted = detector_html(self.detector_) if hasattr(self, "detector_") else ""
        return super()._repr_html_inner() + fitted

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "text/html": self._repr_html_inner()} if "text/html" in bundle else bundle

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        tags.no_validation = True
        return tags


def _images(X: Sequence[ImageLike] | np.ndarray) -> list[ImageLike]:
    if isinstance(X, (str, Path, Image.Image)) or not hasattr(X, "__len__"):
        raise BKDError(f"X is of type {type(X).__name__}: expected a sequence of images; for one image [image]")
    if isinstance(X, np.ndarray) and X.dtype != object and X.dtype.kind != "U" and X.ndim not in (3, 4):
        raise BKDError(f"X has shape {X.shape}: expected images, (N, H, W) or (N, H, W, 3)")
    images: list[ImageLike] = [str(image) if isinstance(image, np.str_) else image for image in X]
    if not images:
        raise BKDError("X is empty: expected at least one image")
    return images
