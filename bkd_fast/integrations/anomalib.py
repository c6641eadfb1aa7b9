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
from bkd_fast.config import BKDConfig
from bkd_fast.data import draw_support
from bkd_fast.errors import BKDError
from bkd_fast.model import BKD
from bkd_fast.model.bkd import Exclude, Prepared
from bkd_fast.model.calibration import learn_normal
from bkd_fast.training.step import TrainingStep, make_optimizer
from bkd_fast.training.thresholds import measure_normals


class BkdModel(nn.Module):
    """The network and its support: what is in a checkpoint, and what judges images."""

    def __init__(self, config: BKDConfig, *, load_teacher: bool = True) -> None:
        super().__init__()
        self.network = BKD(config, load_teacher=load_teacher)
        self.support: list[Tensor] = []  # per level (1, P, C, H, W), float16
        self._prepared: tuple[torch.device, Prepared] | None = None

    def forward(self, images: Tensor) -> InferenceBatch:
        """(N, 3, H, W) in [0, 1], of the network's size -> raw scores (N, 1) and anomaly maps (N, 1, H, W)."""
        scores, maps = self.network.judge(images, self.prepared(images.device))
        return InferenceBatch(pred_score=scores.unsqueeze(1), anomaly_map=maps.unsqueeze(1))

    def set_support(self, levels: list[Tensor]) -> None:
        """Teacher levels (1, P, C, H, W) of the support, which is looked up from or shared."""
        self.support, self._prepared = [level.half() for level in levels], None

    def prepared(self, device: torch.device) -> Prepared:
        """What depends on the support alone; in training made anew, since weights are in it."""
        drawn = not self.network.config.looks_up
        if self._prepared is None or self._prepared[0] != device or (drawn and self.training):
            levels = [level.to(device) for level in self.support]
            self._prepared = device, self.network.prepare([level.float() for level in levels] if drawn else levels)
        return self._prepared[1]

    def get_extra_state(self) -> dict[str, Any]:
        """Support and scales of maps and scores, which are neither parameters nor buffers."""
        network = self.network
        return {"support": self.support, "map_scale": network.map_scale, "score_scale": network.score_scale}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self.set_support(state["support"])
        self.network.map_scale, self.network.score_scale = state["map_scale"], state["score_scale"]


@dataclass(frozen=True)
class _Seen:
    """Images of the data module by index, for :func:`bkd_fast.training.thresholds.measure_normals`."""

    places: Sequence[int]
    levels_of: Callable[[int], list[Tensor]]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def image_of(self) -> Sequence[int]:
        return range(len(self.places))

    def levels(self, indices: Sequence[int]) -> list[Tensor]:
        rows = [self.levels_of(self.places[index]) for index in indices]
        return [torch.cat(level) for level in zip(*rows, strict=True)]


