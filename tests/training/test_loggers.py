"""Experiment trackers: what they get, what happens to the training when they fail, and how later results join a run."""

import csv
import json
import logging
import sys

import numpy as np
import pytest
from lightning_fabric.loggers import CSVLogger, Logger
from PIL import Image
from test_training import assert_same_weights, train_until

from bkd_fast.artifact import load_trained, read_category
from bkd_fast.cli import main
from bkd_fast.cli.options import LOGGERS
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.evaluate import evaluate
from bkd_fast.evaluation.metrics import METRIC_NAMES
from bkd_fast.training.checkpoint import read_log
from bkd_fast.training.loggers import PACKAGES, SafeLogger, check_loggers, open_loggers
from bkd_fast.training.train import train

PARTS = {"seconds/features", "seconds/training", "seconds/thresholds"}


class Memory(Logger):
    """A logger that keeps what it gets, and fails from call ``broken`` on."""

    name = version = "memory"

    def __init__(self, broken=None):
        self.params, self.rows, self.calls, self.broken, self.saved = None, [], 0, broken, 0

    def log_hyperparams(self, params):
        self.params = params

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        if self.broken is not None and self.calls >= self.broken:
            raise ConnectionError("the server is gone")
        self.rows.append((step, metrics))

    def save(self):
        self.saved += 1

    def series(self, name):
        return {step: metrics[name] for step, metrics in self.rows if name in metrics}


def test_the_command_line_offers_every_logger():
    assert tuple(PACKAGES) == LOGGERS


def csv_rows(folder):
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_logger_gets_configuration_steps_parts_and_thresholds(tiny_data, tiny_config, tiny_run, tmp_path):
    logger = Memory()
    run = train(tiny_data, tmp_path / "run", tiny_config, loggers=logger)
    assert_same_weights(run, tiny_run)
    assert logger.params["training"] == load_trained(run).config.to_dict()["training"]
    assert logger.params["dataset"] == str(tiny_data.resolve())
    losses, rows = logger.series("loss/total"), read_log(run / "log.csv")
    steps = len(losses) // len(rows)
    assert list(losses) == list(range(1, len(losses) + 1))
    for epoch, row in enumerate(rows):
        part = [losses[step] for step in range(epoch * steps + 1, (epoch + 1) * steps + 1)]
        assert sum(part) / steps == pytest.approx(row["total"])
        assert logger.series("loss/validation")[(epoch + 1) * steps] == row["validation_loss"]
        assert logger.series("learning_rate")[(epoch + 1) * steps] == row["learning_rate"]
    names = {name for _, metrics in logger.rows for name in metrics}
    assert names >= PARTS
    assert all(value > 0 for name in PARTS for value in logger.series(name).values())
    if sys.platform != "win32":
        assert 0.05 < max(logger.series("memory_gb/thresholds").values()) < 1000
    calibration = read_category(run).calibration
    assert logger.series("threshold") == {len(losses): calibration.threshold}
    assert logger.series("pixel_threshold") == {len(losses): calibration.pixel_threshold}
    assert logger.saved == 1


def test_a_run_that_is_not_trained_by_gradients_has_no_losses(tiny_data, tiny_default, tmp_path):
    logger = Memory()
    train(tiny_data, tmp_path / "run", tiny_default, loggers=[logger])
    names = {name for _, metrics in logger.rows for name in metrics}
    assert "threshold" in names
    assert {"seconds/features", "seconds/thresholds"} <= names
    assert not any(name.startswith(("loss", "learning_rate", "seconds/training")) for name in names)


@pytest.mark.parametrize("broken", [1, 2, 4])
def test_a_logger_that_fails_is_named_once_and_loses_nothing(
    broken, tiny_data, tiny_config, tiny_run, tmp_path, caplog
):
    failing, whole = Memory(broken), Memory()
    with caplog.at_level(logging.WARNING, "bkd_fast"):
        run = train(tiny_data, tmp_path / "run", tiny_config, loggers=[failing, whole])
    assert_same_weights(run, tiny_run)
    (warning,) = [record.getMessage() for record in caplog.records if "logger" in record.getMessage()]
    assert "Memory" in warning
    assert "the server is gone" in warning
    assert failing.calls == broken  # it is not asked again
    assert len(failing.rows) == broken - 1
    assert len(whole.rows) > 5


def test_several_categories_are_told_apart(make_category, tiny_default, tmp_path):
    for name in ("one", "two"):
        make_category(tmp_path / "data" / name)
    for path in (tmp_path / "data/two/train/good").iterdir():  # a 12-bit camera
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16).save(path)
    logger = Memory()
    run = train(tmp_path / "data", tmp_path / "run", tiny_default, loggers=logger)
    for name in ("one", "two"):
        (value,) = logger.series(f"{name}/threshold").values()
        assert value == read_category(run / name).calibration.threshold
    assert logger.params["categories"] == {"two": {"data": load_trained(run / "two").config.to_dict()["data"]}}
    assert logger.params["categories"]["two"]["data"]["integer_white"] == 4095
    results = Memory()
    metrics = evaluate(run, pictures=False, loggers=results)
    ((step, logged),) = results.rows
    assert step == 0
    assert logged["mean/evaluation/image_auroc"] == metrics["mean"]["image_auroc"]
    assert logged["two/evaluation/aupro"] == metrics["categories"]["two"]["aupro"]
    assert logged["one/evaluation/recall"] == metrics["categories"]["one"]["decisions"]["recall"]


