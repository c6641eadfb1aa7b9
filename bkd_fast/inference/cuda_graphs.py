"""The network of a detector as CUDA graphs: a few hundred kernels are launched at once, which takes a CPU longer one by
one than a GPU needs to run them."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.model.bkd import BKD, Prepared
from bkd_fast.ops.backend import OPERATORS, implementation


class Recorded(NamedTuple):
    """A graph, the images that it reads, and the results that it writes."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    scores: Tensor
    maps: Tensor


class GraphedJudge:
    """:meth:`BKD.judge` of a frozen model, recorded when it is first called with images of a number.

    Any thread may call it, on any stream.

    Args:
        model: on a CUDA device.
        most: images in a batch; larger ones are launched kernel by kernel, which no longer matters.
    """

    def __init__(self, model: BKD, device: torch.device, most: int) -> None:
        self.model, self.device, self.most = model, device, most
        # Graphs share memory and their own inputs and outputs: one runs at a time, on a stream of their own.
        self.stream, self.lock = torch.cuda.Stream(device), threading.Lock()
        self._forget(None)

    def __call__(self, images: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Scores (N,) and maps (N, H, W) of images on the model's device; no gradients."""
        if not 0 < len(images) <= self.most:
            return self.model.judge(images, prepared)
        with self.lock, torch.cuda.device(self.device), torch.inference_mode():
            if prepared is not self.prepared:
                self._forget(prepared)
            caller = torch.cuda.current_stream()
            self.stream.wait_stream(caller)
            with torch.cuda.stream(self.stream):
                recorded = self._recorded(images)
                recorded.images.copy_(images)
                recorded.graph.replay()
                found = recorded.scores.clone(), recorded.maps.clone()  # the next call writes over a graph's results
            caller.wait_stream(self.stream)
            for tensor in found:
                tensor.record_stream(caller)
            images.record_stream(self.stream)
            return found

    def _forget(self, prepared: Prepared | None) -> None:
        """Graphs read what is prepared where it lies."""
        self.prepared = prepared
        self.graphs: dict[object, Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def _recorded(self, images: Tensor) -> Recorded:
        key = tuple(images.shape), implementation(OPERATORS[0], "cuda")  # another backend has other kernels
        if key not in self.graphs:
            assert self.prepared is not None
            own = images.clone()
            for _ in range(2):  # libraries choose their kernels, and Triton tunes its own
                self.model.judge(own, self.prepared)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on copying images meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                scores, maps = self.model.judge(own, self.prepared)
            self.graphs[key] = Recorded(graph, own, scores, maps)
        return self.graphs[key]
