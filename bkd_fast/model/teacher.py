"""The frozen ImageNet teacher: the feature levels of any timm backbone, a CNN or a vision transformer."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import timm
import torch
from timm.models import FeatureInfo
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from bkd_fast.config import TeacherConfig
from bkd_fast.errors import BKDError
from bkd_fast.model.folding import fold_batch_norm
from bkd_fast.ops.standardize import standardize
from bkd_fast.ops.standardize.reference import averaged

STRIDES = (4, 8, 16)  # of the default levels
SMALLEST = 32  # pixels along a side
TRIES = 12  # multiples of the stride that are tried on either side of a size that a teacher does not take


class Weights(NamedTuple):
    """A state dict in timm's names, and where it comes from, for errors."""

    tensors: Mapping[str, Tensor]
    source: str


class Level(NamedTuple):
    """One feature level: timm's index ``number`` and the name of its layer, its stride in pixels, and its channels."""

    number: int
    name: str
    stride: int
    channels: int


class Teacher(nn.Module):
    """Any timm backbone, frozen, batch normalisation folded, followed by pooling and standardisation.

    ``levels``: what is known of each feature level, from fine to coarse; plain vision transformers have levels of equal
    stride. ``mean_l`` and ``std_l`` (over the training normals), by which level l is standardised, are zero and one
    until :func:`bkd_fast.model.calibration.calibrate` sets them.

    Args:
        config: which network, and what is made of its features.
        weights: ImageNet weights (:func:`bkd_fast.training.weights.load_weights`); None keeps random ones, for a state
            dict that is loaded afterwards.

    Raises:
        BKDError: an unknown model name, a model without the layers asked for, or weights that do not fit.
    """

    roi: Tensor | None  # (1, 1, H, W) float32, zero where images are blank; see BKD.set_roi

    def __init__(self, config: TeacherConfig, weights: Weights | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch_size, self.border = config.patch_size, config.border
        self.network, self.levels = _build(config, weights)
        self.channels = tuple(level.channels for level in self.levels)
        self.strides = tuple(level.stride for level in self.levels)
        # Some transformers give (N, H, W, C).
        self.channels_last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
        pretrained = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
        for name in ("mean", "std"):
            values = getattr(pretrained, name) if pretrained else (0.5,) * 3
            self.register_buffer(f"image_{name}", torch.tensor(values).view(1, 3, 1, 1))
        for level, channels in enumerate(self.channels, start=1):
            self.register_buffer(f"mean_{level}", torch.zeros(1, channels, 1, 1))
            self.register_buffer(f"std_{level}", torch.ones(1, channels, 1, 1))
        self.register_buffer("roi", None, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """The teacher is never in training mode: its statistics are ImageNet's."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, *, blank: bool = True) -> list[Tensor]:
        """(N, 3, H, W) in [0, 1] -> levels [(N, C_l, H_l, W_l)], about H / s_l high and W / s_l wide."""
        return [
            standardize(features, *self._statistics(level), self.patch_size, self.border)
            for level, features in enumerate(self._features(images, blank), start=1)
        ]

    @torch.no_grad()
    def raw(self, images: Tensor) -> list[Tensor]:
        """Return the pooled levels before :meth:`standardized`."""
        return [averaged(features, self.patch_size, self.border) for features in self._features(images, blank=True)]

    def shapes(self, size: tuple[int, int]) -> list[tuple[int, int, int]]:
        """(C_l, H_l, W_l) of the levels of an image of ``size`` (H, W)."""
        return list(_shapes(self.config.name, tuple(level.number for level in self.levels), size))

    def standardized(self, features: Tensor, level: int) -> Tensor:
        """Return raw features (N, C, H, W) of a level, counted from 1, less their mean and over their std."""
        return standardize(features, *self._statistics(level))

    def set_statistics(self, level: int, mean: Tensor, std: Tensor) -> None:
        """Set what a level is standardised by, from the mean (C,) and the std (C,) of its features."""
        # What is constant on every normal image carries no scale: leave it as it is.
        usable = torch.where(std > 1e-6, std, torch.ones_like(std))
        self.get_buffer(f"mean_{level}").copy_(mean.view(1, -1, 1, 1))
        self.get_buffer(f"std_{level}").copy_(usable.view(1, -1, 1, 1))

    def _features(self, images: Tensor, blank: bool) -> list[Tensor]:
        """Return the network's levels, channels_last.

        ``blank``: images are whole, and blank outside the region of interest, if there is one.
        """
        images = standardize(images, self.get_buffer("image_mean").flatten(), self.get_buffer("image_std").flatten())
        if blank and self.roi is not None:
            images = images * self.roi
        levels = self.network(images)
        if self.channels_last:
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        return [level.contiguous(memory_format=torch.channels_last) for level in levels]

    def _statistics(self, level: int) -> tuple[Tensor, Tensor]:
        """Return mean and std (C,) of a level, counted from 1."""
        return self.get_buffer(f"mean_{level}").flatten(), self.get_buffer(f"std_{level}").flatten()


def check_name(name: str) -> None:
    """Raise a BKDError that lists close names if timm has no such model, or not these weights of it."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise BKDError(f"teacher: timm has no model {name!r}{hint}. See timm.list_models() for all names.")
    try:
        known = not tag or timm.get_pretrained_cfg(name, allow_unregistered=True) is not None
    except RuntimeError:
        known = False
    if not known:
        tags = timm.list_models(f"{architecture}.*", pretrained=True)
        close = difflib.get_close_matches(name, tags, n=3, cutoff=0) or ["none"]
        raise BKDError(f"teacher: timm has no weights {tag!r} of {architecture}; those it has: {', '.join(close)}")


def with_image_size(config: TeacherConfig) -> TeacherConfig:
    """Return the configuration with ``image_size`` set: its own, or what is nearest to 256 x 256 and fits the teacher.

    The network is run without data, which takes up to a second.

    Raises:
        BKDError: an unknown network or layer; an ``image_size`` that the network does not take, with the two nearest
            ones that it does.
    """
    size = config.size
    levels = _levels(config)
    indices = tuple(level.number for level in levels)
    try:
        _shapes(config.name, indices, size)
    except BKDError as error:
        step = max(level.stride for level in levels)
        near = [_nearest(config.name, indices, size, step, up) for up in (False, True)]
        fitting = [one for one in near if one is not None]
        if not fitting:
            raise
        if config.image_size is not None:
            named = " or ".join(f"{height} x {width}" for height, width in fitting)
            raise BKDError(f"{error}. Choose teacher.image_size {named}, or leave it out") from error
        size = min(fitting, key=lambda one: abs(one[0] - size[0]))
    return replace(config, image_size=size)


def _nearest(name: str, indices: tuple[int, ...], size: tuple[int, int], step: int, up: bool) -> tuple[int, int] | None:
    """Return the nearest size that a network takes, of the multiples of ``step`` above or below ``size``."""
    height, width = (-(-length // step) if up else length // step for length in size)
    for further in range(TRIES):
        more = further if up else -further
        candidate = (step * (height + more), step * (width + more))
        if min(candidate) < SMALLEST:
            return None
        try:
            _shapes(name, indices, candidate)
        except BKDError:
            continue
        return candidate
    return None


@lru_cache(maxsize=64)
def _shapes(name: str, indices: tuple[int, ...], size: tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
    """Return (C_l, H_l, W_l) of the levels, from a run without data.

    Raises:
        BKDError: a size that the network does not take, or of which its levels leave out pixels.
    """
    what = f"teacher: {name} does not take images of {size[0]} x {size[1]} pixels"
    try:
        with torch.device("meta"), torch.no_grad():
            network = timm.create_model(
                name, pretrained=False, features_only=True, out_indices=indices, **_fixed(name, size)
            )
            levels = network.eval()(torch.empty(1, 3, *size))
    except Exception as error:  # timm asserts, and its layers raise what they like
        raise BKDError(f"{what} ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from error
    if str(getattr(network, "output_fmt", "")).endswith("NHWC"):
        levels = [level.permute(0, 3, 1, 2) for level in levels]
    for level, stride in zip(levels, _info(network).reduction(), strict=True):
        if any(length * stride < whole for length, whole in zip(level.shape[-2:], size, strict=True)):
            raise BKDError(f"{what}: a multiple of {stride} is needed, so that it sees every pixel")
    return tuple((level.shape[1], level.shape[2], level.shape[3]) for level in levels)


def _fixed(name: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return timm's option for the size of images, for networks that are built for one."""
    pretrained = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return {"img_size": size} if size is not None and pretrained is not None and pretrained.fixed_input_size else {}


def _build(config: TeacherConfig, weights: Weights | None) -> tuple[nn.Module, tuple[Level, ...]]:
    name = config.name
    check_name(name)
    options = _fixed(name, config.size)
    if options and config.image_size is None:
        options = _fixed(name, with_image_size(config).size)
    levels = _levels(config, on_cpu=not options)
    # Rebuilt with only the levels in use, so that the deepest stage is neither computed nor saved.
    indices = tuple(level.number for level in levels)
    network = timm.create_model(name, pretrained=False, features_only=True, out_indices=indices, **options)
    if isinstance(network, (EfficientNetFeatures, MobileNetV3Features)):  # which timm leaves whole
        network.blocks = network.blocks[: max(each["stage"] for each in network.feature_info.get_dicts(["stage"]))]
    if weights is not None:
        assign_weights(network, name, weights, options)
    network.eval().requires_grad_(False)
    fold_batch_norm(network, torch.rand(1, 3, *options.get("img_size", (64, 64))))
    return network.to(memory_format=torch.channels_last), levels


def _levels(config: TeacherConfig, *, on_cpu: bool = False) -> tuple[Level, ...]:
    """Return the levels that the configuration asks for, from fine to coarse.

    Args:
        on_cpu: draw the network's random weights; what follows then draws the same numbers as ever.

    Raises:
        BKDError: no such model, or a layer or stride that it does not have.
    """
    name = config.name
    check_name(name)
    try:
        with nullcontext() if on_cpu else torch.device("meta"):
            info = _info(timm.create_model(name, pretrained=False, features_only=True)).info
    except (RuntimeError, AttributeError, ValueError, AssertionError) as error:
        raise BKDError(f"teacher: {name!r} gives no feature levels (features_only): {error}") from error
    known = [Level(index, each["module"], each["reduction"], each["num_chs"]) for index, each in enumerate(info)]
    strides = [level.stride for level in known]
    if config.layers is not None:
        chosen = [_layer(name, known, layer) for layer in config.layers]
    elif config.strides is not None:
        chosen = [_at_stride(name, known, stride) for stride in config.strides]
    elif set(STRIDES) <= set(strides):
        chosen = [known[strides.index(stride)] for stride in STRIDES]
    elif len(set(strides)) == 1:  # a plain vision transformer: its blocks at a quarter, half and three quarters
        chosen = [known[index] for index in sorted({max(0, len(known) * part // 4 - 1) for part in (1, 2, 3)})]
    else:
        chosen = [known[strides.index(stride)] for stride in sorted(set(strides))[:3]]
    if len({level.number for level in chosen}) < len(chosen):
        raise BKDError(f"teacher.layers is {config.layers}: expected each layer once. {_listed(name, known)}")
    return tuple(sorted(chosen))


def _layer(name: str, known: Sequence[Level], layer: int | str) -> Level:
    found = [level for level in known if layer in (level.number, level.number - len(known), level.name)]
    if not found:
        raise BKDError(f"teacher.layers: {name} has no layer {layer!r}. {_listed(name, known)}")
    return found[0]


def _at_stride(name: str, known: Sequence[Level], stride: int) -> Level:
    found = [level for level in known if level.stride == stride]
    if not found:
        raise BKDError(f"teacher.strides: {name} has no layer at stride {stride}. {_listed(name, known)}")
    if len(found) > 1:
        raise BKDError(
            f"teacher.strides: {name} has {len(found)} layers at stride {stride}: choose by teacher.layers. "
            f"{_listed(name, known)}"
        )
    return found[0]


def _listed(name: str, known: Sequence[Level]) -> str:
    return "It has " + ", ".join(f"{level.number} {level.name} (stride {level.stride})" for level in known)


def _info(network: nn.Module) -> FeatureInfo:
    info = network.feature_info
    assert isinstance(info, FeatureInfo)
    return info


def architecture_shapes(name: str) -> dict[str, torch.Size]:
    """Return the shapes of the full model's tensors, without batch counters, which older files lack."""
    with torch.device("meta"):
        state = timm.create_model(name, pretrained=False).state_dict()
    return {key: value.shape for key, value in state.items() if not _counts(key)}


def assign_weights(network: nn.Module, name: str, weights: Weights, options: Mapping[str, Any] | None = None) -> None:
    """Load weights into a ``features_only`` network of timm's.

    Weights in the names of their first authors are renamed, and position embeddings resampled, as timm does it.

    Args:
        options: of timm that the network was built with: its ``img_size`` where it has a fixed one.

    Raises:
        BKDError: weights of another architecture; the message names the first tensors that do not fit.
    """
    wanted = [key for key in network.state_dict() if not _counts(key)]
    known, state = architecture_shapes(name), weights.tensors
    strange = any(known.get(key) != value.shape for key, value in state.items() if not _counts(key))
    if options or strange:
        state = _converted(name, weights, known, options or {})
    # A features_only network has timm's names with other separators, or below "model".
    plain = {_plain(key): value for key, value in state.items()}
    lacking = [key for key in wanted if _plain(key) not in plain]
    if lacking:
        raise _unfit(name, weights, known)
    network.load_state_dict({key: plain[_plain(key)] for key in wanted}, strict=False)


def _converted(
    name: str, weights: Weights, known: Mapping[str, torch.Size], options: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    """Return the weights as the architecture has them at its size of images, without its classifier."""
    pretrained = timm.get_pretrained_cfg(name, allow_unregistered=True)
    named = () if pretrained is None else pretrained.classifier or ()
    heads = tuple(f"{head}." for head in ((named,) if isinstance(named, str) else named))
    body = {key: value for key, value in weights.tensors.items() if not key.startswith(heads)}
    # With no classes on either side timm loads strictly: every tensor must be there, and no other.
    overlay = {"state_dict": body, "num_classes": 0, "label_offset": 0, "custom_load": False}
    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **options)
    except Exception as error:  # torch's own, or what timm's conversion makes of tensors that it does not expect
        raise _unfit(name, weights, known) from error
    return model.state_dict()


def _unfit(name: str, weights: Weights, known: Mapping[str, torch.Size]) -> BKDError:
    state = weights.tensors
    parts = [
        _first("missing", (key for key in known if key not in state)),
        _first("unexpected", (key for key in state if key not in known and not _counts(key))),
        _first(
            "of another shape",
            (
                f"{key}: expected {tuple(known[key])}, found {tuple(value.shape)}"
                for key, value in state.items()
                if key in known and known[key] != value.shape
            ),
        ),
    ]
    return BKDError(
        f"weights: {weights.source} does not fit the teacher {name}: {', '.join(part for part in parts if part)}. "
        "Pass the weights of the same timm architecture."
    )


def _first(what: str, keys: Iterator[str]) -> str:
    found = list(keys)
    return f"{len(found)} tensors are {what} (first {found[0]})" if found else ""


def _plain(key: str) -> str:
    return key.removeprefix("model.").replace(".", "_")


def _counts(key: str) -> bool:
    return key.endswith("num_batches_tracked")
