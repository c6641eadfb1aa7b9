"""An exact external sort of the pixel values of a test set, in descending order.

Each float32 becomes a 32-bit key of the same order. A full buffer of keys is sorted and appended to an anonymous
temporary file as one run; an index holds where each upper half (*prefix*) starts. Reading goes from the highest prefix
down. The keys of one prefix differ in their lower 16 bits only, so a histogram of 65,536 bins counts them exactly.
Memory is bounded by the buffers and this histogram, for any number of values, equal ones included.
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
    """Distinct values (M,) float32 in descending order, and the number of ``normal`` and ``defect`` pixels (M,) int64.

    ``overlap`` (M,) float64: sum of 1 / area over those defect pixels, where area is that of the pixel's region.
    """

    value: np.ndarray
    normal: np.ndarray
    defect: np.ndarray
    overlap: np.ndarray


class SortedPixels:
    """Counts of pixel values, in descending order of the values.

    Args:
        chunk: pixels of each kind in memory before they are sorted and written (12 bytes each, 25 while sorting).
        folder: folder of the temporary file (2 bytes per normal pixel, 8 per defect pixel); None: the system's.

    Raises:
        ValueError: ``chunk`` is below 1.
    """

    def __init__(self, chunk: int = CHUNK, folder: str | Path | None = None) -> None:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}: expected at least one pixel")
        # The index holds the prefix, so the lower half is enough for a normal pixel.
        self._normal = _Runs(chunk, np.uint32, np.uint16, folder)
        self._defect = _Runs(chunk, np.uint64, np.uint64, folder)

    def add(self, normal: np.ndarray, defect: np.ndarray, area: np.ndarray) -> None:
        """Add finite float32 values of normal (n,) and defect (d,) pixels; ``area`` (d,): pixels of their regions.

        Raises:
            BKDError: the temporary file cannot be written.
        """
        self._normal.add(_keys(normal))
        self._defect.add(_keys(defect).astype(np.uint64) << np.uint64(32) | area.astype(np.uint64))

    def descending(self) -> Iterator[ValueCounts]:
        """Yield all distinct values, largest first, in parts."""
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
        """Delete the temporary files."""
        self._normal.close()
        self._defect.close()


class _Runs:
    """Sorted runs of unsigned keys in one temporary file; the prefix of a key is its top 16 bits."""

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
        """Sort the buffer and append it to the file; index rows are (prefix, first entry, number of entries)."""
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
            left = run.astype(self.stored).data.cast("B")
            while left:  # a full disk takes a part, and refuses the next one
                left = left[self.file.write(left) :]
        except OSError as error:
            size = run.size * self.stored.itemsize / 1e6
            where = self.folder or tempfile.gettempdir()
            raise BKDError(
                f"pixel metrics cannot write {size:.0f} MB to the temporary folder {where} ({error}): "
                "free some space, or set TMPDIR to a folder on a larger disk"
            ) from error
        self.index.append(np.stack([prefix[starts].astype(np.int64), starts + self.written, counts], axis=1))
        self.written += self.filled
        self.filled = 0

    def prefixes(self) -> set[int]:
        """Sort the index for :meth:`read`, and return all prefixes in it."""
        if self.index:
            rows = np.concatenate([self.sorted_index, *self.index])
            self.sorted_index = rows[np.argsort(rows[:, 0], kind="stable")]
            self.index.clear()
        return set(np.unique(self.sorted_index[:, 0]).tolist())

    def read(self, prefix: int) -> Iterator[np.ndarray]:
        """Yield the entries of ``prefix`` in parts of at most ``BLOCK``, in no particular order."""
        first, last = np.searchsorted(self.sorted_index[:, 0], [prefix, prefix + 1])
        parts: list[np.ndarray] = []
        space = BLOCK
        for _, start, count in self.sorted_index[first:last].tolist():
            for offset in range(0, count, BLOCK):
                length = min(BLOCK, count - offset)
                if length > space:
                    yield np.concatenate(parts)
                    parts, space = [], BLOCK
                parts.append(self._entries(start + offset, length))
                space -= length
        if parts:
            yield np.concatenate(parts)

    def _entries(self, start: int, count: int) -> np.ndarray:
        assert self.file is not None
        self.file.seek(start * self.stored.itemsize)
        entries = np.fromfile(self.file, self.stored, count)
        if len(entries) != count:
            raise BKDError(f"pixel metrics read {len(entries)} of {count} values back from their temporary file")
        return entries

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _keys(values: np.ndarray) -> np.ndarray:
    """Return uint32 keys in the order of float32 values: negative ones are inverted, positive ones get the top bit."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0: both zeros get one key
    return np.where(bits & SIGN, ~bits, bits | SIGN)


def _values(keys: np.ndarray) -> np.ndarray:
    """Return the float32 values of keys: the inverse of :func:`_keys`."""
    return np.where(keys & SIGN, keys ^ SIGN, ~keys).view(np.float32)
