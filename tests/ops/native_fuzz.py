"""Calls of torch.ops.bkd_fast_native with wrong arguments, in a process that test_native_safety.py watches.

Every tensor ends, or begins, at a page that may not be touched: what reads or writes beyond it ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
import cases
import torch
from test_operators import NAMES, WITH_GRADIENT, of_tensors, sample, tensors
from torch import Tensor

import bkd_fast.ops.native  # noqa: F401  registers the operators
from bkd_fast.ops import backend

PAGE = mmap.PAGESIZE
LAST = torch.channels_last
KERNELS = torch.ops.bkd_fast_native
TIERS = KERNELS.cpu_tiers().split()
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError)  # NotImplementedError is a RuntimeError
Arguments = list[Any]


def guarded(tensor: Tensor, chance: random.Random) -> Tensor:
    """A copy with the same sizes and strides, beside a page that may not be touched."""
    if tensor.is_meta or not tensor.numel():
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = span * tensor.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0):
            raise OSError("mprotect failed")
    offset = PAGE if chance.random() < 0.3 else (pages + 1) * PAGE - size
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=span, offset=offset)
    flat.copy_(tensor.as_strided((span,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride())


def each_tensor(function: Callable[[Tensor], Tensor], arguments: Sequence[Any]) -> Arguments:
    """The arguments with a function applied to every tensor, in lists too."""
    return [
        each_tensor(function, value)
        if isinstance(value, list)
        else function(value)
        if isinstance(value, Tensor)
        else value
        for value in arguments
    ]


def recorded() -> dict[str, Arguments]:
    """Return the arguments of a call of every kernel, as the operators make them of their samples.

    On the first instruction set; in bfloat16, where a kernel takes it, on the last.
    """
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "bkd_fast_native::" in name}
    names = {name.split(".")[0] for name in registered} - {"cpu_tiers", "amx_missing"}  # which take no arguments
    kernels = {name: getattr(KERNELS, name) for name in names}
    calls: dict[str, Arguments] = {}

    def recorder(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            kept = each_tensor(lambda tensor: tensor.detach().clone(), arguments)
            narrow = any(isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in kept)
            calls.setdefault(f"{name} in bfloat16" if narrow else name, kept if narrow else [0, *kept[1:]])
            return kernels[name](*arguments)

        return call

    for name in kernels:
        setattr(KERNELS, name, recorder(name))
    # With groups; of the samples the first call of a kernel counts that is none of these.
    for case in (cases.conv(2, 8, 4, (5, 7), groups=2, offset_groups=4), cases.gather(2, 5, 1, groups=4)):
        cases.results(case, "native", torch.float32)
    with backend("native"):
        for dtype in (torch.float32, torch.bfloat16):
            for name in NAMES:
                arguments = sample(name, dtype, grad=name in WITH_GRADIENT)
                output = of_tensors(name, arguments)(*tensors(arguments))
                if name in WITH_GRADIENT:
                    output.sum().backward()
    for name, kernel in kernels.items():
        setattr(KERNELS, name, kernel)
    missing = set(kernels) - set(calls)
    assert not missing, f"operators without calls: {missing}"
    return calls


def another_tensor(tensor: Tensor, chance: random.Random) -> tuple[Tensor, bool]:
    """A tensor that differs in one thing, and whether it is wrong in any call."""
    if not tensor.numel():  # a gradient that is not asked for
        return tensor, False
    dim = chance.randrange(tensor.ndim) if tensor.ndim else 0
    kind = chance.choice(("dtype", "half", "double", "meta", "deeper", "flat", "grow", "shrink", "empty", "strided",
                          "transposed", "last", "expanded", "values"))  # fmt: skip
    if kind == "dtype":
        return tensor.to(torch.int16), True
    if kind == "meta":
        return tensor.to("meta"), True
    if kind == "half":
        return tensor.to(chance.choice((torch.float16, torch.bfloat16))), False
    if kind == "double":
        return tensor.double(), False
    if kind == "deeper":
        return tensor.unsqueeze(chance.randrange(tensor.ndim + 1)), True
    if kind == "values" and tensor.dtype == torch.int64:
        return torch.randint_like(tensor, -4, 9), False
    if kind == "values":
        return torch.full_like(tensor, chance.choice((float("nan"), float("inf"), -1e30, 0.0))), False
    if not tensor.ndim:
        return tensor.expand(3), True
    if kind == "flat":
        return tensor.flatten(), False
    if kind in ("grow", "expanded"):
        grown = torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
        return (grown if kind == "grow" else tensor.narrow(dim, 0, 1).expand(tensor.shape)), False
    if kind in ("shrink", "empty"):
        return tensor.narrow(dim, 0, 0 if kind == "empty" else tensor.shape[dim] - 1).contiguous(), False
    if kind == "strided":
        return tensor.repeat_interleave(2, dim).narrow(dim, 0, 2 * tensor.shape[dim]).unflatten(dim, (-1, 2)).select(
            dim + 1, 0
        ), False
    if kind == "last" and tensor.ndim == 4:
        return tensor.contiguous(memory_format=LAST), False
    return tensor.transpose(dim, chance.randrange(tensor.ndim)), False


def change(arguments: Arguments, chance: random.Random) -> bool:
    """Change one argument; return whether the call is wrong for certain."""
    index = chance.randrange(len(arguments))
    given = arguments[index]
    if index == 0:
        arguments[0] = chance.choice((-1, len(TIERS), 2**62, -(2**62)))
        return True
    if isinstance(given, Tensor):
        arguments[index], wrong = another_tensor(given, chance)
        return wrong
    if isinstance(given, list) and given and isinstance(given[0], Tensor):
        place = chance.randrange(len(given))
        action = chance.choice(("tensor", "tensor", "longer", "shorter", "none"))
        if action == "tensor":
            given[place], wrong = another_tensor(given[place], chance)
            return wrong
        arguments[index] = {"longer": [*given, given[0]], "shorter": given[:-1], "none": []}[action]
        return True
    if isinstance(given, list):
        odd = (-1, 0, 2**31, 2**62) if isinstance(given[0], int) else (float("nan"), -1.0, 1e300)
        arguments[index] = chance.choice(
            ([], given[:-1], [*given, given[0]], [chance.choice(odd), *given[1:]], [*given[:-1], chance.choice(odd)])
        )
        return len(arguments[index]) != len(given)
    if isinstance(given, bool):
        arguments[index] = not given
    elif isinstance(given, float):
        arguments[index] = chance.choice((float("nan"), float("inf"), -float("inf"), -1.0, 1e300, 0.0))
    elif isinstance(given, int):
        arguments[index] = chance.choice((-1, 0, 3, 9, 2**31, 2**62))
    return False


def main(first: int, count: int) -> None:
    """Make the calls of some seeds; print each before it is made, and at the end how many were refused."""
    torch.manual_seed(0)
    calls, refused = recorded(), 0
    for seed in range(first, first + count):
        chance = random.Random(seed)
        name = chance.choice(sorted(calls))
        arguments = each_tensor(lambda tensor: tensor, calls[name])  # changes are made to lists of their own
        wrong = any([change(arguments, chance)]) if seed % 20 else False  # some calls are right
        arguments = each_tensor(lambda tensor, chance=chance: guarded(tensor, chance), arguments)
        print(f"{seed} {name}", flush=True)
        try:
            getattr(KERNELS, name.split()[0])(*arguments)
        except REFUSALS:
            assert seed % 20, f"seed {seed}: a right call of {name} was refused"
            refused += 1
        else:
            assert not wrong, f"seed {seed}: a wrong call of {name} was not refused"
    print(f"refused {refused}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
