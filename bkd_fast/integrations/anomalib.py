"""BKD as an anomalib model: trained by its ``Engine``, with its data modules, metrics, visualiser and command line.

Needs the extra ``anomalib``. ``Engine().train(model=Bkd(teacher="tf_efficientnet_lite0"), datamodule=Folder(…))``, or
``anomalib train --model bkd_fast.integrations.anomalib.Bkd --data …``. Once this module is imported,
``anomalib.models.get_model("bkd")`` finds it.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.export import Dim
from torchvision.transforms.v2 import Compose, Normalize, Resize, Transform

from bkd_fast.artifact import Calibration, load_trained
from bkd_fast.config import SIZE, BKDConfig, SampledSupport, TeacherConfig
from bkd_fast.data import draw_support
from bkd_fast.errors import BKDError, few
from bkd_fast.export.formats import OPSET, RUNTIME, check_packages, keep_float32
from bkd_fast.export.graph import ExportedModel
from bkd_fast.export.plain import plain
from bkd_fast.model import BKD
from bkd_fast.model.calibration import learn_normal
from bkd_fast.model.support import Exclude, Support
from bkd_fast.model.teacher import Weights, with_image_size
from bkd_fast.normals.thresholds import measure_normals
from bkd_fast.training.step import TrainingStep, make_optimizer
from bkd_fast.training.weights import load_weights

log = logging.getLogger("bkd_fast")
IMAGES = "bkd_fast_images"  # of a checkpoint: what :meth:`Bkd.on_fit_start` chose


class ResizeProcessor(PreProcessor):
    """anomalib's pre-processor, except that exported models resize with antialiasing too, as the Engine does."""

    def forward(self, batch: Tensor) -> Tensor:
        """Return images (N, 3, H, W) of any size as the network takes them."""
        if not torch.compiler.is_compiling():
            return batch if self.transform is None else self.transform(batch)
        own, exported = _steps(self.transform), _steps(self.export_transform)
        for step, replacement in zip(own, exported, strict=True):
            resizes = isinstance(step, Resize) and step.antialias and len(step.size or ()) == 2
            batch = _resize(batch, tuple(step.size)) if resizes else replacement(batch)
        return batch


class NormalPostProcessor(PostProcessor):
    """Labels by thresholds from normal images, and scores from 0 to 1 with the threshold at 0.5.

    anomalib's own takes its thresholds from labelled validation images, by default some of the test images, and clips
    scores to the range of these. Here ``training.false_alarms`` sets the thresholds, validation images change nothing,
    and no two scores become equal: ``0.5 + 0.5 x / (1 + |x|)``, x the distance from the threshold in units of the std
    of normal images (``image_max - image_min``, ``pixel_max - pixel_min``).

    Args:
        image_sensitivity, pixel_sensitivity: an image or a pixel is anomalous if its score is above one less this.
    """

    def __init__(self, image_sensitivity: float = 0.5, pixel_sensitivity: float = 0.5) -> None:
        super().__init__(image_sensitivity=image_sensitivity, pixel_sensitivity=pixel_sensitivity)

    def set_calibration(self, calibration: Calibration) -> None:
        """Take over the thresholds of a run or of a training."""
        for kind, threshold, values in (
            ("image", calibration.threshold, calibration.scores),
            ("pixel", calibration.pixel_threshold, calibration.maxima),
        ):
            self.get_buffer(f"_{kind}_threshold").fill_(threshold)
            self.get_buffer(f"{kind}_min").fill_(0.0)
            # Of one image there is no std.
            self.get_buffer(f"{kind}_max").fill_(float(np.std(values)) or 1.0)

    def checkpoint_config(self) -> dict[str, Any]:
        """Return what anomalib keeps, and which class it is of."""
        return {**super().checkpoint_config(), "class": type(self).__name__}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore what :meth:`checkpoint_config` returned.

        Raises:
            BKDError: the checkpoint has another post-processor, whose numbers mean something else.
        """
        if config.get("class") != type(self).__name__:
            raise BKDError("the checkpoint was made with another post-processor: pass the same one as post_processor=…")
        super().load_checkpoint_config(config)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Change nothing: thresholds do not come from validation images."""

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Change nothing."""

    @staticmethod
    def _normalize(preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        if preds is None:
            return None
        distance = (preds - threshold) / (norm_max - norm_min)
        return 0.5 + 0.5 * distance / (1 + distance.abs())


class BkdModel(nn.Module):
    """The network and its support: what is in a checkpoint, and what predicts."""

    def __init__(self, config: BKDConfig, *, weights: Weights | None) -> None:
        super().__init__()
        self.network = BKD(config, weights=weights)
        self.support_levels: list[Tensor] = []  # per level (1, P, C, H, W), float16
        self._support: tuple[torch.device, Support] | None = None

    @torch.no_grad()
    def forward(self, images: Tensor) -> InferenceBatch:
        """(N, 3, H, W) in [0, 1], of the network's size -> raw scores (N, 1) and anomaly maps (N, 1, H, W).

        Raises:
            BKDError: images of another size, or a model that was not trained.
        """
        size = self.network.config.teacher.size
        if tuple(images.shape[1:]) != (3, *size):
            raise BKDError(
                f"the images are {tuple(images.shape)}: expected (N, 3, {size[0]}, {size[1]}). Leave the pre-processor "
                "as it is, or set the size, settings={'teacher.image_size': (H, W)}"
            )
        if self.network.config.forward_branch and not self.support_levels:
            raise BKDError("the model is not trained: call Engine.fit, load a checkpoint, or pass run=…")
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_support": None}  # which is made of support_levels

    def get_extra_state(self) -> dict[str, Any]:
        """Return the support, which is neither parameter nor buffer."""
        return {"support": self.support_levels}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Set what :meth:`get_extra_state` returned."""
        self.set_support(state["support"])


