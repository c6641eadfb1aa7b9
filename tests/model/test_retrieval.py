import pytest
import torch

from bkd_fast.model.lifting import lifted
from bkd_fast.model.retrieval import describe, make_pool, nearest, regression_weights, retrieve


def images(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *shape, generator=generator) for shape in ((5, 16, 12), (7, 8, 6))]


def test_the_closest_images_are_found_and_never_the_query_itself():
    pool = make_pool(images(9, 0))
    query = describe(images(9, 0)[-1].half().float())
    assert nearest(query, pool, 1).flatten().tolist() == list(range(9))
    exclude = torch.arange(9)
    found = nearest(query, pool, 100, exclude)
    assert found.shape == (9, 8)
    assert not (found == exclude.unsqueeze(1)).any()
    distance = torch.cdist(query, pool.descriptors)
    distance.fill_diagonal_(torch.inf)
    assert torch.equal(found[:, 0], distance.argmin(1))


@pytest.mark.parametrize("ridge", [0.01, 0.3, 10.0])
def test_weights_are_those_of_least_squares(ridge):
    """Against a solver: the minimum of |q - sum w s|^2 + ridge |w|^2 scale, weights of sum one."""
    generator = torch.Generator().manual_seed(0)
    query, shots = torch.randn(4, 30, generator=generator), torch.randn(4, 6, 30, generator=generator)
    found = regression_weights(query, shots, ridge)
    apart = (shots - query.unsqueeze(1)).double()
    gram = apart @ apart.transpose(1, 2)
    gram = gram + ridge * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(6)
    exact = torch.linalg.solve(gram, torch.ones(4, 6, 1, dtype=torch.float64)).squeeze(2)
    torch.testing.assert_close(found.double(), exact / exact.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_equal_shots_have_finite_weights():
    query = torch.randn(2, 10)
    shots = query.unsqueeze(1).expand(-1, 5, -1)
    torch.testing.assert_close(regression_weights(query, shots, 0.3), torch.full((2, 5), 0.2))


def test_support_is_combined_or_kept_apart():
    levels, pool = images(3, 1), make_pool(images(9, 0))
    chosen = nearest(describe(levels[-1]), pool, 4)
    apart = retrieve(levels[-1], pool, 4, None)
    combined = retrieve(levels[-1], pool, 4, 0.3)
    weights = regression_weights(describe(levels[-1]), pool.descriptors[chosen], 0.3)
    for level, (shots, one) in enumerate(zip(apart, combined, strict=True)):
        torch.testing.assert_close(shots, images(9, 0)[level][chosen].half().float())
        torch.testing.assert_close(one[:, 0], torch.einsum("nk,nkchw->nchw", weights, shots), rtol=1e-4, atol=1e-5)


def test_lifted_cosines_are_distances_of_short_features_and_cosines_of_long_ones():
    query, other = torch.randn(2, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    assert lifted([query], 0.0)[0] is query

    def distance(scale: float) -> torch.Tensor:
        pair = lifted([scale * query, scale * other], 4.0)
        return 1 - torch.cosine_similarity(*pair)

    short = 1e-3
    squared = (short * (query - other)).square().sum(1) / (2 * 4.0 * 8)
    torch.testing.assert_close(distance(short), squared, rtol=1e-2, atol=1e-12)
    torch.testing.assert_close(distance(1e6), 1 - torch.cosine_similarity(query, other))
