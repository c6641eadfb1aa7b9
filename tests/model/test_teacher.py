import copy

import pytest
import timm
import torch

from bkd_fast.config import TeacherConfig
from bkd_fast.data import to_tensor
from bkd_fast.errors import BKDError
from bkd_fast.model.teacher import Teacher
from bkd_fast.training import weights
from bkd_fast.training.weights import PACKAGES, load_weights


def raw(**changes) -> TeacherConfig:
    return TeacherConfig(**{"weights": "none", "patch_size": 1, **changes})


def made(config: TeacherConfig) -> Teacher:
    return Teacher(config, load_weights(config))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("wide_resnet50_2.tv_in1k", (256, 512, 1024)),
        ("resnet18", (64, 128, 256)),
        ("tf_efficientnet_lite0", (24, 40, 112)),
    ],
)
def test_levels_are_strides_4_8_16(name, channels):
    teacher = Teacher(raw(name=name))
    assert teacher.channels == channels
    shapes = [tuple(level.shape) for level in teacher(torch.rand(2, 3, 64, 96))]
    assert shapes == [(2, width, 64 // s, 96 // s) for width, s in zip(channels, (4, 8, 16), strict=True)]


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_folded_equals_timm(name, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False).eval()
    for module in network.modules():  # statistics as a trained network has them
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    teacher = made(raw(name=name, weights=str(tmp_path / "weights.pth")))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in teacher.modules())

    plain = timm.create_model(name, pretrained=False, features_only=True).eval()
    plain.load_state_dict(network.state_dict(), strict=False)
    images = torch.rand(2, 3, 64, 64)
    normalized = (images - teacher.image_mean) / teacher.image_std
    with torch.no_grad():
        wanted = [
            level
            for level, stride in zip(plain(normalized), plain.feature_info.reduction(), strict=True)
            if stride in (4, 8, 16)
        ]
    for level, expected in zip(teacher(images), wanted, strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_lite0_package_weights_recognise_a_cat():
    """The names are not timm's, only order and shapes are: that they mean the same is seen by what they recognise."""
    pytest.importorskip(PACKAGES["tf_efficientnet_lite0"][1], reason="the demo extra is not installed")
    chelsea = pytest.importorskip("skimage.data", reason="the demo extra is not installed").chelsea()
    name = "tf_efficientnet_lite0"
    path = weights._packaged(name)
    network = timm.create_model(name, pretrained=False).eval()
    network.load_state_dict(weights._by_position(weights._read(path), name, str(path)), strict=False)
    image = to_tensor(chelsea[:, 75:375], (224, 224))[None]
    teacher = made(TeacherConfig(name=name))
    with torch.no_grad():
        likely = network((image - teacher.image_mean) / teacher.image_std).topk(3).indices[0].tolist()
    assert set(likely) & {281, 282, 285}  # tabby, tiger cat, Egyptian cat

    loaded = dict(teacher.network.named_parameters())
    assert loaded["conv_stem.weight"].shape == network.conv_stem.weight.shape
    scale = network.bn1.weight / (network.bn1.running_var + network.bn1.eps).sqrt()
    torch.testing.assert_close(loaded["conv_stem.weight"], network.conv_stem.weight * scale.view(-1, 1, 1, 1))


def test_stays_frozen_and_in_eval():
    teacher = Teacher(raw(name="resnet18")).train()
    assert not teacher.training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(torch.rand(1, 3, 64, 64, requires_grad=True))[0].requires_grad


@pytest.mark.parametrize("border", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
def test_the_border_is_averaged_with_the_share_inside(border, size):
    """Against sums over the pixels that there are: divided by how many, times their share of the window to a power."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, *size)
    plain, pooled = Teacher(raw(name="resnet18")), Teacher(raw(name="resnet18", patch_size=3, border=border))
    pooled.load_state_dict(plain.state_dict())
    for before, after in zip(plain.raw(images), pooled.raw(images), strict=True):
        expected = torch.empty_like(before)
        height, width = before.shape[2:]
        for row in range(height):
            for column in range(width):
                part = before[:, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
                share = part.shape[2] * part.shape[3] / 9
                expected[:, :, row, column] = part.mean((2, 3)) * share**border
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_levels_are_standardised_by_statistics_that_are_set_or_loaded():
    torch.manual_seed(0)
    teacher, images = Teacher(raw(name="resnet18")), torch.rand(2, 3, 64, 64)
    assert all(torch.equal(*pair) for pair in zip(teacher(images), teacher.raw(images), strict=True))
    for level, channels in enumerate(teacher.channels, start=1):
        teacher.set_statistics(level, torch.randn(channels), torch.rand(channels) + 0.1)
    stored = teacher.state_dict()
    assert not [key for key in stored if "shift" in key]
    copied = copy.deepcopy(Teacher(raw(name="resnet18")))
    holder = torch.nn.ModuleList([copied])  # loaded as a part of a model
    holder.load_state_dict({f"0.{key}": value for key, value in stored.items()})
    for level, features in enumerate(teacher.raw(images), start=1):
        expected = (features - stored[f"mean_{level}"]) / stored[f"std_{level}"]
        for one in (teacher, copied):
            torch.testing.assert_close(
                one(images)[level - 1], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
            )


def test_unknown_model_is_named():
    with pytest.raises(BKDError, match="no model 'resnt18'"):
        Teacher(raw(name="resnt18"))


def test_model_without_the_strides_is_refused():
    with pytest.raises(BKDError, match="vit_tiny_patch16_224"):
        Teacher(raw(name="vit_tiny_patch16_224"))


def test_missing_weights_name_all_three_sources(monkeypatch):
    original = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("no route to the hub")
        return original(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(BKDError, match=r"(?s)local file.*installed package.*hub.*no route") as caught:
        made(TeacherConfig(name="resnet18"))
    assert "weights=PATH" in str(caught.value)


@pytest.mark.parametrize("teacher", ["wide_resnet50_2", "resnet18"])
def test_weights_of_another_architecture_are_refused(teacher, tmp_path):
    path = tmp_path / "resnet34.pth"
    torch.save(timm.create_model("resnet34", pretrained=False).state_dict(), path)
    with pytest.raises(BKDError, match=f"does not fit the teacher {teacher}"):
        made(TeacherConfig(name=teacher, weights=str(path)))


def test_weights_file_problems(tmp_path):
    with pytest.raises(BKDError, match="there is no file"):
        made(TeacherConfig(name="resnet18", weights=str(tmp_path / "none.pth")))
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(BKDError, match="cannot be read"):
        made(TeacherConfig(name="resnet18", weights=str(tmp_path / "broken.pth")))
