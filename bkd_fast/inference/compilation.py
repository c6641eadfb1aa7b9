"""The network of a detector through torch.compile, on GPUs also as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor  # which timm has imported already
from torch import Tensor

from bkd_fast.errors import BKDError
from bkd_fast.model.bkd import BKD
from bkd_fast.model.support import Support

# PyTorch's names. reduce-overhead records CUDA graphs; max-autotune tries kernels, and on GPUs records them too.
MODES = ("default", "reduce-overhead", "max-autotune")


def check_mode(mode: str, device: torch.device) -> None:
    """Raise a BKDError for a mode that is unknown, or that the device does not have."""
    if not isinstance(mode, str) or mode not in MODES:
        raise BKDError(f"compile is {mode!r}: expected None or one of {', '.join(MODES)}")
    if mode == "reduce-overhead" and device.type != "cuda":
        raise BKDError(f"compile='reduce-overhead' is for CUDA, and the device is {device.type}: choose 'default'")


class CompiledModel:
    """:meth:`BKD.predict` of a frozen model, compiled when it is first called with images of a number.

    Args:
        mode: of MODES.
    """

    def __init__(self, model: BKD, mode: str) -> None:
        # Frozen: weights are constants, which are laid out and folded once. The support stays an argument, so
        # that another one needs no compilation.
        options: dict[str, Any] = {**torch._inductor.list_mode_options(mode), "freezing": True}
        self.graphs = bool(options.get("triton.cudagraphs"))
        self.function = torch.compile(model.predict, options=options)

    def __call__(self, images: Tensor, support: Support) -> tuple[Tensor, Tensor]:
        """Return scores (N,) and maps (N, H, W)."""
        # torch.compile freezes where no gradients are recorded, and does not take tensors of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if not self.graphs:
                return self.function(images, support)
            torch.compiler.cudagraph_mark_step_begin()
            scores, maps = self.function(images, support)
            return scores.clone(), maps.clone()  # the next call writes over a graph's results
