"""Which toolkit and which architectures the CUDA extension is built with, and what is said where none fits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bkd_fast.extension import toolkit, wanted_toolkit
from bkd_fast.extension.cuda import VARIABLE

CUDA = torch.version.cuda
pytestmark = pytest.mark.skipif(CUDA is None, reason="this torch was built without CUDA")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A toolkit in a folder: nvcc is a script that says its version, the rest are empty files."""
    root = tmp_path / "toolkit"
    for variable in ("CUDA_HOME", "CUDA_PATH", VARIABLE, toolkit.LIST):
        monkeypatch.delenv(variable, raising=False)

    def make(version=CUDA, missing=(), folder=root):
        files = ["bin/nvcc", *(f"include/{name}" for name in toolkit.HEADERS), "lib64/libcudart.so"]
        for name in files:
            if name not in missing:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        if "bin/nvcc" not in missing:
            (folder / "bin" / "nvcc").write_text(
                "#!/bin/sh\n"
                f'case "$1" in --version) echo "Cuda compilation tools, release {version}, V1";;\n'
                "--list-gpu-arch) echo compute_75; echo compute_80; echo compute_90; echo compute_120;;\n"
                f'--dryrun) echo "#$ _HERE_=x"; echo "#$ TOP={folder}/bin/.." >&2;;\nesac\n'
            )
            (folder / "bin" / "nvcc").chmod(0o755)
        return folder

    return make


def test_the_toolkit_that_a_variable_names(fake, monkeypatch):
    root = fake()
    monkeypatch.setenv("CUDA_HOME", str(root))
    assert toolkit.find_toolkit() == (root / "bin/nvcc", root / "include", root / "lib64")


def test_a_script_that_calls_nvcc_is_looked_through(fake, monkeypatch, tmp_path):
    root = fake()
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {root}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    assert toolkit.find_toolkit().nvcc == root / "bin" / "nvcc"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"version": "9.2"}, rf"is 9.2 and torch was built for {CUDA}; install CUDA {CUDA}"),
        ({"missing": ("include/cuda_fp16.h",)}, "has no cuda_fp16.h; install its cudart and headers too"),
        ({"missing": ("lib64/libcudart.so",)}, "has no libcudart.so; install its cudart"),
        ({"missing": ("bin/nvcc",)}, "no CUDA toolkit in .*; install CUDA .*, or name its folder with CUDA_HOME"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line_and_is_an_error_where_it_is_needed(fake, monkeypatch, made, message):
    monkeypatch.setenv("CUDA_HOME", str(fake(**made)))
    found, reason = wanted_toolkit()
    assert found is None
    assert re.search(message, reason)
    assert "\n" not in reason
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(RuntimeError, match=f"{VARIABLE}=1, and CUDA kernels cannot be built: .*{message}"):
        wanted_toolkit()


def test_torch_without_cuda_does_not_fit(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(toolkit.ToolkitError, match="this torch was built without CUDA"):
        toolkit.find_toolkit()


def test_the_variable_switches_it_off_and_is_checked(fake, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake()))
    assert wanted_toolkit()[0] is not None
    monkeypatch.setenv(VARIABLE, "0")
    assert wanted_toolkit() == (None, f"{VARIABLE}=0")
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(RuntimeError, match=f"{VARIABLE} is 'yes', expected auto, 0 or 1"):
        wanted_toolkit()


def test_architectures_that_are_asked_for(fake, monkeypatch):
    nvcc = fake() / "bin" / "nvcc"
    monkeypatch.setenv(toolkit.LIST, "8.0 9.0a;12.0+PTX")
    names = toolkit.architectures(nvcc)
    assert names == ["80", "90a", "120+PTX"]
    assert toolkit.code_flags(names)[-2:] == [
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize("wrong", ["7.0", "Ampere", "8", "8.7", "8.0a"])
def test_an_architecture_that_there_is_not_is_named(fake, monkeypatch, wrong):
    monkeypatch.setenv(toolkit.LIST, f"8.0;{wrong}")
    message = f"{toolkit.LIST} has '{wrong}', expected some of 7.5, 8.0, 9.0, 12.0, or one of them with \\+PTX"
    with pytest.raises(toolkit.ToolkitError, match=message):
        toolkit.architectures(fake() / "bin" / "nvcc")


def test_without_a_gpu_those_that_torch_was_built_for(fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_70 sm_75 sm_90 sm_101 compute_90")
    assert toolkit.architectures(fake() / "bin" / "nvcc") == ["75", "90+PTX"]


def test_with_gpus_their_own(fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 0), (7, 0)][index])
    assert toolkit.architectures(fake() / "bin" / "nvcc") == ["80", "90+PTX"]


def test_the_extension_is_loaded_and_knows_its_operators():
    from bkd_fast.ops import native

    if native.without_cuda:
        pytest.skip(native.without_cuda)
    operators = torch.ops.bkd_fast_cuda
    for name in ("deform_conv", "deform_conv_weight", "deform_gather", "memory_attention", "anomaly_map"):
        assert hasattr(operators, name)
    level = torch.ones(1, 8, 2, 2)
    with pytest.raises(NotImplementedError, match="CPU"):  # there are kernels for CUDA alone
        operators.cosine_distances([level], [level], [1.0], [1.0], 0.0, [8], [torch.empty(4)], [])


def test_setup_refuses_what_it_does_not_know():
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, VARIABLE: "maybe"}
    command = [sys.executable, "setup.py", "--version"]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ran.returncode
    assert f"{VARIABLE} is 'maybe', expected auto, 0 or 1" in ran.stderr
