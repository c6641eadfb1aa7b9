"""What `predict` writes and says: JSON lines beside the table, folders that are watched, the exit status."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from tiny import picture, rows_of

from bkd_fast.cli import main
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.predict import COLUMNS, NUMBERS, predict


def lines_of(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_bytes().split(b"\n")[:-1]]


def as_rows(lines):
    """JSON lines as the rows of the table."""
    return [{name: str(value) for name, value in line.items()} for line in lines]


@pytest.fixture
def inbox(tmp_path):
    for index in range(3):
        picture(tmp_path / "inbox" / f"{index}.png", index)
    return tmp_path / "inbox"


def test_each_json_line_is_a_row_of_the_table(tiny_default_run, inbox, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("bkd_fast"), "propagate", False)  # xdist cannot send such names
    for name in ("new\nline.png", 'comma, "quote".png', os.fsdecode(b"caf\xe9.png")):
        picture(inbox / name)
    out = tmp_path / "out"
    assert main(["predict", str(tiny_default_run), str(inbox), "--out", str(out), "--no-pictures"]) == 0
    lines = lines_of(out)
    assert len(lines) == 6
    assert as_rows(lines) == rows_of(out)
    assert all(tuple(line) == COLUMNS for line in lines)
    assert all(type(line[name]) is float for line in lines for name in NUMBERS)
    settings = json.loads((out / "manifest.json").read_text())
    assert (settings["precision"], settings["tile"], settings["pictures"]) == ("32", None, False)
    assert {line["threshold"] for line in lines} == {settings["threshold"]}


@pytest.mark.parametrize("damage", ["half a line", "a line too few", "a line too many", "no file", "half a row"])
def test_resuming_makes_the_json_lines_those_of_the_table(damage, tiny_default_run, inbox, tmp_path):
    out = tmp_path / "out"
    predict(tiny_default_run, [inbox], out, pictures=False)
    whole, lines = (out / "scores.csv").read_bytes(), out / "predictions.jsonl"
    before = lines.read_bytes()
    if damage == "half a line":
        lines.write_bytes(before[:-20])
    elif damage == "a line too few":
        lines.write_bytes(b"".join(before.splitlines(keepends=True)[:-1]))
    elif damage == "a line too many":
        lines.write_bytes(before + before.splitlines(keepends=True)[-1])
    elif damage == "no file":
        lines.unlink()
    else:
        (out / "scores.csv").write_bytes(whole[:-10])
    summary = predict(tiny_default_run, [inbox], out, pictures=False, resume=True)
    assert summary[1:] == (3, summary.anomalous, 0)
    assert (out / "scores.csv").read_bytes() == whole
    assert lines.read_bytes() == before


def test_a_table_with_other_values_is_refused(tiny_default_run, inbox, tmp_path):
    predict(tiny_default_run, [inbox], tmp_path / "out", pictures=False)
    rows = rows_of(tmp_path / "out")
    with open(tmp_path / "out/scores.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "score": "high"} for row in rows)
    with pytest.raises(BKDError, match="does not have the columns"):
        predict(tiny_default_run, [inbox], tmp_path / "out", pictures=False, resume=True)


LOW, HIGH = ("--threshold=-1e9",), ("--threshold=1e9",)


@pytest.mark.parametrize(
    ("options", "broken", "status"),
    [
        (LOW, False, 0),
        ((*LOW, "--fail-on-defects"), False, 3),
        ((*HIGH, "--fail-on-defects"), False, 0),
        ((*HIGH, "--fail-on-defects"), True, 1),
        ((*HIGH, "--skip-unreadable"), True, 0),
        ((*HIGH, "--skip-unreadable", "--fail-on-defects"), True, 4),
        ((*LOW, "--skip-unreadable", "--fail-on-defects"), True, 3),
        ((*HIGH, "--watch", "--watch-idle", "0.5", "--fail-on-defects"), True, 4),
    ],
)
def test_the_exit_status(options, broken, status, tiny_default_run, inbox, tmp_path, capsys):
    if broken:
        (inbox / "broken.png").write_bytes(b"not an image")
    command = ["predict", str(tiny_default_run), str(inbox), "--out", str(tmp_path / "out"), "--no-pictures"]
    assert main([*command, *options]) == status
    said = capsys.readouterr().out
    assert status == 1 or f"3 images, {3 if LOW[0] in options else 0} anomalous" in said
    assert ("1 could not be read" in said) == (broken and status != 1)


def test_the_exit_status_counts_the_rows_of_before(tiny_default_run, inbox, tmp_path):
    command = ["predict", str(tiny_default_run), str(inbox), "--out", str(tmp_path / "out"), "--no-pictures", *LOW]
    assert main(command) == 0
    assert main([*command, "--resume", "--fail-on-defects"]) == 3


def test_a_wrong_option_has_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "run", "images", "--out", "out", "--watch-seconds", "soon"])
    assert caught.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--watch-idle", "3"], "add --watch"),
        (["--watch", "--watch-seconds", "-1"], "--watch-seconds is -1"),
        (["--watch", "--watch-seconds", "nan"], "finite"),
        (["--watch", "--roi", "masks"], "leave out --watch"),
    ],
)
def test_bad_options_of_watching(options, words, tiny_default_run, inbox, tmp_path, capsys):
    command = ["predict", str(tiny_default_run), str(inbox), "--out", str(tmp_path / "out")]
    assert main([*command, *options]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_watched(tiny_default_run, inbox, tmp_path):
    with pytest.raises(BKDError, match="--watch takes folders"):
        predict(tiny_default_run, [inbox / "0.png"], tmp_path / "out", watching=True)
    out = tmp_path / "empty"
    (out / ".bkd-in").mkdir(parents=True)
    for folder in (out, out / ".bkd-in"):
        with pytest.raises(BKDError, match="is in the output folder"):
            predict(tiny_default_run, [folder], out, watching=True)


def until(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_a_folder_is_watched_until_ctrl_c(tiny_default_run, inbox, tmp_path):
    """Slow writers, files renamed in, broken and deleted ones, OUT in the folder; then a restart."""
    out, said = inbox / "out", tmp_path / "said"
    command = [sys.executable, "-W", "ignore", "-m", "bkd_fast", "predict", str(tiny_default_run), str(inbox)]
    command += ["--out", str(out), "--watch", "--resume", "--threshold=-1e9"]

    def names():
        return [row["name"] for row in rows_of(out)] if (out / "scores.csv").is_file() else []

    with open(said, "wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=subprocess.PIPE)
        try:
            until(lambda: len(names()) == 3, process)
            content = picture(tmp_path / "source.png", 7).read_bytes()
            with open(inbox / "slow.png", "wb", buffering=0) as file:
                for start in range(0, len(content), len(content) // 8):
                    file.write(content[start : start + len(content) // 8])
                    time.sleep(0.2)
            picture(tmp_path / "made/moved.png", 8).rename(inbox / "moved.png")
            (inbox / "broken.png").write_bytes(b"not an image")
            picture(inbox / "deleted.png").unlink()
            until(lambda: len(names()) == 5 and b"broken.png" in said.read_bytes(), process)
            picture(inbox / "broken.png", 9)  # its writer comes back
            until(lambda: len(names()) == 6, process)
            (inbox / "broken2.png").write_bytes(b"not an image")
            until(lambda: b"broken2.png" in said.read_bytes(), process)
            process.send_signal(signal.SIGINT)
            printed = process.communicate(timeout=120)[0]
        finally:
            process.kill()
    assert process.returncode == 0
    assert b"6 images, 6 anomalous, 1 could not be read" in printed
    assert b"anomalous: " in said.read_bytes()
    assert b"Traceback" not in said.read_bytes()
    rows = rows_of(out)
    assert sorted(row["name"] for row in rows) == ["0", "1", "2", "broken", "moved", "slow"]
    assert as_rows(lines_of(out)) == rows
    assert {path.stem for path in (out / "masks").iterdir()} == {row["name"] for row in rows}
    picture(inbox / "next.png", 10)
    arguments = [*command[5:], "--watch-idle", "1"]
    assert main(arguments) == 0
    assert [row["name"] for row in rows_of(out)] == [*(row["name"] for row in rows), "next"]


def test_an_error_ends_watching_and_its_thread(tiny_default_run, inbox, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bkd_fast.evaluation.predict.write_overlay", full)
    with pytest.raises(OSError, match="No space"):
        predict(tiny_default_run, [inbox], tmp_path / "out", watching=True)
    end = time.monotonic() + 30
    while any(thread.name == "stream source" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_report_of_what_was_watched(tiny_default_run, inbox, tmp_path):
    predict(tiny_default_run, [inbox], tmp_path / "out", watching=True, watch_idle=0.1, report=True)
    page = (tmp_path / "out/report.html").read_text()
    assert all(str(inbox / f"{index}.png") in page for index in range(3))
