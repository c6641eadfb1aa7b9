"""Training: learning, exact resume, interruption, failure, and processes side by side."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import rows_of

from bkd_fast.artifact import DataSource, load_trained
from bkd_fast.config import BKDConfig
from bkd_fast.data import load_image
from bkd_fast.errors import BKDError
from bkd_fast.inference.detector import Detector
from bkd_fast.model import BKD
from bkd_fast.model.teacher import Teacher
from bkd_fast.training import trainer
from bkd_fast.training.checkpoint import Progress, load_checkpoint, read_log
from bkd_fast.training.sampler import Schedule
from bkd_fast.training.step import make_optimizer
from bkd_fast.training.train import train

SAMPLED = {"support": "sampled", "support.aggregation": "mean"}


def weights(run):
    return load_file(run / "model.safetensors")


def losses_of(run):
    return [row["total"] for row in read_log(run / "log.csv")]


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def train_until(step, monkeypatch, *arguments, **options):
    """Trains until Ctrl-C arrives in the given step."""
    left = [step]
    original = trainer.TrainingStep.forward

    def forward(module, *levels):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return original(module, *levels)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.TrainingStep, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            train(*arguments, **options)


def test_the_run_folder_holds_what_it_should(tiny_run, tiny_config):
    names = {path.name for path in tiny_run.iterdir()}
    assert {"manifest.json", "config.toml", "model.safetensors", "support", "log.csv"} <= names
    assert "checkpoint.safetensors" not in names
    assert len(list((tiny_run / "support").iterdir())) == 8  # all there are to learn from
    manifest = json.loads((tiny_run / "manifest.json").read_text())
    assert BKDConfig.from_toml((tiny_run / "config.toml").read_text()) == tiny_config
    assert not set(manifest["source"]["train_files"]) & set(manifest["source"]["validation_files"])
    rows = rows_of(tiny_run, "log.csv")
    assert [float(row["epoch"]) for row in rows] == [1, 2]
    assert {"forward", "offset_1", "max_offset_2", "validation_loss", "learning_rate"} <= rows[0].keys()
    assert "reverse" not in rows[0]  # what is not learned is not in the loss
    calibration = manifest["calibration"]
    assert (calibration["source"], len(calibration["scores"]), len(calibration["maxima"])) == ("leave-one-out", 10, 10)
    assert calibration["threshold"] == calibration["scores"][-1] == max(calibration["scores"])


@pytest.mark.parametrize(
    ("kind", "rate", "branches"),
    [("tiny_config", 0.005, ["forward"]), ("tiny_student", 0.002, ["forward", "reverse"])],
)
def test_training_lowers_every_loss(kind, rate, branches, request, tiny_data, tmp_path):
    config = request.getfixturevalue(kind).with_changes({"training.epochs": 15, "training.learning_rate": rate})
    rows = read_log(train(tiny_data, tmp_path / "run", config) / "log.csv")
    for branch in branches:
        assert sum(row[branch] for row in rows[-3:]) < 0.9 * sum(row[branch] for row in rows[:3])


@pytest.mark.parametrize("kind", ["tiny_run", "tiny_default_run", "tiny_student_run"])
def test_training_twice_gives_the_same_bits(kind, request, tiny_data, tmp_path):
    run = request.getfixturevalue(kind)
    again = train(tiny_data, tmp_path / "again", load_trained(run).config)
    assert_same_weights(again, run)
    assert load_trained(again).calibration == load_trained(run).calibration


@pytest.mark.parametrize(("step", "kind"), [(1, "tiny_run"), (2, "tiny_run"), (3, "tiny_run"), (2, "tiny_student_run")])
def test_an_interrupted_run_resumes_exactly(step, kind, request, tiny_data, tmp_path, monkeypatch):
    out, run = tmp_path / "run", request.getfixturevalue(kind)
    config = load_trained(run).config
    train_until(step, monkeypatch, tiny_data, out, config)
    assert (out / "checkpoint.safetensors").is_file()
    assert not (out / "manifest.json").exists()
    assert_same_weights(train(tiny_data, out, config, resume=True), run)
    assert not (out / "checkpoint.safetensors").exists()
    # Both logs hold the same means over whole epochs.
    assert losses_of(out) == losses_of(run)
    assert load_trained(out).calibration == load_trained(run).calibration


def test_resuming_with_another_configuration_names_the_field(tiny_data, tiny_config, tmp_path, monkeypatch):
    train_until(2, monkeypatch, tiny_data, tmp_path / "run", tiny_config)
    with pytest.raises(BKDError, match="learning_rate"):
        train(tiny_data, tmp_path / "run", tiny_config.with_changes({"training.learning_rate": 0.001}), resume=True)


def test_sampled_supports_train_too(tiny_data, tiny_config, tmp_path):
    changes = {"support.shots": 2, "support.augmentation": "rotation_scale", "training.epochs": 1, **SAMPLED}
    for draw in ("step", "query"):
        config = tiny_config.with_changes({**changes, "support.per": draw})
        run = train(tiny_data, tmp_path / draw, config)
        assert len(list((run / "support").iterdir())) == 2


def test_what_is_not_learned_is_only_calibrated(tiny_data, tiny_config, tmp_path):
    """A memory of normal features and nothing else: no epoch is trained, and the run is whole."""
    config = tiny_config.with_changes({"support": None, "alignment": None})
    run = train(tiny_data, tmp_path / "run", config)
    assert not (run / "log.csv").exists()
    detector = Detector.load(run, device="cpu")
    good, bad = (detector(next((tiny_data / "test" / name).iterdir())).score for name in ("good", "hole"))
    assert bad > good
    # With the forward branch beside it, the memory still stays as it is.
    both = train(tiny_data, tmp_path / "both", config.with_changes({"support": "on", "alignment": "on"}))
    same, alone = load_trained(both).model.state_dict(), load_trained(run).model.state_dict()
    del alone["_extra_state"]  # scales of maps and scores
    assert all(torch.equal(value, same[name]) for name, value in alone.items())
    assert {"forward", "total"} < read_log(both / "log.csv")[0].keys()
    assert "reverse" not in read_log(both / "log.csv")[0]


def test_by_default_nothing_is_trained(tiny_default_run, tiny_data):
    names = {path.name for path in tiny_default_run.iterdir()}
    assert names == {"manifest.json", "config.toml", "model.safetensors", "support", "support.safetensors"}
    assert not [name for name in weights(tiny_default_run) if name.startswith("alignment")]
    detector = Detector.load(tiny_default_run, device="cpu")
    good, bad = (
        [detector(path).score for path in sorted((tiny_data / "test" / name).iterdir())] for name in ("good", "hole")
    )
    assert min(bad) > detector.threshold
    assert min(bad) > max(good)


@pytest.mark.parametrize(("gigabytes", "on_disk"), [(0.0, False), (5e-4, False), (2.0, True)])
def test_where_features_are_kept_changes_nothing(tiny_data, tiny_config, tiny_run, tmp_path, gigabytes, on_disk):
    folder = tmp_path / "features" if on_disk else None
    run = train(tiny_data, tmp_path / "run", tiny_config, cache_gb=gigabytes, cache_dir=folder)
    assert_same_weights(run, tiny_run)
    assert load_trained(run).calibration == load_trained(tiny_run).calibration
    assert folder is None or not list(folder.iterdir())


def test_frozen_features_are_computed_once(tiny_data, tiny_config, tmp_path, monkeypatch):
    """However many epochs, the teacher sees every image once."""
    original, seen = Teacher.raw, []
    monkeypatch.setattr(Teacher, "raw", lambda self, images: seen.append(len(images)) or original(self, images))
    train(tiny_data, tmp_path / "run", tiny_config.with_changes({"training.epochs": 4}))
    assert sum(seen) == 8 + 2


def test_training_ends_where_the_validation_loss_rests(tiny_data, tiny_config, tmp_path, caplog):
    config = tiny_config.with_changes({"training.epochs": 10, "training.learning_rate": 0.0, "training.patience": 2})
    with caplog.at_level("INFO", "bkd_fast"):
        run = train(tiny_data, tmp_path / "run", config)
    rows = read_log(run / "log.csv")
    assert len(rows) <= 8
    assert "stopped falling" in caplog.text
    losses = [row["validation_loss"] for row in rows]
    assert min(losses[-2:]) >= (1 - trainer.PLATEAU) * min(losses[:-2])
    with caplog.at_level("INFO", "bkd_fast"):
        whole = train(tiny_data, tmp_path / "all", config.with_changes({"training.patience": None}))
    assert len(read_log(whole / "log.csv")) == 10


def test_a_loss_that_is_not_finite_stops_with_step_and_offset(tiny_data, tiny_config, tmp_path, monkeypatch):
    original = BKD.losses

    def losses(model, result):
        values = original(model, result)
        losses.calls += 1
        return {name: value * (float("nan") if losses.calls == 3 else 1) for name, value in values.items()}

    losses.calls = 0
    tiny_config = tiny_config.with_changes({"training.patience": None})  # every loss is a step's
    monkeypatch.setattr(BKD, "losses", losses)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(BKDError, match=r"epoch 2, step 1.*largest offset .* feature pixels.*checkpoint.safetensors"):
        train(tiny_data, tmp_path / "run", tiny_config)
    model = BKD(tiny_config, weights=None)
    progress = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors", model, make_optimizer(model, tiny_config))
    assert (progress.epoch, progress.step) == (1, 0)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_full_disk_leaves_the_checkpoint_before(tiny_config, tmp_path, monkeypatch):
    from bkd_fast import artifact as run_module
    from bkd_fast.training.checkpoint import save_checkpoint

    model = BKD(tiny_config, weights=None)
    optimizer = make_optimizer(model, tiny_config)
    path, source = tmp_path / "checkpoint.safetensors", DataSource("", "tile")
    save_checkpoint(path, model, optimizer, Progress(epoch=1), source)
    before = path.read_bytes()

    def full(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "save_file", full)
    with pytest.raises(BKDError, match="No space left"):
        save_checkpoint(path, model, optimizer, Progress(epoch=2), source)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_optimizer_gives_offsets_their_own_rate(tiny_config):
    model = BKD(tiny_config.with_changes({"training.offset_lr_scale": 0.1}), weights=None)
    groups = make_optimizer(model, model.config).param_groups
    scales = {id(p): group["scale"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert all(scales[id(p)] == (0.1 if "predictors" in name else 1.0) for name, p in named.items() if p.requires_grad)
    assert not any(id(p) in scales for p in model.teacher.parameters())


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [5, 16, 33])
def test_no_image_twice_in_an_epoch_and_no_support_among_queries(world, count):
    config = BKDConfig().with_changes({"training.batch_size": 8, "support.shots": 2, **SAMPLED, "support.per": "step"})
    schedules = [Schedule(count, config, rank=rank, world=world) for rank in range(world)]
    for epoch in range(3):
        seen: list[int] = []
        for steps in zip(*(schedule.epoch(epoch) for schedule in schedules), strict=True):
            queries = [query for step in steps for query in step.queries]
            assert len({len(step.queries) for step in steps}) == 1
            assert len({str(step.supports) for step in steps}) == 1
            assert not set(queries) & set(steps[0].supports[0])
            seen += queries
        assert len(seen) == len(set(seen))
        assert len(seen) > count - max(8, world + 2)


def test_a_schedule_resumes_in_the_middle_of_an_epoch():
    schedule = Schedule(40, BKDConfig().with_changes({"training.batch_size": 8}))
    assert list(schedule.epoch(1, 2)) == list(schedule.epoch(1))[2:]
    assert list(schedule.epoch(1)) != list(schedule.epoch(2))


def test_supports_of_a_query_are_never_the_query():
    config = BKDConfig().with_changes({"training.batch_size": 6, "support.shots": 3, **SAMPLED, "support.per": "query"})
    schedule = Schedule(6, config)
    for step in schedule.epoch(0):
        for query, supports in zip(step.queries, step.supports, strict=True):
            assert query not in supports
            assert len(set(supports)) == 3


TWO_PROCESSES = """
import json, sys, torch
from bkd_fast.training import trainer
from bkd_fast.config import BKDConfig
from bkd_fast.training.train import train
rank = int(__import__("os").environ["RANK"])
original = trainer.Trainer._finish
def finish(self):
    named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
    torch.save({"weights": {n: p.detach() for n, p in named}, "grads": {n: p.grad for n, p in named}},
    f"{sys.argv[3]}/rank{rank}.pt")
    original(self)
