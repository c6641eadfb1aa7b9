"""What a training step is made of: which images, in which order, with which supports, decided by the seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bkd_fast.config import BKDConfig, SampledSupport
from bkd_fast.data import draw_support
from bkd_fast.errors import BKDError


@dataclass(frozen=True)
class Step:
    """One optimiser step. ``queries``: this process's image indices. ``supports``: (k,) or one row of k a query."""

    queries: list[int]
    supports: list[list[int]]
    seed: int  # of the support augmentation


class Schedule:
    """Epochs of steps over ``count`` images, the same whatever the number of processes and wherever it resumes.

    Every global batch is dealt out to the processes in equal parts, no image twice in an epoch; a last, smaller
    batch is left out (another order puts other images there in the next epoch).

    Raises:
        BKDError: fewer images than shots plus one, or than two where supports are retrieved.
    """

    def __init__(self, count: int, config: BKDConfig, *, rank: int = 0, world: int = 1) -> None:
        self.count, self.config, self.rank, self.world = count, config, rank, world
        self.support = config.support if isinstance(config.support, SampledSupport) else None
        self.shots = self.support.shots if self.support else 0
        # In "step" mode the supports of a step are images outside its batch, so some must be left for them.
        spare = self.shots if self.support and self.support.per == "step" else 0
        if self.shots:
            draw_support(count - 1, self.shots, torch.Generator())  # the error for too few images, before any work
        elif config.forward_branch and count < 2:
            raise BKDError(f"{count} normal image to learn from: expected at least two, a query and its support")
        batch = min(config.training.batch_size, max(1, count - spare))
        self.batch = max(world, batch - batch % world)
        self.steps = max(1, count // self.batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Step]:
        """The steps of an epoch, from step ``start`` on."""
        order = torch.randperm(self.count, generator=self._generator(epoch, 0)).tolist()
        for step in range(start, self.steps):
            batch = order[step * self.batch : (step + 1) * self.batch]
            generator = self._generator(epoch, step + 1)
            own = batch[self.rank :: self.world]
            supports: list[list[int]] = []
            if self.support and self.support.per == "step":
                supports = [draw_support(self.count, self.shots, generator, exclude=batch)]
            elif self.support:
                drawn = [draw_support(self.count, self.shots, generator, exclude=[query]) for query in batch]
                supports = drawn[self.rank :: self.world]
            seed = int(torch.randint(2**31, (), generator=generator))
            # Each process augments supports of its own where they are its own, else all see the same views.
            yield Step(own, supports, seed + (self.rank if len(supports) > 1 else 0))

    def rate(self, epoch: int, step: int) -> float:
        """The learning rate of a step, a function of its number alone."""
        if self.config.training.schedule == "constant":
            return self.config.training.learning_rate
        done = (epoch * self.steps + step) / (self.config.training.epochs * self.steps)
        return self.config.training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def _generator(self, epoch: int, step: int) -> torch.Generator:
        # Distinct streams from seed, epoch and step; manual_seed hashes well enough for neighbours to differ.
        return torch.Generator().manual_seed((self.config.training.seed * 1_000_003 + epoch) * 1_000_003 + step)
