"""The run folder: everything a trained model needs, checked when it is read.

One category is one folder with ``manifest.json``, ``config.toml``, ``model.safetensors``, ``support/`` and
``support.safetensors``. ``manifest.json`` is written last and holds the checksums of the others, so a folder with it is
whole. A run over several categories holds one such folder each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bkd_fast.config import BKDConfig
from bkd_fast.data import load_support, save_support
from bkd_fast.decisions import NormalScores, sentence, threshold_for
from bkd_fast.errors import BKDError
from bkd_fast.files import atomic_path, atomic_write, write_json
from bkd_fast.model import BKD

FORMAT = 4
MANIFEST, CONFIG, MODEL, SUPPORT, FEATURES, CHECKPOINT, LOG = (
    "manifest.json",
    "config.toml",
    "model.safetensors",
    "support",
    "support.safetensors",
    "checkpoint.safetensors",
    "log.csv",
)


@dataclass(frozen=True)
class Calibration:
    """What normal images say of a trained model; nothing here has seen a defect.

    ``false_alarms``: the rate that thresholds are for. ``threshold``: an image whose score is above it is anomalous.
    ``pixel_threshold``: the same for pixels of the map. ``normal_level``: median pixel of the maps, where heat maps
    begin. ``source``, ``scores``, ``maxima``: see
    :class:`bkd_fast.decisions.NormalScores`; ascending. ``teacher``: mean and std over these images of each number of
    :func:`bkd_fast.model.calibration.level_statistics`, by name; empty in a run that was trained without.
    """

    false_alarms: float
    threshold: float
    pixel_threshold: float
    normal_level: float
    source: str
    scores: list[float]
    maxima: list[float]
    teacher: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        normal: NormalScores,
        normal_level: float,
        false_alarms: float,
        teacher: Mapping[str, list[float]] | None = None,
    ) -> Calibration:
        """Return the thresholds for a rate of ``false_alarms``, from the scores of normal images."""
        pixel = threshold_for(normal.maxima, false_alarms).value
        return cls(
            false_alarms,
            threshold_for(normal.scores, false_alarms).value,
            pixel,
            # Positive and below the threshold, as a logarithmic colour scale needs it.
            min(max(normal_level, 1e-30), 0.5 * pixel),
            normal.source,
            sorted(normal.scores),
            sorted(normal.maxima),
            dict(teacher or {}),
        )

    @property
    def normal(self) -> NormalScores:
        """The scores that the thresholds come from."""
        return NormalScores(self.source, self.scores, self.maxima)

    @property
    def spread(self) -> float:
        """The std of the normal scores."""
        return float(np.std(self.scores))

    def sentence(self) -> str:
        """Return what rate of false alarms to expect, from how many images, and how sure that is."""
        return sentence(threshold_for(self.scores, self.false_alarms), self.false_alarms, self.normal)


@dataclass(frozen=True)
class DataSource:
    """Where the images of a run came from, so that ``evaluate`` finds them again."""

    root: str
    category: str
    anomalous: str | None = None
    masks: str | None = None
    train_files: list[str] = field(default_factory=list)
    validation_files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """One category's trained model as read from its folder.

    ``support``: the teacher's levels of the support images, (1, k, C_l, H_l, W_l), as :meth:`BKD.make_support`
    takes them. ``sample``: the first of their images, (1, 3, H, W) in [0, 1].
    """

    folder: Path
    config: BKDConfig
    calibration: Calibration
    source: DataSource
    model: BKD
    support: list[Tensor]
    sample: Tensor


def save_trained(
    folder: Path,
    model: BKD,
    calibration: Calibration,
    source: DataSource,
    images: Sequence[np.ndarray],
    support: Sequence[Tensor],
    version: str,
) -> None:
    """Write a category's folder, ``manifest.json`` last.

    Args:
        images: the support, (H, W, 3) uint8 each.
        support: its levels, see :attr:`Trained.support`.
    """
    save_support(folder / SUPPORT, list(images))
    if support:  # nothing can be kept of nothing, which is what the reverse branch alone has
        save_tensors(folder / FEATURES, {str(index): level for index, level in enumerate(support)}, {})
    save_tensors(folder / MODEL, model.state_dict(), {})
    with atomic_write(folder / CONFIG) as file:
        file.write(model.config.to_toml())
    files = [
        CONFIG,
        MODEL,
        *([FEATURES] if support else []),
        *sorted(f"{SUPPORT}/{path.name}" for path in (folder / SUPPORT).iterdir()),
    ]
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "bkd_fast": version,
            "calibration": asdict(calibration),
            "source": asdict(source),
            "files": {name: _checksum(folder / name) for name in files},
        },
    )


def load_trained(folder: str | Path) -> Trained:
    """Reads a category's folder.

    Raises:
        BKDError: not a run, half-written, from another format version, or altered since it was written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if "categories" in manifest:
        choices = ", ".join(str(folder / name) for name in manifest["categories"])
        raise BKDError(f"{folder} holds several categories, each a model of its own: choose one of {choices}")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise BKDError(f"{folder} is incomplete: {name} is missing. Restore it or train again.")
        if _checksum(path) != expected:
            raise BKDError(
                f"{path} was altered since the run was saved (its SHA-256 differs). Restore it or train again."
            )
    config = BKDConfig.from_toml((folder / CONFIG).read_text(encoding="utf-8"))
    model = BKD(config, weights=None)
    load_state(model, load_file(folder / MODEL), folder / MODEL)
    calibration = Calibration(**manifest["calibration"])
    features = load_file(folder / FEATURES) if FEATURES in manifest["files"] else {}
    support = [features[str(index)] for index in range(len(features))]
    sample = load_support(folder / SUPPORT, config.teacher.image_size, 1)
    return Trained(folder, config, calibration, DataSource(**manifest["source"]), model.eval(), support, sample)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return ``manifest.json`` of a run folder, its format checked.

    Raises:
        BKDError: see :func:`load_trained`.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BKDError(f"there is no run folder {folder}: expected one written by `bkd-fast train … --out {folder}`")
    if not path.is_file():
        unfinished = any(folder.rglob(CHECKPOINT))
        hint = "its training did not finish: resume with `bkd-fast train … --resume`" if unfinished else "not a run"
        if (folder / "config.json").is_file():
            hint = "it was written by an earlier bkd_fast, which this one does not read; train again"
        raise BKDError(f"{folder} has no {MANIFEST}: {hint}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BKDError(f"{path} is not valid JSON ({error}): the run was altered or half-copied") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise BKDError(
            f"{path} has run format {found!r}, and this bkd_fast reads format {FORMAT}: train again, or install "
            f"the bkd_fast that wrote it ({manifest.get('bkd_fast') if isinstance(manifest, dict) else None})"
        )
    needed = {"categories"} if "categories" in manifest else {"calibration", "source", "files"}
    missing = sorted(needed - manifest.keys())
    if missing:
        raise BKDError(f"{path} lacks {', '.join(missing)}: the run was altered")
    return manifest


def category_folders(run: str | Path) -> dict[str, Path]:
    """Category name -> its folder, for a run of one category (the folder itself) or of several."""
    run = Path(run)
    manifest = read_manifest(run)
    if "categories" in manifest:
        return {name: run / name for name in manifest["categories"]}
    return {manifest["source"]["category"]: run}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically; a failed write (a full disk) leaves the earlier file as it was."""
    with atomic_path(path) as temporary:
        try:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, dict(metadata)
            )
        except (SafetensorError, OSError) as error:
            raise BKDError(
                f"{path} could not be written ({error}); the file before it, if any, is as it was"
            ) from error


def load_state(model: BKD, state: Mapping[str, Tensor], path: Path) -> None:
    """Loads a state dict that must fit exactly."""
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise BKDError(f"{path} does not fit the configuration beside it: {error}") from error


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
