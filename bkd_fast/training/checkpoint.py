"""Exact resume: model, optimiser and position of an unfinished training in one safetensors file."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bkd_fast.artifact import FORMAT, DataSource, load_state, save_tensors
from bkd_fast.config import BKDConfig
from bkd_fast.errors import BKDError
from bkd_fast.files import atomic_write
from bkd_fast.model import BKD

MODEL_PREFIX, OPTIMIZER_PREFIX = "model/", "optimizer/"


@dataclass
class Progress:
    """How far a training has come: whole epochs as ``rows``, then ``step`` steps of ``epoch`` with their ``sums``."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)  # of fp16 training


def save_checkpoint(
    path: Path, model: BKD, optimizer: torch.optim.Optimizer, progress: Progress, source: DataSource
) -> None:
    """Write the checkpoint atomically. Order and randomness need no saving: they follow from seed, epoch and step."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {MODEL_PREFIX + name: value for name, value in model.state_dict().items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{OPTIMIZER_PREFIX}{names[parameter]}/{key}"] = torch.as_tensor(value)
    meta = {"format": FORMAT, "config": model.config.to_dict(), "progress": asdict(progress)}
    meta["source"] = asdict(source)
    save_tensors(path, tensors, {"bkd_fast": json.dumps(meta)})


def read_begun(path: Path) -> tuple[DataSource, BKDConfig]:
    """Return which files the training of a checkpoint uses, and its configuration.

    Raises:
        BKDError: an unreadable file, or another format.
    """
    meta, _ = _read(path)
    return DataSource.parse("source", meta.get("source")), BKDConfig.from_dict(_saved_config(path, meta))


def load_checkpoint(path: Path, model: BKD, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore ``model`` and ``optimizer`` in place.

    Raises:
        BKDError: an unreadable file, another format, or a configuration that differs (the options are named).
    """
    meta, tensors = _read(path, tensors=True)
    _check_same(path, _saved_config(path, meta), model.config)
    load_state(model, _under(tensors, MODEL_PREFIX), path)
    saved = _under(tensors, OPTIMIZER_PREFIX)
    try:
        for name, parameter in model.named_parameters():
            state = _under(saved, f"{name}/")
            if state:
                optimizer.state[parameter] = {
                    key: value if key == "step" else torch.empty_like(parameter).copy_(value)
                    for key, value in state.items()
                }
        return Progress(**meta["progress"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise BKDError(f"{path} is not a readable checkpoint ({error}): delete it to train from the start") from error


def _read(path: Path, *, tensors: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["bkd_fast"])
            values = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise BKDError(f"{path} is not a readable checkpoint ({error}): delete it to train from the start") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise BKDError(f"{path} has checkpoint format {found!r}, expected {FORMAT}: train from the start")
    return meta, values


def _saved_config(path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    config = meta.get("config")
    if not isinstance(config, dict):
        raise BKDError(f"{path} is not a readable checkpoint: delete it to train from the start")
    return config


def write_log(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write ``log.csv``: a row for each epoch."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the rows that :func:`write_log` wrote; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _check_same(path: Path, saved: Mapping[str, Any], config: BKDConfig) -> None:
    asked = config.to_dict()
    different = [name for name in asked if asked[name] != saved.get(name)]
    if different:
        changes = ", ".join(f"{name} ({saved.get(name)!r} then, {asked[name]!r} now)" for name in different)
        raise BKDError(f"{path} was made with another configuration: {changes}. Resume with the same, or train anew.")
