import copy

import pytest
import tiny
import torch
import torch.nn.functional as F

from bkd_fast.config import BKDConfig
from bkd_fast.errors import BKDError
from bkd_fast.model import BKD
from bkd_fast.model.bkd import BRANCHES
from bkd_fast.model.blocks import ResidualBlock
from bkd_fast.model.calibration import calibrate, choose_bank, greedy_coreset, scale_maps
from bkd_fast.model.support import Exclude


def small(changes=None) -> BKDConfig:
    return BKDConfig().with_changes({**tiny.TINY, "memory.items": 12, "support.shots": 2}).with_changes(changes)


REFINED = {"alignment.kernel": "full"}
STUDENT = {"teacher.levels": "separate", "student": "on", "memory.learned": True, "memory.read": "attention", **REFINED}
VARIANTS = {"default": {}, "refined": REFINED, "student": STUDENT}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request) -> BKD:
    torch.manual_seed(0)
    model = BKD(small(VARIANTS[request.param]), weights=None)
    for parameter in model.parameters():  # zero-initialised parts would hide mistakes
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, 0, 0.02)
    return model.eval()


IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
SUPPORT = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def parameters(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_parameter_counts_are_those_of_reverse_distillation():
    """RD4AD's bottleneck without its dead layers has 58.89 M parameters, its decoder 24.92 M (its code, counted)."""
    model = BKD(BKDConfig.preset("rd4ad", {"teacher.name": "wide_resnet50_2", "teacher.weights": "none"}), weights=None)
    assert parameters(model.bottleneck) == pytest.approx(58.89, abs=0.01)
    assert parameters(model.student) == pytest.approx(24.92, abs=0.01)


@pytest.mark.parametrize("size", [(64, 64), (72, 88), (33, 47)])
@pytest.mark.parametrize("teacher", ["test_resnet", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("levels", ["joint", "separate"])
def test_any_image_size(size, teacher, levels):
    model = BKD(
        small({"teacher.name": teacher, "teacher.image_size": size, "teacher.levels": levels}), weights=None
    ).eval()
    with torch.no_grad():
        result = model(torch.rand(2, 3, *size), torch.rand(2, 3, *size))
        views = 2 if levels == "joint" else 3
        assert len(result.teacher) == views
        for outputs, count in ((result.aligned, views), (result.reconstruction, 1 if levels == "joint" else 3)):
            assert [level.shape for level in outputs] == [level.shape for level in result.teacher[-count:]]
        assert result.image.shape == (2,)
        assert model.anomaly_map(result, size).shape == (2, *size)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("default", REFINED), ("default", {"memory.learned": True}), ("default", STUDENT), ("paper", {}), ("rd4ad", {})],
)
def test_a_training_step_reaches_every_parameter(preset, changes):
    torch.manual_seed(0)
    config = BKDConfig.preset(preset, {**tiny.TINY, **changes})
    model = BKD(config, weights=None).train()
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    support = SUPPORT.expand(3, -1, -1, -1, -1) if preset == "paper" else SUPPORT
    for _ in range(3):  # zero-initialised heads pass gradients on from the second step
        optimizer.zero_grad()
        model.losses(model(IMAGES, support))["total"].backward()
        optimizer.step()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent, silent
    assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize("distance", ["squared", "cosine"])
@pytest.mark.parametrize("levels", ["joint", "separate"])
def test_losses_are_equations_11_and_12(distance, levels):
    torch.manual_seed(0)
    weights = {"forward": 0.5, "reverse": 2.0}
    config = small({"anomaly_map.distance": distance, "teacher.levels": levels}).with_changes(
        {f"training.{branch}_weight": weight for branch, weight in weights.items()}
    )
    model = BKD(config, weights=None).eval()
    with torch.no_grad():
        result = model(IMAGES, SUPPORT)
        losses = model.losses(result)
    for branch, outputs in (("forward", result.aligned), ("reverse", result.reconstruction)):
        expected = torch.zeros(())
        for teacher, output in zip(result.teacher[-len(outputs) :], outputs, strict=True):
            value = F.mse_loss(output, teacher)
            direction = (1 - F.cosine_similarity(teacher.flatten(1), output.flatten(1))).mean()
            expected = expected + (value if distance == "squared" else direction + config.training.value_weight * value)
        torch.testing.assert_close(losses[branch], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["total"], sum(weights[branch] * losses[branch] for branch in weights))


def test_a_fixed_support_is_prepared_once(model):
    with torch.no_grad():
        prepared = model.make_support(model.support_levels(SUPPORT))
        first = model.distill(model.teacher(IMAGES), prepared)
        second = model(IMAGES, SUPPORT)
    for one, two in zip(first.aligned, second.aligned, strict=True):
        torch.testing.assert_close(one, two)


def test_a_support_per_query_is_refused_where_queries_choose(model):
    with pytest.raises(BKDError, match="choose from one set of images"):
        model(IMAGES, SUPPORT.expand(3, -1, -1, -1, -1))


def test_each_image_is_scored_by_itself(model):
    with torch.no_grad():
        together = model.anomaly_map(model(IMAGES, SUPPORT), (64, 64))
        alone = torch.cat([model.anomaly_map(model(image[None], SUPPORT), (64, 64)) for image in IMAGES])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)


