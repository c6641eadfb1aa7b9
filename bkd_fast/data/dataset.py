"""Which images there are: MVTec AD's layout, or a plain folder of good images."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bkd_fast.config import DataConfig
from bkd_fast.data.image import DEFAULT, SUFFIXES, load_image, load_mask, to_tensor
from bkd_fast.data.roi import fill_outside, fit_roi, load_roi, roi_files, shrink_roi
from bkd_fast.data.tiles import Tile, overlap_of, places
from bkd_fast.errors import BKDError, ImageError, few
from bkd_fast.files import checksum, is_component, is_output

log = logging.getLogger("bkd_fast")
GOOD = "good"
PLAIN_TEST_SHARE = 0.2  # of the good images of a plain folder, when defective ones come with it


class FileRecord(NamedTuple):
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Sample:
    """One image file.

    Attributes:
        path: the file.
        label: 1 for a defective image.
        defect: its kind, ``good`` for none.
        masks: the files whose union is the ground truth; empty if there is none.
        name: path relative to the folder of its kind, with ``/``: together with ``defect`` the image's identity.
        roi: the mask of its region of interest, where each image has one.
    """

    path: Path
    label: int
    defect: str
    masks: tuple[Path, ...] = ()
    name: str = ""
    roi: Path | None = None

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.path.name)

    @property
    def key(self) -> str:
        """The image's identity in its category, such as ``hole/cam1/000.png``."""
        return f"{self.defect}/{self.name}"


@dataclass(frozen=True)
class Category:
    """One kind of part: ``train`` holds normal images only, ``test`` both.

    ``plain``: a folder of good images, from which the good test images were set aside.
    """

    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    plain: bool = False


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images, or their tiles, as network input: (3, H, W) float32 in [0, 1] and the index.

    Args:
        samples: the images.
        size: (H, W) that images or tiles are resized to.
        tile: side of square tiles that cover each image, in its pixels; 0: images are taken whole.
        config: how pixels are read.
        roi: (H, W) bool, what is looked at; the rest of an image gets one colour, and tiles without any of it are left
            out. None: everything.

    Attributes:
        image_of: per item the index of its sample.

    Raises:
        BKDError: an image that is smaller than a tile, or cannot be decoded.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: tuple[int, int],
        tile: int = 0,
        config: DataConfig = DEFAULT,
        roi: np.ndarray | None = None,
    ) -> None:
        self.samples, self.size, self.tile, self.config, self.roi = list(samples), size, tile, config, roi
        self._regions: list[Tensor] = []  # of items, where they differ in what is looked at
        self.image_of: list[int] = []
        self.places: list[Tile] = []
        each = any(sample.roi for sample in self.samples)
        for index, sample in enumerate(self.samples):
            cut = [Tile(0, 0)]
            if tile:
                whole = _size(sample, config)
                cut = places(whole, (tile, tile), overlap_of(tile))
            if each or (tile and roi is not None):
                mask = self._roi(index)
                parts = [cut_out(fit_roi(mask, whole, sample.path), place, tile) for place in cut] if tile else [mask]
                regions = [shrink_roi(part, size) for part in parts]
                cut = [place for place, region in zip(cut, regions, strict=True) if region.any()]
                self._regions += [region for region in regions if region.any()]
                if not cut and tile:
                    raise BKDError(f"no tile of {sample.path} has any of the region of interest: use larger tiles")
                if not cut:
                    raise BKDError(f"nothing of the mask {sample.roi} is left at the network's size of {size}")
            self.image_of += [index] * len(cut)
            self.places += cut

    def __len__(self) -> int:
        return len(self.image_of)

    @property
    def tiles(self) -> list[int]:
        """How many tiles each image has."""
        return np.bincount(self.image_of, minlength=len(self.samples)).tolist()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_tensor(self._array(index, blank=True), self.size), index

    def array(self, index: int) -> np.ndarray:
        """Return the image or tile at its own size, (H, W, 3) uint8, also what is not looked at."""
        return self._array(index, blank=False)

    def regions(self, indices: Sequence[int]) -> Tensor | None:
        """Return what of tiles is looked at, (N, H, W) bool; None where that is the same for all images."""
        return torch.stack([self._regions[index] for index in indices]) if self._regions else None

    def _roi(self, image: int) -> np.ndarray:
        """Return what is looked at of an image, at the size of its mask."""
        roi = self.samples[image].roi
        mask = self.roi if roi is None else load_roi(roi, self.config)
        assert mask is not None
        return mask

    def _array(self, index: int, *, blank: bool) -> np.ndarray:
        sample = self.samples[self.image_of[index]]
        image = load_image(sample.path, self.config)
        if blank and (self.roi is not None or sample.roi):
            roi = fit_roi(self._roi(self.image_of[index]), image.shape[:2], sample.path)
            image = np.asarray(fill_outside(image, roi))
        return image if not self.tile else np.ascontiguousarray(cut_out(image, self.places[index], self.tile))


