"""Predicts images as they arrive in a folder: python examples/watch_folder.py RUN FOLDER [--seconds 3600].

Prints one JSON line an image. A file is predicted when it has stopped growing; one that cannot be read is reported,
and watching continues.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from bkd_fast import Detector

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


def arrivals(folder: Path, seconds: float, interval: float = 0.2) -> Iterator[Path]:
    """Files that were not there before, and whose size is what it was at the last look."""
    sizes: dict[Path, int] = {}
    taken: set[Path] = set()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and path not in taken:
                size = path.stat().st_size
                if sizes.get(path) == size:
                    taken.add(path)
                    yield path
                sizes[path] = size
        time.sleep(interval)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a trained run")
    parser.add_argument("folder", type=Path, help="where images arrive")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long to watch (default: for ever)")
    arguments = parser.parse_args()
    detector = Detector.load(arguments.run)
    for outcome in detector.stream(arrivals(arguments.folder, arguments.seconds)):
        line = {"file": str(outcome.item)}
        if outcome.result is None:
            line["error"] = str(outcome.error)
        else:
            line |= {"score": outcome.result.score, "anomalous": outcome.result.label}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
