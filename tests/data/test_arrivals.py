"""Files in folders that others write to: taken once, when they are whole; what goes wrong meanwhile is no error."""

import os
import shutil
import threading
import time

import pytest

from bkd_fast.data import arrivals as module
from bkd_fast.data.arrivals import SETTLE, SETTLE_EMPTY, Arrivals

LATER = SETTLE + 0.01


class Clock:
    """Looks at the folders at times of its own."""

    def __init__(self, *folders, **options):
        self.arrivals, self.now = Arrivals(folders, **options), 0.0

    def after(self, seconds):
        """Return the names of what is taken after this time, as the iteration takes it."""
        self.now += seconds
        ready, _ = self.arrivals._look(self.now)
        self.arrivals.seen |= {str(arrival.path) for arrival in ready}
        self.last = ready
        return [arrival.name for arrival in ready]


def write(path, content=b"x", mode="wb"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, mode) as file:
        file.write(content)
    return path


def test_a_file_is_taken_once_and_only_when_it_has_stopped_changing(tmp_path):
    clock = Clock(tmp_path)
    path = write(tmp_path / "cam/a.png")
    assert clock.after(0) == []
    for _ in range(3):  # grows at every look
        write(path, mode="ab")
        assert clock.after(LATER) == []
    os.utime(path, ns=(1, 1))  # of one size, but written again
    assert clock.after(LATER) == []
    assert clock.after(SETTLE / 2) == []
    assert clock.after(SETTLE / 2) == ["cam/a"]
    write(path, b"another")
    assert clock.after(LATER) == clock.after(LATER) == []


def test_what_was_there_and_what_is_renamed_in_is_taken_in_the_order_of_arrival(tmp_path):
    clock = Clock(tmp_path)
    write(tmp_path / "z.png")
    assert clock.after(0) == []
    write(tmp_path / ".a.png.part")
    clock.after(0.1)
    (tmp_path / ".a.png.part").rename(tmp_path / "a.png")
    assert clock.after(0.1) == []
    assert clock.after(LATER) == ["z", "a"]


def test_an_empty_file_has_more_time(tmp_path):
    clock = Clock(tmp_path)
    first, second = write(tmp_path / "a.png", b""), write(tmp_path / "b.png", b"")
    clock.after(0)
    assert clock.after(LATER) == []
    write(first)
    clock.after(0)
    assert clock.after(LATER) == ["a"]
    assert clock.after(SETTLE_EMPTY) == [second.stem]


def test_what_could_not_be_read_is_taken_again_once_it_changes(tmp_path):
    clock = Clock(tmp_path)
    path = write(tmp_path / "a.png", b"half")
    clock.after(0)
    assert clock.after(LATER) == ["a"]
    clock.arrivals.retry(clock.last[0])
    assert clock.after(LATER) == clock.after(LATER) == []
    write(path, b" and the rest", "ab")
    assert clock.after(0) == []
    assert clock.after(LATER) == ["a"]


def test_files_of_no_image_hidden_ones_and_what_the_package_wrote_are_left_out(tmp_path):
    clock = Clock(tmp_path)
    for name in ("a.txt", "b.png.part", ".c.png", ".git/d.png", "out/masks/e.png"):
        write(tmp_path / name)
    write(tmp_path / "out/manifest.json", b'{"bkd_fast": "0"}')
    write(tmp_path / "kept/F.PNG")
    clock.after(0)
    assert clock.after(LATER) == ["kept/F"]


def test_links_are_followed_and_loops_end(tmp_path):
    write(tmp_path / "elsewhere/a.png")
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(inbox)
    (inbox / "gone.png").symlink_to(tmp_path / "nothing.png")
    (inbox / "self.png").symlink_to("self.png")
    os.mkfifo(inbox / "pipe.png")
    (inbox / "folder.png").mkdir()
    clock = Clock(inbox)
    clock.after(0)
    assert clock.after(LATER) == ["link/a"]


def test_deleted_files_and_folders_are_no_failure(tmp_path, caplog):
    inbox = tmp_path / "inbox"
    write(inbox / "sub/a.png")
    clock = Clock(inbox)
    clock.after(0)
    shutil.rmtree(inbox)
    assert clock.after(LATER) == clock.after(LATER) == []
    assert caplog.text.count("is not there: waiting for it") == 1
    write(inbox / "sub/a.png")
    clock.after(0)
    assert clock.after(LATER) == ["sub/a"]
    shutil.rmtree(inbox / "sub")
    clock.after(0)
    assert caplog.text.count("waiting for it") == 1  # a folder in it may go


def test_a_file_that_goes_while_it_is_looked_at(tmp_path, monkeypatch):
    paths = [write(tmp_path / name) for name in ("a.png", "b.png")]
    original = os.stat

    def stat(path, *arguments, **options):
        if os.fspath(path) == str(paths[0]):
            raise FileNotFoundError(path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(module.os, "stat", stat)
    clock = Clock(tmp_path)
    clock.after(0)
    assert clock.after(LATER) == ["b"]


def test_paths_are_known_as_the_table_has_them(tmp_path, monkeypatch):
    write(tmp_path / "a.png")
    write(tmp_path / "sub/b.png")
    monkeypatch.chdir(tmp_path)
    for folder, seen in ((".", "a.png"), ("sub", os.path.join("sub", "b.png")), (tmp_path, str(tmp_path / "a.png"))):
        clock = Clock(module.Path(folder), seen=[seen])
        clock.after(0)
        names = clock.after(LATER)
        assert seen not in [str(arrival.path) for arrival in clock.last]
        assert names == {".": ["sub/b"], "sub": []}.get(folder, ["sub/b"])


@pytest.mark.parametrize("option", ["seconds", "idle"])
def test_it_ends_in_time(tmp_path, option):
    write(tmp_path / "a.png")
    begin = time.monotonic()
    found = list(Arrivals([tmp_path], **{option: 1.5}))
    assert [arrival.name for arrival in found] == ["a"]
    assert time.monotonic() - begin >= 1.5


def test_idle_time_counts_from_the_last_image(tmp_path):
    def later():
        for index in range(3):
            time.sleep(0.6)
            write(tmp_path / f"{index}.png")

    writer = threading.Thread(target=later)
    writer.start()
    found = [arrival.name for arrival in Arrivals([tmp_path], idle=1.2)]
    writer.join()
    assert found == ["0", "1", "2"]


@pytest.mark.parametrize("how", ["close", "stopped"])
def test_it_ends_when_it_is_told(tmp_path, how):
    flag = threading.Event()
    arrivals = Arrivals([tmp_path], stopped=flag.is_set)
    thread = threading.Thread(target=list, args=(arrivals,))
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    arrivals.close() if how == "close" else flag.set()
    thread.join(30)
    assert not thread.is_alive()
