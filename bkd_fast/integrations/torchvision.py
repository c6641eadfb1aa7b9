"""Run torchvision's deformable convolution on bkd_fast's kernels: an explicit patch that can be undone."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from bkd_fast.ops import modulated_deform_conv2d

_lock = threading.Lock()
_active: TorchvisionPatch | None = None


class TorchvisionPatch:
    """Returned by :func:`patch_torchvision`: ``undo()``, or the end of a ``with`` block, reverts the patch."""

    def __init__(self) -> None:
        # Patch the dispatcher: it reaches every caller, however torchvision was imported. The autograd keys bring
        # bkd_fast's gradients; inference mode calls the others.
        self._library: torch.library.Library | None = torch.library.Library("torchvision", "IMPL")
        for key in ("AutogradCPU", "CPU", "AutogradCUDA", "CUDA"):
            self._library.impl("deform_conv2d", _deform_conv2d, key, allow_override=True)

    def undo(self) -> None:
        """Restore torchvision's kernels; a second call does nothing."""
        global _active
        with _lock:
            if self._library is not None:
                self._library._destroy()
                self._library = None
                _active = None

    def __enter__(self) -> TorchvisionPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_torchvision() -> TorchvisionPatch:
    """Run torchvision's ``deform_conv2d`` and ``DeformConv2d`` on :mod:`bkd_fast.ops`, with gradients.

    This affects every call in the process, also by libraries that imported the function before, and nothing else of
    torchvision.

    Returns:
        The patch: call ``undo()`` on it, or use ``with patch_torchvision(): …``.

    Raises:
        RuntimeError: torchvision is patched already.
    """
    global _active
    import torchvision  # noqa: F401 (registers the operator)

    with _lock:
        if _active is not None:
            raise RuntimeError("torchvision is switched to bkd_fast already: undo() that switch first")
        _active = TorchvisionPatch()
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
    """Implement torchvision's operator; groups follow from the shapes."""
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
