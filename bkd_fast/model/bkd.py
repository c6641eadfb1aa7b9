"""Bidirectional knowledge distillation: the whole network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bkd_fast.config import BKDConfig, RetrievedSupport
from bkd_fast.errors import BKDError
from bkd_fast.model.alignment import AlignmentPyramid
from bkd_fast.model.bottleneck import OneClassBottleneck, check_strides
from bkd_fast.model.memory import SparseMemory
from bkd_fast.model.student import StudentDecoder
from bkd_fast.model.support import (
    Exclude,
    FixedSupport,
    Query,
    QuerySupport,
    SampledViews,
    Support,
    describe,
    make_bank,
)
from bkd_fast.model.teacher import Teacher, Weights, with_image_size
from bkd_fast.model.views import joint_views, middle
from bkd_fast.ops import cosine_anomaly_map, distillation_loss
from bkd_fast.ops.top_mean import top_mean

BRANCHES = ("forward", "reverse")
First = TypeVar("First")
Second = TypeVar("Second")
SCORES = ("map", "image")  # what the image score combines


class Both(Protocol):
    """Run two functions without arguments that do not depend on each other."""

    def __call__(self, first: Callable[[], First], second: Callable[[], Second], /) -> tuple[First, Second]:
        """Return both results."""


def in_turn(first: Callable[[], First], second: Callable[[], Second], /) -> tuple[First, Second]:
    """Run one after the other."""
    return first(), second()


class Distillation(NamedTuple):
    """The query's views Q and what each branch makes of them; per view (N, C, H, W).

    Views are the teacher's levels, or with ``levels="joint"`` the finest one and all of them side by side.
    ``aligned`` (S~) and ``offsets`` are empty without the forward branch, ``reconstruction`` (D: what memory or student
    rebuild) without the reverse one. They are of the last views where a branch leaves the first ones out. ``image``
    (N,) is the distance of each whole image from the best combination of its supports, where queries retrieve them, and
    ``expected`` (N, 2) what to take off the logarithms of map and image for the score.
    ``region`` (N or 1, H, W) bool: what is looked at, at the network's size; None: everything. Outside, both branches
    give the query itself. ``shots`` (N, k): the images of the bank that each query retrieves.
    """

    teacher: list[Tensor]
    aligned: list[Tensor]
    reconstruction: list[Tensor]
    offsets: list[Tensor]
    image: Tensor | None = None
    expected: Tensor | None = None
    region: Tensor | None = None
    shots: Tensor | None = None


class BKD(nn.Module):
    """The network of Fig. 2: a frozen teacher, forward distillation and reverse distillation.

    Args:
        config: which branches there are, and how they are built.
        weights: of the teacher (:func:`bkd_fast.training.weights.load_weights`); None keeps random ones, for a state
            dict that is loaded afterwards.

    Raises:
        BKDError: see :class:`bkd_fast.model.teacher.Teacher`.
    """

    roi: Tensor | None  # (1, H, W) bool, see set_roi

    def __init__(self, config: BKDConfig, *, weights: Weights | None) -> None:
        super().__init__()
        if config.teacher.image_size is None:
            config = config.with_changes(teacher=with_image_size(config.teacher))
        self.config = config
        self.teacher = Teacher(config.teacher, weights)
        channels, strides = self.teacher.channels, self.teacher.strides
        joint = config.teacher.levels == "joint"
        widths, self.strides = channels, strides  # of the views
        if joint:
            side_by_side = strides[middle(len(strides))]
            finer = strides[0] < side_by_side  # and is a view alone
            widths = (*channels[:finer], sum(channels))
            self.strides = (*strides[:finer], side_by_side)
        # Views of a vision transformer share a stride: name them by layer.
        repeated = len(set(self.strides)) < len(self.strides)
        self.names: tuple[int | str, ...] = self.strides
        if repeated:
            self.names = tuple(level.name for level in self.teacher.levels)
        remembered = widths[-1:] if joint else widths  # the reverse branch's views
        if config.support is not None:
            self.alignment = AlignmentPyramid(widths, config.support, config.alignment)
        if isinstance(config.support, RetrievedSupport):
            # By how much the logarithms of map and whole-image distance of each support image, scored without itself,
            # exceed those of normal images; zeros for the images that are missing or cannot be scored.
            self.register_buffer("support_excess", torch.zeros(config.support.bank_size, len(SCORES)))
        if config.memory is not None:
            self.memories = nn.ModuleList(SparseMemory(width, config.memory) for width in remembered)
        if config.student is not None:
            check_strides(config.teacher.name, strides)
            self.bottleneck = OneClassBottleneck(channels, config.student)
            self.student = StudentDecoder(self.bottleneck.channels, channels, config.student)
        # Of normal images: the mean distance of each branch and view, and mean and std of the logarithms that the image
        # score combines. Plain numbers, so that compiled and exported graphs hold them as constants; a state dict has
        # them as one tensor.
        counts = {"forward": len(widths), "reverse": len(remembered)}
        self.map_scale = {branch: [1.0] * counts[branch] for branch in self.branches()}
        self.score_scale = {name: [0.0, 1.0] for name in SCORES}
        self.register_buffer("roi", None, persistent=False)
        self.to(memory_format=torch.channels_last)

    def set_roi(self, roi: Tensor) -> None:
        """Look at a region of each image only, (H, W) bool of the network's size.

        Raises:
            BKDError: no pixel is in it.
        """
        if not roi.any():
            raise BKDError(f"no pixel of the region of interest is left at the network's size of {tuple(roi.shape)}")
        device = next(self.buffers()).device
        self.roi = roi.to(device).unsqueeze(0)
        self.roi_pixels = int(roi.sum())
        self.teacher.roi = self.roi.float().unsqueeze(1)
        shapes = [shape[1:] for shape in self.teacher.shapes(self.config.teacher.size)]
        if self.config.teacher.levels == "joint":  # as joint_views makes them
            side_by_side = shapes[middle(len(shapes))]
            shapes = [*shapes[: shapes[0] != side_by_side], side_by_side]
        # Computed once: not every run-time has the pooling.
        for index, shape in enumerate(shapes):
            self.register_buffer(f"roi_{index}", cells(self.roi, shape), persistent=False)

    def get_extra_state(self) -> Tensor:
        """Return the scales of maps and scores as one tensor, float64."""
        return torch.tensor([*chain(*self.map_scale.values(), *self.score_scale.values())], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the scales from what :meth:`get_extra_state` returned."""
        values = iter(state.tolist())
        for scales in (*self.map_scale.values(), *self.score_scale.values()):
            scales[:] = islice(values, len(scales))

    def forward(self, images: Tensor, support: Tensor) -> Distillation:
        """Run both branches.

        Args:
            images: queries (N, 3, H, W) in [0, 1].
            support: (k, 3, H, W), shared by all queries (or retrieved from), or (N, k, 3, H, W).
        """
        return self.distill(self.teacher(images), self.make_support(self.support_levels(support)))

    def prepare(self) -> None:
        """Compute once what predictions need of weights that no longer change: results keep their bits."""
        for memory in getattr(self, "memories", ()):
            memory.prepare()

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
        return joint_views(levels) if self.config.teacher.levels == "joint" else list(levels)

    def make_support(self, levels: Sequence[Tensor], *, frozen: bool = True, own: bool = False) -> Support:
        """Return a support for :meth:`distill`, with everything computed that depends on the support alone.

        Args:
            levels: of :meth:`support_levels`.
            frozen: False for a training step: what depends on learned weights is computed again in each call.
            own: whether these are the images that ``support_excess`` was measured with.

        Raises:
            BKDError: a support for each query where queries retrieve theirs from one bank.
        """
        if not levels:
            return FixedSupport([])
        batch = levels[0].shape[:2]
        flat = [level.flatten(0, 1) for level in levels]
        if self.config.retrieves:
            if batch[0] != 1:
                raise BKDError(f"support of shape {tuple(batch)}: queries choose from one set of images (k, 3, H, W)")
            # Some images at a time, so that the bank is never held in float32.
            parts = [
                [view.half() for view in self.views([level.float() for level in part])]
                for part in zip(*(level.split(16) for level in flat), strict=True)
            ]
            excess = self.get_buffer("support_excess")[: batch[1]] if own else None
            expected = None if excess is None else self.config.anomaly_map.relative * excess
            descriptors = describe(flat[-1].float())
            return make_bank([torch.cat(views) for views in zip(*parts, strict=True)], descriptors, expected)
        views = SampledViews([view.unflatten(0, batch) for view in self.views(flat)])
        return FixedSupport(self.alignment.prepare(views.views)) if frozen else views

    def distill(
        self,
        levels: Sequence[Tensor],
        support: Support,
        exclude: Exclude | None = None,
        branches: Sequence[str] = BRANCHES,
        region: Tensor | None = None,
        both: Both = in_turn,
    ) -> Distillation:
        """Run the given branches that this model has.

        Args:
            levels: the teacher's levels of the queries.
            support: of :meth:`make_support`.
            exclude: what queries that are training images must not be compared with: themselves.
            region: (N, H, W) bool, what is looked at of each query; None: of all what :meth:`set_roi` says.
            both: how the two branches run, which do not depend on each other.
        """
        query = Query(levels, self.views(levels))

        def forward() -> tuple[list[Tensor], list[Tensor], QuerySupport]:
            if not self.config.forward_branch or "forward" not in branches:
                return [], [], QuerySupport([], None)
            supports = support.for_query(query, self.alignment, exclude)
            return *self.alignment(query.views, supports.levels), supports

        def reverse() -> list[Tensor]:
            if not self.config.reverse_branch or "reverse" not in branches:
                return []
            return self._rebuild(query.views, exclude)

        (aligned, offsets, supports), reconstruction = both(forward, reverse)
        if region is not None or self.roi is not None:
            inside = self._inside(region, query.views)
            aligned = _outside_as(query.views, aligned, inside)
            reconstruction = _outside_as(query.views, reconstruction, inside)
            region = self.roi if region is None else region
        return Distillation(
            list(query.views), aligned, reconstruction, offsets, supports.distance, supports.expected, region,
            supports.shots,
        )  # fmt: skip

    def _inside(self, region: Tensor | None, views: Sequence[Tensor]) -> list[Tensor]:
        """Return which pixels of each view show any of a region, (N or 1, 1, H, W) bool."""
        if region is None:
            return [self.get_buffer(f"roi_{index}") for index in range(len(views))]
        return [cells(region, view.shape[2:]) for view in views]

    def learned_branches(self) -> tuple[str, ...]:
        """The branches that have something to learn; the others are calibrated only."""
        parts = {"forward": ("alignment",), "reverse": ("memories", "bottleneck", "student")}
        return tuple(
            branch
            for branch in self.branches()
            if any(p.requires_grad for name in parts[branch] for p in getattr(self, name, nn.Identity()).parameters())
        )

    def unaligned(self, levels: Sequence[Tensor], support: Support) -> list[Tensor]:
        """Return the support of queries before the alignment warps it, the mean of its shots.

        Args:
            levels: the teacher's levels of the queries (N, C_l, H_l, W_l).

        Returns:
            Per view (N or 1, C, H, W).
        """
        supports = support.for_query(Query(levels, self.views(levels)), self.alignment)
        return [level.features.mean(1) for level in supports.levels]

    def _rebuild(self, views: Sequence[Tensor], exclude: Exclude | None) -> list[Tensor]:
        """Return D of Eq. 12: the read-out of the memory, or what bottleneck and student make of it."""
        config = self.config
        levels = inputs = list(views[-1:] if config.teacher.levels == "joint" else views)
        if config.memory is not None:
            hidden = None if exclude is None else exclude.items
            read = [memory(level, hidden) for memory, level in zip(self.memories, levels, strict=True)]
            merged = config.memory.merge == "residual"
            inputs = [z + level for z, level in zip(read, levels, strict=True)] if merged else read
        if config.student is None:
            return read
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        rebuilt = self.student(self.bottleneck(inputs), sizes)
        if config.student.correction:
            return [z + correction for z, correction in zip(read, rebuilt, strict=True)]
        return rebuilt

    def losses(self, result: Distillation) -> dict[str, Tensor]:
        """Return ``forward``, ``reverse`` and their weighted sum ``total`` (Eq. 11-12); scalars, float32.

        With distance "squared" a branch's loss is the mean squared difference, summed over its views.
        """
        losses, training = {}, self.config.training
        for branch, outputs in self.outputs(result).items():
            targets = result.teacher[-len(outputs) :]
            if self.config.anomaly_map.distance == "squared":
                pairs = zip(outputs, targets, strict=True)
                losses[branch] = torch.stack([F.mse_loss(output.float(), target) for output, target in pairs]).sum()
            else:
                losses[branch] = distillation_loss(
                    targets, outputs, direction=training.direction, value_weight=training.value_weight
                )
        weights = {"forward": training.forward_weight, "reverse": training.reverse_weight}
        losses["total"] = torch.stack([weights[branch] * loss for branch, loss in losses.items()]).sum()
        return losses

    def anomaly_map(self, result: Distillation, size: tuple[int, int], branches: Sequence[str] = BRANCHES) -> Tensor:
        """Return the map of Eq. 13 over the given branches that this model has: (N, H, W) of ``size``, raw, float32."""
        outputs = {branch: views for branch, views in self.outputs(result).items() if branch in branches}
        flat = [view for views in outputs.values() for view in views]
        if self.config.anomaly_map.fusion != "geometric":
            targets = result.teacher[-min(len(views) for views in outputs.values()) :]
            weights = [1 / scale for branch in outputs for scale in self.map_scale[branch]]
            return _within(self._map(targets, flat, size, weights), result.region)
        # (d / scale) ** exponent of every branch and view: branches count the same. Of joint views the finest level
        # counts half: it sharpens the map of parts that supports explain, and blurs that of textures.
        targets = [view for views in outputs.values() for view in result.teacher[-len(views) :]]
        weights = [1 / scale for branch in outputs for scale in self.map_scale[branch]]
        joint = self.config.teacher.levels == "joint"
        shares = [[0.5, 1.0] if joint and len(views) == 2 else [1.0] * len(views) for views in outputs.values()]
        exponents = [share / (len(outputs) * sum(own)) for own in shares for share in own]
        return _within(self._map(targets, flat, size, weights, exponents), result.region)

    def level_maps(self, result: Distillation, size: tuple[int, int]) -> dict[str, list[Tensor]]:
        """Return the maps (N, H, W) of ``size`` that each view of each branch would give alone, not scaled."""
        return {
            branch: [
                _within(self._map([target], [output], size), result.region)
                for target, output in zip(result.teacher[-len(views) :], views, strict=True)
            ]
            for branch, views in self.outputs(result).items()
        }

    def _map(
        self,
        teacher: list[Tensor],
        student: list[Tensor],
        size: tuple[int, int],
        weights: list[float] | None = None,
        exponents: list[float] | None = None,
    ) -> Tensor:
        """Call the operator with the options of the configuration."""
        config = self.config.anomaly_map
        return cosine_anomaly_map(
            teacher,
            student,
            size,
            fusion="sum" if config.fusion == "sum" else "product",
            sigma=config.sigma * size[0] / 256,
            weights=weights,
            exponents=exponents,
            align_corners=config.align_corners,
            value_share=1.0 if config.distance == "squared" else 0.0,
        )

    def outputs(self, result: Distillation) -> dict[str, list[Tensor]]:
        """What each branch that this model has makes of its levels, the last ones of ``result.teacher``."""
        return {
            branch: levels
            for branch, levels in zip(BRANCHES, (result.aligned, result.reconstruction), strict=True)
            if levels
        }

    def predict(
        self, images: Tensor, support: Support, region: Tensor | None = None, both: Both = in_turn
    ) -> tuple[Tensor, Tensor]:
        """Return scores (N,) and maps (N, H, W), float32, of images (N, 3, H, W) in [0, 1] of the configured size.

        Args:
            region, both: see :meth:`distill`.
        """
        result = self.distill(self.teacher(images), support, region=region, both=both)
        maps = self.anomaly_map(result, self.config.teacher.size)
        return self.image_score(maps, result.image, result.expected, region), maps

    def top_mean(self, maps: Tensor, region: Tensor | None = None) -> Tensor:
        """Return the mean of the ``top_fraction`` largest pixels of each map (N, H, W), or its maximum: (N,).

        The fraction is of the pixels that are looked at, in each ``region`` (N, H, W), or as :meth:`set_roi` says.
        """
        flat = maps.flatten(1)
        if region is None:
            return top_mean(flat, self._top(flat.shape[1] if self.roi is None else self.roi_pixels))
        counts = region.flatten(1).sum(1).tolist()
        return torch.cat([top_mean(row, self._top(count)) for row, count in zip(flat.split(1), counts, strict=True)])

    def _top(self, pixels: int) -> int:
        return max(1, round(self.config.anomaly_map.top_fraction * pixels))

    def image_score(
        self,
        maps: Tensor,
        image: Tensor | None = None,
        expected: Tensor | None = None,
        region: Tensor | None = None,
    ) -> Tensor:
        """Return the scores (N,) of images from their maps (N, H, W) and the distances (N,) of the whole images.

        ``log(exp(z_map) + image_weight exp(z_image))``, z the logarithm of each, less what is ``expected`` (N, 2) of
        images like it, in units of its std over normal images: a small defect shows in one, a part out of place in the
        other. With ``image_weight`` 0 the map's mean alone.
        """
        return self.score_of(self.top_mean(maps, region), image, expected)

    def score_of(
        self,
        top: Tensor,
        image: Tensor | None,
        expected: Tensor | None = None,
        scale: Mapping[str, Sequence[float]] | None = None,
    ) -> Tensor:
        """See :meth:`image_score`, from :meth:`top_mean`; with another ``scale`` than ``score_scale``."""
        scale = self.score_scale if scale is None else scale
        if not self.config.anomaly_map.image_weight:
            return top
        distances = top.unsqueeze(0) if image is None else torch.stack([top, image])
        logarithms = distances.clamp_min(1e-12).log()
        if expected is not None and image is not None:
            logarithms = logarithms - expected.T
        mean, std = scale["map"]
        score = (logarithms[0] - mean) / std
        if image is None:
            return score
        mean, std = scale["image"]
        # rsub: log image_weight + (logarithm - mean) / std in one kernel less
        weight = math.log(self.config.anomaly_map.image_weight)
        # Not logaddexp: ONNX has no such operator, and what replaces it overflows beyond 88.
        return torch.stack([score, torch.rsub(logarithms[1] - mean, weight, alpha=-1 / std)]).logsumexp(0)

    def tiles_score(self, scores: Tensor) -> Tensor:
        """Return the score () of an image from those of its tiles (T,): ``log(sum(exp(score)))``.

        That goes on as :meth:`image_score` begins: traces of one defect on several tiles add up, and one tile that
        differs from normal by much counts alone. Scores that are no logarithms (``image_weight`` 0): the highest.
        """
        return scores.logsumexp(0) if self.config.anomaly_map.image_weight else scores.amax()

    def branches(self) -> tuple[str, ...]:
        """The branches that this model has."""
        return tuple(name for name in BRANCHES if getattr(self.config, f"{name}_branch"))


def cells(region: Tensor, size: Sequence[int]) -> Tensor:
    """Return which feature pixels show any of a region (N, H, W) bool: (N, 1, h, w) bool."""
    return F.adaptive_avg_pool2d(region.float().unsqueeze(1), (size[0], size[1])) > 0


def _outside_as(views: Sequence[Tensor], outputs: list[Tensor], inside: list[Tensor]) -> list[Tensor]:
    """Return the outputs of the last views, outside those of the query itself: there is no distance."""
    first = len(views) - len(outputs)
    return [torch.where(inside[first + index], output, views[first + index]) for index, output in enumerate(outputs)]


def _within(maps: Tensor, region: Tensor | None) -> Tensor:
    """Return maps (N, H, W) that are zero outside a region (N or 1, H, W)."""
    return maps if region is None else maps * region
