"""Calls that reach every kernel, option and tail of every operator, and the rule for a correct result.

The rule is flash-attention's: the error against float64 is at most twice (gradients: three times) that of plain PyTorch
in the same type, plus one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bkd_fast.ops import (
    backend,
    cosine_anomaly_map,
    distillation_loss,
    local_match,
    modulated_deform_conv2d,
    modulated_deform_gather,
    sparse_memory_attention,
)

Case = tuple[Callable[..., Tensor], list[Tensor]]
ROUNDING = {torch.float32: 4e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TF32_ROUNDING = 2.0**-9  # of a product of two


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def deterministic(warn_only: bool = False) -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def conv(
    batch: int = 2, channels: int = 19, outputs: int = 13, size: tuple[int, int] = (7, 9),
    kernel: tuple[int, int] = (3, 3), groups: int = 1, offset_groups: int = 1, stride: int = 1, dilation: int = 1,
    mask: bool = True, bias: bool = True, last: bool = True, offsets_last: bool = False,
) -> Case:  # fmt: skip
    taps, padding = kernel[0] * kernel[1], (kernel[0] // 2, kernel[1] // 2)
    out = [(s + 2 * p - dilation * (k - 1) - 1) // stride + 1 for s, p, k in zip(size, padding, kernel, strict=True)]

    def laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    tensors = [
        laid_out(random(batch, channels, *size), last),
        random(outputs, channels // groups, *kernel, seed=1) / 5,
        laid_out(random(batch, 2 * offset_groups * taps, *out, seed=2), offsets_last),
        laid_out(random(batch, offset_groups * taps, *out, seed=3), offsets_last),
        random(outputs, seed=4),
    ]

    def call(i: Tensor, w: Tensor, o: Tensor, m: Tensor, b: Tensor) -> Tensor:
        output = modulated_deform_conv2d(i, o, w, b if bias else None, stride, padding, dilation, m if mask else None)
        return output if bias and mask else output + 0 * (b.sum() + m.sum())

    return call, tensors


def gather(
    batch: int = 2, channels: int = 19, kernel: int = 3, shared: bool = False, mask: bool = True, groups: int = 1
) -> Case:
    taps = groups * kernel * kernel
    tensors = [
        random(1 if shared else batch, taps * channels, 6, 5),
        random(batch, 2 * taps, 6, 5, seed=2),
        random(batch, taps, 6, 5, seed=3),
    ]
    return (
        lambda p, o, m: (
            modulated_deform_gather(p, o, m if mask else None, kernel, 1, kernel // 2) + (0 if mask else 0 * m.sum())
        ),
        tensors,
    )


def attention(
    rows: int = 37, items: int = 21, channels: int = 19, threshold: float = 0.02, temperature: float = 0.3,
    renormalize: bool = True, zero: bool = False,
) -> Case:  # fmt: skip
    query, memory = random(rows, channels), random(items, channels, seed=1)
    if zero:
        query[3], memory[2] = 0, 0
    return lambda q, m: sparse_memory_attention(q, m, threshold, temperature, renormalize), [query, memory]


LEVELS = ((2, 19, 9, 7), (2, 40, 5, 5), (2, 3, 1, 2))


def levels(branches: int, last: bool) -> list[Tensor]:
    layout = torch.channels_last if last else torch.contiguous_format
    shapes = [shape for _ in range(1 + branches) for shape in LEVELS]
    return [random(*shape, seed=seed).contiguous(memory_format=layout) for seed, shape in enumerate(shapes)]


def anomaly(
    size: tuple[int, int] = (37, 21), branches: int = 2, last: bool = False, fusion: str = "product",
    sigma: float = 2.0, share: float = 0.2, align: bool = False,
    powers: bool = False,
) -> Case:  # fmt: skip
    weights = [1 + index / 10 for index in range(3 * branches)]
    return lambda *all_levels: cosine_anomaly_map(
        all_levels[:3], all_levels[3:], size, fusion=fusion, sigma=sigma, weights=weights, align_corners=align,
        value_share=share, exponents=(0.4, 1.0, 1.7) if powers else None,
    ), levels(branches, last)  # fmt: skip


def loss(direction: str, last: bool) -> Case:
    return lambda *all_levels: distillation_loss(all_levels[:3], all_levels[3:], direction=direction), levels(1, last)


class Match(NamedTuple):
    """Arguments of a call of ``local_match``, which has no gradient."""

    query: Tensor
    support: Tensor
    shots: Tensor
    radius: int


def match(
    batch: int = 2, images: int = 4, channels: int = 19, size: tuple[int, int] = (7, 9), shots: int = 2,
    radius: int = 1, last: bool = True, whole: bool = False,
) -> Match:  # fmt: skip
    """``whole``: few and whole numbers, so that many distances are equal and no sum is rounded; some are NaN."""
    query, support = random(batch, channels, *size), random(images, channels, *size, seed=1)
    if whole:
        query, support = query.round(), support.round()
        query[random(*query.shape, seed=2) > 3], support[random(*support.shape, seed=3) > 2.5] = torch.nan, torch.nan
    layout = torch.channels_last if last else torch.contiguous_format
    chosen = torch.randint(images, (batch, shots), generator=torch.Generator().manual_seed(4))
    return Match(query.contiguous(memory_format=layout), support.contiguous(memory_format=layout), chosen, radius)


MATCHES: dict[str, Callable[[], Match]] = {
    "match": match,
    "match: channels first": lambda: match(last=False, radius=2),
    "match: no window": lambda: match(radius=0, shots=3),
    "match: a wide window": lambda: match(1, size=(5, 6), shots=1, radius=3),
    "match: a window beyond the image": lambda: match(1, 2, 5, (2, 3), 1, 8),
    "match: one pixel": lambda: match(1, 2, 40, (1, 1), 1, 1),
    "match: many channels": lambda: match(1, 2, 300, (3, 5)),
    "match: a wide image": lambda: match(1, 2, 8, (3, 67)),
    "match: equal distances": lambda: match(channels=2, whole=True, radius=2),
    "match: equal distances, many channels": lambda: match(channels=40, whole=True),
}


CASES: dict[str, Callable[[], Case]] = {
    "conv": conv,
    "conv: channels first": lambda: conv(last=False),
    "conv: groups": lambda: conv(channels=32, outputs=12, groups=2, offset_groups=4),
    "conv: more groups than offset groups": lambda: conv(
        1, 48, 200, kernel=(1, 1), groups=4, offset_groups=2, offsets_last=True
    ),
    "conv: odd groups": lambda: conv(1, 30, 10, groups=2, offset_groups=3),
    "conv: depthwise": lambda: conv(1, 5, 5, groups=5, offset_groups=1),
    "conv: few channels a group": lambda: conv(1, 42, 56, groups=14, offset_groups=2, offsets_last=True),
    "conv: groups of two channels": lambda: conv(2, 16, 40, groups=8, mask=False, bias=False),
    "conv: groups of eight channels": lambda: conv(1, 16, 16, (3, 5), groups=2, kernel=(1, 1)),
    "conv: stride and dilation": lambda: conv(1, 24, 8, (13, 11), (3, 2), stride=2, dilation=3),
    "conv: neither mask nor bias": lambda: conv(mask=False, bias=False, offsets_last=True),
    "conv: large tiles": lambda: conv(1, 40, 100, (32, 33), (1, 1)),
    "conv: largest tiles": lambda: conv(1, 24, 130, (20, 21), (1, 1)),
    "conv: tall tiles": lambda: conv(1, 40, 24, (32, 33), (1, 2)),
    "conv: many channels": lambda: conv(1, 200, 9, (3, 3)),
    "conv: a split depth": lambda: conv(1, 96, 72, (9, 9), groups=2, offset_groups=3),
    "gather": gather,
    "gather: shared": lambda: gather(shared=True),
    "gather: groups of taps": lambda: gather(shared=True, groups=3),
    "gather: groups of one tap": lambda: gather(channels=40, kernel=1, groups=11),
    "gather: many taps, no mask": lambda: gather(1, 8, 5, mask=False),
    "gather: many channels": lambda: gather(1, 300, 1),
    "attention": attention,
    "attention: as printed": lambda: attention(70, 200, 64, 0.002, 1.0, False),
    "attention: sparse": lambda: attention(70, 150, 300, 0.02, 0.05),
    "attention: zero vectors": lambda: attention(zero=True),
    "attention: long lists": lambda: attention(20, 400, 24, 0.006, 0.1),
    "attention: a row that keeps all": lambda: attention(70, 150, 40, 0.002, 0.05, zero=True),
    "attention: one item": lambda: attention(3, 1, 8),
    "attention: nothing is left": lambda: attention(5, 70, 16, 0.9, 1.0),
    "anomaly": anomaly,
    "anomaly: channels last, one branch": lambda: anomaly(last=True, branches=1),
    "anomaly: sum, no smoothing": lambda: anomaly(fusion="sum", sigma=0.0, last=True, share=0.0),
    "anomaly: many branches, aligned corners": lambda: anomaly(branches=6, align=True),
    "anomaly: to powers": lambda: anomaly(powers=True),
    "anomaly: many branches to powers": lambda: anomaly(branches=6, last=True, powers=True),
    "anomaly: small map": lambda: anomaly((4, 3)),
    "anomaly: wide map": lambda: anomaly((3, 300)),
    "loss: flat": lambda: loss("flat", False),
    "loss: flat, channels last": lambda: loss("flat", True),
    "loss: pixel": lambda: loss("pixel", False),
    "loss: pixel, channels last": lambda: loss("pixel", True),
}


def results(case: Case, name: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """The output and all gradients, on a backend and a device."""
    call, tensors = case
    leaves = [tensor.detach().to(device, dtype).requires_grad_() for tensor in tensors]
    with backend(name):
        output = call(*leaves)
        grad = random(*output.shape, seed=9).to(output) if output.shape else torch.ones_like(output)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def matched(case: Match, name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Distance and displacement, on a backend and a device, of a support of a type."""
    with backend(name):
        query, support, shots = case.query.to(device), case.support.to(device, dtype), case.shots.to(device)
        return local_match(query, support, shots, case.radius)


