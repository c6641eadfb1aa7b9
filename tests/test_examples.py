"""The examples, run as a user would."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def start(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_video_judges_every_frame(tiny_run, tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "parts.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 72))
    for shade in range(5):
        writer.write(np.full((72, 80, 3), 60 + 20 * shade, np.uint8))
    writer.release()
    out, errors = start("video.py", tiny_run, path).communicate(timeout=120)
    lines = out.splitlines()
    assert len(lines) == 5, errors
    assert all(line.startswith(f"frame {number}: ") and "score" in line for number, line in enumerate(lines))
    out, errors = start("video.py", tiny_run, tmp_path / "none.avi").communicate(timeout=120)
    assert "there is no camera or video" in errors
