"""The configuration: what a BKD model is and how it is trained, in one frozen dataclass a part, and its presets.

docs/equations.md says for each option what the paper states, what is ambiguous and why the default is what it is.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from bkd_fast.errors import BKDError, check_bool, check_choice, check_float, check_int

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
SIZE = (256, 256)  # (H, W) in pixels of images where the teacher takes it


def option(default: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    """Return a field with its default, documentation, and range (both ends included)."""
    return field(default=default, metadata={"text": text, "range": None if low is None else (low, high)})


def options(group: type[Group]) -> tuple[Field[Any], ...]:
    """Return the options of a group; their ``metadata`` has ``text`` and ``range``."""
    return fields(group)  # type: ignore[arg-type]  # every group is a dataclass


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Return ``value`` as the type that the option declares (TOML and JSON give lists for tuples)."""
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        return check_choice(name, value, kinds)
    if type(None) in kinds:  # an option that can be off
        off = value is None or (isinstance(value, str) and value == "none")
        return None if off else _checked(name, value, kinds[0])
    if get_origin(hint) is tuple:
        parts = value.tolist() if hasattr(value, "tolist") else value
        if kinds[-1] is Ellipsis:  # any number of values
            if not isinstance(parts, (list, tuple)) or not parts:
                raise BKDError(f"{name} is {value!r}: expected a list of at least one value")
            kinds = kinds[:1] * len(parts)
        if not isinstance(parts, (list, tuple)) or len(parts) != len(kinds):
            raise BKDError(f"{name} is {value!r}: expected {len(kinds)} values")
        return tuple(_checked(name, part, kind) for part, kind in zip(parts, kinds, strict=True))
    if str in kinds:  # int | str
        hint = str if isinstance(value, str) else kinds[0]
    if hint is str:
        if not isinstance(value, (str, os.PathLike)):
            raise BKDError(f"{name} is {value!r}: expected a value of type str")
        return str(value)
    checks: dict[type, Callable[[str, Any], Any]] = {int: check_int, float: check_float, bool: check_bool}
    return checks[hint](name, value)


class Group:
    """A group of options, checked when it is made.

    Raises:
        BKDError: a value of another type, outside its range or not one of its choices; the message names the option.
    """

    group: ClassVar[str]  # its field of BKDConfig
    kind: ClassVar[str | None] = None  # tells the alternatives of one field apart

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in options(type(self)):
            name = f"{self.group}.{each.name}"
            value = _checked(name, getattr(self, each.name), hints[each.name])
            object.__setattr__(self, each.name, value)
            if each.metadata["range"] is None or value is None:
                continue
            low, high = each.metadata["range"]
            for part in value if isinstance(value, tuple) else (value,):
                if not low <= part <= high:
                    raise BKDError(f"{name} is {value}: expected a value from {low:g} to {high:g}")


