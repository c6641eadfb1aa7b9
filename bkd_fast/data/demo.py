"""The built-in data set: textures of real photographs with planted defects, in MVTec AD's layout."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from bkd_fast.data.defects import DEFECTS
from bkd_fast.errors import BKDError
from bkd_fast.files import write_json

CATEGORIES = ("brick", "grass", "gravel")
SIDE = 256  # pixels of an image
CROP = 340  # pixels of the photograph that an image shows, before scale and rotation
MARKER = "demo.json"
VERSION = 1  # of the recipe; another one is another data set


def make_demo(root: str | Path, *, seed: int = 0, train: int = 60, good: int = 20, bad: int = 5) -> Path:
    """Makes the data set, or finds it made; the same bytes for the same arguments.

    Images are crops of scikit-image's photographs of brick, grass and gravel, with natural variation: place, scale, a
    small turn, lighting, focus and sensor noise. As on a production line, training and test images show the same kind
    of surface, here the same photograph in other crops. Defects are planted before lighting, focus and noise.

    Args:
        root: folder to make; must be new, empty, or hold this very set.
        seed: of everything random.
        train: normal training images a category.
        good: normal test images a category.
        bad: test images of each kind of defect a category.

    Returns:
        ``root``.

    Raises:
        BKDError: scikit-image is not installed, or ``root`` holds something else.
    """
    root = Path(root)
    recipe = {"version": VERSION, "seed": seed, "train": train, "good": good, "bad": bad}
    if _recipe(root / MARKER) == recipe:
        return root
    if root.is_file():
        raise BKDError(f"{root} is a file: expected a folder to make the demo set in")
    if root.exists() and any(root.iterdir()):
        raise BKDError(f"the folder {root} is not empty and not this demo set: choose another, or delete it")
    photographs = _photographs()
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        for index, name in enumerate(CATEGORIES):
            others = [photographs[other] for other in CATEGORIES if other != name]
            _make_category(temporary / name, photographs[name], others, [seed, index], train, good, bad)
        write_json(temporary / MARKER, recipe)
        temporary.chmod(0o755)
        if root.exists():
            root.rmdir()
        temporary.rename(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _recipe(marker: Path) -> object:
    """What a demo set was made with; None where there is none, or a file of that name that is something else."""
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _photographs() -> dict[str, np.ndarray]:
    try:
        data = import_module("skimage.data")
    except ModuleNotFoundError as error:
        raise BKDError("the demo set is made from scikit-image's photographs: pip install 'bkd_fast[demo]'") from error
    return {name: getattr(data, name)().astype(float) for name in CATEGORIES}


def _make_category(
    folder: Path, photograph: np.ndarray, others: list[np.ndarray], seed: list[int], train: int, good: int, bad: int
) -> None:
    for split, (place, count) in enumerate((("train/good", train), ("test/good", good))):
        for index in range(count):
            random = np.random.default_rng([*seed, split, index])
            _save(folder / place / f"{index:03}.png", _photographed(_crop(photograph, random), random))
    for kind, (name, plant) in enumerate(DEFECTS.items()):
        for index in range(bad):
            random = np.random.default_rng([*seed, 2 + kind, index])
            clean = _crop(photograph, random)
            other = _crop(others[index % len(others)], random)
            image, mask = plant(clean, other, random)
            _save(folder / "test" / name / f"{index:03}.png", _photographed(image, random))
            _save(folder / "ground_truth" / name / f"{index:03}_mask.png", mask * 255.0)


def _crop(source: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE) float, from a random place, at 0.96 to 1.04 times its scale, turned by up to 2 degrees."""
    side = CROP * random.uniform(0.96, 1.04)
    angle = np.radians(random.uniform(-2, 2))
    reach = 0.5 * side * (np.cos(angle) + abs(np.sin(angle)))  # so that no corner leaves the source
    centre = [random.uniform(reach, length - 1 - reach) for length in source.shape]
    steps = (np.arange(SIDE) + 0.5) / SIDE * side - side / 2
    y, x = np.meshgrid(steps, steps, indexing="ij")
    rows = centre[0] + y * np.cos(angle) - x * np.sin(angle)
    columns = centre[1] + y * np.sin(angle) + x * np.cos(angle)
    return ndimage.map_coordinates(source, [rows, columns], order=1, mode="mirror")


def _photographed(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Lighting, focus and sensor noise of one shot: (SIDE, SIDE) float in 0 to 255."""
    ramp = np.linspace(-1, 1, SIDE)
    shade = 1 + random.uniform(-0.04, 0.04) * ramp[:, None] + random.uniform(-0.04, 0.04) * ramp[None, :]
    lit = np.clip(image * shade * random.uniform(0.95, 1.05) + random.uniform(-5, 5), 0, 255)
    lit = 255 * (lit / 255) ** random.uniform(0.97, 1.03)
    focused = ndimage.gaussian_filter(lit, random.uniform(0.3, 0.6))
    return np.clip(focused + random.normal(0, random.uniform(1, 2), image.shape), 0, 255)


def _save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(image).astype(np.uint8)).save(path)
