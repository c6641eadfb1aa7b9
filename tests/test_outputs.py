"""What surrounds the results: one writer a folder, full and read-only disks, odd names, leftovers, resuming."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest
from PIL import Image
from tiny import picture, rows_of

from bkd_fast import files
from bkd_fast.artifact import load_trained
from bkd_fast.cli import main
from bkd_fast.errors import BKDError
from bkd_fast.files import atomic_path, fitting, locked
from bkd_fast.training.train import train

training = import_module("bkd_fast.training.train")

TRAIN = ["--teacher", "test_resnet", "--weights", "none", "--image-size", "64", "--set", "memory.items=16"]


def writing(run, data, out):
    """Every command that writes, by name."""
    return {
        "train": ["train", str(data), "--out", str(out), *TRAIN],
        "predict": ["predict", str(run), str(data / "test"), "--out", str(out)],
        "evaluate": ["evaluate", str(run), "--out", str(out)],
        "export": ["export", str(run), "--format", "pt2", "--out", str(out / "model.pt2")],
        "calibrate": ["calibrate", str(run), "--false-alarms", "0.3"],
        "update": ["update", str(run), str(data / "test/good")],
    }


COMMANDS = ("train", "predict", "evaluate", "export", "calibrate", "update")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_process_on_a_folder_gets_one_sentence(command, run, tiny_data, tmp_path, capsys):
    out = run if command in ("calibrate", "update") else tmp_path / "out"
    with locked(out):
        assert main(writing(run, tiny_data, out)[command]) == 1
    assert "another process is writing to" in capsys.readouterr().err
    assert out == run or not list(out.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_sentence(command, run, tiny_data, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    before = load_trained(run).calibration
    monkeypatch.setattr(files, "sync", full)
    monkeypatch.setattr("bkd_fast.export.formats.sync", full)
    assert main(writing(run, tiny_data, tmp_path / "out")[command]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bkd-fast: ")
    assert "No space left on device" in error
    assert not list(tmp_path.rglob(".bkd-*"))
    monkeypatch.undo()
    assert load_trained(run).calibration == before


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_grow_is_one_sentence(command, run, tiny_data, tmp_path):
    """A real limit of the system, met in the middle of a write, whichever library writes."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)); "
    code = (
        f"{limit}from bkd_fast.cli import main; sys.exit(main({writing(run, tiny_data, tmp_path / 'out')[command]!r}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("bkd-fast: ")
    assert "Traceback" not in done.stderr
    load_trained(run)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_folder_is_one_sentence(command, run, tiny_data, tmp_path, capsys):
    out = run if command in ("calibrate", "update") else tmp_path / "out"
    out.mkdir(exist_ok=True)
    out.chmod(0o500)
    assert main(writing(run, tiny_data, out)[command]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_refuses_to_be_written_is_one_sentence(command, run, tiny_data, tmp_path, capsys, monkeypatch):
    """As a read-only one does, also where root runs the tests."""

    class Refusing(files.FileLock):
        def acquire(self, *_, **__):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")

    monkeypatch.setattr(files, "FileLock", Refusing)
    assert main(writing(run, tiny_data, tmp_path / "out")[command]) == 1
    assert "cannot be written (Read-only file system): choose another" in capsys.readouterr().err


def test_two_trainings_into_one_folder_do_not_mix(tiny_data, tmp_path):
    command = writing(tmp_path, tiny_data, tmp_path / "run")["train"]
    arguments = [sys.executable, "-W", "ignore", "-m", "bkd_fast", *command]
    both = [subprocess.Popen([*arguments, "--seed", seed], stderr=subprocess.PIPE, text=True) for seed in "01"]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], errors
    assert any("another process is writing" in error or "is not empty" in error for error in errors)
    load_trained(tmp_path / "run")


def test_a_folder_that_another_training_makes_meanwhile_is_not_taken(tiny_data, tiny_default, tmp_path, monkeypatch):
    """Between the first look at the folder and the first write, images are read."""
    out = tmp_path / "run"
    original = training.check_samples

    def other(*arguments, **options):
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"of another process")
        return original(*arguments, **options)

    monkeypatch.setattr(training, "check_samples", other)
    with pytest.raises(BKDError, match="not empty"):
        train(tiny_data, out, tiny_default)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"model.safetensors": b"of another process"}


def test_leftovers_of_a_killed_process_go(tmp_path):
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays" / ".bkd-x.png").write_bytes(b"half")
    (tmp_path / ".bkd-staging").mkdir()
    (tmp_path / ".bkd-staging" / "model").write_bytes(b"half")
    (tmp_path / "kept.png").write_bytes(b"")
    with locked(tmp_path):
        assert {path.name for path in tmp_path.rglob("*")} == {"overlays", "kept.png", ".bkd-lock"}
    assert {path.name for path in tmp_path.rglob("*")} == {"overlays", "kept.png"}


def test_names_of_any_length_fit(tmp_path):
    for name in ("a" * 300 + ".png", "ä" * 200 + ".png", "€" * 90 + ".png", os.fsdecode(b"\xff" * 300) + ".png"):
        path = fitting(tmp_path / "folder" / name)
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"x")
        assert path.read_bytes() == b"x"
        assert path.suffix == ".png"
    assert fitting(tmp_path / ("a" * 300)) != fitting(tmp_path / ("a" * 299 + "b"))
    assert fitting(tmp_path / "short.png") == tmp_path / "short.png"


