"""The errors a user of bkd_fast has to know, and the checks of arguments that raise them.

Whatever comes from a command line, a file or a keyword passes through one of these checks before any work is done.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any


class BKDError(ValueError):
    """Input that cannot be used: the message says what was given, what was expected and what to do."""


class ImageError(BKDError):
    """An image that cannot be used; the message names it."""


def scalar(value: Any) -> Any:
    """Return the Python value of a NumPy scalar or of an array or tensor without dimensions, and others as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def check_int(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Return a whole number; NumPy's are welcome, bool is none.

    Raises:
        BKDError: another type, or a value outside [low, high]; the message names the argument.
    """
    number = scalar(value)
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise BKDError(f"{name} is {_shown(number)}: expected a value of type int")
    return _in_range(name, int(number), low, high)


def check_float(name: str, value: Any, low: float | None = None, high: float | None = None) -> float:
    """Return a finite number; NumPy's and whole ones are welcome, bool is none.

    Raises:
        BKDError: another type, NaN, an infinity, or a value outside [low, high]; the message names the argument.
    """
    number = scalar(value)
    if not isinstance(number, Real) or isinstance(number, bool):
        raise BKDError(f"{name} is {_shown(number)}: expected a value of type float")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BKDError(f"{name} is {number}: expected a finite number")
    return _in_range(name, number, low, high)


def check_bool(name: str, value: Any) -> bool:
    """Return True or False, also NumPy's.

    Raises:
        BKDError: another type; the message names the argument.
    """
    value = scalar(value)
    if not isinstance(value, bool):
        raise BKDError(f"{name} is {_shown(value)}: expected a value of type bool")
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return one of several words.

    Raises:
        BKDError: anything else; the message lists the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise BKDError(f"{name} is {_shown(value)}: expected one of {', '.join(map(repr, choices))}")
    return str(value)


def _in_range(name: str, value: Any, low: float | None, high: float | None) -> Any:
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        if high is None:
            raise BKDError(f"{name} is {value}: expected at least {low:g}")
        expected = f"at most {high:g}" if low is None else f"a value from {low:g} to {high:g}"
        raise BKDError(f"{name} is {value}: expected {expected}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def few(values: Sequence[object], separator: str = ", ", count: int = 5) -> str:
    """Return the first ``count`` values as text, and how many more there are."""
    shown = separator.join(map(str, values[:count]))
    return shown + (f"{separator}and {len(values) - count} more" if len(values) > count else "")
