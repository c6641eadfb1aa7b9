"""File systems that do something when an image is read; Ray's workers import them from here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem


class Killing(LocalFileSystem):
    """Kills the worker that reads ``victim``, in the middle of a shard; with a ``marker`` to make, only once."""

    cachable = False

    def __init__(self, victim: str, marker: str | None = None) -> None:
        super().__init__()
        self.victim, self.marker = victim, marker

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if path.endswith(self.victim) and not (self.marker and os.path.exists(self.marker)):
            if self.marker:
                Path(self.marker).touch()
            os.kill(os.getpid(), 9)
        return super()._open(path, mode=mode, **options)


class Taking(LocalFileSystem):
    """Does to the settings of an output what another program that resumes it does, when ``victim`` is read."""

    cachable = False

    def __init__(self, victim: str, settings: str, writer: str) -> None:
        super().__init__()
        self.victim, self.settings, self.writer = victim, Path(settings), writer

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if path.endswith(self.victim):
            self.settings.write_text(self.writer)
        return super()._open(path, mode=mode, **options)


def wrapped(filesystem: LocalFileSystem) -> PyFileSystem:
    """Return a file system of fsspec's as pyarrow takes it."""
    return PyFileSystem(FSSpecHandler(filesystem))
