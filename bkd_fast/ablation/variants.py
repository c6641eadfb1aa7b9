"""Which configurations an ablation compares: the paper's Tables 2, 4 and 5, or a grid over fields."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from bkd_fast.config import Augmentation, BKDConfig
from bkd_fast.errors import BKDError

TABLES = (2, 4, 5)
SHOTS = (2, 4, 8)
YES, NO = "✓", "–"

# Table 4's DCN column: what aligns the supports. A pure warp has the offsets and no weights of its own.
ALIGNMENTS = {NO: "none", "warp": "identity", "DCN": "full"}
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

    Where ``base`` looks its supports up (``support_draw="nearest"``) they are matched before they are aligned, and not
    augmented: Table 4 then has no column for it, and a pure warp as a third kind of alignment, which refines the match;
    Table 5 cannot be had. Without a memory the student rebuilds the query from the teacher's own features; where
    ``base`` has none, the memory is the whole reverse branch, which is then off.

    Raises:
        BKDError: no such table; Table 5 of supports that are looked up; a base without forward branch.
    """
    if number not in TABLES:
        raise BKDError(f"there is no ablation for table {number}: choose one of {', '.join(map(str, TABLES))}")
    if not base.forward_branch:
        raise BKDError("tables 2, 4 and 5 vary the forward branch, and forward_branch is off in this configuration")
    if number == 2:
        return [Variant({"k": str(shots)}, base.with_changes(shots=shots)) for shots in SHOTS]
    if number == 5:
        if base.looks_up:
            raise BKDError(
                "table 5 compares augmentations of supports, and support_draw='nearest' looks supports up without any: "
                "use --preset paper, or --set support_draw=query shot_aggregation=mean"
            )
        bare = Variant({"augmentation": "none, no DCN"}, base.with_changes(alignment_kernel="none"))
        # What is augmented is what an alignment learns from.
        aligned = base.with_changes(alignment_kernel="full") if base.alignment_kernel == "none" else base
        rest = [Variant({"augmentation": name}, aligned.with_changes(support_augmentation=name)) for name in TABLE_5]
        return [bare, *rest]
    if base.looks_up:
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
                    shots=shots, support_augmentation=_augmentation(base) if augmentation == YES else "none"
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
    if "seed" in fields:
        raise BKDError("seed cannot be a field of the grid: every variant is repeated with --seeds N")
    if not fields or not all(fields.values()):
        raise BKDError("a grid needs fields with values, as in --grid shots=4,8,16 memory_items=500,2000")
    return [
        Variant(
            {name: str(value) for name, value in zip(fields, values, strict=True)},
            base.with_changes(**dict(zip(fields, values, strict=True))),
        )
        for values in itertools.product(*fields.values())
    ]


def _parts(base: BKDConfig, memory: str, alignment: str) -> BKDConfig:
    """``base`` with or without memory, and with one kind of alignment."""
    config = base.with_changes(alignment_kernel=ALIGNMENTS[alignment])
    if not (config.reverse_branch and config.memory_items):
        raise BKDError("table 4 varies the memory, and there is none: set memory_items and reverse_branch")
    if memory == YES:
        return config
    if config.student:
        return config.with_changes(memory_items=0, student_correction=False)
    return config.with_changes(reverse_branch=False)


def _augmentation(base: BKDConfig) -> str:
    return base.support_augmentation if base.support_augmentation != "none" else "rotation_scale"
