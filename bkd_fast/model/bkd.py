"""Bidirectional knowledge distillation: the whole network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bkd_fast.config import BKDConfig
from bkd_fast.model.alignment import AlignmentPyramid, PreparedLevel
from bkd_fast.model.bottleneck import OneClassBottleneck
from bkd_fast.model.memory import SparseMemory
from bkd_fast.model.student import StudentDecoder
from bkd_fast.model.teacher import Teacher
from bkd_fast.ops import cosine_anomaly_map, distillation_loss

BRANCHES = ("forward", "reverse")


class Distillation(NamedTuple):
    """The teacher's levels Q and what each branch makes of them; per level (N, C_l, H_l, W_l).

    ``aligned`` (S~) and ``offsets`` are empty without the forward branch, ``student`` (D) without the reverse one.
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
        if config.forward_branch:
            self.alignment = AlignmentPyramid(channels, config)
        if config.reverse_branch:
            if config.memory_items:
                self.memories = nn.ModuleList(SparseMemory(width, config) for width in channels)
            self.bottleneck = OneClassBottleneck(channels, config)
            self.student = StudentDecoder(self.bottleneck.channels, channels, config)
        # Mean distance of each branch and level on held-out normals (see balance_maps). Plain numbers, so that
        # compiled and exported graphs hold them as constants.
        self.map_scale = {branch: [1.0] * len(channels) for branch in self.branches()}
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, support: Tensor) -> Distillation:
        """Runs both branches.

        Args:
            images: queries (N, 3, H, W) in [0, 1].
            support: (k, 3, H, W), shared by all queries, or (N, k, 3, H, W).
        """
        return self.distill(self.teacher(images), self.prepare(self.support_levels(support)))

    def support_levels(self, support: Tensor) -> list[Tensor]:
        """Teacher levels (B, k, C_l, H_l, W_l) of ``support``: (k, 3, H, W), B = 1, or (B, k, 3, H, W)."""
        if not self.config.forward_branch:
            return []
        batched = support if support.ndim == 5 else support.unsqueeze(0)
        return [level.unflatten(0, batched.shape[:2]) for level in self.teacher(batched.flatten(0, 1))]

    def prepare(self, support_levels: Sequence[Tensor]) -> list[PreparedLevel]:
        """Everything that depends on the support alone; computed once where the support is fixed."""
        return self.alignment.prepare(support_levels) if self.config.forward_branch else []

    def distill(self, query: Sequence[Tensor], prepared: Sequence[PreparedLevel]) -> Distillation:
        """Both branches on the teacher's levels of the queries."""
        levels = list(query)
        aligned, offsets = self.alignment(levels, prepared) if self.config.forward_branch else ([], [])
        student = self._rebuild(levels) if self.config.reverse_branch else []
        return Distillation(levels, aligned, student, offsets)

    def _rebuild(self, levels: list[Tensor]) -> list[Tensor]:
        """Memory, bottleneck and student: D of Eq. 12."""
        inputs = levels
        if self.config.memory_items:
            read = [memory(level) for memory, level in zip(self.memories, levels, strict=True)]
            merged = self.config.memory_merge == "residual"
            inputs = [z + level for z, level in zip(read, levels, strict=True)] if merged else read
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        student = self.student(self.bottleneck(inputs), sizes)
        if self.config.student_correction:
            return [z + correction for z, correction in zip(read, student, strict=True)]
        return student

    def losses(self, result: Distillation) -> dict[str, Tensor]:
        """Eq. 11-12: ``forward``, ``reverse`` and their weighted sum ``total``; scalars, float32."""
        losses = {}
        for branch, levels in (("forward", result.aligned), ("reverse", result.student)):
            if levels:
                losses[branch] = distillation_loss(
                    result.teacher, levels, direction=self.config.direction, value_weight=self.config.value_weight
                )
        weights = {"forward": self.config.forward_weight, "reverse": self.config.reverse_weight}
        losses["total"] = torch.stack([weights[branch] * loss for branch, loss in losses.items()]).sum()
        return losses

    def anomaly_map(self, result: Distillation, size: tuple[int, int], branches: Sequence[str] = BRANCHES) -> Tensor:
        """Eq. 13 over the given branches that this model has -> (N, H, W) of ``size``, raw and unbounded, float32."""
        levels: list[Tensor] = []
        weights: list[float] = []
        for branch, outputs in zip(BRANCHES, (result.aligned, result.student), strict=True):
            if branch in branches and outputs:
                levels += outputs
                weights += [1 / scale for scale in self.map_scale[branch]]
        return cosine_anomaly_map(
            result.teacher,
            levels,
            size,
            fusion=self.config.fusion,
            sigma=self.config.sigma * size[0] / 256,
            weights=weights,
            align_corners=self.config.align_corners,
            value_share=self.config.map_value_share,
        )

    def image_score(self, maps: Tensor) -> Tensor:
        """(N, H, W) -> (N,): the maximum of each map, or the mean of its ``top_fraction`` largest pixels."""
        flat = maps.flatten(1)
        count = max(1, round(self.config.top_fraction * flat.shape[1]))
        return flat.topk(count, dim=1).values.mean(dim=1)

    def branches(self) -> tuple[str, ...]:
        """The branches that this model has."""
        return tuple(name for name in BRANCHES if getattr(self.config, f"{name}_branch"))