class Whole(torch.nn.Module):
    def __init__(self, model: BKD) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
        return self.model.anomaly_map(self.model(images, support), (64, 64))


def test_compiles_without_graph_breaks(model):
    whole = Whole(model)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES, SUPPORT), whole(IMAGES, SUPPORT), rtol=1e-3, atol=1e-5)


def test_a_training_step_compiles_without_graph_breaks(model):
    copied = copy.deepcopy(model).train()

    def loss(images, support):
        return copied.losses(copied(images, support))["total"]

    if not copied.learned_branches():
        with torch.no_grad():
            found = torch.compile(loss, fullgraph=True, backend="aot_eager")(IMAGES, SUPPORT)
            torch.testing.assert_close(found, loss(IMAGES, SUPPORT), rtol=1e-3, atol=1e-5)
        return
    torch.compile(loss, fullgraph=True, backend="aot_eager")(IMAGES, SUPPORT).backward()
    compiled = {name: p.grad.clone() for name, p in copied.named_parameters() if p.grad is not None}
    copied.zero_grad()
    loss(IMAGES, SUPPORT).backward()
    for name, parameter in copied.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(compiled[name], parameter.grad, rtol=1e-2, atol=1e-3 * scale + 1e-7)


def test_exports_with_any_batch(model):
    whole = Whole(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(whole, (IMAGES, SUPPORT), dynamic_shapes=({0: batch}, None))
    with torch.no_grad():
        for count in (1, 3, 5):
            images = torch.rand(count, 3, 64, 64)
            torch.testing.assert_close(program.module()(images, SUPPORT), whole(images, SUPPORT), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", ["level", "channel", "none"])
@pytest.mark.parametrize("levels", ["joint", "separate"])
def test_calibration_scales_levels_and_fills_the_memory(scale, levels):
    torch.manual_seed(0)
    model = BKD(small({"teacher.scale": scale, "teacher.levels": levels}), weights=None).eval()
    images = torch.rand(12, 3, 64, 64)
    with torch.no_grad():
        raw = model.teacher.raw(images)
    calibrate(model, map(model.teacher.raw, images.split(5)), 12, torch.Generator().manual_seed(0))
    found = model.teacher(images)
    for features, before in zip(found, raw, strict=True):
        std = features.std((0, 2, 3), unbiased=False)
        if scale == "none":
            torch.testing.assert_close(features, before)
            continue
        assert features.mean((0, 2, 3)).abs().max() < 1e-2
        if scale == "channel":
            alive = before.std((0, 2, 3), unbiased=False) > 1e-6
            torch.testing.assert_close(std[alive], torch.ones(int(alive.sum())), atol=1e-2, rtol=0)
            continue
        # One number for all channels: their proportions stay, and the mean variance is one.
        assert std.square().mean() == pytest.approx(1, abs=1e-2)
        alive = std > 1e-6
        proportions = std[alive] / before.std((0, 2, 3), unbiased=False)[alive]
        torch.testing.assert_close(proportions, proportions.mean().expand_as(proportions), rtol=1e-2, atol=0)
    views = model.views(found)[-len(model.memories) :]
    for memory, view in zip(model.memories, views, strict=True):
        rows = view.permute(0, 2, 3, 1).flatten(1, 2)
        own = rows[memory.origin]  # (items, pixels, C): all features of the image that an item comes from
        apart = (own - memory.items.detach().unsqueeze(1)).norm(dim=2).min(1).values
        assert apart.max() < 1e-2 * rows.norm(dim=2).mean()


def test_items_that_no_feature_filled_are_of_no_image():
    """Two images have fewer features at stride 8 than there are items."""
    model = BKD(small({"memory.items": 200}), weights=None).eval()
    images = torch.rand(2, 3, 64, 64)
    calibrate(model, [model.teacher.raw(images)], 2, torch.Generator().manual_seed(0))
    origin = model.memories[0].origin
    assert set(origin.tolist()) == {-1, 0, 1}
    assert (origin == -1).sum() == 200 - 2 * 64


def test_coreset_keeps_the_rare():
    rare = torch.tensor([[10.0, 0.0], [0.0, 10.0]])
    features = torch.cat([torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 0.1, rare])
    chosen = greedy_coreset(features, 3)
    assert {500, 501} < set(chosen.tolist())
    assert len(greedy_coreset(features[:4], 10)) == 4


def test_coreset_survives_the_projection_of_wide_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 200, generator=generator) * 0.1
    features[[17, 203]] += 5 * torch.randn(2, 200, generator=generator)
    assert {17, 203} < set(greedy_coreset(features, 3).tolist())


def test_the_pool_is_of_images_that_differ():
    """Many views of one image, and two others: three are chosen."""
    same = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1, -1)
    levels = torch.cat([same, same + 1, same - 1])[[0, 6, 1, 2, 3, 4, 12, 5]]
    assert set(choose_bank(levels.split(3), 3)) >= {1, 6}
    assert choose_bank([levels], 100) == list(range(8))


