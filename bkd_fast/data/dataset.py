"""Which images there are: MVTec AD's layout, or a plain folder of good images."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bkd_fast.config import DataConfig
from bkd_fast.data.image import DEFAULT, image_files, load_image, load_mask, to_tensor
from bkd_fast.data.tiles import Tile, overlap_of, places
from bkd_fast.errors import BKDError, ImageError

log = logging.getLogger("bkd_fast")
GOOD = "good"
PLAIN_TEST_SHARE = 0.2  # of the good images of a plain folder, when defective ones come with it


@dataclass(frozen=True)
class Sample:
    """One image file.

    ``label``: 1 for a defective one. ``defect``: its kind, ``good`` for none. ``mask``: the file of its mask, or None.
    """

    path: Path
    label: int
    defect: str
    mask: Path | None = None


@dataclass(frozen=True)
class Category:
    """One kind of part: ``train`` holds normal images only, ``test`` both."""

    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images, or their tiles, as network input: (3, H, W) float32 in [0, 1] and the index.

    Args:
        samples: the images.
        size: (H, W) that images or tiles are resized to.
        tile: side of square tiles that cover each image, in its pixels; 0: images are taken whole.
        config: how pixels are read.

    Attributes:
        image_of: per item the index of its sample.

    Raises:
        BKDError: an image that is smaller than a tile, or cannot be decoded.
    """

    def __init__(
        self, samples: Sequence[Sample], size: tuple[int, int], tile: int = 0, config: DataConfig = DEFAULT
    ) -> None:
        self.samples, self.size, self.tile, self.config = list(samples), size, tile, config
        self.image_of, self.places = list(range(len(self.samples))), [Tile(0, 0)] * len(self.samples)
        if tile:
            cut = [places(_size(sample, config), (tile, tile), overlap_of(tile)) for sample in self.samples]
            self.image_of = [index for index, tiles in enumerate(cut) for _ in tiles]
            self.places = [place for tiles in cut for place in tiles]

    def __len__(self) -> int:
        return len(self.image_of)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_tensor(self.array(index), self.size), index

    def array(self, index: int) -> np.ndarray:
        """Return the image or tile at its own size, (H, W, 3) uint8."""
        image = load_image(self.samples[self.image_of[index]].path, self.config)
        if not self.tile:
            return image
        top, left = self.places[index]
        return np.ascontiguousarray(image[top : top + self.tile, left : left + self.tile])


def _size(sample: Sample, config: DataConfig) -> tuple[int, int]:
    height, width = load_image(sample.path, config).shape[:2]
    return height, width


def find_categories(
    root: Path, names: Sequence[str] | None = None, *, anomalous: Path | None = None, masks: Path | None = None
) -> list[Category]:
    """Finds what there is to train and test on.

    Args:
        root: a folder of categories in MVTec AD's layout (``train/good``, ``test/<defect>``, and masks as
            ``ground_truth/<defect>/<stem>_mask.png``), one such category, or a folder of good images.
        names: categories to take, in this order; None = all, by name.
        anomalous: with a plain folder, defective images; a seeded fifth of the good ones then becomes test images.
        masks: with ``anomalous``, a folder of their masks, found by stem (with or without ``_mask``).

    Raises:
        BKDError: no such folder, no images, an unknown category (the message lists those there are and the closest).
    """
    root = Path(root)
    if not root.is_dir():
        raise BKDError(f"there is no folder {root}: expected a data set, or a folder of good images")
    if _is_category(root):
        found = {root.resolve().name: root}
    else:
        found = {path.name: path for path in sorted(root.iterdir()) if _is_shown(path) and _is_category(path)}
    if not found:
        return [_plain(root, names, anomalous, masks)]
    if anomalous is not None or masks is not None:
        raise BKDError(
            f"{root} is in MVTec AD's layout and brings its own test images: leave out --anomalous and --masks"
        )
    for name in names or ():
        if name not in found:
            raise BKDError(_unknown(root, name, list(found)))
    return [_category(name, found[name]) for name in names or found]


