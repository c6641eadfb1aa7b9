"""torchvision's deformable convolution, computed by bkd_fast's kernels: an explicit switch that can be turned back."""

from __future__ import annotations

import threading
from types import TracebackType

import torch
from torch import Tensor

from bkd_fast.ops import modulated_deform_conv2d

_lock = threading.Lock()
_active: Switch | None = None


class Switch:
    """What :func:`patch_torchvision` returns: ``undo()`` turns it back, and so does the end of a ``with`` block."""

    def __init__(self) -> None:
        # At the dispatcher, so that every caller is reached, however it imported torchvision's function or module. The
        # autograd keys bring bkd_fast's gradients; the others are what inference mode calls.
        self._library: torch.library.Library | None = torch.library.Library("torchvision", "IMPL")
        for key in ("AutogradCPU", "CPU", "AutogradCUDA", "CUDA"):
            self._library.impl("deform_conv2d", _deform_conv2d, key, allow_override=True)

    def undo(self) -> None:
        """torchvision's own kernels again; a second call does nothing."""
        global _active
        with _lock:
            if self._library is not None:
                self._library._destroy()
                self._library = None
                _active = None

    def __enter__(self) -> Switch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch_torchvision() -> Switch:
    """From now on torchvision's ``deform_conv2d`` and ``DeformConv2d`` run on :mod:`bkd_fast.ops`, with gradients.

    Every call in the process is meant, also from libraries that imported the function before. Nothing else of
    torchvision changes.

    Returns:
        The switch: ``switch.undo()`` turns it back, or use ``with patch_torchvision(): …``.

    Raises:
        RuntimeError: it is switched already.
    """
    global _active
    import torchvision  # noqa: F401 (registers the operator)

    with _lock:
        if _active is not None:
            raise RuntimeError("torchvision is switched to bkd_fast already: undo() that switch first")
        _active = Switch()
        return _active


def _deform_conv2d(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Tensor:
    """torchvision's operator, argument by argument; groups are read off the shapes."""
    return modulated_deform_conv2d(
        input,
        offset,
        weight,
        bias,
        (stride_h, stride_w),
        (pad_h, pad_w),
        (dilation_h, dilation_w),
        mask if use_mask else None,
    )
