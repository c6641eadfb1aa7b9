"""Errors for arguments that do not fit, naming the argument, what it was and what it should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    function: str, tensors: Mapping[str, Tensor], optional: Mapping[str, Tensor | None] | None = None
) -> None:
    """Floating-point tensors (the optional ones may be None) on one device; float64 only with float64.

    Raises:
        TypeError: not a tensor, or an unusable dtype. ValueError: different devices.
    """
    given = {**tensors, **{name: value for name, value in (optional or {}).items() if value is not None}}
    first_name, first = next(iter(given.items()))
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} is of type {type(value).__name__}, expected a tensor")
        if value.dtype not in DTYPES:
            raise TypeError(f"{function}: {name} is {value.dtype}, expected float16, bfloat16, float32 or float64")
        if (value.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(
                f"{function}: {name} is {value.dtype} and {first_name} is {first.dtype}; "
                "float64 cannot be mixed with other dtypes: convert one of them"
            )
        if value.device != first.device:
            raise ValueError(
                f"{function}: {name} is on {value.device} and {first_name} on {first.device}; move both to one device"
            )


def check_shape(function: str, name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """``expected`` has numbers, and words where any size will do.

    Raises:
        ValueError: another number of dimensions or another size.
    """
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(shape, expected, strict=True)
    )
    if not fits:
        words = ", ".join(str(wanted) for wanted in expected)
        raise ValueError(f"{function}: {name} has shape {shape}, expected ({words})")


def check_shots(function: str, shots: Tensor, images: int) -> None:
    """Numbers of support images.

    Raises:
        IndexError: one that is not from 0 to ``images`` - 1.
    """
    if not shots.numel():
        return
    least, most = (int(value) for value in shots.aminmax())
    if least < 0 or most >= images:
        wrong = least if least < 0 else most
        raise IndexError(f"{function}: shots has {wrong}, expected 0 to {images - 1}, the images of support")


def pair(function: str, name: str, value: int | Sequence[int], least: int) -> list[int]:
    """An integer or a (vertical, horizontal) pair as a list of two.

    Raises:
        ValueError: not one or two integers of at least ``least``.
    """
    values = [value, value] if isinstance(value, int) else list(value)
    if len(values) != 2 or any(not isinstance(part, (int, torch.SymInt)) or part < least for part in values):
        raise ValueError(
            f"{function}: {name} is {value!r}, expected an integer or a pair of integers, at least {least}"
        )
    return values


def check_levels(function: str, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    """Three or so levels of a teacher, and as many of every student, shape by shape.

    Raises:
        TypeError, ValueError: see :func:`check_tensors` and :func:`check_shape`; no levels; a count that does not fit.
    """
    if not teacher or not student or len(student) % len(teacher):
        raise ValueError(
            f"{function}: teacher has {len(teacher)} levels and student {len(student)}; "
            "expected at least one, and a student level for each teacher level of every branch"
        )
    count = len(teacher)
    check_tensors(
        function,
        {
            **{f"teacher[{index}]": level for index, level in enumerate(teacher)},
            **{f"student[{index}]": level for index, level in enumerate(student)},
        },
    )
    for index, level in enumerate(teacher):
        check_shape(function, f"teacher[{index}]", level, (teacher[0].shape[0], "C", "H", "W"))
        if 0 in level.shape[1:]:
            raise ValueError(
                f"{function}: teacher[{index}] has shape {tuple(level.shape)}, expected no size 0 but the batch"
            )
    for index, level in enumerate(student):
        check_shape(function, f"student[{index}]", level, tuple(teacher[index % count].shape))
