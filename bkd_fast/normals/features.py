"""Teacher features of a set of images, kept where there is room: the teacher is frozen, so they never change."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from bkd_fast.data import ImageDataset
from bkd_fast.errors import BKDError
from bkd_fast.model.teacher import Teacher

HALF_MAX = torch.finfo(torch.float16).max


class FeatureSource:
    """Teacher features of images: the first ones from memory or disk, the others computed when asked for.

    All are rounded to half precision, kept or not, so that a training does not depend on how much room there was.

    Args:
        budget: bytes that may be kept.
        folder: where they are kept on disk, in a file of its own that goes with the source; None = in memory.

    Raises:
        BKDError: the file cannot be written.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        teacher: Teacher,
        device: torch.device,
        budget: int,
        *,
        folder: Path | None = None,
    ) -> None:
        self.dataset, self.teacher, self.device = dataset, teacher, device
        self.decoders = ThreadPoolExecutor(max_workers=4, thread_name_prefix="decode")
        self.kept: list[Tensor] = []  # (images, H_l, W_l, C_l) float16, as the network gives them
        height, width = dataset.size
        shapes = teacher.shapes((height, width))
        self.capacity = min(len(dataset), budget // (2 * sum(c * h * w for c, h, w in shapes)))
        if not self.capacity:
            return
        if folder is None:
            self.kept = [torch.empty(self.capacity, h, w, c, dtype=torch.float16, device=device) for c, h, w in shapes]
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for c, h, w in shapes:
                # Open files without a name: they go when the process does, however it ends.
                with tempfile.NamedTemporaryFile(dir=folder, prefix="features-") as file:
                    size = self.capacity * h * w * c
                    if hasattr(os, "posix_fallocate"):  # a disk that is too full says so now, not by a signal later
                        os.posix_fallocate(file.fileno(), 0, 2 * size)
                    flat = torch.from_file(file.name, shared=True, size=size, dtype=torch.float16)
                    self.kept.append(flat.view(self.capacity, h, w, c))
        except (OSError, RuntimeError) as error:
            raise BKDError(f"features cannot be kept in {folder} ({error}): name another folder") from error

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def image_of(self) -> Sequence[int]:
        """Which image each item shows: itself, unless images are cut into tiles."""
        return self.dataset.image_of

    def images(self, indices: Sequence[int]) -> Tensor:
        """(N, 3, H, W) on the device; decoded in threads."""
        images = list(self.decoders.map(lambda index: self.dataset[index][0], indices))
        return torch.stack(images).to(self.device)

    def fill(self) -> Iterator[list[Tensor]]:
        """Every image's raw teacher levels (1, C_l, H_l, W_l), in order, kept on the way as far as there is room.

        One image at a time, so that they do not depend on how a run was cut into pieces.
        """
        for index in range(len(self.dataset)):
            levels = [rounded(level) for level in self.teacher.raw(self.images([index]))]
            if index < self.capacity:
                for store, level in zip(self.kept, levels, strict=True):
                    store[index] = level[0].permute(1, 2, 0)
            yield [level.float() for level in levels]

    def regions(self, indices: Sequence[int]) -> Tensor | None:
        """What of tiles is looked at, (N, H, W) bool on the device; None where the model knows it."""
        regions = self.dataset.regions(indices)
        return None if regions is None else regions.to(self.device)

    def levels(self, indices: Sequence[int]) -> list[Tensor]:
        """The teacher levels (N, C_l, H_l, W_l), standardised, channels_last, of images that were filled in."""
        if all(index < self.capacity for index in indices):
            chosen = torch.tensor(indices, device=self.device if self.kept[0].is_cuda else "cpu")
            raw = [store[chosen].to(self.device).permute(0, 3, 1, 2) for store in self.kept]
        else:
            rows = [self._one(index) for index in indices]
            raw = [torch.stack(row).permute(0, 3, 1, 2) for row in zip(*rows, strict=True)]
        return [self.teacher.standardized(level.float(), number) for number, level in enumerate(raw, start=1)]

    def close(self) -> None:
        """Ends the decoding threads and frees what was kept."""
        self.decoders.shutdown()
        self.kept, self.capacity = [], 0

    def _one(self, index: int) -> list[Tensor]:
        """Raw levels (H_l, W_l, C_l) of one image."""
        if index < self.capacity:
            return [store[index].to(self.device) for store in self.kept]
        levels = self.teacher.raw(self.images([index]))
        return [rounded(level)[0].permute(1, 2, 0) for level in levels]


def rounded(level: Tensor) -> Tensor:
    """In half precision; what it cannot hold becomes the largest number that it can."""
    return level.clamp(-HALF_MAX, HALF_MAX).half()
