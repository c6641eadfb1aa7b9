"""Which configurations an ablation compares: the paper's Tables 2, 4 and 5, or a grid over fields."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from bkd_fast.config import Augmentation, BKDConfig, SampledSupport
from bkd_fast.errors import BKDError

TABLES = (2, 4, 5)
AUGMENTATION, SEED = "support.augmentation", "training.seed"
SHOTS = (2, 4, 8)
YES, NO = "✓", "–"

# Table 4's DCN column: what aligns the supports. A pure warp has the offsets and no weights of its own.
ALIGNMENTS: dict[str, dict[str, Any]] = {
    NO: {"alignment": None},
    "warp": {"alignment.kernel": "identity"},
    "DCN": {"alignment.kernel": "full"},
}
# The rows of Table 4 as printed: augmentation, memory, DCN.
TABLE_4 = ((NO, NO, NO), (YES, NO, NO), (NO, YES, NO), (NO, YES, "DCN"), (YES, YES, NO), (YES, YES, "DCN"))
TABLE_5 = [name for name in get_args(Augmentation) if name != "none"]


@dataclass(frozen=True)
class Variant:
    """One row of an ablation.

    ``labels``: column -> cell, what sets it apart. ``config``: the whole configuration; its seed is set for each run.
    """

    labels: Mapping[str, str]
    config: BKDConfig

    @property
    def name(self) -> str:
        """For folders and files: the labels, with nothing but letters, digits and dashes between them."""
        words = (f"{column}-{_PLAIN.get(cell, cell)}" for column, cell in self.labels.items())
        return re.sub(r"[^\w.=-]+", "-", "_".join(words))


_PLAIN = {YES: "yes", NO: "no"}


def table_variants(number: int, base: BKDConfig) -> list[Variant]:
    """The rows of the paper's Table 2 (shots), 4 (augmentation, memory, DCN) or 5 (transformations).

    Where ``base`` retrieves its supports they are matched before they are aligned, and not
    augmented: Table 4 then has no column for it, and a pure warp as a third kind of alignment, which refines the match;
    Table 5 cannot be had. Without a memory the student rebuilds the query from the teacher's own features; where
    ``base`` has none, the memory is the whole reverse branch, which is then off.

    Raises:
        BKDError: no such table; Table 5 of retrieved supports; a base without forward branch.
    """
    if number not in TABLES:
        raise BKDError(f"there is no ablation for table {number}: choose one of {', '.join(map(str, TABLES))}")
    if not base.forward_branch:
        raise BKDError("tables 2, 4 and 5 vary the forward branch, and support is None in this configuration")
    if number == 2:
        return [Variant({"k": str(shots)}, base.with_changes({"support.shots": shots})) for shots in SHOTS]
    if number == 5:
        if base.retrieves:
            raise BKDError("table 5 varies augmentations, and retrieved supports have none: use --preset paper")
        bare = Variant({"augmentation": "none, no DCN"}, base.with_changes(alignment=None))
        # What is augmented is what an alignment learns from.
        aligned = base if base.alignment is not None else base.with_changes(alignment="on")
        rest = [Variant({"augmentation": name}, aligned.with_changes({AUGMENTATION: name})) for name in TABLE_5]
        return [bare, *rest]
    if base.retrieves:
        return [
            Variant({"memory": memory, "alignment": alignment}, _parts(base, memory, alignment))
            for memory in (NO, YES)
            for alignment in ALIGNMENTS
        ]
    return [
        Variant(
            {"augmentation": augmentation, "memory": memory, "alignment": alignment, "k": str(shots)},
            _parts(
                base.with_changes(
                    {"support.shots": shots, AUGMENTATION: _augmentation(base) if augmentation == YES else "none"}
                ),
                memory,
                alignment,
            ),
        )
        for augmentation, memory, alignment in TABLE_4
        for shots in SHOTS
    ]


def grid_variants(fields: Mapping[str, Sequence[Any]], base: BKDConfig) -> list[Variant]:
    """Every combination of the values given for each field; the last field varies fastest.

    Raises:
        BKDError: no fields, a field without values, an unknown field or a value that it does not take; the seed, which
            every variant is repeated over.
    """
    if SEED in fields:
        raise BKDError(f"{SEED} cannot be a field of the grid: every variant is repeated with --seeds N")
    if not fields or not all(fields.values()):
        raise BKDError("a grid needs fields with values, as in --grid support.shots=4,8,16 memory.items=500,2000")
    return [
        Variant(
            {name: str(value) for name, value in zip(fields, values, strict=True)},
            base.with_changes(dict(zip(fields, values, strict=True))),
        )
        for values in itertools.product(*fields.values())
    ]


def _parts(base: BKDConfig, memory: str, alignment: str) -> BKDConfig:
    """``base`` with or without memory, and with one kind of alignment."""
    config = base.with_changes(ALIGNMENTS[alignment])
    if config.memory is None:
        raise BKDError("table 4 varies the memory, and there is none: set memory=on")
    if memory == YES:
        return config
    changes: dict[str, Any] = {"memory": None}
    return config.with_changes(changes if config.student is None else {**changes, "student.correction": False})


def _augmentation(base: BKDConfig) -> str:
    assert isinstance(base.support, SampledSupport)
    return base.support.augmentation if base.support.augmentation != "none" else "rotation_scale"
