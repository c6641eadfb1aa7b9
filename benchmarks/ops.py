"""Every operator against its peers: python benchmarks/ops.py [--quick] [--csv FILE] [--only OP]."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Case, measure, show, write
from peers import deform_conv_peers, torchvision_conv
from torch import Tensor

from bkd_fast.ops import (
    backend,
    cosine_anomaly_map,
    distillation_loss,
    modulated_deform_conv2d,
    modulated_deform_gather,
    project_support,
    sparse_memory_attention,
)

WIDE_RESNET = ((256, 64), (512, 32), (1024, 16))  # channels, height and width of the three levels at 256 x 256
LITE = ((24, 64), (40, 32), (112, 16))
OWN = "bkd_fast native"


def on(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with backend(name):
            return call()

    return run


def with_gradients(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(call().square().sum(), leaves)


def deform_conv(quick: bool) -> Iterator[Case]:
    for levels, label in ((WIDE_RESNET, "WRN50"), (LITE, "Lite0")):
        for batch in (1,) if quick else (1, 16):
            for channels, size in levels:
                last = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
                first = last.contiguous()
                weight = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
                offset, mask = torch.randn(batch, 18, size, size), torch.rand(batch, 9, size, size)
                bias = torch.randn(channels)
                shape = f"{label} N={batch} C={channels} H=W={size}"

                def call(x, offset=offset, weight=weight, bias=bias, mask=mask):
                    return modulated_deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)

                own = {
                    OWN: on("native", lambda x=last: call(x)),
                    "bkd_fast native, NCHW": on("native", lambda x=first: call(x)),
                }
                ceilings = {"conv2d (dense)": lambda x=first, w=weight, b=bias: F.conv2d(x, w, b, padding=1)}
                with torch.no_grad():
                    peers = deform_conv_peers(first, offset, weight, bias, mask)
                    yield Case("modulated_deform_conv2d", shape, "forward", own | peers, ceilings)
                if batch > 1:
                    continue
                leaves = [tensor.requires_grad_() for tensor in (last, offset, weight, bias, mask)]
                own = {
                    OWN: with_gradients(own[OWN], leaves),
                    "torchvision": with_gradients(
                        lambda x=last, o=offset, w=weight, b=bias, m=mask: torchvision_conv(x, o, w, b, m), leaves
                    ),
                }
                yield Case("modulated_deform_conv2d", shape, "forward+backward", own, {}, 1e-3)


def deform_gather(quick: bool) -> Iterator[Case]:
    for channels, size in WIDE_RESNET:
        first = torch.randn(1, channels, size, size)
        x = first.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
        offset, mask = torch.randn(1, 18, size, size), torch.rand(1, 9, size, size)
        with torch.no_grad():
            projected = project_support(x, weight).contiguous(memory_format=torch.channels_last)
            providers = {
                OWN: on("native", lambda p=projected, o=offset, m=mask: modulated_deform_gather(p, o, m)),
                "torchvision": lambda x=first, o=offset, w=weight, m=mask: torchvision_conv(x, o, w, None, m),
            }
            yield Case("modulated_deform_gather", f"WRN50 N=1 C={channels} H=W={size}", "forward", providers, {})


def memory_attention(quick: bool) -> Iterator[Case]:
    for levels, label in ((WIDE_RESNET, "WRN50"), (LITE, "Lite0")):
        for channels, size in levels:
            for items in (200, 2000):
                query, memory = torch.randn(1 if quick else 4, size, size, channels), torch.randn(items, channels)
                shape = f"{label} N={len(query)} C={channels} H=W={size} I={items}"

                def call(query=query, memory=memory):
                    return sparse_memory_attention(query, memory, 0.2 / len(memory))  # most weights stay

                rows = query.view(-1, channels)

                def products(query=rows, memory=memory):
                    return query @ memory.t() @ memory

                def all_products(query=rows, memory=memory):
                    weights = query @ memory.t()
                    back = query @ memory.t()
                    return [weights @ memory, back @ memory, weights.t() @ query, back.t() @ query, query @ memory.t()]

                with torch.no_grad():
                    own = {OWN: on("native", call), "PyTorch reference": on("reference", call)}
                    yield Case("sparse_memory_attention", shape, "forward", own, {"bare GEMMs": products})
                leaves = [query.requires_grad_(), memory.requires_grad_()]
                own = {name: with_gradients(found, leaves) for name, found in own.items()}
                ceilings = {"bare GEMMs": torch.no_grad()(all_products)}
                yield Case("sparse_memory_attention", shape, "forward+backward", own, ceilings, 1e-3)


def levels_of(batch: int, layout: torch.memory_format) -> tuple[list[Tensor], list[Tensor]]:
    made = [
        [torch.randn(batch, channels, size, size).contiguous(memory_format=layout) for channels, size in WIDE_RESNET]
        for _ in range(2)
    ]
    return made[0], made[1]


def anomaly_map(quick: bool) -> Iterator[Case]:
    for batch in (1,) if quick else (1, 16):
        for layout, name in ((torch.channels_last, "channels_last"), (torch.contiguous_format, "NCHW")):
            teacher, student = levels_of(batch, layout)

            def call(teacher=teacher, student=student):
                return cosine_anomaly_map(teacher, student, 256)

            def read(tensors=teacher + student):
                return [tensor.sum() for tensor in tensors]

            copies = [torch.empty_like(tensor) for tensor in teacher + student]

            def copy(tensors=teacher + student, copies=copies):
                return [to.copy_(tensor) for to, tensor in zip(copies, tensors, strict=True)]

            providers = {OWN: on("native", call), "PyTorch reference": on("reference", call)}
            if not quick:
                from bkd_fast.ops.reference import cosine_anomaly_map as plain

                compiled = torch.compile(plain)
                arguments = ((256, 256), "product", 4.0, [1.0] * 3, False, 0.0)
                providers["torch.compile"] = lambda t=teacher, s=student, c=compiled, a=arguments: c(t, s, *a)
            with torch.no_grad():
                yield Case(
                    "cosine_anomaly_map", f"WRN50 N={batch} {name}", "forward", providers,
                    {"read the features": read, "copy the features": copy},
                )  # fmt: skip


def loss(quick: bool) -> Iterator[Case]:
    for direction in ("flat", "pixel"):
        teacher, student = levels_of(1 if quick else 4, torch.channels_last)
        leaves = [level.requires_grad_() for level in student]

        def call(teacher=teacher, student=student, direction=direction):
            return distillation_loss(teacher, student, direction=direction)

        own = {OWN: on("native", call), "PyTorch reference": on("reference", call)}
        providers = {name: with_gradients(found, leaves) for name, found in own.items()}
        yield Case("distillation_loss", f"WRN50 N={len(teacher[0])} {direction}", "forward+backward", providers, {})


OPERATORS = {
    "modulated_deform_conv2d": deform_conv,
    "modulated_deform_gather": deform_gather,
    "sparse_memory_attention": memory_attention,
    "cosine_anomaly_map": anomaly_map,
    "distillation_loss": loss,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one image, short timings")
    parser.add_argument("--csv", type=Path, help="file to write")
    parser.add_argument("--only", choices=tuple(OPERATORS), help="one operator")
    parser.add_argument("--threads", type=int, help="threads (default: torch's)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    ratios: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for name, cases in OPERATORS.items():
        if arguments.only not in (None, name):
            continue
        for case in cases(arguments.quick):
            with torch.set_grad_enabled(case.what != "forward"):
                found = measure(case, 0.5 if arguments.quick else 2.0)
            show(found, OWN)
            rows += found
            own = next(float(row["p50_ms"]) for row in found if row["provider"] == OWN)
            for row in found:
                key = (row["op"], row["shape"].split(" C=")[0], row["pass"], row["provider"])
                ratios[key].append(float(row["p50_ms"]) / own)
    print("\ngeometric means, time relative to " + OWN)
    for key, values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        print(f"  {' | '.join(key):<90} {mean:7.2f} x")
    if arguments.csv:
        write(rows, arguments.csv)


if __name__ == "__main__":
    main()
