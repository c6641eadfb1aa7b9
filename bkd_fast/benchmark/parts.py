"""The parts of the model, each run inside a context: ranges for a profiler, or counts of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from bkd_fast.model import BKD
from bkd_fast.model.support import SupportBank

PARTS = ("teacher network", "normalization", "views", "retrieval", "alignment", "memory", "student", "map", "score")
# Part -> attributes of the model that run it. A call inside another part counts for the inner one.
CALLS = {
    "teacher network": ("teacher.network.forward",),
    "normalization": ("teacher.forward",),  # of the image and of the levels, and their pooling
    "views": ("views",),
    "alignment": ("alignment.prepare", "alignment.forward"),
    "memory": ("_rebuild",),
    "student": ("bottleneck.forward", "student.forward"),
    "map": ("anomaly_map",),
    "score": ("image_score",),
}


@contextmanager
def in_parts(model: BKD, enter: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Run every part of ``model`` inside ``enter(part)``; see PARTS.

    The model is patched for the length of the ``with`` block; outside it nothing is added to a call.
    """
    with ExitStack() as stack:
        for part, paths in CALLS.items():
            for path in paths:
                owner, _, name = path.rpartition(".")
                holder: Any = model
                for attribute in owner.split(".") if owner else ():
                    holder = getattr(holder, attribute, None)
                if holder is not None:
                    stack.enter_context(patch.object(holder, name, _inside(getattr(holder, name), part, enter)))
        retrieve = _inside(SupportBank.for_query, "retrieval", enter)
        stack.enter_context(patch.object(SupportBank, "for_query", retrieve))
        yield


def nvtx_ranges(model: BKD) -> AbstractContextManager[None]:
    """Mark every part of ``model`` as an NVTX range, for Nsight Systems. CUDA graphs replay without ranges."""
    return in_parts(model, torch.cuda.nvtx.range)


def _inside(call: Callable[..., Any], part: str, enter: Callable[[str], AbstractContextManager[Any]]) -> Any:
    def run(*arguments: Any, **options: Any) -> Any:
        with enter(part):
            return call(*arguments, **options)

    return run
