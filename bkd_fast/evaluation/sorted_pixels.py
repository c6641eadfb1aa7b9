"""The pixel values of a test set in descending order, sorted in a temporary file.

Each float32 becomes a 32-bit key of the same order. Keys are appended to an anonymous file, which is mapped and sorted
in place: the system keeps in memory what fits. Reading goes down from the highest upper half of a key (*prefix*). The
keys of one prefix differ in their lower 16 bits only, so a histogram of 65,536 bins counts them exactly. Memory is
bounded by this histogram, for any number of values, equal ones included.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from bkd_fast.errors import BKDError

BINS = 2**16
BLOCK = 2**20
SIGN = np.uint32(0x8000_0000)


class ValueCounts(NamedTuple):
    """Of distinct values in descending order, the number of ``normal`` and ``defect`` pixels (M,) int64.

    ``overlap`` (M,) float64: sum of 1 / area over those defect pixels, where area is that of the pixel's region.
    """

    normal: np.ndarray
    defect: np.ndarray
    overlap: np.ndarray


class SortedPixels:
    """Counts of pixel values, in descending order of the values.

    Args:
        folder: folder of the temporary files (4 bytes per normal pixel, 8 per defect pixel); None: the system's.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        # A defect pixel's key has the area of its region in the lower half.
        self._normal, self._defect = _Keys(np.uint32, folder), _Keys(np.uint64, folder)

    def add(self, normal: np.ndarray, defect: np.ndarray, area: np.ndarray) -> None:
        """Add finite float32 values of normal (n,) and defect (d,) pixels; ``area`` (d,): pixels of their regions.

        Raises:
            BKDError: the temporary file cannot be written.
        """
        self._normal.add(_keys(normal))
        self._defect.add(_keys(defect).astype(np.uint64) << np.uint64(32) | area.astype(np.uint64))

    def descending(self) -> Iterator[ValueCounts]:
        """Yield all distinct values, largest first, in parts."""
        normals, defects = self._normal.sorted(), self._defect.sorted()
        while len(normals) or len(defects):
            prefix = max(int(keys[-1]) >> shift for keys, shift in ((normals, 16), (defects, 48)) if len(keys))
            normal, defect = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
            overlap = np.zeros(BINS)
            start = int(np.searchsorted(normals, np.uint32(prefix << 16)))
            for block in range(start, len(normals), BLOCK):
                normal += np.bincount(normals[block : block + BLOCK].astype(np.uint16), minlength=BINS)
            normals, start = normals[:start], int(np.searchsorted(defects, np.uint64(prefix << 48)))
            for block in range(start, len(defects), BLOCK):
                entries = defects[block : block + BLOCK]
                lower, area = (entries >> np.uint64(32)).astype(np.uint16), entries.astype(np.uint32)
                defect += np.bincount(lower, minlength=BINS)
                overlap += np.bincount(lower, weights=1.0 / area, minlength=BINS)
            defects = defects[:start]
            present = np.flatnonzero(normal + defect)[::-1]
            yield ValueCounts(normal[present], defect[present], overlap[present])

    def close(self) -> None:
        """Delete the temporary files."""
        self._normal.close()
        self._defect.close()


class _Keys:
    """Unsigned keys in a temporary file."""

    def __init__(self, dtype: DTypeLike, folder: str | Path | None) -> None:
        self.dtype, self.folder, self.count = np.dtype(dtype), folder, 0
        self.file: IO[bytes] | None = None

    def add(self, keys: np.ndarray) -> None:
        if not len(keys):
            return
        left = keys.astype(self.dtype).data.cast("B")
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile(buffering=0, dir=self.folder)  # noqa: SIM115, lives until close()
            self.file.seek(0, os.SEEK_END)
            while left:  # a full disk takes a part, and refuses the next one
                left = left[self.file.write(left) :]
        except OSError as error:
            raise BKDError(
                f"pixel metrics cannot write {len(left) / 1e6:.0f} MB to the temporary folder "
                f"{self.folder or tempfile.gettempdir()} ({error}): free some space, or set TMPDIR to a folder on a "
                "larger disk"
            ) from error
        self.count += len(keys)

    def sorted(self) -> np.ndarray:
        """Sort the file; return it mapped."""
        if self.file is None:
            return np.empty(0, self.dtype)
        keys = np.memmap(self.file, self.dtype, "r+", shape=(self.count,))
        keys.sort()
        return np.asarray(keys)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _keys(values: np.ndarray) -> np.ndarray:
    """Return uint32 keys in the order of float32 values: negative ones are inverted, positive ones get the top bit."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0: both zeros get one key
    return np.where(bits & SIGN, ~bits, bits | SIGN)