def test_csv_files_from_the_command_line(tiny_data, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--teacher", "test_resnet", "--weights", "none", "--image-size", "64", "--set", "memory.items=16"]
    assert main(["train", str(tiny_data), "--out", str(out), *options, "--logger", "csv"]) == 0
    folder = out / "loggers" / "csv"
    (threshold,) = [row["threshold"] for row in csv_rows(folder / "version_0") if "threshold" in row]
    assert threshold == read_category(out).calibration.threshold
    kept = json.loads((folder / "version_0" / "hparams.json").read_text())
    assert kept["memory"]["items"] == 16
    assert main(["evaluate", str(out), "--logger", "csv"]) == 0  # a further file
    (row,) = csv_rows(folder / "version_1")
    metrics = json.loads((out / "metrics.json").read_text())["categories"]["tile"]
    assert {name: row[f"evaluation/{name}"] for name in METRIC_NAMES} == {name: metrics[name] for name in METRIC_NAMES}
    assert len(csv_rows(folder / "version_0")) > 1  # as it was


def test_tensorboard_reads_what_was_logged(tiny_data, tiny_config, tiny_run, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    train_until(2, monkeypatch, tiny_data, out, tiny_config, loggers="tensorboard")
    train(tiny_data, out, tiny_config, loggers="tensorboard", resume=True)
    assert_same_weights(out, tiny_run)
    evaluate(out, pictures=False, loggers=["tensorboard"])
    events = EventAccumulator(str(out / "loggers" / "tensorboard")).Reload()
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    memory = Memory()
    train(tiny_data, tmp_path / "again", tiny_config, loggers=memory)
    for name in ("loss/total", "learning_rate", "threshold"):
        assert scalars[name] == pytest.approx(memory.series(name), rel=1e-6), name
    metrics = json.loads((out / "metrics.json").read_text())["categories"]["tile"]
    assert scalars["evaluation/image_auroc"] == pytest.approx({0: metrics["image_auroc"]})
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"training/learning_rate" in content


def test_mlflow_keeps_one_run(tiny_data, tiny_default, tmp_path, monkeypatch):
    for package in PACKAGES["mlflow"]:
        pytest.importorskip(package, reason="the extra mlflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = train(tiny_data, tmp_path / "run", tiny_default, loggers="mlflow")
    metrics = evaluate(run, pictures=False, loggers="mlflow")["categories"]["tile"]
    client = MlflowClient(f"sqlite:///{run / 'loggers' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("bkd_fast")
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.info.status == "FINISHED"
    assert kept.data.tags["mlflow.runName"] == "run"
    assert kept.data.params["memory/items"] == "16"
    assert kept.data.metrics["threshold"] == read_category(run).calibration.threshold
    assert kept.data.metrics["evaluation/image_auroc"] == metrics["image_auroc"]


def test_wandb_offline_keeps_one_run(tiny_data, tiny_default, tmp_path, monkeypatch):
    for package in PACKAGES["wandb"]:
        pytest.importorskip(package, reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train(tiny_data, tmp_path / "run", tiny_default, loggers="wandb")
    evaluate(run, pictures=False, loggers="wandb")
    kept = json.loads((run / "loggers" / "runs.json").read_text())["wandb"]
    folders = list((run / "loggers" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2  # `wandb sync` puts both into one run
    assert all(folder.name.endswith(f"-{kept}") for folder in folders)
    assert all(list(folder.glob("*.wandb")) for folder in folders)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_refused_before_anything(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, PACKAGES[name][0], None)
    with pytest.raises(BKDError, match=rf"pip install 'bkd_fast\[{name}\]'"):
        train(tmp_path / "nothing", tmp_path / "run", loggers=["csv", name])
    assert main(["train", str(tmp_path), "--out", str(tmp_path / "run"), "--logger", name]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"bkd_fast[{name}]" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [("comet", "'csv'.*'wandb'"), (["csv", "csv"], "once"), ([3], "type int"), (object(), "type object")],
)
def test_what_is_no_logger_is_refused(given, message):
    with pytest.raises(BKDError, match=message):
        check_loggers(given)


def test_a_logger_that_cannot_be_opened_leaves_nothing(tiny_data, tiny_default, tmp_path, monkeypatch):
    def refused(self, params):
        raise ConnectionError("no route to the server")

    monkeypatch.setattr(Memory, "log_hyperparams", refused)
    with pytest.raises(BKDError, match=r"Memory cannot be opened.*no route"):
        train(tiny_data, tmp_path / "run", tiny_default, loggers=["csv", Memory()])
    assert not any((tmp_path / "run").iterdir())
    train(tiny_data, tmp_path / "run", tiny_default, loggers="csv")  # the same command, mended, without resume


def test_altered_ids_of_runs_are_refused(tmp_path):
    folder = tmp_path / "loggers"
    folder.mkdir()
    for text in ('{"mlflow": "../../x"}', '{"mlflow": 3}', "[]", "{", '{"other": "a"}'):
        (folder / "runs.json").write_text(text)
        with pytest.raises(BKDError, match=r"runs\.json"), open_loggers(["csv"], tmp_path):
            pass


def test_loggers_end_with_how_the_work_ended(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(CSVLogger, "finalize", lambda self, status: ended.append(status))
    with open_loggers(["csv"], tmp_path, {"a": 1}) as (logger,):
        assert isinstance(logger, SafeLogger)
    with pytest.raises(KeyboardInterrupt), open_loggers(["csv"], tmp_path, {"a": 1}):
        raise KeyboardInterrupt
    assert ended == ["success", "failed"]
