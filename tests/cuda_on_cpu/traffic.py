"""What the CUDA kernels move, counted by the emulation, and what follows for two GPUs: "On paper" in docs/kernels.md.

``python tests/cuda_on_cpu/traffic.py`` prints the tables in a minute. Counted on small pieces of WideResNet50's levels
in float16: what a multiprocessor has to do is that of its blocks, whatever the number of images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import building
import torch
from torch import Tensor

from bkd_fast.ops import backend, cosine_anomaly_map, modulated_deform_conv2d, modulated_deform_gather, native
from bkd_fast.ops import sparse_memory_attention as attention
from bkd_fast.ops.native import cuda
from bkd_fast.ops.native.cuda import layout


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
        sum(site["least"] for site in memories["shared"]),
    )


def half(*shape: int) -> Tensor:
    """Random numbers, channels-last where they are an image."""
    values = torch.randn(shape).half()
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def conv(channels: int, size: tuple[int, int]) -> tuple[Callable[[], Tensor], int, int]:
    """A call, its multiplications, and the bytes of its tensors."""
    tensors = [half(1, channels, *size), half(1, 18, *size), half(channels, channels, 3, 3), half(1, 9, *size)]
    input, offset, weight, mask = tensors
    tensors_bytes = 2 * (sum(tensor.numel() for tensor in tensors) + input.numel())
    return (
        lambda: modulated_deform_conv2d(input, offset, weight, None, padding=1, mask=mask),
        size[0] * size[1] * 9 * channels * channels,
        tensors_bytes,
    )


def gradients(channels: int, size: tuple[int, int], needs: list[bool]) -> Callable[[], object]:
    """Gradients of a convolution by input, offset, weight, bias and mask, where ``needs`` says so."""
    input, offset, weight = half(1, channels, *size), half(1, 18, *size), half(channels, channels, 3, 3)
    grad, mask, one = half(1, channels, *size), half(1, 9, *size), [1, 1]
    return lambda: cuda.modulated_deform_conv2d_backward(grad, input, offset, weight, mask, one, one, one, needs)


def main() -> None:
    """Prints the two tables."""
    torch.ops.load_library(str(building.build(building.ROOT / "build" / "cuda_on_cpu_800")))
    native.DEVICES["cpu"] = cuda
    layout.NAMESPACE = "bkd_fast_cuda_on_cpu"
    torch.manual_seed(0)
    forward, products, _ = conv(256, (16, 32))
    small, _, _ = conv(256, (8, 8))
    projected, offset, mask = half(1, 9 * 256, 16, 16), half(1, 18, 16, 16), half(1, 9, 16, 16)
    query, memory = half(256, 256), half(500, 256)
    levels = [half(1, 256, 32, 32), half(1, 512, 16, 16)]
    students = [half(*level.shape) for level in levels]
    calls = {
        "deform_conv, tiles of 128 x 128": forward,
        "deform_conv, tiles of 64 x 64": small,
        "deform_conv_backward": gradients(256, (8, 16), [True, True, False, False, True]),
        "deform_conv_weight": gradients(128, (16, 16), [False, False, True, False, False]),
        "deform_gather": lambda: modulated_deform_gather(projected, offset, mask),
        "memory_attention, dense": lambda: attention(query, memory, 0.0, 1.0),
        "memory_attention, sparse": lambda: attention(query, memory, 0.02, 0.02),
        "cosine_anomaly_map": lambda: cosine_anomaly_map(levels, students, 64),
    }
    print(
        "| kernel | MB asked of global memory | moved in sectors / asked | passes of shared memory / fewest possible |"
    )
    print("|---|---|---|---|")
    counts = {}
    with backend("native"), torch.no_grad():
        for name, call in calls.items():
            found = counts[name] = count(call)
            share = f"{found.passes / found.least:.2f}" if found.least else "–"
            print(f"| {name} | {found.asked / 1e6:.2f} | {found.sectors * 32 / found.asked:.2f} | {share} |")

    own = counts["deform_conv, tiles of 128 x 128"]
    print("\n| level | images | GPU | GFLOP | products, µs | memory, µs | loads of tiles, µs | expected / floor |")
    print("|---|---|---|---|---|---|---|---|")
    for channels, size in ((256, 64), (512, 32), (1024, 16)):
        for images in (1, 16):
            work = images * size * size * 9 * channels * channels
            _, _, image_bytes = conv(channels, (size, size))
            weights = 2 * 9 * channels * channels
            moved = images * (image_bytes - weights) + weights
            for gpu in GPUS:
                rate = gpu.processors * gpu.gigahertz * 1e9
                by_products = work / (gpu.multiplications * rate) * 1e6
                by_memory = moved / gpu.gigabytes / 1e3
                # Cycles for each multiplication do not depend on the level: a tile is a tile.
                by_loads = own.cycles / products * work / rate * 1e6
                floor = max(by_products, by_memory)
                expected = max(by_products, by_loads, by_memory)
                print(
                    f"| {channels} x {size}² | {images} | {gpu.name} | {2 * work / 1e9:.1f} | {by_products:.1f} | "
                    f"{by_memory:.1f} | {by_loads:.1f} | {expected / floor:.1f} |"
                )


if __name__ == "__main__":
    main()
