"""What would stop or spoil a training, found before it starts: ``bkd-fast doctor``."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from bkd_fast.config import BKDConfig, DataConfig, RetrievedSupport
from bkd_fast.data import (
    Category,
    ImageDataset,
    find_categories,
    fit_roi,
    infer_white,
    load_image,
    load_roi,
    split_normals,
    to_tensor,
)
from bkd_fast.decisions import images_for
from bkd_fast.errors import BKDError, ImageError, few
from bkd_fast.evaluation.environment import describe
from bkd_fast.files import checksum
from bkd_fast.model import BKD
from bkd_fast.model.teacher import with_image_size
from bkd_fast.normals.thresholds import can_leave_out, near_duplicates
from bkd_fast.training.sampler import Schedule
from bkd_fast.training.weights import check_hub, found, load_weights

TRAINING = ("lightning_fabric", "sklearn", "jinja2")  # packages of the extra "train"
THUMBNAIL = (32, 32)
COMPARED = 2000  # images that are compared with each other for near duplicates
NAMED = 3  # files that a line names
T = TypeVar("T")


class Finding(NamedTuple):
    """One line of the table. ``stop``: a training would not start or not end; ``warning``: look at it first."""

    topic: str
    state: Literal["ok", "warning", "stop"]
    text: str


class Picture(NamedTuple):
    """An image file: (H, W), Pillow's mode and format, SHA-256 of the file, and a small version as a row."""

    path: Path
    size: tuple[int, int]
    mode: str
    format: str
    digest: str
    thumbnail: torch.Tensor


def examine(data: Path | None, config: BKDConfig, out: Path = Path()) -> list[Finding]:
    """Return what there is to say of this machine, the teacher and, unless ``data`` is None, the images.

    Args:
        data: as :func:`bkd_fast.train` takes it.
        out: a folder on the disk that the run would be written to.
    """
    findings = list(_machine())
    model, problems = _model(config)
    findings += problems
    categories: list[Category] = []
    if data is not None:
        try:
            categories = find_categories(data)
        except BKDError as error:
            findings.append(Finding("data", "stop", str(error)))
    roi = None
    if config.roi is not None:
        try:
            path = Path(config.roi.mask or "")
            roi = None if path.is_dir() else load_roi(path, config.data)
        except BKDError as error:
            findings.append(Finding("roi", "stop", str(error)))
    images = max((len(category.train) for category in categories), default=0)
    if model is not None:
        findings += [_memory(model, images), _disk(model, images, out)]
    for category in categories:
        findings += _category(category, config, model, roi)
    return findings


def table(findings: Sequence[Finding]) -> str:
    """Return the findings as a table with a line each."""
    wide = max(len(finding.topic) for finding in findings)
    return "\n".join(f"{state:<7}  {topic:<{wide}}  {text}" for topic, state, text in findings)


def _machine() -> Iterator[Finding]:
    facts = describe()
    versions = ", ".join(f"{name} {facts['packages'][name]}" for name in ("torch", "timm"))
    yield Finding("versions", "ok", f"bkd_fast {facts['bkd_fast']}, Python {facts['python']}, {versions}")
    lacking = [name for name in TRAINING if importlib.util.find_spec(name) is None]
    if lacking:
        yield Finding("packages", "stop", f"{', '.join(lacking)} missing: pip install 'bkd_fast[train]'")
    devices = facts["cuda"]["devices"]
    kernels = f"CPU {facts['cpu']['kernels']}, {facts['cpu']['threads']} threads"
    if devices:
        kernels += f"; {', '.join(devices)}: CUDA {facts['cuda']['kernels']}, Triton {facts['cuda']['triton_kernels']}"
    compiled = facts["cpu"]["kernels"] != "none"
    yield Finding(
        "kernels",
        "ok" if compiled else "warning",
        kernels if compiled else f"{kernels}: not compiled, so plain PyTorch computes, several times slower",
    )