def window(case: Match) -> Tensor:
    """Return the distances of all offsets, row-major, (offsets, N, k, H, W), in float64; infinite outside the image."""
    query, support, shots, radius = case
    height, width = query.shape[2:]
    side = range(-radius, radius + 1)
    distances = torch.full((len(side) ** 2, *shots.shape, height, width), torch.inf, dtype=torch.float64)
    for index, (dy, dx) in enumerate((dy, dx) for dy in side for dx in side):
        rows, columns = slice(max(0, -dy), max(0, height - dy)), slice(max(0, -dx), max(0, width - dx))
        below, right = slice(max(0, dy), max(0, height + dy)), slice(max(0, dx), max(0, width + dx))
        own, other = query.double()[:, None, :, rows, columns], support.double()[shots][..., below, right]
        distances[index, ..., rows, columns] = (own - other).square().mean(2)
    return distances


def check_match(results: Sequence[Tensor], case: Match, dtype: torch.dtype) -> None:
    """Assert that distances pass :func:`check` and belong to their displacements; integers must equal the reference."""
    case = case._replace(support=case.support.to(dtype))
    plain = matched(case, "reference", dtype)
    distance, displacement = (value.cpu() for value in results)
    if (case.query == case.query.round()).logical_or(case.query.isnan()).all():
        assert torch.equal(displacement, plain[1])
        torch.testing.assert_close(distance, plain[0], equal_nan=True)
        return
    distances = window(case)
    exact, side = distances.amin(0), 2 * case.radius + 1
    check([distance], plain[:1], [exact], ROUNDING[torch.float32])  # what sums are in, whatever the support's type
    at = ((displacement[:, :, 0] + case.radius) * side + displacement[:, :, 1] + case.radius).long()
    own = distances.gather(0, at.unsqueeze(0))[0]
    torch.testing.assert_close(own, exact, rtol=1e-5, atol=1e-5)


def recorded(call: Callable[..., Tensor], tensors: list[Tensor], name: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the package's operators that a call dispatches to on a backend, with their arguments."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            if function.namespace == "bkd_fast":
                calls.append((function, arguments))
            return function(*arguments, **(keywords or {}))

    with backend(name), Recorder():
        call(*tensors)
    return calls


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """Return the call with inputs that ``dtype`` holds exactly, so that only the arithmetic rounds."""
    return case[0], [tensor.to(dtype).float() for tensor in case[1]]


def check(actual: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], rounding: float) -> None:
    """Assert that no result errs more than the rule allows."""
    for index, (own, other, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        assert own.shape == truth.shape
        if not truth.numel():
            continue
        allowed = (3 if index else 2) * (other.double() - truth).abs().max().item()
        allowed += rounding * max(truth.abs().max().item(), 1e-3)
        error = (own.cpu().double() - truth).abs().max().item()
        assert error <= allowed, f"result {index} errs by {error}, allowed are {allowed}"
