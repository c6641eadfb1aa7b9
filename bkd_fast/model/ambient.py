"""Independence of torch's ambient state: what a program around a model may have set for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def settled(*, gradients: bool = False, inference: bool = False, build: bool = False) -> Iterator[None]:
    """Run a block, or a function as a decorator, as if nothing around it had changed torch's modes.

    Autocast is off and new tensors are on the CPU unless the code says where. All of it belongs to the calling thread,
    but for ``build``. TF32 and deterministic switches, the number of threads and the random state stay the caller's.

    Args:
        gradients: record them, as training does.
        inference: use inference mode, whose tensors take no part in gradients later.
        build: use float32 as the default type, which is the whole process's: for loading and training.
    """
    default = torch.get_default_dtype()
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(inference))
        modes.enter_context(torch.set_grad_enabled(gradients and not inference))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        if build and default != torch.float32:
            torch.set_default_dtype(torch.float32)
            modes.callback(torch.set_default_dtype, default)
        yield
