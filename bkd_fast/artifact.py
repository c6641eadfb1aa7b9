"""The run folder: what a trained model consists of, checked when it is read.

One category is one folder with ``manifest.json``, ``config.toml``, ``model.safetensors``, ``support/`` and
``support.safetensors``, and ``roi.png`` if there is a region of interest. After an update the names of three of them
hold a revision: ``model.1.safetensors``. ``manifest.json`` is written last. It holds size and SHA-256 of the other
files, and its own SHA-256, so a folder whose manifest fits is whole. A run over several categories holds one such
folder for each.

Everything here that reads takes nothing for granted: whatever is wrong with a run is one :class:`BKDError`.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bkd_fast.config import BKDConfig
from bkd_fast.data import FileRecord, load_roi, load_support, shrink_roi
from bkd_fast.data.dataset import GOOD
from bkd_fast.data.support import STORED, save_support
from bkd_fast.decisions import NormalScores, sentence, threshold_for
from bkd_fast.errors import BKDError
from bkd_fast.files import (
    MANIFEST,
    PREFIX,
    atomic_path,
    atomic_write,
    checksum,
    is_component,
    is_empty,
    locked,
    sync,
    write_json,
)
from bkd_fast.model import BKD
from bkd_fast.model.bkd import SCORES

FORMAT = 6
CONFIG, ROI, MODEL, SUPPORT, FEATURES, CHECKPOINT, LOG, UPDATES = (
    "config.toml",
    "roi.png",
    "model.safetensors",
    "support",
    "support.safetensors",
    "checkpoint.safetensors",
    "log.csv",
    "updates.csv",
)
MAX_MANIFEST, MAX_CONFIG = 64 << 20, 1 << 20  # bytes, many times what a run needs
# The files that an update replaces; their revision is empty at first, then ".1", ".2" and so on.
REVISED = re.compile(rf"(?:model|support)(\.[1-9]\d{{0,8}})?\.safetensors|{SUPPORT}(\.[1-9]\d{{0,8}})?/\d{{3,6}}\.png")
STALE = re.compile(r"(?:model|support)(?:\.\d+)?\.safetensors|support(?:\.\d+)?")
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}  # in safetensors
SOURCES = ("leave-one-out", "validation", "calibration")


class Record:
    """A dataclass that ``manifest.json`` holds as ``asdict`` gives it."""

    @classmethod
    def parse(cls: type[R], name: str, value: Any) -> R:
        """Return the inverse of ``asdict``; a field with a default may be missing.

        Raises:
            BKDError: a value of another type than its field's, or one that cannot be; the message begins with ``name``.
        """
        hints, needed = get_type_hints(cls), inspect.signature(cls).parameters.values()
        required = {each.name for each in needed if each.default is each.empty}
        if not isinstance(value, dict) or not required <= value.keys() <= hints.keys():
            found = ", ".join(sorted(value)[:20])[:200] if isinstance(value, dict) else _shown(value)
            raise BKDError(f"{name} has {found}: expected {', '.join(sorted(hints))}")
        made = cls(**{key: _typed(f"{name}.{key}", each, hints[key]) for key, each in value.items()})
        made.check()
        return made

    def check(self) -> None:
        """Raise a BKDError for values that do not fit each other."""


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Calibration(Record):
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
        pixel = max(threshold_for(normal.maxima, false_alarms).value, 2e-30)
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

    def check(self) -> None:
        """See :meth:`Record.check`."""
        if not (0 < self.false_alarms < 1 and 0 < self.normal_level < self.pixel_threshold):
            raise BKDError("calibration holds a rate or a pixel threshold that cannot be")
        if self.source not in SOURCES:
            raise BKDError(f"calibration.source is {_shown(self.source)}: expected one of {', '.join(SOURCES)}")
        for name, values in (("scores", self.scores), ("maxima", self.maxima)):
            if not values or values != sorted(values):
                raise BKDError(f"calibration.{name} is {_shown(values)}: expected numbers in ascending order")
        if not all(len(own) == 2 and own[1] >= 0 for own in self.teacher.values()):
            raise BKDError("calibration.teacher is without a mean and a std of each statistic")

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
class Addition(Record):
    """Good images that a run has taken in after its training.

    ``root``: their folder; empty for images that a program gave. ``when``: UTC, ISO 8601. ``train_files``,
    ``validation_files``: as in :class:`DataSource`. ``scored``: which images the thresholds then came from.
    ``threshold``, ``pixel_threshold``: before and after.
    """

    root: str
    when: str
    train_files: dict[str, FileRecord]
    validation_files: dict[str, FileRecord]
    scored: str
    threshold: tuple[float, float]
    pixel_threshold: tuple[float, float]


@dataclass(frozen=True)
class Unified(Record):
    """What a run that is one model of several categories knows of each.

    ``names``: of the categories, which index the other lists. ``bank``: the category of each support image. ``scales``:
    of each category its ``score_scale`` (:class:`bkd_fast.model.BKD`); ``calibrations``: its thresholds.
    """

    names: list[str]
    bank: list[int]
    scales: list[dict[str, list[float]]]
    calibrations: list[Calibration]

    def check(self) -> None:
        """See :meth:`Record.check`."""
        if not len(self.names) == len(self.scales) == len(self.calibrations) > 0:
            raise BKDError("unified has other numbers of names, scales and calibrations")
        _check_names("unified.names", self.names)
        if not self.bank or max(self.bank) >= len(self.names):
            raise BKDError(f"unified.bank is {_shown(self.bank)}: expected a category of each support image")
        for scale in self.scales:
            if scale.keys() != set(SCORES) or not all(len(own) == 2 and own[1] > 0 for own in scale.values()):
                raise BKDError(f"unified.scales has {_shown(scale)}: expected a mean and a std of each score")


@dataclass(frozen=True)
class DataSource(Record):
    """Where the images of a run came from, and which of them it used.

    ``train_files``, ``validation_files``, ``test_files``: path relative to the folder of good images -> size and
    SHA-256, of those trained on, those kept for validation, and those of a plain folder set aside for testing.

    ``additions``: what was added later. ``roi``: the mask that was given, if any.
    """

    root: str
    category: str
    anomalous: str | None = None
    masks: str | None = None
    train_files: dict[str, FileRecord] = field(default_factory=dict)
    validation_files: dict[str, FileRecord] = field(default_factory=dict)
    test_files: dict[str, FileRecord] = field(default_factory=dict)
    additions: list[Addition] = field(default_factory=list)
    roi: FileRecord | None = None

    @property
    def homes(self) -> tuple[Path, ...]:
        """Folders that the images may be in: one of several categories, MVTec AD's layout of one, or a plain folder."""
        root = Path(self.root)
        return root / self.category / "train" / GOOD, root / "train" / GOOD, root

    @property
    def all_train(self) -> dict[str, FileRecord]:
        """All files that were learned from, in order; those of an addition under its time and their whole path."""
        return self._with_additions("train_files")

    @property
    def all_validation(self) -> dict[str, FileRecord]:
        """All files that were kept for validation, in the same way."""
        return self._with_additions("validation_files")

    @property
    def used(self) -> dict[str, FileRecord]:
        """The files that the model or its thresholds have seen."""
        return {**self.all_train, **self.all_validation}

    def _with_additions(self, name: str) -> dict[str, FileRecord]:
        whole = dict(getattr(self, name))
        for addition in self.additions:
            for file, record in getattr(addition, name).items():
                whole[f"{addition.when} {os.path.join(addition.root, file)}"] = record
        return whole

    def check(self) -> None:
        """See :meth:`Record.check`."""
        _check_names("source.category", [self.category])


