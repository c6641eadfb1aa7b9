import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bkd_fast.artifact import load_trained
from bkd_fast.data import load_image, to_tensor
from bkd_fast.errors import BKDError
from bkd_fast.extension import compiler
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.prediction import Prediction


@pytest.fixture(scope="module")
def detector(tiny_run):
    return Detector.load(tiny_run)


@pytest.fixture(scope="module")
def picture(tiny_data):
    return tiny_data / "test/hole/000.png"


def same(first: Prediction, second: Prediction, tolerance: float = 1e-3) -> None:
    assert first.score == pytest.approx(second.score, rel=0.1 * tolerance)
    np.testing.assert_allclose(first.anomaly_map, second.anomaly_map, rtol=tolerance, atol=1e-6)


def test_every_kind_of_input_gives_the_same_prediction(detector, picture):
    array = load_image(picture)
    expected = detector(picture)
    same(detector(str(picture)), expected)
    same(detector(Image.open(picture)), expected)
    same(detector(array), expected)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    same(detector(tensor), expected)
    same(detector(tensor.float() / 255), expected)
    for batch in ([picture, array], torch.stack([tensor, tensor])):
        predictions = detector(batch)
        assert len(predictions) == 2
        same(predictions[1], expected)


def test_a_prediction_is_at_the_size_of_its_image(detector):
    sizes = [(50, 200), (64, 64), (333, 41)]
    predictions = detector([np.full((*size, 3), 100, np.uint8) for size in sizes])
    assert [p.anomaly_map.shape for p in predictions] == sizes
    assert all(p.mask.dtype == bool and p.mask.shape == p.anomaly_map.shape for p in predictions)


def test_a_large_batch_is_the_images_one_by_one(detector, tiny_data):
    paths = sorted((tiny_data / "train/good").iterdir())
    assert len(paths) > 8
    for prediction, path in zip(detector(paths), paths, strict=True):
        same(prediction, detector(path))


def test_a_stream_is_the_images_one_by_one(detector, tiny_data):
    paths = sorted((tiny_data / "train/good").iterdir())
    outcomes = list(detector.stream(iter(paths), batch=4))
    assert [outcome.item for outcome in outcomes] == paths
    for outcome in outcomes:
        same(outcome.result, detector(outcome.item))


def test_a_bad_image_in_a_stream_is_reported_and_the_stream_goes_on(detector, picture, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:200])
    images = [picture, broken, np.zeros((0, 5), np.uint8), np.full((9, 9, 3), np.nan), picture]
    outcomes = list(detector.stream(images, batch=2))
    assert [outcome.result is None for outcome in outcomes] == [False, True, True, True, False]
    for outcome, message in zip(outcomes[1:4], ["broken.png", r"shape \(0, 5\)", "float64"], strict=True):
        with pytest.raises(BKDError, match=message):
            raise outcome.error
    same(outcomes[4].result, outcomes[0].result)


def test_one_tile_is_the_image(detector, picture):
    array = load_image(picture)
    same(detector(array, tile=array.shape[:2], overlap=10), detector(array))


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_tiles_are_images_of_their_own(detector, kind):
    """Where only one tile is, the map is that tile's; scores add up as exponentials."""
    array = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    given = array if kind == "array" else torch.from_numpy(array).permute(2, 0, 1)
    found = detector(given, tile=(60, 64), overlap=8)
    assert found.anomaly_map.shape == found.mask.shape == (100, 150)
    places = [(top, left) for top in (0, 40) for left in (0, 56, 86)]
    alone = {(top, left): detector(array[top : top + 60, left : left + 64]) for top, left in places}
    assert found.score == pytest.approx(np.logaddexp.reduce([one.score for one in alone.values()]), rel=1e-4)
    np.testing.assert_allclose(found.anomaly_map[:40, :56], alone[0, 0].anomaly_map[:40, :56], rtol=1e-4)
    np.testing.assert_allclose(found.anomaly_map[60:, 120:], alone[40, 86].anomaly_map[20:, 34:], rtol=1e-4)
    between = found.anomaly_map[:40, 56:64]
    both = [alone[0, 0].anomaly_map[:40, 56:], alone[0, 56].anomaly_map[:40, :8]]
    assert (between <= np.maximum(*both) * 1.0001).all()
    assert (between >= np.minimum(*both) * 0.9999).all()


def test_a_stream_in_tiles_is_the_images_one_by_one(detector, picture):
    large = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    small = large[:50]
    outcomes = list(detector.stream([large, small, picture], batch=2, tile=60, overlap=8))
    same(outcomes[0].result, detector(large, tile=60, overlap=8))
    same(outcomes[2].result, detector(picture, tile=60, overlap=8))
    with pytest.raises(BKDError, match="50 x 150 pixels is smaller than a tile of 60 x 60"):
        raise outcomes[1].error


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_stream_needs_no_more_memory_than_a_short_one(detector):
    """What a leak of one map an image would take: 300 times 256 KB."""
    import resource

    def images(count):
        generator = np.random.default_rng(0)
        for _ in range(count):
            yield generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)

    def held():
        for _ in detector.stream(images(300)):
            pass
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    first = held()
    assert held() - first < 16e6


def test_thresholds_decide_and_can_be_changed(tiny_run, picture):
    detector = Detector.load(tiny_run)
    score = detector(picture).score
    detector.threshold = score * 1.01
    assert not detector(picture).label
    detector.threshold = score * 0.99
    assert detector(picture).label
    detector.pixel_threshold = 1e30
    assert not detector(picture).mask.any()


