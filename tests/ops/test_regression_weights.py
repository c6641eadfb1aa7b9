import neighbor_cases
import pytest
import torch

from bkd_fast.ops.neighbor_regression.reference import regression_weights


@pytest.mark.parametrize("ridge", [0.01, 0.3, 10.0])
@pytest.mark.parametrize(("count", "wide"), [(1, 30), (2, 3), (5, 30), (5, 3), (16, 200)])
def test_weights_are_those_of_least_squares(ridge, count, wide):
    """Also where the neighbours are more than their dimensions, so that without a ridge nothing is unique."""
    generator = torch.Generator().manual_seed(0)
    query, neighbors = torch.randn(4, wide, generator=generator), torch.randn(4, count, wide, generator=generator)
    weights = regression_weights(query, neighbors, ridge)
    torch.testing.assert_close(
        weights.double(), neighbor_cases.exact_weights(query, neighbors, ridge), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(weights.sum(1), torch.ones(4))


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_the_size_of_features_does_not_matter(size):
    generator = torch.Generator().manual_seed(0)
    query, neighbors = torch.randn(4, 30, generator=generator), torch.randn(4, 5, 30, generator=generator)
    weights = regression_weights(size * query, size * neighbors)
    torch.testing.assert_close(weights, regression_weights(query, neighbors), rtol=1e-3, atol=1e-5)


def test_other_weights_are_no_better():
    """What is minimised, written out, grows in every direction that keeps the sum."""
    generator = torch.Generator().manual_seed(1)
    query, neighbors = torch.randn(1, 20, generator=generator), torch.randn(1, 5, 20, generator=generator)
    scale = (neighbors - query.unsqueeze(1)).square().sum(2).mean()

    def cost(weights: torch.Tensor) -> torch.Tensor:
        combined = (weights.unsqueeze(2) * neighbors).sum(1)
        return (query - combined).square().sum() + 0.3 * scale * weights.square().sum()

    best = regression_weights(query, neighbors, 0.3)
    for _ in range(20):
        step = torch.randn(1, 5, generator=generator)
        assert cost(best + 0.05 * (step - step.mean())) > cost(best)


def test_equal_neighbors_count_the_same_and_a_perfect_one_most():
    query = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    same = query.unsqueeze(1).expand(-1, 5, -1)
    torch.testing.assert_close(regression_weights(query, same), torch.full((2, 5), 0.2))
    mixed = torch.cat(
        [query.unsqueeze(1), same[:, 1:] + torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(1))], 1
    )
    weights = regression_weights(query, mixed)
    assert torch.isfinite(weights).all()
    assert (weights.argmax(1) == 0).all()
