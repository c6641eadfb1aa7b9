"""Bidirectional knowledge distillation: the whole network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bkd_fast.config import BKDConfig
from bkd_fast.errors import BKDError
from bkd_fast.model.alignment import AlignmentPyramid, PreparedLevel
from bkd_fast.model.bottleneck import OneClassBottleneck
from bkd_fast.model.joint import joint_views
from bkd_fast.model.memory import SparseMemory
from bkd_fast.model.retrieval import SupportPool, describe, make_pool, matched, nearest, residual
from bkd_fast.model.student import StudentDecoder
from bkd_fast.model.teacher import STRIDES, Teacher
from bkd_fast.ops import cosine_anomaly_map, distillation_loss

BRANCHES = ("forward", "reverse")
Prepared = SupportPool | list[PreparedLevel]


class Distillation(NamedTuple):
    """The query's views Q and what each branch makes of them; per view (N, C, H, W).

    Views are the teacher's levels, or with ``levels="joint"`` the one at stride 4 and all of them side by side.
    ``aligned`` (S~) and ``offsets`` are empty without the forward branch, ``student`` (D) without the reverse one. They
    are of the last views, where a branch leaves the first ones out. ``image`` (N,) is the distance of each whole image
    from the best combination of its supports, where queries look these up.
    """

    teacher: list[Tensor]
    aligned: list[Tensor]
    student: list[Tensor]
    offsets: list[Tensor]
    image: Tensor | None = None


class Exclude(NamedTuple):
    """What each query must not be compared with: ``supports`` (N, P) and ``items`` (N, I), bool; None: nothing."""

    supports: Tensor | None
    items: Tensor | None


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
        joint = config.levels == "joint"
        widths = (channels[0], sum(channels)) if joint else channels
        self.strides = STRIDES[: len(widths)]  # of the views
        remembered = widths[-1:] if joint else widths  # the reverse branch's views
        if config.forward_branch:
            self.alignment = AlignmentPyramid(widths, config)
        if config.reverse_branch:
            if config.memory_items:
                self.memories = nn.ModuleList(SparseMemory(width, config) for width in remembered)
            if config.student:
                self.bottleneck = OneClassBottleneck(channels, config)
                self.student = StudentDecoder(self.bottleneck.channels, channels, config)
        # Of normal images: the mean distance of each branch and view, and mean and std of the logarithms that the image
        # score combines. Plain numbers, so that compiled and exported graphs hold them as constants.
        counts = {"forward": len(widths), "reverse": len(remembered)}
        self.map_scale = {branch: [1.0] * counts[branch] for branch in self.branches()}
        self.score_scale = {"map": [0.0, 1.0], "image": [0.0, 1.0]}
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
        """Return the teacher's levels (B, k, C_l, H_l, W_l) of ``support``; none without forward branch.

        Args:
            support: (k, 3, H, W), B = 1, or (B, k, 3, H, W).
        """
        if not self.config.forward_branch:
            return []
        batched = support if support.ndim == 5 else support.unsqueeze(0)
        return [level.unflatten(0, batched.shape[:2]) for level in self.teacher(batched.flatten(0, 1))]

    def views(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return what the branches compare, from the teacher's standardised levels (N, C_l, H_l, W_l)."""
        return joint_views(levels) if self.config.levels == "joint" else list(levels)

    def prepare(self, support_levels: Sequence[Tensor]) -> Prepared:
        """Return everything that depends on the support alone; computed once where the support is fixed."""
        if not self.config.forward_branch:
            return []
        batch = support_levels[0].shape[:2]
        if self.config.looks_up and batch[0] != 1:
            raise BKDError(
                f"support of shape {tuple(batch)} + features: with support_draw='nearest' queries choose from one set "
                "of images, given as (k, 3, H, W)"
            )
        flat = [level.flatten(0, 1) for level in support_levels]
        if self.config.looks_up:
            # Some images at a time, so that the bank is never held in float32.
            parts = [
                [view.half() for view in self.views([level.float() for level in part])]
                for part in zip(*(level.split(16) for level in flat), strict=True)
            ]
            return make_pool([torch.cat(views) for views in zip(*parts, strict=True)], describe(flat[-1].float()))
        return self.alignment.prepare([view.unflatten(0, batch) for view in self.views(flat)])

    def distill(
        self,
        query: Sequence[Tensor],
        prepared: Prepared,
        exclude: Exclude | None = None,
        branches: Sequence[str] = BRANCHES,
    ) -> Distillation:
        """Run the given branches that this model has.

        Args:
            query: the teacher's levels of the queries.
            exclude: what queries that are training images must not be compared with: themselves.
        """
        views = self.views(query)
        aligned: list[Tensor] = []
        offsets: list[Tensor] = []
        image: Tensor | None = None
        if self.config.forward_branch and "forward" in branches:
            if isinstance(prepared, SupportPool):
                support, image = self._matched(views, query[-1], prepared, exclude)
                prepared = self.alignment.prepare([view.unsqueeze(1) for view in support], shared=False)
            aligned, offsets = self.alignment(views, prepared)
        student: list[Tensor] = []
        if self.config.reverse_branch and "reverse" in branches:
            student = self._rebuild(views, exclude)
        return Distillation(views, aligned, student, offsets, image)

    def learned_branches(self) -> tuple[str, ...]:
        """The branches that have something to learn; the others are calibrated only."""
        parts = {"forward": ("alignment",), "reverse": ("memories", "bottleneck", "student")}
        return tuple(
            branch
            for branch in self.branches()
            if any(p.requires_grad for name in parts[branch] for p in getattr(self, name, nn.Identity()).parameters())
        )

    def _matched(
        self, views: list[Tensor], deepest: Tensor, pool: SupportPool, exclude: Exclude | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The support that suits each query, and how far the whole image is from it."""
        config = self.config
        neighbors = config.match_neighbors if config.shot_aggregation == "regression" else 1
        with torch.no_grad():
            descriptors = describe(deepest.float())
            chosen = nearest(descriptors, pool, config.shots, None if exclude is None else exclude.supports)
            support = matched(views, pool, chosen, config.match_radius, neighbors)
            return support, residual(descriptors, pool, chosen)

    def support_of(self, query: Sequence[Tensor], prepared: Prepared) -> list[Tensor]:
        """Return the support of queries before the alignment refines it, the mean of drawn shots: per view.

        Args:
            query: the teacher's levels of the queries (N, C_l, H_l, W_l).

        Returns:
            Per view (N or 1, C, H, W).
        """
        if isinstance(prepared, SupportPool):
            return self._matched(self.views(query), query[-1], prepared)[0]
        return [level.features.mean(1) for level in prepared]

    def _rebuild(self, views: list[Tensor], exclude: Exclude | None) -> list[Tensor]:
        """Memory, bottleneck and student: D of Eq. 12."""
        levels = inputs = views[1:] if self.config.levels == "joint" else views
        if self.config.memory_items:
            hidden = None if exclude is None else exclude.items
            read = [memory(level, hidden) for memory, level in zip(self.memories, levels, strict=True)]
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
        """Return ``forward``, ``reverse`` and their weighted sum ``total`` (Eq. 11-12); scalars, float32.

        With ``distance="squared"`` a branch's loss is the mean squared difference, summed over its views.
        """
        losses = {}
        for branch, outputs in self.outputs(result).items():
            targets = result.teacher[-len(outputs) :]
            if self.config.distance == "squared":
                pairs = zip(outputs, targets, strict=True)
                losses[branch] = torch.stack([F.mse_loss(output.float(), target) for output, target in pairs]).sum()
            else:
                losses[branch] = distillation_loss(
                    targets, outputs, direction=self.config.direction, value_weight=self.config.value_weight
                )
        weights = {"forward": self.config.forward_weight, "reverse": self.config.reverse_weight}
        losses["total"] = torch.stack([weights[branch] * loss for branch, loss in losses.items()]).sum()
        return losses

    def anomaly_map(self, result: Distillation, size: tuple[int, int], branches: Sequence[str] = BRANCHES) -> Tensor:
        """Return the map of Eq. 13 over the given branches that this model has: (N, H, W) of ``size``, raw, float32."""
        outputs = {branch: views for branch, views in self.outputs(result).items() if branch in branches}
        flat = [view for views in outputs.values() for view in views]
        if self.config.fusion != "geometric":
            targets = result.teacher[-min(len(views) for views in outputs.values()) :]
            return self._map(targets, flat, size, [1 / scale for branch in outputs for scale in self.map_scale[branch]])
        # (d / scale) ** exponent of every branch and view: branches count the same. Of joint views the one at stride 4
        # counts half: it sharpens the map of parts that supports explain, and blurs that of textures.
        targets = [view for views in outputs.values() for view in result.teacher[-len(views) :]]
        weights = [1 / scale for branch in outputs for scale in self.map_scale[branch]]
        shares = [self._shares(len(views)) for views in outputs.values()]
        exponents = [share / (len(outputs) * sum(own)) for own in shares for share in own]
        return self._map(targets, flat, size, weights, exponents)

    def level_maps(self, result: Distillation, size: tuple[int, int]) -> dict[str, list[Tensor]]:
        """Return the maps (N, H, W) of ``size`` that each view of each branch would give alone, not scaled."""
        return {
            branch: [
                self._map([target], [output], size)
                for target, output in zip(result.teacher[-len(views) :], views, strict=True)
            ]
            for branch, views in self.outputs(result).items()
        }

    def _shares(self, views: int) -> list[float]:
        return [0.5, 1.0] if self.config.levels == "joint" and views == 2 else [1.0] * views

    def _map(
        self,
        teacher: list[Tensor],
        student: list[Tensor],
        size: tuple[int, int],
        weights: list[float] | None = None,
        exponents: list[float] | None = None,
    ) -> Tensor:
        """Call the operator with what the configuration says of it."""
        return cosine_anomaly_map(
            teacher,
            student,
            size,
            fusion="sum" if self.config.fusion == "sum" else "product",
            sigma=self.config.sigma * size[0] / 256,
            weights=weights,
            exponents=exponents,
            align_corners=self.config.align_corners,
            value_share=1.0 if self.config.distance == "squared" else 0.0,
        )

    def outputs(self, result: Distillation) -> dict[str, list[Tensor]]:
        """What each branch that this model has makes of its levels, the last ones of ``result.teacher``."""
        return {
            branch: levels for branch, levels in zip(BRANCHES, (result.aligned, result.student), strict=True) if levels
        }

    def judge(self, images: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in [0, 1] of the configured size -> scores (N,) and maps (N, H, W), float32."""
        result = self.distill(self.teacher(images), prepared)
        maps = self.anomaly_map(result, self.config.image_size)
        return self.image_score(maps, result.image), maps

    def top_mean(self, maps: Tensor) -> Tensor:
        """Return the mean of the ``top_fraction`` largest pixels of each map (N, H, W), or its maximum: (N,)."""
        flat = maps.flatten(1)
        count = max(1, round(self.config.top_fraction * flat.shape[1]))
        return flat.topk(count, dim=1, sorted=False).values.mean(dim=1)

    def image_score(self, maps: Tensor, image: Tensor | None = None) -> Tensor:
        """Return the scores (N,) of images from their maps (N, H, W) and the distances (N,) of the whole images.

        ``log(exp(z_map) + image_weight exp(z_image))``, z the logarithm of each in units of its std over normal images:
        a small defect shows in one, a part out of place in the other. With ``image_weight`` 0 the map's mean alone.
        """
        return self.score_of(self.top_mean(maps), image)

    def score_of(self, top: Tensor, image: Tensor | None) -> Tensor:
        """See :meth:`image_score`, from :meth:`top_mean`."""
        if not self.config.image_weight:
            return top
        scores = [_in_stds(top, self.score_scale["map"])]
        if image is not None:
            scores.append(_in_stds(image, self.score_scale["image"]) + math.log(self.config.image_weight))
        return torch.stack(scores).logsumexp(0)

    def branches(self) -> tuple[str, ...]:
        """The branches that this model has."""
        return tuple(name for name in BRANCHES if getattr(self.config, f"{name}_branch"))


def _in_stds(distance: Tensor, scale: Sequence[float]) -> Tensor:
    """The logarithm of a distance, less its mean over normal images and divided by its std."""
    return (distance.clamp_min(1e-12).log() - scale[0]) / scale[1]