def cut_out(image: np.ndarray, place: Tile, tile: int) -> np.ndarray:
    """Return the part of an image or mask (H, W, …) that a tile covers."""
    return image[place.top : place.top + tile, place.left : place.left + tile]


def _size(sample: Sample, config: DataConfig) -> tuple[int, int]:
    height, width = load_image(sample.path, config).shape[:2]
    return height, width


def image_files(folder: Path, leave_out: Collection[Path] = ()) -> list[Path]:
    """Return the image files below ``folder``, sorted.

    Left out, also where a symbolic link leads to them: hidden files and folders, the folders ``leave_out``, and (with a
    note) runs and predictions of this package. Links are followed, but no folder and no file is taken twice.
    """
    apart = {os.path.realpath(path) for path in leave_out}
    seen: set[str] = set()
    files: dict[str, Path] = {}  # by real path
    waiting, links = [str(folder)], []
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0), onerror=_raise):
            real = os.path.realpath(place)
            ours = place != str(folder) and is_output(place)
            if ours and real not in seen:
                log.info("%s is a folder that bkd_fast wrote: its images are left out", place)
            if ours or real in seen or real in apart:
                seen.add(real)
                folders[:] = []
                continue
            seen.add(real)
            shown = sorted(name for name in folders if not name.startswith("."))
            links += [path for name in shown if os.path.islink(path := os.path.join(place, name))]
            folders[:] = [name for name in shown if not os.path.islink(os.path.join(place, name))]
            for name in names:
                path = os.path.join(place, name)
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES and os.path.isfile(path):
                    target = os.path.realpath(path)
                    if target not in files or os.path.islink(files[target]):
                        files[target] = Path(path)
        if not waiting:  # what links lead to comes last: a folder is taken by its own name if it has one here
            waiting, links = links[:1], links[1:]
    return sorted(files.values())


def find_categories(
    root: Path,
    names: Sequence[str] | None = None,
    *,
    anomalous: Path | None = None,
    masks: Path | None = None,
    used: Mapping[str, FileRecord] | None = None,
) -> list[Category]:
    """Return what there is to train and test on.

    Args:
        root: a folder of categories in MVTec AD's layout (``train/good``, ``test/<defect>``, and masks as
            ``ground_truth/<defect>/<stem>_mask.png``), one such category, or a folder of good images.
        names: categories to take, in this order; None: all, by name.
        anomalous: for a plain folder, defective images; a seeded fifth of the good ones then becomes test images.
        masks: for ``anomalous``, a folder of their masks. A mask has the relative path of its image, with or without
            ``_mask`` and with any suffix; or an image has a folder of masks, whose union counts.
        used: the good images that a run was trained and validated on, by name. All others of a plain folder are then
            test images, except copies of those.

    Raises:
        BKDError: no such folder, no images, an unknown category (the message lists those there are and the closest),
            ambiguous masks, or a folder that looks like another one than was asked for.
    """
    root = Path(root)
    if not root.is_dir():
        raise BKDError(f"there is no folder {root}: expected a data set, or a folder of good images")
    if is_output(root):
        raise BKDError(f"{root} is a folder that bkd_fast wrote: expected a data set, or a folder of good images")
    if _is_category(root):
        folders = {root.resolve().name: root}
    else:
        folders = {path.name: path for path in sorted(root.iterdir()) if _is_shown(path) and _is_category(path)}
    for name in folders or [root.resolve().name]:
        if not is_component(name):
            raise BKDError(f"the folder name {name!r} cannot name a category on every system: rename the folder")
    if not folders:
        return [_plain(root, names, anomalous, masks, used)]
    if anomalous is not None or masks is not None:
        raise BKDError(f"{root} is in MVTec AD's layout with its own test images: leave out --anomalous and --masks")
    for name in names or ():
        if name not in folders:
            raise BKDError(_unknown(root, name, list(folders)))
    return [_category(name, folders[name], used or {}) for name in names or folders]


