import pytest
import torch
import torch.nn.functional as F

from bkd_fast.config import AlignmentConfig, SampledSupport
from bkd_fast.model.alignment import AlignmentPyramid, groups_of
from bkd_fast.ops import modulated_deform_conv2d

CHANNELS = (6, 8, 10)
SIZES = ((16, 12), (8, 6), (4, 3))


def levels(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, *size, generator=generator) for width, size in zip(CHANNELS, SIZES, strict=True)]


def pyramid(seed: int = 0, aggregation: str = "mean", **changes) -> AlignmentPyramid:
    torch.manual_seed(seed)
    support, config = SampledSupport(per="step", aggregation=aggregation), AlignmentConfig(**{"depth": 1, **changes})
    module = AlignmentPyramid(CHANNELS, support, config).double()
    if changes.get("offset_init") != "zero":
        for parameter in module.predictors.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
    return module


def doubled(values: list[torch.Tensor]) -> list[torch.Tensor]:
    return [value.double() for value in values]


def grouped(support: list[torch.Tensor], batch: int) -> list[torch.Tensor]:
    return [level.unflatten(0, (batch, -1)) for level in support]


@pytest.mark.parametrize("kernel", ["full", "identity", "groups"])
def test_starts_as_the_mean_of_the_supports(kernel):
    changes = {"kernel": "full", "max_group_channels": 4} if kernel == "groups" else {"kernel": kernel}
    module = pyramid(offset_init="zero", **changes)
    support = doubled(levels(3, 1))
    result = module(doubled(levels(2, 0)), module.prepare(grouped(support, 1)))
    for aligned, level in zip(result.aligned, support, strict=True):
        torch.testing.assert_close(aligned, level.mean(0, keepdim=True).expand(2, -1, -1, -1))
    assert all(not offset.any() for offset in result.offsets)


@pytest.mark.parametrize("cascade", ["add", "product", "concat"])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize("group", [0, 5])
def test_shared_support_equals_the_same_support_per_query(cascade, modulated, aggregation, group):
    """The projected gather of a fixed support and the deformable convolution of each pair are one function."""
    options = {"aggregation": aggregation, "kernel_init": "default", "max_group_channels": group or None}
    module = pyramid(cascade=cascade, modulated=modulated, **options)
    query, support = doubled(levels(2, 0)), doubled(levels(3, 1))
    shared = module(query, module.prepare(grouped(support, 1)))
    repeated = [level.unsqueeze(0).expand(2, -1, -1, -1, -1) for level in support]
    each = module(query, module.prepare(repeated))
    for first, second in zip(shared.aligned + shared.offsets, each.aligned + each.offsets, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("channels", "most", "groups"),
    [(112, 128, 1), (1024, 128, 8), (1024, 0, 1), (136, 128, 2), (1280, 128, 10), (131, 128, 1), (262, 128, 1)],
)
def test_wide_levels_fall_into_few_groups(channels, most, groups):
    """131 is a prime, and 262 has no divisor between 32 and 128."""
    assert groups_of(channels, most) == groups


def test_offsets_grow_with_each_side_of_the_grid():
    offset = torch.arange(2 * 18 * 6, dtype=torch.float64).view(2, 18, 2, 3)
    found = pyramid()._upsample(offset, torch.Size((4, 9)))
    plain = F.interpolate(offset, size=(4, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[:, 0::2], 2 * plain[:, 0::2])
    torch.testing.assert_close(found[:, 1::2], 3 * plain[:, 1::2])


def test_equations_1_to_5_written_out():
    """Concatenation, activation, doubled additive cascade, deformable convolution; one pair, level by level."""
    module = pyramid(max_offset=1.5, kernel_init="default")
    query, support = doubled(levels(1, 0)), doubled(levels(1, 1))
    result = module(query, module.prepare(grouped(support, 1)))
    coarser = None
    for level in (2, 1, 0):
        predictor = module.predictors[level]
        weight = torch.cat([predictor.query.weight, predictor.support.weight], dim=1)
        fusion = F.conv2d(torch.cat([query[level], support[level]], 1), weight, predictor.query.bias, padding=1)
        offset = 1.5 * torch.tanh(fusion)
        if coarser is not None:
            offset = offset + 2 * F.interpolate(coarser, scale_factor=2, mode="bilinear", align_corners=False)
        torch.testing.assert_close(result.offsets[level], offset)
        warped = modulated_deform_conv2d(support[level], offset, module.kernels[level], padding=1)
        torch.testing.assert_close(result.aligned[level], warped)
        coarser = offset


def test_softmax_offsets_stay_under_a_pixel():
    """What docs/equations.md says of Eq. 3: positive, summing to one over the channels."""
    module = pyramid(activation="softmax", cascade="product")
    deepest = module(doubled(levels(2, 0)), module.prepare(grouped(doubled(levels(2, 1)), 1))).offsets[2]
    assert (deepest > 0).all()
    torch.testing.assert_close(deepest.sum(1), torch.ones_like(deepest[:, 0]))


def test_tanh_offsets_are_bounded():
    module = pyramid(max_offset=2.0)
    for parameter in module.predictors.parameters():
        torch.nn.init.normal_(parameter, 0, 100)
    offsets = module(doubled(levels(1, 0)), module.prepare(grouped(doubled(levels(1, 1)), 1))).offsets
    # Each level adds at most max_offset of its own pixels to twice the level below it.
    for offset, bound in zip(offsets, (2 + 2 * (2 + 2 * 2), 2 + 2 * 2, 2), strict=True):
        assert offset.abs().max() <= bound + 1e-9


def test_a_known_shift_is_undone():
    """Constant offsets move the support by whole pixels, whatever the cascade's rounding."""
    module = pyramid(offset_init="zero", kernel="identity", max_offset=4.0, cascade="concat")
    with torch.no_grad():
        for predictor in module.predictors:
            predictor.query.bias.copy_(torch.atanh(torch.tensor([1.0, -2.0]) / 4.0))
    support = doubled(levels(1, 3))
    aligned = module(doubled(levels(1, 0)), module.prepare(grouped(support, 1))).aligned[0]
    torch.testing.assert_close(aligned[..., :-1, 2:], support[0][..., 1:, :-2])


def test_min_takes_the_closest_shot_at_each_pixel():
    module = pyramid(offset_init="zero", kernel="identity", aggregation="min")
    query = doubled(levels(1, 0))
    other = doubled(levels(1, 1))
    half = [torch.where(torch.arange(q.shape[-1]) < q.shape[-1] // 2, q, o) for q, o in zip(query, other, strict=True)]
    rest = [torch.where(torch.arange(q.shape[-1]) < q.shape[-1] // 2, o, q) for q, o in zip(query, other, strict=True)]
    support = [torch.stack([a, b], dim=1) for a, b in zip(half, rest, strict=True)]
    for aligned, level in zip(module(query, module.prepare(support)).aligned, query, strict=True):
        torch.testing.assert_close(aligned, level)


def test_all_parameters_learn():
    module = pyramid(cascade="concat", modulated=True, depth=2)
    result = module(doubled(levels(2, 0)), module.prepare(grouped(doubled(levels(2, 1)), 1)))
    sum(level.square().sum() for level in result.aligned).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