def test_normals_are_under_the_threshold(any_run, tiny_data):
    """Of so few images the largest score is the threshold; the kept scores of validation images are the detector's."""
    detector, source = Detector.load(any_run, device="cpu"), load_trained(any_run).source
    assert len(source.validation_files) == 2
    found = [detector(tiny_data / "train/good" / name).score for name in source.validation_files]
    kept = np.array(detector.calibration.scores)
    # Scores are logarithms in units of their std: of the distances themselves this is a thousandth.
    tolerance = 1e-3 / detector.model.score_scale["map"][1]
    for score in found:
        assert np.abs(kept - score).min() < tolerance
    assert max(kept) == detector.threshold
    if detector.calibration.source == "leave-one-out":
        assert len(kept) == 10
        # Compared with itself a training image is closer than it was without.
        trained_on = [detector(tiny_data / "train/good" / name).score for name in source.train_files]
        assert np.mean(trained_on) < np.mean(kept)
    else:
        assert len(kept) == 2


def test_the_support_can_be_replaced(tiny_run, tiny_data, picture):
    detector = Detector.load(tiny_run)
    before, expected = detector(picture), detector.support.expected
    files = sorted((tiny_data / "train/good").iterdir())
    detector.set_support(files[3:8])
    assert detector(picture).score != before.score
    detector.set_support(sorted((tiny_run / "support").iterdir()))
    # What other images score without themselves was not measured: scores are not relative to that.
    assert expected.any()
    assert not detector.support.expected.any()
    assert detector(picture).score == pytest.approx(before.score, rel=0.02)
    detector.support = detector.support._replace(expected=expected)
    same(detector(picture), before, 1e-2)  # features are kept in half precision
    with pytest.raises(BKDError, match="at least one image"):
        detector.set_support([])


def test_branches_are_scored_apart(any_run, picture):
    detector = Detector.load(any_run)
    image = to_tensor(load_image(picture), detector.config.teacher.size)[None]
    both, forward, reverse = (
        detector.score(image, branches)[1] for branches in (("forward", "reverse"), ["forward"], ["reverse"])
    )
    assert not torch.allclose(forward, reverse)
    assert not torch.allclose(both, forward)


def test_a_detector_computes_what_the_trained_model_does(any_run, tiny_data):
    """Folded and packed; within 1e-4 of the features' size."""
    trained = load_trained(any_run)
    detector = Detector.load(any_run, device="cpu")
    files = sorted((tiny_data / "test").rglob("*.png"))
    images = torch.stack([to_tensor(load_image(file), trained.config.teacher.size) for file in files])
    with torch.inference_mode():
        expected = trained.model.distill(trained.model.teacher(images), trained.model.make_support(trained.support))
    found = detector.distill(images)
    for name in ("teacher", "aligned", "reconstruction", "offsets"):
        levels = zip(getattr(found, name), getattr(expected, name), strict=True)
        for own, other in levels:
            assert (own - other).abs().max() <= 1e-4 * other.abs().max()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in detector.model.modules())


def test_bfloat16_differs_a_little(any_run, tiny_data):
    from bkd_fast.inference.precision import InPrecision

    try:
        narrow = Detector.load(any_run, device="cpu", precision="bf16")
    except BKDError as error:
        pytest.skip(str(error))
    assert isinstance(narrow.model.teacher.network, InPrecision)
    assert not narrow.config.student or isinstance(narrow.model.student, InPrecision)
    wide = Detector.load(any_run, device="cpu")
    for file in sorted((tiny_data / "test/hole").iterdir()):  # the scores of others may be near 0
        found, expected = narrow(file), wide(file)
        assert found.anomaly_map.dtype == np.float32
        assert found.score != expected.score
        assert found.score == pytest.approx(expected.score, rel=0.2)
    narrow.set_support(sorted((tiny_data / "train/good").iterdir())[:2])


@pytest.mark.parametrize(
    ("precision", "message"),
    [("16", "precision is '16': expected one of '32', 'bf16', 'fp16'"), ("fp16", "is for GPUs")],
)
def test_other_precisions_are_refused(tiny_run, precision, message):
    with pytest.raises(BKDError, match=message):
        Detector.load(tiny_run, device="cpu", precision=precision)


def test_a_cpu_without_bfloat16_says_so(tiny_run, monkeypatch):
    from bkd_fast.inference import precision

    monkeypatch.setattr(precision, "_cpu_multiplies_bf16", lambda: False)
    with pytest.raises(BKDError, match="no instructions for bfloat16"):
        Detector.load(tiny_run, device="cpu", precision="bf16")


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_compiled_is_the_same(detector, tiny_run, tiny_data, picture):
    import torch._dynamo

    torch._dynamo.reset()
    compiled = Detector.load(tiny_run, compile="default")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    same(compiled(picture), detector(picture))
    normals = sorted((tiny_data / "train/good").iterdir())[: len(load_trained(tiny_run).support[0][0])]
    compiled.set_support(normals)
    other = Detector.load(tiny_run)
    other.set_support(normals)
    same(compiled(picture), other(picture))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # the support is an argument


@pytest.mark.parametrize(
    ("mode", "message"),
    [("fast", "expected None or one of default, "), ("reduce-overhead", "is for CUDA, and the device is cpu")],
)
def test_other_modes_of_compilation_are_refused(tiny_run, mode, message):
    with pytest.raises(BKDError, match=message):
        Detector.load(tiny_run, device="cpu", compile=mode)


def test_a_detector_needs_no_training_stack(tiny_run):
    """The production program does not pay for what only training uses."""
    import subprocess

    code = (
        "import sys; from bkd_fast import Detector; "
        f"Detector.load({str(tiny_run)!r}); "
        "heavy = ('lightning_fabric', 'sklearn', 'skimage', 'scipy', 'bkd_fast.training.train'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
