"""Scoring and training on a local Ray cluster: complete results, each image once, whatever dies on the way."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")

import pyarrow as pa
import pyarrow.dataset as pads
import ray
from odd_filesystems import Killing, Taking, wrapped
from pyarrow.fs import LocalFileSystem

from bkd_fast.artifact import read_category
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.evaluate import evaluate
from bkd_fast.inference.detector import Detector
from bkd_fast.integrations import ray as module
from bkd_fast.integrations.ray import Scored, score, train_categories


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs: two workers."""
    support = str(Path(__file__).parent.parent / "support")
    path = os.pathsep.join([support, os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # what else runs here must not end workers
        temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of sockets must be short
        ray.init(
            num_cpus=2,
            _temp_dir=temporary,
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        yield
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture
def one_process(monkeypatch):
    """Shards are predicted in this process, by what a worker is: a cluster takes a minute to start."""

    def run(job, shards, workers, cpus, gpus):
        scorer = module._Scorer([job])
        for files in shards:
            (row,) = scorer(pa.table({"files": [files]})).to_pylist()
            if row["error"] is not None:
                raise BKDError(row["error"])
            yield row["images"]

    monkeypatch.setattr(module.ray, "get", lambda job: job)
    monkeypatch.setattr(module, "_run", run)


@pytest.fixture
def folder(tiny_data, tmp_path):
    """24 images and one that is none."""
    images = tmp_path / "images"
    pictures = sorted((tiny_data / "test").rglob("*.png"))
    for number in range(24):
        (images / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[number % len(pictures)], images / f"{number % 3}" / f"{number:02}.png")
    (images / "0" / "broken.png").write_bytes(b"not an image")
    (images / "notes.txt").write_text("no image")
    return images


def rows_of(out):
    rows = pads.dataset(str(out), format="parquet").to_table().to_pylist()
    by_file = {row["file"]: row for row in rows}
    assert len(by_file) == len(rows)  # none twice
    return by_file


def check(out, folder, run):
    """All images have one row, and it is the detector's."""
    rows = rows_of(out)
    assert set(rows) == {str(path) for path in folder.rglob("*.png")}
    detector = Detector.load(run, device="cpu")
    for file, row in rows.items():
        if file.endswith("broken.png"):
            assert row["score"] is None
            assert "not an image that can be decoded" in row["error"]
            continue
        prediction = detector(file)
        assert row["score"] == pytest.approx(prediction.score, abs=1e-4)
        assert row["threshold"] == detector.threshold
        assert row["p_value"] == pytest.approx(prediction.p_value)
        assert row["decision"] == ("anomalous" if prediction.label else "normal")
        assert row["error"] is None
    return rows


def test_a_folder_is_scored_and_resumed(one_process, tiny_run, folder, tmp_path, caplog):
    out = tmp_path / "scores"
    late = folder / "2" / "late.png"
    out.mkdir()
    (out / "_bkd_fast.json").write_text('{"writer": "a call that failed before its first shard"}')
    with caplog.at_level(logging.WARNING, "bkd_fast"):
        first = score(tiny_run, folder, out, shard=5, progress=False)
    assert "broken.png" in caplog.text
    rows = check(out, folder, tiny_run)
    anomalous = sum(row["decision"] == "anomalous" for row in rows.values())
    assert first == Scored(images=25, anomalous=anomalous, failed=1, computed=25)
    assert len(list(out.glob("part-*.parquet"))) == 5
    shutil.copy(folder / "0" / "00.png", late)
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    with pytest.raises(BKDError, match="not empty"):
        score(tiny_run, folder, out)
    assert score(tiny_run, folder, out, resume=True, progress=False).computed == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before
    check(out, folder, tiny_run)
    with pytest.raises(BKDError, match="begun with another threshold"):
        score(tiny_run, folder, out, threshold=3.0, resume=True)
    shutil.copy(folder / "0" / "00.png", folder / "0" / "broken.png")  # mended
    again = score(tiny_run, folder, out, resume=True, retry_failed=True, progress=False)
    assert (again.computed, again.failed, again.images) == (1, 0, 26)
    assert all(row["error"] is None for row in rows_of(out).values())
    assert not list(out.glob(".bkd-*"))


@pytest.mark.slow
def test_a_worker_that_is_killed_in_the_middle_costs_nothing(cluster, tiny_run, folder, tmp_path):
    marker, out = tmp_path / "killed", tmp_path / "scores"
    filesystem = wrapped(Killing("1/13.png", str(marker)))
    result = score(tiny_run, folder, out, workers=2, shard=4, filesystem=filesystem, progress=False)
    assert marker.exists()  # it was
    assert result.computed == 25
    check(out, folder, tiny_run)


@pytest.mark.slow
def test_an_image_that_kills_every_worker_ends_the_call(cluster, tiny_run, folder, tmp_path):
    out = tmp_path / "scores"
    filesystem = wrapped(Killing("1/13.png"))
    with pytest.raises(BKDError, match=r"4 workers died of the same images.*13\.png"):
        score(tiny_run, sorted((folder / "1").iterdir())[:6], out, shard=1, filesystem=filesystem, progress=False)
    assert "13.png" not in str(rows_of(out))
    (folder / "1" / "13.png").unlink()  # left out, the others go on where they were
    score(tiny_run, folder / "1", out, resume=True, progress=False)
    assert set(rows_of(out)) == {str(path) for path in (folder / "1").iterdir()}
    assert not list(out.glob(".bkd-*"))


def test_what_another_program_resumes_is_left_to_it(one_process, tiny_run, folder, tmp_path):
    out = tmp_path / "scores"
    another = wrapped(Taking("0/00.png", str(out / "_bkd_fast.json"), '{"writer": "another"}'))
    with pytest.raises(BKDError, match="another program resumes"):
        score(tiny_run, folder, out, shard=30, filesystem=another, progress=False)
    assert not list(out.glob("part-*"))


def test_options_reach_the_workers(one_process, tiny_run, folder, tmp_path):
    images = sorted((folder / "1").glob("*.png"))
    uri = f"file://{tmp_path / 'tiles'}"
    result = score(tiny_run, images, uri, workers=(1, 2), tile=48, overlap=8, threshold=-1e9, progress=False)
    assert result == Scored(len(images), len(images), 0, len(images))
    detector = Detector.load(tiny_run, device="cpu")
    for file, row in rows_of(tmp_path / "tiles").items():
        assert row["threshold"] == -1e9
        assert row["score"] == pytest.approx(detector(file, tile=48, overlap=8).score, abs=1e-4)


def test_unusable_arguments_are_refused_before_anything(one_process, tiny_run, tmp_path, folder):
    out = tmp_path / "scores"
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        ({"images": tmp_path / "none"}, "no image or folder"),
        ({"images": empty}, "no images in"),
        ({"images": []}, "images is empty"),
        ({"images": "nowhere://bucket/x"}, "cannot be opened"),
        ({"run": empty}, "manifest"),
        ({"shard": 0}, "shard"),
        ({"overlap": 3}, "overlap"),
        ({"precision": "12"}, "precision"),
        ({"retry_failed": True}, "resume"),
    ]
    for changes, message in cases:
        arguments = {"run": tiny_run, "images": folder, "out": out, "progress": False, **changes}
        with pytest.raises(BKDError, match=message):
            score(**arguments)
        assert not list(out.glob("part-*"))
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out / "mine.txt").write_text("something else")
    with pytest.raises(BKDError, match="no scores to resume"):
        score(tiny_run, folder, out, resume=True)


def test_a_listing_leaves_out_what_is_hidden_or_no_image(folder):

    (folder / ".thumbs").mkdir()
    shutil.copy(folder / "0" / "00.png", folder / ".thumbs" / "00.png")
    _, own = module._listed([folder], None)
    _, general = module._listed([str(folder)], LocalFileSystem())  # as an object store is listed
    assert own == general == sorted(map(str, folder.glob("?/*.png")))


@pytest.mark.slow
def test_categories_are_trained_side_by_side(cluster, make_category, tiny_default, tmp_path, caplog):
    data, out = tmp_path / "data", tmp_path / "runs"
    for name in ("one", "two", "three"):
        make_category(data / name, train=6)
    broken = data / "two" / "train" / "good" / "000.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"not an image")
    with caplog.at_level(logging.WARNING, "bkd_fast"):
        trained = train_categories(data, out, tiny_default)
    assert list(trained.runs) == ["one", "three"]
    assert list(trained.failed) == ["two"]
    assert "000.png" in trained.failed["two"]
    assert "two was not trained" in caplog.text
    assert set(evaluate(out, pictures=False)["categories"]) == {"one", "three"}
    before = read_category(out / "one")
    broken.write_bytes(whole)
    with pytest.raises(BKDError, match="not empty"):
        train_categories(data, out, tiny_default)
    trained = train_categories(data, out, tiny_default, resume=True)
    assert list(trained.runs) == ["one", "three", "two"]
    assert not trained.failed
    assert read_category(out / "one") == before
    with pytest.raises(BKDError, match="no category was trained: four: BKDError"):
        train_categories(data, tmp_path / "other", tiny_default, categories=["four"])


def test_workers_are_as_many_as_the_cluster_has_room_for(monkeypatch):
    monkeypatch.setattr(module.ray, "cluster_resources", lambda: {"CPU": 9.0, "GPU": 2.0})
    assert module._pool(None, 2, 0) == (4, 4)
    assert module._pool(None, 2, 0.5) == (4, 4)
    assert module._pool(None, 2, 1) == (2, 2)
    assert module._pool(3, 2, 1) == (3, 3)
    assert module._pool((1, 50), 2, 1) == (1, 50)
    for workers, cpus, gpus, message in [(None, 10, 0, "10 CPUs"), (None, 1, 3, "3 GPUs"), ((3, 2), 1, 0, "workers")]:
        with pytest.raises(BKDError, match=message):
            module._pool(workers, cpus, gpus)
