"""Deformable convolution as a module: the parameters and state dict of torchvision's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bkd_fast.ops.checks import pair


class DeformConv2d(nn.Module):
    """Modulated deformable convolution with learned weights, in place of ``torchvision.ops.DeformConv2d``.

    Arguments, initialisation, state dict and ``forward`` are torchvision's, so that a model changes its import and
    loads its checkpoints; ``torch.jit.script`` compiles it too. See :func:`bkd_fast.ops.modulated_deform_conv2d`.

    Args:
        in_channels, out_channels: C and O.
        kernel_size, stride, padding, dilation: an integer or a (vertical, horizontal) pair.
        groups: of the convolution; divides C and O.
        bias: whether there is one.

    Raises:
        ValueError: groups that do not divide the channels, or a size below one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"DeformConv2d: {in_channels} input and {out_channels} output channels in {groups} groups; expected "
                "at least one of each, and groups to divide both"
            )
        name = "DeformConv2d"
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = tuple(pair(name, "kernel_size", kernel_size, min=1))
        self.stride = tuple(pair(name, "stride", stride, min=1))
        self.padding = tuple(pair(name, "padding", padding, min=0))
        self.dilation = tuple(pair(name, "dilation", dilation, min=1))
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, as ``torch.nn.Conv2d`` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (N, O, Ho, Wo).

        Args:
            input: (N, C, H, W).
            offset: (N, 2 G kh kw, Ho, Wo).
            mask: (N, G kh kw, Ho, Wo) or None.
        """
        # The registered operator checks its arguments too, and TorchScript can call it.
        return torch.ops.bkd_fast.modulated_deform_conv2d(
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )

    def extra_repr(self) -> str:
        """Return the settings that ``print`` shows."""
        shown = {name: getattr(self, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
        settings = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"{self.in_channels}, {self.out_channels}, {settings}, bias={self.bias is not None}"
