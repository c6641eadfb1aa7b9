"""The pixel values of a whole test set in falling order, exactly, with most of them on disk.

A float32 is turned into a 32-bit key of the same order. Keys are gathered in a buffer; a full buffer is sorted and
appended to an anonymous temporary file as one run, with an index of where each upper half (a *prefix*) starts. Reading
goes from the highest prefix down: the keys of one prefix, from every run, differ in their lower 16 bits only, so
counting them takes a histogram of 65,536 exact bins. Neither many values nor many equal ones need more memory than a
buffer and that histogram.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from bkd_fast.errors import BKDError

CHUNK = 2**23
BINS = 2**16
BLOCK = 2**20
SIGN = np.uint32(0x8000_0000)


class ValueCounts(NamedTuple):
    """Distinct values (M,) float32 in falling order and how many ``normal`` and ``defect`` pixels (M,) int64 have each.

    ``overlap`` (M,) float64: the sum of 1 / area over those defect pixels, area being that of their component.
    """

    value: np.ndarray
    normal: np.ndarray
    defect: np.ndarray
    overlap: np.ndarray


class SortedPixels:
    """Collects pixel values, then gives how often each occurs, from the largest down.

    Args:
        chunk: pixels of each kind kept in memory before they are sorted and put on disk (12 bytes, 25 while sorting).
        folder: where the temporary file goes (2 bytes a normal pixel, 8 a defect pixel); the system's choice if None.
    """

    def __init__(self, chunk: int = CHUNK, folder: str | Path | None = None) -> None:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}: expected at least one pixel")
        # The prefix is known from the index, so a normal pixel's lower half is all that is stored.
        self._normal = _Runs(chunk, np.uint32, np.uint16, folder)
        self._defect = _Runs(chunk, np.uint64, np.uint64, folder)

    def add(self, normal: np.ndarray, defect: np.ndarray, area: np.ndarray) -> None:
        """Adds finite float32 values of normal (n,) and defect (d,) pixels; ``area`` (d,): pixels of its component."""
        self._normal.add(_keys(normal))
        self._defect.add(_keys(defect).astype(np.uint64) << np.uint64(32) | area.astype(np.uint64))

    def falling(self) -> Iterator[ValueCounts]:
        """Every distinct value once, largest first, in parts."""
        self._normal.spill()
        self._defect.spill()
        for prefix in sorted(self._normal.prefixes() | self._defect.prefixes(), reverse=True):
            normal, defect = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
            overlap = np.zeros(BINS)
            for lower in self._normal.read(prefix):
                normal += np.bincount(lower, minlength=BINS)
            for entries in self._defect.read(prefix):
                lower, area = (entries >> np.uint64(32)).astype(np.uint16), entries.astype(np.uint32)
                defect += np.bincount(lower, minlength=BINS)
                overlap += np.bincount(lower, weights=1.0 / area, minlength=BINS)
            present = np.flatnonzero(normal + defect)[::-1]
            keys = (present + prefix * BINS).astype(np.uint32)
            yield ValueCounts(_values(keys), normal[present], defect[present], overlap[present])

    def close(self) -> None:
        """Gives the disk space back."""
        self._normal.close()
        self._defect.close()


class _Runs:
    """Sorted runs of unsigned keys in one temporary file. The prefix of a key is its top 16 bits."""

    def __init__(self, chunk: int, key: DTypeLike, stored: DTypeLike, folder: str | Path | None) -> None:
        self.buffer, self.filled = np.empty(chunk, key), 0
        self.stored = np.dtype(stored)
        self.folder = folder
        self.file: IO[bytes] | None = None
        self.written = 0
        self.index: list[np.ndarray] = []
        self.sorted_index = np.empty((0, 3), np.int64)

    def add(self, keys: np.ndarray) -> None:
        while len(keys):
            part = keys[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            keys = keys[len(part) :]
            if self.filled == len(self.buffer):
                self.spill()

    def spill(self) -> None:
        """Sorts what the buffer holds and appends it to the file; index rows are (prefix, first entry, entries)."""
        if not self.filled:
            return
        run = self.buffer[: self.filled]
        run.sort()
        prefix = (run >> run.dtype.type(run.itemsize * 8 - 16)).astype(np.uint16)
        starts = np.concatenate([[0], np.flatnonzero(prefix[1:] != prefix[:-1]) + 1])
        counts = np.diff(starts, append=len(run))
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile(buffering=0, dir=self.folder)  # noqa: SIM115, lives until close()
            self.file.seek(self.written * self.stored.itemsize)
            run.astype(self.stored).tofile(self.file)
        except OSError as error:
            size = run.size * self.stored.itemsize / 1e6
            where = self.folder or tempfile.gettempdir()
            raise BKDError(
                f"pixel metrics could not put {size:.0f} MB more into the temporary folder {where} ({error}): "
                "free some space or set TMPDIR to a folder with room"
            ) from error
        self.index.append(np.stack([prefix[starts].astype(np.int64), starts + self.written, counts], axis=1))
        self.written += self.filled
        self.filled = 0

    def prefixes(self) -> set[int]:
        """Every prefix present; sorts the index for :meth:`read`."""
        if self.index:
            rows = np.concatenate([self.sorted_index, *self.index])
            self.sorted_index = rows[np.argsort(rows[:, 0], kind="stable")]
            self.index.clear()
        return set(np.unique(self.sorted_index[:, 0]).tolist())

    def read(self, prefix: int) -> Iterator[np.ndarray]:
        """The entries under ``prefix`` in parts of at most ``BLOCK``, in no particular order."""
        first, last = np.searchsorted(self.sorted_index[:, 0], [prefix, prefix + 1])
        parts: list[np.ndarray] = []
        room = BLOCK
        for _, start, count in self.sorted_index[first:last].tolist():
            for offset in range(0, count, BLOCK):
                length = min(BLOCK, count - offset)
                if length > room:
                    yield np.concatenate(parts)
                    parts, room = [], BLOCK
                parts.append(self._entries(start + offset, length))
                room -= length
        if parts:
            yield np.concatenate(parts)

    def _entries(self, start: int, count: int) -> np.ndarray:
        assert self.file is not None
        self.file.seek(start * self.stored.itemsize)
        return np.fromfile(self.file, self.stored, count)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _keys(values: np.ndarray) -> np.ndarray:
    """float32 -> uint32 of the same order: negative numbers are inverted, positive ones get the top bit."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0: the two zeros are one value
    return np.where(bits & SIGN, ~bits, bits | SIGN)


def _values(keys: np.ndarray) -> np.ndarray:
    """The inverse of :func:`_keys`."""
    return np.where(keys & SIGN, keys ^ SIGN, ~keys).view(np.float32)
