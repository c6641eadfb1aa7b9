"""Anomaly values as colours, on one scale for a whole run.

A scale stretched to each image's minimum and maximum shows a defect in every good image. This one has fixed ends, taken
from normal images, so a colour means the same value everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bkd_fast.errors import BKDError


def _table(size: int = 256) -> np.ndarray:
    """Return colours (size, 3) uint8 from near black through violet and red to pale yellow.

    CIE L* (lightness) rises linearly while the hue turns: equal steps look equal, also in a grey print.
    """
    t = np.linspace(0, 1, size)
    lightness, chroma = 5 + 91 * t, 74 * np.sin(np.pi * (0.08 + 0.80 * t))
    hue = np.deg2rad(295 + 165 * t)
    fy = (lightness + 16) / 116
    lab = np.stack([fy + chroma * np.cos(hue) / 500, fy, fy - chroma * np.sin(hue) / 200], axis=1)
    xyz = np.where(lab > 6 / 29, lab**3, (lab - 4 / 29) * 3 * (6 / 29) ** 2) * [0.95047, 1.0, 1.08883]
    to_rgb = [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
    linear = np.clip(xyz @ np.transpose(to_rgb), 0, 1)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(rgb * 255).astype(np.uint8)


COLOURS = _table()


@dataclass(frozen=True)
class HeatScale:
    """A fixed colour scale: ``low`` and below is black, ``high`` and above pale yellow.

    Attributes:
        low, high: the ends, in units of the anomaly map.
        log: logarithmic between the ends, which must then be positive.
        unit: unit of the values, for the legend.
        threshold: value that legends mark; None: no mark.

    Raises:
        BKDError: the ends are not finite, not in order, or not positive on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = True
    unit: str = "anomaly value"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise BKDError(f"a heat scale from {self.low} to {self.high}: expected two finite values, low first")
        if self.log and self.low <= 0:
            raise BKDError(f"a logarithmic heat scale from {self.low}: expected a positive value, or log=False")

    def position(self, values: np.ndarray) -> np.ndarray:
        """Return the positions of values (...) on the scale, 0 (low) to 1 (high), float32."""
        clipped = np.clip(np.asarray(values, np.float64), self.low, self.high)
        if self.log:
            return (np.log(clipped / self.low) / math.log(self.high / self.low)).astype(np.float32)
        return ((clipped - self.low) / (self.high - self.low)).astype(np.float32)

    def colours(self, values: np.ndarray) -> np.ndarray:
        """Return the colours (..., 3) uint8 of values (...)."""
        return COLOURS[np.round(self.position(values) * (len(COLOURS) - 1)).astype(int)]
