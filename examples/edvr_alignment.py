"""A model that was written for torchvision's deformable convolution, on bkd_fast's kernels.

The model is the alignment module of EDVR (Wang et al., CVPRW 2019): a neighbouring frame's features are warped onto the
reference frame's by deformable convolutions at three levels, offsets passed from coarse to fine, and a last one that
refines. Nothing in it knows of bkd_fast. Run: python examples/edvr_alignment.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

import bkd_fast


class Offsets(nn.Module):
    """Predicts offsets and masks from features, and convolves another tensor with them."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.taps = 9 * groups
        self.predict = nn.Conv2d(channels, 3 * self.taps, 3, padding=1)
        self.convolve = DeformConv2d(channels, channels, 3, padding=1)

    def forward(self, input: Tensor, guide: Tensor) -> Tensor:
        offset, mask = self.predict(guide).split((2 * self.taps, self.taps), dim=1)
        return self.convolve(input, offset, mask.sigmoid())


class Alignment(nn.Module):
    """Pyramid, cascading and deformable alignment of a neighbour's features with the reference's."""

    def __init__(self, channels: int = 64, groups: int = 8, levels: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(levels - 1))
        self.fuse = nn.ModuleList(nn.Conv2d(2 * channels, channels, 3, padding=1) for _ in range(levels))
        self.merge_guides = nn.ModuleList(nn.Conv2d(2 * channels, channels, 3, padding=1) for _ in range(levels - 1))
        self.merge_aligned = nn.ModuleList(nn.Conv2d(2 * channels, channels, 3, padding=1) for _ in range(levels - 1))
        self.align = nn.ModuleList(Offsets(channels, groups) for _ in range(levels))
        self.fuse_last = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.refine = Offsets(channels, groups)

    def forward(self, neighbour: Tensor, reference: Tensor) -> Tensor:
        """Two (N, C, H, W), sides that 4 divides -> the neighbour aligned, (N, C, H, W)."""
        pyramid = [(neighbour, reference)]
        for down in self.down:
            pyramid.append(tuple(F.leaky_relu(down(features), 0.1) for features in pyramid[-1]))
        guide = aligned = None
        for level in reversed(range(len(pyramid))):
            moving, fixed = pyramid[level]
            fused = F.leaky_relu(self.fuse[level](torch.cat([moving, fixed], 1)), 0.1)
            if guide is not None:
                # A pixel of the coarser level is two of this one.
                coarser = 2 * F.interpolate(guide, scale_factor=2, mode="bilinear", align_corners=False)
                fused = F.leaky_relu(self.merge_guides[level](torch.cat([fused, coarser], 1)), 0.1)
            here = self.align[level](moving, fused)
            if aligned is not None:
                coarser = F.interpolate(aligned, scale_factor=2, mode="bilinear", align_corners=False)
                here = self.merge_aligned[level](torch.cat([here, coarser], 1))
            guide, aligned = fused, F.leaky_relu(here, 0.1) if level else here
        return F.leaky_relu(self.refine(aligned, self.fuse_last(torch.cat([aligned, reference], 1))), 0.1)


def seconds(call: Callable[[], object], repetitions: int) -> float:
    """The least of several times: what is not the call's own only adds to it."""
    call()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="height and width (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Alignment()
    neighbour, reference = torch.rand(2, 1, 64, arguments.size, arguments.size).unbind()

    def infer() -> Tensor:
        with torch.inference_mode():
            return model(neighbour, reference)

    def train() -> Tensor:
        model.zero_grad()
        model(neighbour, reference).square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    for name, call in (("inference", infer), ("forward and backward", train)):
        expected, before = call(), seconds(call, arguments.repetitions)
        with bkd_fast.patch_torchvision():
            found, after = call(), seconds(call, arguments.repetitions)
        difference = float((found - expected).norm() / expected.norm())
        print(
            f"{name}: torchvision {1e3 * before:.0f} ms, bkd_fast {1e3 * after:.0f} ms ({before / after:.1f} times as "
            f"fast), relative difference {difference:.1g}"
        )
        if not difference < 1e-4:
            raise SystemExit("the outputs differ")


if __name__ == "__main__":
    main()
