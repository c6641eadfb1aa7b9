"""The network of a detector as CUDA graphs.

A graph launches a few hundred kernels at once. One by one, a CPU would launch them more slowly than a GPU runs them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bkd_fast.model.bkd import BKD, First, Second
from bkd_fast.model.support import Support
from bkd_fast.ops.backend import implementation


class Recorded(NamedTuple):
    """A graph, the images that it reads, and the results that it writes."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    scores: Tensor
    maps: Tensor


class Forked:
    """Run two functions on two streams: the second one beside the current stream, which waits for it in the end.

    Kernels of a captured graph are then ordered within each stream alone. The caller holds what both functions read
    until they have returned.

    Args:
        stream: for the second function.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def __call__(self, first: Callable[[], First], second: Callable[[], Second], /) -> tuple[First, Second]:
        """Return both results, for use on the current stream."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            beside = second()
        result = first()
        current.wait_stream(self.stream)
        tree_map_only(Tensor, lambda tensor: tensor.record_stream(current), beside)
        return result, beside


class GraphedModel:
    """:meth:`BKD.predict` of a frozen model, recorded when it is first called with images of a number.

    Any thread may call it, on any stream.

    Args:
        model: on a CUDA device.
        max_images: images in a batch; larger ones are launched kernel by kernel, which no longer matters.
    """

    def __init__(self, model: BKD, device: torch.device, max_images: int) -> None:
        self.model, self.device, self.max_images = model, device, max_images
        # Graphs share memory and their own inputs and outputs: one runs at a time, on a stream of their own.
        self.stream, self.lock = torch.cuda.Stream(device), threading.Lock()
        self.forked = Forked(torch.cuda.Stream(device))
        self._forget(None)

    def __call__(self, images: Tensor, support: Support) -> tuple[Tensor, Tensor]:
        """Return scores (N,) and maps (N, H, W) of images on the model's device; no gradients."""
        if not 0 < len(images) <= self.max_images:
            return self.model.predict(images, support)
        with self.lock, torch.cuda.device(self.device), torch.inference_mode():
            if support is not self.support:
                self._forget(support)
            caller = torch.cuda.current_stream()
            self.stream.wait_stream(caller)
            with torch.cuda.stream(self.stream):
                recorded = self._recorded(images)
                recorded.images.copy_(images)
                recorded.graph.replay()
                results = recorded.scores.clone(), recorded.maps.clone()  # the next call writes over a graph's results
            caller.wait_stream(self.stream)
            for tensor in results:
                tensor.record_stream(caller)
            images.record_stream(self.stream)
            return results

    def _forget(self, support: Support | None) -> None:
        """Drop the graphs, which read another support."""
        self.support = support
        self.graphs: dict[object, Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def _recorded(self, images: Tensor) -> Recorded:
        key = graph_key(images)
        if key not in self.graphs:
            assert self.support is not None
            own = images.clone()
            for _ in range(2):  # libraries choose their kernels, and Triton tunes its own
                self.model.predict(own, self.support, both=self.forked)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on copying images meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                scores, maps = self.model.predict(own, self.support, both=self.forked)
            self.graphs[key] = Recorded(graph, own, scores, maps)
        return self.graphs[key]


def graph_key(images: Tensor) -> tuple[object, ...]:
    """Return what a graph is recorded for: whatever else chooses other kernels, or another type of images."""
    return (
        tuple(images.shape),
        images.dtype,
        implementation("local_match", "cuda"),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )
