"""Public data sets: check a download, and arrange it in MVTec AD's layout. Nothing is downloaded here."""

from __future__ import annotations

import csv
import errno
import hashlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from bkd_fast.data.dataset import GOOD, image_files
from bkd_fast.data.image import SUFFIXES, load_image, load_mask
from bkd_fast.data.progress import counted, progress_bar
from bkd_fast.errors import BKDError, ImageError, check_choice, few
from bkd_fast.files import PREFIX, fitting, is_empty, locked, write_json

Counts = Mapping[str, tuple[int, int]]  # images in train, images in test


def _read_counts() -> dict[str, Counts]:
    """Return the file counts of the original data sets, ``public.csv``.

    VisA's training images are nine tenths of the normal ones that its authors state; they sum to their 10,821.
    """
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    with open(Path(__file__).with_name("public.csv"), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            counts.setdefault(row["set"], {})[row["part"]] = int(row["train"]), int(row["test"])
    return {**counts}


COUNTS = _read_counts()
MTD_TEST_SHARE = 0.2  # of the good images; of 952 that leaves 761 for training, as many as in DifferNet's split
VISA_SPLIT, VISA_COLUMNS = "split_csv/1cls.csv", ("object", "split", "label", "image", "mask")


@dataclass(frozen=True)
class Item:
    """An image of a download, and where it belongs.

    Attributes:
        category, split, kind: of MVTec AD's layout: ``category/split/kind``; the kind of a good image is ``good``.
        image, mask: files of the download. A good image may have a mask, which should be empty.
        part: what the set counts by; empty: the category.
    """

    category: str
    split: str
    kind: str
    image: Path
    mask: Path | None = None
    part: str = ""

    @property
    def target(self) -> Path:
        """The image's path in the arranged set."""
        return Path(self.category, self.split, self.kind, self.image.name)

    def mask_target(self, suffix: str) -> Path:
        """Return the mask's path in the arranged set."""
        return Path(self.category, "ground_truth", self.kind, f"{self.image.stem}_mask{suffix}")


@dataclass(frozen=True)
class PublicSet:
    """A public data set.

    Attributes:
        title: its name.
        page: where its authors offer it.
        licence: under which they do.
        layout: what an unpacked download has, in words.
        items: lists a download; empty where it is another folder.
        parts: what it is counted by: categories, or folders.
        total: published images for training and for testing.
        counts: the same of each part; empty: not known for sure.
        labels: masks hold labels of kinds of defects instead of colours; they are written again in black and white.
        split: how training and test images are told apart, if the set does not say.
    """

    title: str
    page: str
    licence: str
    layout: str
    items: Callable[[Path], list[Item]]
    parts: tuple[str, ...]
    total: tuple[int, int]
    counts: Counts = field(default_factory=dict)
    labels: bool = False
    split: str = ""

    def about(self) -> str:
        """Return where to get the set, its licence, and what is expected, as text."""
        train, test = self.total
        lines = [
            f"{self.title}: {train:,} training and {test:,} test images in {few(self.parts, count=15)}",
            f"download: {self.page}",
            f"licence: {self.licence}",
            f"expected: {self.layout}",
        ]
        return "\n".join([*lines, f"split: {self.split}"] if self.split else lines)


class Check(NamedTuple):
    """The usable images of a download, what is wrong with the others, and what else is not as expected."""

    items: list[Item]
    problems: list[str]
    notes: list[str]


def check_download(name: str, source: str | Path, *, progress: bool | None = None) -> Check:
    """Decode every image and mask of a download, and compare it with what was published.

    Args:
        name: of :data:`SETS`.
        source: the unpacked download.
        progress: show a progress bar; None: in a terminal or a notebook, else a line now and then.

    Returns:
        The usable images. Problems are images and masks that are missing, cannot be decoded or do not fit. Notes are
        missing parts, other counts than published, image files that are not part of the set, empty masks, and
        masks of good images that are not empty.

    Raises:
        BKDError: an unknown name, no such folder, or one that does not look like the set.
    """
    known = SETS[check_choice("the data set", name, tuple(SETS))]
    source = Path(source)
    if not source.is_dir():
        raise BKDError(f"there is no folder {source}: expected {known.title}, unpacked. Get it from {known.page}")
    items = known.items(source)
    if not items:
        inner = [path for path in sorted(source.iterdir()) if path.is_dir() and known.items(path)]
        hint = f"{inner[0]} does: pass that" if inner else f"get it from {known.page}"
        raise BKDError(f"{source} does not look like {known.title}, which has {known.layout}; {hint}")
    with ThreadPoolExecutor(max_workers=4) as pool:
        bar = progress_bar(len(items), "checking", "image", progress)
        checked = list(counted(pool.map(partial(_checked, labels=known.labels), items), bar))
    twice = {target for target, count in Counter(map(_identity, items)).items() if count > 1}
    problems = [
        f"{item.image} has the name of another image" if _identity(item) in twice else problem
        for item, (problem, _) in zip(items, checked, strict=True)
    ]
    usable = [item for item, problem in zip(items, problems, strict=True) if problem is None]
    notes = _differences(known, items)
    used = {os.path.realpath(path) for item in items for path in (item.image, item.mask) if path is not None}
    others = [path for path in image_files(source) if os.path.realpath(path) not in used]
    if others:
        notes.append(f"{len(others)} image file(s) are not part of the set: {few(others)}")
    odd: dict[str, list[Path | None]] = {}
    for item, (_, remark) in zip(items, checked, strict=True):
        if remark is not None:
            odd.setdefault(remark, []).append(item.mask)
    notes += [f"{len(masks)} mask(s) {remark}: {few(masks)}" for remark, masks in odd.items()]
    return Check(usable, [problem for problem in problems if problem is not None], notes)


def arrange(name: str, items: Sequence[Item], out: str | Path, *, copy: bool = False) -> str:
    """Write images into a new folder in MVTec AD's layout, which appears when it is complete.

    Files become hard links, or copies where the file system has none. ``dataset.json`` says where the set is from.

    Args:
        name: of :data:`SETS`.
        items: of :func:`check_download`.
        out: a new or empty folder.
        copy: copy all files: whoever changes a hard link changes the download.

    Returns:
        One line for the user: how many images, and whether they are links.

    Raises:
        BKDError: no images, or an ``out`` that is not empty or in use.
    """
    known, out = SETS[check_choice("the data set", name, tuple(SETS))], Path(out)
    if not items:
        raise BKDError(f"there are no usable images of {known.title} to arrange")
    _check_free(out)
    stage = fitting(out.absolute().parent / f"{PREFIX}{out.absolute().name}")
    try:
        with locked(stage):
            whole = stage / "data"
            shutil.rmtree(whole, ignore_errors=True)  # of a killed process
            try:
                links = [_place(item.image, whole / item.target, copy) for item in items]
                for item in items:
                    if item.kind != GOOD and item.mask is not None:
                        _place_mask(item, whole, known.labels, copy)
                content = {"data_set": known.title, "page": known.page, "licence": known.licence}
                counts = {part: {"train": train, "test": test} for part, (train, test) in count(items).items()}
                write_json(whole / "dataset.json", {**content, "split": known.split or None, "images": counts})
                _check_free(out)
                if out.is_dir():
                    out.rmdir()
                os.rename(whole, out)
            finally:
                shutil.rmtree(whole, ignore_errors=True)
    finally:
        with suppress(OSError):
            stage.rmdir()
    how = "hard links" if all(links) else "copies" if not any(links) else "hard links and copies"
    return f"{out}: {len(items):,} images ({how})"


def count(items: Sequence[Item]) -> dict[str, tuple[int, int]]:
    """Return the images for training and for testing of each part."""
    train, test = (
        Counter(item.part or item.category for item in items if (item.split == "train") is wanted)
        for wanted in (True, False)
    )
    return {part: (train[part], test[part]) for part in dict.fromkeys([*train, *test])}


def _tree(root: Path, categories: Sequence[str], good: str) -> list[Item]:
    """List categories with the folders ``train/GOOD``, ``test/KIND`` and ``ground_truth/KIND``."""
    items = []
    for category in categories:
        folder = root / category
        items += [Item(category, "train", GOOD, path) for path in _images(folder / "train" / good)]
        test = folder / "test"
        for kind in sorted(test.glob("[!.]*")):
            masks = {path.stem.removesuffix("_mask"): path for path in _images(folder / "ground_truth" / kind.name)}
            name = GOOD if kind.name == good else kind.name
            items += [Item(category, "test", name, path, masks.get(path.stem)) for path in _images(kind)]
    return items


def _visa(root: Path) -> list[Item]:
    """List what the authors' table of the one-class split names."""
    table = root / VISA_SPLIT
    if not table.is_file():
        return []
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BKDError(f"{table} is not a table ({error}): get it again") from error
    if missing := [column for column in VISA_COLUMNS if column not in columns]:
        raise BKDError(f"{table} has the columns {few(columns)}: {', '.join(missing)} is missing")
    return [_visa_item(root, f"{table}, line {line}", row) for line, row in rows]


def _visa_item(root: Path, where: str, row: Mapping[str, str | None]) -> Item:
    category, split, label, image, mask = (row[column] or "" for column in VISA_COLUMNS)
    if category not in COUNTS["visa"] or split not in ("train", "test") or label not in ("normal", "anomaly"):
        raise BKDError(
            f"{where} is {category!r}, {split!r}, {label!r}: expected an object of VisA, train or test, and normal or "
            "anomaly"
        )
    if label == "anomaly" and split == "train":
        raise BKDError(f"{where} trains on an anomalous image: expected the one-class split")
    for path in filter(None, (image, mask)):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path:
            raise BKDError(f"{where} names {path!r}: expected a path in the download")
    if not image:
        raise BKDError(f"{where} names no image")
    kind = GOOD if label == "normal" else "bad"
    return Item(category, split, kind, root / image, root / mask if mask else None)


def _mtd(root: Path) -> list[Item]:
    """List the folders of magnetic tiles; a share of the good images, by the hash of their names, is for testing."""
    items = []
    for part in COUNTS["mtd"]:
        files = _images(root / part / "Imgs")
        masks = {path.stem: path for path in files if path.suffix.lower() == ".png"}
        images = [path for path in files if path.suffix.lower() != ".png"]
        kind, test = part.removeprefix("MT_").lower(), set(images)
        if part == "MT_Free":
            kind = GOOD
            hashed = sorted(images, key=lambda path: hashlib.sha256(path.name.encode()).hexdigest())
            test = set(hashed[: math.ceil(MTD_TEST_SHARE * len(images))])
        items += [
            Item("mtd", "test" if path in test else "train", kind, path, masks.get(path.stem), part) for path in images
        ]
    return items


SETS = {
    "mvtec": PublicSet(
        title="MVTec AD",
        page="https://www.mvtec.com/company/research/datasets/mvtec-ad",
        licence="CC BY-NC-SA 4.0, not for commercial use",
        layout="a folder a category with train/good, test/KIND and ground_truth/KIND",
        items=partial(_tree, categories=tuple(COUNTS["mvtec"]), good=GOOD),
        parts=tuple(COUNTS["mvtec"]),
        total=(3629, 1725),
        counts=COUNTS["mvtec"],
    ),
    "visa": PublicSet(
        title="VisA",
        page="https://github.com/amazon-science/spot-diff",
        licence="CC BY 4.0",
        layout=f"{VISA_SPLIT} and a folder an object with Data/Images and Data/Masks",
        items=_visa,
        parts=tuple(COUNTS["visa"]),
        total=(8659, 2162),
        counts=COUNTS["visa"],
        labels=True,
        split=f"the authors' one-class split, {VISA_SPLIT}; all anomalous images are of the kind bad",
    ),
    "btad": PublicSet(
        title="BTAD",
        page="http://avires.dimi.uniud.it/papers/btad/btad.zip",
        licence="CC BY-SA (its README)",
        layout="the folders 01, 02 and 03 with train/ok, test/ok, test/ko and ground_truth/ko",
        items=partial(_tree, categories=("01", "02", "03"), good="ok"),
        parts=("01", "02", "03"),
        total=(1799, 741),
    ),
    "mpdd": PublicSet(
        title="MPDD",
        page="https://github.com/stepanje/MPDD",
        licence="none on its page: ask the authors, and cite them",
        layout="a folder a category with train/good, test/KIND and ground_truth/KIND",
        items=partial(_tree, categories=tuple(COUNTS["mpdd"]), good=GOOD),
        parts=tuple(COUNTS["mpdd"]),
        total=(888, 458),
        counts=COUNTS["mpdd"],
    ),
    "mtd": PublicSet(
        title="MTD",
        page="https://github.com/abin24/Magnetic-tile-defect-datasets.",
        licence="none on its page: ask the authors, and cite them",
        layout="the folders MT_Free, MT_Blowhole, … with Imgs/*.jpg and their masks, Imgs/*.png",
        items=_mtd,
        parts=tuple(COUNTS["mtd"]),
        total=(761, 583),
        counts=COUNTS["mtd"],
        split=f"{MTD_TEST_SHARE:.0%} of the good images are for testing: those whose names have the smallest SHA-256",
    ),
}


def _images(folder: Path) -> list[Path]:
    """Return the image files in a folder, sorted; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _is_image(path))


def _is_image(path: Path) -> bool:
    return not path.name.startswith(".") and path.suffix.lower() in SUFFIXES and path.is_file()


def _identity(item: Item) -> tuple[str, str, str, str]:
    """Return what names an item in the arranged set; of defective images the stem, by which masks are found."""
    return item.category, item.split, item.kind, item.image.name if item.kind == GOOD else item.image.stem


def _checked(item: Item, labels: bool) -> tuple[str | None, str | None]:
    """Return what is wrong with an image or the mask of a defect, and what is odd about a mask; None for nothing."""
    try:
        size = load_image(item.image).shape[:2]
    except ImageError as error:
        return str(error), None
    good = item.kind == GOOD
    if item.mask is None:
        return (None if good else f"{item.image} has no mask"), None
    try:
        truth = load_mask(item.mask, labels=labels)
    except ImageError as error:
        return (None, "of good images cannot be decoded") if good else (str(error), None)
    if good:
        return None, "of good images mark something" if truth.any() else None
    if truth.shape != size:
        own = f"{truth.shape[1]} x {truth.shape[0]} pixels"
        return f"the mask {item.mask} is {own} and its image {item.image} {size[1]} x {size[0]}", None
    return None, None if truth.any() else "mark nothing"


def _differences(known: PublicSet, items: Sequence[Item]) -> list[str]:
    """Return sentences on missing parts and on other counts than published."""
    counts = count(items)
    missing = [part for part in known.parts if part not in counts]
    notes = []
    if missing:
        notes.append(f"{len(missing)} of {len(known.parts)} folders are missing or empty: {few(missing, count=15)}")
    notes += [
        f"{part} has {own[0]:,} training and {own[1]:,} test images, published are {known.counts[part][0]:,} and "
        f"{known.counts[part][1]:,}"
        for part, own in counts.items()
        if part in known.counts and own != known.counts[part]
    ]
    total = tuple(map(sum, zip(*counts.values(), strict=True)))
    if not missing and not known.counts and total != known.total:
        notes.append(
            f"there are {total[0]:,} training and {total[1]:,} test images, published are {known.total[0]:,} and "
            f"{known.total[1]:,}"
        )
    return notes


def check_paths(source: Path, out: Path) -> None:
    """Check, before anything is read, that ``out`` is new or empty and apart from ``source``.

    Raises:
        BKDError: it is not.
    """
    _check_free(out)
    one, other = source.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise BKDError(f"the output folder {out} and the download {source} are in one another: choose another --out")


def _check_free(out: Path) -> None:
    if (out.exists() and not out.is_dir()) or not is_empty(out):
        raise BKDError(f"{out} is not an empty folder: choose another --out")


def _place(source: Path, target: Path, copy: bool) -> bool:
    """Link a file, or copy it; return whether it is a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        try:
            os.link(os.path.realpath(source), target)
            return True
        except OSError as error:  # another disk, or a file system without links
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EEXIST):
                raise
    shutil.copyfile(source, target)
    return False


def _place_mask(item: Item, whole: Path, labels: bool, copy: bool) -> None:
    assert item.mask is not None
    if not labels:
        _place(item.mask, whole / item.mask_target(item.mask.suffix), copy)
        return
    target = whole / item.mask_target(".png")
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(load_mask(item.mask, labels=True).astype(np.uint8) * 255).save(target)
