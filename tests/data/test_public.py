"""Public data sets: small trees as their authors lay them out, whole and broken, checked and arranged."""

import csv
import hashlib
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bkd_fast.cli import data as command
from bkd_fast.cli import main
from bkd_fast.data import find_categories, public
from bkd_fast.data.image import load_mask
from bkd_fast.data.public import SETS, VISA_COLUMNS, arrange, check_download, count
from bkd_fast.errors import BKDError
from bkd_fast.files import locked

SIZE = (72, 80)


def picture(path, seed=0, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([seed, *path.name.encode()]).integers(60, 120, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def mask(path, value=255, size=SIZE, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    marks = np.zeros(size, np.uint8)
    marks[10:30, 20:40] = value
    image = Image.fromarray(marks)
    if mode == "P":  # labels whose first colours are black
        image = image.convert("P")
        image.putpalette([0, 0, 0] * 256)
    image.save(path)
    return path


def make_tree(root, categories, good="good", kinds=("hole", "scratch"), image=".png", truth="_mask.png"):
    for category in categories:
        for index in range(4):
            picture(root / category / "train" / good / f"{index:03}{image}")
        for kind in (good, *kinds):
            for index in range(2):
                picture(root / category / "test" / kind / f"{index:03}{image}", 1)
                if kind != good:
                    mask(root / category / "ground_truth" / kind / f"{index:03}{truth}")
    return root


def make_btad(root):
    make_tree(root, ["01", "03"], "ok", ["ko"], ".bmp", ".png")
    make_tree(root, ["02"], "ok", ["ko"], ".png", ".png")
    for path in (root / "03/ground_truth/ko").iterdir():  # masks of several formats
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    return root


def make_visa(root, objects=("candle", "pcb1")):
    rows = []
    for name in objects:
        for index in range(6):
            image = f"{name}/Data/Images/Normal/{index:04}.JPG"
            picture(root / image)
            rows.append([name, "train" if index < 4 else "test", "normal", image, ""])
        for index in range(2):
            image, truth = f"{name}/Data/Images/Anomaly/{index:03}.JPG", f"{name}/Data/Masks/Anomaly/{index:03}.png"
            picture(root / image, 1)
            mask(root / truth, value=index + 1, mode="P" if index else "L")
            rows.append([name, "test", "anomaly", image, truth])
    write_table(root, rows)
    return root


def write_table(root, rows, columns=VISA_COLUMNS):
    (root / "split_csv").mkdir(exist_ok=True)
    with open(root / "split_csv/1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def read_table(root):
    with open(root / "split_csv/1cls.csv", newline="") as file:
        return list(csv.reader(file))[1:]


def make_mtd(root):
    for kind, number in (("Free", 11), ("Blowhole", 2), ("Crack", 2)):
        for index in range(number):
            picture(root / f"MT_{kind}/Imgs/exp{index}_num_{kind}.jpg")
            mask(root / f"MT_{kind}/Imgs/exp{index}_num_{kind}.png", value=0 if kind == "Free" else 255)
    (root / "README.md").write_text("magnetic tiles")
    return root


MAKERS = {
    "mvtec": lambda root: make_tree(root, ["bottle", "screw"]),
    "mpdd": lambda root: make_tree(root, ["tubes"]),
    "btad": make_btad,
    "visa": make_visa,
    "mtd": make_mtd,
}
NAMES = tuple(MAKERS)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def source(name, tmp_path):
    return MAKERS[name](tmp_path / "download")


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_command_knows_every_set_and_published_counts_sum_up():
    assert set(command.NAMES) == set(SETS) == set(NAMES)
    for known in SETS.values():
        if known.counts:
            assert tuple(known.counts) == known.parts
            assert tuple(map(sum, zip(*known.counts.values(), strict=True))) == known.total
    totals = {name: sum(known.total) for name, known in SETS.items()}
    assert totals == {"mvtec": 3629 + 1725, "mpdd": 888 + 458, "btad": 2540, "visa": 10_821, "mtd": 1344}


def test_without_a_download_it_says_where_to_get_it(name, capsys):
    assert main(["data", name]) == 0
    said = capsys.readouterr().out
    assert SETS[name].page in said
    assert SETS[name].licence in said
    assert main(["data", name, "--out", "x"]) == 1


def test_a_download_is_arranged_as_the_package_reads_it(name, source, tmp_path, capsys):
    before, out = files(source), tmp_path / "out"
    assert main(["data", name, str(source), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "hard links" in said
    assert SETS[name].licence in said
    assert files(source) == before
    categories = find_categories(out)
    for category in categories:
        assert category.train
        assert {sample.label for sample in category.test} == {0, 1}
        for sample in category.test:
            assert len(sample.masks) == sample.label
            for path in sample.masks:
                expected = np.zeros(SIZE, bool)
                expected[10:30, 20:40] = True
                np.testing.assert_array_equal(load_mask(path), expected)
    arranged = [sample for category in categories for sample in (*category.train, *category.test)]
    assert len(arranged) == len(check_download(name, source).items)
    contents = {(sample.path.stat().st_ino, sample.path.stat().st_nlink) for sample in arranged}
    originals = {path.stat().st_ino for path in source.rglob("*") if path.is_file()}
    assert {inode for inode, _ in contents} <= originals
    assert {links for _, links in contents} == {2}
    content = json.loads((out / "dataset.json").read_text())
    assert content["data_set"] == SETS[name].title
    assert sum(sum(part.values()) for part in content["images"].values()) == len(arranged)
    assert {path.name for path in tmp_path.iterdir()} == {"download", "out"}


EXPECTED = {
    "mvtec": ({"bottle": (4, 6), "screw": (4, 6)}, {"good", "hole", "scratch"}),
    "mpdd": ({"tubes": (4, 6)}, {"good", "hole", "scratch"}),
    "btad": ({"01": (4, 4), "02": (4, 4), "03": (4, 4)}, {"good", "ko"}),
    "visa": ({"candle": (4, 4), "pcb1": (4, 4)}, {"good", "bad"}),
    "mtd": ({"MT_Free": (8, 3), "MT_Blowhole": (0, 2), "MT_Crack": (0, 2)}, {"good", "blowhole", "crack"}),
}


def test_counts_kinds_and_notes(name, source):
    items, problems, notes = check_download(name, source)
    counts, kinds = EXPECTED[name]
    assert not problems
    assert count(items) == counts
    assert {item.kind for item in items} == kinds
    missing = [part for part in SETS[name].parts if part not in counts]
    if missing:
        start = f"{len(missing)} of {len(SETS[name].parts)} folders are missing or empty: {missing[0]}"
        assert notes[0].startswith(start)
    assert sum("published are" in note for note in notes) == (1 if name == "btad" else len(counts))


def test_as_published_is_said_only_of_the_whole_set(tmp_path, monkeypatch, capsys):
    root = make_tree(tmp_path / "download", ["tubes"])
    whole = replace(SETS["mpdd"], parts=("tubes",), counts={"tubes": (4, 6)}, total=(4, 6))
    monkeypatch.setitem(SETS, "mpdd", whole)
    assert main(["data", "mpdd", str(root)]) == 0
    assert "4 training and 6 test images (4 defective), as published" in capsys.readouterr().out
    (root / "tubes/train/good/000.png").unlink()
    assert main(["data", "mpdd", str(root)]) == 0
    said = capsys.readouterr().out
    assert "as published" not in said
    assert "tubes has 3 training and 6 test images, published are 4 and 6" in said


def one_defect(name, source):
    """An image of a defect, and its mask."""
    item = next(item for item in SETS[name].items(source) if item.kind != "good")
    return item.image, item.mask


def test_broken_images_and_masks_are_each_named_and_nothing_is_written(name, source, tmp_path, capsys):
    good = next(item.image for item in SETS[name].items(source) if item.kind == "good")
    image, truth = one_defect(name, source)
    for break_, words in (
        (lambda: good.write_bytes(good.read_bytes()[:200]), good.name),
        (lambda: image.write_bytes(b""), f"{image} is empty"),
        (truth.unlink, str(truth) if name == "visa" else f"{image} has no mask"),
        (lambda: mask(truth, size=(30, 40)), "40 x 30 pixels and its image"),
        (lambda: truth.write_bytes(b"not an image"), f"{truth} is not an image"),
    ):
        kept = {path: path.read_bytes() for path in (good, image, truth)}
        break_()
        assert main(["data", name, str(source), "--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr()
        (problem,) = [line for line in said.out.splitlines() if line.startswith("problem: ")]
        assert words in problem
        assert "1 problems in" in said.err
        assert {path.name for path in tmp_path.iterdir()} == {"download"}
        for path, content in kept.items():
            path.write_bytes(content)
    image.write_bytes(b"")
    number = len(SETS[name].items(source))
    assert main(["data", name, str(source), "--out", str(tmp_path / "out"), "--skip-unreadable"]) == 0
    images = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and "ground_truth" not in path.parts]
    assert len(images) - 1 == number - 1  # less dataset.json


def test_files_that_do_not_belong_are_named_and_left_out(name, source, tmp_path):
    picture(source / "extra/one.png")
    image, _ = one_defect(name, source)
    picture(image.parent / "deeper" / "two.png")
    notes = check_download(name, source).notes
    (note,) = [note for note in notes if "not part of the set" in note]
    assert note.startswith("2 image file(s)")
    assert "one.png" in note
    assert "two.png" in note


def test_a_mask_without_its_image_is_named(name, source):
    image, truth = one_defect(name, source)
    if name == "visa":
        write_table(source, [row for row in read_table(source) if row[3] != image.relative_to(source).as_posix()])
    image.unlink()
    _, problems, notes = check_download(name, source)
    assert not problems
    assert any("not part of the set" in note and str(truth) in note for note in notes)


def test_empty_masks_are_named(name, source):
    _, truth = one_defect(name, source)
    mask(truth, value=0)
    _, problems, notes = check_download(name, source)
    assert not problems
    assert any(f"1 mask(s) mark nothing: {truth}" in note for note in notes)


def test_two_images_of_one_name_are_a_problem(source, name):
    image, _ = one_defect(name, source)
    other = image.with_suffix(".webp")
    Image.open(image).save(other)
    if name == "visa":
        rows = read_table(source)
        row = next(row for row in rows if row[3] == image.relative_to(source).as_posix())
        write_table(source, [*rows, [*row[:3], other.relative_to(source).as_posix(), row[4]]])
    problems = check_download(name, source).problems
    assert sorted(problems) == sorted(f"{path} has the name of another image" for path in (image, other))


def test_another_folder_is_refused_with_what_is_expected(name, tmp_path, source):
    with pytest.raises(BKDError, match="does not look like") as caught:
        check_download(name, tmp_path)
    assert f"{source} does: pass that" in str(caught.value)
    (tmp_path / "other").mkdir()
    with pytest.raises(BKDError, match="does not look like") as caught:
        check_download(name, tmp_path / "other")
    assert SETS[name].page in str(caught.value)
    with pytest.raises(BKDError, match="there is no folder"):
        check_download(name, tmp_path / "nothing")


def test_outputs_that_are_refused(tmp_path, capsys):
    source = MAKERS["mpdd"](tmp_path / "download")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for out in ("full", "file", "download", "download/out", "."):
        before = files(tmp_path)
        assert main(["data", "mpdd", str(source), "--out", str(tmp_path / out)]) == 1
        assert capsys.readouterr().err.startswith("bkd-fast: ")
        assert files(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert main(["data", "mpdd", str(source), "--out", str(tmp_path / "empty")]) == 0
    assert find_categories(tmp_path / "empty")[0].name == "tubes"
    with pytest.raises(BKDError, match="expected one of"):
        check_download("coco", source)


def test_what_fails_or_was_killed_leaves_nothing(tmp_path, monkeypatch):
    source, out = MAKERS["mpdd"](tmp_path / "download"), tmp_path / "out"
    items = check_download("mpdd", source).items
    original, calls = public._place, []

    def place(*arguments):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(public, "_place", place)
    with pytest.raises(OSError, match="No space"):
        arrange("mpdd", items, out)
    assert {path.name for path in tmp_path.iterdir()} == {"download"}
    monkeypatch.undo()
    picture(tmp_path / ".bkd-out/data/tubes/train/good/left.png")  # of a killed process
    with locked(tmp_path / ".bkd-out"), pytest.raises(BKDError, match="another process"):
        arrange("mpdd", items, out)
    arrange("mpdd", items, out)
    assert {path.name for path in tmp_path.iterdir()} == {"download", "out"}
    assert not list(out.rglob("left.png"))


def test_copies_where_links_are_not_wanted_or_not_possible(name, source, tmp_path, monkeypatch):
    items = check_download(name, source).items
    assert "(copies)" in arrange(name, items, tmp_path / "asked", copy=True)

    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert "(copies)" in arrange(name, items, tmp_path / "forced")
    monkeypatch.undo()
    arrange(name, items, tmp_path / "linked")
    for out in ("asked", "forced"):
        assert files(tmp_path / out) == files(tmp_path / "linked")
        assert all(path.stat().st_nlink == 1 for path in (tmp_path / out).rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"columns": ("object", "split", "label", "image", "masks")}, "mask is missing"),
        ({"object": "cup"}, "expected an object of VisA"),
        ({"split": "val"}, "train or test"),
        ({"label": "bad"}, "normal or anomaly"),
        ({"label": "anomaly"}, "trains on an anomalous image"),
        ({"image": "../outside.png"}, "expected a path in the download"),
        ({"image": "/etc/outside.png"}, "expected a path in the download"),
        ({"image": ""}, "names no image"),
    ],
)
def test_a_table_of_visa_with_other_content_is_refused(change, words, tmp_path):
    root = make_visa(tmp_path / "download")
    rows, columns = read_table(root), change.pop("columns", VISA_COLUMNS)
    for column, value in change.items():
        rows[0][VISA_COLUMNS.index(column)] = value
    write_table(root, rows, columns)
    with pytest.raises(BKDError, match="1cls.csv") as caught:
        check_download("visa", root)
    assert words in str(caught.value)


def test_a_table_of_visa_that_is_no_text_is_refused(tmp_path):
    root = make_visa(tmp_path / "download")
    (root / "split_csv/1cls.csv").write_bytes(b"object,\xff\xfe")
    with pytest.raises(BKDError, match="is not a table"):
        check_download("visa", root)


def test_an_image_of_visa_that_is_listed_and_missing(tmp_path):
    root = make_visa(tmp_path / "download")
    (root / "candle/Data/Images/Normal/0000.JPG").unlink()
    (problem,) = check_download("visa", root).problems
    assert problem.endswith("0000.JPG does not exist")


def test_the_split_of_magnetic_tiles_depends_on_the_names_alone(tmp_path):
    root = make_mtd(tmp_path / "download")
    shutil.copytree(root, tmp_path / "again")
    names = [f"exp{index}_num_Free.jpg" for index in range(11)]
    expected = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:3]
    for folder in (root, tmp_path / "again"):
        good = [item for item in SETS["mtd"].items(folder) if item.kind == "good"]
        assert {item.image.name for item in good if item.split == "test"} == set(expected)


def test_good_tiles_whose_masks_are_not_empty_are_kept_and_named(tmp_path):
    root = make_mtd(tmp_path / "download")
    marked, broken = (root / f"MT_Free/Imgs/exp{index}_num_Free.png" for index in (0, 1))
    mask(marked)
    broken.write_bytes(b"not an image")
    items, problems, notes = check_download("mtd", root)
    assert not problems
    assert len(items) == 15
    assert f"1 mask(s) of good images mark something: {marked}" in notes
    assert f"1 mask(s) of good images cannot be decoded: {broken}" in notes
    arrange("mtd", items, tmp_path / "out")
    assert not (tmp_path / "out/mtd/ground_truth/good").exists()


def test_hidden_folders_are_no_kinds(tmp_path):
    root = make_tree(tmp_path / "download", ["bottle"])
    picture(root / "bottle/test/.ipynb_checkpoints/000-checkpoint.png")
    items, problems, _ = check_download("mvtec", root)
    assert not problems
    assert {item.kind for item in items} == {"good", "hole", "scratch"}


def test_an_arranged_set_is_trained_and_evaluated(tmp_path, tiny_default):
    from bkd_fast.evaluation.evaluate import evaluate
    from bkd_fast.training.train import train

    source = make_visa(tmp_path / "download", ["candle"])
    assert main(["data", "visa", str(source), "--out", str(tmp_path / "visa")]) == 0
    run = train(tmp_path / "visa", tmp_path / "run", tiny_default, progress=False)
    metrics = evaluate(run, progress=False)
    assert metrics["categories"]["candle"]["images"]["test"] == 4
    assert metrics["categories"]["candle"]["pixel_auroc"] is not None
