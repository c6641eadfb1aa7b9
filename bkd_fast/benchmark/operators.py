"""The operators as cases of the harness: every backend, torchvision, and bounds that need torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from bkd_fast.benchmark.harness import REFERENCE, Call, Case, on_backends, provider
from bkd_fast.config import MemoryConfig
from bkd_fast.ops import (
    cosine_anomaly_map,
    distillation_loss,
    local_match,
    modulated_deform_conv2d,
    modulated_deform_gather,
    project_support,
    sparse_memory_attention,
)
from bkd_fast.ops.deform_conv.cuda import has_wgmma, wgmma

# Channels, height (= width) of the three levels of two teachers at 256 x 256.
TEACHERS = {"WRN50": ((256, 64), (512, 32), (1024, 16)), "Lite0": ((24, 64), (40, 32), (112, 16))}
SIZE = 256
DENSE_CONV = "conv2d (dense)"
TORCHVISION = "torchvision"
WGMMA = ", wgmma"  # behind the name of a provider
BOTH = "forward+backward"
ROUNDINGS = 32  # of a type that results of one computation may differ by
TF32_EPS = 2**-10
BANK, SHOTS = 32, 16  # support images, and those that a query is matched with
QUEUED = 10  # calls timed together on a GPU


class Scope(NamedTuple):
    """How much is measured.

    ``batches``: numbers of images. ``levels``: of each teacher. ``items``: of the memory, where every weight stays and
    where few do. ``layouts``: of the features. ``dtype``: of all tensors.
    """

    batches: tuple[int, ...] = (1, 16)
    levels: tuple[int, ...] = (0, 1, 2)
    items: tuple[tuple[int, ...], tuple[int, ...]] = ((200, 2000), (500, 2000))
    layouts: tuple[str, ...] = ("channels_last", "NCHW")
    dtype: torch.dtype = torch.float32
    tf32: bool = False


FULL = Scope()
QUICK = Scope(batches=(1,))
SHORT = Scope((1,), (1,), ((), (500,)), ("channels_last",))


def deform_conv(scope: Scope, device: str) -> Iterator[Case]:
    """3 x 3 kernels with a mask and random offsets of about a pixel."""
    op = "modulated_deform_conv2d"
    for shape, batch, channels, size in _levels(scope):
        x, offset, mask, weight = _convolution(batch, channels, size, device, scope.dtype)
        nchw, bias = x.contiguous(), torch.randn(channels, device=device, dtype=scope.dtype)
        conv = partial(modulated_deform_conv2d, offset=offset, weight=weight, bias=bias, padding=1, mask=mask)
        own = _bounded(_own(op, device, partial(conv, x)), batch)
        first = next(iter(own))
        in_nchw = _own(op, device, partial(conv, nchw))
        peer = _torchvision(partial(deform_conv2d, nchw, offset, weight, bias, padding=1, mask=mask), scope, device)
        dense: dict[str, Call] = {DENSE_CONV: partial(F.conv2d, nchw, weight, bias, padding=1)}
        inputs = (nchw, offset, weight, bias, mask)
        variant = {f"{first}, NCHW": in_nchw[first]} if "NCHW" in scope.layouts else {}
        calls = own | _on_wgmma(own, x) | variant | peer
        yield Case(op, shape, "forward", calls, dense, inputs=inputs, device=device)
        if not _slow(shape, batch):
            leaves = [x, offset, weight, bias, mask]
            calls = with_gradients(own, leaves) | with_gradients(peer, [nchw, *leaves[1:]])
            dense = with_gradients(dense, [nchw, weight, bias])
            yield Case(op, shape, BOTH, calls, dense, 1e-3, inputs, device)


def deform_gather(scope: Scope, device: str) -> Iterator[Case]:
    """The same for one support that all queries share; gradients of offsets and mask, as with frozen kernels."""
    op = "modulated_deform_gather"
    for shape, batch, channels, size in _levels(scope):
        support, offset, mask, weight = _convolution(batch, channels, size, device, scope.dtype)
        support = support[:1]
        projected = project_support(support, weight).contiguous(memory_format=torch.channels_last)
        each = support.contiguous().repeat(batch, 1, 1, 1)
        own = _own(op, device, partial(modulated_deform_gather, projected, offset, mask))
        own = _bounded(own, batch)
        peer = _torchvision(partial(deform_conv2d, each, offset, weight, padding=1, mask=mask), scope, device)
        inputs = (projected, offset, mask)
        yield Case(op, shape, "forward", own | peer, inputs=inputs, device=device)
        if not _slow(shape, batch):
            calls = with_gradients(own | peer, [offset, mask])
            yield Case(op, shape, BOTH, calls, {}, 1e-3, inputs, device)


def memory_attention(scope: Scope, device: str) -> Iterator[Case]:
    """``dense``: temperature 1 and a threshold that most weights pass. ``sparse``: the default model's settings."""
    op, config = "sparse_memory_attention", MemoryConfig()
    sparse = (config.threshold / config.items, config.temperature, config.renormalize)
    for regime, counts in zip(("dense", "sparse"), scope.items, strict=True):
        for level, batch, channels, size in _levels(scope):
            for items in counts[:1] if batch > 1 else counts:
                if _slow(level, batch):
                    continue
                if regime == "dense":
                    query, memory = torch.randn(batch, size, size, channels), torch.randn(items, channels)
                    settings = (0.2 / items, 1.0, False)
                else:
                    query, memory = _addressed(batch, channels, size, items)
                    settings = sparse
                query, memory = query.to(device, scope.dtype), memory.to(device, scope.dtype)
                own = _own(op, device, partial(sparse_memory_attention, query, memory, *settings))
                # A weight at the threshold is dropped by one provider and kept by another that rounds differently.
                tolerance = 1e-4 if regime == "dense" else 1e-2
                shape, inputs = f"{level} I={items} {regime}", (query, memory)
                bare: dict[str, Call] = {"bare GEMMs": partial(_products, query, memory)}
                yield Case(op, shape, "forward", own, bare, tolerance, inputs, device)
                bare = {"bare GEMMs": partial(_all_products, query, memory)}
                yield Case(op, shape, BOTH, with_gradients(own, inputs), bare, max(tolerance, 1e-3), inputs, device)


