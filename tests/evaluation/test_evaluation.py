import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from tiny import rows_of

from bkd_fast.artifact import read_category, write_manifest
from bkd_fast.cli import main
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.evaluate import evaluate, table
from bkd_fast.evaluation.metrics import METRIC_NAMES
from bkd_fast.inference.detector import Detector
from bkd_fast.training.train import train


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture(scope="module")
def metrics(run):
    return evaluate(run, progress=False)


def test_the_files_say_what_the_function_says(run, metrics):
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert set(METRIC_NAMES) <= metrics["mean"].keys()
    assert set(metrics["categories"]) == {"tile"}
    assert set(metrics["categories"]["tile"]["branches"]) == {"both", "forward", "reverse"}
    assert {path.name for path in run.iterdir()} >= {"metrics.json", "scores.csv", "report.html", "overlays"}


def test_scores_are_the_detectors_and_give_the_metrics(run, metrics, tiny_data):
    rows = rows_of(run)
    assert len(rows) == 6
    detector = Detector.load(run)
    for row in rows:
        score = detector(tiny_data / "test" / row["file"]).score
        assert float(row["score"]) == pytest.approx(score, rel=1e-3)
        assert int(row["decision"]) == int(float(row["score"]) > float(row["threshold"]))
    labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
    assert metrics["mean"]["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))


def test_every_image_has_an_overlay_and_the_report_names_it(run, metrics):
    page = (run / "report.html").read_text(encoding="utf-8")
    for row in rows_of(run):
        assert (run / "overlays" / "tile" / row["defect"] / f"{row['file'].split('/')[1]}.png").is_file()
        assert row["file"] in page


def test_the_report_looks_inside_the_model(run, metrics):
    pictures = list((run / "overlays").rglob("*.inside.png"))
    assert 1 <= len(pictures) <= 4
    page = (run / "report.html").read_text()
    assert "Inside the model" in page
    assert all(picture.name in page for picture in pictures)


def test_the_table_shows_every_metric(metrics):
    text = table(metrics)
    for label in ("tile", "forward only", "reverse only", "mean", "image auroc", "aupro"):
        assert label in text
    assert f"{100 * metrics['mean']['pixel_auroc']:.1f}" in text


def test_metrics_that_do_not_exist_are_absent(run, make_category, tmp_path):
    data = make_category(tmp_path / "tile", bad=0)
    copied = shutil.copytree(run, tmp_path / "run")
    result = evaluate(copied, data, progress=False)
    assert all(result["mean"][name] is None for name in METRIC_NAMES)
    assert json.loads((copied / "metrics.json").read_text())["mean"]["aupro"] is None
    assert "–" in table(result)


def test_defective_images_without_masks_count_for_image_metrics(run, make_category, tmp_path):
    data = make_category(tmp_path / "tile")
    shutil.rmtree(data / "ground_truth")
    result = evaluate(shutil.copytree(run, tmp_path / "run"), data, progress=False)["mean"]
    assert result["image_auroc"] is not None
    assert result["pixel_auroc"] is None
    assert "have no mask" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_several_categories_have_a_model_each_and_a_mean(make_category, tiny_config, tmp_path):
    for name in ("nut", "bolt"):
        make_category(tmp_path / "data" / name, train=8)
    run = train(tmp_path / "data", tmp_path / "run", tiny_config.with_changes({"training.epochs": 1}), progress=False)
    result = evaluate(run, progress=False)
    assert list(result["categories"]) == ["bolt", "nut"]
    expected = np.mean([computed["pixel_auroc"] for computed in result["categories"].values()])
    assert result["mean"]["pixel_auroc"] == pytest.approx(expected)
    assert (run / "nut" / "model.safetensors").is_file()
    with pytest.raises(BKDError, match="holds several categories"):
        Detector.load(run)
    nut = Detector.load(run / "nut")
    assert nut(tmp_path / "data/nut/test/hole/000.png").score > nut.threshold


def test_a_plain_folder_can_be_trained_and_evaluated(make_category, tiny_config, tmp_path):
    data = make_category(tmp_path / "parts")
    plain = tmp_path / "plain"
    shutil.copytree(data / "train/good", plain)
    extra = {"anomalous": data / "test/hole", "masks": data / "ground_truth/hole"}
    run = train(plain, tmp_path / "run", tiny_config.with_changes({"training.epochs": 1}), progress=False, **extra)
    result = evaluate(run, progress=False)["categories"]["plain"]
    assert result["aupro"] is not None
    without = train(plain, tmp_path / "other", tiny_config.with_changes({"training.epochs": 1}), progress=False)
    with pytest.raises(BKDError, match="no test images"):
        evaluate(without)


def test_a_run_without_its_data_asks_for_it(run, tiny_data, tmp_path):
    moved = shutil.copytree(run, tmp_path / "run")
    manifest = read_category(moved)
    write_manifest(moved, replace(manifest, source=replace(manifest.source, root=str(tmp_path / "gone"))))
    with pytest.raises(BKDError, match="pass its new path"):
        evaluate(moved)
    assert evaluate(moved, tiny_data, progress=False)["mean"]["image_auroc"] is not None


def test_predict_writes_scores_heat_maps_and_masks(run, tiny_data, tmp_path, capsys):
    arguments = ["predict", str(run), str(tiny_data / "test"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "6 images, " in capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 6
    assert {row["decision"] for row in rows} <= {"normal", "anomalous"}
    mask = np.asarray(Image.open(tmp_path / "out/masks/hole/000.png"))
    assert mask.shape == (72, 80)
    assert set(np.unique(mask)) <= {0, 255}
    with Image.open(tmp_path / "out/heatmaps/hole/000.jpg") as panel:
        assert panel.format == "JPEG"
    tiled = [*arguments[:-1], str(tmp_path / "tiled"), "--tile", "40", "60", "--overlap", "10"]
    assert main(tiled) == 0
    path = tiny_data / "test/hole/000.png"
    predicted = {row["file"]: float(row["score"]) for row in rows_of(tmp_path / "tiled")}
    expected = Detector.load(run)(path, tile=(40, 60), overlap=10).score
    assert predicted[str(path)] == pytest.approx(expected, rel=1e-4)
    # Scores are logarithms: none is as low.
    again = ["predict", str(run), str(tiny_data / "test"), "--out", str(tmp_path / "low"), "--threshold=-1000"]
    assert main(again) == 0
    assert {row["decision"] for row in rows_of(tmp_path / "low")} == {"anomalous"}


@pytest.fixture
def plain_run(make_category, tiny_default, tmp_path):
    """A plain folder ``good``, defective images beside it, and a run of them."""
    data = make_category(tmp_path / "made", train=20)
    shutil.move(data / "train/good", tmp_path / "good")
    shutil.move(data / "test/hole", tmp_path / "bad")
    return train(tmp_path / "good", tmp_path / "run", tiny_default, anomalous=tmp_path / "bad", progress=False)


def evaluated_files(run):
    return {row["file"].removeprefix("good/") for row in rows_of(run) if row["label"] == "0"}


def test_what_was_trained_on_never_becomes_a_test_image(plain_run, tmp_path, caplog):
    """Train in a folder, add images to it, evaluate."""
    evaluate(plain_run, progress=False, pictures=False)
    source = read_category(plain_run).source
    first = evaluated_files(plain_run)
    assert first == source.test_files.keys()
    assert len(first) == 4
    # Names before, between and after the others, which another draw would mix with them.
    for index, path in enumerate(sorted((tmp_path / "made/test/good").iterdir())):
        shutil.copy(path, tmp_path / "good" / f"{('0', '0055', 'z')[index]}.png")
    shutil.copy(tmp_path / "good" / min(source.train_files), tmp_path / "good/copy.png")
    with caplog.at_level("WARNING", "bkd_fast"):
        evaluate(plain_run, progress=False, pictures=False)
    second = evaluated_files(plain_run)
    assert not second & source.used.keys()
    assert second == first | {"0.png", "0055.png", "z.png"}
    assert "3 images in" in caplog.text
    assert "new since training" in caplog.text
    assert "copy.png" in caplog.text


def test_an_evaluation_can_be_written_elsewhere_and_replaces_the_one_before(plain_run, tmp_path):
    before = {path.name for path in plain_run.iterdir()}
    out = tmp_path / "good" / "evaluation"  # inside the data: its pictures are none of it
    for _ in range(2):
        metrics = evaluate(plain_run, out=out, progress=False)
        assert metrics["categories"]["good"]["images"]["test"] == 4 + 3
    assert {path.name for path in plain_run.iterdir()} == before
    assert {path.name for path in out.iterdir()} == {
        "manifest.json", "metrics.json", "scores.csv", "report.html", "overlays",
    }  # fmt: skip
    with pytest.raises(BKDError, match="the manifest has"):
        Detector.load(out)


def test_defective_images_can_come_at_evaluation(plain_run, tmp_path, make_category):
    data = make_category(tmp_path / "other", bad=2)
    result = evaluate(plain_run, tmp_path / "good", anomalous=data / "test/hole", progress=False, pictures=False)
    assert result["categories"]["good"]["images"]["test"] == 4 + 2


def test_images_of_one_name_have_a_row_and_an_overlay_each(run, make_category, tmp_path):
    data = make_category(tmp_path / "tile", bad=2)
    for index, camera in enumerate(("cam1", "cam2")):
        for folder, name in (("test", "000.png"), ("ground_truth", "000_mask.png")):
            (data / folder / "hole" / camera).mkdir()
            made = data / folder / "hole" / name.replace("000", f"{index:03}")
            made.rename(data / folder / "hole" / camera / name)
    copied = shutil.copytree(run, tmp_path / "run")
    evaluate(copied, data, progress=False)
    rows = {row["file"]: row["score"] for row in rows_of(copied) if row["label"] == "1"}
    assert rows.keys() == {"hole/cam1/000.png", "hole/cam2/000.png"}
    assert len(set(rows.values())) == 2
    assert all((copied / "overlays/tile" / f"{name}.png").is_file() for name in rows)


def test_predict_writes_a_report_of_what_it_predicted(run, tiny_data, tmp_path):
    out = tmp_path / "out"
    assert main(["predict", str(run), str(tiny_data / "test"), "--out", str(out), "--report"]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    data = json.loads(page.split('<script type="application/json">')[1].split("</script>")[0])
    rows = sorted(rows_of(out), key=lambda row: -float(row["score"]))
    assert data["name"] == [row["file"] for row in rows]
    assert data["score"] == [float(row["score"]) for row in rows]
    assert all((out / link).is_file() for link in data["link"])
    assert data["threshold"] == float(rows[0]["threshold"])
    assert data["normal"] == Detector.load(run).calibration.scores