def find_unified(root: Path, names: Sequence[str] | None = None) -> tuple[Category, tuple[str, ...]]:
    """Return the good images of several categories as those of one, and the names of these categories.

    The name of each image begins with its category, ``screw/000.png``.

    Args:
        root: categories in MVTec AD's layout, or folders of good images.
        names: categories to take, in this order; None: all, by name.

    Raises:
        BKDError: fewer than two categories, an unknown one, or images beside the folders; see :func:`find_categories`.
    """
    categories = find_categories(root)
    if categories[0].plain:
        folders: dict[str, list[Sample]] = {}
        for sample in categories[0].train:
            first, slash, rest = sample.name.partition("/")
            folders.setdefault(first if slash else "", []).append(replace(sample, name=rest or first))
        if "" in folders and len(folders) > 1:
            raise BKDError(f"{root} has images beside its folders: {few([one.name for one in folders['']])}")
        categories = [Category(name, tuple(samples), ()) for name, samples in folders.items() if name]
    known = {category.name: category for category in categories}
    for name in names or ():
        if name not in known:
            raise BKDError(_unknown(root, name, list(known)))
    chosen = [known[name] for name in names or known]
    if len(chosen) < 2:
        raise BKDError(f"--unified takes at least two categories, and {root} has {len(chosen)}: leave it out for one")
    train = [replace(sample, name=f"{one.name}/{sample.name}") for one in chosen for sample in one.train]
    return Category(Path(root).resolve().name, tuple(train), ()), tuple(one.name for one in chosen)


def check_samples(
    samples: Sequence[Sample],
    *,
    skip_unreadable: bool = False,
    tile: int | None = None,
    config: DataConfig = DEFAULT,
    roi: np.ndarray | None = None,
) -> list[Sample]:
    """Decode every image and mask once, so that a bad file is known before any work is done.

    Masks that mark nothing or everything are named in a warning.

    Args:
        samples: the images.
        skip_unreadable: leave out images that cannot be used, with a warning that names them.
        tile: side of the tiles that an image must hold at least one of, in pixels.
        config: how pixels are read.
        roi: (H, W) bool, what is looked at; None: everything.

    Returns:
        The usable samples.

    Raises:
        ImageError: images that cannot be decoded, are smaller than a tile or have another aspect than ``roi``, by name.
        BKDError: a mask whose size differs from its image's.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        checked = pool.map(partial(_checked, tile=tile, config=config, roi=roi), samples)
        problems, shares = zip(*checked, strict=True) if samples else ((), ())
    broken = [problem for problem in problems if problem is not None]
    if broken and not skip_unreadable:
        raise ImageError(
            f"{len(broken)} of {len(samples)} images cannot be used: {few(broken, '; ')}. Mend them, or "
            "--skip-unreadable"
        )
    for problem in broken:
        log.warning("skipped: %s", problem)
    for share, what in ((0.0, "nothing"), (1.0, "the whole image")):
        odd = [str(sample.masks[0]) for sample, own in zip(samples, shares, strict=True) if own == share]
        if odd:
            log.warning("%d mask(s) mark %s as defective: %s", len(odd), what, few(odd))
    return [sample for sample, problem in zip(samples, problems, strict=True) if problem is None]


def with_rois(samples: Sequence[Sample], folder: Path) -> list[Sample]:
    """Return the samples with their masks of a folder of regions of interest; see :func:`roi_files`.

    A mask is found by the image's name, or by its kind and name, as ``good/000.png``.
    """
    try:
        paths = roi_files(folder, [sample.key for sample in samples])
    except BKDError:
        paths = roi_files(folder, [sample.name for sample in samples])
    return [replace(sample, roi=path) for sample, path in zip(samples, paths, strict=True)]


def truth_of(sample: Sample, config: DataConfig = DEFAULT) -> np.ndarray | None:
    """Return the ground truth (H, W) bool, the union of the sample's masks; None if it has none.

    Raises:
        ImageError: a mask that cannot be decoded.
    """
    return np.logical_or.reduce([load_mask(path, config) for path in sample.masks]) if sample.masks else None


def file_records(samples: Sequence[Sample]) -> dict[str, FileRecord]:
    """Return name -> size and SHA-256 of the samples' files."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        sums = pool.map(lambda sample: FileRecord(sample.path.stat().st_size, checksum(sample.path)), samples)
        return dict(zip((sample.name for sample in samples), sums, strict=True))