@dataclass(frozen=True)
class Manifest(Record):
    """What ``manifest.json`` of one category says.

    ``shown``: which training image (or tile) each image in ``support/`` is. ``tiles``: how many tiles each training
    image has; empty where images are taken whole. ``unified``: of a model of several categories.
    """

    bkd_fast: str
    calibration: Calibration
    source: DataSource
    files: dict[str, FileRecord]
    shown: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    unified: Unified | None = None

    @property
    def items(self) -> int:
        """The number of images or tiles that were learned from."""
        return sum(self.tiles) if self.tiles else len(self.source.all_train)

    def file(self, name: str) -> str:
        """Return the path in the run of MODEL, FEATURES or SUPPORT, which follows from its revision."""
        return _revised(name, _revision(self.files))

    def check(self) -> None:
        """See :meth:`Record.check`."""
        revision = _revision(self.files)
        for name in self.files:
            if name not in (CONFIG, ROI) and not (REVISED.fullmatch(name) and _revision([name]) == revision):
                raise BKDError(f"files names {_shown(name)}, which no run has")
        if 0 in self.tiles:
            raise BKDError("tiles has an image without any")


@dataclass(frozen=True)
class Trained:
    """One category's trained model as read from its folder.

    ``support``: the teacher's levels of the support images, (1, k, C_l, H_l, W_l), as :meth:`BKD.make_support`
    takes them. ``sample``: the first of their images, (1, 3, H, W) in [0, 1]. ``files``: what it was read from.
    ``roi``: (H, W) bool, what is looked at; None: everything. ``unified``: see :class:`Manifest`.
    """

    folder: Path
    config: BKDConfig
    calibration: Calibration
    source: DataSource
    model: BKD
    support: list[Tensor]
    sample: Tensor
    files: dict[str, FileRecord] = field(default_factory=dict)
    roi: np.ndarray | None = None
    unified: Unified | None = None


