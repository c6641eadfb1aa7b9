"""Problems for ``bias_activation``, and what holds on every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bkd_fast.ops import backend
from bkd_fast.ops.bias_activation import Arguments, bias_activation
from bkd_fast.ops.bias_activation.reference import bias_activation as specified

# (N, C, H, W)
SHAPES = {
    "whole chunks": (2, 32, 6, 5),
    "odd channels": (3, 7, 5, 3),
    "one channel": (2, 1, 9, 4),
    "one pixel": (5, 24, 1, 1),
    "one number": (1, 1, 1, 1),
    "more than a block": (1, 40, 33, 21),
    "no images": (0, 8, 4, 4),
    "no pixels": (2, 8, 0, 4),
    "no channels": (2, 0, 3, 3),
}
LIMITS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "none": (-math.inf, math.inf), "both": (-0.5, 0.25)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def problem(shape: str, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, bias and residual."""
    generator = torch.Generator().manual_seed(0)
    size = SHAPES[shape]
    x, residual = (
        (4 * torch.randn(size, generator=generator)).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    return x, torch.randn(size[1], generator=generator).to(dtype), residual


def check(shape: str, layout: str, chosen: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Assert that a backend gives the reference's results to the last bit, with and without a residual."""
    x, bias, residual = problem(shape, layout, dtype)
    for low, high in LIMITS.values():
        for added in (residual, None):
            arguments = [None if tensor is None else tensor.to(device) for tensor in (x, bias, added)]
            with backend(chosen):
                result = bias_activation(*arguments, low, high).cpu()
            assert result.dtype == dtype
            assert not x.numel() or result.is_contiguous(memory_format=LAYOUTS[layout])
            assert torch.equal(result, specified(Arguments(x, bias, added, low, high)))


def check_not_a_number(chosen: str, device: str = "cpu") -> None:
    """Assert that NaN stays, alone, and that infinities are limited."""
    for layout in LAYOUTS:
        x, bias, residual = problem("odd channels", layout, torch.float32)
        x[0, 1, 2, 1] = residual[2, 6, 4, 2] = math.nan
        x[1, 0, 0, 0] = math.inf
        with backend(chosen):
            result = bias_activation(x.to(device), bias.to(device), residual.to(device), 0.0, 6.0).cpu()
        assert result.isnan().nonzero().tolist() == [[0, 1, 2, 1], [2, 6, 4, 2]]
        assert result[1, 0, 0, 0] == 6


def check_views(chosen: str, device: str = "cpu") -> None:
    """Assert that slices, tensors that start anywhere and other strides give what copies give."""
    generator = torch.Generator().manual_seed(0)
    for channels in (16, 5):
        large = torch.randn(2, channels, 9, 8, generator=generator).to(device)
        bias = torch.randn(channels + 1, generator=generator).to(device)[1:]
        for layout in LAYOUTS.values():
            own = large.contiguous(memory_format=layout)
            for view in (own[:, :, 1:, 1:], own[:, :, 2:7, :5], own[1:], own[:, 1:, ::2], own.transpose(2, 3)):
                added, few = view.flip(0), bias[: view.shape[1]]
                with backend(chosen):
                    result = bias_activation(view, few, added, 0.0, 6.0)
                    copied = bias_activation(view.clone(), few.clone(), added.clone(), 0.0, 6.0)
                assert torch.equal(result, copied)
                expected = specified(Arguments(view, few, added, 0.0, 6.0))
                assert torch.equal(result, expected)
        sliced = large.contiguous(memory_format=torch.channels_last)[:, :, 1:, 1:]
        with backend(chosen):
            assert bias_activation(sliced, bias).is_contiguous(memory_format=torch.channels_last)