def anomaly_map(scope: Scope, device: str) -> Iterator[Case]:
    """Three levels and one branch to a map of 256 x 256."""
    op = "cosine_anomaly_map"
    for shape, teacher, student in _features(scope, device):
        both = (*teacher, *student)
        own = _own(op, device, partial(cosine_anomaly_map, teacher, student, SIZE))
        copies = [torch.empty_like(level) for level in both]
        bounds: dict[str, Call] = {
            "read the features": partial(_read, both),
            "copy the features": partial(_copy, both, copies),
        }
        yield Case(op, shape, "forward", own, bounds, inputs=both, device=device)


def loss(scope: Scope, device: str) -> Iterator[Case]:
    """Value and direction terms, and the gradient with respect to the student."""
    op = "distillation_loss"
    for direction in ("flat", "pixel"):
        for shape, teacher, student in _features(scope, device):
            own = _own(op, device, partial(distillation_loss, teacher, student, direction=direction))
            calls = with_gradients(own, student)
            yield Case(op, f"{shape} {direction}", BOTH, calls, inputs=(*teacher, *student), device=device)


def matching(scope: Scope, device: str) -> Iterator[Case]:
    """Windows of 3 x 3 in 16 images of a bank of features in float16."""
    op = "local_match"
    for shape, batch, channels, size in _levels(scope):
        query = _last(batch, channels, size, device).to(scope.dtype)
        bank = _last(BANK, channels, size, device).half()
        shots = torch.stack([torch.randperm(BANK, device=device)[:SHOTS] for _ in range(batch)])
        # Of two distances that differ by a rounding providers may choose either: displacements are not compared.
        own = on_backends((op,), device, partial(_nearest, query, bank, shots))
        yield Case(
            op, f"{shape} k={SHOTS}", "forward", _bounded(own, batch), inputs=(query, bank, shots), device=device
        )


OPERATORS = {
    "modulated_deform_conv2d": deform_conv,
    "modulated_deform_gather": deform_gather,
    "sparse_memory_attention": memory_attention,
    "cosine_anomaly_map": anomaly_map,
    "distillation_loss": loss,
    "local_match": matching,
}


def cases(scope: Scope, device: str = "cpu", only: Sequence[str] | None = None) -> Iterator[Case]:
    """Yield the cases of all operators, or of those in ``only``, from a fixed seed."""
    torch.manual_seed(0)
    for name, make in OPERATORS.items():
        if only is None or name in only:
            for case in make(scope, device):
                tolerance = max(case.tolerance, ROUNDINGS * (TF32_EPS if scope.tf32 else torch.finfo(scope.dtype).eps))
                dtype = "tf32" if scope.tf32 else str(scope.dtype).removeprefix("torch.")
                yield case._replace(tolerance=tolerance, dtype=dtype, queued=QUEUED)


