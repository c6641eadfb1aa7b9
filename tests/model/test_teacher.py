from urllib.error import URLError

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from bkd_fast.cli import main
from bkd_fast.config import TeacherConfig
from bkd_fast.data import to_tensor
from bkd_fast.errors import BKDError
from bkd_fast.model.teacher import Teacher, with_image_size
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


def test_unknown_model_is_named():
    with pytest.raises(BKDError, match="no model 'resnt18'; close names: resnet18"):
        Teacher(raw(name="resnt18"))
    with pytest.raises(BKDError, match=r"no weights 'tv_in21k' of resnet18; those it has: resnet18\.tv_in1k"):
        Teacher(raw(name="resnet18.tv_in21k"))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("resnet18", {"strides": (16, 8)}, [("layer2", 8), ("layer3", 16)]),
        ("resnet18", {"layers": ("layer4", 1)}, [("layer1", 4), ("layer4", 32)]),
        ("test_vit", {}, [("blocks.0", 16), ("blocks.2", 16), ("blocks.3", 16)]),
        ("test_vit", {"layers": (-1, "blocks.2")}, [("blocks.2", 16), ("blocks.5", 16)]),
        ("swin_tiny_patch4_window7_224", {"layers": (2,)}, [("layers.2", 16)]),
    ],
)
def test_levels_are_chosen_by_stride_index_or_name(name, changes, expected):
    """From fine to coarse, as (N, C, H, W) in channels_last, and what is said of their shapes is what they have."""
    teacher = Teacher(raw(name=name, image_size=(64, 96), **changes))
    assert [(level.name, level.stride) for level in teacher.levels] == expected
    found = teacher(torch.rand(2, 3, 64, 96))
    assert [level.shape[1:] for level in found] == teacher.shapes((64, 96))
    assert [level.shape[2:] for level in found] == [(64 // stride, 96 // stride) for _, stride in expected]
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in found)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("resnet18", {"strides": (64,)}, r"no layer at stride 64\. It has 0 act1 \(stride 2\), 1 layer1 \(stride 4\)"),
        ("resnet18", {"layers": ("layer9",)}, "no layer 'layer9'"),
        ("resnet18", {"layers": (1, "layer1")}, "expected each layer once"),
        ("test_vit", {"layers": (6,)}, "no layer 6"),
        ("test_vit", {"strides": (16,)}, "6 layers at stride 16: choose by teacher.layers"),
    ],
)
def test_layers_that_are_not_there_are_listed(name, changes, message):
    with pytest.raises(BKDError, match=message):
        Teacher(raw(name=name, **changes))


@pytest.mark.parametrize(
    ("name", "size", "near"),
    [
        ("vit_small_patch14_dinov2", (256, 256), "252 x 252 or 266 x 266"),
        ("vit_small_patch14_dinov2", (224, 230), "224 x 224 or 224 x 238"),
        ("test_vit", (64, 100), "64 x 96 or 64 x 112"),
        ("convnext_atto", (50, 64), "48 x 64 or 64 x 64"),  # its last rows of pixels would go unseen
    ],
)
def test_a_size_that_does_not_fit_names_the_nearest(name, size, near):
    with pytest.raises(BKDError, match=rf"images of {size[0]} x {size[1]} pixels.*Choose teacher.image_size {near}"):
        with_image_size(raw(name=name, image_size=size))
    for one in near.split(" or "):
        height, width = map(int, one.split(" x "))
        assert with_image_size(raw(name=name, image_size=(height, width))).size == (height, width)


def test_the_image_size_follows_the_teacher():
    for name, size in (("resnet18", 256), ("test_vit", 256), ("vit_small_patch14_dinov2", 252)):
        assert with_image_size(raw(name=name)).image_size == (size, size)
    # A network that pads takes sizes that are no multiple of the stride.
    assert with_image_size(raw(name="resnet18", image_size=(50, 70))).size == (50, 70)


