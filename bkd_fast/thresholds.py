"""What held-out normal images say of a trained model: its thresholds, and the balance of its maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bkd_fast.data import ImageDataset, Sample
from bkd_fast.model import BKD
from bkd_fast.model.bkd import Prepared
from bkd_fast.model.calibration import balance_maps
from bkd_fast.run import Calibration

INFERENCE_BATCH = 8


@torch.no_grad()
def calibrate_thresholds(
    model: BKD, prepared: Prepared, held_out: Sequence[Sample], device: torch.device
) -> Calibration:
    """Thresholds and scales from held-out normal images; balances the model's maps.

    Args:
        prepared: the support, as :meth:`BKD.prepare` gives it.
        held_out: normals that were not trained on.
        device: the model's.
    """
    config = model.config
    dataset = ImageDataset(list(held_out), config.image_size)

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(dataset), INFERENCE_BATCH):
            chunk = [dataset[index][0] for index in range(start, min(start + INFERENCE_BATCH, len(dataset)))]
            yield torch.stack(chunk).to(device)

    if config.fusion == "geometric":
        balance_maps(model, batches(), prepared)
    scores, maxima, medians = [], [], []
    for images in batches():
        maps = model.anomaly_map(model.distill(model.teacher(images), prepared), config.image_size)
        scores += model.image_score(maps).tolist()
        maxima += maps.flatten(1).amax(1).tolist()
        medians += maps.flatten(1).median(1).values.tolist()
    # "higher": with few held-out images the quantile is the largest of them, not a value between two.
    threshold, pixel = (
        float(np.quantile(values, config.threshold_quantile, method="higher")) for values in (scores, maxima)
    )
    # Positive and below the threshold, as a logarithmic colour scale needs it.
    level = min(max(float(np.median(medians)), 1e-30), 0.5 * pixel)
    return Calibration(threshold, pixel, level, model.map_scale, model.map_exponent)
