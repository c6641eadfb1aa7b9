"""Forward distillation: the features of k normal support images, warped onto the query (Eq. 1-5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bkd_fast.config import AlignmentConfig, RetrievedSupport, SampledSupport
from bkd_fast.ops import modulated_deform_conv2d, modulated_deform_gather, project_support


class PreparedLevel(NamedTuple):
    """What one level of the alignment needs of the support; B is 1 (one support for all queries) or N.

    ``features``: (B, k, C, H, W). ``fused``: (B, k, hidden, H, W), the support's half of Conv([Q, S]).
    ``projected``: (1, k * T * C, H, W), W_m * S of all shots and taps, of a support that queries share; the shots' mean
    is taken in it, unless the closest one is. None where each query has its own.
    """

    features: Tensor
    fused: Tensor
    projected: Tensor | None


class Alignment(NamedTuple):
    """``aligned``: per level (N, C, H, W). ``offsets``: per level (N * k, 2T, H, W) as (y, x) in feature pixels."""

    aligned: list[Tensor]
    offsets: list[Tensor]


class OffsetPredictor(nn.Module):
    """f of Eq. 1 and 4 on one level: convolutions over [Q, S], whose query and support halves are kept apart.

    Conv(Concat(Q, S), W) = Conv(Q, W_q) + Conv(S, W_s), so that the half of a fixed support is computed once.
    """

    def __init__(self, channels: int, taps: int, config: AlignmentConfig, *, cascaded: bool) -> None:
        super().__init__()
        outputs = taps * (3 if config.modulated else 2)
        hidden = outputs if config.depth == 1 else config.width
        self.query = nn.Conv2d(channels, hidden, 3, padding=1)
        self.support = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        # Cascade by concatenation: the coarser level's offsets are a third input of the same convolution.
        concatenated = cascaded and config.cascade == "concat"
        self.coarser = nn.Conv2d(2 * taps, hidden, 3, padding=1, bias=False) if concatenated else None
        tail: list[nn.Module] = []
        for index in range(1, config.depth):
            width = outputs if index == config.depth - 1 else hidden
            tail += [nn.LeakyReLU(0.1), nn.Conv2d(hidden, width, 3, padding=1)]
        self.tail = nn.Sequential(*tail)
        if config.offset_init == "zero":
            # No motion at the start: with a Dirac kernel the first aligned feature is the support itself.
            for layer in (tail[-1],) if tail else (self.query, self.support, self.coarser):
                if isinstance(layer, nn.Conv2d):
                    nn.init.zeros_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, fused: Tensor, coarser: Tensor | None) -> Tensor:
        """``query`` (N, C, H, W), ``fused`` (B, k, hidden, H, W) -> F_offset (N * k, 2T or 3T, H, W)."""
        fusion = (self.query(query).unsqueeze(1) + fused).flatten(0, 1)
        if self.coarser is not None and coarser is not None:
            fusion = fusion + self.coarser(coarser)
        return self.tail(fusion)


def groups_of(channels: int, max_channels: int | None) -> int:
    """Return the smallest number of equal groups with at most ``max_channels`` channels each.

    1 if ``max_channels`` is None, or if no group size of at least a quarter of it divides the channels.
    """
    if max_channels is None or channels <= max_channels:
        return 1
    sizes = [size for size in range(max_channels, max(1, max_channels // 4) - 1, -1) if channels % size == 0]
    return channels // sizes[0] if sizes else 1


class AlignmentPyramid(nn.Module):
    """The cascaded pyramid of modulated deformable convolutions that turns supports into aligned features.

    Args:
        channels: of each view.
        support: how shots are aggregated.
        config: of the deformable convolutions; None = supports are not warped.
    """

    def __init__(
        self, channels: Sequence[int], support: RetrievedSupport | SampledSupport, config: AlignmentConfig | None
    ) -> None:
        super().__init__()
        self.support = support
        self.config = config or AlignmentConfig(kernel="identity")
        self.kernel_size = 3 if self.config.kernel == "full" else 1
        self.taps = self.kernel_size**2
        deepest = len(channels) - 1
        self.predictors = nn.ModuleList()
        if config is not None:
            self.predictors.extend(
                OffsetPredictor(width, self.taps, config, cascaded=level < deepest)
                for level, width in enumerate(channels)
            )
        self.kernels = nn.ParameterList()
        if config is not None and config.kernel == "full":
            for width in channels:
                groups = groups_of(width, config.max_group_channels)
                weight = torch.empty(width, width // groups, 3, 3)
                if config.kernel_init == "dirac":
                    nn.init.dirac_(weight, groups)
                else:
                    nn.init.kaiming_uniform_(weight, a=5**0.5)  # torch's default for a convolution
                self.kernels.append(nn.Parameter(weight))

    def prepare(self, support: Sequence[Tensor], *, shared: bool = True) -> list[PreparedLevel]:
        """What depends on the support alone.

        Args:
            support: per level (B, k, C, H, W).
            shared: whether further queries will be aligned with it, where B is 1. For a single one, to sample first and
                then to multiply is faster: twice, with 1,024 channels.
        """
        prepared = []
        for level, features in enumerate(support):
            if not self.predictors:
                prepared.append(PreparedLevel(features, features.new_empty(0), None))
                continue
            batch, shots = features.shape[:2]
            flat = features.flatten(0, 1)
            predictor = self.predictors[level]
            assert isinstance(predictor, OffsetPredictor)
            fused = predictor.support(flat).unflatten(0, (batch, shots))
            projected = None
            if batch == 1 and shared:
                kernel = self._kernel(level)
                maps = flat if kernel is None else project_support(flat, kernel)
                projected = maps.reshape(1, -1, *maps.shape[2:])
                if self.support.aggregation != "min":
                    projected = projected / shots
            prepared.append(PreparedLevel(features, fused, projected))
        return prepared

    def forward(self, query: Sequence[Tensor], prepared: Sequence[PreparedLevel]) -> Alignment:
        """Warps the prepared support onto ``query``, per level (N, C, H, W), from the deepest level up (Eq. 4-5)."""
        if not self.predictors:
            pairs = zip(query, prepared, strict=True)
            still = [level.features.expand(q.shape[0], -1, -1, -1, -1) for q, level in pairs]
            return Alignment([self._aggregated(q, shots) for q, shots in zip(query, still, strict=True)], [])
        aligned: list[Tensor] = []
        offsets: list[Tensor] = []
        coarser: Tensor | None = None
        for level in reversed(range(len(query))):
            size = query[level].shape[-2:]
            upsampled = None if coarser is None else self._upsample(coarser, size)
            fusion = self.predictors[level](query[level], prepared[level].fused, upsampled)
            # Positions are float32 whatever the features are: half precision steps by 1/32 pixel at 64.
            fusion = fusion.float() if fusion.dtype in (torch.float16, torch.bfloat16) else fusion
            offset = self._cascade(self._activate(fusion[:, : 2 * self.taps]), upsampled)
            # 2 * sigmoid: a mask of one, no modulation, where the predictor says nothing.
            mask = 2 * fusion[:, 2 * self.taps :].sigmoid() if self.config.modulated else None
            aligned.append(self._warp(level, query[level], prepared[level], offset, mask))
            offsets.append(offset)
            coarser = offset
        return Alignment(aligned[::-1], offsets[::-1])

    def _activate(self, fusion: Tensor) -> Tensor:
        if self.config.activation == "softmax":
            return fusion.softmax(dim=1)  # Eq. 3; over the channels, since the paper names no dimension
        if self.config.activation == "tanh":
            return self.config.max_offset * fusion.tanh()
        return fusion

    def _upsample(self, offset: Tensor, size: torch.Size) -> Tensor:
        upsampled = F.interpolate(offset, size=size, mode="bilinear", align_corners=False)
        if self.config.cascade == "product":
            return upsampled  # Eq. 4 to the letter
        # A pixel of the coarser level is two of this one: the motion grows with the grid (as in EDVR).
        ratios = [length / coarser for length, coarser in zip(size, offset.shape[-2:], strict=True)]
        if ratios[0] == ratios[1]:
            return upsampled * ratios[0]
        moves = upsampled.unflatten(1, (-1, 2)).unbind(2)
        return torch.stack([move * ratio for move, ratio in zip(moves, ratios, strict=True)], 2).flatten(1, 2)

    def _cascade(self, offset: Tensor, upsampled: Tensor | None) -> Tensor:
        if upsampled is None or self.config.cascade == "concat":
            return offset
        return offset * upsampled if self.config.cascade == "product" else offset + upsampled

    def _kernel(self, level: int) -> Tensor | None:
        return self.kernels[level] if len(self.kernels) else None

    def _warp(self, level: int, query: Tensor, prepared: PreparedLevel, offset: Tensor, mask: Tensor | None) -> Tensor:
        """Eq. 2 and the aggregation of the k shots -> (N, C, H, W)."""
        count, shots = query.shape[0], prepared.features.shape[1]
        if prepared.projected is not None and self.support.aggregation != "min":
            # Shots are further groups of taps: one pass sums over all of them.
            offset = offset.unflatten(0, (count, shots)).flatten(1, 2)
            mask = None if mask is None else mask.unflatten(0, (count, shots)).flatten(1, 2)
            return self._gather(prepared.projected, offset, mask)
        if prepared.projected is not None:
            maps = prepared.projected.unflatten(1, (shots, -1)).transpose(0, 1).expand(-1, count, -1, -1, -1)
            moves = offset.unflatten(0, (count, shots))
            masks = None if mask is None else mask.unflatten(0, (count, shots))
            warped = torch.stack(
                [
                    self._gather(maps[shot][:1], moves[:, shot], None if masks is None else masks[:, shot])
                    for shot in range(shots)
                ],
                dim=1,
            )
        else:
            support = prepared.features.flatten(0, 1)
            kernel = self._kernel(level)
            if kernel is None:
                warped = self._gather(support, offset, mask)
            else:
                warped = modulated_deform_conv2d(support, offset, kernel, padding=1, mask=mask)
            warped = warped.unflatten(0, (count, shots))
        return self._aggregated(query, warped)

    def _aggregated(self, query: Tensor, warped: Tensor) -> Tensor:
        """The k shots (N, k, C, H, W) of each query as one: (N, C, H, W)."""
        if warped.shape[1] == 1:
            return warped.squeeze(1)
        if self.support.aggregation != "min":
            return warped.mean(dim=1)
        distance = 1 - F.cosine_similarity(query.unsqueeze(1), warped, dim=2)
        closest = distance.argmin(dim=1, keepdim=True).unsqueeze(2).expand(-1, -1, warped.shape[2], -1, -1)
        return warped.gather(1, closest).squeeze(1)

    def _gather(self, projected: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        return modulated_deform_gather(
            projected, offset, mask, kernel_size=self.kernel_size, padding=self.kernel_size // 2
        )