def test_position_embeddings_are_resampled_to_the_image(tmp_path):
    """As timm itself does it where it builds the network for that size; at its own size nothing changes."""
    torch.manual_seed(0)
    whole = timm.create_model("test_vit", pretrained=False)
    torch.save(whole.state_dict(), tmp_path / "vit.pth")
    for size in ((160, 160), (64, 96)):
        teacher = made(raw(name="test_vit", weights=str(tmp_path / "vit.pth"), image_size=size))
        overlay = {"state_dict": whole.state_dict()}
        expected = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay, img_size=size).eval()
        images = torch.rand(2, 3, *size)
        normalized = (images - teacher.image_mean) / teacher.image_std
        with torch.no_grad():
            wanted = expected.forward_intermediates(normalized, indices=[0, 2, 3], intermediates_only=True)
        for level, other in zip(teacher(images), wanted, strict=True):
            torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-4)
    own = made(raw(name="test_vit", weights=str(tmp_path / "vit.pth"), image_size=(160, 160)))
    assert torch.equal(own.network.state_dict()["model.pos_embed"], whole.state_dict()["pos_embed"])


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "swin_tiny_patch4_window7_224"])
def test_every_tensor_of_a_network_is_loaded(name, tmp_path):
    """Whatever timm's feature networks call them: two teachers agree. The file has no classifier."""
    torch.manual_seed(0)
    state = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
    save_file(state, tmp_path / "body.safetensors")
    config = raw(name=name, weights=str(tmp_path / "body.safetensors"), image_size=(64, 64))
    images = torch.rand(1, 3, 64, 64)
    for one, other in zip(made(config)(images), made(config)(images), strict=True):
        assert torch.equal(one, other)


def test_missing_weights_name_all_three_sources_at_once(monkeypatch):
    def offline(request, timeout):
        assert timeout <= 10
        raise URLError("no route to the hub")

    monkeypatch.setattr(weights, "urlopen", offline)
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(BKDError, match=r"(?s)local file.*installed package.*hub.*no route") as caught:
        made(TeacherConfig(name="resnet18"))
    assert "weights=PATH" in str(caught.value)
    assert "bkd-fast weights resnet18 --out FILE.safetensors" in str(caught.value)


def test_weights_that_the_hub_has_left_in_its_cache_need_no_network(monkeypatch, tmp_path):
    state = timm.create_model("test_resnet", pretrained=False).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    asked = []

    def cached(repository, file):
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(weights, "try_to_load_from_cache", cached)
    monkeypatch.setattr(weights, "urlopen", None)
    found = load_weights(TeacherConfig(name="test_resnet"))
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors")]
    assert all(torch.equal(found.tensors[key], value) for key, value in state.items())


def test_saved_weights_are_those_of_the_hub(monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False)
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(weights, "_reach", lambda url: None)
    original = timm.create_model

    def create(name, pretrained=False, **options):
        return network if pretrained else original(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    path = tmp_path / "folder" / "resnet.safetensors"
    assert main(["weights", "test_resnet", "--out", str(path)]) == 0
    assert f"--teacher test_resnet --weights {path}" in capsys.readouterr().out
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert all(torch.equal(load_file(path)[key], value) for key, value in network.state_dict().items())
    made(raw(name="test_resnet", weights=str(path)))
    assert main(["weights", "test_resnet", "--out", str(tmp_path / "resnet.pth")]) == 1
    assert "ends in .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("teacher", ["wide_resnet50_2", "resnet18"])
def test_weights_of_another_architecture_are_refused(teacher, tmp_path):
    path = tmp_path / "resnet34.pth"
    torch.save(timm.create_model("resnet34", pretrained=False).state_dict(), path)
    with pytest.raises(BKDError, match=f"does not fit the teacher {teacher}: .*tensors are .* .first layer"):
        made(TeacherConfig(name=teacher, weights=str(path)))


def test_weights_that_lack_tensors_name_the_first(tmp_path):
    for name, key in (("resnet18", "layer2.0.conv1.weight"), ("test_vit", "blocks.1.norm1.weight")):
        state = timm.create_model(name, pretrained=False).state_dict()
        del state[key]
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(BKDError, match=rf"1 tensors are missing \(first {key}\)"):
            made(TeacherConfig(name=name, weights=str(tmp_path / f"{name}.pth")))


def test_weights_file_problems(tmp_path):
    with pytest.raises(BKDError, match="there is no file"):
        made(TeacherConfig(name="resnet18", weights=str(tmp_path / "none.pth")))
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(BKDError, match="cannot be read"):
        made(TeacherConfig(name="resnet18", weights=str(tmp_path / "broken.pth")))
