"""Errors for arguments that do not fit: each names the argument, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_INDEX = 2**31 - 1  # kernels number the pixels of an image, and the rows of a matrix, in 32 bits


def check_types(function: str, tensors: Mapping[str, object], optional: Mapping[str, object] | None = None) -> None:
    """Check what the schema of an operator says in less plain words: that tensors are tensors.

    Raises:
        TypeError: not a tensor; the optional ones may be None.
    """
    given = {**tensors, **{name: value for name, value in (optional or {}).items() if value is not None}}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} is of type {type(value).__name__}, expected a tensor")


def check_tensors(
    function: str, tensors: Mapping[str, Tensor], optional: Mapping[str, Tensor | None] | None = None
) -> None:
    """Check for floating-point tensors (the optional ones may be None) on one device; float64 only with float64.

    Raises:
        TypeError: an unsupported dtype. ValueError: different devices.
    """
    given = {**tensors, **{name: value for name, value in (optional or {}).items() if value is not None}}
    first_name, first = next(iter(given.items()))
    for name, value in given.items():
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
    """Check a shape. ``expected`` holds a number for a fixed size, and a word where any size will do.

    Raises:
        ValueError: another number of dimensions or another size.
    """
    shape = tuple(tensor.shape)
    if len(shape) == len(expected):
        for size, wanted in zip(shape, expected, strict=True):
            if not isinstance(wanted, str) and size != wanted:
                break
        else:
            return
    words = ", ".join(str(wanted) for wanted in expected)
    raise ValueError(f"{function}: {name} has shape {shape}, expected ({words})")


def check_index(function: str, name: str, sizes: Sequence[int]) -> None:
    """Check that the product of sizes can be counted in 32 bits. Symbolic sizes are checked when the program runs.

    Raises:
        ValueError: more than MAX_INDEX.
    """
    count = 1
    for size in sizes:
        if not isinstance(size, int):
            return
        count *= size
    if count > MAX_INDEX:
        shown = " x ".join(map(str, sizes))
        raise ValueError(f"{function}: {name} is {shown}, which kernels cannot index: expected at most {MAX_INDEX}")


def check_index_tensor(function: str, name: str, indices: Tensor, like: str, other: Tensor) -> None:
    """Check for int64 on the device of another argument, ``like``.

    Raises:
        TypeError: another dtype. ValueError: another device.
    """
    if indices.dtype != torch.int64:
        raise TypeError(f"{function}: {name} is {indices.dtype}, expected int64")
    if indices.device != other.device:
        raise ValueError(
            f"{function}: {name} is on {indices.device} and {like} on {other.device}; move both to one device"
        )


def check_indices(function: str, name: str, indices: Tensor, count: int, of: str) -> None:
    """Check indices of ``count`` things, which ``of`` names.

    Raises:
        IndexError: one that is not from 0 to ``count`` - 1.
    """
    if not indices.numel():
        return
    low, high = (int(value) for value in indices.aminmax())
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        raise IndexError(f"{function}: {name} has {wrong}, expected 0 to {count - 1}, {of}")


def pair(function: str, name: str, value: int | Sequence[int], min: int) -> list[int]:
    """Return an integer or a (vertical, horizontal) pair as a list of two.

    Raises:
        ValueError: not one or two integers from ``min`` to MAX_INDEX.
    """
    values = [value, value] if isinstance(value, int) else list(value)
    if len(values) != 2 or not _is_size(values[0], min) or not _is_size(values[1], min):
        raise ValueError(f"{function}: {name} is {value!r}, expected an integer or a pair of integers, at least {min}")
    check_index(function, name, values[:1])
    check_index(function, name, values[1:])
    return values


def _is_size(value: object, min: int) -> bool:
    return isinstance(value, (int, torch.SymInt)) and bool(value >= min)


def output_size(
    name: str, input: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:  # fmt: skip
    """Return the height and width of a convolution's output.

    Raises:
        ValueError: an argument that is no pair of integers, an image that is smaller than the kernel, or one that is
            too large to be indexed.
    """
    for label, value, low in (
        ("kernel_size", kernel, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1),
    ):  # fmt: skip
        if len(value) != 2 or not (low <= value[0] <= MAX_INDEX and low <= value[1] <= MAX_INDEX):
            pair(name, label, value, low)
    sizes = []
    for axis in (0, 1):
        padded = input.shape[2 + axis] + 2 * padding[axis]
        rest = padded - dilation[axis] * (kernel[axis] - 1) - 1
        if rest < 0 or not input.shape[2 + axis]:
            raise ValueError(
                f"{name}: an input of {tuple(input.shape[2:])} with padding {padding} is smaller than the kernel "
                f"{kernel} with dilation {dilation}"
            )
        check_index(name, "the padded input", [padded])
        sizes.append(rest // stride[axis] + 1)
    check_index(name, "the input", input.shape[2:])
    check_index(name, "the output", sizes)
    return sizes[0], sizes[1]


def check_levels(function: str, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    """Check the levels of a teacher, and as many of every student, shape by shape.

    Raises:
        TypeError, ValueError: see :func:`check_tensors` and :func:`check_shape`; no levels; a count that does not fit.
    """
    if not teacher or not student or len(student) % len(teacher):
        raise ValueError(
            f"{function}: teacher has {len(teacher)} levels and student {len(student)}; "
            "expected at least one, and a student level for each teacher level of every branch"
        )
    count = len(teacher)
    check_tensors(function, named_levels(teacher, student))
    for index, level in enumerate(teacher):
        check_shape(function, f"teacher[{index}]", level, (teacher[0].shape[0], "C", "H", "W"))
        if 0 in level.shape[1:]:
            raise ValueError(
                f"{function}: teacher[{index}] has shape {tuple(level.shape)}, expected no size 0 but the batch"
            )
        check_index(function, f"teacher[{index}]", level.shape[2:])
    for index, level in enumerate(student):
        check_shape(function, f"student[{index}]", level, tuple(teacher[index % count].shape))


def named_levels(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return all levels by the names that errors give them."""
    return {**named("teacher", teacher), **named("student", student)}


def named(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a list by the names that errors give them."""
    return {f"{name}[{index}]": tensor for index, tensor in enumerate(tensors)}