@dataclass(frozen=True)
class TeacherConfig(Group):
    """The frozen teacher, and what is made of its features."""

    group = "teacher"
    name: str = option("wide_resnet50_2.tv_in1k", "any timm backbone: a CNN or a vision transformer")
    weights: str = option("auto", "auto (package, then hub), none (random, for tests), or the path of a local file")
    layers: tuple[int | str, ...] | None = option(
        None, "the feature levels by timm's index or name. None: at strides 4, 8 and 16; of a plain ViT three blocks"
    )
    strides: tuple[int, ...] | None = option(None, "the feature levels by stride instead, such as [8, 16]", 1, 1024)
    image_size: tuple[int, int] | None = option(
        None,
        "(H, W) in pixels that images or tiles are resized to. None: 256 x 256, or what fits the teacher",
        32,
        4096,
    )
    tile: int | None = option(
        None, "side of square tiles to learn and predict in, in pixels of the image. None: whole images", 32, 100_000
    )
    scale: Literal["level", "channel", "none"] = option(
        "level",
        "features are standardised by the training normals, with one std a level or a channel; none: as they are",
    )
    patch_size: int = option(3, "side of the average over each feature's neighbourhood; 1 = none", 1, 255)
    border: float = option(
        1.0,
        "exponent of the share of this neighbourhood inside the image; 1: zeros beyond, 0: averages what is inside",
        0,
        1,
    )
    levels: Literal["joint", "separate"] = option(
        "joint",
        "joint compares all levels side by side, forward distillation also the finest alone. separate: each alone",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size % 2 == 0:
            raise BKDError(f"teacher.patch_size is {self.patch_size}: expected an odd number")
        if self.layers is not None and self.strides is not None:
            raise BKDError("teacher.layers and teacher.strides both choose the feature levels: set one of them")
        for name in ("layers", "strides"):
            chosen = getattr(self, name)
            if chosen is not None and len(set(chosen)) < len(chosen):
                raise BKDError(f"teacher.{name} is {chosen}: expected each once")

    @property
    def size(self) -> tuple[int, int]:
        """``image_size``, or 256 x 256 before a model has chosen it."""
        return self.image_size or SIZE


@dataclass(frozen=True)
class DataConfig(Group):
    """How the pixels of files, arrays and tensors are read: one rule for all images of a run."""

    group = "data"
    integer_white: int | None = option(
        None,
        "white of integers of more than 8 bits. None: the smallest of 1023, 4095, … that fits training",
        255,
        65_535,
    )
    float_white: float | None = option(
        None, "white of floating-point images. None: the smallest of 1, 255 and 65535 that fits training", 1e-6, 1e12
    )
    max_pixels: int = option(
        32_000_000, "largest image, height times width, that is decoded; about 35 bytes a pixel", 1, 178_000_000
    )
    pages: Literal["one", "first"] = option("one", "files of several pages or frames: an error, or read the first")


@dataclass(frozen=True)
class RoiConfig(Group):
    """The region of interest. What is outside is not learned, not scored and zero in maps."""

    group = "roi"
    mask: str | None = option(
        None, "path of a mask, above zero where images are looked at, or of a folder with a mask for each image by name"
    )


@dataclass(frozen=True)
class RetrievedSupport(Group):
    """Supports that each query retrieves: its most similar normals, matched to it pixel by pixel."""

    group, kind = "support", "retrieved"
    shots: int = option(16, "k, the number of support images of a query", 1, 64)
    bank_size: int = option(200, "normal images to retrieve from, those that differ most", 2, 100_000)
    match_radius: int = option(1, "of the window in which supports are matched, in feature pixels", 0, 8)
    neighbors: int = option(5, 'shots that "regression" combines, those that match best', 1, 64)
    aggregation: Literal["regression", "min"] = option(
        "regression", "per pixel the least-squares combination of neighbors, or the closest shot"
    )


@dataclass(frozen=True)
class SampledSupport(Group):
    """Supports drawn at random: for training anew each time, for testing once."""

    group, kind = "support", "sampled"
    shots: int = option(2, "k, the number of support images", 1, 1024)
    per: Literal["step", "query"] = option("query", "draw supports for each training step, or for each query")
    augmentation: Augmentation = option("none", "of training supports, Table 5")
    aggregation: Literal["mean", "min"] = option("mean", "mean of the shots, or per pixel the closest shot")


@dataclass(frozen=True)
class AlignmentConfig(Group):
    """Learned alignment of supports by deformable convolutions (Eq. 1-5)."""

    group = "alignment"
    kernel: Literal["full", "identity"] = option("full", "w_m of Eq. 2: learned C x C x 3 x 3, or a pure warp")
    max_group_channels: int | None = option(
        128, "channels that learned w_m mix: wider levels fall into groups. None mixes all channels", 1, 65_536
    )
    kernel_init: Literal["dirac", "default"] = option("dirac", "of w_m: a copy of the support, or torch's default")
    depth: int = option(2, "convolutions in f of Eq. 1", 1, 4)
    width: int = option(64, "channels between them", 1, 4096)
    activation: Literal["tanh", "softmax", "none"] = option("tanh", "Eq. 3: from features to offsets")
    max_offset: float = option(
        1.0, "bound of tanh offsets (beyond the match of retrieved supports), in feature pixels", 0, 1024
    )
    offset_init: Literal["zero", "default"] = option(
        "zero", "of the last convolution of f: no motion, or torch's default"
    )
    cascade: Literal["add", "product", "concat"] = option("add", "Eq. 4: how the coarser level's offsets come in")
    modulated: bool = option(False, "the mask of Eq. 2; the query leaks through it")


@dataclass(frozen=True)
class MemoryConfig(Group):
    """The memory of normal features that the query is rebuilt from (Eq. 6-10)."""

    group = "memory"
    items: int = option(2000, "I, the number of items", 1, 100_000)
    read: Literal["neighbors", "attention"] = option(
        "neighbors", "least-squares combination of the nearest items, or sparse softmax over all (Eq. 7-10)"
    )
    neighbors: int = option(5, "items that a feature is read from by neighbors", 1, 64)
    threshold: float = option(1.0, "xi of Eq. 8-9 for attention, in units of the uniform weight 1 / items", 0, 100_000)
    temperature: float = option(0.02, "divides the cosine of Eq. 7 for attention; 1 = as printed", 1e-4, 1e4)
    renormalize: bool = option(True, "sparse weights of attention sum to one again")
    init: Literal["coreset", "uniform"] = option("coreset", "greedy coreset of normal features, or MemAE's uniform")
    learned: bool = option(False, "items follow the loss, or stay the normal features that they start as")
    merge: Literal["replace", "residual"] = option("replace", "pass on the read-out z' alone, or z + z'")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "uniform" and not self.learned:
            raise BKDError("memory.init is 'uniform' and memory.learned off: the items would stay noise; choose one")


@dataclass(frozen=True)
class StudentConfig(Group):
    """Bottleneck and student decoder (Fig. 4). Without them the memory's read-out rebuilds the query."""

    group = "student"
    correction: bool = option(True, "the student predicts what the memory's read-out lacks")
    output: Literal["linear", "relu"] = option("linear", "relu suits teachers whose levels end in ReLU")
    reduce: bool = option(False, "the 1x1 reduction of the paper's text before the embedding")
    block: Literal["auto", "basic", "bottleneck"] = option("auto", "residual blocks of bottleneck and student")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correction and self.output == "relu":
            raise BKDError("student.correction adds to a read-out and needs student.output 'linear'")


@dataclass(frozen=True)
class MapConfig(Group):
    """Distances, anomaly map and image score (Eq. 13)."""

    group = "anomaly_map"
    distance: Literal["squared", "cosine"] = option(
        "squared", "of losses and map: mean squared difference, or as printed (Eq. 11 and 13)"
    )
    fusion: Literal["geometric", "product", "sum"] = option(
        "geometric", "mean of both branches and the levels of each. product, sum: over the levels, branches added"
    )
    sigma: float = option(3.0, "of the smoothing, in pixels of a 256-pixel-high image; scaled with the height", 0, 256)
    align_corners: bool = option(False, "of the upsampling of levels")
    top_fraction: float = option(
        0.003, "image score: mean of this share of the map's largest pixels; 0 = the maximum", 0, 1
    )
    image_weight: float = option(
        0.15, "image score: of the whole image's distance from its supports; 0 = the map's mean alone", 0, 100
    )
    relative: float = option(
        0.5, "image score: share of what its retrieved supports themselves score that is taken off; 0 = none", 0, 1
    )


@dataclass(frozen=True)
class TrainingConfig(Group):
    """Losses (Eq. 11-12), optimiser, validation and thresholds."""

    group = "training"
    epochs: int = option(40, "passes over the training images, at most", 1, 100_000)
    batch_size: int = option(16, "images a step, over all processes", 1, 65_536)
    learning_rate: float = option(0.005, "of Adam, where it starts", 0, 10)
    betas: tuple[float, float] = option((0.5, 0.999), "of Adam", 0, 0.999999)
    offset_lr_scale: float = option(0.1, "the offset predictors' learning rate, as a share of it", 0, 100)
    schedule: Literal["cosine", "constant"] = option("cosine", "of the learning rate: to zero over the epochs, or none")
    clip_norm: float | None = option(None, "largest norm of the gradient; None = no limit", 1e-9, 1e9)
    direction: Literal["flat", "pixel"] = option(
        "flat", 'distance "cosine", Eq. 11: one cosine of all of a level, or one a pixel'
    )
    value_weight: float = option(0.5, 'distance "cosine": of the squared difference in Eq. 11', 0, 1e6)
    forward_weight: float = option(1.0, "of the forward branch in the loss, Eq. 12", 0, 1e6)
    reverse_weight: float = option(1.0, "of the reverse branch", 0, 1e6)
    patience: int | None = option(
        5, "epochs without a lower validation loss after which training ends; None = never", 1, 100_000
    )
    validation_share: float = option(0.1, "share of the training normals that are kept for validation", 0.01, 0.9)
    false_alarms: float = option(0.01, "share of good images that thresholds may call anomalous", 1e-5, 0.5)
    seed: int = option(0, "of everything random", 0, 2**31 - 1)


@dataclass(frozen=True)
class BKDConfig:
    """What a BKD model is and how it is trained. Immutable; derive variants with :meth:`with_changes`.

    A part that is off is None: ``roi`` (whole images are looked at), ``support`` (no forward distillation),
    ``alignment`` (supports are compared as they are matched or sampled), ``memory`` and
    ``student`` (no reverse distillation where both are off).

    Raises:
        BKDError: parts that do not fit each other; the message says which and what to choose.
    """

    data: DataConfig = DataConfig()
    roi: RoiConfig | None = None
    teacher: TeacherConfig = TeacherConfig()
    support: RetrievedSupport | SampledSupport | None = RetrievedSupport()
    alignment: AlignmentConfig | None = None
    memory: MemoryConfig | None = MemoryConfig()
    student: StudentConfig | None = None
    anomaly_map: MapConfig = MapConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self) -> None:
        for name, kinds in GROUPS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) and not (value is None and name in OPTIONAL):
                expected = " or ".join([kind.__name__ for kind in kinds] + ["None"] * (name in OPTIONAL))
                raise BKDError(f"{name} is {value!r}: expected {expected}")
        if self.roi is not None and self.roi.mask is None:
            raise BKDError("roi is on and roi.mask None: name an image, or set roi to None")
        joint = self.teacher.levels == "joint"
        if not (self.forward_branch or self.reverse_branch):
            raise BKDError("support, memory and student are all None: keep at least one of them")
        if self.alignment is not None and self.support is None:
            raise BKDError("alignment warps supports, and support is None: set support, or alignment to None")
        if self.student is not None and self.student.correction and self.memory is None:
            raise BKDError("student.correction needs a memory to correct: set memory, or turn it off")
        if self.student is not None and joint:
            raise BKDError("the student rebuilds each level alone: set teacher.levels='separate', or student to None")
        if self.forward_branch and self.reverse_branch and joint and self.anomaly_map.fusion != "geometric":
            raise BKDError(
                f"anomaly_map.fusion is {self.anomaly_map.fusion!r} and adds the branches level by level; with "
                "teacher.levels='joint' they have different ones: choose 'separate', or fusion 'geometric'"
            )

    @property
    def forward_branch(self) -> bool:
        """Whether there is forward distillation."""
        return self.support is not None

    @property
    def reverse_branch(self) -> bool:
        """Whether there is reverse distillation."""
        return self.memory is not None or self.student is not None

    @property
    def retrieves(self) -> bool:
        """Whether queries retrieve their supports."""
        return isinstance(self.support, RetrievedSupport)

    def with_changes(self, changes: Mapping[str, Any] | None = None, **groups: Any) -> BKDConfig:
        """Return a copy with some options or parts changed.

        Args:
            changes: option -> value, ``{"memory.items": 500, "student": None}``. An option of a part that is off turns
                the part on. A part is None, ``"none"``, ``"on"`` (its defaults), a kind of it (``"sampled"``), a
                mapping of the options to change, or a group.
            groups: parts by keyword.

        Raises:
            BKDError: an unknown option (the message suggests the closest name), an option of a part turned off in
                the same call, or a value that is not usable.
        """
        if changes is not None and not isinstance(changes, Mapping):
            raise BKDError(f"the changes are {changes!r}: expected a mapping of options, {{'memory.items': 500}}")
        given = {**(changes or {}), **groups}
        for name in given:
            if not isinstance(name, str):
                raise BKDError(f"the changes name {name!r}: expected options as text, 'memory.items'")
        parts = {name: getattr(self, name) for name in GROUPS}
        for name in sorted(given, key=lambda name: "." in name):  # parts first, then their options
            group, dot, key = name.partition(".")
            if group not in GROUPS:
                raise BKDError(f"there is no option {name!r}: {_hint(name)}")
            if not dot:
                parts[group] = _part(group, given[name], parts[group])
                continue
            if group in given and parts[group] is None:
                raise BKDError(f"{group} is None and {name} is set: choose one")
            part: Any = GROUPS[group][0]() if parts[group] is None else parts[group]
            if key not in {each.name for each in fields(part)}:
                raise BKDError(_unknown(part, key))
            parts[group] = replace(part, **{key: given[name]})
        return BKDConfig(**parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: group -> option -> value (tuples become lists), None for a part that is off."""
        return {name: _plain(getattr(self, name)) for name in GROUPS}

    def flat(self) -> dict[str, Any]:
        """Return option -> value, ``{"memory.items": 2000, …}``; a part that is off is one entry, None."""
        found: dict[str, Any] = {}
        for name, values in self.to_dict().items():
            found.update({name: None} if values is None else {f"{name}.{key}": value for key, value in values.items()})
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BKDConfig:
        """Return the configuration that :meth:`to_dict` or :meth:`to_toml` wrote; what is left out has its default.

        Raises:
            BKDError: an unknown or ill-typed option.
        """
        return cls().with_changes(values)

    def to_toml(self) -> str:
        """Return the whole configuration as TOML: a table a part, ``"none"`` for a part or an option that is off."""
        import tomlkit  # here: only configurations in files need it

        document = tomlkit.document()
        for name, values in self.to_dict().items():
            document[name] = (
                "none" if values is None else {key: "none" if each is None else each for key, each in values.items()}
            )
        return tomlkit.dumps(document)

    @classmethod
    def from_toml(cls, text: str) -> BKDConfig:
        """Return the inverse of :meth:`to_toml`.

        Raises:
            BKDError: not TOML, or an unknown or ill-typed option.
        """
        return cls.from_dict(read_toml(text))

    @classmethod
    def preset(cls, name: str = "default", changes: Mapping[str, Any] | None = None) -> BKDConfig:
        """Return ``default``, ``paper`` (the equations to the letter) or ``rd4ad`` (reverse distillation alone).

        Args:
            changes: see :meth:`with_changes`.

        Raises:
            BKDError: an unknown preset, or changes that are not usable.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise BKDError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls().with_changes(PRESETS[name]).with_changes(changes)


GROUPS: dict[str, tuple[type[Group], ...]] = {
    "data": (DataConfig,),
    "roi": (RoiConfig,),
    "teacher": (TeacherConfig,),
    "support": (RetrievedSupport, SampledSupport),
    "alignment": (AlignmentConfig,),
    "memory": (MemoryConfig,),
    "student": (StudentConfig,),
    "anomaly_map": (MapConfig,),
    "training": (TrainingConfig,),
}
OPTIONAL = ("roi", "support", "alignment", "memory", "student")

BARE_TEACHER = {
    "teacher.scale": "none", "teacher.patch_size": 1, "teacher.border": 0.0, "teacher.levels": "separate"
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        **BARE_TEACHER,
        "support": SampledSupport(shots=2, per="query", augmentation="rotation_scale", aggregation="mean"),
        "alignment": AlignmentConfig(
            kernel="full",
            max_group_channels=None,
            kernel_init="default",
            depth=1,
            activation="softmax",
            max_offset=2.0,
            offset_init="default",
            cascade="product",
        ),
        "memory": MemoryConfig(
            items=200,
            read="attention",
            threshold=0.4,
            temperature=1.0,
            renormalize=False,
            init="uniform",
            learned=True,
        ),
        "student": StudentConfig(correction=False, output="relu", reduce=True),
        "anomaly_map": MapConfig(
            distance="cosine", fusion="product", sigma=0.0, top_fraction=0.0, image_weight=0.0, relative=0.0
        ),
        "training": TrainingConfig(epochs=200, patience=None, offset_lr_scale=1.0, schedule="constant"),
    },
    "rd4ad": {
        **BARE_TEACHER,
        "support": None,
        "memory": None,
        "student": StudentConfig(correction=False, output="relu"),
        "anomaly_map": MapConfig(
            distance="cosine",
            fusion="sum",
            sigma=4.0,
            align_corners=True,
            top_fraction=0.0,
            image_weight=0.0,
            relative=0.0,
        ),
        "training": TrainingConfig(epochs=200, patience=None, schedule="constant", value_weight=0.0),
    },
}


