"""Predicts every frame of a camera or a video: python examples/video.py RUN [CAMERA OR FILE].

Needs OpenCV (pip install opencv-python-headless). A frame is predicted as soon as it is there; while one is in
the network, the next is being taken.
"""

import argparse
from collections.abc import Iterator

import cv2
import numpy as np

from bkd_fast import Detector


def frames(source: int | str) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 RGB, until the video ends."""
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        raise SystemExit(f"there is no camera or video {source}")
    try:
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a trained run")
    parser.add_argument("source", nargs="?", default="0", help="number of a camera, or a video file (default: 0)")
    arguments = parser.parse_args()
    detector = Detector.load(arguments.run)
    source = int(arguments.source) if arguments.source.isdigit() else arguments.source
    for number, outcome in enumerate(detector.stream(frames(source))):
        if outcome.result is None:
            print(f"frame {number}: {outcome.error}")
        else:
            verdict = "ANOMALOUS" if outcome.result.label else "normal"
            print(
                f"frame {number}: {verdict}, score {outcome.result.score:.3f}, {outcome.result.mask.mean():.1%} marked"
            )


if __name__ == "__main__":
    main()
