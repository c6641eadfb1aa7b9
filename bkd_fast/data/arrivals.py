"""Image files as they arrive in folders that other programs write to."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bkd_fast.data.image import SUFFIXES
from bkd_fast.files import is_output

log = logging.getLogger("bkd_fast")
INTERVAL = 0.2  # seconds between two looks at the folders, at least
SETTLE = 0.5  # seconds that a file must not change before it is taken
SETTLE_EMPTY = 10.0  # the same for an empty file: its writer may have opened it only
State = tuple[int, int, int]  # a file's inode, size and time of the last change


class Arrival(NamedTuple):
    """An image file, its path relative to the folder that it was found by, without suffix, and its state then."""

    path: Path
    name: str
    state: State | None = None


class Arrivals:
    """An iterable of the image files in folders, those that are there and those that come, each path once.

    A file is taken when it has not changed for :data:`SETTLE` seconds. Links are followed; hidden files and folders and
    what this package wrote are left out, as in :func:`bkd_fast.data.image_files`. Folders are polled: network drives
    send no notifications. What is deleted or cannot be listed for a while is no error.

    Args:
        folders: searched recursively.
        seen: paths, as they are found by ``folders``, that are not taken.
        seconds: end after this time; None: never.
        idle: end after this time without a new or growing file; None: never.
        stopped: asked at every look; True ends the iteration.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        seen: Iterable[str] = (),
        *,
        seconds: float | None = None,
        idle: float | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folders, self.seen = list(folders), set(seen)
        self.seconds, self.idle, self.stopped = seconds, idle, stopped
        self.waiting: dict[str, tuple[State, float, Arrival]] = {}  # path: state, since when, arrival
        self.unusable: dict[str, State] = {}  # those that could not be read, until they change
        self.unlisted: set[str] = set()
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[Arrival]:
        begin = active = time.monotonic()
        while not self._ended():
            look = time.monotonic()
            ready, changed = self._look(look)
            took = time.monotonic() - look
            for arrival in ready:
                if self._ended():
                    return
                self.seen.add(str(arrival.path))
                self.unusable.pop(str(arrival.path), None)
                yield arrival
            now = time.monotonic()
            active = now if ready or changed else active
            if self.seconds is not None and now - begin >= self.seconds:
                return
            if self.idle is not None and now - active >= self.idle and not self.waiting:
                return
            # Four times the length of a look: folders of very many files take a fifth of a core at most.
            until = now + max(INTERVAL, 4 * took)
            if self.seconds is not None:
                until = min(until, begin + self.seconds)
            while not self._ended() and (left := until - time.monotonic()) > 0:
                time.sleep(min(left, INTERVAL))

    def retry(self, arrival: Arrival) -> None:
        """Take a file again once it has changed: it could not be read as it was."""
        if arrival.state is not None:
            self.unusable[str(arrival.path)] = arrival.state
        self.seen.discard(str(arrival.path))

    def close(self) -> None:
        """End the iteration at its next look."""
        self.closed.set()

    def _ended(self) -> bool:
        return self.closed.is_set() or self.stopped()

    def _look(self, now: float) -> tuple[list[Arrival], bool]:
        """Return the files to take, oldest first, and whether any other is new or has changed."""
        there: dict[str, tuple[State, float, Arrival]] = {}
        changed = False
        for folder in self.folders:
            for entry in self._files(str(folder)):
                path = entry.path.removeprefix(f".{os.sep}")  # as pathlib writes it
                if path in self.seen or path in there:
                    continue
                state = _state(path)
                if state is None or self.unusable.get(path) == state:
                    continue
                before = self.waiting.get(path)
                if before is not None and before[0] == state:
                    there[path] = before
                else:
                    name = str(Path(path).relative_to(folder).with_suffix(""))
                    there[path] = state, now, Arrival(Path(path), name, state)
                    changed = True
        ready = [
            path for path, (state, since, _) in there.items() if now - since >= (SETTLE if state[1] else SETTLE_EMPTY)
        ]
        ready.sort(key=lambda path: (there[path][1], path))
        taken = [there.pop(path)[2] for path in ready]
        self.waiting = there
        return taken, changed

    def _files(self, folder: str) -> list[os.DirEntry[str]]:
        """Return the image files below a folder."""
        files, folders, known = [], [folder], {os.path.realpath(folder)}
        for place in folders:  # grows
            for entry in self._shown(place, place == folder):
                # DirEntry raises where a link leads to itself.
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if real not in known and not is_output(entry.path):
                        known.add(real)
                        folders.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    files.append(entry)
        return files

    def _shown(self, place: str, given: bool) -> list[os.DirEntry[str]]:
        """Return what is in a folder, less what is hidden; what cannot be listed now is said once."""
        try:
            with os.scandir(place) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            if given or not gone:
                self._say(place, "is not there" if gone else f"cannot be listed ({error.strerror or error})")
            return []
        self.unlisted.discard(place)
        return shown

    def _say(self, place: str, what: str) -> None:
        if place not in self.unlisted:
            self.unlisted.add(place)
            log.warning("the folder %s %s: waiting for it", place, what)


def _state(path: str) -> State | None:
    """Return the state of a file; None if it was deleted, or is no regular file."""
    try:
        status = os.stat(path)  # DirEntry.stat() of Windows does not see a file grow
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