def _model(config: BKDConfig) -> tuple[BKD | None, list[Finding]]:
    """Return the network, or None, and what is to say of the teacher. Weights of the hub are not downloaded."""
    name, weights, findings = config.teacher.name, None, []
    try:
        config = config.with_changes(teacher=with_image_size(config.teacher))
        BKD(config, weights=None)
    except BKDError as error:
        return None, [Finding("teacher", "stop", str(error))]
    try:
        if config.teacher.weights == "auto" and found(name) is None:
            check_hub(name)
            findings = [Finding("weights", "ok", "timm's hub has them, and answers")]
        else:
            weights = load_weights(config.teacher)
            findings = [Finding("weights", "ok", weights.source if weights else "none: random ones, for tests")]
        model = BKD(config, weights=weights)
    except BKDError as error:
        model, findings = BKD(config, weights=None), [Finding("weights", "stop", str(error))]
    height, width = config.teacher.size
    strides = ", ".join(map(str, model.teacher.strides))
    text = f"{name}, {height} x {width} pixels, levels at strides {strides}"
    return model.eval(), [Finding("teacher", "ok", text), *findings]


def _memory(model: BKD, images: int) -> Finding:
    """A training needs the network, the feature cache, the support bank and the memory's candidates."""
    own = sum(value.nbytes for value in model.state_dict().values())
    needed = 2 * own + min(2e9, images * _feature_bytes(model)) + _bank_bytes(model, images) + 1e9
    available = _available()
    if available is None:
        return Finding("memory", "ok", f"about {needed / 1e9:.1f} GB needed; what is free is unknown here")
    text = f"about {needed / 1e9:.1f} GB needed, {available / 1e9:.1f} GB free"
    if needed < available:
        return Finding("memory", "ok", text)
    return Finding("memory", "warning", f"{text}: lower --cache-gb, support.bank_size or the image size")


def _available() -> float | None:
    """Return how many bytes of memory a program can have, as Linux says it; None elsewhere."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _disk(model: BKD, images: int, out: Path) -> Finding:
    needed = sum(value.nbytes for value in model.state_dict().values()) + _bank_bytes(model, images)
    existing = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    text = f"about {needed / 1e6:.0f} MB for a run, {free / 1e6:.0f} MB free in {existing}"
    return Finding("disk", "ok" if needed < free else "stop", text)


def _feature_bytes(model: BKD) -> int:
    """Bytes of an image's teacher levels in half precision."""
    return 2 * sum(c * h * w for c, h, w in model.teacher.shapes(model.config.teacher.size))


def _bank_bytes(model: BKD, images: int) -> int:
    support = model.config.support
    if support is None:
        return 0
    kept = support.bank_size if isinstance(support, RetrievedSupport) else support.shots
    return min(kept, images) * _feature_bytes(model)


def _category(category: Category, config: BKDConfig, model: BKD | None, roi: np.ndarray | None) -> Iterator[Finding]:
    def line(state: Literal["ok", "warning", "stop"], text: str) -> Finding:
        return Finding(category.name, state, text)

    paths = [sample.path for sample in category.train]
    try:
        config = replace(config, data=infer_white(paths, config.data))
    except BKDError as error:
        yield line("stop", str(error))
        return
    with ThreadPoolExecutor(max_workers=4) as pool:
        seen = list(pool.map(partial(_look, reading=config.data, roi=roi), paths))
    broken = [one for one in seen if isinstance(one, ImageError)]
    pictures = [one for one in seen if isinstance(one, Picture)]
    if broken:
        yield line("stop", f"{len(broken)} images cannot be read: {few([str(error) for error in broken], count=NAMED)}")
    if not pictures:
        return
    formats = ", ".join(f"{count} {name}" for name, count in Counter(one.format for one in pictures).most_common())
    heights, widths = zip(*(one.size for one in pictures), strict=True)
    sizes = f"{min(heights)} x {min(widths)}"
    if len({one.size for one in pictures}) > 1:
        sizes += f" to {max(heights)} x {max(widths)}"
    yield line("ok", f"{len(pictures)} good images to learn from, {formats}, {sizes} pixels")
    for what, of in (("size", lambda one: one.size), ("mode", lambda one: one.mode)):
        odd, usual = _odd(pictures, of)
        if odd:
            shown = f"{usual[0]} x {usual[1]}" if isinstance(usual, tuple) else usual
            yield line("warning", f"{len(odd)} of another {what} than {shown}: {few(odd, count=NAMED)}")
    yield from _copies(pictures, line)
    yield from _enough(len(pictures), config, model, line)
    if model is not None:
        yield from _start(category, pictures, config, model, roi, line)


