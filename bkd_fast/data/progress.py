"""How far a pass over images has come: a bar in a terminal or a notebook, elsewhere a line now and then."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import TqdmWarning, tqdm

log = logging.getLogger("bkd_fast")
T = TypeVar("T")
SECONDS = 30  # between two lines, and before the first


class _Lines:
    """A stream that logs what is written to it, a line at a time."""

    def write(self, text: str) -> None:
        if line := text.strip():
            log.info("%s", line)

    def flush(self) -> None:
        pass


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, which shows a bar although it is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def is_watched() -> bool:
    """Return whether somebody sees a bar move: in a terminal or a notebook."""
    return (sys.stderr is not None and sys.stderr.isatty()) or in_notebook()


def progress_bar(total: int, label: str, unit: str, show: bool | None, *, initial: int = 0) -> Any:
    """Return a tqdm bar with the remaining time; in a notebook a widget, or text if ipywidgets is not installed.

    Args:
        total: number of units.
        label: what is done.
        unit: its name, in the singular.
        show: None: a bar in a terminal or a notebook, else a log line every 30 seconds. False: nothing.
        initial: units that were done before.
    """
    if show or (show is None and is_watched()):
        kind = _notebook_bar() if in_notebook() else tqdm
        return kind(total=total, initial=initial, desc=label, unit=unit, dynamic_ncols=True)
    form = f"{label}: {{n_fmt}} of {{total_fmt}} {unit}s, {{remaining}} left"
    return tqdm(
        total=total,
        initial=initial,
        file=_Lines(),
        disable=show is False,
        bar_format=form,
        mininterval=SECONDS,
        maxinterval=2 * SECONDS,
        delay=SECONDS,
    )


def counted(items: Iterable[T], bar: Any) -> Iterator[T]:
    """Yield the items and move the bar."""
    with bar:
        for item in items:
            yield item
            bar.update()


def _notebook_bar() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # that ipywidgets is missing: text does as well
        from tqdm.auto import tqdm as bar
    return bar
