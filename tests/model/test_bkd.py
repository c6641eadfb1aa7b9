import copy

import pytest
import torch
import torch.nn.functional as F

from bkd_fast.config import BKDConfig
from bkd_fast.errors import BKDError
from bkd_fast.model import BKD
from bkd_fast.model.blocks import ResidualBlock
from bkd_fast.model.calibration import balance_maps, calibrate, choose_pool, greedy_coreset
from bkd_fast.model.lifting import lifted


def small(**changes) -> BKDConfig:
    values = {"teacher": "resnet18", "weights": "none", "image_size": (64, 64), "memory_items": 12, "shots": 2}
    return BKDConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def model() -> BKD:
    torch.manual_seed(0)
    model = BKD(small())
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
    model = BKD(BKDConfig.preset("rd4ad", teacher="wide_resnet50_2", weights="none"))
    assert parameters(model.bottleneck) == pytest.approx(58.89, abs=0.01)
    assert parameters(model.student) == pytest.approx(24.92, abs=0.01)


@pytest.mark.parametrize("size", [(64, 64), (72, 88), (33, 47)])
@pytest.mark.parametrize("teacher", ["resnet18", "tf_efficientnet_lite0"])
def test_any_image_size(size, teacher):
    model = BKD(small(teacher=teacher, image_size=size)).eval()
    with torch.no_grad():
        result = model(torch.rand(2, 3, *size), torch.rand(2, 3, *size))
        for outputs, count in ((result.aligned, 2), (result.student, 3)):
            assert [level.shape for level in outputs] == [level.shape for level in result.teacher[-count:]]
        assert model.anomaly_map(result, size).shape == (2, *size)


@pytest.mark.parametrize("preset", ["default", "paper", "rd4ad"])
def test_a_training_step_reaches_every_parameter(preset):
    torch.manual_seed(0)
    config = BKDConfig.preset(preset, teacher="resnet18", weights="none", image_size=(64, 64))
    model = BKD(config).train()
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    support = SUPPORT.expand(3, -1, -1, -1, -1) if config.support_draw == "query" else SUPPORT
    for _ in range(3):  # zero-initialised heads pass gradients on from the second step
        optimizer.zero_grad()
        model.losses(model(IMAGES, support))["total"].backward()
        optimizer.step()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent, silent
    assert all(p.grad is None for p in model.teacher.parameters())


def test_losses_are_equations_11_and_12(model):
    with torch.no_grad():
        result = model(IMAGES, SUPPORT)
        losses = model.losses(result)
    for branch, outputs in (("forward", result.aligned), ("reverse", result.student)):
        expected = torch.zeros(())
        pairs = zip(
            *(lifted(levels, model.config.lift) for levels in (result.teacher[-len(outputs) :], outputs)), strict=True
        )
        for teacher, output in pairs:
            direction = (1 - F.cosine_similarity(teacher.flatten(1), output.flatten(1))).mean()
            expected = expected + direction + model.config.value_weight * F.mse_loss(output, teacher)
        torch.testing.assert_close(losses[branch], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["total"], losses["forward"] + losses["reverse"])


def test_a_fixed_support_is_prepared_once(model):
    with torch.no_grad():
        prepared = model.prepare(model.support_levels(SUPPORT))
        first = model.distill(model.teacher(IMAGES), prepared)
        second = model(IMAGES, SUPPORT)
    for one, two in zip(first.aligned, second.aligned, strict=True):
        torch.testing.assert_close(one, two)


def test_a_support_per_query_is_refused_where_queries_choose(model):
    with pytest.raises(BKDError, match="choose from one set of images"):
        model(IMAGES, SUPPORT.expand(3, -1, -1, -1, -1))


def test_each_image_is_judged_by_itself(model):
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


def test_calibration_standardizes_channels_and_fills_the_memory():
    torch.manual_seed(0)
    model = BKD(small()).eval()
    images = torch.rand(12, 3, 64, 64)
    calibrate(model, map(model.teacher.raw, images.split(5)), 12, torch.Generator().manual_seed(0))
    for level, features in enumerate(model.teacher(images)):
        deviation = features.std((0, 2, 3), unbiased=False)
        alive = getattr(model.teacher, f"deviation_{level + 1}").flatten() != 1
        assert features.mean((0, 2, 3)).abs().max() < 1e-2
        torch.testing.assert_close(deviation[alive], torch.ones(int(alive.sum())), atol=1e-2, rtol=0)
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)
        nearest = torch.cdist(model.memories[level].items.detach(), rows).min(1).values
        assert nearest.max() < 1e-2 * rows.norm(dim=1).mean()


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
    assert set(choose_pool(levels.split(3), 3)) >= {1, 6}
    assert choose_pool([levels], 100) == list(range(8))


def test_balanced_maps_lie_around_one_and_count_by_precision(model):
    copied = copy.deepcopy(model)
    with torch.no_grad():
        prepared = copied.prepare(copied.support_levels(SUPPORT))
        balance_maps(copied, IMAGES.split(2), prepared)
        for branch in copied.branches():
            own = copied.anomaly_map(copied.distill(copied.teacher(IMAGES), prepared), (64, 64), [branch])
            assert 0.8 < own.log().mean().exp() < 1.25
        forward, reverse = (copied.map_exponent[branch] for branch in ("forward", "reverse"))
        assert (len(forward), len(reverse)) == (2, 3)
        assert reverse[0] == pytest.approx(sum(reverse[1:]) / 2)
        assert torch.tensor(forward) + torch.tensor(reverse[1:]) == pytest.approx([1.0, 1.0])
        # The farther away a branch is, the less it counts.
        again = copy.deepcopy(copied)
        original = again.distill

        def farther(*arguments):
            result = original(*arguments)
            return result._replace(aligned=[4 * torch.randn_like(level) for level in result.aligned])

        again.distill = farther
        balance_maps(again, IMAGES.split(2), prepared)
        assert all(new < old for new, old in zip(again.map_exponent["forward"], forward, strict=True))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize(("direction", "size"), [("down", 4), ("same", 8), ("up", 16)])
def test_blocks_change_the_size_as_named(kind, direction, size):
    block = ResidualBlock(8, 12, kind=kind, direction=direction)
    assert block(torch.rand(2, 8, 8, 8)).shape == (2, 12, size, size)
