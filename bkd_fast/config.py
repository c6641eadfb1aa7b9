"""Every choice that the BKD paper makes or leaves open, in one frozen dataclass, and its presets.

docs/equations.md says for each field what the paper states, what is ambiguous and why the default is what it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bkd_fast.errors import BKDError

Augmentation = Literal[
    "none",
    "translation",
    "rotation",
    "scale",
    "shear",
    "rotation_scale",
    "translation_scale",
    "translation_rotation",
    "translation_rotation_scale",
    "affine",
]


@dataclass(frozen=True)
class BKDConfig:
    """What a BKD model is and how it is trained. Immutable; derive variants with :meth:`with_changes`.

    Raises:
        BKDError: a value outside its range or list of choices; the message names the field.
    """

    # Teacher: any timm CNN with ``features_only``; levels are its outputs at strides 4, 8 and 16.
    teacher: str = "wide_resnet50_2.tv_in1k"
    weights: str = "auto"  # auto (package, then hub) | none (random, for tests) | path of a local file
    image_size: tuple[int, int] = (256, 256)  # (H, W) in pixels; images or tiles are resized to it
    # Side of the square tiles, in pixels of the image, in which images are learned and predicted; neighbours share a
    # quarter. 0 = images are taken whole.
    tile: int = 0
    # Features are centred on the mean of the training normals and divided by their std: one for each level, or one for
    # each channel (which blows up nearly dead channels). none: the teacher's own features.
    scale: Literal["level", "channel", "none"] = "level"
    pool: int = 3  # side of the average over each feature's neighbourhood, 1 = none
    # Exponent of the share of this neighbourhood inside the image, by which the average is multiplied: 1 counts zeros
    # beyond the border, so that a teacher's padding makes no false peaks there; 0 averages what lies inside.
    border: float = 1.0
    # joint: all levels side by side at stride 8, one search instead of three; forward distillation also takes stride 4
    # by itself. separate: each level by itself.
    levels: Literal["joint", "separate"] = "joint"

    # Forward distillation (Eq. 1-5).
    forward_branch: bool = True  # whether there is forward distillation
    shots: int = 16  # k, the number of support images
    # nearest: each query's k most similar of support_pool normals, matched to it pixel by pixel. step, query: drawn at
    # random for each training step or query, and once for all for testing.
    support_draw: Literal["nearest", "step", "query"] = "nearest"
    support_pool: int = 200  # normal images that supports are looked up among, those that differ most
    support_augmentation: Augmentation = "none"  # of drawn training supports, Table 5
    match_radius: int = 1  # of the window in which the nearest supports are matched, in feature pixels
    # regression: per pixel the least-squares combination of the match_neighbors shots that match best. min: per pixel
    # the closest shot. mean: the mean of drawn shots.
    shot_aggregation: Literal["regression", "min", "mean"] = "regression"
    match_neighbors: int = 5  # shots that "regression" combines
    offset_depth: int = 2  # convolutions in f of Eq. 1
    offset_width: int = 64  # channels between them
    offset_activation: Literal["tanh", "softmax", "none"] = "tanh"  # Eq. 3: from features to offsets
    max_offset: float = 1.0  # bound of tanh offsets (beyond the match, where there is one), in feature pixels
    offset_init: Literal["zero", "default"] = "zero"  # of the last convolution of f: no motion, or torch's default
    cascade: Literal["add", "product", "concat"] = "add"  # Eq. 4: how the coarser level's offsets come in
    modulated: bool = False  # the mask of Eq. 2; the query leaks through it
    # w_m of Eq. 2: learned C x C x 3 x 3, a pure warp, or no alignment.
    alignment_kernel: Literal["full", "identity", "none"] = "none"
    alignment_group: int = 128  # channels that learned w_m mix: wider levels fall into groups; 0 = all channels
    kernel_init: Literal["dirac", "default"] = "dirac"  # of w_m: a copy of the support, or torch's default

    # Reverse distillation (Eq. 6-10, Fig. 4).
    reverse_branch: bool = True  # whether there is reverse distillation
    memory_items: int = 2000  # I; 0 = no memory
    # neighbors: least-squares combination of the nearest items. attention: sparse softmax over all, Eq. 7-10.
    memory_read: Literal["neighbors", "attention"] = "neighbors"
    memory_neighbors: int = 5  # items that a feature is read from by "neighbors"
    memory_threshold: float = 0.0005  # xi of Eq. 8-9 for "attention": one over the items
    memory_temperature: float = 0.02  # divides the cosine of Eq. 7 for "attention"; 1 = as printed
    memory_renormalize: bool = True  # sparse weights of "attention" sum to one again
    memory_init: Literal["coreset", "uniform"] = "coreset"  # greedy coreset of normal features, or MemAE's uniform
    memory_learned: bool = False  # items follow the loss, or stay the normal features that they start as
    memory_merge: Literal["replace", "residual"] = "replace"  # z' alone goes on, or z + z'
    student: bool = False  # bottleneck and decoder; without them the memory's read-out rebuilds the query
    bottleneck_reduce: bool = False  # the 1x1 reduction of the paper's text before the embedding
    block: Literal["auto", "basic", "bottleneck"] = "auto"  # residual blocks of bottleneck and student
    student_output: Literal["linear", "relu"] = "linear"  # relu suits teachers whose levels end in ReLU
    student_correction: bool = True  # the student predicts what the memory's read-out lacks

    # Losses (Eq. 11-12) and anomaly map (Eq. 13).
    distance: Literal["squared", "cosine"] = "squared"  # mean squared difference, or as printed (Eq. 11 and 13)
    direction: Literal["flat", "pixel"] = "flat"  # "cosine", Eq. 11: one cosine of all of a level, or one a pixel
    value_weight: float = 0.5  # "cosine": of the squared difference in Eq. 11
    forward_weight: float = 1.0  # of the forward branch in the loss, Eq. 12
    reverse_weight: float = 1.0  # of the reverse branch
    # geometric: mean of both branches, and of the levels of each. product, sum: over the levels, the branches added.
    fusion: Literal["geometric", "product", "sum"] = "geometric"
    sigma: float = 3.0  # of the smoothing, in pixels of a 256-pixel-high image; scaled with the height
    align_corners: bool = False  # of the enlargement of levels in the map
    top_fraction: float = 0.003  # image score: mean of this share of the map's largest pixels; 0 = the maximum
    image_weight: float = 0.15  # image score: of the whole image's distance from its supports; 0 = the map's mean alone

    # Training.
    epochs: int = 40  # passes over the training images, at most
    batch_size: int = 16  # images a step, over all processes
    learning_rate: float = 0.005  # of Adam, where it starts
    betas: tuple[float, float] = (0.5, 0.999)  # of Adam
    offset_lr_scale: float = 0.1  # the offset predictors' learning rate, as a share of it
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate: to zero over the epochs, or none
    clip_norm: float = 0.0  # largest norm of the gradient, 0 = no limit
    patience: int = 5  # training ends after so many epochs without a lower loss of held-out normals; 0 = never
    holdout: float = 0.1  # share of the training normals that are kept for validation
    false_alarms: float = 0.01  # share of good images that thresholds may call anomalous
    seed: int = 0  # of everything random

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            object.__setattr__(self, name, _checked(name, value, hint))
        if not (self.forward_branch or self.reverse_branch):
            raise BKDError("forward_branch and reverse_branch are both off: keep at least one of them on")
        if min(self.image_size) < 32:
            raise BKDError(
                f"image_size is {self.image_size}: both sides must be at least 32 pixels, "
                "since the deepest teacher level has stride 16 and the bottleneck halves it once more"
            )
        if 0 < self.tile < 32:
            raise BKDError(f"tile is {self.tile}: expected 0 (whole images), or at least 32 pixels")
        if self.pool < 1 or self.pool % 2 == 0:
            raise BKDError(f"pool is {self.pool}: expected an odd number of at least 1")
        if self.reverse_branch and not self.student and not self.memory_items:
            raise BKDError("memory_items is 0 and student is off: the reverse branch needs one of them")
        if self.memory_init == "uniform" and not self.memory_learned and self.memory_items and self.reverse_branch:
            raise BKDError("memory_init='uniform' and memory_learned off: the items would stay noise; choose one")
        if self.student and self.student_correction and not self.memory_items and self.reverse_branch:
            raise BKDError("student_correction needs a memory to correct: set memory_items, or turn it off")
        unsuited = "mean" if self.support_draw == "nearest" else "regression"
        if self.forward_branch and self.shot_aggregation == unsuited:
            raise BKDError(
                f"shot_aggregation is {unsuited!r} and support_draw {self.support_draw!r}: choose 'regression' or "
                "'min' for supports that are looked up (nearest), 'mean' or 'min' for drawn ones (step, query)"
            )
        if self.student and self.levels == "joint":
            raise BKDError("the student rebuilds each level by itself: set levels='separate', or student off")
        if self.forward_branch and self.reverse_branch and self.levels == "joint" and self.fusion != "geometric":
            raise BKDError(
                f"fusion={self.fusion!r} adds the branches level by level, and with levels='joint' they have not the "
                "same ones: choose levels='separate', or fusion='geometric'"
            )
        if self.looks_up and self.support_augmentation != "none":
            raise BKDError(
                f"support_augmentation is {self.support_augmentation!r}, and supports that are looked up "
                "are not augmented: choose 'none', or support_draw='step' or 'query'"
            )
        if self.student and self.student_correction and self.student_output == "relu":
            raise BKDError("student_correction adds to a read-out and needs student_output='linear'")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            for part in value if isinstance(value, tuple) else (value,):
                if not low <= part <= high:
                    raise BKDError(f"{name} is {value}: expected a value from {low:g} to {high:g}")

    @property
    def looks_up(self) -> bool:
        """Whether there is a forward branch whose queries look their supports up."""
        return self.forward_branch and self.support_draw == "nearest"

    def with_changes(self, **changes: Any) -> BKDConfig:
        """A copy with some fields changed; an unknown field is an error that suggests the closest name."""
        _reject_unknown(changes)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (tuples become lists)."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BKDConfig:
        """The inverse of :meth:`to_dict`; every unknown or ill-typed field is an error."""
        _reject_unknown(values)
        return cls(**values)

    @classmethod
    def preset(cls, name: str = "default", **changes: Any) -> BKDConfig:
        """``default``, ``paper`` (the equations to the letter) or ``rd4ad`` (reverse distillation alone)."""
        if name not in PRESETS:
            raise BKDError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
        _reject_unknown(changes)
        return cls(**{**PRESETS[name], **changes})


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("tile", 0, 100_000),
    ("border", 0, 1),
    ("shots", 1, 1024),
    ("support_pool", 2, 100_000),
    ("match_radius", 0, 8),
    ("match_neighbors", 1, 64),
    ("offset_depth", 1, 4),
    ("offset_width", 1, 4096),
    ("max_offset", 0, 1024),
    ("alignment_group", 0, 65_536),
    ("memory_items", 0, 100_000),
    ("memory_neighbors", 1, 64),
    ("memory_threshold", 0, 1),
    ("memory_temperature", 1e-4, 1e4),
    ("value_weight", 0, 1e6),
    ("forward_weight", 0, 1e6),
    ("reverse_weight", 0, 1e6),
    ("sigma", 0, 256),
    ("top_fraction", 0, 1),
    ("image_weight", 0, 100),
    ("epochs", 1, 100_000),
    ("batch_size", 1, 65_536),
    ("learning_rate", 0, 10),
    ("betas", 0, 0.999999),
    ("offset_lr_scale", 0, 100),
    ("clip_norm", 0, 1e9),
    ("patience", 0, 100_000),
    ("holdout", 0.01, 0.9),
    ("false_alarms", 1e-5, 0.5),
    ("seed", 0, 2**31 - 1),
)

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "scale": "none",
        "pool": 1,
        "border": 0.0,
        "levels": "separate",
        "shots": 2,
        "support_draw": "query",
        "support_augmentation": "rotation_scale",
        "shot_aggregation": "mean",
        "offset_depth": 1,
        "offset_activation": "softmax",
        "offset_init": "default",
        "cascade": "product",
        "alignment_kernel": "full",
        "alignment_group": 0,
        "kernel_init": "default",
        "max_offset": 2.0,
        "memory_items": 200,
        "memory_read": "attention",
        "memory_threshold": 0.002,
        "memory_temperature": 1.0,
        "memory_renormalize": False,
        "memory_init": "uniform",
        "memory_learned": True,
        "student": True,
        "bottleneck_reduce": True,
        "student_output": "relu",
        "student_correction": False,
        "distance": "cosine",
        "fusion": "product",
        "top_fraction": 0.0,
        "image_weight": 0.0,
        "sigma": 0.0,
        "epochs": 200,
        "patience": 0,
        "offset_lr_scale": 1.0,
        "schedule": "constant",
    },
    "rd4ad": {
        "scale": "none",
        "pool": 1,
        "border": 0.0,
        "levels": "separate",
        "forward_branch": False,
        "memory_items": 0,
        "student": True,
        "student_output": "relu",
        "student_correction": False,
        "distance": "cosine",
        "value_weight": 0.0,
        "fusion": "sum",
        "sigma": 4.0,
        "align_corners": True,
        "top_fraction": 0.0,
        "image_weight": 0.0,
        "epochs": 200,
        "patience": 0,
        "schedule": "constant",
    },
}


def _reject_unknown(values: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(BKDConfig)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}"
            raise BKDError(f"there is no configuration field {name!r}: {hint}")


def _checked(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type that the field declares (JSON gives lists for tuples), or an error naming it."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(map(repr, get_args(hint)))
            raise BKDError(f"{name} is {value!r}: expected one of {choices}")
        return value
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if not isinstance(value, (list, tuple)) or len(value) != len(parts):
            raise BKDError(f"{name} is {value!r}: expected {len(parts)} values")
        return tuple(_checked(name, part, kind) for part, kind in zip(value, parts, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise BKDError(f"{name} is {value!r}: expected a value of type {hint.__name__}")
    return value
