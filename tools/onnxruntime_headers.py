"""Fetches ONNX Runtime's C++ headers from an npm package: ``python -m tools.onnxruntime_headers FOLDER``.

No Python package has them. With them and the library in the wheel ``onnxruntime`` the tests compile and run the C++
program of docs/deploy.md. ONNX Runtime's C interface keeps old headers working with newer libraries, not the other way
round: a header asks the library for its own version of the interface.
"""

from __future__ import annotations

import argparse
import subprocess
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

PACKAGE = "com.github.asus4.onnxruntime@0.4.9"  # headers of ONNX Runtime 1.29 (MIT), 150 MB with what is not needed
FRAMEWORK = "ios-arm64/onnxruntime.framework/Headers"


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Write the headers in a package to a folder, flat, and return them."""
    written = []
    with tarfile.open(archive) as package:
        for member in package:
            name = PurePosixPath(member.name)
            if member.isfile() and name.suffix == ".h" and str(name.parent).endswith(FRAMEWORK):
                content = package.extractfile(member)
                assert content is not None
                written.append(folder / name.name)
                folder.mkdir(parents=True, exist_ok=True)
                written[-1].write_bytes(content.read())
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write the headers to")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(scratch).glob("*.tgz")
        headers = unpack(archive, folder)
    if not any(header.name == "onnxruntime_cxx_api.h" for header in headers):
        raise SystemExit(f"{PACKAGE} has no onnxruntime_cxx_api.h")
    print(f"{len(headers)} headers of ONNX Runtime in {folder}")


if __name__ == "__main__":
    main()
