"""One step of training: losses, gradients and update."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bkd_fast.config import BKDConfig
from bkd_fast.model import BKD
from bkd_fast.model.support import Exclude, Support


class TrainingStep(nn.Module):
    """What the strategy wraps: from teacher levels to losses, so that data-parallel hooks see one forward."""

    def __init__(self, model: BKD) -> None:
        super().__init__()
        self.model = model
        self.branches = model.learned_branches()

    def forward(
        self, query: list[Tensor], support: Support, exclude: Exclude | None = None, region: Tensor | None = None
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the losses, and the largest and mean absolute offset of every level."""
        result = self.model.distill(query, support, exclude, self.branches, region)
        offsets = [offset.detach().abs() for offset in result.offsets]
        return self.model.losses(result), [torch.stack([offset.max(), offset.mean()]) for offset in offsets]


def train_step(
    fabric: Fabric,
    step: nn.Module,
    optimizer: Any,
    query: list[Tensor],
    support: Support,
    exclude: Exclude | None = None,
    clip_norm: float | None = None,
    region: Tensor | None = None,
) -> tuple[dict[str, float], list[Tensor]]:
    """Update the weights once; not if the total loss is not finite, which is for the caller to check.

    Args:
        step: a :class:`TrainingStep` as ``fabric.setup`` returns it, and so is ``optimizer``.
        query: teacher levels (N, C_l, H_l, W_l).
        support: of :meth:`BKD.make_support` (not frozen).
        exclude: supports that each query must not choose: itself.
        clip_norm: largest norm of the gradient; None = no limit.
        region: what of each query is looked at, see :meth:`BKD.distill`.

    Returns:
        Losses by name before the update, and the offsets' sizes as :class:`TrainingStep` gives them.
    """
    losses, offsets = step(query, support, exclude, region)
    values = {name: float(loss.detach()) for name, loss in losses.items()}
    if math.isfinite(values["total"]):
        optimizer.zero_grad()
        fabric.backward(losses["total"])
        if clip_norm is not None:
            fabric.clip_gradients(step, optimizer, max_norm=clip_norm)
        optimizer.step()
    return values, offsets


def make_optimizer(model: BKD, config: BKDConfig) -> torch.optim.Adam:
    """Return Adam (paper 3.2), with a lower rate for the offset predictors."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("alignment.predictors")].append(parameter)
    return torch.optim.Adam(
        [
            {"params": parameters, "scale": config.training.offset_lr_scale if offsets else 1.0}
            for offsets, parameters in groups.items()
            if parameters
        ],
        lr=config.training.learning_rate,
        betas=config.training.betas,
    )