trainer.Trainer._finish = finish
train(sys.argv[1], sys.argv[2], BKDConfig.from_dict(json.loads(sys.argv[4])), devices=2, accelerator="cpu")
"""


@pytest.mark.slow
def test_two_processes_average_gradients_and_agree(tiny_data, tiny_config, tmp_path):
    config = tiny_config.with_changes({"training.epochs": 1})
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29731", str(script),
         str(tiny_data), str(tmp_path / "run"), str(tmp_path), json.dumps(config.to_dict())],
        check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    # The gradients are averages: each process saw half of the images, and both hold the same sum.
    assert any(gradient.any() for gradient in first["grads"].values())
    for name, value in first["grads"].items():
        assert torch.equal(value, second["grads"][name]), name
    assert (tmp_path / "run" / "manifest.json").is_file()


def test_a_resumed_training_uses_the_images_that_it_began_with(
    make_category, tiny_config, tmp_path, monkeypatch, caplog
):
    data = make_category(tmp_path / "tile")
    whole = train(data, tmp_path / "whole", tiny_config)
    train_until(3, monkeypatch, data, tmp_path / "run", tiny_config)
    for name in ("0", "0055", "z"):
        (data / f"train/good/{name}.png").write_bytes((data / "test/good/000.png").read_bytes())
    first = data / "train/good/000.png"
    hidden = first.rename(tmp_path / "hidden.png")
    with pytest.raises(BKDError, match=r"1 training images of .* are missing: 000\.png"):
        train(data, tmp_path / "run", tiny_config, resume=True)
    first.write_bytes((data / "test/good/001.png").read_bytes())
    with pytest.raises(BKDError, match=r"1 training images of .* have changed: 000\.png"):
        train(data, tmp_path / "run", tiny_config, resume=True)
    hidden.rename(first)
    with caplog.at_level("WARNING", "bkd_fast"):
        run = train(data, tmp_path / "run", tiny_config, resume=True)
    assert "3 images are new since the training began" in caplog.text
    assert_same_weights(run, whole)
    assert load_trained(run).calibration == load_trained(whole).calibration
    assert load_trained(run).source.used == load_trained(whole).source.used


def test_a_run_inside_its_data_is_not_trained_on(make_category, tiny_default, tmp_path):
    data = make_category(tmp_path / "made") / "train/good"
    first = load_trained(train(data, data / "run", tiny_default)).source
    second = load_trained(train(data, data / "run2", tiny_default)).source
    assert first.used == second.used
    assert len(first.used) == 10


def test_a_resumed_training_keeps_the_white_that_it_began_with(make_category, tiny_config, tmp_path, monkeypatch):
    data = make_category(tmp_path / "tile")
    for path in (data / "train/good").iterdir():
        Image.fromarray(load_image(path)[..., 0].astype(np.uint16) << 2).save(path)
    train_until(3, monkeypatch, data, tmp_path / "run", tiny_config)
    Image.fromarray(np.full((72, 80), 60000, np.uint16)).save(data / "train/good/z.png")
    run = train(data, tmp_path / "run", tiny_config, resume=True)
    assert load_trained(run).config.data.integer_white == 1023
