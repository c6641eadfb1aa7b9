import json
import subprocess
import sys

import pytest

from bkd_fast.cli import main
from bkd_fast.config import BKDConfig
from bkd_fast.ops.backend import OPERATORS
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
    code = "import sys; from bkd_fast.cli import parser; parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_info_says_what_runs_where(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bkd_fast"] == __version__
    assert set(facts["operators"]["runs"]) == set(OPERATORS)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "cuda" in text
    assert "sparse_memory_attention" in text
    assert "kernels: " in text


def test_training_from_the_command_line(tiny_data, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", str(tiny_data), "--out", str(out), "--teacher", "resnet18", "--weights", "none"]
    small = [
        "--image-size",
        "64",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--set",
        "memory.items=16",
        "anomaly_map.sigma=2",
    ]
    assert main([*arguments, *small]) == 0
    assert f"bkd-fast evaluate {out}" in capsys.readouterr().out
    config = BKDConfig.from_toml((out / "config.toml").read_text())
    assert (config.teacher.image_size, config.anomaly_map.sigma, config.memory.items) == ((64, 64), 2.0, 16)
    # Silent where nobody watches: no bar in a captured stream.
    assert "images/s" not in capsys.readouterr().err
    assert main([*arguments, *small]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main([*arguments, *small, "--resume"]) == 0


def test_public_names_are_there():
    import bkd_fast

    assert dir(bkd_fast) == sorted(bkd_fast.__all__)
    for name in bkd_fast.__all__:
        assert getattr(bkd_fast, name) is not None
    assert callable(bkd_fast.train)
    assert callable(bkd_fast.evaluate)
    with pytest.raises(AttributeError, match="no attribute 'detect'"):
        _ = bkd_fast.detect


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
