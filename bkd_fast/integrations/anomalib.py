"""BKD as an anomalib model: trained by its ``Engine``, with its data modules, metrics, visualiser and command line.

Needs the extra ``anomalib``. ``Engine(max_epochs=1).train(model=Bkd(teacher="tf_efficientnet_lite0"),
datamodule=Folder(…))``, which is enough where nothing is learned (as by default), or
``anomalib train --model bkd_fast.integrations.anomalib.Bkd --data …``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Resize

from bkd_fast.artifact import load_trained
from bkd_fast.config import BKDConfig, SampledSupport, TeacherConfig
from bkd_fast.data import draw_support
from bkd_fast.errors import BKDError
from bkd_fast.model import BKD
from bkd_fast.model.calibration import learn_normal
from bkd_fast.model.support import Exclude, Support
from bkd_fast.model.teacher import Weights, with_image_size
from bkd_fast.normals.thresholds import measure_normals
from bkd_fast.training.step import TrainingStep, make_optimizer
from bkd_fast.training.weights import load_weights


class BkdModel(nn.Module):
    """The network and its support: what is in a checkpoint, and what predicts."""

    def __init__(self, config: BKDConfig, *, weights: Weights | None) -> None:
        super().__init__()
        self.network = BKD(config, weights=weights)
        self.support_levels: list[Tensor] = []  # per level (1, P, C, H, W), float16
        self._support: tuple[torch.device, Support] | None = None

    def forward(self, images: Tensor) -> InferenceBatch:
        """(N, 3, H, W) in [0, 1], of the network's size -> raw scores (N, 1) and anomaly maps (N, 1, H, W)."""
        scores, maps = self.network.predict(images, self.support(images.device))
        return InferenceBatch(pred_score=scores.unsqueeze(1), anomaly_map=maps.unsqueeze(1))

    def set_support(self, levels: list[Tensor]) -> None:
        """Set the teacher levels (1, P, C, H, W) of the support, which is retrieved from or shared."""
        self.support_levels, self._support = [level.half() for level in levels], None

    def support(self, device: torch.device, *, frozen: bool = True) -> Support:
        """Return the support on a device; made anew in training, where what it depends on is learned."""
        sampled = isinstance(self.network.config.support, SampledSupport)
        if self._support is None or self._support[0] != device or (sampled and (self.training or not frozen)):
            levels = [level.to(device) for level in self.support_levels]
            levels = [level.float() for level in levels] if sampled else levels
            self._support = device, self.network.make_support(levels, frozen=frozen, own=True)
        return self._support[1]

    def get_extra_state(self) -> dict[str, Any]:
        """Return the support, which is neither parameter nor buffer."""
        return {"support": self.support_levels}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Set what :meth:`get_extra_state` returned."""
        self.set_support(state["support"])


@dataclass(frozen=True)
class _Seen:
    """Images of the data module by index, for :func:`bkd_fast.normals.thresholds.measure_normals`."""

    selected: Sequence[int]
    levels_of: Callable[[int], list[Tensor]]

    def __len__(self) -> int:
        return len(self.selected)

    @property
    def image_of(self) -> Sequence[int]:
        return range(len(self.selected))

    def levels(self, indices: Sequence[int]) -> list[Tensor]:
        rows = [self.levels_of(self.selected[index]) for index in indices]
        return [torch.cat(level) for level in zip(*rows, strict=True)]


class Bkd(AnomalibModule):
    """BKD for anomalib.

    A share of the training images (``training.validation_share``) is not learned from: maps and scores are scaled by
    them. Support and memory come from the others. The data module's augmentations apply to training images.

    Args:
        teacher: any timm backbone (see :class:`bkd_fast.BKDConfig`).
        preset: ``default``, ``paper`` or ``rd4ad``.
        settings: any other option of :class:`bkd_fast.BKDConfig`, as in ``{"memory.items": 500}``. Epochs and
            batch size are the Engine's and the data module's, and thresholds the post-processor's.
        run: a run folder that bkd_fast trained; the arguments before are then not needed, and nothing is left to train.
        pre_processor, post_processor, evaluator, visualizer: anomalib's; the default pre-processor resizes to
            ``image_size`` and does not normalise, which the teacher does.

    Raises:
        BKDError: a wrong setting, missing weights, or an unreadable run.
    """

    model: BkdModel
    steps: TrainingStep

    def __init__(
        self,
        teacher: str = TeacherConfig.name,
        preset: str = "default",
        settings: dict[str, Any] | None = None,
        run: str | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        trained = None if run is None else load_trained(Path(run))
        config = BKDConfig.preset(preset, {"teacher.name": teacher, **(settings or {})})
        config = config.with_changes(teacher=with_image_size(config.teacher)) if trained is None else trained.config
        if trained is None and config.roi is not None:
            raise BKDError("a region of interest is learned by `bkd-fast train --roi MASK`: pass its run")
        if pre_processor is True:
            pre_processor = PreProcessor(transform=Compose([Resize(config.teacher.size, antialias=True)]))
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.config = config
        weights = load_weights(config.teacher) if trained is None else None
        self.model = BkdModel(config, weights=weights)
        if trained is not None:
            self.model.network = trained.model
            self.model.set_support(trained.support)
        self.steps = TrainingStep(self.model.network)
        self.index_in_bank: dict[str, int] = {}  # of training images in the support bank
        self.validation: set[str] = set()
        self.calibrated = False

    def on_fit_start(self) -> None:
        """Statistics, memory and support, from the training images as they are."""
        if self.model.support_levels or self._learned():
            return
        paths = self._training_paths()
        generator = torch.Generator().manual_seed(self.config.training.seed)
        held = max(1, round(self.config.training.validation_share * len(paths)))
        order = torch.randperm(len(paths), generator=generator).tolist()
        self.validation = {paths[index] for index in order[:held]}
        kept = sorted(order[held:])
        network = self.model.network
        levels = (network.teacher.raw(self._image(index)) for index in kept)
        chosen = learn_normal(network, levels, len(kept), generator)
        if self.config.support is None:
            return
        if self.config.retrieves:
            self.index_in_bank = {paths[kept[index]]: number for number, index in enumerate(chosen)}
        else:
            chosen = draw_support(len(kept), min(self.config.support.shots, len(kept)), generator)
        support = [network.teacher(self._image(kept[index])) for index in chosen]
        self.model.set_support([torch.cat(level).unsqueeze(0) for level in zip(*support, strict=True)])

    def configure_optimizers(self) -> Any:
        """Adam with a rate for the offsets of their own, following a cosine; none where nothing is learned."""
        if not self.steps.branches:
            return None
        optimizer = make_optimizer(self.model.network, self.config)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = group["scale"] * self.config.training.learning_rate
        if self.config.training.schedule == "constant":
            return optimizer
        total = max(1, int(self.trainer.estimated_stepping_batches))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The losses of Eq. 11-12 on the batch's images that are not for validation."""
        paths = [str(path) for path in batch.image_path]
        rows = [row for row, path in enumerate(paths) if path not in self.validation]
        if not rows or not self.steps.branches:
            return None
        query = self.model.network.teacher(batch.image[rows])
        support = self.model.support(self.device, frozen=False)
        losses, _ = self.steps(query, support, self._exclude([paths[row] for row in rows]))
        for name, loss in losses.items():
            self.log(f"train_{name}_loss", loss.item(), on_epoch=True, prog_bar=name == "total", batch_size=len(rows))
        return {"loss": losses["total"]}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which images are validation and which are support: a resumed training needs them."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["bkd_fast_images"] = {"index_in_bank": self.index_in_bank, "validation": sorted(self.validation)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of :meth:`on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        images = checkpoint["bkd_fast_images"]
        self.index_in_bank, self.validation = images["index_in_bank"], set(images["validation"])

    def on_validation_start(self) -> None:
        """Scales of the weights of now; anomalib finds its thresholds in the validation that follows."""
        self._calibrate()

    def on_train_end(self) -> None:
        """The same, where there was no validation."""
        self._calibrate()

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """Scores and maps of a batch."""
        return batch.update(**self.model(batch.image)._asdict())

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Validation means nothing before there are statistics, and the optimiser clips as the settings say."""
        return {"num_sanity_val_steps": 0, "gradient_clip_val": self.config.training.clip_norm}

    @property
    def learning_type(self) -> LearningType:
        """One class: normal images."""
        return LearningType.ONE_CLASS

    def _exclude(self, paths: Sequence[str]) -> Exclude | None:
        """A training image is not its own support."""
        if not self.index_in_bank:
            return None
        own = torch.tensor([self.index_in_bank.get(path, -1) for path in paths], device=self.device)
        return Exclude(own.unsqueeze(1) == torch.arange(len(self.index_in_bank), device=self.device), None)

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Scales of maps and scores, as training finds them; once, where nothing is learned."""
        if not self.validation or (self.calibrated and not self.steps.branches):
            return
        was_training = self.model.training
        self.model.eval()
        self.model._support = None
        paths = self._training_paths()
        held = [index for index, path in enumerate(paths) if path in self.validation]
        kept = [index for index, path in enumerate(paths) if path not in self.validation]
        # The bank is in the order of the images.
        bank = [row for row, index in enumerate(kept) if paths[index] in self.index_in_bank]
        network = self.model.network

        def levels(index: int) -> list[Tensor]:
            return network.teacher(self._image(index))

        measure_normals(network, self.model.support(self.device), _Seen(kept, levels), _Seen(held, levels), bank)
        self.model._support = None  # with what was measured of its images
        self.calibrated = True
        self.model.train(was_training)

    def _learned(self) -> bool:
        """Whether statistics were set already, by a run or a checkpoint, in a model without support."""
        return not self.config.forward_branch and bool(self.model.network.teacher.get_buffer("mean_1").any())

    def _image(self, index: int) -> Tensor:
        image = self._training_data()[index].image.unsqueeze(0).to(self.device)
        return self.pre_processor(image) if self.pre_processor else image

    def _training_paths(self) -> list[str]:
        return [str(path) for path in self._training_data().samples.image_path]

    def _training_data(self) -> Any:
        data = getattr(getattr(self.trainer, "datamodule", None), "train_data", None)
        if data is None:
            raise BKDError("Bkd learns from the images of an anomalib data module: pass datamodule=…, not data loaders")
        return data
