"""The frozen ImageNet teacher: three feature levels at strides 4, 8 and 16."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import Tensor, nn

from bkd_fast.config import TeacherConfig
from bkd_fast.errors import BKDError
from bkd_fast.model.folding import fold_batch_norm

STRIDES = (4, 8, 16)


class Weights(NamedTuple):
    """A state dict in timm's names, and where it comes from, for errors."""

    tensors: Mapping[str, Tensor]
    source: str


class Teacher(nn.Module):
    """Any timm CNN with ``features_only``, frozen, batch normalisation folded, followed by pooling and standardisation.

    ``mean_l`` and ``std_l`` (over the training normals), by which level l is standardised, are zero and one until
    :func:`bkd_fast.model.calibration.calibrate` sets them.

    Args:
        config: which network, and what is made of its features.
        weights: ImageNet weights (:func:`bkd_fast.data.weights.load_weights`); None keeps random ones, for a state dict
            that is loaded afterwards.

    Raises:
        BKDError: an unknown model name, a model without levels at strides 4, 8 and 16, or weights that do not fit.
    """

    def __init__(self, config: TeacherConfig, weights: Weights | None = None) -> None:
        super().__init__()
        self.patch_size, self.border = config.patch_size, config.border
        self.network, self.channels, normalization = _build(config.name, weights)
        self.register_buffer("image_mean", torch.tensor(normalization[0]).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(normalization[1]).view(1, 3, 1, 1))
        for level, channels in enumerate(self.channels, start=1):
            self.register_buffer(f"mean_{level}", torch.zeros(1, channels, 1, 1))
            self.register_buffer(f"std_{level}", torch.ones(1, channels, 1, 1))
            self.register_buffer(f"shift_{level}", torch.zeros(1, channels, 1, 1), persistent=False)
        self.register_load_state_dict_post_hook(Teacher._set_shifts)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """The teacher is never in training mode: its statistics are ImageNet's."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) in [0, 1] -> levels [(N, C_l, ceil(H / s_l), ceil(W / s_l))] for s = 4, 8, 16."""
        return [self.standardized(level, index) for index, level in enumerate(self.raw(images), start=1)]

    @torch.no_grad()
    def raw(self, images: Tensor) -> list[Tensor]:
        """Return the pooled levels before :meth:`standardized`."""
        normalized = (images - self.get_buffer("image_mean")) / self.get_buffer("image_std")
        levels = self.network(normalized.contiguous(memory_format=torch.channels_last))
        return [self._pooled(level) for level in levels]

    def shapes(self, size: tuple[int, int]) -> list[tuple[int, int, int]]:
        """(C_l, H_l, W_l) of the levels of an image of ``size`` (H, W)."""
        return [
            (channels, -(-size[0] // stride), -(-size[1] // stride))
            for channels, stride in zip(self.channels, STRIDES, strict=True)
        ]

    def standardized(self, features: Tensor, level: int) -> Tensor:
        """Return raw features (N, C, H, W) of level 1, 2 or 3 less their mean and over their std."""
        # features / std - mean / std: one pass
        return torch.addcdiv(self.get_buffer(f"shift_{level}"), features, self.get_buffer(f"std_{level}"))

    def set_statistics(self, level: int, mean: Tensor, std: Tensor) -> None:
        """Set what a level is standardised by, from the mean (C,) and the std (C,) of its features."""
        # What is constant on every normal image carries no scale: leave it as it is.
        usable = torch.where(std > 1e-6, std, torch.ones_like(std))
        self.get_buffer(f"mean_{level}").copy_(mean.view(1, -1, 1, 1))
        self.get_buffer(f"std_{level}").copy_(usable.view(1, -1, 1, 1))
        self._set_shifts()

    def _set_shifts(self, _: object = None) -> None:
        """Compute what :meth:`standardized` adds; a hook that runs after a state dict is loaded."""
        for level in range(1, len(self.channels) + 1):
            mean, std = self.get_buffer(f"mean_{level}"), self.get_buffer(f"std_{level}")
            self.get_buffer(f"shift_{level}").copy_(-mean / std)

    def _pooled(self, features: Tensor) -> Tensor:
        if self.patch_size == 1:
            return features
        average = partial(F.avg_pool2d, kernel_size=self.patch_size, stride=1, padding=self.patch_size // 2)
        if self.border in (0, 1):
            return average(features, count_include_pad=self.border == 1)
        share = average(torch.ones_like(features[:1, :1]))  # of each neighbourhood that lies inside the image
        return average(features, count_include_pad=False) * share**self.border


def check_name(name: str) -> None:
    """Raise a BKDError that lists close names if timm has no such model."""
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise BKDError(f"teacher: timm has no model {name!r}{hint}. See timm.list_models() for all names.")


def _build(
    name: str, weights: Weights | None
) -> tuple[nn.Module, tuple[int, ...], tuple[tuple[float, ...], tuple[float, ...]]]:
    check_name(name)
    try:
        whole = timm.create_model(name, pretrained=False, features_only=True)
        reductions = _info(whole).reduction()
    except (RuntimeError, AttributeError, ValueError) as error:
        raise BKDError(f"teacher: {name!r} gives no feature levels (features_only): {error}") from error
    if not set(STRIDES) <= set(reductions):
        raise BKDError(f"teacher: {name!r} has levels at strides {reductions}; strides 4, 8 and 16 are needed")
    indices = tuple(reductions.index(stride) for stride in STRIDES)
    # Rebuilt with only the levels in use, so that the deepest stage is neither computed nor saved.
    network = timm.create_model(name, pretrained=False, features_only=True, out_indices=indices)
    if weights is not None:
        assign_weights(network, name, weights)
    network.eval().requires_grad_(False)
    fold_batch_norm(network, torch.rand(1, 3, 64, 64))
    pretrained = timm.get_pretrained_cfg(name, allow_unregistered=True)
    mean, std = (pretrained.mean, pretrained.std) if pretrained else ((0.5,) * 3, (0.5,) * 3)
    return network.to(memory_format=torch.channels_last), tuple(_info(network).channels()), (mean, std)


def _info(network: nn.Module) -> FeatureInfo:
    info = network.feature_info
    assert isinstance(info, FeatureInfo)
    return info


def architecture_shapes(name: str) -> dict[str, torch.Size]:
    """Return the shapes of the full model's tensors, without batch counters, which older files lack."""
    with torch.device("meta"):
        state = timm.create_model(name, pretrained=False).state_dict()
    return {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}


def assign_weights(network: nn.Module, name: str, weights: Weights) -> None:
    """Load weights into a ``features_only`` network of timm's.

    Raises:
        BKDError: weights of another architecture.
    """
    state, source = weights
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    known = architecture_shapes(name)
    # A larger relative (resnet34 for resnet18) has every tensor that is needed, and more.
    wrong = [key for key in state if key not in known and not key.endswith("num_batches_tracked")]
    wrong += [key for key, value in wanted.items() if key not in state or state[key].shape != value.shape]
    if wrong:
        first = wrong[0]
        found = tuple(state[first].shape) if first in state else "nothing"
        expected = tuple(wanted[first].shape) if first in wanted else "no such tensor"
        raise BKDError(
            f"weights: {source} does not fit the teacher {name}: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, first {first} (expected {expected}, found {found}). "
            "Pass the weights of the same timm architecture."
        )
    network.load_state_dict({key: state[key] for key in wanted}, strict=False)
