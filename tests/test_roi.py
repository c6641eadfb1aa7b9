"""A region of interest: what is outside changes nothing, in training and in every way to predict."""

import base64
import io
import pickle
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from bkd_fast.artifact import load_trained
from bkd_fast.cli import main
from bkd_fast.config import BKDConfig
from bkd_fast.data import fit_roi, load_image, load_roi
from bkd_fast.data.inputs import Masked
from bkd_fast.errors import BKDError, ImageError
from bkd_fast.evaluation.calibrate import calibrate
from bkd_fast.evaluation.evaluate import evaluate
from bkd_fast.evaluation.metrics import PixelMetrics
from bkd_fast.evaluation.update import update
from bkd_fast.export import export
from bkd_fast.inference.detector import Detector
from bkd_fast.model import BKD
from bkd_fast.model.calibration import calibrate as learn
from bkd_fast.training.train import train

ROI = np.zeros((72, 80), bool)
ROI[4:68, 4:44] = True
KINDS = {
    "whole": {},
    "tiles": {"teacher.tile": 48, "support.shots": 2},
    "student": {"teacher.levels": "separate", "student": "on", "alignment": "on", "support": "sampled"},
}


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture(scope="session")
def mask(tmp_path_factory):
    return write(tmp_path_factory.mktemp("roi") / "mask.png", ROI.astype(np.uint8) * 255)


def config(mask, kind="whole"):
    return BKDConfig().with_changes({**tiny.TINY, "roi.mask": str(mask), **KINDS[kind]})


