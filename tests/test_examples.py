"""The examples, run as a user would."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bkd_fast.inference.detector import Detector

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


def test_a_folder_is_watched(tiny_run, tiny_data, tmp_path):
    pictures = sorted((tiny_data / "test").rglob("*.png"))[:3]
    watch = start("watch_folder.py", tiny_run, tmp_path, "--seconds", 90)
    lines = []
    for number, picture in enumerate(pictures):
        time.sleep(0.1)
        shutil.copy(picture, tmp_path / f"{number}.png")
        lines.append(json.loads(watch.stdout.readline()))  # before the next arrives
    (tmp_path / "3.png").write_bytes(b"not an image")
    (tmp_path / "notes.txt").write_text("not judged")
    lines.append(json.loads(watch.stdout.readline()))
    watch.terminate()
    watch.communicate(timeout=60)
    assert [Path(line["file"]).name for line in lines] == ["0.png", "1.png", "2.png", "3.png"]
    detector = Detector.load(tiny_run)
    assert [line["score"] for line in lines[:3]] == pytest.approx([detector(one).score for one in pictures], abs=1e-3)
    assert "not an image that can be decoded" in lines[3]["error"]


CLIENT = """
import sys
from pathlib import Path
from fastapi.testclient import TestClient
from serve import app, detector
with TestClient(app) as client:
    picture = Path(sys.argv[1])
    found = client.post("/predict", content=picture.read_bytes())
    assert found.status_code == 200, found.text
    assert abs(found.json()["score"] - detector(picture).score) < 1e-6
    assert found.json()["anomalous"] == detector(picture).label
    for body, message in ((b"", "0 bytes"), (b"not an image", "not an image")):
        refused = client.post("/predict", content=body)
        assert refused.status_code == 422 and message in refused.text, refused.text
print("served")
"""


def test_images_are_judged_over_http(tiny_run, tiny_data):
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    picture = sorted((tiny_data / "test").rglob("*.png"))[0]
    environment = {**os.environ, "BKD_RUN": str(tiny_run), "PYTHONPATH": str(EXAMPLES)}
    command = [sys.executable, "-c", CLIENT, str(picture)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "served", ran.stderr