def save_trained(
    folder: Path,
    model: BKD,
    manifest: Manifest,
    images: Sequence[np.ndarray],
    support: Sequence[Tensor],
    roi: np.ndarray | None = None,
) -> None:
    """Write a category's folder, or replace the run that is there and has the same configuration.

    New files come beside the old ones. Then ``manifest.json`` is replaced, which is one step: whenever the process
    ends, the old run or the new one is whole.

    Args:
        manifest: whose ``files`` are not looked at.
        images: the support, (H, W, 3) uint8 each.
        support: its levels, see :attr:`Trained.support`.
        roi: (H, W) bool, what is looked at; None: everything.
    """

    def write(made: Path, revision: str) -> None:
        save_support(made / _revised(SUPPORT, revision), list(images))
        if support:  # the reverse branch alone has none
            levels = {str(index): level for index, level in enumerate(support)}
            save_tensors(made / _revised(FEATURES, revision), levels, {})
        save_tensors(made / _revised(MODEL, revision), model.state_dict(), {})

    fixed = {CONFIG: model.config.to_toml().encode()}
    if roi is not None:
        png = io.BytesIO()
        Image.fromarray(roi.astype(np.uint8) * 255).save(png, format="PNG")
        fixed[ROI] = png.getvalue()
    _replace_run(folder, manifest, fixed, write)


def copy_run(run: Path, folder: Path, calibration: Calibration) -> None:
    """Write a copy of a run of one category with another calibration; see :func:`save_trained`.

    Raises:
        BKDError: an unusable run; a folder that holds something else, or that another process writes to.
    """
    manifest = replace(read_category(run), calibration=calibration)
    _check_files(run, manifest)
    with locked(folder):
        if folder.resolve() == run.resolve():
            write_manifest(folder, manifest)
            return
        fixed = {name: (run / name).read_bytes() for name in (CONFIG, ROI) if name in manifest.files}
        if not is_empty(folder) and (
            not (folder / MANIFEST).is_file()
            or any(not (folder / name).is_file() or (folder / name).read_bytes() != fixed[name] for name in fixed)
        ):
            raise BKDError(f"{folder} holds something else than a run of the same training: choose another folder")

        def write(made: Path, revision: str) -> None:
            for name in manifest.files.keys() - fixed.keys():
                copied = made / _revised(name, revision)
                copied.parent.mkdir(exist_ok=True)
                shutil.copyfile(run / name, copied)

        _replace_run(folder, manifest, fixed, write)
        if (run / LOG).is_file():
            with atomic_path(folder / LOG) as temporary:
                shutil.copyfile(run / LOG, temporary)


def _replace_run(
    folder: Path, manifest: Manifest, fixed: Mapping[str, bytes], write: Callable[[Path, str], None]
) -> None:
    """Write the files that ``write`` makes, and in a new folder those that no revision changes, ``fixed``."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_category(folder).files if (folder / MANIFEST).is_file() else None
    revision = "" if earlier is None else f".{int(_revision(earlier)[1:] or 0) + 1}"
    with staging(folder) as made:
        write(made, revision)
        if earlier is None:
            for name, content in fixed.items():
                with atomic_write(made / name, "wb") as file:
                    file.write(content)
        paths = [path for path in sorted(made.rglob("*")) if path.is_file()]
        files = {path.relative_to(made).as_posix(): FileRecord(path.stat().st_size, checksum(path)) for path in paths}
        if earlier is not None:
            files.update((name, earlier[name]) for name in (CONFIG, ROI) if name in earlier)
        for path in paths:
            sync(path)
        for path in made.iterdir():
            move(path, folder / path.name)
        sync(folder)
    write_manifest(folder, replace(manifest, files=files))
    kept = {Path(name).parts[0] for name in files}
    for path in [path for path in folder.iterdir() if STALE.fullmatch(path.name) and path.name not in kept]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _revision(files: Iterable[str]) -> str:
    """Return the revision that a run's files have in their names."""
    return next((match[1] or match[2] or "" for name in files if (match := REVISED.fullmatch(name))), "")


