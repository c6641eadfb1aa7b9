"""Files that are either whole or absent, and folders that one process writes to at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from filelock import FileLock, Timeout

from bkd_fast.errors import BKDError

PREFIX = ".bkd-"  # of every temporary name; what a killed process leaves behind is known by it
LOCK = f"{PREFIX}lock"
MANIFEST = "manifest.json"  # marks a folder that this package has written
NAME_BYTES = 255  # that file systems take for one name


@contextmanager
def atomic_path(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it once the block ends without an error.

    If the block fails (a full disk, an interrupt), ``path`` stays as it was and nothing is left behind.

    Args:
        path: the file to write; its folder is created.
        durable: wait until the data is on disk, so that a power failure leaves the old file or the new one. False for
            pictures, which can be drawn again: the wait would take longer than the drawing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=PREFIX, suffix=path.suffix[-16:], dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a result should be as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces ``path`` once the block ends without an error and is on disk.

    Text is UTF-8; file names that are not come out as the bytes they are.
    """
    with atomic_path(path) as temporary, open_text(temporary, mode) as file:
        yield file


def open_text(path: str | Path, mode: str = "w") -> IO[Any]:
    """Open a file as :func:`atomic_write` does: line ends stay as written, names of any bytes are kept."""
    if "b" in mode:
        return open(path, mode)
    return open(path, mode, encoding="utf-8", errors="surrogateescape", newline="")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as readable, strict JSON atomically. NaN is refused: undefined metrics are ``null``."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


@contextmanager
def locked(folder: str | Path, *, sweep: bool = True) -> Iterator[None]:
    """Create ``folder`` and hold its lock, so that no other process writes there.

    Args:
        folder: the output folder.
        sweep: delete the temporary files that killed processes left in it and below it.

    Raises:
        BKDError: another process holds the lock, or the folder cannot be written.
    """
    folder = Path(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        if not isinstance(error, Timeout):
            raise BKDError(
                f"the output folder {folder} cannot be written ({error.strerror or error}): choose another"
            ) from error
        raise BKDError(f"another process is writing to {folder}: wait, or choose another output folder") from None
    try:
        if sweep:
            for place, folders, files in os.walk(folder):
                for name in (name for name in (*folders, *files) if name.startswith(PREFIX) and name != LOCK):
                    path = Path(place, name)
                    shutil.rmtree(path) if name in folders and not path.is_symlink() else path.unlink()
                folders[:] = [name for name in folders if not name.startswith(PREFIX)]
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open file, and a full disk must not hide its own error
            (folder / LOCK).unlink()  # filelock makes sure that nobody locks a deleted file
        lock.release()


def is_empty(folder: Path) -> bool:
    """Return whether a folder is absent or holds nothing but a lock and leftovers."""
    return not folder.exists() or all(entry.name.startswith(PREFIX) for entry in folder.iterdir())


def is_output(folder: str | Path) -> bool:
    """Return whether a folder is a run, or holds predictions or an evaluation."""
    try:
        with open(Path(folder, MANIFEST), "rb") as file:
            return b'"bkd_fast"' in file.read(4096)
    except OSError:
        return False


def fitting(path: Path) -> Path:
    """Return ``path`` with each name cut to what file systems take; a digest keeps cut names apart."""
    return Path(*(part if part == path.anchor else _fitting(part) for part in path.parts))


def is_component(name: str) -> bool:
    """Return whether a name can stand for a file inside a folder, on every system."""
    return (
        name not in ("", ".", "..")
        and "\0" not in name
        and PurePosixPath(name).name == PureWindowsPath(name).name == name
        and len(name.encode(errors="surrogatepass")) <= NAME_BYTES
    )


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems sync no folders
            raise
    finally:
        os.close(handle)


def _fitting(name: str) -> str:
    data = os.fsencode(name)
    if len(data) <= NAME_BYTES:
        return name
    suffix = os.fsencode(Path(name).suffix[-16:])
    mark = b"~" + hashlib.sha256(data).hexdigest()[:12].encode()
    kept = data[: NAME_BYTES - len(suffix) - len(mark)]
    try:
        kept.decode()
    except UnicodeDecodeError as error:
        kept = kept[: error.start] if error.end >= len(kept) else kept  # not half of the last character
    return os.fsdecode(kept + mark + suffix)


def write_files(files: Mapping[str, bytes], folder: str | Path) -> None:
    """Write files by their path below a folder; create their folders."""
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
