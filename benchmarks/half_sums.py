"""How much sums in float16 err, and how many instructions they take: python benchmarks/half_sums.py [--rows 4096].

AVX512-FP16 multiplies 32 numbers an instruction and sums in float16. Runs of its products can be added in float32: with
each run of a vector come two conversions, a shuffle and two additions. Otherwise 32 products are two float32 FMAs, on
numbers that were converted once. Errors are root mean squares against float64, of normal numbers over the depths of
WideResNet50's levels, as multiples of PyTorch's error, which sums in float32 and rounds once. Prints a Markdown table.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

DEPTHS = (9 * 256, 9 * 512, 9 * 1024)
RUNS = (1, 2, 4, 8, 16, None)  # products in float16, then added in float32; None: the whole depth


def half_sum(a: Tensor, b: Tensor, run: int) -> Tensor:
    """Return the sums of rows of products as AVX512-FP16 computes them, rounded to float16."""
    pieces_a, pieces_b = (x.double().view(len(x), -1, run) for x in (a, b))
    total = torch.zeros(pieces_a.shape[:2], dtype=torch.half)
    for k in range(run):
        total = (total.double() + pieces_a[..., k] * pieces_b[..., k]).half()  # one rounding, as an FMA has
    return total.float().sum(1).half()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="sums of each depth")
    rows = parser.parse_args().rows
    torch.manual_seed(0)
    print("| products in float16 | instructions, of float32's | " + " | ".join(f"depth {k}" for k in DEPTHS) + " |")
    print("|---" * (2 + len(DEPTHS)) + "|")
    factors = [(torch.randn(rows, k).half(), (torch.randn(rows, k) / k**0.5).half()) for k in DEPTHS]
    for run in RUNS:
        cells = []
        for a, b in factors:
            exact = (a.double() * b.double()).sum(1)
            plain = (a.float() * b.float()).sum(1).half()
            errors = [(x.double() - exact).square().mean().sqrt() for x in (half_sum(a, b, run or a.shape[1]), plain)]
            cells.append(f"{(errors[0] / errors[1]).item():.2g}")
        cost = f"{(run + 5) / (2 * run):.2f}" if run else "0.50"
        print(f"| {run or 'all'} | {cost} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
