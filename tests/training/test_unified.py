"""One model of several categories: each with thresholds of its own, and each image decided by its nearest."""

import csv
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import rows_of

from bkd_fast.artifact import load_trained, read_manifest, write_manifest
from bkd_fast.cli import main
from bkd_fast.config import BKDConfig
from bkd_fast.data import find_unified
from bkd_fast.decisions import threshold_for
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.calibrate import calibrate
from bkd_fast.evaluation.evaluate import evaluate, table
from bkd_fast.evaluation.predict import predict
from bkd_fast.evaluation.update import update
from bkd_fast.export import export
from bkd_fast.inference.detector import Detector
from bkd_fast.model.calibration import greedy_coreset, shared_coreset
from bkd_fast.training.checkpoint import Progress, save_checkpoint
from bkd_fast.training.train import train

NAMES = ("stripes", "tile")
FLAGS = ["--set", *(f"{name}={json.dumps(value)}" for name, value in tiny.TINY.items())]


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """MVTec AD's layout with two categories that look nothing alike: a gradient, and yellow stripes."""
    root = tmp_path_factory.mktemp("products")
    tiny.make_category(root / "tile")
    tiny.make_category(root / "stripes", train=8)
    for path in root.glob("stripes/t*/*/*.png"):
        image = np.asarray(Image.open(path)).astype(int)
        image[:, :, 2] = 0
        image[:, 4::8] //= 3
        Image.fromarray(image.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def run(products, tiny_default, tmp_path_factory):
    config = tiny_default.with_changes({"training.false_alarms": 0.2})
    return train(products, tmp_path_factory.mktemp("unified") / "both", config, unified=True, progress=False)


def test_every_category_has_its_share_of_the_bank_and_its_own_thresholds(run):
    trained = load_trained(run)
    unified = trained.unified
    assert tuple(unified.names) == NAMES
    assert [unified.bank.count(0), unified.bank.count(1)] == [6, 8]  # all that are not for validation
    assert [len(one.scores) for one in unified.calibrations] == [8, 10]
    assert trained.calibration.scores == sorted(score for one in unified.calibrations for score in one.scores)
    assert unified.calibrations[0].threshold != unified.calibrations[1].threshold
    origin = trained.model.memories[0].origin
    assert ((origin < 6).sum(), (origin >= 6).sum()) == (8, 8)


def test_an_image_is_decided_by_the_thresholds_of_its_category(run, products):
    detector = Detector.load(run, device="cpu")
    for number, name in enumerate(NAMES):
        calibration = detector.unified.calibrations[number]
        for path in sorted((products / name / "test").rglob("*.png")):
            prediction = detector(path)
            assert prediction.category == name
            assert prediction.label == (prediction.score > calibration.threshold)
            assert (prediction.mask == (prediction.anomaly_map > calibration.pixel_threshold)).all()
            assert (prediction.normalized_score > 0.5) == prediction.label
            assert prediction.label or "good" in str(path)
    again = pickle.loads(pickle.dumps(detector))
    assert again(path).score == prediction.score
    batch = detector(torch.rand(3, 3, 64, 64))
    assert {one.category for one in batch} <= set(NAMES)


def test_training_scores_are_those_of_the_detector(run, products):
    """Validation images are scored as the detector scores new ones, on the scale of their category."""
    detector, source = Detector.load(run, device="cpu"), read_manifest(run).source
    for number, name in enumerate(NAMES):
        files = [path for path in source.validation_files if path.startswith(f"{name}/")]
        assert files
        for path in files:
            score = detector(products / name / "train/good" / path.partition("/")[2]).score
            assert min(abs(score - other) for other in detector.unified.calibrations[number].scores) < 2e-2


def test_scores_are_less_what_the_supports_score(run, products):
    """Scores are those of the formula, from the scale of the category and what its supports are expected to score."""
    detector = Detector.load(run, device="cpu")
    model = detector.model
    assert model.support_excess[:14].abs().min() > 0  # all were scored without themselves
    image = detector.preprocess(products / "tile/test/hole/000.png").input[None]
    with torch.inference_mode():
        result = detector.distill(image)
        top = model.top_mean(model.anomaly_map(result, model.config.teacher.size))
        assert result.expected.abs().min() > 0
        scale = detector.unified.scales[1]
        parts = [
            (value.log() - expected - scale[name][0]) / scale[name][1]
            for name, value, expected in zip(("map", "image"), (top, result.image), result.expected[0], strict=True)
        ]
        parts[1] += np.log(model.config.anomaly_map.image_weight)
        expected = torch.stack(parts).logsumexp(0).item()
    assert detector(products / "tile/test/hole/000.png").score == pytest.approx(expected, rel=1e-4)


def test_evaluate_measures_each_category(run, products, tmp_path):
    metrics = evaluate(run, out=tmp_path / "out", progress=False)
    assert tuple(metrics["categories"]) == NAMES
    for name in NAMES:
        assert metrics["categories"][name]["nearest"][name] == 1.0
        assert metrics["categories"][name]["images"]["test"] == 6
        assert metrics["categories"][name]["image_auroc"] == 1.0
    assert metrics["categories"]["stripes"]["images"]["train"] == 6
    assert json.loads((tmp_path / "out/metrics.json").read_text())["mean"] == metrics["mean"]
    assert table(metrics).endswith("nearest to their own category: 100.0 % of the images")
    rows = rows_of(tmp_path / "out")
    assert [row["nearest"] for row in rows] == [row["category"] for row in rows]
    assert len({row["threshold"] for row in rows}) == 2
    with pytest.raises(BKDError, match="has no category 'stripes'"):
        evaluate(run, products / "tile", out=tmp_path / "other", progress=False)


def test_predict_names_the_category(run, products, tmp_path):
    predict(run, [products / "tile/test", products / "stripes/test"], tmp_path / "out", progress=False)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 12
    assert all(f"/{row['category']}/" in row["file"] for row in rows)
    assert len({row["threshold"] for row in rows}) == 2
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [line["category"] for line in lines] == [row["category"] for row in rows]
    # The lines are written again from the rows.
    (tmp_path / "out/predictions.jsonl").unlink()
    again = predict(run, [products / "tile/test"], tmp_path / "out", resume=True, progress=False)
    assert again.images == 12
    assert [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()] == lines


def test_watched_images_have_a_category(run, products, tmp_path):
    folders = [products / name / "test/good" for name in NAMES]
    predict(run, folders, tmp_path / "out", watching=True, watch_idle=0.2, drift=True)
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert {(row["category"], row["file"].split("/")[-4]) for row in rows} == {(name, name) for name in NAMES}


def test_a_report_has_scores_less_the_threshold_of_each_category(run, products, tmp_path):
    predict(run, [products / "tile/test", products / "stripes/test"], tmp_path / "out", report=True, progress=False)
    with (tmp_path / "out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    page = (tmp_path / "out/report.html").read_text()
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[0])
    above = {f"{row['category']}: {row['file']}": float(row["score"]) - float(row["threshold"]) for row in rows}
    assert dict(zip(data["name"], data["score"], strict=True)) == above
    assert {row["decision"] for row in rows} == {"anomalous", "normal"}
    assert [row["decision"] == "anomalous" for row in rows] == [score > 0 for score in above.values()]
    unified = read_manifest(run).unified
    normal = [score - own.threshold for own in unified.calibrations for score in own.scores]
    assert (data["threshold"], data["normal"], data["run"]) == (0, sorted(normal), None)
    assert "Scores are less the threshold of the category" in page


def test_calibrate_sets_the_thresholds_of_the_category_that_images_are_taken_for(run, products, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    before, good = read_manifest(run), products / "tile/test/good"
    said = calibrate(copy, good, false_alarms=0.1, defects=products / "stripes/test/hole")
    after = read_manifest(copy)
    assert after.unified.names == before.unified.names == list(NAMES)
    (stripes, tile), (old, _) = after.unified.calibrations, before.unified.calibrations
    detector = Detector.load(run, device="cpu")
    assert tile.scores == sorted(detector(path).score for path in good.iterdir())
    assert tile.threshold == max(tile.scores)
    assert (stripes.scores, stripes.maxima, stripes.source) == (old.scores, old.maxima, old.source)
    assert {one.false_alarms for one in (stripes, tile, after.calibration)} == {0.1}
    assert "stripes: no image was taken for it" in said
    assert "defective images taken for stripes" in said
    assert after.calibration.scores == sorted([*stripes.scores, *tile.scores])
    assert after.calibration.teacher == before.calibration.teacher  # stripes were not seen
    defect = products / "tile/test/hole/000.png"
    assert Detector.load(copy, device="cpu").for_category(detector(defect).category).threshold == tile.threshold


def test_calibrate_takes_another_rate_for_every_category(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    said = calibrate(copy, false_alarms=0.4)
    before, after = read_manifest(run).unified.calibrations, read_manifest(copy).unified.calibrations
    for name, old, new in zip(NAMES, before, after, strict=True):
        assert new.scores == old.scores
        assert new.threshold == threshold_for(old.scores, 0.4).value < old.threshold
        assert f"{name}: image threshold {old.threshold:.4g} -> {new.threshold:.4g}" in said


def test_a_run_is_saved_with_all_categories(run, products, tmp_path):
    """Also by the detector of one category."""
    detector = Detector.load(run, device="cpu")
    path = products / "tile/test/hole/000.png"
    detector.for_category("tile").save(tmp_path / "copy")
    manifest, copied = read_manifest(run), read_manifest(tmp_path / "copy")
    assert (copied.unified, copied.calibration) == (manifest.unified, manifest.calibration)
    assert Detector.load(tmp_path / "copy", device="cpu")(path).score == detector(path).score


def test_a_notebook_shows_the_thresholds_of_each_category(run, products):
    detector = Detector.load(run, device="cpu")
    html = detector._repr_html_()
    for name, own in zip(NAMES, detector.unified.calibrations, strict=True):
        assert f"thresholds of {name}" in html
        assert f"{own.threshold:.5g}" in html
    prediction = detector(products / "tile/test/hole/000.png")
    assert prediction.heat == (
        detector.unified.calibrations[1].normal_level,
        detector.unified.calibrations[1].pixel_threshold,
    )
    assert ">tile<" in prediction._repr_html_()


def test_one_mask_is_for_the_images_of_all_categories(run, products, tiny_default, tmp_path):
    """Outside the region of interest nothing is looked at; what differs there alone makes no difference."""
    image = np.asarray(Image.open(products / "tile/test/good/000.png"))
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[:, : image.shape[1] // 2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    config = tiny_default.with_changes({"roi.mask": str(tmp_path / "mask.png"), "training.false_alarms": 0.2})
    train(products, tmp_path / "run", config, unified=True, progress=False)
    detector = Detector.load(tmp_path / "run", device="cpu")
    changed = np.where(mask[..., None] > 0, image, 255 - image)
    before, after = detector([image, changed])
    assert (after.score, after.category) == (before.score, before.category) == (before.score, "tile")
    assert not after.anomaly_map[:, image.shape[1] // 2 :].any()
    assert detector.region(image.shape[:2]).mean() == 0.5
    source = read_manifest(tmp_path / "run").source
    for number, name in enumerate(NAMES):
        for path in (path for path in source.validation_files if path.startswith(f"{name}/")):
            score = detector(products / name / "train/good" / path.partition("/")[2]).score
            assert min(abs(score - other) for other in detector.unified.calibrations[number].scores) < 2e-2
    metrics = evaluate(tmp_path / "run", out=tmp_path / "out", progress=False)
    assert [metrics["categories"][name]["nearest"][name] for name in NAMES] == [1.0, 1.0]
    predict(tmp_path / "run", [products / "stripes/test"], tmp_path / "predicted", progress=False)
    assert {row["category"] for row in rows_of(tmp_path / "predicted")} == {"stripes"}


def test_a_mask_for_each_image_is_refused(products, tiny_default, tmp_path):
    (tmp_path / "masks").mkdir()
    config = tiny_default.with_changes({"roi.mask": str(tmp_path / "masks")})
    with pytest.raises(BKDError, match="has a mask for each image: train each of the 2 categories alone"):
        train(products, tmp_path / "run", config, unified=True)
    assert not (tmp_path / "run").exists()


def test_folders_of_good_images_are_categories(products, tiny_default, tmp_path):
    for name in NAMES:
        shutil.copytree(products / name / "train/good", tmp_path / "data" / name)
    category, names = find_unified(tmp_path / "data")
    assert names == NAMES
    assert [sample.name for sample in category.train][:9:8] == ["stripes/000.png", "tile/000.png"]
    assert main(["train", str(tmp_path / "data"), "--unified", "--out", str(tmp_path / "run"), *FLAGS]) == 0
    assert tuple(load_trained(tmp_path / "run").unified.names) == NAMES
    shutil.copy(tmp_path / "data/tile/000.png", tmp_path / "data/loose.png")
    with pytest.raises(BKDError, match="images beside its folders: loose.png"):
        find_unified(tmp_path / "data")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"support": "sampled"}, "set support=retrieved"),
        ({"teacher.tile": 64}, "leave out teacher.tile"),
        ({"memory.items": 1}, "memory.items is 1, and there are 2 categories"),
    ],
)
def test_what_one_model_cannot_do_is_refused_before_training(products, tmp_path, changes, said):
    config = BKDConfig().with_changes({**tiny.TINY, **changes})
    with pytest.raises(BKDError, match=said):
        train(products, tmp_path / "run", config, unified=True)
    assert not (tmp_path / "run").exists()


def test_one_category_is_not_several(tiny_data, products, tiny_default, tmp_path):
    with pytest.raises(BKDError, match="at least two categories, and .* has 1"):
        train(tiny_data, tmp_path / "run", tiny_default, unified=True)
    with pytest.raises(BKDError, match="no category 'tiles'; did you mean 'tile'"):
        train(products, tmp_path / "run", tiny_default, unified=True, categories=["stripes", "tiles"])
    with pytest.raises(BKDError, match="belong to one"):
        train(products, tmp_path / "run", tiny_default, unified=True, anomalous=tiny_data)


def test_what_needs_one_threshold_is_refused(run, products, tmp_path):
    detector = Detector.load(run, device="cpu")
    with pytest.raises(BKDError, match="each with thresholds"):
        detector.threshold = 1.0
    with pytest.raises(BKDError, match="a tile shows none"):
        detector(products / "tile/test/good/000.png", tile=64)
    with pytest.raises(BKDError, match="its support belongs to them"):
        detector.set_support([products / "tile/test/good/000.png"])
    with pytest.raises(BKDError, match="not compiled"):
        Detector.load(run, device="cpu", compile="default")
    with pytest.raises(BKDError, match="one scale and one threshold"):
        export(run, "onnx", tmp_path / "model.onnx")
    for dry_run in (False, True):
        with pytest.raises(BKDError, match="train again with --unified"):
            update(run, products / "tile/test/good", device="cpu", dry_run=dry_run)
    with pytest.raises(BKDError, match="train again with --unified"):
        detector.add_normals([products / "tile/test/good/000.png"])
    with pytest.raises(BKDError, match="a tile shows none"):
        predict(run, [products / "tile/test"], tmp_path / "out", tile=64)
    with pytest.raises(BKDError, match="threshold is not one"):
        predict(run, [products / "tile/test"], tmp_path / "out", threshold=1.0)
    with pytest.raises(BKDError, match="leave out --anomalous"):
        evaluate(run, out=tmp_path / "out", anomalous=products / "tile/test/hole")
    with pytest.raises(BKDError, match="resume with --unified"):
        train(products, run, detector.config, resume=True)
    assert not (tmp_path / "out").exists()


def test_rows_without_a_category_are_refused(run, products, tmp_path):
    score = pytest.importorskip("bkd_fast.integrations.ray").score
    with pytest.raises(BKDError, match="a row names none"):
        score(run, products / "tile/test", tmp_path / "out")


def test_a_run_of_one_category_does_not_resume_as_several(tiny_default_run, products, tiny_default):
    with pytest.raises(BKDError, match="resume without --unified"):
        train(products, tiny_default_run, tiny_default, unified=True, resume=True)


def test_a_training_resumes_with_its_categories(products, tiny_default, tmp_path, monkeypatch):
    """An interrupted training takes the images that it began with: a category that has none of them is refused."""
    out, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(products, data)
    config = tiny_default.with_changes({"training.false_alarms": 0.2})
    source = train(data, tmp_path / "other", config, unified=True, progress=False)
    out.mkdir()
    trained = load_trained(source)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    save_checkpoint(out / "checkpoint.safetensors", trained.model, optimizer, Progress(), trained.source)
    shutil.copytree(data / "tile", data / "third")
    with pytest.raises(BKDError, match="the category third has 0 training image"):
        train(data, out, config, unified=True, resume=True, progress=False)
    shutil.copytree(products / "tile/train/good", tmp_path / "plain/tile")
    (tmp_path / "plain/single").mkdir()
    shutil.copy(products / "stripes/train/good/000.png", tmp_path / "plain/single")
    with pytest.raises(BKDError, match="the category single has 1 training image"):
        train(tmp_path / "plain", tmp_path / "new", config, unified=True)
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_finished_is_left_alone(run, products):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    train(products, run, load_trained(run).config, unified=True, resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("bank", [0] * 13, "a category of each support image"),
        ("bank", [0] * 13 + [2], "unified.bank is"),
        ("names", ["tile", "tile"], "one twice"),
        ("names", ["tile", "../tile"], "unified.names"),
        ("scales", [{"map": [0.0, 1.0], "image": [0.0, 0.0]}] * 2, "unified.scales has"),
        ("calibrations", [], "other numbers of names, scales and calibrations"),
    ],
)
def test_an_altered_run_is_refused(run, tmp_path, name, value, said):
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "manifest.json").read_text())
    for key in ("format", "sha256"):
        del content[key]
    content["unified"][name] = value
    write_manifest(tmp_path / "run", content)
    with pytest.raises(BKDError, match=said):
        load_trained(tmp_path / "run")


def test_a_run_of_one_category_says_nothing_of_several(tiny_default_run, tmp_path):
    content = json.loads((tiny_default_run / "manifest.json").read_text())
    assert content["unified"] is None
    assert Detector.load(tiny_default_run, device="cpu").unified is None
    shutil.copytree(tiny_default_run, tmp_path / "run")
    write_manifest(
        tmp_path / "run", {key: value for key, value in content.items() if key not in ("format", "sha256", "unified")}
    )
    assert load_trained(tmp_path / "run").unified is None  # as runs were written before


def test_a_shared_coreset_takes_as_many_of_each_group():
    features = torch.cat([torch.randn(40, 8), 100 * torch.randn(60, 8)])
    groups = torch.tensor([0] * 40 + [1] * 60)
    chosen = shared_coreset(features, 11, groups)
    assert (groups[chosen] == 0).sum() == 5
    assert len(set(chosen.tolist())) == 11
    assert torch.equal(chosen[:5], greedy_coreset(features[:40], 5))
    assert torch.equal(shared_coreset(features, 11, None), greedy_coreset(features, 11))
