"""Many machines with Ray: score large folders and object stores, and train many categories side by side.

Every machine needs bkd_fast in its Python environment. The run folder is sent to the workers; all other paths without a
scheme must be on a disk that the machines share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError, RayTaskError

from bkd_fast.artifact import read_category, write_manifest
from bkd_fast.config import BKDConfig
from bkd_fast.data import image_files
from bkd_fast.data.image import SUFFIXES
from bkd_fast.data.progress import progress_bar
from bkd_fast.data.tiles import check_tiles
from bkd_fast.errors import BKDError, check_float, check_int, few
from bkd_fast.files import MANIFEST, PREFIX, checksum, is_empty, locked, write_files
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.precision import check_precision
from bkd_fast.inference.streaming import pipeline
from bkd_fast.training.train import train
from bkd_fast.version import __version__

log = logging.getLogger("bkd_fast")
SETTINGS = "_bkd_fast.json"  # readers of Parquet data sets leave out names that begin with _ or .
RETRIES = 3  # of a shard or a training whose worker died
SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("score", pa.float64()),
        ("threshold", pa.float64()),
        ("decision", pa.string()),
        ("normalized_score", pa.float64()),
        ("p_value", pa.float64()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Scored:
    """What an output folder of :func:`score` holds: images, how many of them are anomalous, and how many failed.

    ``computed``: how many images the call itself read; the others had a row before.
    """

    images: int
    anomalous: int
    failed: int
    computed: int


@dataclass(frozen=True)
class TrainedCategories:
    """The run folder of each category that :func:`train_categories` trained, and why each other one failed."""

    runs: dict[str, Path]
    failed: dict[str, str]


@dataclass(frozen=True)
class _Job:
    """What a worker needs: the run's files, how to load it, and where images are read and results written."""

    files: dict[str, bytes] = field(repr=False)
    options: dict[str, Any]
    threshold: float | None
    tile: int | tuple[int, int] | None
    overlap: int
    threads: int
    source: FileSystem
    target: FileSystem
    out: str
    writer: str


