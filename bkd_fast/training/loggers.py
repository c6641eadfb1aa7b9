"""Experiment trackers: Lightning's loggers by name, or any logger that Lightning Fabric takes.

One command is one run of a tracker. Metrics of several categories have the category's name in front.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_fabric.utilities.rank_zero import rank_zero_only

from bkd_fast.errors import BKDError, check_choice
from bkd_fast.files import write_json

log = logging.getLogger("bkd_fast")
# What each logger needs besides lightning-fabric. The extra that installs it has the logger's name.
PACKAGES: dict[str, tuple[str, ...]] = {
    "csv": (),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "pytorch_lightning"),
    "wandb": ("wandb", "pytorch_lightning"),
}
FOLDER, RUNS = "loggers", "runs.json"  # in the run folder, and in that
PROJECT = "bkd_fast"
RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_loggers(loggers: Any) -> list[Any]:
    """Return one or several names or loggers as a list.

    Raises:
        BKDError: an unknown name, one given twice, something that is no logger, or a missing package.
    """
    given = [] if loggers is None else list(loggers) if isinstance(loggers, (list, tuple)) else [loggers]
    names = [each for each in given if isinstance(each, str)]
    for each in given:
        if isinstance(each, str):
            check_choice("a logger", each, tuple(PACKAGES))
            missing = [package for package in PACKAGES[each] if find_spec(package) is None]
            if missing:
                raise BKDError(f"the logger {each!r} needs the package {missing[0]}: pip install 'bkd_fast[{each}]'")
        elif not all(callable(getattr(each, method, None)) for method in ("log_metrics", "log_hyperparams")):
            raise BKDError(f"a logger of type {type(each).__name__}: expected Fabric's or one of {', '.join(PACKAGES)}")
    if len(set(names)) < len(names):
        raise BKDError(f"loggers are {', '.join(names)}: expected each name once")
    return given


class SafeLogger(Logger):
    """A logger that stops at its first error, with one warning, instead of ending the training.

    Args:
        logger: what does the work, in the first of several processes.
        label: its name in messages.
        owned: opened here, and so closed at the end; others are only flushed.
    """

    def __init__(self, logger: Any, label: str, *, owned: bool) -> None:
        self.logger, self.label, self.owned, self.failed = logger, label, owned, False

    @property
    def name(self) -> str | None:
        """The experiment's name."""
        return self.logger.name

    @property
    def version(self) -> int | str | None:
        """The run's number or id."""
        return self.logger.version

    @rank_zero_only
    def open(self, params: Mapping[str, Any] | None) -> None:
        """Start the run and log hyperparameters, unlike all else with the logger's own errors.

        A logger that takes no hyperparameters gets them as ``hparams.json`` in its folder.
        """
        if self.owned or params is None:
            getattr(self.logger, "experiment", None)  # which begins the run
        if params is None:
            return
        try:
            self.logger.log_hyperparams(dict(params))
        except NotImplementedError:  # Fabric's CSVLogger
            if self.logger.log_dir is not None:
                write_json(Path(self.logger.log_dir, "hparams.json"), params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics, unless the logger has failed before."""
        self._try(self.logger.log_metrics, dict(metrics), step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log hyperparameters, unless the logger has failed before."""
        self._try(self.logger.log_hyperparams, params, *args, **kwargs)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is buffered, and end a run that was opened here with ``success`` or ``failed``."""
        if not self.owned:
            self._try(getattr(self.logger, "save", lambda: None))
            return
        self._try(self.logger.finalize, status)
        if self.label == "wandb":  # its logger leaves the run open
            self._try(lambda: self.logger.experiment.finish(exit_code=int(status != "success")))

    def _try(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.failed:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:
            self.failed = True
            log.warning("the logger %s failed and logs no more; the work continues: %s", self.label, error)


@contextmanager
def open_loggers(
    loggers: Sequence[Any], folder: Path, params: Mapping[str, Any] | None = None, *, begun: Path | None = None
) -> Iterator[list[SafeLogger]]:
    """Yield loggers that take metrics, and finalize them at the end.

    Args:
        loggers: names and loggers, checked by :func:`check_loggers`.
        folder: the run folder; what loggers write to this machine is in ``loggers/`` there.
        params: hyperparameters; None: these are further results of a run.
        begun: the run folder whose tracker runs are continued; None: ``folder``.

    Raises:
        BKDError: a logger cannot be opened: a server that does not answer, a missing login.
    """
    runs = _read_runs((begun or folder) / FOLDER / RUNS)
    fresh = not (folder / FOLDER).exists()
    opened: list[SafeLogger] = []
    status, opening = "failed", True
    try:
        for each in loggers:
            named = isinstance(each, str)
            label = each if named else type(each).__name__
            try:
                opened.append(SafeLogger(_named(each, folder, runs) if named else each, label, owned=named))
                opened[-1].open(params)
            except Exception as error:
                raise BKDError(f"the logger {label} cannot be opened: {error}. Fix that or leave it out") from error
        kept = {
            logger.label: logger.version for logger in opened if logger.owned and logger.label in ("mlflow", "wandb")
        }
        if kept:
            write_json(folder / FOLDER / RUNS, {**runs, **kept})
        opening = False
        yield opened
        status = "success"
    finally:
        for logger in opened:
            logger.finalize(status)
        if opening and fresh:  # the same command, mended, finds the run folder as empty as before
            shutil.rmtree(folder / FOLDER, ignore_errors=True)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory in GB (1e9 bytes): the process's so far, and on a GPU the allocator's since its reset."""
    memory = {}
    if sys.platform != "win32":
        import resource  # which Windows does not have

        unit = 1 if sys.platform == "darwin" else 1024
        memory["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    if device.type == "cuda":
        memory["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return memory


def _named(name: str, folder: Path, runs: Mapping[str, str]) -> Any:
    """Return one of Lightning's loggers, set up as its tracker's own environment variables say."""
    place = folder.resolve() / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    if name == "csv":
        return CSVLogger(place, name=name)
    if name == "tensorboard":
        return TensorBoardLogger(place, name=name, version="")
    if name == "mlflow":
        from pytorch_lightning.loggers import MLFlowLogger  # here: it imports all of Lightning

        return MLFlowLogger(
            os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
            run_name=place.parent.name,
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place / 'mlflow.db'}",
            run_id=runs.get(name),
        )
    from pytorch_lightning.loggers import WandbLogger

    return WandbLogger(
        place.parent.name,
        save_dir=place,
        id=runs.get(name) or secrets.token_hex(8),
        project=os.environ.get("WANDB_PROJECT", PROJECT),
    )


def _read_runs(path: Path) -> dict[str, str]:
    """Return the ids of the tracker runs that a run folder began.

    Raises:
        BKDError: a file that was altered; ids go to a server.
    """
    if not path.is_file():
        return {}
    try:
        runs = json.loads(path.read_bytes())
        if all(name in PACKAGES and RUN_ID.fullmatch(run) for name, run in runs.items()):
            return runs
    except (ValueError, RecursionError, TypeError, AttributeError):
        pass
    raise BKDError(f"{path} does not hold the ids of tracker runs: delete it to log into new runs")
