"""benchmarks/accuracy.py: every method runs end to end, is repeatable and sees a gross defect; rows are kept."""

import os
import subprocess
import sys
from pathlib import Path

import accuracy
import numpy as np
import pytest
import torch
from comparators import anomalib_methods
from comparators.common import FrozenLevels, Moments, Settings, smooth
from comparators.differnet import Flow, turned
from comparators.us import STRIDES, _student
from PIL import Image
from tiny import rows_of

from bkd_fast.config import BKDConfig
from bkd_fast.data import ImageDataset, find_categories
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.metrics import METRIC_NAMES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZE = 64
SMALLEST = ["--teacher", "resnet18", "--weights", "none", "--image-size", str(SIZE), "--peer-epochs", "1"]
FAST = {"us": {"width": 8}, "mkd": {"width": 8}, "differnet": {"width": 32, "train_views": 2, "views": 2}}
OWN = tuple(FAST)
ANOMALIB = ("patchcore", "padim", "stfpm", "rd")


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """A part whose pictures are a smooth ramp with noise; the last test image has a bright square with a mask."""
    root = tmp_path_factory.mktemp("accuracy") / "part"
    random = np.random.default_rng(0)

    def save(name, picture):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path)

    def picture():
        ramp = np.linspace(60, 140, SIZE)[None, :, None] * np.ones((SIZE, 1, 3))
        return np.clip(ramp + random.normal(0, 8, (SIZE, SIZE, 3)), 0, 255)

    for index in range(10):
        save(f"train/good/{index}.png", picture())
    for index in range(3):
        save(f"test/good/{index}.png", picture())
    for index in range(2):
        hurt, mask = picture(), np.zeros((SIZE, SIZE))
        hurt[16:48, 20:52], mask[16:48, 20:52] = 255, 255
        save(f"test/hole/{index}.png", hurt)
        save(f"ground_truth/hole/{index}_mask.png", mask)
    return root


def made(method, part, *, seed=0, size=SIZE, files=(), **options):
    config = BKDConfig().with_changes(
        {
            "teacher.name": "resnet18",
            "teacher.weights": "none",
            "teacher.image_size": (size, size),
            "training.seed": seed,
        }
    )
    (category,) = find_categories(part)
    settings = Settings(config, ImageDataset(category.train[8:], (size, size)), *files)
    if "epochs" in accuracy._defaults(method):
        options.setdefault("epochs", 1)
    case = accuracy.Case(method, category.name, settings, options)
    return accuracy._peer(case, category.train[:8])


@torch.inference_mode()
def predicted(predict, part, size=SIZE):
    (category,) = find_categories(part)
    found = [predict(image.unsqueeze(0)) for image, _ in ImageDataset(category.test, (size, size))]
    return torch.stack([score.reshape(()) for score, _ in found]), torch.stack(
        [each.reshape(size, -1) for _, each in found]
    )


@pytest.mark.parametrize("method", [*OWN, *ANOMALIB])
def test_every_method_is_repeatable_and_gives_finite_maps(part, method):
    if method in ANOMALIB:
        pytest.importorskip("anomalib")
    predict, megabytes = made(method, part, **FAST.get(method, {}))
    scores, maps = predicted(predict, part)
    other, again = predicted(made(method, part, **FAST.get(method, {}))[0], part)
    assert megabytes > 0
    assert maps.shape == (5, SIZE, SIZE)
    assert maps.isfinite().all()
    assert scores.isfinite().all()
    assert maps.std() > 0
    torch.testing.assert_close(other, scores, rtol=0, atol=0)
    torch.testing.assert_close(again, maps, rtol=0, atol=0)


def test_the_coreset_is_the_one_that_anomalib_selects():
    sampling = pytest.importorskip("anomalib.models.components.sampling.k_center_greedy")
    features = torch.randn(400, 20, generator=torch.Generator().manual_seed(0))
    banks = []
    for select in (
        lambda: sampling.KCenterGreedy(features, 0.1).sample_coreset(),
        lambda: anomalib_methods.select_coreset(features, 0.1),
    ):
        torch.manual_seed(0)
        np.random.seed(0)  # of the random projection
        banks.append(select())
    assert len(banks[0]) == 40
    assert torch.equal(*banks)


@pytest.mark.parametrize("method", [*OWN, "patchcore", "padim"])
def test_a_gross_defect_scores_above_normal_images(part, method):
    if method in ANOMALIB:
        pytest.importorskip("anomalib")
    scores, maps = predicted(
        made(method, part, **{**FAST.get(method, {}), **({"epochs": 10} if method in OWN else {})})[0], part
    )
    assert scores[3:].min() > scores[:3].max(), "the order is: three good images, two with a hole"
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[12:52, 16:56] = True
    assert maps[3:, inside].mean() > maps[3:, ~inside].mean()