def score(
    run: str | Path,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    workers: int | tuple[int, int] | None = None,
    cpus: int = 1,
    gpus: float = 0,
    shard: int = 256,
    precision: str = "32",
    tile: int | tuple[int, int] | None = None,
    overlap: int = 0,
    threshold: float | None = None,
    max_pixels: int | None = None,
    pages: str | None = None,
    filesystem: FileSystem | None = None,
    out_filesystem: FileSystem | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    progress: bool | None = None,
) -> Scored:
    """Predict images on all machines of a Ray cluster and write their scores as Parquet files.

    ``out`` becomes a Parquet data set with the columns ``file``, ``score``, ``threshold``, ``decision`` (``normal`` or
    ``anomalous``), ``normalized_score``, ``p_value`` and ``error``. An image that cannot be read has a row with an
    ``error`` and no score. Images are divided into shards, and each shard is one file, written whole or not at all: a
    shard whose worker dies is computed again by another one, and no image has two rows.

    Args:
        run: the run folder of one category, on this machine.
        images: a folder or an image file, or several: paths, or URIs as ``pyarrow`` takes them (``s3://bucket/parts``).
        out: a new or empty folder, path or URI, unless ``resume``.
        workers: processes that predict, each with its own detector; (min, max) lets their number follow the load. None:
            as many as the cluster has CPUs or GPUs for now.
        cpus: threads of each worker, which decode images and on a CPU compute.
        gpus: GPUs of each worker; 0 predicts on the CPU, 0.5 lets two workers share one.
        shard: images of one Parquet file, and what is lost when a worker dies.
        precision, max_pixels, pages: see :meth:`bkd_fast.Detector.load`.
        tile, overlap: see :meth:`bkd_fast.Detector.predictor`.
        threshold: replaces the run's image threshold.
        filesystem, out_filesystem: where paths without a scheme are, of ``images`` and ``out``; None: on this machine.
        resume: leave out the images that ``out`` has a row for, and add the others.
        retry_failed: with ``resume``, also read the images again that have an error.
        progress: a progress bar; None: in a terminal or a notebook, else a line now and then.

    Returns:
        The number of images in ``out``, and what became of them.

    Raises:
        BKDError: no images, an ``out`` that is not empty or was begun with other settings, or an unusable run or
            option, before any image is read.
            Later: workers that die again and again of the same shard, another program that resumes ``out``. Files that
            were written stay, for ``resume``.
        ray.exceptions.RayError: any other error of a worker; files stay too.
    """
    cpus, shard = check_int("cpus", cpus, 1, 4096), check_int("shard", shard, 1, 1_000_000)
    gpus = check_float("gpus", gpus, 0, 1024)
    if tile is not None:
        check_tiles(tile, overlap)
    if threshold is not None:
        threshold = check_float("threshold", threshold)
    if retry_failed and not resume:
        raise BKDError("retry_failed is True and resume False: only a resumed output has failed images")
    if gpus == 0:
        check_precision(precision, torch.device("cpu"))
    run = Path(run)
    manifest = read_category(run)
    if manifest.unified is not None:
        raise BKDError(f"{run} is one model of several categories, and a row names none: use `bkd-fast predict`")
    Detector.load(run, device="cpu", max_pixels=max_pixels, pages=pages).predictor(tile, overlap)  # its errors now
    source, names = _listed([images] if isinstance(images, (str, Path)) else images, filesystem)
    target, folder = _resolved(out, out_filesystem)
    settings = {
        "run": checksum(run / MANIFEST),
        "precision": precision,
        "tile": list(tile) if isinstance(tile, tuple) else tile,
        "overlap": overlap,
        "threshold": threshold,
        "max_pixels": max_pixels,
        "pages": pages,
    }
    writer = secrets.token_hex(8)
    _begin(target, folder, settings, writer, resume)
    if retry_failed:
        _drop_failed(target, folder)
    done = set(_rows(target, folder, ["file"])["file"].to_pylist())
    left = [name for name in names if name not in done]
    files = {name: (run / name).read_bytes() for name in (MANIFEST, *manifest.files)}
    options = {"precision": precision, "max_pixels": max_pixels, "pages": pages, "device": "cuda" if gpus else "cpu"}
    job = _Job(files, options, threshold, tile, overlap, cpus, source, target, folder, writer)
    shards = [left[start : start + shard] for start in range(0, len(left), shard)]
    with progress_bar(len(names), "predicting", "image", progress, initial=len(names) - len(left)) as bar:
        for count in _run(job, shards, workers, cpus, gpus):
            bar.update(count)
    rows = _rows(target, folder, ["file", "decision", "error"])
    scored, decisions, errors = (column.to_pylist() for column in rows.columns)
    if len(set(scored)) < len(scored) or not set(names) <= set(scored):
        raise RuntimeError(f"{out} does not have one row of each image: another program has changed it")
    failed = [file for file, error in zip(scored, errors, strict=True) if error is not None]
    if failed:
        log.warning("%d images could not be read; column error says why: %s", len(failed), few(failed))
    return Scored(len(scored), decisions.count("anomalous"), len(failed), len(left))


