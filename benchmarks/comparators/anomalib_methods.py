"""anomalib's methods, trained for accuracy.py: its torch models and losses in a plain loop.

All use the teacher's network unchanged, images resized and not cropped, and batches of 8 unless stated.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers import UnknownBackboneError, reverse_distillation_model, teacher_layers, without_downloads
from torch import Tensor, nn

from bkd_fast.data import ImageDataset, Sample, image_files
from bkd_fast.model.teacher import Teacher, assign_weights
from bkd_fast.training.weights import load_weights
from comparators.common import Made, Predict, Settings, batches, megabytes

PDN_FILE = "pretrained_teacher_small.pth"
PDN_ARCHIVE = "anomalib's release efficientad_pretrained_weights"
SMALLEST = 256  # pixels, what the encoder of EfficientAd's autoencoder needs


def patchcore(data: ImageDataset, settings: Settings, *, coreset: float = 0.01) -> Made:
    """PatchCore (Roth et al., CVPR 2022): levels of stride 8 and 16, a greedy coreset of their patches.

    Paper: WideResNet50-2, images of 256 pixels cropped to 224, a coreset of 25, 10 or 1 %. Here 1 %.
    """
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    layers, normalize = _layers(settings)
    with without_downloads():
        model = PatchcoreModel(layers=layers[1:], backbone=settings.config.teacher.name, pre_trained=False)
    _collect(model, data, normalize, settings)
    model.memory_bank = select_coreset(torch.vstack(model.embedding_store), coreset)
    return _predict(model, normalize), model.memory_bank.nbytes / 1e6


def select_coreset(features: Tensor, share: float) -> Tensor:
    """Return the rows that anomalib's ``KCenterGreedy`` selects, with one matrix product a step.

    anomalib subtracts the last center from all features, and writes the differences, at each step: with MTD's 723,800
    features that took seven times as long on a busy CPU.
    """
    from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy

    class Sampler(KCenterGreedy):
        squares: Tensor | None = None

        def update_distances(self, cluster_center: Any) -> None:
            if self.squares is None:
                self.squares = self.features.square().sum(1)
            center = self.features[cluster_center]
            distances = torch.addmv(self.squares + center.square().sum(), self.features, center, alpha=-2)
            distances = distances.clamp_(min=0).unsqueeze(1)  # squared: the same order
            known = self.min_distances
            self.min_distances = distances if known is None else torch.minimum(known, distances)

    return Sampler(features, share).sample_coreset()


def padim(data: ImageDataset, settings: Settings, *, features: int = 100) -> Made:
    """PaDiM (Defard et al., 2021): a Gaussian at every position of stride 4, of random channels of all three levels.

    Paper: ResNet-18 with 100 channels or WideResNet50-2 with 550, 0.01 on the covariance's diagonal, a map smoothed by
    4 pixels, images of 256 pixels cropped to 224. Here 100 channels, or as many as the teacher has.
    """
    from anomalib.models.image.padim.torch_model import PadimModel

    layers, normalize = _layers(settings)
    available = sum(Teacher(settings.config.teacher).channels)
    with without_downloads():
        name, kept = settings.config.teacher.name, min(features, available)
        model = PadimModel(layers=layers, backbone=name, pre_trained=False, n_features=kept)
    _collect(model, data, normalize, settings)
    with torch.no_grad():
        model.fit()
    return _predict(model, normalize), (model.gaussian.mean.nbytes + model.gaussian.inv_covariance.nbytes) / 1e6


def stfpm(data: ImageDataset, settings: Settings, *, epochs: int = 40) -> Made:
    """Student-teacher feature pyramid matching (Wang et al., BMVC 2021): SGD, learning rate 0.4.

    Paper: ResNet-18, 100 epochs of batches of 32, momentum 0.9, weight decay 1e-4 (anomalib's, and here: 1e-3), the
    epoch with the lowest loss on a fifth of the normals. Here 40 epochs and the last one.
    """
    from anomalib.models.image.stfpm.loss import STFPMLoss
    from anomalib.models.image.stfpm.torch_model import STFPMModel

    layers, normalize = _layers(settings)
    with without_downloads():
        model = STFPMModel(layers=layers, backbone=settings.config.teacher.name)
    _load(model.teacher_model.feature_extractor, settings)
    parameters = list(model.student_model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.4, momentum=0.9, weight_decay=0.001)
    loss = STFPMLoss()
    _train(model, data, epochs, normalize, optimizer, lambda outputs: loss(*outputs), [model.teacher_model])
    return _predict(model, normalize), megabytes(model.student_model)


def reverse_distillation(data: ImageDataset, settings: Settings, *, epochs: int = 40) -> Made:
    """Reverse distillation (Deng and Li, CVPR 2022): Adam, learning rate 0.005. anomalib knows ResNets alone.

    Paper: WideResNet50-2, 200 epochs of batches of 16, betas 0.5 and 0.999 (anomalib's, and here: 0.99).
    """
    from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss

    layers, normalize = _layers(settings)
    try:
        config = settings.config.teacher
        model: Any = reverse_distillation_model(config.name, config.size, layers)
    except UnknownBackboneError as error:
        return str(error)
    _load(model.encoder.feature_extractor, settings)
    learned = [*model.bottleneck.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.Adam(learned, lr=0.005, betas=(0.5, 0.99))
    loss = ReverseDistillationLoss()
    _train(model, data, epochs, normalize, optimizer, lambda outputs: loss(*outputs), [model.encoder])
    return _predict(model, normalize), megabytes(model.bottleneck) + megabytes(model.decoder)


def efficientad(data: ImageDataset, settings: Settings, *, epochs: int = 40) -> Made:
    """EfficientAd-S (Batzner et al., WACV 2024): student and autoencoder of a patch description network (PDN).

    The PDN, distilled from a WideResNet on ImageNet, comes from ``efficientad_weights``: this method has a teacher of
    its own. The penalty on the student's answers to other images needs some of ImageNet (``imagenet``); without them it
    is left out of the loss. Maps are scaled by their 90 and 99.5 % quantiles over the validation images.

    Paper: 70,000 steps of one image, Adam, learning rate 1e-4, a tenth of it for the last 5 %, weight decay 1e-5. Here
    40 epochs of one image a step, which take hours on a CPU.
    """
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, reduce_tensor_elems

    path = settings.efficientad_weights
    if path is None or not path.is_file():
        missing = "no weights of its teacher were given" if path is None else f"there is no file {path}"
        return f"{missing}: bring {PDN_FILE} of {PDN_ARCHIVE} and pass --efficientad-weights FILE"
    if min(settings.config.teacher.size) < SMALLEST:
        return f"its autoencoder needs images of at least {SMALLEST} x {SMALLEST} pixels"
    model = EfficientAdModel()
    try:
        model.teacher.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, TypeError, AttributeError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        return f"{path} does not hold its teacher ({reason}): bring {PDN_FILE} of {PDN_ARCHIVE}"
    others = None if settings.imagenet is None else _penalty_images(settings.imagenet, settings.config.teacher.size)
    model.teacher.requires_grad_(False)
    model.mean_std.update(_channel_statistics(model.teacher, data))
    steps = epochs * len(data)
    learned = [*model.student.parameters(), *model.ae.parameters()]
    optimizer = torch.optim.Adam(learned, lr=1e-4, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, int(0.95 * steps)), 0.1)
    model.train()
    model.teacher.eval()
    for _ in range(epochs):
        for images in batches(data, shuffle=True, size=1):
            optimizer.zero_grad()
            _efficientad_loss(model, images, None if others is None else next(others)).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        maps = [model.get_maps(images) for images in batches(settings.validation, shuffle=False)]
    for name, own in zip(("st", "ae"), zip(*maps, strict=True), strict=True):
        values = reduce_tensor_elems(torch.cat(own))
        model.quantiles.update({f"qa_{name}": values.quantile(0.9), f"qb_{name}": values.quantile(0.995)})
    model.requires_grad_(False)
    return _predict(model, lambda images: images), megabytes(model)


def _efficientad_loss(model: Any, images: Tensor, others: Tensor | None) -> Tensor:
    """anomalib's sum of losses; without other images the same but for the penalty, which needs them."""
    if others is not None:
        return sum(model(images, others))
    _, distance = model.compute_student_teacher_distance(images)
    hard = distance[distance >= torch.quantile(distance.flatten(), 0.999)].mean()
    changed = model.choose_random_aug_image(images)
    rebuilt = model.ae(changed, images.shape[-2:])
    with torch.no_grad():
        target = (model.teacher(changed) - model.mean_std["mean"]) / model.mean_std["std"]
    imitated = model.student(changed)[:, model.teacher_out_channels :]
    return hard + F.mse_loss(rebuilt, target) + F.mse_loss(rebuilt, imitated)


@torch.no_grad()
def _channel_statistics(teacher: nn.Module, data: ImageDataset) -> dict[str, Tensor]:
    """Mean and std of the teacher's channels over normal images, (1, C, 1, 1) each."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for images in batches(data, shuffle=False):
        features = teacher(images).double()
        count += features[:, 0].numel()
        total, squares = total + features.sum((0, 2, 3)), squares + features.square().sum((0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return {"mean": mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}


def _penalty_images(folder: Path, size: tuple[int, int]) -> Iterator[Tensor]:
    """Images for the penalty, one a step without end: the middle of twice the size, three in ten of them grey."""
    twice = ImageDataset([Sample(path, 0, "other") for path in image_files(folder)], (2 * size[0], 2 * size[1]))
    top, left = size[0] // 2, size[1] // 2
    for images in itertools.chain.from_iterable(batches(twice, shuffle=True, size=1) for _ in itertools.count()):
        middle = images[..., top : top + size[0], left : left + size[1]]
        grey = middle.mul(torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        yield grey.expand_as(middle) if torch.rand(()) < 0.3 else middle


def _layers(settings: Settings) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """timm's names of the levels at strides 4, 8 and 16, and the teacher's normalization of images."""
    teacher = Teacher(settings.config.teacher)
    mean, std = teacher.get_buffer("image_mean"), teacher.get_buffer("image_std")
    return teacher_layers(settings.config.teacher.name), lambda images: (images - mean) / std


def _load(network: nn.Module, settings: Settings) -> None:
    """The teacher's ImageNet weights into a features_only network, whichever levels it was built for."""
    weights = load_weights(settings.config.teacher)
    if weights is not None:
        assign_weights(network, settings.config.teacher.name, weights)


def _collect(model: Any, data: ImageDataset, normalize: Callable[[Tensor], Tensor], settings: Settings) -> None:
    """Let a model that is not trained by gradients take in the features of normal images."""
    _load(model.feature_extractor.feature_extractor, settings)
    model.train()
    model.feature_extractor.eval()
    with torch.no_grad():
        for images in batches(data, shuffle=False):
            model(normalize(images))


def _train(
    model: nn.Module,
    data: ImageDataset,
    epochs: int,
    normalize: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[tuple], Tensor],
    frozen: list[nn.Module],
) -> None:
    model.train()
    for part in frozen:
        part.eval()
    for _ in range(epochs):
        for images in batches(data, shuffle=True):
            optimizer.zero_grad()
            loss(model(normalize(images))).backward()
            optimizer.step()


def _predict(model: nn.Module, normalize: Callable[[Tensor], Tensor]) -> Predict:
    model.eval()

    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(normalize(images))
        return outputs.pred_score, outputs.anomaly_map

    return predict