def read_toml(text: str) -> dict[str, Any]:
    """Return what TOML says.

    Raises:
        BKDError: not TOML.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    if not isinstance(text, str):
        raise BKDError(f"the configuration is of type {type(text).__name__}: expected TOML as text")
    try:
        return tomlkit.parse(text).unwrap()
    except (TOMLKitError, ValueError, RecursionError) as error:  # numbers of 5,000 digits, 5,000 brackets
        raise BKDError(f"the configuration is not valid TOML: {error}") from error


def _plain(group: Group | None) -> dict[str, Any] | None:
    if group is None:
        return None
    found: dict[str, Any] = {} if group.kind is None else {"kind": group.kind}
    for each in options(type(group)):
        value = getattr(group, each.name)
        found[each.name] = list(value) if isinstance(value, tuple) else value
    return found


def _part(name: str, value: Any, current: Group | None) -> Group | None:
    """Return a part of the configuration from what stands for it; see :meth:`BKDConfig.with_changes`."""
    kinds = {kind.kind or "on": kind for kind in GROUPS[name]}
    word = str(value) if isinstance(value, str) else None
    if value is None or word == "none":
        if name not in OPTIONAL:
            raise BKDError(f"{name} cannot be off")
        return None
    if isinstance(value, Group):
        return value
    if word == "on":
        return GROUPS[name][0]()
    if word in kinds:
        return kinds[word]()
    if isinstance(value, Mapping):
        given = dict(value)
        kind = given.pop("kind", None) or ((current or GROUPS[name][0]).kind or "on")
        if not isinstance(kind, str) or kind not in kinds:
            raise BKDError(f"{name}.kind is {kind!r}: expected one of {', '.join(map(repr, kinds))}")
        base = current if type(current) is kinds[kind] else kinds[kind]()
        for key in given:
            if key not in {each.name for each in options(kinds[kind])}:
                raise BKDError(_unknown(base, key))
        return replace(base, **given)  # type: ignore[type-var]  # every group is a dataclass
    off = ["none"] * (name in OPTIONAL)
    raise BKDError(f"{name} is {value!r}: expected one of {', '.join([*off, 'on', *(k for k in kinds if k != 'on')])}")


def _hint(name: str) -> str:
    known = sorted(
        {
            *GROUPS,
            *(f"{kind.group}.{each.name}" for kinds in GROUPS.values() for kind in kinds for each in options(kind)),
        }
    )
    tails = {one.partition(".")[2]: one for one in known if "." in one}
    close = difflib.get_close_matches(name, known, n=1) or [
        tails[tail] for tail in difflib.get_close_matches(name.rpartition(".")[2], tails, n=1)
    ]
    return f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}"


def _unknown(part: Group, key: str) -> str:
    for other in GROUPS[part.group]:
        if key in {each.name for each in options(other)}:
            return f"{part.group} is {part.kind!r} and has no option {key!r}: set {part.group}={other.kind} first"
    return f"there is no option '{part.group}.{key}': {_hint(f'{part.group}.{key}')}"