def _revised(name: str, revision: str) -> str:
    """Return the name of a file with another revision, as in ``support.1/000.png``."""
    first, slash, rest = name.partition("/")
    stem, *suffix = first.split(".")
    return f"{stem}{revision}{'.safetensors' if suffix[-1:] == ['safetensors'] else ''}{slash}{rest}"


def write_manifest(folder: Path, manifest: Manifest | Mapping[str, Any]) -> None:
    """Write ``manifest.json`` with its format and its own checksum, atomically."""
    content = {"format": FORMAT, **(asdict(manifest) if isinstance(manifest, Manifest) else manifest)}
    write_json(folder / MANIFEST, {**content, "sha256": _digest(content)})


def load_trained(folder: str | Path) -> Trained:
    """Read a category's folder. Sizes are checked before anything large is loaded.

    Raises:
        BKDError: not a run, half-written, from another format version, or altered since it was written.
    """
    folder = Path(folder)
    manifest = read_category(folder)
    try:
        return _load(folder, manifest)
    except (BKDError, OSError):
        if read_category(folder) == manifest:
            raise
    return load_trained(folder)  # an update has replaced its files meanwhile


def _load(folder: Path, manifest: Manifest) -> Trained:
    _check_files(folder, manifest)
    with _about(folder / CONFIG):
        config = BKDConfig.from_toml((folder / CONFIG).read_text(encoding="utf-8"))
    model, state = _read_model(folder / manifest.file(MODEL), config)
    features, shown = manifest.file(FEATURES), folder / manifest.file(SUPPORT)
    count = sum(name.startswith(f"{shown.name}/") for name in manifest.files)
    support = _read_support(folder / features, model, count) if features in manifest.files else []
    if bool(support) != config.forward_branch:
        raise BKDError(f"{folder} does not fit its {CONFIG}: {FEATURES} belongs to the forward branch")
    load_state(model, state, folder / manifest.file(MODEL))
    if len(manifest.shown) != count:
        raise BKDError(f"{folder} does not fit its {MANIFEST}: it shows {count} images, and names other numbers")
    tiled = bool(config.teacher.tile)
    if len(manifest.tiles) != tiled * len(manifest.source.all_train) or max(manifest.shown) >= manifest.items:
        raise BKDError(f"{folder} does not fit its {MANIFEST}: it names other numbers of images or tiles")
    if ROI in manifest.files and config.roi is None:
        raise BKDError(f"{folder} does not fit its {CONFIG}: {ROI} belongs to a region of interest")
    with _about(folder / ROI):
        roi = load_roi(folder / ROI, STORED) if ROI in manifest.files else None
        if roi is not None and not config.teacher.tile:
            model.set_roi(shrink_roi(roi, config.teacher.size))
    sample = load_support(shown, config.teacher.size, 1)
    calibration, source = manifest.calibration, manifest.source
    unified = manifest.unified
    if unified is not None and (not config.retrieves or len(unified.bank) != count):
        raise BKDError(f"{folder} does not fit its {MANIFEST}: unified.bank must have a category of each support image")
    return Trained(folder, config, calibration, source, model.eval(), support, sample, manifest.files, roi, unified)