def test_images_with_odd_names_are_predicted_and_evaluated(run, tmp_path, make_category, capfdbinary, monkeypatch):
    # pytest-xdist cannot send captured names that are not UTF-8.
    monkeypatch.setattr(logging.getLogger("bkd_fast"), "propagate", False)
    data = make_category(tmp_path / "tile", bad=1)
    names = [b"caf\xe9", b"a" * 246, "ü".encode() * 123, b"new\nline", b'comma, "quote"']
    names = [name + b".png" for name in names]
    for name in names:
        picture(os.path.join(os.fsencode(data / "test/hole"), name).decode(errors="surrogateescape"))
    assert main(["predict", str(run), str(data / "test/hole"), "--out", str(tmp_path / "out")]) == 0
    found = {os.fsencode(os.path.basename(row["file"])) for row in rows_of(tmp_path / "out")}
    assert found == {*names, b"000.png"}
    assert len(list((tmp_path / "out/masks").iterdir())) == len(names) + 1
    assert main(["evaluate", str(run), str(data)]) == 0
    assert {os.fsencode(row["file"].rpartition("/")[2]) for row in rows_of(run)} >= {*names}
    assert len(list((run / "overlays/tile/hole").glob("*.png"))) >= len(names) + 1
    capfdbinary.readouterr()


def test_predictions_resume_where_they_stopped(run, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(4):
        picture(images / f"{index}.png", index)
    (images / "2.png").write_bytes(b"not an image")
    arguments = ["predict", str(run), str(images), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert [row["name"] for row in rows_of(tmp_path / "out")] == ["0", "1"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.jpg")}
    with open(tmp_path / "out/scores.csv", "ab") as file:
        file.write(b"half a ro")
    picture(images / "2.png", 2)
    (images / "0.jpg").write_bytes((images / "1.png").read_bytes())  # its picture gets a name of its own
    assert main(arguments) == 1
    assert main([*arguments, "--resume", "--threshold", "1"]) == 1
    assert "another threshold" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert "5 images" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    assert sorted(row["name"] for row in rows) == ["0", "0_2", "1", "2", "3"]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert {path.stem for path in (tmp_path / "out/masks").iterdir()} == {row["name"] for row in rows}
    assert main([*arguments[:-1], str(tmp_path / "plain"), "--no-pictures"]) == 0
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        "manifest.json", "predictions.jsonl", "scores.csv",
    }  # fmt: skip
    again = {row["file"]: row["score"] for row in rows_of(tmp_path / "plain")}
    assert {row["file"]: row["score"] for row in rows} == again


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_prediction_keeps_its_rows(stop, run, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(300):
        picture(images / f"{index:03}.png", index)
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-m", "bkd_fast", "predict", str(run), str(images), "--out", str(out)]

    def interruptible():  # also where the tests themselves run in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=interruptible)
    while process.poll() is None and not ((out / "scores.csv").is_file() and len(rows_of(out)) > 5):
        time.sleep(0.02)
    process.send_signal(stop)
    assert process.wait() == (130 if stop == signal.SIGINT else -stop)
    done = rows_of(out)
    assert 5 < len(done) < 300
    lines = (out / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) in (len(done), len(done) - 1)  # the row comes first
    assert all(line.endswith(b"}\n") for line in lines)
    assert [json.loads(line)["file"] for line in lines] == [row["file"] for row in done][: len(lines)]
    for row in done:
        with Image.open(out / "masks" / f"{row['name']}.png") as mask:
            assert mask.size == (64, 64)
    assert main(["predict", str(run), str(images), "--out", str(out), "--resume"]) == 0
    rows = rows_of(out)
    assert sorted(row["name"] for row in rows) == [f"{index:03}" for index in range(300)]
    assert rows[: len(done)] == done
    lines = (out / "predictions.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["file"] for line in lines] == [row["file"] for row in rows]
    assert not list(out.rglob(".bkd-*"))


def test_an_image_smaller_than_a_tile_is_that_images_error(run, tmp_path, capsys):
    picture(tmp_path / "a.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "small.png")
    arguments = ["predict", str(run), str(tmp_path / "a.png"), str(tmp_path / "small.png"), "--tile", "64", "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 1
    assert "small.png" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "skipped"), "--skip-unreadable"]) == 0
    assert len(rows_of(tmp_path / "skipped")) == 1


def test_epochs_are_logged_where_nobody_watches(tiny_data, tiny_config, tmp_path, caplog):
    with caplog.at_level("INFO", "bkd_fast"):
        train(tiny_data, tmp_path / "run", tiny_config)
    lines = [record.getMessage() for record in caplog.records if "epoch" in record.getMessage()]
    assert [line.split(",")[0] for line in lines] == ["tile: epoch 1 of 2", "tile: epoch 2 of 2"]
    assert all("validation loss" in line for line in lines)


def test_a_path_in_the_run_cannot_lead_outside(run, tiny_data, tmp_path):
    """Overlays replace a link instead of following it."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (run / "overlays").symlink_to(victim)
    assert main(["evaluate", str(run), str(tiny_data)]) == 0
    assert not list(victim.iterdir())
    assert not (run / "overlays").is_symlink()


def test_a_name_that_is_no_folder_name_is_refused(tiny_data, tmp_path):
    odd = shutil.copytree(tiny_data, tmp_path / "a\\b")
    with pytest.raises(BKDError, match="rename the folder"):
        train(odd, tmp_path / "run")
