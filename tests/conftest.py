"""Fixtures for the whole suite: a tiny data set and a tiny configuration that train in seconds."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import tiny

from bkd_fast.config import BKDConfig


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Caches of compilers, unpacked exports and what else is left in the folder of temporary files go at the end.

    The path is short, since a browser and Ray have sockets there.
    """
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist has the folder of the process that started it
    config._tmp_path_factory.getbasetemp()  # elsewhere: it keeps the folders of failed tests
    folder = tempfile.mkdtemp(prefix="bkd")
    patch = pytest.MonkeyPatch()
    patch.setenv("TMPDIR", str(folder))
    patch.setattr(tempfile, "tempdir", None)
    config.add_cleanup(patch.undo)
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def tiny_config() -> BKDConfig:
    """A small ResNet of random weights at 64 x 64: the default model, its match refined by an alignment that learns."""
    return BKDConfig().with_changes({"alignment.kernel": "full", **tiny.TINY})


@pytest.fixture(scope="session")
def tiny_default() -> BKDConfig:
    """The same as it is by default: nothing is learned."""
    return BKDConfig().with_changes(tiny.TINY)


@pytest.fixture(scope="session")
def tiny_student(tiny_config) -> BKDConfig:
    """The same with what else can be learned: memory items, read by attention, and a student; level by level."""
    return tiny_config.with_changes(
        {"teacher.levels": "separate", "memory.read": "attention", "memory.learned": True, "student": "on"}
    )


@pytest.fixture
def make_category():
    """Makes further categories like ``tiny_data``, of other sizes."""
    return tiny.make_category


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """One category, ``tile``."""
    return tiny.make_category(tmp_path_factory.mktemp("data") / "tile")


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tiny_config, tmp_path_factory) -> Path:
    """A trained run of the tiny category."""
    return _trained(tiny_data, tmp_path_factory, tiny_config)


@pytest.fixture(scope="session")
def tiny_default_run(tiny_data, tiny_default, tmp_path_factory) -> Path:
    """A run of the tiny category as it is by default."""
    return _trained(tiny_data, tmp_path_factory, tiny_default)


@pytest.fixture(scope="session")
def tiny_student_run(tiny_data, tiny_student, tmp_path_factory) -> Path:
    """A trained run of the tiny category with a student."""
    return _trained(tiny_data, tmp_path_factory, tiny_student)


@pytest.fixture(params=["tiny_run", "tiny_default_run", "tiny_student_run"])
def any_run(request) -> Path:
    """Each of the three."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def run(tiny_default_run, tmp_path) -> Path:
    """A copy of the run that is as by default, to change."""
    return shutil.copytree(tiny_default_run, tmp_path / "run")


def _trained(data: Path, tmp_path_factory, config: BKDConfig) -> Path:
    from bkd_fast.training.train import train

    return train(data, tmp_path_factory.mktemp("runs") / "tile", config, progress=False)
