"""A detector as a graph of PyTorch: images in, raw scores and anomaly maps out, the support inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_flatten, tree_unflatten

from bkd_fast.inference.detector import Detector
from bkd_fast.model import BKD
from bkd_fast.model.support import Support

MAX_IMAGES = 1024  # in a batch of an exported program


class ExportedModel(nn.Module):
    """What a model with its support computes of images (N, 3, H, W) in [0, 1] of its configured size.

    Normalisation, both branches, the support and the memory are inside; thresholds are not.
    """

    def __init__(self, model: BKD, support: Support) -> None:
        super().__init__()
        self.model = model
        tensors, self.structure = tree_flatten(support)
        self.count = len(tensors)
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"support_{index}", tensor)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (N,) and maps (N, H, W), float32."""
        support = tree_unflatten([getattr(self, f"support_{index}") for index in range(self.count)], self.structure)
        return self.model.predict(images, support)


def program(detector: Detector) -> ExportedProgram:
    """Return the graph for any number of images, made of PyTorch's operators and this package's."""
    model = ExportedModel(detector.model, detector.support).eval().requires_grad_(False)
    images = torch.rand(2, 3, *detector.config.teacher.size, device=detector.device)
    batch = Dim("batch", min=1, max=MAX_IMAGES)
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