def check_samples(
    samples: Sequence[Sample], *, skip_unreadable: bool = False, config: DataConfig = DEFAULT
) -> list[Sample]:
    """Decodes every image and mask once, so that a bad file is known before any work is done.

    Args:
        skip_unreadable: leave undecodable images out, with a warning that names them.
        config: how pixels are read.

    Returns:
        The usable samples.

    Raises:
        ImageError: images that cannot be decoded, by name. BKDError: a mask whose size differs from its image's.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = list(pool.map(_problem, samples, repeat(config)))
    broken = [problem for problem in problems if problem is not None]
    if broken and not skip_unreadable:
        shown = "; ".join(broken[:5]) + (f"; and {len(broken) - 5} more" if len(broken) > 5 else "")
        raise ImageError(
            f"{len(broken)} of {len(samples)} images cannot be used: {shown}. Mend them, or --skip-unreadable"
        )
    for problem in broken:
        log.warning("skipped: %s", problem)
    return [sample for sample, problem in zip(samples, problems, strict=True) if problem is None]


def split_normals(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Divide normal images at random, the same for a seed: those to train on, and those kept for validation.

    At least one is kept.

    Raises:
        BKDError: fewer than two images.
    """
    if len(samples) < 2:
        raise BKDError(
            f"{len(samples)} training image(s): expected at least 2 normal images, one to learn from and one for "
            "the threshold"
        )
    held = min(len(samples) - 1, max(1, round(share * len(samples))))
    chosen = set(torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:held].tolist())
    kept = [sample for index, sample in enumerate(samples) if index not in chosen]
    return kept, [sample for index, sample in enumerate(samples) if index in chosen]


def _is_shown(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".")  # notebooks leave .ipynb_checkpoints full of images


def _is_category(folder: Path) -> bool:
    return (folder / "train" / GOOD).is_dir()


def _category(name: str, folder: Path) -> Category:
    train = tuple(Sample(path, 0, GOOD) for path in image_files(folder / "train" / GOOD))
    if not train:
        raise BKDError(f"there are no images in {folder / 'train' / GOOD}: expected pictures of good parts")
    test = []
    kinds = folder / "test"
    for kind in sorted(path for path in kinds.iterdir() if _is_shown(path)) if kinds.is_dir() else ():
        masks = _by_stem(folder / "ground_truth" / kind.name)
        for path in image_files(kind):
            if kind.name == GOOD:
                test.append(Sample(path, 0, GOOD))
            else:
                test.append(Sample(path, 1, kind.name, masks.get(path.stem)))
    return Category(name, train, tuple(test))


def _plain(root: Path, names: Sequence[str] | None, anomalous: Path | None, masks: Path | None) -> Category:
    name = root.resolve().name
    for other in names or ():
        if other != name:
            raise BKDError(_unknown(root, other, [name]))
    given = [folder.resolve() for folder in (anomalous, masks) if folder is not None]
    apart = [folder for folder in given if root.resolve() in folder.parents]
    good = [
        Sample(path, 0, GOOD)
        for path in image_files(root)
        if not any(path.resolve().is_relative_to(folder) for folder in apart)
    ]
    if not good:
        raise BKDError(
            f"there are no images in {root}: expected good images, "
            "or categories with a train/good folder (MVTec AD's layout)"
        )
    if anomalous is None:
        if masks is not None:
            raise BKDError(f"masks {masks} were given without defective images: add --anomalous DIR")
        return Category(name, tuple(good), ())
    for folder in (anomalous, masks):
        if folder is not None and not folder.is_dir():
            raise BKDError(f"there is no folder {folder}")
    by_stem = {} if masks is None else _by_stem(masks)
    bad = [Sample(path, 1, "anomalous", by_stem.get(path.stem)) for path in image_files(anomalous)]
    if not bad:
        raise BKDError(f"there are no images in {anomalous}: expected pictures of defective parts")
    train, test = split_normals(good, PLAIN_TEST_SHARE, 0)
    return Category(name, tuple(train), (*test, *bad))


def _by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem.removesuffix("_mask"): path for path in image_files(folder)} if folder.is_dir() else {}


def _unknown(root: Path, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{root} has no category {name!r}{hint} It has: {', '.join(known)}"


def _problem(sample: Sample, config: DataConfig) -> str | None:
    """What is wrong with an image file, or None. A mask that does not fit is an error whatever is skipped."""
    try:
        size = load_image(sample.path, config).shape[:2]
    except ImageError as error:
        return str(error)
    if sample.mask is not None:
        other = load_mask(sample.mask, config).shape
        if other != size:
            raise BKDError(
                f"the mask {sample.mask} is {other[1]} x {other[0]} pixels and its image {sample.path} "
                f"{size[1]} x {size[0]}: they must be of one size"
            )
    return None