def test_scaled_maps_lie_around_one_and_branches_count_the_same(model):
    copied = copy.deepcopy(model)
    with torch.no_grad():
        prepared = copied.make_support(copied.support_levels(SUPPORT))
        result = copied.distill(copied.teacher(IMAGES), prepared)
        scale_maps(copied, (copied.distill(copied.teacher(part), prepared) for part in IMAGES.split(2)))
        for branch, maps in copied.level_maps(result, (64, 64)).items():
            for level, scale in zip(maps, copied.map_scale[branch], strict=True):
                assert float(level.mean()) == pytest.approx(scale, rel=1e-3)
            own = copied.anomaly_map(result, (64, 64), [branch])
            assert 0.8 < own.log().mean().exp() < 1.25
        before = copied.anomaly_map(result, (64, 64))
        # What is squared in one branch is as if it were squared in the other.
        for farther in ("aligned", "reconstruction"):
            levels = [
                target + 2 * (output - target)
                for output, target in zip(
                    getattr(result, farther), result.teacher[-len(getattr(result, farther)) :], strict=True
                )
            ]
            found = copied.anomaly_map(result._replace(**{farther: levels}), (64, 64))
            torch.testing.assert_close(found, 2 * before, rtol=1e-3, atol=1e-5)


def test_joint_views_count_for_two_thirds_and_one_third():
    """The map is (d8 / scale) ** 2/3 (d4 / scale) ** 1/3 of the forward branch, and d8 / scale of the reverse one."""
    torch.manual_seed(0)
    model = BKD(small({"anomaly_map.sigma": 0.0}), weights=None).eval()
    with torch.no_grad():
        result = model(IMAGES, SUPPORT)
        scale_maps(model, [result])
        # By how much the squared distances of one view grow, and by how much the maps then do.
        for branch, view, growth, own, both in (
            ("aligned", 0, 64, 4, 2),
            ("aligned", 1, 8, 4, 2),
            ("reconstruction", 0, 4, 4, 2),
        ):
            outputs = list(getattr(result, branch))
            target = result.teacher[view - len(outputs)]
            outputs[view] = target + growth**0.5 * (outputs[view] - target)
            farther = result._replace(**{branch: outputs})
            for branches, factor in (
                ([{"aligned": "forward", "reconstruction": "reverse"}[branch]], own),
                (BRANCHES, both),
            ):
                expected = factor * model.anomaly_map(result, (64, 64), branches)
                torch.testing.assert_close(
                    model.anomaly_map(farther, (64, 64), branches), expected, rtol=1e-3, atol=1e-5
                )