def test_the_students_see_as_many_pixels_as_they_say():
    for stride, sees in zip(STRIDES, (17, 33, 65), strict=True):
        student = _student(stride, 4, 5).double()
        images = torch.rand(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
        levels = student(images)
        assert levels.shape == (1, 5, 160 // stride, 160 // stride)
        (gradient,) = torch.autograd.grad(levels[0, :, 80 // stride, 80 // stride].sum(), images)
        rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        assert (rows[0].item(), rows[-1].item()) == (80 - sees // 2, 80 + sees // 2)


def test_the_flow_counts_its_volume_and_can_be_undone():
    torch.manual_seed(0)
    flow = Flow(6, 8, 3, 3.0).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = torch.randn(2, 6, dtype=torch.float64)
    z, log_determinant = flow(features)
    for index, row in enumerate(features):
        jacobian = torch.autograd.functional.jacobian(lambda each: flow(each[None])[0][0], row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_determinant[index])
    assert z.shape == features.shape


def test_turning_is_exact_at_right_angles_and_keeps_other_shapes():
    images = torch.rand(2, 3, 8, 8)
    quarter = turned(images, torch.tensor([0.5 * torch.pi, 0.0]))
    torch.testing.assert_close(quarter[0], images[0].rot90(1, (1, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(quarter[1], images[1], atol=1e-5, rtol=0)
    half = turned(torch.rand(1, 3, 6, 10), torch.tensor([torch.pi]))
    assert half.shape == (1, 3, 6, 10)


def test_moments_and_smoothing():
    values = torch.randn(4, 3, 5, 5)
    moments = Moments(axis=1)
    for part in values.split(2):
        moments.add(part)
    mean, std = moments.compute()
    torch.testing.assert_close(mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(std, values.std((0, 2, 3), correction=0))
    torch.testing.assert_close(smooth(torch.ones(1, 1, 6, 9), 4.0), torch.ones(1, 1, 6, 9))


def test_gradients_pass_the_frozen_teacher():
    levels = FrozenLevels(
        BKDConfig().with_changes(
            {"teacher.name": "resnet18", "teacher.weights": "none", "teacher.image_size": (SIZE, SIZE)}
        )
    )
    images = torch.rand(1, 3, SIZE, SIZE, requires_grad=True)
    (gradient,) = torch.autograd.grad(levels(images)[-1].sum(), images)
    assert gradient.abs().sum() > 0


def test_efficientad_says_what_to_bring(part, tmp_path):
    pytest.importorskip("anomalib")
    assert "pass --efficientad-weights FILE" in made("efficientad", part)
    assert "there is no file" in made("efficientad", part, files=(tmp_path / "none.pth", None))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert "at least 256" in made("efficientad", part, files=(tmp_path / "other.pth", None))
    assert "does not hold its teacher" in made("efficientad", part, size=256, files=(tmp_path / "other.pth", None))


@pytest.fixture
def small_networks(monkeypatch):
    """EfficientAd's model with one convolution each for teacher and student, and the teacher's weights in a file."""
    module = pytest.importorskip("anomalib.models.image.efficient_ad.torch_model")

    def network(out_channels, padding=False):
        return torch.nn.Conv2d(3, out_channels, 36, 4)  # 56 x 56 places of 256 x 256 pixels, as the original

    monkeypatch.setattr(module, "SmallPatchDescriptionNetwork", network)
    return module.EfficientAdModel


@pytest.mark.parametrize("penalty", [True, False])
def test_efficientad_runs_with_weights(part, tmp_path, small_networks, penalty):
    torch.save(small_networks().teacher.state_dict(), tmp_path / "teacher.pth")
    (category,) = find_categories(part)
    data = ImageDataset(category.train[:2], (256, 256))
    folder = part / "test" / "good" if penalty else None
    settings = Settings(BKDConfig().with_changes({"teacher.name": "resnet18"}), data, tmp_path / "teacher.pth", folder)
    predict, megabytes = anomalib_methods.efficientad(data, settings, epochs=1)
    with torch.inference_mode():
        score, anomaly_map = predict(data[0][0].unsqueeze(0))
    assert megabytes > 0
    assert score.isfinite().all()
    assert anomaly_map.isfinite().all()
    assert anomaly_map.numel() == 256 * 256
    label = accuracy.Case("efficientad", "part", settings, {}).key()["options"]
    assert label == ("" if penalty else "without penalty")


def test_efficientads_loss_without_the_penalty_is_anomalibs_less_it(small_networks):
    model = small_networks().train()
    model.mean_std.update({"mean": torch.randn(1, 384, 1, 1), "std": 1 + torch.rand(1, 384, 1, 1)})
    images, others = torch.rand(2, 1, 3, 256, 256)
    with torch.no_grad():
        torch.manual_seed(0)
        whole = anomalib_methods._efficientad_loss(model, images, others)
        torch.manual_seed(0)
        without = anomalib_methods._efficientad_loss(model, images, None)
        penalty = model.student(others)[:, :384].square().mean()
    torch.testing.assert_close(whole, without + penalty)


def test_reverse_distillation_is_left_out_where_anomalib_has_no_decoder(part):
    pytest.importorskip("anomalib")
    config = BKDConfig().with_changes(
        {"teacher.name": "tf_efficientnet_lite0", "teacher.weights": "none", "teacher.image_size": (SIZE, SIZE)}
    )
    data = ImageDataset(find_categories(part)[0].train, (SIZE, SIZE))
    assert "anomalib builds no decoder" in anomalib_methods.reverse_distillation(data, Settings(config, data), epochs=1)


def test_the_script_writes_rows_and_resumes(part, tmp_path, capsys):
    out = tmp_path / "rows.csv"
    options = [str(part), *SMALLEST, "--only", "bkd", "us", "efficientad", "--epochs", "1"]
    options += ["--set", "memory.items=8", "support.bank_size=4", "support.shots=2", "--csv", str(out)]
    first = subprocess.run(
        [sys.executable, BENCHMARKS / "accuracy.py", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert first.returncode == 0, first.stderr
    assert "| US; epochs=1; image_size=64x64; random weights | " in first.stdout
    assert "EfficientAd (anomalib): left out, no weights" in first.stdout
    written = out.read_bytes()
    rows = rows_of(tmp_path, "rows.csv")
    assert [row["method"] for row in rows] == ["BKD (bkd_fast)", "US"]
    assert {"commit", "machine", "torch", "anomalib", "threads", *METRIC_NAMES} <= rows[0].keys()
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in METRIC_NAMES)

    accuracy.main([*options, "--resume"])
    assert out.read_bytes() == written
    assert "| US; epochs=1; image_size=64x64; random weights | " in capsys.readouterr().out
    with pytest.raises(BKDError, match="add --resume to continue it"):
        accuracy.main(options)
    assert out.read_bytes() == written


@pytest.mark.parametrize("kept", [0, 1])
def test_defective_images_without_a_mask_count_for_image_metrics_alone(part, tmp_path, capsys, kept):
    root = tmp_path / "bare"
    for folder in ("train", "test"):
        (root / folder).parent.mkdir(exist_ok=True)
        (root / folder).symlink_to(part / folder)
    (root / "ground_truth" / "hole").mkdir(parents=True)
    for index in range(kept):
        (root / "ground_truth" / "hole" / f"{index}_mask.png").symlink_to(part / f"ground_truth/hole/{index}_mask.png")
    out = tmp_path / "rows.csv"
    accuracy.main([str(root), *SMALLEST, "--only", "us", "--option", "us.width=8", "--csv", str(out)])
    (row,) = rows_of(tmp_path, "rows.csv")
    assert row["image_auroc"] != ""
    assert (row["pixel_auroc"] == "") == (kept == 0)
    shown = capsys.readouterr().out
    assert ("| – | – | – |" in shown) == (kept == 0)
    assert f"bare: {kept} of 2 defective images have a mask" in shown


def test_the_table_gives_mean_and_spread_over_seeds():
    costs = {"train_seconds": "1", "image_ms": "2.0", "megabytes": "3.0"}
    rows = [
        {
            **dict.fromkeys(METRIC_NAMES, ""),
            **costs,
            **{"method": "US", "category": category, "seed": str(seed), "teacher": "resnet18", "options": ""},
            "image_auroc": f"{auroc}",
        }
        for category, seed, auroc in (("a", 0, 0.9), ("b", 0, 0.7), ("a", 1, 0.9), ("b", 1, 0.9))
    ]
    assert accuracy.table(rows).splitlines()[-1] == "| US | 85.0 ± 7.1 | – | – | – | 1 | 2 | 3.0 | 2 |"
    assert accuracy.table(rows[:1]).splitlines()[-1].startswith("| US | 90.0 | – |")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["us.students"], "takes METHOD.NAME=VALUE"),
        (["bkd.epochs=3"], "set with --set"),
        (["us.nothing=3"], "choose one of students, width"),
        (["us.students=many"], "expected a value like 3"),
    ],
)
def test_options_of_other_methods_are_checked(items, message):
    with pytest.raises(BKDError, match=message):
        accuracy._options(items)
    assert accuracy._options(["us.students=5", "mkd.value_weight=1"]) == {
        "us": {"students": 5},
        "mkd": {"value_weight": 1.0},
    }


def test_options_that_are_not_defaults_tell_rows_apart():
    parse = accuracy._parser().parse_args
    chosen = accuracy._chosen("us", parse(["data", "--peer-epochs", "3"]), {"us": {"students": 3, "width": 8}})
    assert chosen == {"epochs": 3, "width": 8}
    arguments = parse(["data", "--preset", "rd4ad", "--set", "anomaly_map.sigma=2", "--image-size", "64"])
    changed = accuracy._changed(arguments, accuracy.config_from(arguments))
    assert changed == {"preset": "rd4ad", "anomaly_map.sigma": 2.0}
