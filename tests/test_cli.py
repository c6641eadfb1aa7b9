import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomlkit

from bkd_fast.cli import EXTRAS, main
from bkd_fast.config import BKDConfig
from bkd_fast.ops.backend import operators
from bkd_fast.version import __version__

COMMANDS = ("demo", "train", "evaluate", "predict", "info", "bench")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_reads_well(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: bkd-fast")
    for name in COMMANDS if not command else (command,):
        assert name in text


def test_help_does_not_wait_for_torch():
    code = "import sys; from bkd_fast.cli import EXTRAS, parser; parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_info_says_what_runs_where(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bkd_fast"] == __version__
    assert set(facts["operators"]["runs"]) == set(operators())
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "cuda" in text
    assert "sparse_memory_attention" in text
    assert "kernels: " in text


def test_training_from_the_command_line(tiny_data, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", str(tiny_data), "--out", str(out), "--teacher", "test_resnet", "--weights", "none"]
    small = ["--image-size", "64", "--epochs", "1", "--set", "memory.items=16", "anomaly_map.sigma=2"]
    assert main([*arguments, *small]) == 0
    assert f"bkd-fast evaluate {out}" in capsys.readouterr().out
    config = BKDConfig.from_toml((out / "config.toml").read_text())
    assert (config.teacher.image_size, config.anomaly_map.sigma, config.memory.items) == ((64, 64), 2.0, 16)
    # Silent where nobody watches: no bar in a captured stream.
    assert "images/s" not in capsys.readouterr().err
    assert main([*arguments, *small]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main([*arguments, *small, "--resume"]) == 0
    good = str(tiny_data / "train" / "good")  # no test images: nothing to evaluate
    assert main(["train", good, "--out", str(tmp_path / "good"), *arguments[4:], *small]) == 0
    assert f"next: bkd-fast predict {tmp_path / 'good'} IMAGES" in capsys.readouterr().out


def test_public_names_are_there():
    import bkd_fast

    assert dir(bkd_fast) == sorted(bkd_fast.__all__)
    for name in bkd_fast.__all__:
        assert getattr(bkd_fast, name) is not None
    assert callable(bkd_fast.train)
    assert callable(bkd_fast.evaluate)
    with pytest.raises(AttributeError, match="no attribute 'detect'"):
        _ = bkd_fast.detect


LIGHT = """
import sys, torch
before = set(sys.modules)
import bkd_fast.ops
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = {"timm", "torchvision", "sklearn", "scipy", "lightning", "lightning_fabric", "triton", "PIL", "matplotlib"}
assert not new & heavy, new & heavy
"""
BASE = """
import sys
from pathlib import Path
for name in {blocked}:
    sys.modules[name] = None
import bkd_fast.ops, bkd_fast.evaluation.predict, bkd_fast.evaluation.environment, bkd_fast.evaluation.calibrate
import bkd_fast.evaluation.update
assert bkd_fast.Detector
"""


@pytest.mark.parametrize("code", [LIGHT, BASE.format(blocked=EXTRAS["train"])])
def test_imports_need_no_more_than_they_use(code):
    """The operators import none of the heavy packages; prediction imports none of the optional ones."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["train", "parts", "--out", "run"], "lightning_fabric", "train"),
        (["evaluate", "run"], "sklearn", "train"),
        (["demo", "--out", "run"], "skimage", "demo"),
    ],
)
def test_a_missing_extra_is_named_in_one_sentence(command, package, extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = f"import sys; sys.modules[{package!r}] = None; from bkd_fast.cli import main; sys.exit(main({command!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert package in line or "scikit-image" in line
    assert f"bkd_fast[{extra}]" in line


def test_a_missing_package_that_is_no_extra_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "bkd_fast.evaluation.environment", None)
    with pytest.raises(ModuleNotFoundError, match="environment"):
        main(["info"])


def test_every_optional_package_is_in_the_extra_that_is_named():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomlkit.parse(text).unwrap()["project"]["optional-dependencies"]
    names = {"sklearn": "scikit-learn", "skimage": "scikit-image"}
    for extra, packages in EXTRAS.items():
        listed = [re.split(r"[^\w-]", requirement)[0] for requirement in extras[extra]]
        assert {names.get(package, package.replace("_", "-")) for package in packages} <= set(listed)


def test_other_libraries_are_quiet(tmp_path):
    """Their infos and warnings about themselves are not shown, what they warn of in their logs is."""
    code = """
import logging, warnings
import bkd_fast.cli.info as command
from bkd_fast.cli import main

def run(arguments):
    logging.getLogger("onnxscript.optimizer").info("Replaced initializer 'val_991'")
    logging.getLogger("somebody").info("chatter")
    logging.getLogger("somebody").warning("the disk is nearly full")
    logging.getLogger("bkd_fast").info("epoch 1")
    warnings.warn_explicit("no complete tensor", UserWarning, "x.py", 1, module="torch.export.package")
    warnings.warn_explicit("corrupt EXIF data", UserWarning, "x.py", 2, module="PIL.TiffImagePlugin")

command.run = run
main(["info"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert lines[:2] == ["the disk is nearly full", "epoch 1"]
    assert "corrupt EXIF data" in lines[2]
    assert len(lines) == 3