def _look(path: Path, reading: DataConfig, roi: np.ndarray | None) -> Picture | ImageError:
    try:
        image = load_image(path, reading)
        if roi is not None:
            fit_roi(roi, image.shape[:2], path)
    except ImageError as error:
        return error
    with Image.open(path) as opened:
        mode, kind = opened.mode, opened.format or path.suffix
    digest = checksum(path)
    return Picture(path, image.shape[:2], mode, kind, digest, to_tensor(image, THUMBNAIL).flatten())


def _odd(pictures: Sequence[Picture], of: Callable[[Picture], T]) -> tuple[list[str], T]:
    """Return the images that are unlike most, if most are alike, and what these have."""
    usual, count = Counter(map(of, pictures)).most_common(1)[0]
    if 2 * count <= len(pictures):
        return [], usual
    return [one.path.name for one in pictures if of(one) != usual], usual


def _copies(pictures: Sequence[Picture], line: Callable[..., Finding]) -> Iterator[Finding]:
    first: dict[str, Path] = {}
    copies = [one for one in pictures if first.setdefault(one.digest, one.path) is not one.path]
    if copies:
        names = [f"{one.path.name} = {first[one.digest].name}" for one in copies]
        yield line("warning", f"{len(copies)} duplicates: {few(names, count=NAMED)}")
    different = [one for one in pictures if first[one.digest] is one.path][:COMPARED]
    same = near_duplicates(torch.stack([one.thumbnail for one in different]))
    pairs = [(int(row), int(column)) for row, column in same.triu(1).nonzero()]
    if pairs:
        names = [f"{different[row].path.name} ~ {different[column].path.name}" for row, column in pairs]
        yield line("warning", f"{len(pairs)} pairs of near duplicates, of one part each?: {few(names, count=NAMED)}")


def _enough(count: int, config: BKDConfig, model: BKD | None, line: Callable[..., Finding]) -> Iterator[Finding]:
    """Whether there are enough good images for the rate of false alarms that is asked for; see ``threshold_for``."""
    asked = config.training.false_alarms
    scored = count
    if model is not None and not can_leave_out(model):  # thresholds come from the validation images alone
        scored = max(1, round(config.training.validation_share * count))
    needed = images_for(asked)
    text = f"{scored} scores of good images for thresholds; {100 * asked:g} % false alarms take {needed}"
    if scored >= needed:
        yield line("ok", text)
    else:
        yield line("warning", f"{text}: expect about {100 / (scored + 1):.2g} %, or add images")


def _start(
    category: Category,
    pictures: Sequence[Picture],
    config: BKDConfig,
    model: BKD,
    roi: np.ndarray | None,
    line: Callable[..., Finding],
) -> Iterator[Finding]:
    """What training itself asks of the images, and how long the teacher takes for them here."""
    usable = {one.path for one in pictures}
    samples = [sample for sample in category.train if sample.path in usable]
    size, items = model.config.teacher.size, len(samples)
    try:
        train, _ = split_normals(samples, config.training.validation_share, config.training.seed)
        if config.teacher.tile:
            items = len(ImageDataset(samples, size, config.teacher.tile, config.data, roi))
        Schedule(len(train), config)
    except BKDError as error:
        yield line("stop", str(error))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, images = model.teacher.to(device), torch.rand(4, 3, *size, device=device)
    teacher.raw(images)  # kernels are chosen in the first run
    started = time.perf_counter()
    [level.sum().item() for level in teacher.raw(images)]  # which waits for a GPU
    each = (time.perf_counter() - started) / len(images)
    learned = model.learned_branches()
    more = f"; up to {config.training.epochs} epochs of {', '.join(learned)} follow" if learned else ""
    what = "tiles" if config.teacher.tile else "images"
    yield line(
        "ok", f"the teacher takes about {items * each:.0f} s for {items} {what} on {device.type}, matching more{more}"
    )