@pytest.fixture(scope="session")
def runs(tiny_data, mask, tmp_path_factory):
    """A run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: train(tiny_data, folder / kind, config(mask, kind), progress=False) for kind in KINDS}


@pytest.fixture(params=KINDS)
def run(request, runs, tmp_path):
    return shutil.copytree(runs[request.param], tmp_path / "run")


def planted(image, *, inside):
    """A bright square in the region, or outside of it up to its edge."""
    image = image.copy()
    if inside:
        image[20:44, 12:36] = 250
    else:
        image[:, 44:], image[:4], image[68:] = 250, 250, 250
    return image


@pytest.fixture
def good(tiny_data):
    return load_image(tiny_data / "test/good/000.png")


def test_what_is_outside_changes_no_prediction(run, good, tmp_path):
    detector = Detector.load(run, device="cpu")
    normal, outside, inside = detector([good, planted(good, inside=False), planted(good, inside=True)])
    for prediction in (normal, outside, inside):
        assert prediction.anomaly_map.shape == (72, 80)
        assert not prediction.anomaly_map[~ROI].any()
        assert not prediction.mask[~ROI].any()
        assert (prediction.anomaly_map[ROI] > 0).any()
    assert (outside.score, outside.label) == (normal.score, normal.label)
    assert np.array_equal(outside.anomaly_map, normal.anomaly_map)
    assert inside.score > normal.score
    assert inside.anomaly_map[20:44, 12:36].mean() > 2 * normal.anomaly_map[20:44, 12:36].mean()
    tensor = torch.from_numpy(planted(good, inside=False)).permute(2, 0, 1) / 255
    assert detector(tensor).score == pytest.approx(normal.score, abs=1e-3)
    streamed = [outcome.result for outcome in detector.stream([good, planted(good, inside=False)])]
    assert [prediction.score for prediction in streamed] == [normal.score] * 2
    again = pickle.loads(pickle.dumps(detector))(planted(good, inside=False))
    assert again.score == normal.score
    # A low threshold marks all of the region and nothing else.
    detector.pixel_threshold = -1.0
    assert np.array_equal(detector(good).mask, ROI)


def test_a_run_of_whole_images_predicts_tiles_of_the_region(runs, good):
    detector = Detector.load(runs["whole"], device="cpu")
    normal, outside = detector([good, planted(good, inside=False)], tile=36)
    assert outside.score == normal.score
    assert np.array_equal(outside.anomaly_map, normal.anomaly_map)
    assert not normal.anomaly_map[~ROI].any()
    assert (normal.anomaly_map[ROI] > 0).mean() > 0.9


def test_statistics_and_items_are_of_features_inside():
    torch.manual_seed(0)
    config = BKDConfig().with_changes({**tiny.TINY, "teacher.levels": "separate", "memory.items": 30})
    model = BKD(config, weights=None).eval()
    roi = torch.zeros(64, 64, dtype=torch.bool)
    roi[:32, :16] = True
    model.set_roi(roi)
    images = torch.rand(3, 3, 64, 64)
    levels = model.teacher.raw(images)
    outside = [level.clone() for level in levels]
    for level in outside:
        level[:, :, level.shape[2] // 2 :], level[:, :, :, -(-level.shape[3] // 4) :] = 1e3, 1e3
    learn(model, [outside], 3, torch.Generator().manual_seed(0))
    for number, level in enumerate(levels, start=1):
        inside = level[:, :, : level.shape[2] // 2, : -(-level.shape[3] // 4)]
        expected = inside.mean((0, 2, 3))
        torch.testing.assert_close(model.teacher.get_buffer(f"mean_{number}").flatten(), expected, rtol=1e-3, atol=1e-4)
    assert all(memory.items.abs().max() < 100 for memory in model.memories)
    changed = model.teacher(torch.where(roi, images, torch.rand(3, 3, 64, 64)))
    for one, two in zip(changed, model.teacher(images), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(BKDError, match="no pixel of the region of interest is left"):
        model.set_roi(torch.zeros(64, 64, dtype=torch.bool))


def test_pixel_metrics_are_of_pixels_inside(runs, tiny_data, tmp_path):
    run = shutil.copytree(runs["whole"], tmp_path / "run")
    data = shutil.copytree(tiny_data, tmp_path / "tile")
    image = load_image(data / "test/good/000.png")
    write(data / "test/hole/other.png", planted(image, inside=False))
    write(data / "ground_truth/hole/other_mask.png", (~ROI).astype(np.uint8) * 255)
    metrics = evaluate(run, data, progress=False)["categories"]["tile"]
    detector = Detector.load(run, device="cpu")
    inside = detector.region((64, 64))
    truths, values = [], []
    for path in sorted((data / "test").rglob("*.png")):
        _, maps = detector.score(detector.preprocess(path).input[None])
        truth = np.zeros((72, 80), bool)
        if path.parent.name == "hole":
            truth = load_image(data / f"ground_truth/hole/{path.stem}_mask.png").any(2)
        small = np.array(Image.fromarray(truth & ROI).resize((64, 64), Image.Resampling.NEAREST))
        truths.append(small[inside])
        values.append(maps[0].numpy()[inside])
    expected = roc_auc_score(np.concatenate(truths), np.concatenate(values))
    assert metrics["pixel_auroc"] == pytest.approx(expected, abs=1e-6)
    assert "1 defective images have no defect inside" in (run / "report.html").read_text()


def test_pixel_metrics_outside_count_as_neither():
    values = np.random.default_rng(0).random((8, 6)).astype(np.float32)
    truth = values > 0.8
    whole, part = PixelMetrics(), PixelMetrics()
    whole.update(values[:, :3].copy(), truth[:, :3].copy())
    roi = np.zeros((8, 6), bool)
    roi[:, :3] = True
    part.update(np.where(roi, values, 9), truth | ~roi, roi)
    assert part.compute() == whole.compute()


def test_commands_keep_to_the_region(run, good, tiny_data, tmp_path, capsys):
    images = write(tmp_path / "in/a.png", planted(good, inside=True)).parent
    write(images / "b.png", planted(planted(good, inside=True), inside=False))
    assert main(["predict", str(run), str(images), "--out", str(tmp_path / "out")]) == 0
    found = [load_image(tmp_path / f"out/masks/{name}.png") for name in "ab"]
    assert np.array_equal(*found)
    assert not found[0][~ROI].any()
    calibrate(run, tiny_data / "test/good", false_alarms=0.5)
    after = load_trained(run).calibration
    assert after.normal_level < after.pixel_threshold
    assert np.array_equal(load_trained(run).roi, ROI)
    assert main(["evaluate", str(run)]) == 0
    capsys.readouterr()


def test_an_update_learns_what_is_inside(runs, good, tmp_path):
    for kind in ("whole", "tiles"):
        states = []
        for inside in (True, False):
            run = shutil.copytree(runs[kind], tmp_path / f"{kind} {inside}")
            for index in range(4):
                image = np.flip(good, 1) if index % 2 else np.flip(good, 0)
                image = np.clip(image.astype(int) + 5 * index, 0, 255).astype(np.uint8)
                write(tmp_path / f"{kind}/{inside}/{index}.png", image if inside else planted(image, inside=False))
            update(run, tmp_path / kind / str(inside))
            trained = load_trained(run)
            states.append((trained.calibration, trained.model.state_dict()))
            assert np.array_equal(trained.roi, ROI)
        assert states[0][0] == states[1][0]
        assert all(torch.equal(value, states[1][1][key]) for key, value in states[0][1].items())


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_an_exported_graph_keeps_to_the_region(format, runs, good, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    path, compared = export(runs["whole"], format, tmp_path / f"model.{format}")
    assert compared.map_max < 1e-3
    from bkd_fast.export.formats import read

    graph = read(format, path)
    images = np.random.default_rng(0).random((2, 3, 64, 64)).astype(np.float32)
    region = Detector.load(runs["whole"], device="cpu").region((64, 64))
    assert graph.metadata["roi"] == "in the graph"
    shown = Image.open(io.BytesIO(base64.b64decode(graph.metadata["roi_mask"])))
    np.testing.assert_array_equal(np.asarray(shown), region)
    images[1] = np.where(region, images[0], images[1])
    scores, maps = graph(images)
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert not maps[:, ~region].any()
    assert maps[:, region].any()
    with pytest.raises(BKDError, match="which a graph cannot know"):
        export(runs["tiles"], format, tmp_path / f"tiles.{format}")


def test_images_of_another_size_and_the_same_aspect_will_do(runs, good):
    detector = Detector.load(runs["whole"], device="cpu")
    large = np.array(Image.fromarray(good).resize((160, 144)))
    prediction = detector(large)
    assert not prediction.anomaly_map[~fit_roi(ROI, (144, 160), "")].any()
    with pytest.raises(ImageError, match=r"the image is 80 x 80 pixels and the mask 80 x 72: expected one aspect"):
        detector(np.zeros((80, 80, 3), np.uint8))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((72, 80), np.uint8), "is empty: expected pixels above zero"),
        (np.arange(5760, dtype=np.uint16).reshape(72, 80).astype(np.uint8), "has 256 values, from 0 to 255: expected"),
        (np.full((72, 80), 3, np.uint8) + 2 * ROI.astype(np.uint8), "has 2 values, from 3 to 5"),
        (np.full((40, 80), 255, np.uint8), r"good/000.png is 80 x 72 pixels and the mask .* 80 x 40"),
    ],
)
def test_masks_that_cannot_be_used(array, message, tiny_data, tmp_path):
    path = write(tmp_path / "mask.png", array)
    with pytest.raises(BKDError, match=message):
        train(tiny_data, tmp_path / "run", config(path), progress=False)
    assert not list((tmp_path / "run").iterdir()) if (tmp_path / "run").exists() else True


def test_a_mask_that_is_missing_or_another(runs, tiny_data, mask, tmp_path, capsys):
    arguments = ["train", str(tiny_data), "--out", str(tmp_path / "run"), "--teacher", "test_resnet"]
    assert main([*arguments, "--weights", "none", "--roi", str(tmp_path / "nothing.png")]) == 1
    assert "nothing.png does not exist" in capsys.readouterr().err
    run = shutil.copytree(runs["whole"], tmp_path / "copy")
    (run / "roi.png").unlink()
    with pytest.raises(BKDError, match=r"roi\.png is missing"):
        load_trained(run)
    assert np.array_equal(load_roi(mask), ROI)
    saved = tmp_path / "saved"
    Detector.load(runs["whole"], device="cpu").save(saved)
    assert np.array_equal(load_trained(saved).roi, ROI)


def shifted(index):
    """Another region of each image."""
    return np.roll(ROI, (index % 4, 6 * (index % 5)), (0, 1))


@pytest.fixture(scope="session")
def masks(tiny_data, tmp_path_factory):
    """A mask for each image, by name in folders of training and test images."""
    folder = tmp_path_factory.mktemp("masks")
    for index in range(10):
        write(folder / f"train/{index:03}_mask.png", shifted(index).astype(np.uint8) * 255)
    for kind in ("good", "hole"):
        for index in range(3):
            write(folder / f"test/{kind}/{index:03}.png", shifted(index + 1).astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def each_runs(tiny_data, masks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("each")
    kinds = ("whole", "tiles")
    return {kind: train(tiny_data, folder / kind, config(masks / "train", kind), progress=False) for kind in kinds}


@pytest.mark.parametrize("kind", ["whole", "tiles"])
def test_a_mask_for_each_image(kind, each_runs, masks, good, tiny_data, tmp_path, capsys):
    run = shutil.copytree(each_runs[kind], tmp_path / "run")
    assert not (run / "roi.png").exists()
    detector = Detector.load(run, device="cpu")
    roi = shifted(7)
    noise = np.random.default_rng(0).integers(0, 255, good.shape, np.uint8)
    normal, outside = detector([Masked(good, roi), Masked(np.where(roi[..., None], good, noise), roi)])
    assert outside.score == normal.score
    assert np.array_equal(outside.anomaly_map, normal.anomaly_map)
    assert not normal.anomaly_map[~roi].any()
    assert (normal.anomaly_map[roi] > 0).any()
    streamed = [outcome.result.score for outcome in detector.stream([Masked(good, roi)])]
    assert streamed == [normal.score]
    with pytest.raises(BKDError, match="looks at another region of each image"):
        detector(good)
    images = tiny_data / "test/hole"
    arguments = ["predict", str(run), str(images), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--roi", str(masks / "test/hole")]) == 0
    for index in range(3):
        found = load_image(tmp_path / f"out/masks/{index:03}.png").any(2)
        assert not found[~shifted(index + 1)].any()
    for command in (arguments, ["evaluate", str(run)], ["calibrate", str(run), str(images)]):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert main(command) == 1
        assert "--roi" in capsys.readouterr().err
    assert main(["predict", str(run), str(images), "--out", str(tmp_path / "o"), "--roi", str(masks / "test")]) == 1
    assert "3 of 3 images have no mask" in capsys.readouterr().err
    metrics = evaluate(run, roi=masks / "test", progress=False)["categories"]["tile"]
    assert 0 <= metrics["pixel_auroc"] <= 1
    calibrate(run, tiny_data / "test/good", roi=masks / "test/good", false_alarms=0.5)
    assert len(load_trained(run).calibration.scores) == 3
    with pytest.raises(BKDError, match="has a mask for each image of its training: train again"):
        update(run, tiny_data / "test/good")
    with pytest.raises(BKDError, match="which a graph cannot know"):
        export(run, "pt2", tmp_path / "model.pt2")


@pytest.mark.parametrize(("kind", "each"), [*((kind, False) for kind in KINDS), ("whole", True), ("tiles", True)])
def test_what_is_outside_is_not_learned(kind, each, runs, each_runs, mask, masks, tiny_data, tmp_path):
    """``each``: with a mask for each image."""
    data = shutil.copytree(tiny_data, tmp_path / "tile")
    for index, path in enumerate(sorted((data / "train/good").iterdir())):
        image, region = load_image(path), shifted(index) if each else ROI
        noise = np.random.default_rng(index).integers(0, 255, image.shape, np.uint8)
        write(path, np.where(region[..., None], image, noise))
    chosen = config(masks / "train" if each else mask, kind)
    other = load_trained(train(data, tmp_path / "run", chosen, progress=False))
    trained = load_trained((each_runs if each else runs)[kind])
    assert each or np.array_equal(trained.roi, ROI)
    assert other.calibration == trained.calibration
    for key, value in trained.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key]), key
    for one, two in zip(trained.support, other.support, strict=True):
        assert torch.equal(one, two)


def test_masks_that_do_not_fit_the_images(masks, runs, tiny_data, good, tmp_path):
    few = shutil.copytree(masks / "train", tmp_path / "few")
    (few / "004_mask.png").unlink()
    with pytest.raises(BKDError, match=r"1 of 10 images have no mask in .*: 004\.png"):
        train(tiny_data, tmp_path / "run", config(few), progress=False)
    write(few / "004_mask.png", np.full((40, 80), 255, np.uint8))
    with pytest.raises(BKDError, match=r"004\.png is 80 x 72 pixels and the mask"):
        train(tiny_data, tmp_path / "run", config(few), progress=False)
    write(few / "003.png", ROI)
    with pytest.raises(BKDError, match="it is ambiguous which mask is meant"):
        train(tiny_data, tmp_path / "run", config(few), progress=False)
    with pytest.raises(BKDError, match="this run has no mask for each image"):
        Detector.load(runs["whole"], device="cpu")(Masked(good, ROI))
    with pytest.raises(BKDError, match="has no mask for each image: leave out --roi"):
        evaluate(runs["whole"], out=tmp_path / "out", roi=masks / "test", progress=False)