class Bkd(AnomalibModule):
    """BKD for anomalib.

    A tenth of the data module's training images (``holdout``) is not learned from: maps and scores are scaled by them.
    Support and memory come from the others. Augmentations of the data module apply where images are learned from.

    Args:
        teacher: any timm CNN (see :class:`bkd_fast.BKDConfig`).
        preset: ``default``, ``paper`` or ``rd4ad``.
        settings: any other field of :class:`bkd_fast.BKDConfig`; ``epochs`` and ``batch_size`` are the Engine's and the
            data module's, and the thresholds the post-processor's (``false_alarms`` is not asked).
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
        teacher: str = BKDConfig.teacher,
        preset: str = "default",
        settings: dict[str, Any] | None = None,
        run: str | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        trained = None if run is None else load_trained(Path(run))
        config = (
            BKDConfig.preset(preset, **{"teacher": teacher, **(settings or {})}) if trained is None else trained.config
        )
        if pre_processor is True:
            pre_processor = PreProcessor(transform=Compose([Resize(config.image_size, antialias=True)]))
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.config = config
        self.model = BkdModel(config, load_teacher=trained is None)
        if trained is not None:
            self.model.network = trained.model
            self.model.set_support(trained.support)
        self.steps = TrainingStep(self.model.network)
        self.place: dict[str, int] = {}  # of a training image in the support pool
        self.held_out: set[str] = set()
        self.calibrated = False

    def on_fit_start(self) -> None:
        """Statistics, memory and support, from the training images as they are."""
        if self.model.support or self._learned():
            return
        paths = self._training_paths()
        generator = torch.Generator().manual_seed(self.config.seed)
        held = max(1, round(self.config.holdout * len(paths)))
        order = torch.randperm(len(paths), generator=generator).tolist()
        self.held_out = {paths[index] for index in order[:held]}
        kept = sorted(order[held:])
        network = self.model.network
        levels = (network.teacher.raw(self._image(index)) for index in kept)
        chosen = learn_normal(network, levels, len(kept), generator)
        if not self.config.forward_branch:
            return
        if self.config.looks_up:
            self.place = {paths[kept[index]]: place for place, index in enumerate(chosen)}
        else:
            chosen = draw_support(len(kept), min(self.config.shots, len(kept)), generator)
        support = [network.teacher(self._image(kept[index])) for index in chosen]
        self.model.set_support([torch.cat(level).unsqueeze(0) for level in zip(*support, strict=True)])

    def configure_optimizers(self) -> Any:
        """Adam with a rate for the offsets of their own, following a cosine; none where nothing is learned."""
        if not self.steps.branches:
            return None
        optimizer = make_optimizer(self.model.network, self.config)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = group["scale"] * self.config.learning_rate
        if self.config.schedule == "constant":
            return optimizer
        total = max(1, int(self.trainer.estimated_stepping_batches))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The losses of Eq. 11-12 on the batch's images that are not held out."""
        paths = [str(path) for path in batch.image_path]
        rows = [row for row, path in enumerate(paths) if path not in self.held_out]
        if not rows or not self.steps.branches:
            return None
        query = self.model.network.teacher(batch.image[rows])
        losses, _ = self.steps(query, self._prepared(), self._exclude([paths[row] for row in rows]))
        for name, loss in losses.items():
            self.log(f"train_{name}_loss", loss.item(), on_epoch=True, prog_bar=name == "total", batch_size=len(rows))
        return {"loss": losses["total"]}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With which images are held out and which are support: a training that goes on has to know."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["bkd_fast_images"] = {"place": self.place, "held_out": sorted(self.held_out)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of :meth:`on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        images = checkpoint["bkd_fast_images"]
        self.place, self.held_out = images["place"], set(images["held_out"])

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
        return {"num_sanity_val_steps": 0, "gradient_clip_val": self.config.clip_norm}

    @property
    def learning_type(self) -> LearningType:
        """One class: normal images."""
        return LearningType.ONE_CLASS

    def _prepared(self) -> Any:
        """The support as the training step takes it: a pool, or levels that are prepared with its weights."""
        if self.config.looks_up:
            return self.model.prepared(self.device)
        return [level.to(self.device).float() for level in self.model.support]

    def _exclude(self, paths: Sequence[str]) -> Exclude | None:
        """A training image is not its own support."""
        if not self.place:
            return None
        place = torch.tensor([self.place.get(path, -1) for path in paths], device=self.device)
        return Exclude(place.unsqueeze(1) == torch.arange(len(self.place), device=self.device), None)

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Scales of maps and scores, as training finds them; once, where nothing is learned."""
        if not self.held_out or (self.calibrated and not self.steps.branches):
            return
        was_training = self.model.training
        self.model.eval()
        self.model._prepared = None
        paths = self._training_paths()
        held = [index for index, path in enumerate(paths) if path in self.held_out]
        kept = [index for index, path in enumerate(paths) if path not in self.held_out]
        # Places in the support pool are in the order of the images.
        pool = [row for row, index in enumerate(kept) if paths[index] in self.place]
        network = self.model.network

        def levels(index: int) -> list[Tensor]:
            return network.teacher(self._image(index))

        measure_normals(network, self.model.prepared(self.device), _Seen(kept, levels), _Seen(held, levels), pool)
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
