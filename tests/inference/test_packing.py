import pytest
import torch
from torch import nn

from bkd_fast.config import BKDConfig
from bkd_fast.inference.packing import PackedConvolution, can_pack, pack_convolutions
from bkd_fast.model.teacher import Teacher

pytestmark = [
    pytest.mark.skipif(not can_pack(), reason="this torch has no packed convolutions"),
    pytest.mark.usefixtures("frozen"),
]


@pytest.fixture
def frozen():
    with torch.no_grad():
        yield


def packed(network, *images):
    """What a network gives before and after, and how many convolutions were packed."""
    network.eval()
    before = [network(image) for image in images]
    count = pack_convolutions(network, lambda: [network(images[0])])
    return before, [network(image) for image in images], count


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(5, 7, 3, padding=1), (2, 5, 9, 8)),
        (nn.Conv2d(6, 8, 3, stride=2, padding=(1, 2), dilation=2, groups=2, bias=False), (1, 6, 12, 11)),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8), (1, 8, 9, 9)),
        (nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False), (2, 6, 5, 4)),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2), (1, 6, 5, 4)),
    ],
)
@pytest.mark.parametrize("activation", [None, nn.ReLU, nn.ReLU6])
def test_layers_compute_what_they_did(layer, shape, activation, channels_last):
    image = 4 * torch.randn(shape)
    image = image.contiguous(memory_format=torch.channels_last) if channels_last else image
    size = shape[:2] + (4, 4)  # another size gives the right results too
    found = PackedConvolution(layer, size, activation)(image)
    expected = layer(image)
    torch.testing.assert_close(found, expected if activation is None else activation()(expected))


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "mobilenetv2_100"])
def test_teachers_compute_what_they_did(name):
    teacher = Teacher(BKDConfig().with_changes({"teacher.name": name, "teacher.weights": "none"}).teacher)
    images = [torch.rand(1, 3, 64, 96), torch.rand(3, 3, 80, 64)]
    before = [teacher(image) for image in images]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in teacher.modules())
    count = pack_convolutions(teacher, lambda: teacher(images[0]))
    assert count > 0.8 * convolutions
    for one, other in zip(before, [teacher(image) for image in images], strict=True):
        for level, expected in zip(other, one, strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
    activations = sum(isinstance(module, (nn.ReLU, nn.ReLU6)) for module in teacher.modules())
    taken = sum(
        isinstance(module, PackedConvolution) and module.activation[0] != "none" for module in teacher.modules()
    )
    assert taken > activations  # those after additions stay


def test_activations_are_taken_in_where_nothing_else_reads_their_input():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.activation = nn.Conv2d(3, 4, 1), nn.ReLU()

        def forward(self, image):
            features = self.convolution(image)
            return self.activation(features) + features

    network, image = Both(), torch.randn(2, 3, 5, 5)
    before, after, count = packed(network, image)
    torch.testing.assert_close(after, before)
    assert count == 1
    assert network.convolution.activation[0] == "none"
    assert isinstance(network.activation, nn.ReLU)

    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU6())
    before, after, count = packed(network, image)
    torch.testing.assert_close(after, before)
    assert count == 2
    assert [module.activation[0] for module in network if isinstance(module, PackedConvolution)] == ["relu", "hardtanh"]


def test_an_activation_that_convolutions_share_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.activation = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

        def forward(self, image):
            return self.activation(self.second(self.activation(self.first(image))))

    network = Shared()
    before, after, count = packed(network, torch.randn(2, 3, 5, 5))
    torch.testing.assert_close(after, before)
    assert count == 2
    assert isinstance(network.activation, nn.ReLU)


def test_other_convolutions_are_left_alone():
    class Own(nn.Conv2d):
        def forward(self, image):
            return 2 * super().forward(image)

    network = nn.Sequential(
        Own(3, 3, 1), nn.Conv2d(3, 3, 3, padding="same"), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
    )
    before, after, count = packed(network, torch.randn(1, 3, 6, 6))
    torch.testing.assert_close(after, before)
    assert count == 0