def read_manifest(folder: str | Path) -> Manifest | tuple[str, ...]:
    """Return what ``manifest.json`` of a run folder says, checked; of a run over several categories, their names.

    Raises:
        BKDError: see :func:`load_trained`.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BKDError(f"there is no run folder {folder}: expected one written by `bkd-fast train … --out {folder}`")
    if not path.is_file():
        unfinished = any((place / CHECKPOINT).is_file() for place in (folder, *folder.iterdir()))
        hint = "its training did not finish: resume with `bkd-fast train … --resume`" if unfinished else "not a run"
        if (folder / "config.json").is_file():
            hint = "it was written by an earlier bkd_fast, which this one does not read; train again"
        raise BKDError(f"{folder} has no {MANIFEST}: {hint}")
    with _about(path):
        given = read_content(path)
        if "categories" not in given:
            return Manifest.parse("the manifest", given)
        return _categories(folder, given)


def read_content(path: Path) -> dict[str, Any]:
    """Return what :func:`write_manifest` wrote, less its format and checksum, which are checked.

    Raises:
        BKDError: too large, not JSON, of another format, or altered since.
    """
    if path.stat().st_size > MAX_MANIFEST:
        raise BKDError(f"it has {path.stat().st_size} bytes, and a manifest has at most {MAX_MANIFEST}")
    try:
        given = json.loads(path.read_bytes(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BKDError(f"it is not valid JSON ({error}): the run was altered or half-copied") from error
    if not isinstance(given, dict):
        raise BKDError("it is not a run's manifest")
    kind, version = given.pop("format", None), given.get("bkd_fast")
    if type(kind) is not int or kind != FORMAT:
        written = f"it has run format {_shown(kind)}, written by bkd_fast {_shown(version)}"
        raise BKDError(f"{written}, and this bkd_fast reads format {FORMAT}: train again")
    if given.pop("sha256", None) != _digest({"format": kind, **given}):
        raise BKDError("it was altered since the run was saved (its SHA-256 differs): restore it or train again")
    return given


def read_category(folder: str | Path) -> Manifest:
    """Return the manifest of one category's folder.

    Raises:
        BKDError: see :func:`load_trained`.
    """
    manifest = read_manifest(folder)
    if not isinstance(manifest, Manifest):
        choices = ", ".join(str(Path(folder, name)) for name in manifest)
        raise BKDError(f"{folder} holds several categories, each a model of its own: choose one of {choices}")
    return manifest


def category_folders(run: str | Path) -> dict[str, Path]:
    """Return category name -> folder, for a run of one category (the folder itself) or of several."""
    run = Path(run)
    manifest = read_manifest(run)
    if isinstance(manifest, Manifest):
        return {manifest.source.category: run}
    return {name: run / name for name in manifest}


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder in ``folder``, which is deleted at the end with whatever is left in it."""
    made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    try:
        made.chmod(0o755)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def move(made: Path, path: Path) -> None:
    """Put a file or folder in the place of another."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif made.is_dir():
        path.unlink(missing_ok=True)
    made.replace(path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; a failed write (a full disk) leaves the earlier file as it was."""
    with atomic_path(path) as temporary:
        try:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, dict(metadata)
            )
        except (SafetensorError, OSError) as error:
            raise BKDError(f"{path} could not be written ({error}); an earlier file is unchanged") from error


def load_state(model: BKD, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict that must fit exactly."""
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise BKDError(f"{path} does not fit the configuration beside it: {error}") from error


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Compare the files of a run with its manifest: all there, none beside them, sizes and checksums equal."""
    files, support = manifest.files, manifest.file(SUPPORT)
    for name in (CONFIG, manifest.file(MODEL), support):
        if name not in files and not any(file.startswith(f"{name}/") for file in files):
            raise BKDError(f"{folder} is incomplete: its {MANIFEST} names no {name}. Restore it or train again.")
    for name, record in files.items():
        path, parent = folder / name, Path(name).parent
        try:  # the run folder itself may be a link
            found = [(folder / parent).lstat() if parent.parts else folder.stat(), path.lstat()]
        except OSError:
            raise BKDError(f"{folder} is incomplete: {name} is missing. Restore it or train again.") from None
        if not (stat.S_ISDIR(found[0].st_mode) and stat.S_ISREG(found[1].st_mode)):
            raise BKDError(f"{path} is not a plain file in the run folder: a run holds no symbolic links")
        if found[1].st_size != record.size:
            raise BKDError(f"{path} was altered since the run was saved (its size differs). Restore it or train again.")
    if files[CONFIG].size > MAX_CONFIG:
        raise BKDError(f"{folder / CONFIG} has {files[CONFIG].size} bytes: no configuration is that long")
    for path in (folder / support).iterdir():
        if f"{support}/{path.name}" not in files and not path.name.startswith("."):
            raise BKDError(f"{path} does not belong to the run: remove it")
    with _about(folder), ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(lambda name: checksum(folder / name), files))
    for (name, record), found_sum in zip(files.items(), sums, strict=True):
        if found_sum != record.sha256:
            raise BKDError(f"{folder / name} was altered (its SHA-256 differs). Restore it or train again.")


