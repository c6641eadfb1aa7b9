import pytest
import torch
import torch.nn.functional as F

from bkd_fast.model.views import joint_views

CHANNELS = (6, 10, 24)


def levels(count: int, size: tuple[int, int], seed: int) -> list[torch.Tensor]:
    """Of images of ``size``, as teachers round their sizes up."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16)]
    return [
        torch.randn(count, width, *shape, generator=generator) for width, shape in zip(CHANNELS, shapes, strict=True)
    ]


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (50, 70), (33, 47)])
def test_all_levels_lie_side_by_side_at_stride_8(size):
    found = levels(2, size, 0)
    fine, joint = joint_views(found)
    assert fine is found[0]
    assert joint.shape == (2, sum(CHANNELS), *found[1].shape[2:])
    assert joint.is_contiguous(memory_format=torch.channels_last)
    total = sum(CHANNELS)
    parts = joint.split(CHANNELS, 1)
    scale = [(total / (3 * width)) ** 0.5 for width in CHANNELS]
    torch.testing.assert_close(parts[1], scale[1] * found[1])
    deep = F.interpolate(found[2], size=found[1].shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(parts[2], scale[2] * deep)
    # The finest is the mean of the pixels that there are, two by two.
    for row in range(joint.shape[2]):
        for column in range(joint.shape[3]):
            mean = found[0][:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((2, 3))
            torch.testing.assert_close(parts[0][:, :, row, column], scale[0] * mean)


def test_each_level_has_the_same_share_of_a_squared_distance():
    """Whatever its channels: three levels whose features differ by one in every channel differ by one together."""
    first = levels(1, (64, 64), 0)
    _, base = joint_views(first)
    found = []
    for level in range(3):
        other = [features + (index == level) for index, features in enumerate(first)]
        found.append(float((joint_views(other)[1] - base).square().mean()))
    assert found == pytest.approx([1 / 3] * 3, rel=1e-4)
    assert float((joint_views([level + 1 for level in first])[1] - base).square().mean()) == pytest.approx(1, rel=1e-4)


def test_views_are_linear_in_the_levels():
    """What the statistics of memory items rest on: a view of a mean is the mean of views."""
    first, second = levels(2, (50, 70), 0), levels(2, (50, 70), 1)
    mixed = joint_views([0.3 * one - 2 * other for one, other in zip(first, second, strict=True)])
    for found, one, other in zip(mixed, joint_views(first), joint_views(second), strict=True):
        torch.testing.assert_close(found, 0.3 * one - 2 * other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ((5,), [5]),
        ((5, 5, 5), [5]),
        ((8, 4), [8]),
        ((16, 8, 4, 2), [16, 8]),
        ((8, 8, 4, 4, 2), [8, 4]),
        ((16, 8, 8), [16, 8]),
    ],
)
def test_any_number_of_levels_of_any_size_lie_side_by_side(sides, expected):
    """At the size of the middle one; the finest is a view alone where it is finer."""
    found = [torch.randn(2, 3 + index, side, side) for index, side in enumerate(sides)]
    views = joint_views(found)
    assert [view.shape[-1] for view in views] == expected
    assert views[-1].shape[1] == sum(level.shape[1] for level in found)
    constant = [torch.full_like(level, float(index)) for index, level in enumerate(found)]
    parts = joint_views(constant)[-1].split([level.shape[1] for level in found], 1)
    total = sum(level.shape[1] for level in found)
    for index, part in enumerate(parts):
        share = index * (total / (len(found) * found[index].shape[1])) ** 0.5
        torch.testing.assert_close(part, torch.full_like(part, share))
