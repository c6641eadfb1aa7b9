"""What the CUDA kernels move, counted by the emulation, and what follows for two GPUs: "On paper" in docs/speed.md.

``python -m tools.cuda_on_cpu.traffic`` prints the tables in a minute. Counted on small pieces of WideResNet50's levels
in float16: what a multiprocessor has to do is that of its blocks, whatever the number of images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops import (
    backend,
    cosine_anomaly_map,
    cuda_common,
    modulated_deform_conv2d,
    modulated_deform_gather,
    native,
)
from bkd_fast.ops import sparse_memory_attention as attention
from bkd_fast.ops.deform_conv import Arguments, cuda
from tools.cuda_on_cpu import building


class Gpu(NamedTuple):
    """Data-sheet figures; multiplications a cycle of one multiprocessor in float16 with float32 sums."""

    name: str
    processors: int
    gigahertz: float
    multiplications: float
    gigabytes: float  # of memory, a second


# GeForce RTX 4070 Ti: 80 TFLOP/s. H100 SXM: 989 TFLOP/s, of which mma.sync reaches about 0.6 (Luo et al.,
# arXiv:2501.12084).
GPUS = (Gpu("RTX 4070 Ti", 60, 2.61, 256, 504), Gpu("H100", 132, 1.755, 0.6 * 2135, 3350))


ITEMS = 500  # of the memory


class Count(NamedTuple):
    """Of one call: bytes asked of global memory, in sectors, passes through shared memory, and as few as possible."""

    asked: int
    sectors: int
    passes: int
    least: int

    @property
    def cycles(self) -> float:
        """Of the path that serves both memories: 128 bytes each."""
        return self.passes + self.sectors / 4


def launches() -> dict[str, tuple[int, int, int]]:
    """Return threads, bytes of dynamic shared memory and blocks of the last launch of each kernel."""
    # A kernel's name may have spaces.
    lines = (line.rsplit(maxsplit=3) for line in torch.ops.cuda_on_cpu.launches().splitlines())
    return {name: (int(threads), int(shared), int(blocks)) for name, threads, shared, blocks in lines}


def count(call: Callable[[], object]) -> Count:
    """Counts a call."""
    torch.ops.cuda_on_cpu.count_traffic(True)
    call()
    sites = json.loads(torch.ops.cuda_on_cpu.traffic())
    torch.ops.cuda_on_cpu.count_traffic(False)
    memories = {memory: [site for site in sites if site["memory"] == memory] for memory in ("global", "shared")}
    return Count(
        sum(site["bytes"] for site in memories["global"]),
        sum(site["units"] for site in memories["global"]),
        sum(site["units"] for site in memories["shared"]),
        sum(site["min"] for site in memories["shared"]),
    )


def half(*shape: int) -> Tensor:
    """Random numbers, channels-last where they are an image."""
    values = torch.randn(shape).half()
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def conv(channels: int, size: tuple[int, int], groups: int = 1) -> Callable[[], Tensor]:
    """A convolution of 3 x 3 with a mask."""
    input, offset, mask = half(1, channels, *size), half(1, 18, *size), half(1, 9, *size)
    weight = half(channels, channels // groups, 3, 3)
    return lambda: modulated_deform_conv2d(input, offset, weight, None, padding=1, mask=mask)


def gradients(channels: int, size: tuple[int, int], needs: list[bool], groups: int = 1) -> Callable[[], object]:
    """Gradients of a convolution by input, offset, weight, bias and mask, where ``needs`` says so."""
    input, offset, weight = half(1, channels, *size), half(1, 18, *size), half(channels, channels // groups, 3, 3)
    grad, mask, one = half(1, channels, *size), half(1, 9, *size), [1, 1]
    arguments = Arguments(input, offset, weight, None, one, one, one, mask)
    return lambda: cuda.modulated_deform_conv2d_backward(grad, arguments, needs)


class Work(NamedTuple):
    """What a call has to do for so many pixels of so many channels, and what the kernel does."""

    multiplications: float  # that the operator needs
    executed: float  # that the kernel executes
    megabytes: float  # of its tensors, each moved once
    unit: float  # in which the counted cycles grow


def work(kernel: str, pixels: int, channels: int) -> Work:
    """By the formulas of each kernel, in float16; gradients by input, offset, mask and weights are float32."""
    image, moves, weights = pixels * channels, 27 * pixels, 9 * channels * channels
    product = 9.0 * pixels * channels * channels
    if kernel == "deform_conv":
        return Work(product, product, 2 * (2 * image + moves + weights) / 1e6, product)
    if kernel == "deform_conv_backward":
        return Work(product, product, (8 * image + 6 * moves + 2 * weights) / 1e6, product)
    if kernel == "deform_conv_weight":
        return Work(product, product, (4 * image + 2 * moves + 4 * weights) / 1e6, product)
    if kernel == "deform_gather":
        return Work(0, 0, 2 * (10 * image + moves) / 1e6, image)
    if kernel == "memory_attention":
        both = 2.0 * image * ITEMS  # PyTorch's product of queries and items, and that of weights and items
        return Work(both, both, 2 * (2 * image + ITEMS * channels) / 1e6, both)
    return Work(0, 0, 6 * image / 1e6, image)  # the distances of two branches


def main() -> None:
    """Prints the two tables."""
    torch.ops.load_library(str(building.build(building.ROOT / "build" / "cuda_on_cpu_800")))
    native.DEVICES["cpu"] = native.CUDA
    cuda_common.NAMESPACE = "bkd_fast_cuda_on_cpu"
    torch.manual_seed(0)
    projected, offset, mask = half(1, 9 * 256, 16, 16), half(1, 18, 16, 16), half(1, 9, 16, 16)
    query, memory = half(256, 256), half(ITEMS, 256)
    levels = [half(1, 256, 32, 32) for _ in range(3)]
    # A call, and its pixels and channels.
    calls: dict[str, tuple[Callable[[], object], int, int]] = {
        "deform_conv": (conv(256, (16, 32)), 512, 256),
        "deform_conv, small tiles": (conv(256, (8, 8)), 64, 256),
        "deform_conv_backward": (gradients(256, (8, 16), [True, True, False, False, True]), 128, 256),
        "deform_conv_weight": (gradients(256, (8, 16), [False, False, True, False, False]), 128, 256),
        "deform_gather": (lambda: modulated_deform_gather(projected, offset, mask), 256, 256),
        "memory_attention": (lambda: attention(query, memory, 0.0, 1.0), 256, 256),
        "memory_attention, sparse": (lambda: attention(query, memory, 0.02, 0.02), 256, 256),
        "cosine_anomaly_map": (lambda: cosine_anomaly_map(levels[:1], levels[1:], 64), 1024, 256),
    }
    print("| kernel | MB asked of global memory | in sectors / asked | passes of shared memory / fewest possible |")
    print("|---|---|---|---|")
    cycles = {}
    with backend("native"), torch.no_grad():
        for name, (call, pixels, channels) in calls.items():
            found = count(call)
            share = f"{found.passes / found.least:.2f}" if found.least else "–"
            print(f"| {name} | {found.asked / 1e6:.2f} | {found.sectors * 32 / found.asked:.2f} | {share} |")
            cycles[name] = found.cycles / work(name, pixels, channels).unit

    print(
        "\n| kernel | level | images | GFLOP | MB | "
        + " | ".join(f"{gpu.name}: floor, expected" for gpu in GPUS)
        + " |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in (name for name in calls if "," not in name):
        for channels, size in ((256, 64), (512, 32), (1024, 16)):
            for images in (1, 16):
                need = work(name, images * size * size, channels)
                cells = []
                for gpu in GPUS:
                    rate = gpu.processors * gpu.gigahertz * 1e3  # cycles in a microsecond, of all multiprocessors
                    by_memory = need.megabytes / gpu.gigabytes * 1e3
                    floor = max(need.multiplications / gpu.multiplications / rate, by_memory)
                    by_products = need.executed / gpu.multiplications / rate
                    expected = max(by_products, by_memory, cycles[name] * need.unit / rate)
                    cells.append(f"{floor:.1f} µs, × {expected / floor:.1f}")
                flops = f"{2 * need.multiplications / 1e9:.1f}" if need.multiplications else "–"
                level = f"{channels} × {size}²"
                print(f"| {name} | {level} | {images} | {flops} | {need.megabytes:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
