"""The programs of docs/deploy.md that use an exported model without this package: as printed, and without torch."""

import io
import os
import re
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch
from PIL import Image

from bkd_fast.data import load_image, resize_image, to_tensor
from bkd_fast.export import export
from bkd_fast.extension import compiler
from bkd_fast.inference.detector import Detector
from tools.onnxruntime_headers import FRAMEWORK, unpack

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
PYTHON = {"Python without torch": ("onnx", "onnxruntime"), "OpenVINO": ("openvino", "openvino")}


def block(heading, language):
    """Return the block of a language below a heading of the page."""
    section = PAGE.partition(f"\n### {heading}\n")[2].partition("\n### ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[0]


@pytest.fixture(scope="module")
def desk(tiny_default_run, tiny_data, tmp_path_factory):
    """A folder with the files that the programs name, and what the detector says of its image."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "runs/parts").mkdir(parents=True)
    picture = sorted((tiny_data / "test/hole").iterdir())[0]
    image = load_image(picture)
    Image.fromarray(image).save(folder / "new.png")
    detector = Detector.load(tiny_default_run, device="cpu")
    small = resize_image(image, detector.config.teacher.size)
    (folder / "image.rgb").write_bytes(small.tobytes())
    return folder, detector, to_tensor(image, detector.config.teacher.size), to_tensor(small, small.shape[:2])


def agrees(printed, detector, image):
    """Whether a program printed score, decision and number of marked pixels as the detector gives them."""
    score, decision, marked = printed.split()
    expected, maps = detector.score(image[None])
    assert float(score) == pytest.approx(float(expected), rel=1e-3)
    assert decision in ("True", "1")
    assert bool(expected > detector.threshold)
    near = (maps > 0.98 * detector.pixel_threshold).sum(), (maps > 1.02 * detector.pixel_threshold).sum()
    assert near[1] <= int(marked) <= near[0]
    assert 0 < int(marked) < maps.numel()


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("heading", PYTHON)
def test_a_program_without_torch_gives_what_the_detector_gives(heading, alone, desk, tiny_default_run, tmp_path):
    """``alone``: and where nothing but what it needs is installed."""
    format, package = PYTHON[heading]
    pytest.importorskip(package)
    folder, detector, image, _ = desk
    export(tiny_default_run, format, folder / "runs/parts" / f"model.{'onnx' if format == 'onnx' else 'xml'}")
    python, without = sys.executable, "import sys; sys.modules.update(torch=None, bkd_fast=None, timm=None)\n"
    if alone:
        python, without = tmp_path / "alone/bin/python", ""
        venv.create(tmp_path / "alone", with_pip=True)
        got = subprocess.run([python, "-m", "pip", "install", "-q", "numpy", "pillow", package], capture_output=True)
        if got.returncode:
            pytest.skip(f"pip cannot install {package}: {got.stderr[-200:]!r}")
        assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode
    command = [python, "-c", without + block(heading, "python")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    agrees(done.stdout, detector, image)


def built(folder, source, *options):
    """Return a program that is compiled from a block."""
    (folder / "main.cpp").write_text(source)
    done = subprocess.run(
        [compiler(), "main.cpp", "-o", "predict", "-O1", *options], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "predict"


def onnx_runtime(folder):
    """Return the folder of ONNX Runtime's headers and the folder and the name of its library.

    Headers: ``BKD_FAST_ONNXRUNTIME`` names a release for C++; else what ``make proof`` fetched into the environment,
    or Debian's libonnxruntime-dev. The library may be that of the Python package, which has no headers.
    """
    release = os.environ.get("BKD_FAST_ONNXRUNTIME", "/nowhere")
    homes = [release, f"{release}/include", f"{sys.prefix}/include/onnxruntime", "/usr/include/onnxruntime"]
    include = next((home for home in homes if Path(home, "onnxruntime_cxx_api.h").is_file()), None)
    if include is None:
        pytest.skip(
            "there are no headers of ONNX Runtime: python -m tools.onnxruntime_headers $VENV/include/onnxruntime, "
            "or unpack a release for C++ and name its folder with BKD_FAST_ONNXRUNTIME"
        )
    for home in (f"{release}/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"):
        if Path(home, "libonnxruntime.so").exists():
            return include, home
    package = Path(pytest.importorskip("onnxruntime").__file__).parent
    library = next((package / "capi").glob("libonnxruntime.so.*"), None)
    if library is None:
        pytest.skip("onnxruntime's wheel has no library of its own here")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # for the linker, and as its soname says
        (folder / name).symlink_to(library)
    return include, str(folder)


def test_headers_come_from_one_place_in_the_package(tmp_path):
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as package:
        for name in (f"package/{FRAMEWORK}/one.h", f"package/simulator-{FRAMEWORK}/more/two.h", f"{FRAMEWORK}/a.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            package.addfile(member, io.BytesIO(name.encode()))
    assert unpack(tmp_path / "package.tgz", tmp_path / "include") == [tmp_path / "include/one.h"]
    assert (tmp_path / "include/one.h").read_text() == f"package/{FRAMEWORK}/one.h"


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="there is no compiler")
def test_cpp_with_onnx_runtime(desk, tiny_default_run, tmp_path):
    include, library = onnx_runtime(tmp_path)
    folder, detector, _, small = desk
    export(tiny_default_run, "onnx", tmp_path / "model.onnx")
    program = built(
        tmp_path, block("C++ with ONNX Runtime", "cpp"), "-std=c++17", "-I", include, "-L", library, "-lonnxruntime",
        f"-Wl,-rpath,{library}",
    )  # fmt: skip
    done = subprocess.run([program, tmp_path / "model.onnx", folder / "image.rgb"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    agrees(done.stdout, detector, small)
    (tmp_path / "short.rgb").write_bytes(b"123")
    assert subprocess.run([program, tmp_path / "model.onnx", tmp_path / "short.rgb"]).returncode == 1


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="there is no compiler")
def test_cpp_with_aotinductor(desk, tiny_default_run, tmp_path):
    folder, detector, _, small = desk
    export(tiny_default_run, "aoti", tmp_path / "model.aoti.pt2")
    home = Path(torch.__path__[0])
    program = built(
        tmp_path, block("C++ with AOTInductor", "cpp"), "-std=c++20", f"-I{home}/include",
        f"-I{home}/include/torch/csrc/api/include", f"-L{home}/lib", "-ltorch", "-ltorch_cpu", "-lc10",
        f"-Wl,-rpath,{home}/lib",
    )  # fmt: skip
    done = subprocess.run([program, tmp_path / "model.aoti.pt2", folder / "image.rgb"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    agrees(done.stdout, detector, small)


def test_the_commands_that_compile_name_what_the_tests_use():
    assert "-lonnxruntime" in block("C++ with ONNX Runtime", "text")
    assert "-ltorch -ltorch_cpu -lc10" in block("C++ with AOTInductor", "text")
