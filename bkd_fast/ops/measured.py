"""Which backend was measured to be the fastest for an operator on a CUDA device: ``measured.csv``.

A line has a device, by its name or as its compute capability ("9.0"), an operator, a dtype ("tf32": float32 whose
products round), a class of sizes, and a backend. What was not measured follows the order of the backends.
``benchmarks/gpu.py --write-table`` writes such a table from its measurements.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FILE = Path(__file__).with_name("measured.csv")
COLUMNS = ("device", "operator", "dtype", "size", "backend")


class Problem(NamedTuple):
    """What a measurement holds for: ``size`` is a class of :func:`size_class`."""

    operator: str
    dtype: str
    size: int


Table = Mapping[str, Mapping[Problem, str]]  # by device


def size_class(elements: int) -> int:
    """Return the class of a problem whose first tensor has so many numbers: 2^class, or fewer, but over a quarter."""
    bits = (max(elements, 1) - 1).bit_length()
    return bits + bits % 2


def read_table(path: Path) -> Table:
    """Return the fastest backend by device and problem.

    Raises:
        ValueError: the line and what is wrong with it.
    """
    from bkd_fast.ops.backend import BACKENDS

    table: dict[str, dict[Problem, str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path.name}: the columns are {reader.fieldnames}, expected {', '.join(COLUMNS)}")
        for number, line in enumerate(reader, 2):
            if line["backend"] not in BACKENDS:
                raise ValueError(f"{path.name}, line {number}: there is no backend {line['backend']!r}")
            if not (line["size"] or "").isdigit():
                raise ValueError(f"{path.name}, line {number}: size is {line['size']!r}, expected a whole number")
            problem = Problem(line["operator"], line["dtype"], int(line["size"]))
            table.setdefault(line["device"], {})[problem] = line["backend"]
    return table


def fastest(operator: str, tensor: Tensor) -> str | None:
    """Return the backend that was the fastest for a call on the device of its first tensor; None: not measured."""
    if not measured():
        return None
    choices = of_device(tensor.device.index)
    if not choices:
        return None
    elements = tensor.numel()
    if not isinstance(elements, int):  # a symbol: a compiled program must not depend on its value
        return None
    return choices.get(Problem(operator, _dtype(operator, tensor.dtype), size_class(elements)))


@cache
def measured() -> Table:
    """Return the table of this installation."""
    return read_table(FILE)


@cache
def of_device(index: int | None) -> Mapping[Problem, str]:
    """Return what was measured on devices like this one: of its name, else of its compute capability."""
    if not torch.cuda.is_available():  # tensors without data
        return {}
    name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    table = measured()
    return {**table.get(f"{major}.{minor}", {}), **table.get(name, {})}


def _dtype(operator: str, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        convolves = operator.startswith("modulated_deform")
        switch = torch.backends.cudnn.conv if convolves else torch.backends.cuda.matmul  # type: ignore[attr-defined]
        if switch.fp32_precision == "tf32":
            return "tf32"
    return str(dtype).removeprefix("torch.")
