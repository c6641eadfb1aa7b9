import json
import os
import stat

import pytest

from bkd_fast.files import atomic_path, atomic_write, write_json


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "state.txt"
    path.write_text("before")

    def write() -> None:
        with atomic_write(path) as file:
            file.write("half of what was to be wri")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_are_whole_and_readable(tmp_path):
    path = tmp_path / "new" / "value.json"
    write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert list(path.parent.iterdir()) == [path]


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "value.json", {"auroc": float("nan")})
    assert not list(tmp_path.iterdir())


def test_atomic_path_keeps_the_suffix(tmp_path):
    # Image libraries choose the format by it.
    with atomic_path(tmp_path / "a.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"x")
    assert (tmp_path / "a.png").read_bytes() == b"x"
