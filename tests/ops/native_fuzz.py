"""Calls of torch.ops.bkd_fast_native with wrong arguments, in a process that test_native_safety.py watches.

Every tensor ends, or begins, at a page that may not be touched: what reads or writes beyond it ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bkd_fast.ops.native  # noqa: F401  registers the operators

PAGE = mmap.PAGESIZE
LAST = torch.channels_last
TIERS = torch.ops.bkd_fast_native.cpu_tiers().split()
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


def conv(backward: bool) -> Callable[[], Arguments]:
    def arguments() -> Arguments:
        input, weight = torch.randn(2, 6, 5, 7).contiguous(memory_format=LAST), torch.randn(4, 3, 3, 2)
        offset, mask, output = torch.randn(2, 24, 5, 6), torch.randn(2, 12, 5, 6), torch.randn(2, 4, 5, 6)
        geometry = [[1, 1], [1, 0], [1, 1]]
        if not backward:
            return [0, input, offset, mask, weight, torch.randn(4), *geometry, output]
        results = [torch.zeros_like(tensor) for tensor in (input, offset, mask, weight)]
        return [0, output, input, offset, mask, weight, *geometry, *results]

    return arguments


def bfloat16(make: Callable[[], Arguments], float32: tuple[int, ...] = ()) -> Callable[[], Arguments]:
    """The same call in bfloat16, but for some arguments, on the last instruction set."""

    def arguments() -> Arguments:
        made = [
            value.bfloat16() if isinstance(value, Tensor) and index not in float32 else value
            for index, value in enumerate(make())
        ]
        return [len(TIERS) - 1, *made[1:]]

    return arguments


def gather(backward: bool) -> Callable[[], Arguments]:
    def arguments() -> Arguments:
        projected = torch.randn(2, 4 * 5, 5, 7).contiguous(memory_format=LAST)
        offset, mask = torch.randn(2, 8, 4, 6), torch.randn(2, 4, 4, 6)
        output, geometry = torch.randn(2, 5, 4, 6).contiguous(memory_format=LAST), [[2, 2], [1, 1], [0, 0], [1, 1]]
        if not backward:
            return [0, projected, offset, mask, *geometry, output]
        return [0, output, projected, offset, mask, *geometry, *map(torch.zeros_like, (projected, offset, mask))]

    return arguments


def attention(backward: bool) -> Callable[[], Arguments]:
    def arguments() -> Arguments:
        query, memory = torch.randn(9, 7), torch.randn(11, 7)
        if not backward:
            return [0, query, memory, 0.02, 0.3, True, torch.empty_like(query)]
        return [0, torch.randn(9, 7), query, memory, 0.02, 0.3, True, torch.empty_like(query), torch.zeros_like(memory)]

    return arguments


def levels(branches: int) -> tuple[list[Tensor], list[Tensor]]:
    shapes = ((2, 5, 4, 3), (2, 7, 2, 2))
    return [torch.randn(shape) for shape in shapes], [torch.randn(shape) for _ in range(branches) for shape in shapes]


def distances() -> Arguments:
    teacher, student = levels(2)
    return [0, teacher, student, [1.0, 2.0, 3.0, 4.0], 0.2, torch.empty(2 * 12 + 2 * 4)]


def distances_backward() -> Arguments:
    teacher, student = levels(2)
    results = [[torch.empty_like(level) for level in part] for part in (teacher, student)]
    return [0, torch.randn(2 * 12 + 2 * 4), teacher, student, [1.0, 2.0, 3.0, 4.0], 0.2, *results]


def anomaly_map() -> Arguments:
    return [0, *levels(1), [1.0, 2.0], [1.0, 0.5], 0.2, True, 1.5, False, torch.empty(2, 9, 8)]


def loss() -> Arguments:
    return [0, *levels(1), True, 0.5, torch.empty(3 * (2 * 12 + 2 * 4)), torch.empty(())]


def loss_backward() -> Arguments:
    teacher, student = levels(1)
    results = [[torch.empty_like(level) for level in part] for part in (teacher, student)]
    return [0, torch.ones(()), teacher, student, torch.ones(3 * (2 * 12 + 2 * 4)), True, 0.5, *results]


def match() -> Arguments:
    query, support = (torch.randn(count, 5, 4, 6).contiguous(memory_format=LAST) for count in (2, 3))
    shots = torch.tensor([[0, 2], [1, 1]])
    return [0, query, support, shots, 1, torch.empty(2, 2, 4, 6), torch.empty(2, 2, 2, 4, 6)]


def regression() -> Arguments:
    neighbors = torch.tensor([[0, 2], [1, 1], [3, 0]])
    return [0, torch.randn(3, 7), torch.randn(4, 7), neighbors, 0.3, torch.empty(3, 7)]


def selection() -> Arguments:
    distance, displacement = torch.rand(2, 3, 4, 6), torch.zeros(2, 3, 2, 4, 6)
    return [0, distance, displacement, torch.zeros(2, 3).long(), torch.empty(2, 4, 6, 2, dtype=torch.int64)]


def nearest() -> Arguments:
    index = torch.empty(3, 2, dtype=torch.int64)
    return [0, torch.randn(3, 7), torch.randn(5, 7), torch.rand(5), torch.randn(3, 5), 0.01, index]


def standardize() -> Arguments:
    x = torch.randn(2, 5, 4, 6).contiguous(memory_format=LAST)
    return [0, x, torch.randn(5), torch.rand(5) + 1, 3, True, torch.empty_like(x)]


def top_mean() -> Arguments:
    return [0, torch.randn(3, 50), 4, torch.empty(3)]


def activation() -> Arguments:
    x, residual = (torch.randn(2, 5, 4, 6).contiguous(memory_format=LAST) for _ in range(2))
    return [0, x, torch.randn(5), residual, 0.0, 6.0, torch.empty_like(x)]


CALLS: dict[str, Callable[[], Arguments]] = {
    "deform_conv": conv(False),
    "deform_conv_backward": conv(True),
    "deform_gather": gather(False),
    "deform_gather_backward": gather(True),
    "memory_attention": attention(False),
    "memory_attention_backward": attention(True),
    "cosine_distances": distances,
    "cosine_distances_backward": distances_backward,
    "anomaly_map": anomaly_map,
    "distillation_loss": loss,
    "distillation_loss_backward": loss_backward,
    "local_match": match,
    "neighbor_regression": regression,
    "select_matches": selection,
    "nearest_rows": nearest,
    "standardize": standardize,
    "top_mean": top_mean,
    "bias_activation": activation,
    "scaled_copy": lambda: [0, torch.randn(3, 5, 7), 2.0, torch.empty(3, 5, 7)],
}
if TIERS[-1] == "avx512bf16":
    CALLS["deform_conv in bfloat16"] = bfloat16(conv(False), float32=(2, 3, 5))  # offset, mask and bias
    CALLS["deform_gather in bfloat16"] = bfloat16(gather(False), float32=(2, 3))
    CALLS["memory_attention in bfloat16"] = bfloat16(attention(False))


def another_tensor(tensor: Tensor, chance: random.Random) -> tuple[Tensor, bool]:
    """A tensor that differs in one thing, and whether it is wrong in any call."""
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
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "bkd_fast_native::" in name}
    missing = {name.split(".")[0] for name in registered} - set(CALLS) - {"cpu_tiers"}
    assert not missing, f"operators without calls: {missing}"
    refused = 0
    for seed in range(first, first + count):
        chance = random.Random(seed)
        name = chance.choice(sorted(CALLS))
        arguments = CALLS[name]()
        wrong = any([change(arguments, chance)]) if seed % 20 else False  # some calls are right
        arguments = [
            [guarded(part, chance) if isinstance(part, Tensor) else part for part in value]
            if isinstance(value, list)
            else guarded(value, chance)
            if isinstance(value, Tensor)
            else value
            for value in arguments
        ]
        print(f"{seed} {name}", flush=True)
        try:
            getattr(torch.ops.bkd_fast_native, name.split()[0])(*arguments)
        except REFUSALS:
            assert seed % 20, f"seed {seed}: a right call of {name} was refused"
            refused += 1
        else:
            assert not wrong, f"seed {seed}: a wrong call of {name} was not refused"
    print(f"refused {refused}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