def split_normals(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Divide normal images at random, the same for a seed: those to train on, and those kept for validation.

    At least one is kept.

    Raises:
        BKDError: fewer than two images.
    """
    if len(samples) < 2:
        raise BKDError(f"{len(samples)} training image(s): expected at least 2 normal images, one for the threshold")
    held = min(len(samples) - 1, max(1, round(share * len(samples))))
    chosen = set(torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:held].tolist())
    kept = [sample for index, sample in enumerate(samples) if index not in chosen]
    return kept, [sample for index, sample in enumerate(samples) if index in chosen]


def _is_shown(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".")  # notebooks leave .ipynb_checkpoints full of images


def _is_category(folder: Path) -> bool:
    return (folder / "train" / GOOD).is_dir()


def _samples(folder: Path, label: int, defect: str, leave_out: Collection[Path] = ()) -> list[Sample]:
    files = image_files(folder, leave_out)
    return [Sample(path, label, defect, name=path.relative_to(folder).as_posix()) for path in files]


def _category(name: str, folder: Path, used: Mapping[str, FileRecord]) -> Category:
    train = _samples(folder / "train" / GOOD, 0, GOOD)
    if not train:
        raise BKDError(f"there are no images in {folder / 'train' / GOOD}: expected pictures of good parts")
    test: list[Sample] = []
    kinds = folder / "test"
    for kind in sorted(path for path in kinds.iterdir() if _is_shown(path)) if kinds.is_dir() else ():
        samples = _samples(kind, int(kind.name != GOOD), kind.name)
        truth = folder / "ground_truth" / kind.name
        test += _with_masks(samples, kind, truth) if kind.name != GOOD and truth.is_dir() else samples
    if same := _copies([sample for sample in test if not sample.label], used):
        log.warning("%d good test images of %s are copies of training images: %s", len(same), name, few(same))
    return Category(name, tuple(train), tuple(test))


def _plain(
    root: Path,
    names: Sequence[str] | None,
    anomalous: Path | None,
    masks: Path | None,
    used: Mapping[str, FileRecord] | None,
) -> Category:
    name = root.resolve().name
    for other in names or ():
        if other != name:
            raise BKDError(_unknown(root, other, [name]))
    apart = [folder for folder in (anomalous, masks) if folder is not None]
    _check_good(root, apart)
    good = _samples(root, 0, GOOD, [folder for folder in apart if root.resolve() in folder.resolve().parents])
    if not good:
        raise BKDError(f"there are no images in {root}: expected good images, or MVTec AD's layout (train/good)")
    if anomalous is None:
        if masks is not None:
            raise BKDError(f"masks {masks} were given without defective images: add --anomalous DIR")
        return Category(name, tuple(good), (), plain=True)
    for folder in apart:
        if not folder.is_dir():
            raise BKDError(f"there is no folder {folder}")
    _check_anomalous(anomalous)
    bad = _samples(anomalous, 1, "anomalous", [] if masks is None else [masks])
    if not bad:
        raise BKDError(f"there are no images in {anomalous}: expected pictures of defective parts")
    if masks is not None:
        bad = _with_masks(bad, anomalous, masks)
    if used is None:
        train, test = split_normals(good, PLAIN_TEST_SHARE, 0)
    else:
        train = [sample for sample in good if sample.name in used]
        test = [sample for sample in good if sample.name not in used]
        if same := set(_copies(test, used)):
            log.warning("%d images in %s are copies of training images: %s", len(same), root, few(sorted(same)))
            test = [sample for sample in test if sample.name not in same]
    return Category(name, tuple(train), (*test, *bad), plain=True)


def _check_good(root: Path, apart: Sequence[Path]) -> None:
    """Refuse a plain folder of which only a folder ``good`` holds good images."""
    good = root / GOOD
    if not good.is_dir() or not image_files(good):
        return
    given = {folder.resolve() for folder in apart}
    others = [
        path
        for path in sorted(root.iterdir())
        if _is_shown(path) and path.name != GOOD and path.resolve() not in given and image_files(path, apart)
    ]
    if others:
        raise BKDError(
            f"{root} has images in {GOOD} and in {few([path.name for path in others])}, and a plain folder is trained "
            f"on as a whole: pass {good}, and defective images with --anomalous"
        )


def _check_anomalous(folder: Path) -> None:
    """Refuse a folder of defective images that holds good ones, as the test folder of MVTec AD's layout does."""
    if _is_category(folder) or any(_is_category(path) for path in folder.iterdir() if path.is_dir()):
        raise BKDError(f"--anomalous {folder} is a data set in MVTec AD's layout: run `bkd-fast train {folder}`")
    if (folder / GOOD).is_dir() and image_files(folder / GOOD):
        kinds = [path for path in sorted(folder.iterdir()) if _is_shown(path) and path.name != GOOD]
        whole = folder.resolve().parent
        advice = f"pass one kind, --anomalous {kinds[0]}" if kinds else "pass defective images alone"
        if _is_category(whole):
            advice = f"train on the whole data set with `bkd-fast train {whole}`, or {advice}"
        raise BKDError(
            f"--anomalous {folder} looks like the test folder of MVTec AD's layout: its folder {GOOD} holds good "
            f"images, which would count as defective. Instead {advice}"
        )


def _with_masks(samples: Sequence[Sample], images: Path, folder: Path) -> list[Sample]:
    """Return the samples of the folder ``images`` with their masks from ``folder``, found by relative path."""
    by_stem: dict[str, list[Sample]] = {}
    for sample in samples:
        by_stem.setdefault(_stem(sample.name), []).append(sample)
    single: dict[str, list[Path]] = {}
    several: dict[str, list[Path]] = {}
    unmatched = []
    for path in image_files(folder):
        name = path.relative_to(folder).as_posix()
        stem = next((stem for stem in (_stem(name), _stem(name).removesuffix("_mask")) if stem in by_stem), None)
        if stem is not None:
            single.setdefault(stem, []).append(path)
        elif (parent := name.rpartition("/")[0]) in by_stem:
            several.setdefault(parent, []).append(path)
        else:
            unmatched.append(name)
    for stem in single.keys() | several.keys():
        candidates = [*single.get(stem, []), *several.get(stem, [])[:1]]
        if len(candidates) > 1 or len(by_stem[stem]) > 1:
            raise BKDError(
                f"it is ambiguous which mask belongs to which image: {few(candidates)} for "
                f"{few([sample.path for sample in by_stem[stem]])}"
            )
    missing = [sample.name for stem, own in by_stem.items() if stem not in single | several for sample in own]
    if unmatched and len(missing) == len(samples):
        raise BKDError(
            f"no mask in {folder} has the name of an image in {images}: there are {few(unmatched, count=3)}, expected "
            f"{few([f'{_stem(name)}_mask.png' for name in missing], count=3)}, or a folder {_stem(missing[0])}"
        )
    if missing and len(missing) < len(samples):
        log.warning("%d of %d images in %s have no mask: %s", len(missing), len(samples), images, few(missing))
    if unmatched:
        log.warning("%d masks in %s belong to no image: %s", len(unmatched), folder, few(unmatched))
    found = {**single, **several}
    return [replace(sample, masks=tuple(found.get(_stem(sample.name), ()))) for sample in samples]


def _raise(error: OSError) -> None:
    raise error


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _copies(samples: Sequence[Sample], used: Mapping[str, FileRecord]) -> list[str]:
    """Return the names of the samples that hold the bytes of one of the ``used`` files."""
    sizes = {record.size for record in used.values()}
    sums = {record.sha256 for record in used.values()}
    return [sample.name for sample in samples if sample.path.stat().st_size in sizes and checksum(sample.path) in sums]


def _unknown(root: Path, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{root} has no category {name!r}{hint} It has: {', '.join(known)}"


def _checked(
    sample: Sample, tile: int | None, config: DataConfig, roi: np.ndarray | None
) -> tuple[str | None, float | None]:
    """Return what is wrong with an image file, or None; and the share of pixels that its masks mark, or None.

    A mask that does not fit is an error, whatever is skipped.
    """
    try:
        size = load_image(sample.path, config).shape[:2]
        mask = roi if sample.roi is None else load_roi(sample.roi, config)
        if mask is not None:
            fit_roi(mask, (size[0], size[1]), sample.path)
    except ImageError as error:
        return str(error), None
    if tile and min(size) < tile:
        return f"{sample.path} has {size[1]} x {size[0]} pixels, less than a tile of {tile} x {tile}", None
    if not sample.masks:
        return None, None
    truths = [load_mask(path, config) for path in sample.masks]
    for path, truth in zip(sample.masks, truths, strict=True):
        if truth.shape != size:
            own = f"{truth.shape[1]} x {truth.shape[0]} pixels"
            raise BKDError(f"the mask {path} is {own} and its image {sample.path} {size[1]} x {size[0]}")
    return None, float(np.logical_or.reduce(truths).mean())
