"""The documentation builds without a warning, its examples run, and every field, command and public name is in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bkd_fast
from bkd_fast import ops
from bkd_fast.config import GROUPS, options

KINDS = [kind for kinds in GROUPS.values() for kind in kinds]
DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.slow
def test_the_documentation_builds_without_warnings_and_its_examples_run(tmp_path):
    for package in ("sphinx", "myst_parser", "furo", "sphinx_argparse_cli", "anomalib", "ray"):
        pytest.importorskip(package, reason="the extras docs, anomalib and ray are not installed")
    for builder in ("doctest", "html"):
        command = [sys.executable, "-W", "ignore", "-m", "sphinx", "-W", "--keep-going", "-q", "-b", builder]
        done = subprocess.run(
            [*command, "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / builder)],
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0 failures in tests" in (tmp_path / "doctest" / "output.txt").read_text()
    config = (tmp_path / "html" / "config.html").read_text()
    assert all(f">{kind.group}.{each.name}<" in config for kind in KINDS for each in options(kind))
    commands = (tmp_path / "html" / "commands.html").read_text()
    assert all(f"bkd-fast {name}" in commands for name in ("demo", "train", "evaluate", "predict", "ablate", "export"))


def test_every_option_says_what_it_is():
    texts = {f"{kind.group}.{each.name}": each.metadata["text"] for kind in KINDS for each in options(kind)}
    assert all(len(text) > 5 for text in texts.values()), texts


def test_every_public_name_is_documented():
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    names = {name for module in (bkd_fast, ops) for name in module.__all__ if not name.startswith("__")}
    names -= {"describe"}  # what `bkd-fast info` prints
    missing = sorted(name for name in names if name not in pages)
    assert not missing


def test_every_test_that_reliability_names_exists():
    text = (DOCS / "reliability.md").read_text()
    files = dict(re.findall(r"^\[(\w+)\]: (\S+)$", text, re.MULTILINE))
    named = re.findall(r"`(test_\w+)`\]\[(\w+)\]", text)
    assert len(named) == text.count("`test_") > 50
    missing = [name for name, key in named if f"def {name}(" not in (DOCS / files[key]).read_text()]
    assert not missing
