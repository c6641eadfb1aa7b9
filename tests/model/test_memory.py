import pytest
import torch

from bkd_fast.config import MemoryConfig
from bkd_fast.model.memory import SparseMemory


def memory(**changes) -> SparseMemory:
    torch.manual_seed(0)
    made = SparseMemory(6, MemoryConfig(**{"items": 40, "neighbors": 5, **changes}))
    torch.nn.init.normal_(made.items)
    return made


FEATURES = torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(1))


def brute_force(features: torch.Tensor, items: torch.Tensor, count: int) -> torch.Tensor:
    """Feature by feature in float64: the nearest items, and a least-squares problem with a ridge, solved by QR."""
    found = torch.empty_like(features, dtype=torch.float64)
    for n, y, x in torch.cartesian_prod(*(torch.arange(features.shape[axis]) for axis in (0, 2, 3))):
        query, rows = features[n, :, y, x].double(), items.double()
        nearest = rows[(rows - query).norm(dim=1).argsort()[:count]]
        apart = nearest - query
        ridge = (0.3 * apart.square().sum(1).mean()).sqrt()
        # Weights of sum one: all but the first are free, and the first is what they leave of one.
        free = torch.cat([(apart[1:] - apart[0]).T, ridge * torch.eye(count - 1), -ridge * torch.ones(1, count - 1)])
        goal = torch.cat([-apart[0], torch.zeros(count - 1), -ridge.view(1)])
        rest = torch.linalg.lstsq(free, goal.unsqueeze(1)).solution.squeeze(1)
        weights = torch.cat([1 - rest.sum().view(1), rest])
        found[n, :, y, x] = weights @ nearest
    return found


@pytest.mark.parametrize("count", [2, 5])
def test_a_feature_becomes_the_best_combination_of_its_nearest_items(count):
    own = memory(neighbors=count)
    with torch.no_grad():
        found = own(FEATURES)
    torch.testing.assert_close(found.double(), brute_force(FEATURES, own.items.detach(), count), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"read": "attention", "temperature": 0.3, "threshold": 0.8}])
def test_attention_is_what_the_memory_reads_with(changes):
    own = memory(**changes)
    with torch.no_grad():
        weights = own.attention(FEATURES)
        assert weights.shape == (2, 3, 5, 40)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
        torch.testing.assert_close((weights @ own.items).permute(0, 3, 1, 2), own(FEATURES))
    if not changes:
        assert ((weights != 0).sum(-1) == 5).all()


def test_an_item_is_read_as_itself():
    own = memory(neighbors=1)
    with torch.no_grad():
        features = own.items[:15].T.reshape(1, 6, 3, 5)
        torch.testing.assert_close(own(features), features)


def test_fewer_items_than_neighbors_are_all_read():
    own = memory(items=3)
    with torch.no_grad():
        assert ((own.attention(FEATURES) != 0).sum(-1) == 3).all()


def test_excluded_items_are_not_read():
    own = memory()
    exclude = torch.zeros(2, 40, dtype=torch.bool)
    exclude[0, ::2], exclude[1, :30] = True, True
    with torch.no_grad():
        found = own(FEATURES, exclude)
        for row in range(2):
            rest = memory()
            rest.items = torch.nn.Parameter(own.items[~exclude[row]])
            torch.testing.assert_close(found[row], rest(FEATURES[row : row + 1])[0])
        torch.testing.assert_close(own(FEATURES, torch.zeros_like(exclude)), own(FEATURES))


def test_items_learn_where_they_are_read():
    own = memory(learned=True)
    own(FEATURES).square().sum().backward()
    read = (own.attention(FEATURES) != 0).flatten(0, 2).any(0)
    assert torch.equal(own.items.grad.abs().sum(1) > 0, read)


def written(own):
    with torch.no_grad():
        own.items[3] += 1


def loaded(own):
    own.load_state_dict({name: value + 1 for name, value in own.state_dict().items()})


def assigned(own):
    own.load_state_dict({name: value + 1 for name, value in own.state_dict().items()}, assign=True)


def replaced(own):
    own.items = torch.nn.Parameter(own.items.detach() + 1)


def moved(own):
    own.double().float()
    own.items.data += 1


@pytest.mark.parametrize("change", [written, loaded, assigned, replaced, moved, SparseMemory.train])
def test_what_is_prepared_keeps_every_bit_until_items_change(change):
    own = memory()
    features = torch.randn(1, 6, 9, 5, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = own.eval()(features)
        own.prepare()
        assert own.prepared is not None
        assert torch.equal(own(features), expected)
        assert own.prepared is not None  # reading changes nothing
    change(own)
    fresh = memory()
    fresh.load_state_dict(own.state_dict())
    with torch.no_grad():
        assert torch.equal(own(features), fresh(features))
        assert own.prepared is None


def test_attention_has_nothing_to_prepare():
    own = memory(read="attention")
    own.prepare()
    assert own.prepared is None
