"""anomalib's methods, trained as accuracy.py needs them: its torch models and losses, a plain loop around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

from bkd_fast.config import BKDConfig
from bkd_fast.data import ImageDataset
from bkd_fast.model.teacher import STRIDES, Teacher
from bkd_fast.model.weights import load_weights

Judge = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (1, 3, H, W) in [0, 1] -> score, anomaly map
Made = tuple[Judge, float] | str  # and megabytes kept beside the teacher; or why there is none
BATCH = 8


class Settings(NamedTuple):
    """What all methods share, and what the peers have of their own."""

    config: BKDConfig
    epochs: int
    coreset: float


def patchcore(data: ImageDataset, settings: Settings) -> Made:
    """PatchCore (Roth et al., CVPR 2022): levels of stride 8 and 16, a greedy coreset of their patches."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    layers, normalize = _layers(settings)
    with _without_downloads():
        model = PatchcoreModel(layers=layers[1:], backbone=settings.config.teacher, pre_trained=False)
    _load(model.feature_extractor.feature_extractor, settings)
    model.train()
    model.feature_extractor.eval()
    with torch.no_grad():
        for images in _batches(data, shuffle=False):
            model(normalize(images))
    model.subsample_embedding(settings.coreset)
    model.eval()
    return _judge(model, normalize), model.memory_bank.nbytes / 1e6


def stfpm(data: ImageDataset, settings: Settings) -> Made:
    """Student-teacher feature pyramid matching (Wang et al., BMVC 2021): SGD, learning rate 0.4."""
    from anomalib.models.image.stfpm.loss import STFPMLoss
    from anomalib.models.image.stfpm.torch_model import STFPMModel

    layers, normalize = _layers(settings)
    with _without_downloads():
        model = STFPMModel(layers=layers, backbone=settings.config.teacher)
    _load(model.teacher_model.feature_extractor, settings)
    parameters = list(model.student_model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.4, momentum=0.9, weight_decay=0.001)
    loss = STFPMLoss()
    _train(model, data, settings, normalize, optimizer, lambda found: loss(*found), [model.teacher_model])
    return _judge(model, normalize), _megabytes(model.student_model)


def reverse_distillation(data: ImageDataset, settings: Settings) -> Made:
    """Reverse distillation (Deng and Li, CVPR 2022): Adam, learning rate 0.005. anomalib knows ResNets alone."""
    from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
    from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
    from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel

    layers, normalize = _layers(settings)
    size = settings.config.image_size
    try:
        with _without_downloads():
            model = ReverseDistillationModel(
                settings.config.teacher.split(".")[0], size, layers, AnomalyMapGenerationMode.ADD, pre_trained=False
            )
    except (ValueError, RuntimeError, AssertionError, KeyError) as error:
        return f"anomalib builds no decoder for {settings.config.teacher} ({error})"
    _load(model.encoder.feature_extractor, settings)
    learned = [*model.bottleneck.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.Adam(learned, lr=0.005, betas=(0.5, 0.99))
    loss = ReverseDistillationLoss()
    _train(model, data, settings, normalize, optimizer, lambda found: loss(*found), [model.encoder])
    return _judge(model, normalize), _megabytes(model.bottleneck) + _megabytes(model.decoder)


PEERS: dict[str, Callable[[ImageDataset, Settings], Made]] = {
    "PatchCore (anomalib)": patchcore,
    "STFPM (anomalib)": stfpm,
    "ReverseDistillation (anomalib)": reverse_distillation,
}


def _layers(settings: Settings) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """timm's names of the levels at strides 4, 8 and 16, and the teacher's normalisation of images."""
    info = timm.create_model(settings.config.teacher, pretrained=False, features_only=True).feature_info
    names = dict(zip(info.reduction(), info.module_name(), strict=True))
    teacher = Teacher(settings.config.with_changes(weights="none"))
    mean, deviation = teacher.get_buffer("image_mean"), teacher.get_buffer("image_deviation")
    return [names[stride] for stride in STRIDES], lambda images: (images - mean) / deviation


def _load(network: nn.Module, settings: Settings) -> None:
    """The teacher's ImageNet weights into a features_only network, whichever levels it was built for."""
    load_weights(network, settings.config.teacher, settings.config.weights)


def _without_downloads() -> patch:
    """anomalib asks timm for ImageNet weights where it is built; here they are loaded afterwards."""
    original = timm.create_model

    def create(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        return original(name, pretrained=False, **options)

    return patch("timm.create_model", create)


def _train(
    model: nn.Module,
    data: ImageDataset,
    settings: Settings,
    normalize: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[tuple], Tensor],
    frozen: list[nn.Module],
) -> None:
    model.train()
    for part in frozen:
        part.eval()
    for _ in range(settings.epochs):
        for images in _batches(data, shuffle=True):
            optimizer.zero_grad()
            loss(model(normalize(images))).backward()
            optimizer.step()
    model.eval()


def _batches(data: ImageDataset, *, shuffle: bool) -> Iterator[Tensor]:
    for images, _ in torch.utils.data.DataLoader(data, BATCH, shuffle=shuffle, drop_last=shuffle):
        yield images


def _judge(model: nn.Module, normalize: Callable[[Tensor], Tensor]) -> Judge:
    def judge(images: Tensor) -> tuple[Tensor, Tensor]:
        found = model(normalize(images))
        return found.pred_score, found.anomaly_map

    return judge


def _megabytes(module: nn.Module) -> float:
    return sum(value.nbytes for value in module.state_dict().values()) / 1e6
