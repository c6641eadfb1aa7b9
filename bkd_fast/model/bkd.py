"""Bidirectional knowledge distillation: the whole network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bkd_fast.config import BKDConfig
from bkd_fast.errors import BKDError
from bkd_fast.model.alignment import Alignment, AlignmentPyramid, PreparedLevel
from bkd_fast.model.bottleneck import OneClassBottleneck
from bkd_fast.model.lifting import lifted
from bkd_fast.model.memory import SparseMemory
from bkd_fast.model.retrieval import SupportPool, make_pool, retrieve
from bkd_fast.model.student import StudentDecoder
from bkd_fast.model.teacher import Teacher
from bkd_fast.ops import cosine_anomaly_map, distillation_loss

BRANCHES = ("forward", "reverse")
Prepared = SupportPool | list[PreparedLevel]


class Distillation(NamedTuple):
    """The teacher's levels Q and what each branch makes of them; per level (N, C_l, H_l, W_l).

    ``aligned`` (S~) and ``offsets`` are empty without the forward branch, ``student`` (D) without the reverse one. They
    are of the last levels, where a branch leaves the first ones out.
    """

    teacher: list[Tensor]
    aligned: list[Tensor]
    student: list[Tensor]
    offsets: list[Tensor]


class BKD(nn.Module):
    """The network of Fig. 2: a frozen teacher, forward distillation and reverse distillation.

    Args:
        config: which branches there are, and how they are built.
        load_teacher: False skips the ImageNet weights, for a state dict that is loaded afterwards.

    Raises:
        BKDError: see :class:`bkd_fast.model.teacher.Teacher`.
    """

    def __init__(self, config: BKDConfig, *, load_teacher: bool = True) -> None:
        super().__init__()
        self.config = config
        self.teacher = Teacher(config, load=load_teacher)
        channels = self.teacher.channels
        self.first = 1 if config.forward_levels == "deep" else 0  # of the forward branch's levels
        if config.forward_branch:
            self.alignment = AlignmentPyramid(channels[self.first :], config)
        if config.reverse_branch:
            if config.memory_items:
                self.memories = nn.ModuleList(SparseMemory(width, config) for width in channels)
            if config.student:
                self.bottleneck = OneClassBottleneck(channels, config)
                self.student = StudentDecoder(self.bottleneck.channels, channels, config)
        # Per branch and level, from held-out normals: what distances are divided by, and then raised to. Plain numbers,
        # so that compiled and exported graphs hold them as constants.
        counts = {"forward": len(channels) - self.first, "reverse": len(channels)}
        self.map_scale = {branch: [1.0] * counts[branch] for branch in self.branches()}
        self.map_exponent = {branch: [1.0] * counts[branch] for branch in self.branches()}
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, support: Tensor) -> Distillation:
        """Runs both branches.

        Args:
            images: queries (N, 3, H, W) in [0, 1].
            support: (k, 3, H, W), shared by all queries (with ``support_draw="nearest"`` they choose from it), or
                (N, k, 3, H, W).
        """
        return self.distill(self.teacher(images), self.prepare(self.support_levels(support)))

    def support_levels(self, support: Tensor) -> list[Tensor]:
        """Those teacher levels (B, k, C_l, H_l, W_l) of ``support`` that the forward branch uses.

        Args:
            support: (k, 3, H, W), B = 1, or (B, k, 3, H, W).
        """
        if not self.config.forward_branch:
            return []
        batched = support if support.ndim == 5 else support.unsqueeze(0)
        return [level.unflatten(0, batched.shape[:2]) for level in self.teacher(batched.flatten(0, 1))[self.first :]]

    def prepare(self, support_levels: Sequence[Tensor]) -> Prepared:
        """Everything that depends on the support alone; computed once where the support is fixed."""
        if not self.config.forward_branch:
            return []
        if self.config.looks_up:
            if len(support_levels[0]) != 1:
                raise BKDError(
                    f"support of shape {tuple(support_levels[0].shape[:2])} + features: with support_draw='nearest' "
                    "queries choose from one set of images, given as (k, 3, H, W)"
                )
            return make_pool([level.squeeze(0) for level in support_levels])
        return self.alignment.prepare(support_levels)

    def distill(
        self,
        query: Sequence[Tensor],
        prepared: Prepared,
        exclude: Tensor | None = None,
        branches: Sequence[str] = BRANCHES,
    ) -> Distillation:
        """The given branches that this model has, on the teacher's levels of the queries.

        Args:
            query: all levels, or the last ones where ``branches`` need no others.
            exclude: (N,) int64, the place of each query among the prepared support, or -1: no query is compared with
                itself.
        """
        levels = list(query)
        aligned: list[Tensor] = []
        offsets: list[Tensor] = []
        if self.config.forward_branch and "forward" in branches:
            aligned, offsets = self._align(levels, prepared, exclude)
        student: list[Tensor] = []
        if self.config.reverse_branch and "reverse" in branches:
            student = self._rebuild(levels)
        return Distillation(levels, aligned, student, offsets)

    def learned_branches(self) -> tuple[str, ...]:
        """The branches that have something to learn; the others are calibrated only."""
        parts = {"forward": ("alignment",), "reverse": ("memories", "bottleneck", "student")}
        return tuple(
            branch
            for branch in self.branches()
            if any(p.requires_grad for name in parts[branch] for p in getattr(self, name, nn.Identity()).parameters())
        )

    def _align(self, levels: list[Tensor], prepared: Prepared, exclude: Tensor | None) -> Alignment:
        """Forward distillation: S~ of Eq. 5 and the offsets."""
        if isinstance(prepared, SupportPool):
            prepared = self.alignment.prepare(self._looked_up(levels, prepared, exclude), shared=False)
        return self.alignment(levels[self.first - len(self.teacher.channels) :], prepared)

    def _looked_up(self, levels: Sequence[Tensor], pool: SupportPool, exclude: Tensor | None = None) -> list[Tensor]:
        ridge = self.config.regression_ridge if self.config.shot_aggregation == "regression" else None
        return retrieve(levels[-1], pool, self.config.shots, ridge, exclude)

    def support_of(self, levels: Sequence[Tensor], prepared: Prepared) -> list[Tensor]:
        """The support of queries before it is aligned, the mean over its shots: per forward level (N or 1, C, H, W)."""
        if isinstance(prepared, SupportPool):
            return [level.mean(1) for level in self._looked_up(levels, prepared)]
        return [level.features.mean(1) for level in prepared]

    def _rebuild(self, levels: list[Tensor]) -> list[Tensor]:
        """Memory, bottleneck and student: D of Eq. 12."""
        inputs = levels
        if self.config.memory_items:
            read = [memory(level) for memory, level in zip(self.memories, levels, strict=True)]
            merged = self.config.memory_merge == "residual"
            inputs = [z + level for z, level in zip(read, levels, strict=True)] if merged else read
            if not self.config.student:
                return read
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        student = self.student(self.bottleneck(inputs), sizes)
        if self.config.student_correction:
            return [z + correction for z, correction in zip(read, student, strict=True)]
        return student

    def losses(self, result: Distillation) -> dict[str, Tensor]:
        """Eq. 11-12: ``forward``, ``reverse`` and their weighted sum ``total``; scalars, float32."""
        losses = {}
        teacher = lifted(result.teacher, self.config.lift)
        for branch, levels in self.outputs(result).items():
            losses[branch] = distillation_loss(
                teacher[-len(levels) :],
                lifted(levels, self.config.lift),
                direction=self.config.direction,
                value_weight=self.config.value_weight,
            )
        weights = {"forward": self.config.forward_weight, "reverse": self.config.reverse_weight}
        losses["total"] = torch.stack([weights[branch] * loss for branch, loss in losses.items()]).sum()
        return losses

    def anomaly_map(self, result: Distillation, size: tuple[int, int], branches: Sequence[str] = BRANCHES) -> Tensor:
        """Eq. 13 over the given branches that this model has -> (N, H, W) of ``size``, raw and unbounded, float32."""
        outputs = {branch: levels for branch, levels in self.outputs(result).items() if branch in branches}
        teacher = lifted(result.teacher, self.config.lift)
        weights = [1 / scale for branch in outputs for scale in self.map_scale[branch]]
        exponents: list[float] | None = None
        if self.config.fusion == "geometric":
            # Every level of every branch is a factor of its own.
            teacher = [level for levels in outputs.values() for level in teacher[-len(levels) :]]
            powers = [power for branch in outputs for power in self.map_exponent[branch]]
            exponents = [power / sum(powers) for power in powers]
        else:
            teacher = teacher[-min(len(levels) for levels in outputs.values()) :]
        student = lifted([level for levels in outputs.values() for level in levels], self.config.lift)
        return self._map(teacher, student, size, weights, exponents)

    def level_maps(self, result: Distillation, size: tuple[int, int]) -> dict[str, list[Tensor]]:
        """The maps (N, H, W) of ``size`` that each level of each branch would give alone, as they come."""
        teacher = lifted(result.teacher, self.config.lift)
        return {
            branch: [
                self._map([target], [output], size)
                for target, output in zip(teacher[-len(levels) :], lifted(levels, self.config.lift), strict=True)
            ]
            for branch, levels in self.outputs(result).items()
        }

    def _map(
        self,
        teacher: list[Tensor],
        student: list[Tensor],
        size: tuple[int, int],
        weights: list[float] | None = None,
        exponents: list[float] | None = None,
    ) -> Tensor:
        """The operator with what the configuration says of it."""
        return cosine_anomaly_map(
            teacher,
            student,
            size,
            fusion="sum" if self.config.fusion == "sum" else "product",
            sigma=self.config.sigma * size[0] / 256,
            weights=weights,
            exponents=exponents,
            align_corners=self.config.align_corners,
            value_share=self.config.map_value_share,
        )

    def outputs(self, result: Distillation) -> dict[str, list[Tensor]]:
        """What each branch that this model has makes of its levels, the last ones of ``result.teacher``."""
        return {
            branch: levels for branch, levels in zip(BRANCHES, (result.aligned, result.student), strict=True) if levels
        }

    def judge(self, images: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in [0, 1] of the configured size -> scores (N,) and maps (N, H, W), raw, float32."""
        maps = self.anomaly_map(self.distill(self.teacher(images), prepared), self.config.image_size)
        return self.image_score(maps), maps

    def image_score(self, maps: Tensor) -> Tensor:
        """(N, H, W) -> (N,): the maximum of each map, or the mean of its ``top_fraction`` largest pixels."""
        flat = maps.flatten(1)
        count = max(1, round(self.config.top_fraction * flat.shape[1]))
        return flat.topk(count, dim=1).values.mean(dim=1)

    def branches(self) -> tuple[str, ...]:
        """The branches that this model has."""
        return tuple(name for name in BRANCHES if getattr(self.config, f"{name}_branch"))