def with_gradients(calls: Mapping[str, Call], leaves: Sequence[Tensor]) -> dict[str, Call]:
    """Return calls that compute the gradients of each result's sum of squares with respect to ``leaves``."""

    def backward(call: Call) -> Call:
        return lambda: torch.autograd.grad(call().square().sum(), leaves)

    for leaf in leaves:
        leaf.requires_grad_()
    return {name: backward(call) for name, call in calls.items()}


def _own(op: str, device: str, call: Call) -> dict[str, Call]:
    return on_backends((op, f"{op}_backward"), device, call)


def _on_wgmma(own: Mapping[str, Call], x: Tensor) -> dict[str, Call]:
    """Return the call of the CUDA kernels with ``wgmma``, where there is code for it and work for its large tiles."""
    name = provider("native")
    large = x.shape[0] > 1 and x.shape[1] > 128
    if not large or not x.is_cuda or x.dtype == torch.float32 or name not in own or not has_wgmma(x):
        return {}

    def call() -> Any:
        with wgmma(True):
            return own[name]()

    return {f"{name}{WGMMA}": call}


def _torchvision(call: Call, scope: Scope, device: str) -> dict[str, Call]:
    """Return torchvision's call, but for half precision on a CPU, which it does not have."""
    return {TORCHVISION: call} if device != "cpu" or scope.dtype == torch.float32 else {}


def _levels(scope: Scope) -> Iterator[tuple[str, int, int, int]]:
    """Label, images, channels and height."""
    for label, levels in TEACHERS.items():
        for batch in scope.batches:
            for channels, size in (levels[index] for index in scope.levels):
                yield f"{label} N={batch} C={channels} H=W={size}", batch, channels, size


def _slow(shape: str, batch: int) -> bool:
    """Where a call of the slowest provider takes tens of seconds."""
    return shape.startswith("WRN50") and batch > 1


def _bounded(own: dict[str, Call], batch: int) -> dict[str, Call]:
    """Leave out the reference where a call takes many seconds; other peers stay."""
    return own if batch == 1 else {name: call for name, call in own.items() if name != REFERENCE or len(own) == 1}


def _convolution(batch: int, channels: int, size: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Input (channels_last), offset, mask and weight of a 3 x 3 kernel."""
    x = _last(batch, channels, size, device)
    offset, mask = torch.randn(batch, 18, size, size, device=device), torch.rand(batch, 9, size, size, device=device)
    weight = torch.randn(channels, channels, 3, 3, device=device) / (9 * channels) ** 0.5
    return [value.to(dtype) for value in (x, offset, mask, weight)]


def _last(batch: int, channels: int, size: int, device: str) -> Tensor:
    return torch.randn(batch, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)


def _addressed(batch: int, channels: int, size: int, items: int) -> tuple[Tensor, Tensor]:
    """Return queries near random items, both in a low-dimensional subspace, as a CNN's features are.

    With them the default settings keep 6 % of 500 items, as they do of real features (Lite0's, of photographs: 6 to
    11 %), at every number of channels.
    """
    dimensions, mean, noise = 6, 1.2, 0.5
    basis = torch.randn(dimensions, channels) / dimensions**0.5
    normal = mean + torch.randn(items, dimensions)
    chosen = normal[torch.randint(items, (batch, size, size))]
    return (chosen + noise * torch.randn_like(chosen)) @ basis, normal @ basis


def _nearest(query: Tensor, bank: Tensor, shots: Tensor) -> Tensor:
    return local_match(query, bank, shots, 1)[0]


def _products(query: Tensor, memory: Tensor) -> Tensor:
    return query.flatten(0, 2) @ memory.t() @ memory


@torch.no_grad()
def _all_products(query: Tensor, memory: Tensor) -> list[Tensor]:
    """The weights, again in the backward pass, and what is multiplied by them and by their gradients."""
    rows = query.flatten(0, 2)
    weights, back = rows @ memory.t(), rows @ memory.t()
    return [weights @ memory, back @ memory, weights.t() @ rows, back.t() @ rows, rows @ memory.t()]


def _read(levels: Sequence[Tensor]) -> list[Tensor]:
    return [level.sum() for level in levels]


def _copy(levels: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    return [copy.copy_(level) for copy, level in zip(copies, levels, strict=True)]


def _features(scope: Scope, device: str) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Label, and the levels of a teacher and of a student."""
    formats: dict[str, Any] = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
    for label, levels in TEACHERS.items():
        for batch in scope.batches:
            for layout in scope.layouts:
                shapes = [(batch, channels, size, size) for channels, size in levels] * 2
                made = [
                    torch.randn(shape, device=device).to(scope.dtype, memory_format=formats[layout]) for shape in shapes
                ]
                yield f"{label} N={batch} {layout}", made[: len(levels)], made[len(levels) :]