def _read_model(path: Path, config: BKDConfig) -> tuple[BKD, dict[str, Tensor]]:
    """Return the network that the configuration asks for, and its tensors, which fit it."""
    with torch.device("meta"):  # shapes without memory
        model = BKD(config, weights=None)
    expected = model.state_dict()
    forms = {name: (DTYPES.get(tensor.dtype), list(tensor.shape)) for name, tensor in expected.items()}
    state = _read_tensors(path, forms)
    persistent = all(name in expected for name, _ in model.named_buffers())
    # Random numbers for every weight would take longer than all the rest of loading.
    return model.to_empty(device="cpu") if persistent else BKD(config, weights=None), state


def _read_support(path: Path, model: BKD, count: int) -> list[Tensor]:
    """Return the levels (1, count, C_l, H_l, W_l) of the supports, of the size in the configuration."""
    kind = DTYPES[torch.float16 if model.config.retrieves else torch.float32]
    shapes = model.teacher.shapes(model.config.teacher.size)
    tensors = _read_tensors(path, {str(index): (kind, [1, count, *shape]) for index, shape in enumerate(shapes)})
    return [tensors[str(index)] for index in range(len(shapes))]


def _read_tensors(path: Path, forms: Mapping[str, tuple[str | None, list[int]]]) -> dict[str, Tensor]:
    """Return the tensors of a file, once their data types and shapes are those in ``forms``."""
    with _about(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()} != forms:
            raise BKDError(f"it does not fit the {CONFIG} beside it: other names, shapes or types of tensors")
        tensors = {name: file.get_tensor(name) for name in forms}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise BKDError(f"its tensor {name} holds values that are NaN or infinite")
    return tensors


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name ``path`` in whatever error reading it raises."""
    try:
        yield
    except BKDError as error:
        raise BKDError(f"{path} cannot be used: {error}") from error
    except (OSError, SafetensorError, ValueError, OverflowError, RecursionError) as error:
        raise BKDError(f"{path} cannot be read ({error}). Restore it or train again.") from error


def _digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON values, however they are laid out in a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return a JSON value as a field of type ``hint`` takes it.

    Raises:
        BKDError: it is of another type; a number that float32 or int64 does not hold; no possible path or SHA-256.
    """
    kinds, origin = get_args(hint), get_origin(hint)
    if type(None) in kinds:
        return None if value is None else _typed(name, value, kinds[0])
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.parse(name, value)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(name, each, kinds[1]) for key, each in value.items()}
    if origin is list and isinstance(value, list):
        return [_typed(name, each, kinds[0]) for each in value]
    if (origin is tuple or hint is FileRecord) and isinstance(value, list):
        kinds = kinds or tuple(get_type_hints(hint).values())
        if len(value) == len(kinds):
            parts = [_typed(name, each, kind) for each, kind in zip(value, kinds, strict=True)]
            return FileRecord(*parts) if hint is FileRecord else tuple(parts)
    fits = (
        (hint is float and type(value) in (int, float) and abs(value) < 1e38)  # NaN is not below either
        or (hint is int and type(value) is int and 0 <= value < 1 << 62)
        or (hint is str and isinstance(value, str) and _is_path(value))
    )
    if not fits:
        raise BKDError(f"{name} is {_shown(value)}: expected a value of type {getattr(hint, '__name__', hint)}")
    return value


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _check_names(name: str, values: Sequence[str]) -> None:
    for value in values:
        if not is_component(value):
            raise BKDError(f"{name} is {_shown(value)}: expected the name of one folder, without separators")
    if len(set(values)) < len(values):
        raise BKDError(f"{name} has one twice")


def _categories(folder: Path, given: Mapping[str, Any]) -> tuple[str, ...]:
    names = _typed("categories", given["categories"], list[str])
    if not 0 < len(names) <= 10_000:
        raise BKDError(f"categories is {_shown(names)}: expected names")
    _check_names("categories", names)
    for name in names:
        if (folder / name).is_symlink():
            raise BKDError(f"the category {name} is a symbolic link: a run holds none")
    return tuple(names)


def _shown(value: Any) -> str:
    """Return a value as an error shows it, however long or deep it is."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 1e30 else "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}…"