class _Exported(nn.Module):
    """What a model computes of images (N, 3, H, W) of any size, with its support inside."""

    def __init__(self, model: Bkd) -> None:
        super().__init__()
        self.pre_processor, self.post_processor = model.pre_processor, model.post_processor
        self.network = ExportedModel(model.model.network, model.model.support(model.device))

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return the fields of anomalib's ``InferenceBatch`` that are not None."""
        images = self.pre_processor(input) if self.pre_processor else input
        scores, maps = self.network(images)
        result = InferenceBatch(pred_score=scores.unsqueeze(1), anomaly_map=maps.unsqueeze(1))
        if self.post_processor:
            result = self.post_processor(result)
        return tuple(value for value in result if value is not None)


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
    them. Support and memory come from the others. Statistics, support, memory and thresholds see the training images
    with the data module's test augmentations, what is learned by gradients with its training augmentations.

    Args:
        teacher: any timm backbone (see :class:`bkd_fast.BKDConfig`).
        preset: ``default``, ``paper`` or ``rd4ad``.
        settings: any other option of :class:`bkd_fast.BKDConfig`, as in ``{"memory.items": 500}``. Epochs and
            batch size are the Engine's and the data module's.
        run: a run folder that bkd_fast trained; the arguments before are then not needed, and nothing is left to train.
        pre_processor: True resizes to ``teacher.image_size``; one of your own sets it. It must not normalise, which the
            teacher does.
        post_processor: True takes thresholds from normal images (:class:`NormalPostProcessor`); anomalib's
            ``PostProcessor()`` takes them from its validation images.
        evaluator, visualizer: anomalib's.

    Raises:
        BKDError: a wrong setting, missing weights, an unreadable run, or one that sees images as anomalib does not: in
            tiles, or of more than 8 bits.
    """

    model: BkdModel

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
        if trained is not None and trained.unified is not None:
            raise BKDError(f"{run} is one model of several categories: predict with bkd_fast.Detector")
        config = BKDConfig.preset(preset, {"teacher.name": teacher, **(settings or {})})
        size = _checked_size(pre_processor)
        if trained is None and config.roi is not None:
            raise BKDError("a region of interest is learned by `bkd-fast train --roi MASK`: pass its run")
        if trained is not None:
            config = trained.config
            if config.roi is not None and trained.roi is None:
                raise BKDError(f"{run} has a mask for each image, and anomalib none: predict with bkd_fast.Detector")
        elif config.teacher.image_size is None and size is not None:
            config = config.with_changes({"teacher.image_size": size})
        config = config.with_changes(teacher=with_image_size(config.teacher))
        _check_reading(config)
        if size not in (None, config.teacher.size):
            raise BKDError(f"the pre-processor resizes to {size}, and teacher.image_size is {config.teacher.size}")
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(config.teacher.size)
        elif type(pre_processor) is PreProcessor:
            pre_processor = ResizeProcessor(pre_processor.transform)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.config = config
        weights = load_weights(config.teacher) if trained is None else None
        self.model = BkdModel(config, weights=weights)
        if trained is not None:
            self.model.network = trained.model
            self.model.set_support(trained.support)
            self._set_thresholds(trained.calibration)
        self.images: list[str] = []  # that it learned from, validation images included
        self.index_in_bank: dict[str, int] = {}  # of training images in the support bank
        self.validation: set[str] = set()
        self.fixed = trained is not None  # nothing is left to train
        self.calibrated = False  # whether scales and thresholds are those of the weights of now

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Return the default pre-processor: resized to ``image_size`` (256 x 256), not normalised."""
        return ResizeProcessor(Compose([Resize(image_size or SIZE, antialias=True)]))

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Return the default post-processor: thresholds from normal images."""
        return NormalPostProcessor()

    def on_fit_start(self) -> None:
        """Compute statistics, memory and support from the training images.

        Raises:
            BKDError: fewer than two images, or others than those that this model learned from.
        """
        paths = self._training_paths()
        if self.images and sorted(paths) != sorted(self.images):
            raise BKDError(
                f"the model learned from {len(self.images)} images ({few(sorted(self.images), count=2)}), and the data "
                f"module has {len(paths)} ({few(sorted(paths), count=2)}): resume with the same, or make a new Bkd"
            )
        if self.images or self.fixed:
            return
        if len(paths) < 2:
            raise BKDError(f"the data module has {len(paths)} training images: expected at least two")
        generator = torch.Generator().manual_seed(self.config.training.seed)
        held = max(1, round(self.config.training.validation_share * len(paths)))
        order = torch.randperm(len(paths), generator=generator).tolist()
        kept = sorted(order[held:])
        network = self.model.network
        levels = (network.teacher.raw(self._image(index)) for index in kept)
        chosen = learn_normal(network, levels, len(kept), generator)
        if self.config.support is not None:
            if self.config.retrieves:
                self.index_in_bank = {paths[kept[index]]: number for number, index in enumerate(chosen)}
            else:
                chosen = draw_support(len(kept), min(self.config.support.shots, len(kept)), generator)
            support = [network.teacher(self._image(kept[index])) for index in chosen]
            self.model.set_support([torch.cat(level).unsqueeze(0) for level in zip(*support, strict=True)])
        self.images, self.validation = paths, {paths[index] for index in order[:held]}

    def configure_optimizers(self) -> Any:
        """Adam with a rate for the offsets of their own, following a cosine; none where nothing is learned."""
        if not self.learned:
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
        if not rows or not self.learned:
            return None
        query = self.model.network.teacher(batch.image[rows])
        support = self.model.support(self.device, frozen=False)
        self.calibrated = False
        losses, _ = TrainingStep(self.model.network)(query, support, self._exclude([paths[row] for row in rows]))
        for name, loss in losses.items():
            self.log(f"train_{name}_loss", loss.item(), on_epoch=True, prog_bar=name == "total", batch_size=len(rows))
        return {"loss": losses["total"]}

    def on_validation_start(self) -> None:
        """Scales and thresholds of the weights of now, for the validation that follows."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._calibrate()

    def on_train_epoch_end(self) -> None:
        """The same where there was no validation, before the checkpoint of the epoch is written."""
        self._calibrate()

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """Scores and maps of a batch."""
        return batch.update(**self.model(batch.image)._asdict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint whole: it needs no run folder and no file of weights to be loaded."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = {
            "teacher": self.config.teacher.name,
            "preset": "default",
            "settings": self._settings(),
            "run": None,
        }
        checkpoint[IMAGES] = {
            "images": self.images,
            "fixed": self.fixed,
            "index_in_bank": self.index_in_bank,
            "validation": sorted(self.validation),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of :meth:`on_save_checkpoint`.

        Raises:
            BKDError: a checkpoint of a model with other options (named; those of ``training`` may differ), or one that
                is not of a ``Bkd``.
        """
        if IMAGES not in checkpoint:
            raise BKDError("the checkpoint is not of a Bkd model: expected one that anomalib's Engine wrote for it")
        saved, own = checkpoint["hyper_parameters"]["settings"], self._settings()
        different = sorted(name for name in own if name != "training" and saved.get(name) != own[name])
        if different:
            changes = ", ".join(f"{name} ({saved.get(name)} there, {own[name]} here)" for name in different)
            raise BKDError(f"the checkpoint has other options than this Bkd: {changes}. Pass the same")
        super().on_load_checkpoint(checkpoint)
        chosen = checkpoint[IMAGES]
        self.images, self.fixed, self.index_in_bank = chosen["images"], chosen["fixed"], chosen["index_in_bank"]
        self.validation = set(chosen["validation"])

    def to_onnx(  # type: ignore[override]  # of anomalib, where Lightning has another
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Write ``weights/onnx/<model_file_name>.onnx``, of standard operators alone.

        The file holds the pre- and post-processor, and computes what the Engine does within rounding.

        Args:
            input_size: (H, W) of the images; None: any. The number of images in a batch is free.
            kwargs: of ``torch.onnx.export``.

        Raises:
            BKDError: onnx or onnxscript is missing, or an option that sets other dynamic axes.
        """
        check_packages("onnx")
        if other := sorted({"dynamic_axes", "dynamic_shapes"} & kwargs.keys()):
            raise BKDError(f"{other[0]} cannot be set: pass input_size=(H, W) for images of one size, or leave it out")
        kwargs.pop("dynamo", None)  # always
        self.eval()
        size = self.config.teacher.size
        side = input_size or (size[0] + 1, size[1] + 2)  # two sizes that are not equal by chance
        axes = {0: Dim("batch", min=1)} | ({} if input_size else {2: Dim("height", min=2), 3: Dim("width", min=2)})
        images = torch.rand(2, 3, *side, device=self.device)
        with torch.no_grad():
            names = [name for name, value in self(images)._asdict().items() if value is not None]
            program = torch.export.export(_Exported(self).eval(), (images,), dynamic_shapes=(axes,))
        path = Path(export_root, "weights", "onnx", f"{model_file_name}.onnx")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.onnx.export(
            plain(program),
            (),
            path,
            dynamo=True,
            **{"opset_version": OPSET, "input_names": ["input"], "output_names": names, "verbose": False, **kwargs},
        )
        return path

    def to_openvino(  # type: ignore[override]  # the rest is passed on
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        **kwargs: Any,
    ) -> Path:
        """Write anomalib's OpenVINO files.

        On CPUs with bfloat16 OpenVINO would compute in it, which moves scores and maps. Unless quantised, the layers
        are marked as float32; those that OpenVINO makes of them need
        ``OpenVINOInferencer(path, config={"INFERENCE_PRECISION_HINT": "f32"})``, which a warning says.
        """
        check_packages("openvino")
        path = super().to_openvino(export_root, model_file_name, input_size, compression_type, **kwargs)
        if compression_type in (None, CompressionType.FP16):
            keep_float32(path)
            log.warning(
                "%s: on a CPU with bfloat16, pass OpenVINOInferencer config=%s, or scores are rounded",
                path, RUNTIME["openvino"],
            )  # fmt: skip
        return path

    @property
    def learned(self) -> tuple[str, ...]:
        """The branches that gradients train; none in a model that a run has trained."""
        return () if self.fixed else self.model.network.learned_branches()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass where nothing is learned; no validation before there are statistics; gradients clipped as set."""
        return {
            "num_sanity_val_steps": 0,
            "gradient_clip_val": self.config.training.clip_norm,
            "devices": 1,
            **({} if self.learned else {"max_epochs": 1}),
        }

    @property
    def learning_type(self) -> LearningType:
        """One class: normal images."""
        return LearningType.ONE_CLASS

    def _settings(self) -> dict[str, Any]:
        """The configuration as plain values; a checkpoint has the teacher's weights."""
        settings = self.config.to_dict()
        settings["teacher"]["weights"] = "none"
        return settings

    def _set_thresholds(self, calibration: Calibration) -> None:
        if isinstance(self.post_processor, NormalPostProcessor):
            self.post_processor.set_calibration(calibration)

    def _exclude(self, paths: Sequence[str]) -> Exclude | None:
        """A training image is not its own support."""
        if not self.index_in_bank:
            return None
        own = torch.tensor([self.index_in_bank.get(path, -1) for path in paths], device=self.device)
        return Exclude(own.unsqueeze(1) == torch.arange(len(self.index_in_bank), device=self.device), None)

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Set scales and thresholds as training does, unless they are of the weights of now."""
        if not self.validation or self.calibrated:
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

        measured = measure_normals(
            network, self.model.support(self.device), _Seen(kept, levels), _Seen(held, levels), bank
        )
        rate = self.config.training.false_alarms
        self._set_thresholds(Calibration.of(measured.scores, measured.normal_level, rate, measured.teacher))
        self.model._support = None  # with what was measured of its images
        self.calibrated = True
        self.model.train(was_training)

    def _image(self, index: int) -> Tensor:
        """Return a training image as the network sees test images, (1, 3, H, W)."""
        image = self._training_data()[index].image.unsqueeze(0).to(self.device)
        if isinstance(self.pre_processor, PreProcessor):
            return image if self.pre_processor.transform is None else self.pre_processor.transform(image)
        return self.pre_processor(image) if self.pre_processor else image

    def _training_paths(self) -> list[str]:
        return [str(path) for path in self._training_data().samples.image_path]

    def _training_data(self) -> Any:
        """Return the training images with the test images' augmentations."""
        module = getattr(self.trainer, "datamodule", None)
        data = getattr(module, "train_data", None)
        if data is None:
            raise BKDError("Bkd learns from the images of an anomalib data module: pass datamodule=…, not data loaders")
        data = copy.copy(data)
        data.augmentations = getattr(getattr(module, "test_data", data), "augmentations", None)
        return data


def _checked_size(pre_processor: PreProcessor | bool) -> tuple[int, int] | None:
    """Return the size (H, W) that a pre-processor of the user's resizes to, None where it leaves that open.

    Raises:
        BKDError: it normalises.
    """
    transform = getattr(pre_processor, "transform", None)
    if transform is None:
        return None
    if any(isinstance(step, Normalize) for step in _steps(transform)):
        raise BKDError("the pre-processor normalises, and so does Bkd's teacher: leave Normalize out")
    shape = transform(torch.zeros(1, 3, 1, 1)).shape[-2:]
    return None if tuple(shape) == (1, 1) else (shape[0], shape[1])


def _check_reading(config: BKDConfig) -> None:
    """Refuse what only bkd_fast's own reading of images does."""
    if config.teacher.tile is not None:
        raise BKDError(f"teacher.tile is {config.teacher.tile}: anomalib has none, predict with bkd_fast.Detector")
    for name in ("integer_white", "float_white"):
        if getattr(config.data, name) is not None:
            given = f"data.{name} is {getattr(config.data, name)}"
            raise BKDError(f"{given}, which anomalib's reader does not know: predict with bkd_fast.Detector")


def _steps(transform: Transform | None) -> Iterator[Transform]:
    """Yield the transforms of which one is composed."""
    for step in () if transform is None else getattr(transform, "transforms", [transform]):
        yield from _steps(step) if hasattr(step, "transforms") else (step,)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images (N, 3, H, W) at ``size``, antialiased: what ``interpolate`` does, in operators of any run-time."""
    height, width = images.shape[-2:]
    if isinstance(height, int) and isinstance(width, int) and (height, width) == size:
        return images
    rows, columns = (_weights(length, side, images.device) for length, side in zip((height, width), size, strict=True))
    return rows @ images @ columns.T


def _weights(length: int, side: int, device: torch.device) -> Tensor:
    """Return the weights (side, length) of an antialiased bilinear resize from ``length`` to ``side`` pixels."""
    positions = torch.arange(length, device=device) + 0.5
    scale = (positions[-1] + 0.5) / side  # a tensor: an exported graph's length is free
    centers = (torch.arange(side, device=device) + 0.5) * scale
    weights = (1 - (positions - centers.unsqueeze(1)).abs() / scale.clamp_min(1)).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)
