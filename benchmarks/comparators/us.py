"""US, Uninformed Students (Bergmann et al., CVPR 2020): an ensemble that regresses a teacher's local descriptors.

As in the paper: at each of three scales, students with random starts and receptive fields of 17, 33 or 65 pixels
regress the teacher's descriptors, whose channels have mean 0 and std 1 over the training images, by squared error. A
pixel is scored by the error of the students' mean and by their predictive variance, each less its mean and divided by
its std over validation images; the scales are averaged. The image's score is the maximum of its map.

What differs: the paper's teachers are patch networks of the students' own architecture, distilled from a ResNet on
ImageNet. Here the descriptors are the package's teacher levels at strides 4, 8 and 16, which see more of the image than
a student does. Students have strides of their scale instead of dense pooling, are narrower (the paper: 128 and 256
channels), are trained for 10 epochs on whole images (the paper: 100, one image a step, Adam at 1e-4), and maps are
enlarged bilinearly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bkd_fast.data import ImageDataset
from comparators.common import FrozenLevels, Made, Moments, Settings, batches, megabytes

STRIDES = (4, 8, 16)  # of the levels; a student's receptive field is 4 strides and a pixel: 17, 33, 65


def us(
    data: ImageDataset,
    settings: Settings,
    *,
    students: int = 3,
    width: int = 32,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    batch: int = 4,
) -> Made:
    """US; ``width``: channels of a student's first convolution, others have twice as many."""
    model = Ensemble(FrozenLevels(settings.config), students, width)
    model.teacher.standardize(data)
    learned = list(model.students.parameters())
    steps = epochs * max(1, len(data) // batch)
    optimizer = torch.optim.Adam(learned, lr=learning_rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for images in batches(data, shuffle=True, size=batch):
            optimizer.zero_grad()
            model.loss(images).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    model.normalize(settings.validation)

    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        maps = model.maps(images)
        return maps.amax((1, 2, 3)), maps

    return predict, megabytes(model.students)


class Ensemble(nn.Module):
    """Teacher and students of all scales."""

    def __init__(self, teacher: FrozenLevels, students: int, width: int) -> None:
        super().__init__()
        self.teacher = teacher
        pairs = list(zip(STRIDES, teacher.channels, strict=True)) * students  # all scales of one student after another
        networks = (_student(stride, width, channels) for stride, channels in pairs)
        self.students = nn.ModuleList(networks).to(memory_format=torch.channels_last)
        self.scales: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []  # of errors and of variances

    def loss(self, images: Tensor) -> Tensor:
        """Mean squared error, summed over students and scales."""
        pairs = zip(self._targets(images), self._predictions(images), strict=True)
        return torch.stack([F.mse_loss(own, target.expand_as(own)) * len(own) for target, own in pairs]).sum()

    @torch.no_grad()
    def normalize(self, validation: ImageDataset) -> None:
        """Takes mean and std of errors and variances from normal images."""
        moments = [(Moments(), Moments()) for _ in STRIDES]
        for images in batches(validation, shuffle=False):
            for (errors, variances), (error, variance) in zip(moments, self._evidence(images), strict=True):
                errors.add(error)
                variances.add(variance)
        self.scales = [(errors.compute(), variances.compute()) for errors, variances in moments]

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 1, H, W)."""
        total = torch.zeros(len(images), 1, *images.shape[-2:])
        for evidence, scales in zip(self._evidence(images), self.scales, strict=True):
            score = torch.stack([(part - mean) / std for part, (mean, std) in zip(evidence, scales, strict=True)])
            total += F.interpolate(score.sum(0), size=images.shape[-2:], mode="bilinear", align_corners=False)
        return total / len(STRIDES)

    @torch.no_grad()
    def _targets(self, images: Tensor) -> list[Tensor]:
        """The teacher's levels, standardised: [(1, N, C_l, H_l, W_l)]."""
        return [level.unsqueeze(0) for level in self.teacher.standardized(images)]

    def _predictions(self, images: Tensor) -> list[Tensor]:
        """Every student's: [(students, N, C_l, H_l, W_l)]."""
        normalized = self.teacher.normalized(images).contiguous(memory_format=torch.channels_last)
        each = [student(normalized) for student in self.students]
        return [torch.stack(each[at :: len(STRIDES)]) for at in range(len(STRIDES))]

    def _evidence(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Squared error of the mean and predictive variance of each scale, both (N, 1, H_l, W_l)."""
        evidence = []
        for target, own in zip(self._targets(images), self._predictions(images), strict=True):
            mean = own.mean(0)
            error = (mean - target[0]).square().sum(1, keepdim=True)
            variance = (own - mean).square().mean(0).sum(1, keepdim=True)
            evidence.append((error, variance))
        return evidence


def _student(stride: int, width: int, channels: int) -> nn.Sequential:
    """A plain CNN whose outputs, ``stride`` pixels apart, see ``4 * stride + 1`` pixels each."""
    layers: list[nn.Module] = [_convolution(3, width, 5, 2)]
    inner = width
    for _ in range(stride.bit_length() - 2):  # each doubles stride and receptive field
        layers += [nn.LeakyReLU(5e-3), _convolution(inner, 2 * width, 3, 2)]
        inner = 2 * width
    layers += [nn.LeakyReLU(5e-3), _convolution(inner, 2 * width, 3, 1), nn.LeakyReLU(5e-3)]
    return nn.Sequential(*layers, nn.Conv2d(2 * width, channels, 1))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, padding_mode="reflect")