def train_categories(
    data: str | Path,
    out: str | Path,
    config: BKDConfig | None = None,
    *,
    categories: Sequence[str] | None = None,
    cpus: int = 1,
    gpus: float = 0,
    resume: bool = False,
    **options: Any,
) -> TrainedCategories:
    """Train the categories of a data set side by side, each as one Ray task.

    The run folder is that of :func:`bkd_fast.train` with several categories. A category that fails does not stop the
    others: it is named in the result and with a warning, and left out of the run. If its worker dies, its training
    continues from its checkpoint on another.

    Args:
        data, config, categories: see :func:`bkd_fast.train`.
        out: a new or empty folder unless ``resume``; like ``data`` on a disk that all machines share.
        cpus, gpus: of each training; with ``gpus`` 0 it runs on a CPU.
        resume: leave finished categories alone, continue or begin the others.
        options: further arguments of :func:`bkd_fast.train`, such as ``cache_gb``.

    Returns:
        The run folders of the finished categories, and the errors of the others.

    Raises:
        BKDError: unusable arguments, or no category that could be trained; the message says why each failed.
    """
    cpus, gpus = check_int("cpus", cpus, 1, 4096), check_float("gpus", gpus, 0, 1024)
    data, out = Path(data).resolve(), Path(out).resolve()
    names = list(dict.fromkeys(categories)) if categories else _category_names(data)
    with locked(out, sweep=False):
        if not resume and not is_empty(out):
            raise BKDError(f"the output folder {out} is not empty: choose another, or resume=True")
        task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(train)
        # A retried task finds what the one before it has left: a checkpoint, or nothing.
        begin = partial(task.remote, accelerator="cuda" if gpus else "cpu", resume=True, progress=False, **options)
        waiting = {begin(data, out / name, config, categories=[name]): name for name in names}
        failed: dict[str, str] = {}
        try:
            while waiting:
                (ready, *_), _ = ray.wait(list(waiting))
                name = waiting.pop(ready)
                try:
                    ray.get(ready)
                except RayError as error:
                    cause = error.cause if isinstance(error, RayTaskError) else error
                    failed[name] = f"{type(cause).__name__}: {cause}"
                    log.warning("%s was not trained: %s", name, failed[name])
        finally:
            for reference in waiting:  # after Ctrl-C: they write their checkpoints and end
                ray.cancel(reference)
        runs = {name: out / name for name in names if name not in failed}
        if not runs:
            raise BKDError("no category was trained: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
        write_manifest(out, {"bkd_fast": __version__, "categories": list(runs)})
    return TrainedCategories(runs, failed)


def _category_names(data: Path) -> list[str]:
    """Return the categories of a data set without a look into them: an unusable one is its own training's error.

    Raises:
        BKDError: no such folder.
    """
    if not data.is_dir():
        raise BKDError(f"there is no folder {data}: expected a data set, or a folder of good images")
    folders = sorted(folder for folder in data.iterdir() if (folder / "train" / "good").is_dir())
    return [folder.name for folder in folders if not folder.name.startswith(".")] or [data.name]


class _Scorer:
    """A worker: one detector, which predicts a shard a call and writes its Parquet file."""

    def __init__(self, reference: Any) -> None:
        self.job: _Job = ray.get(reference[0])
        torch.set_num_threads(self.job.threads)
        with tempfile.TemporaryDirectory(prefix="bkd_fast-") as folder:
            write_files(self.job.files, folder)
            self.detector = Detector.load(folder, **self.job.options)
        if self.job.threshold is not None:
            self.detector.threshold = self.job.threshold
        self.predictor = self.detector.predictor(self.job.tile, self.job.overlap)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (files,) = batch["files"].to_pylist()
        error = None
        try:
            self._score(files)
        except BKDError as own:  # as a result: Ray does not keep the type of an error
            error = str(own)
        return pa.table({"images": pa.array([len(files)]), "error": pa.array([error], pa.string())})

    def _score(self, files: list[str]) -> None:
        name = hashlib.sha256("\0".join(files).encode()).hexdigest()[:32]
        with self._attempt(name, files):
            rows = self._predicted(files)
            if _settings(self.job.target, self.job.out)["writer"] != self.job.writer:
                raise BKDError(f"another program resumes {self.job.out}: this one stops")
            table, path = pa.Table.from_pylist(rows, SCHEMA), f"{self.job.out}/part-{name}.parquet"
            _write(self.job.target, path, partial(pq.write_table, table))

    @contextmanager
    def _attempt(self, name: str, files: Sequence[str]) -> Iterator[None]:
        """Note in a file that a shard is begun: Ray gives the shard of a dead worker to another one, without end.

        Raises:
            BKDError: too many workers have died of it.
        """
        target, path = self.job.target, f"{self.job.out}/{PREFIX}{self.job.writer}-{name}"
        died = 0
        if target.get_file_info(path).type == FileType.File:
            with target.open_input_stream(path) as stream:
                died = int(stream.read())
        if died > RETRIES:
            raise BKDError(f"{died} workers died of the same images (one is damaged, or memory short): {few(files)}")
        _write(target, path, lambda file: file.write(b"%d" % (died + 1)))
        yield
        with suppress(OSError):  # of a worker that was taken for dead and has finished too
            target.delete_file(path)

    def _predicted(self, files: list[str]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        stages = pipeline(
            files,
            self._read,
            self.predictor.predict,
            self._row,
            batch=self.detector.batch,
            workers=self.job.threads + 1,
        )
        for outcome in stages:
            if outcome.result is not None:
                rows.append(outcome.result)
            elif isinstance(outcome.error, (BKDError, OSError)):
                rows.append({"file": outcome.item, "error": f"{type(outcome.error).__name__}: {outcome.error}"})
            elif outcome.error is not None:
                raise outcome.error
        return rows

    def _read(self, file: str) -> Any:
        with self.job.source.open_input_stream(file) as stream:
            return self.predictor.preprocess(stream.read())

    def _row(self, file: str, raw: Any) -> dict[str, Any]:
        prediction = self.predictor.postprocess(raw)
        return {
            "file": file,
            "score": prediction.score,
            "threshold": self.detector.threshold,
            "decision": "anomalous" if prediction.label else "normal",
            "normalized_score": prediction.normalized_score,
            "p_value": prediction.p_value,
        }


def _run(
    job: _Job, shards: Sequence[list[str]], workers: int | tuple[int, int] | None, cpus: int, gpus: float
) -> Iterator[int]:
    """Predict shards in a pool of actors; yield the number of images of each that is written."""
    if not shards:
        return
    if not ray.is_initialized():
        ray.init()
    low, high = _pool(workers, cpus, gpus)
    try:
        sent = ray.put(job)
    except TypeError as error:
        raise BKDError(f"the file system cannot be pickled and sent to other machines: {job.source}") from error
    dataset: Any = ray.data.from_items([{"files": files} for files in shards], override_num_blocks=len(shards))
    dataset = dataset.map_batches(
        _Scorer,
        fn_constructor_args=([sent],),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=min(low, len(shards)), max_size=min(high, len(shards)), max_tasks_in_flight_per_actor=2
        ),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    dataset.context.enable_progress_bars = False  # there is one already
    for row in dataset.iter_rows():
        if row["error"] is not None:
            raise BKDError(row["error"])
        yield row["images"]


def _pool(workers: int | tuple[int, int] | None, cpus: int, gpus: float) -> tuple[int, int]:
    """Return the smallest and the largest number of workers.

    Raises:
        BKDError: numbers that cannot be, or a cluster without resources for one worker.
    """
    if workers is None:
        there = ray.cluster_resources()
        fitting = [there.get("CPU", 0) // cpus] + ([there.get("GPU", 0) // gpus] if gpus else [])
        if min(fitting) < 1:
            raise BKDError(
                f"a worker takes {cpus} CPUs and {gpus:g} GPUs, and the Ray cluster has {there.get('CPU', 0):g} and "
                f"{there.get('GPU', 0):g}: ask for less, or set workers for a cluster that grows"
            )
        return int(min(fitting)), int(min(fitting))
    low, high = workers if isinstance(workers, tuple) else (workers, workers)
    low = check_int("workers", low, 1, 100_000)
    return low, check_int("workers", high, low, 100_000)


def _resolved(path: str | Path, filesystem: FileSystem | None) -> tuple[FileSystem, str]:
    """Return the file system of a path or URI, and the path there.

    Raises:
        BKDError: a URI that pyarrow does not know.
    """
    if filesystem is not None:
        return filesystem, str(path).rstrip("/")
    if "://" not in str(path):
        return LocalFileSystem(), os.path.abspath(path)
    try:
        return FileSystem.from_uri(str(path).rstrip("/"))
    except (pa.ArrowInvalid, OSError) as error:
        raise BKDError(f"{path} cannot be opened ({error}): expected a path, or a URI (s3://BUCKET/FOLDER)") from error


def _listed(images: Sequence[str | Path], filesystem: FileSystem | None) -> tuple[FileSystem, list[str]]:
    """Return the file system of the images and their paths there, each once.

    Raises:
        BKDError: something that is not there, a folder without images, or more than one file system.
    """
    source: FileSystem | None = None
    names: dict[str, None] = {}
    for given in images:
        own, path = _resolved(given, filesystem)
        if source is not None and own != source:
            raise BKDError(f"{given} is on another file system than the images before it: score each apart")
        source = own
        kind = source.get_file_info(path).type
        if kind == FileType.File:
            files = [path]
        elif kind == FileType.Directory and filesystem is None and isinstance(source, LocalFileSystem):
            files = [str(file) for file in image_files(Path(path))]
        elif kind == FileType.Directory:
            found = source.get_file_info(FileSelector(path, recursive=True))
            files = sorted(info.path for info in found if info.type == FileType.File and _is_image(info.path, path))
        else:
            raise BKDError(f"there is no image or folder {given}")
        if not files:
            raise BKDError(f"there are no images in the folder {given}")
        odd = [file for file in files if file.encode(errors="replace").decode() != file]
        if odd:
            raise BKDError(f"{few(odd)}: the name is not UTF-8, which Parquet needs. Rename the file")
        names.update(dict.fromkeys(files))
    if source is None:
        raise BKDError("images is empty: expected a folder, an image file, or several")
    return source, list(names)


def _is_image(path: str, folder: str) -> bool:
    """Return whether a file below a folder is an image by its suffix, and not hidden."""
    parts = PurePosixPath(path[len(folder) :]).parts
    return PurePosixPath(path).suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in parts)


def _begin(target: FileSystem, folder: str, settings: Mapping[str, Any], writer: str, resume: bool) -> None:
    """Make the output folder ours: from now on, only workers of ``writer`` write there.

    Raises:
        BKDError: it is not empty (settings without results do not count), or was begun with other settings.
    """
    target.create_dir(folder, recursive=True)
    entries = target.get_file_info(FileSelector(folder))
    if any(not entry.base_name.startswith(".") and entry.base_name != SETTINGS for entry in entries):
        if not resume:
            raise BKDError(f"the output folder {folder} is not empty: choose another, or resume=True")
        before = _settings(target, folder)
        different = [name for name, value in settings.items() if before.get(name) != value]
        if different:
            raise BKDError(f"{folder} was begun with another {' and '.join(different)}: choose another folder")
    content = {**settings, "bkd_fast": __version__, "writer": writer}
    _write(target, f"{folder}/{SETTINGS}", lambda file: file.write(json.dumps(content, indent=2).encode()))
    for entry in entries:  # what killed workers have left
        if entry.base_name.startswith(PREFIX) and entry.type == FileType.File:
            target.delete_file(entry.path)


def _settings(target: FileSystem, folder: str) -> dict[str, Any]:
    """Return what the output folder was begun with.

    Raises:
        BKDError: it holds something else.
    """
    try:
        with target.open_input_stream(f"{folder}/{SETTINGS}") as stream:
            content = json.loads(stream.read())
        if isinstance(content, dict) and "writer" in content:
            return content
    except (OSError, ValueError):
        pass
    raise BKDError(f"{folder} holds no scores to resume: choose another output folder")


def _rows(target: FileSystem, folder: str, columns: Sequence[str]) -> pa.Table:
    """Return the columns of all rows that are written."""
    tables = [_read(target, path, columns) for path in _parts(target, folder)]
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table().select(columns)


def _parts(target: FileSystem, folder: str) -> list[str]:
    entries = target.get_file_info(FileSelector(folder))
    return sorted(entry.path for entry in entries if entry.base_name.startswith("part-"))


def _read(target: FileSystem, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        with target.open_input_file(path) as file:
            return pq.ParquetFile(file).read(columns)
    except (OSError, pa.ArrowException) as error:
        raise BKDError(f"{path} cannot be read ({error}): delete it to compute its rows again") from error


def _drop_failed(target: FileSystem, folder: str) -> None:
    """Delete the rows with an error, so that their images are read again."""
    for path in _parts(target, folder):
        table = _read(target, path)
        kept = table.filter(pc.is_null(table["error"]))
        if kept.num_rows == 0:
            target.delete_file(path)
        elif kept.num_rows < table.num_rows:
            _write(target, path, partial(pq.write_table, kept))


def _write(target: FileSystem, path: str, write: Callable[[Any], Any]) -> None:
    """Write a file beside its place and move it there, so that it is whole or absent."""
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/{PREFIX}{secrets.token_hex(8)}-{name}"
    with target.open_output_stream(temporary) as file:
        write(file)
    target.move(temporary, path)
