"""Calls the registered operators with random arguments, few of them right: python wrong_calls.py COUNT BACKEND.

Prints how many calls returned and how many raised. A call that reads or writes where it must not ends the process.
"""

import random
import sys

import torch
from test_operators import FOLDERS, overload, sample

from bkd_fast.ops import backend

torch.set_num_threads(1)
HUGE = (2**31, 2**40, 2**63 - 1, -1, -(2**31), 2**63 - 2)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64)


def tensor(rng, value):
    """A tensor like ``value``, or unlike it."""
    choice = rng.randrange(9)
    if choice < 3:
        return value
    if choice == 3:
        return value.to(rng.choice(DTYPES))
    if choice == 4:
        return torch.randn([rng.choice((0, 1, 2, 3, 5, 18)) for _ in range(rng.randrange(6))])
    if choice == 5 and value.ndim:
        dim = rng.randrange(value.ndim)
        return value.narrow(dim, 0, rng.randrange(value.shape[dim] + 1))
    if choice == 6:
        return value.transpose(0, -1) if value.ndim else value
    if choice == 7:  # as many elements as no memory has
        return torch.zeros((), dtype=value.dtype).expand([rng.choice((1, 2**20, 2**33)) for _ in range(value.ndim)])
    return torch.full_like(value, rng.choice((-1, 2**40, 0))) if value.dtype == torch.int64 else value * float("nan")


def changed(rng, value):
    if isinstance(value, torch.Tensor):
        return tensor(rng, value)
    if isinstance(value, list):
        parts = [changed(rng, part) for part in value]
        return rng.choice((parts, parts, parts, parts[1:], parts + parts, []))
    if isinstance(value, bool):
        return rng.choice((True, False))
    if isinstance(value, int):
        return rng.choice((value, value, 0, 1, 2, 3, rng.choice(HUGE)))
    if isinstance(value, float):
        return rng.choice((value, value, 0.0, -1.0, 1e300, -1e300, 1e-300, float("nan"), float("inf")))
    if isinstance(value, str):
        return rng.choice((value, value, "", "sum", "nothing"))
    return rng.choice((value, torch.ones(2, 9, 6, 5), torch.ones(1)))


def main(count: int, name: str) -> None:
    rng = random.Random(0)
    returned = 0
    calls = []
    for operator in FOLDERS:
        arguments = list(sample(operator))
        calls.append((operator, arguments))
        results = overload(operator)(*arguments)
        results = list(results) if isinstance(results, tuple) else [results]
        if hasattr(torch.ops.bkd_fast, f"{operator}_backward"):
            calls.append((f"{operator}_backward", [*results, *arguments, [True] * 5]))
    with backend(name):
        for _ in range(count):
            operator, arguments = rng.choice(calls)
            try:
                given = [changed(rng, value) if rng.random() < 0.4 else value for value in arguments]
                overload(operator)(*given)
                returned += 1
            except (RuntimeError, TypeError, ValueError, IndexError, OverflowError):
                pass
    print(returned, count - returned)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
