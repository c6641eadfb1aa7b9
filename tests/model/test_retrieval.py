import pytest
import torch

from bkd_fast.model.support import describe, make_bank, matched, nearest, residual, shrink
from bkd_fast.ops.neighbor_regression.reference import regression_weights

SHAPES = ((5, 16, 12), (7, 8, 6))


def images(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *shape, generator=generator).half().float() for shape in SHAPES]


def pool_of(views: list[torch.Tensor]):
    return make_bank(views, describe(views[-1]))


def test_the_closest_images_are_found_in_order():
    pool = pool_of(images(9, 0))
    query = describe(images(9, 0)[-1])
    assert nearest(query, pool, 1).flatten().tolist() == list(range(9))
    other = describe(images(4, 1)[-1])
    expected = torch.cdist(other.double(), pool.descriptors.double()).argsort(1)
    assert torch.equal(nearest(other, pool, 4), expected[:, :4])
    assert torch.equal(nearest(other, pool, 100), expected)  # as many as there are


def test_excluded_images_are_never_chosen():
    """Every query gets as many as the one has that may choose fewest."""
    pool = pool_of(images(9, 0))
    query = describe(images(9, 0)[-1])
    exclude = torch.eye(9, dtype=torch.bool)
    exclude[3, :4] = True
    found = nearest(query, pool, 100, exclude)
    assert found.shape == (9, 5)
    assert not exclude.gather(1, found).any()
    distance = torch.cdist(query.double(), pool.descriptors.double()).masked_fill(exclude, torch.inf)
    assert torch.equal(found, distance.argsort(1)[:, :5])


def test_descriptors_of_what_was_shrunk_are_the_same():
    level = images(3, 0)[-1]
    torch.testing.assert_close(describe(shrink(level)), describe(level))


def test_whole_images_are_compared_with_the_best_combination_of_their_shots():
    pool = pool_of(images(9, 0))
    query = describe(images(3, 1)[-1])
    chosen = nearest(query, pool, 4)
    expected = []
    for row, shots in zip(query.double(), pool.descriptors.double()[chosen], strict=True):
        apart = shots - row
        gram = apart @ apart.T
        gram = gram + 0.3 * gram.diagonal().mean() * torch.eye(4, dtype=torch.float64)
        weights = torch.linalg.solve(gram, torch.ones(4, dtype=torch.float64))
        expected.append((row - weights @ shots / weights.sum()).square().mean())
    torch.testing.assert_close(residual(query, pool, chosen)[0].double(), torch.stack(expected), rtol=1e-4, atol=1e-6)
    # An image of the bank is at no distance from itself.
    assert residual(pool.descriptors, pool, nearest(pool.descriptors, pool, 1))[0].max() < 1e-10


def brute_force(query: torch.Tensor, bank: torch.Tensor, chosen: torch.Tensor, radius: int, count: int) -> torch.Tensor:
    """Pixel by pixel: of every shot the closest feature in the window, of these the ``count`` closest, combined."""
    found = torch.empty_like(query)
    height, width = query.shape[2:]
    for n in range(len(query)):
        for y in range(height):
            for x in range(width):
                own = query[n, :, y, x]
                rows, columns = slice(max(y - radius, 0), y + radius + 1), slice(max(x - radius, 0), x + radius + 1)
                best = []
                for shot in chosen[n].tolist():
                    window = bank[shot, :, rows, columns].flatten(1).T
                    best.append(window[(window - own).square().sum(1).argmin()])
                shots = torch.stack(best)
                shots = shots[(shots - own).square().sum(1).argsort()[:count]]
                found[n, :, y, x] = (regression_weights(own[None], shots[None]) @ shots)[0] if count > 1 else shots[0]
    return found


@pytest.mark.parametrize(("radius", "count"), [(0, 1), (1, 1), (1, 3), (2, 5)])
def test_supports_are_matched_pixel_by_pixel(radius, count):
    """min is the closest shot alone; regression combines several."""
    bank, views = images(9, 0), images(2, 1)
    pool = pool_of(bank)
    chosen = nearest(describe(views[-1]), pool, 6)
    found = matched(views, pool, chosen, radius, count)
    for view, features, support in zip(views, bank, found, strict=True):
        torch.testing.assert_close(support, brute_force(view, features, chosen, radius, count), rtol=1e-4, atol=1e-4)


def test_more_neighbors_than_shots_are_all_shots():
    views, pool = images(2, 1), pool_of(images(9, 0))
    chosen = nearest(describe(views[-1]), pool, 2)
    for one, other in zip(matched(views, pool, chosen, 1, 5), matched(views, pool, chosen, 1, 2), strict=True):
        torch.testing.assert_close(one, other)


def test_a_part_that_lies_elsewhere_is_found():
    """A query moved by a pixel is its support again, but at the border it came from."""
    bank = images(1, 0)
    moved = [torch.roll(view, (1, -1), (2, 3)) for view in bank]
    pool = pool_of(bank)
    for view, support in zip(moved, matched(moved, pool, torch.zeros(1, 1, dtype=torch.int64), 1, 1), strict=True):
        torch.testing.assert_close(support[..., 1:, :-1], view[..., 1:, :-1])
