"""Which images a report shows, and how many of them as thumbnails."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from bkd_fast.errors import BKDError
from bkd_fast.evaluation.report.overlays import thumbnail
from bkd_fast.evaluation.report.records import ImageRecord

THUMBNAIL_WIDTH, INSIDE_WIDTH = 560, 1120  # pixels
BUDGET = 5_500_000  # characters of base64 in one page
EXPECTED = 48_000  # characters of one thumbnail, to share the budget between the categories
MIN_IMAGES, MAX_IMAGES = 4, 24  # thumbnails of one category
SHARES = {"Missed defects": 1 / 3, "False alarms": 1 / 3, "Found defects": 1 / 6, "Good images": 1 / 6}
UNLABELLED = {"Anomalous images": 3 / 4, "Normal images": 1 / 4}
WORST_FIRST = ("Missed defects", "False alarms", "Anomalous images")


class Card(NamedTuple):
    """An image with the link to its overlay, and that overlay as base64 JPEG; None where there is none to show."""

    image: ImageRecord
    link: str | None = None
    thumbnail: str | None = None


class Group(NamedTuple):
    """The cards chosen from the ``total`` images of one outcome."""

    outcome: str
    total: int
    cards: list[Card]


def by_outcome(images: Sequence[ImageRecord]) -> dict[str, list[ImageRecord]]:
    """Return the images under the four outcomes, by falling score; missed defects by rising score.

    Images without ground truth are under two: anomalous and normal.
    """
    unlabelled = any(image.label is None for image in images)
    outcomes: dict[str, list[ImageRecord]] = {name: [] for name in (UNLABELLED if unlabelled else SHARES)}
    for image in sorted(images, key=lambda image: -image.score):
        if unlabelled:
            outcomes["Anomalous images" if image.decision else "Normal images"].append(image)
        elif image.label:
            outcomes["Found defects" if image.decision else "Missed defects"].append(image)
        else:
            outcomes["False alarms" if image.decision else "Good images"].append(image)
    if not unlabelled:
        outcomes["Missed defects"].reverse()
    return outcomes


def chosen(outcomes: dict[str, list[ImageRecord]], count: int) -> dict[str, list[ImageRecord]]:
    """Return about ``count`` images: the worst misses and false alarms, and an even sample of the other outcomes.

    What an outcome leaves of its share goes to the next ones.
    """
    picked, spare = {}, 0.0
    for name, group in outcomes.items():
        share = {**SHARES, **UNLABELLED}[name] * count + spare
        number = min(len(group), max(1, int(share + 1e-9)))
        picked[name] = group[:number] if name in WORST_FIRST else _spread(group, number)
        spare = max(0.0, share - number)
    return picked


def _spread(group: list[ImageRecord], number: int) -> list[ImageRecord]:
    """Return ``number`` of the group, evenly from its first to its last."""
    return [group[round(index * (len(group) - 1) / max(1, number - 1))] for index in range(number)]


class Gallery:
    """Makes the cards of one page in ``folder``, within the page's budget."""

    def __init__(self, folder: Path, categories: int) -> None:
        self.folder = folder
        self.budget = BUDGET
        self.per_category = max(MIN_IMAGES, min(MAX_IMAGES, BUDGET // EXPECTED // max(1, categories)))

    def groups(self, images: Sequence[ImageRecord]) -> list[Group]:
        """Return the cards of one category, by outcome.

        Raises:
            BKDError: an overlay is missing or not an image.
        """
        outcomes = by_outcome(images)
        return [
            Group(name, len(outcomes[name]), [self._card(image, THUMBNAIL_WIDTH) for image in group])
            for name, group in chosen(outcomes, self.per_category).items()
            if group
        ]

    def inside(self, images: Sequence[ImageRecord]) -> list[Card]:
        """Return the cards that look inside the model. Raises as :meth:`groups`."""
        return [self._card(image, INSIDE_WIDTH) for image in images]

    def _card(self, image: ImageRecord, width: int) -> Card:
        if image.overlay is None:
            return Card(image)
        try:
            encoded = base64.b64encode(thumbnail(image.overlay, width)).decode()
        except OSError as error:
            raise BKDError(f"the overlay {image.overlay} of image {image.name} cannot be read ({error})") from error
        link = link_to(image.overlay, self.folder)
        if len(encoded) > self.budget:
            return Card(image, link)
        self.budget -= len(encoded)
        return Card(image, link, encoded)


def link_to(path: Path, folder: Path) -> str:
    """Return ``path`` as a link from a page in ``folder``: relative, so that the run folder can be moved."""
    try:
        return quote(os.fsencode(Path(os.path.relpath(path, folder)).as_posix()))
    except ValueError:  # another drive on Windows: no relative path exists
        return path.resolve().as_uri()