def test_the_order_of_the_branches_changes_nothing(model):
    """Neither reads what the other computes, so that they may run on two streams."""
    reverse_first = []

    def swapped(first, second):
        later = second()
        reverse_first.append(True)
        return first(), later

    with torch.no_grad():
        support = model.make_support(model.support_levels(SUPPORT))
        expected = model.predict(IMAGES, support)
        results = model.predict(IMAGES, support, both=swapped)
    assert reverse_first
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_scores_combine_the_map_and_the_whole_image():
    model = BKD(small({"anomaly_map.image_weight": 0.5, "anomaly_map.top_fraction": 0.5}), weights=None)
    model.score_scale = {"map": [1.0, 2.0], "image": [-1.0, 0.5]}
    maps = torch.tensor([[[4.0, 8.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    image = torch.tensor([0.3, 0.2])
    top = torch.tensor([6.0, 1e-12])
    expected = ((top.log() - 1) / 2).exp() + 0.5 * ((image.log() + 1) / 0.5).exp()
    torch.testing.assert_close(model.image_score(maps, image), expected.log())
    # Without a forward branch there is no such image; and without weight the map's mean is the score.
    torch.testing.assert_close(model.image_score(maps), (top.log() - 1) / 2)
    plain = BKD(small({"anomaly_map.image_weight": 0.0, "anomaly_map.top_fraction": 0.0}), weights=None)
    torch.testing.assert_close(plain.image_score(maps, image), torch.tensor([8.0, 0.0]))
    # Tiles add up as the parts of one do; of scores that are no logarithms the highest counts.
    tiles = torch.tensor([1.0, 3.0, 2.0])
    torch.testing.assert_close(model.tiles_score(tiles), tiles.exp().sum().log())
    assert model.tiles_score(tiles[:1]) == 1
    assert plain.tiles_score(tiles) == 3


@pytest.mark.parametrize("levels", ["joint", "separate"])
def test_what_is_excluded_is_not_read(levels):
    """A query that is a support itself, and whose features are items, is far only from what is left."""
    torch.manual_seed(0)
    few = {"memory.items": 100, "support.neighbors": 1, "memory.neighbors": 2, "teacher.scale": "none"}
    few["teacher.name"] = "resnet18"  # random weights of the smallest teacher make all images alike
    model = BKD(small({"teacher.levels": levels, **few}), weights=None).eval()
    calibrate(model, [model.teacher.raw(IMAGES)], 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        prepared = model.make_support(model.support_levels(IMAGES))
        query = model.teacher(IMAGES)
        itself = torch.eye(3, dtype=torch.bool)
        origin = model.memories[0].origin
        items = itself[:, origin.clamp_min(0)] & (origin >= 0)
        free = model.distill(query, prepared)
        alone = [model.distill([level[row : row + 1] for level in query], prepared) for row in range(3)]
        hidden = model.distill(query, prepared, Exclude(itself, items if levels == "joint" else None))
        for level, target in zip(free.aligned, free.teacher, strict=True):
            assert (level - target).abs().max() < 2e-3 * target.abs().max()  # itself, in half precision
        for one, other in zip(free.aligned, zip(*(result.aligned for result in alone), strict=True), strict=True):
            torch.testing.assert_close(one, torch.cat(other))
        for level, target in zip(hidden.aligned, hidden.teacher, strict=True):
            assert (level - target).square().mean() > 1e-2 * target.var()
        others = model.make_support(model.support_levels(IMAGES[1:]))
        expected = model.distill([level[:1] for level in query], others)
        for one, other in zip(hidden.aligned, expected.aligned, strict=True):
            torch.testing.assert_close(one[:1], other)
        torch.testing.assert_close(hidden.image[:1], expected.image)
        if levels == "joint":
            farther = (hidden.reconstruction[0] - hidden.teacher[1]).square().mean()
            assert farther > 1.2 * (free.reconstruction[0] - free.teacher[1]).square().mean()


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize(("direction", "size"), [("down", 4), ("same", 8), ("up", 16)])
def test_blocks_change_the_size_as_named(kind, direction, size):
    block = ResidualBlock(8, 12, kind=kind, direction=direction)
    assert block(torch.rand(2, 8, 8, 8)).shape == (2, 12, size, size)
