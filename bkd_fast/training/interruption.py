"""Ctrl-C between two steps of work instead of in the middle of one."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[list[bool]]:
    """Turns the first Ctrl-C into a flag that is read between two steps; a second one acts at once."""
    flag = [False]

    def handle(_: int, __: Any) -> None:
        flag[0] = True
        logging.getLogger("bkd_fast").warning("stopping after this step (Ctrl-C again to stop at once)")
        signal.signal(signal.SIGINT, previous)

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread, which alone receives signals
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
