"""Which images a report shows, and how they are put into the page."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from bkd_fast.errors import BKDError
from bkd_fast.evaluation.report.overlays import thumbnail
from bkd_fast.evaluation.report.records import ImageRecord

THUMBNAIL_WIDTH, INSIDE_WIDTH = 560, 1120
BUDGET = 5_500_000  # characters of base64 in one page
EXPECTED = 48_000  # characters of one thumbnail, to share the budget between the categories
MOST, LEAST = 24, 4  # thumbnails of one category
INSIDE = (
    "One image of each outcome. First row: distance of each branch and level from the query, in units of its mean on "
    "validation images. Then the offsets (arrows point to where the support is fetched from), and the distance of "
    "the support before and after alignment. Last, the memory: a colour for the item that counts most, and how many "
    "items each feature is read from."
)
SHARES = {"Missed defects": 1 / 3, "False alarms": 1 / 3, "Found defects": 1 / 6, "Good images": 1 / 6}


def by_kind(images: Sequence[ImageRecord]) -> dict[str, list[ImageRecord]]:
    """The images under the four outcomes: misses from the lowest score up, all others from the highest down."""
    kinds: dict[str, list[ImageRecord]] = {name: [] for name in SHARES}
    for image in sorted(images, key=lambda image: -image.score):
        if image.label:
            kinds["Found defects" if image.decision else "Missed defects"].append(image)
        else:
            kinds["False alarms" if image.decision else "Good images"].append(image)
    kinds["Missed defects"].reverse()
    return kinds


def chosen(kinds: dict[str, list[ImageRecord]], count: int) -> dict[str, list[ImageRecord]]:
    """About ``count`` images: the worst misses and false alarms, then a fair sample of what went well.

    What one kind leaves of its share goes to the kinds after it.
    """
    picked, spare = {}, 0.0
    for name, group in kinds.items():
        room = SHARES[name] * count + spare
        number = min(len(group), max(1, int(room + 1e-9)))
        picked[name] = group[:number] if name in ("Missed defects", "False alarms") else _spread(group, number)
        spare = max(0.0, room - number)
    return picked


def _spread(group: list[ImageRecord], number: int) -> list[ImageRecord]:
    """``number`` of the group, evenly from its first to its last."""
    if number < 2:
        return group[:number]
    return [group[round(index * (len(group) - 1) / (number - 1))] for index in range(number)]


class Gallery:
    """Writes the picture cards of one page that lies in ``folder``, within the page's budget."""

    def __init__(self, folder: Path, categories: int) -> None:
        self.folder = folder
        self.left = BUDGET
        self.per_category = max(LEAST, min(MOST, BUDGET // EXPECTED // max(1, categories)))

    def render(self, images: Sequence[ImageRecord], threshold: float) -> str:
        """The chosen images of one category under a heading for each kind.

        Raises:
            BKDError: an overlay that is not there or not an image.
        """
        kinds = by_kind(images)
        parts = []
        for kind, group in chosen(kinds, self.per_category).items():
            if group:
                cards = "".join(self._card(image, threshold) for image in group)
                heading = f"{kind} <small>{len(group)} of {len(kinds[kind])}</small>"
                parts.append(f'<h4>{heading}</h4><div class="cards">{cards}</div>')
        return "".join(parts)

    def inside(self, images: Sequence[ImageRecord], threshold: float) -> str:
        """Pictures of what happens inside the model, one under the other."""
        if not images:
            return ""
        cards = "".join(self._card(image, threshold, INSIDE_WIDTH) for image in images)
        return f'<h4>Inside the model</h4><p>{INSIDE}</p><div class="inside">{cards}</div>'

    def _card(self, image: ImageRecord, threshold: float, width: int = THUMBNAIL_WIDTH) -> str:
        wrong = bool(image.label) != bool(image.decision)
        verdict = "anomalous" if image.decision else "normal"
        caption = (
            f'<figcaption><b class="name">{escape(image.name)}</b>'
            f'<span class="truth-is">{escape(image.defect) if image.label else "good"}</span>'
            f"<span>score <b>{image.score:.4g}</b> {'&gt;' if image.decision else '≤'} {threshold:.4g}</span>"
            f'<span>called <b class="{"wrong" if wrong else "right"}">{verdict}</b></span></figcaption>'
        )
        return f'<figure class="card">{self._picture(image, width)}{caption}</figure>'

    def _picture(self, image: ImageRecord, width: int) -> str:
        if image.overlay is None:
            return '<div class="empty">no picture</div>'
        try:
            encoded = base64.b64encode(thumbnail(image.overlay, width)).decode()
        except OSError as error:
            raise BKDError(f"the overlay {image.overlay} of image {image.name} cannot be read ({error})") from error
        link = escape(_link(image.overlay, self.folder))
        if len(encoded) > self.left:
            return f'<a class="empty" href="{link}">open the picture</a>'
        self.left -= len(encoded)
        alternative = escape(f"{image.name}: image, heat map, outlines")
        return f'<a href="{link}"><img src="data:image/jpeg;base64,{encoded}" alt="{alternative}"></a>'


def _link(path: Path, folder: Path) -> str:
    """``path`` as a link from a page in ``folder``: relative, so that the run folder can be moved."""
    try:
        return quote(Path(os.path.relpath(path, folder)).as_posix())
    except ValueError:  # another drive on Windows: no relative path exists
        return path.resolve().as_uri()
