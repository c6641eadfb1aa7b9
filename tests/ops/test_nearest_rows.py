"""The rows of a bank that are nearest, on every backend of the CPU."""

import pytest
import torch

from bkd_fast.ops.nearest_rows import cpu, nearest_rows, prepare_rows


def rows(count, channels, bank, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    offset = 3 * torch.randn(1, channels, generator=generator)  # a mean, as features have one
    query = offset + spread * torch.randn(count, channels, generator=generator)
    return query, offset + spread * torch.randn(bank, channels, generator=generator)


def check(query, bank, nearest):
    """Every chosen row is as near as the exact choice, but for the rounding of the type."""
    index = nearest_rows(query, bank, nearest)
    assert index.shape == (len(query), nearest)
    assert all(len(set(chosen)) == nearest for chosen in index.tolist())
    distance = torch.cdist(query.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    best = distance.topk(nearest, dim=1, largest=False).values
    chosen = distance.gather(1, index)  # the nearest first
    rounding = 1e-5 if query.dtype == torch.float32 else 1e-12
    scale = query.double().square().sum(1, keepdim=True) + bank.double().square().sum(1).max()
    assert (chosen - best <= rounding * scale).all()


SIZES = [(70, 24, 300, 5), (3, 176, 2000, 5), (33, 7, 40, 1), (5, 1, 9, 9), (17, 33, 65, 64), (0, 5, 4, 2)]


@pytest.mark.parametrize(("count", "channels", "bank", "nearest"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chooses_the_nearest(count, channels, bank, nearest, dtype, each_backend):
    query, bank = rows(count, channels, bank)
    check(query.to(dtype), bank.to(dtype), nearest)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3, 0.0])
def test_rounded_products_miss_no_neighbour(rounded, spread, monkeypatch):
    """Also where all rows are so much alike that rounded products say nothing."""
    monkeypatch.setattr(cpu, "rounds", lambda bank: rounded)
    query, bank = rows(40, 64, 500, spread=spread)
    check(query, bank, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_prepared_bank_gives_the_same(dtype, each_backend):
    for count in (3, 40):  # queries that are rounded or not
        query, bank = (tensor.to(dtype) for tensor in rows(count, 24, 300))
        assert torch.equal(nearest_rows(query, prepare_rows(bank), 5), nearest_rows(query, bank, 5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"half_squares": torch.ones(3)}, ValueError, r"half_squares has shape \(3,\), expected \(4\)"),
        (
            {"half_squares": torch.ones(4).half()},
            TypeError,
            "half_squares is torch.float16, expected torch.float32",
        ),
        (
            {"rounded": torch.ones(4, 3)},
            TypeError,
            "rounded is torch.float32, expected torch.bfloat16, as",
        ),
        ({"rounded": torch.ones(4, 2).bfloat16()}, ValueError, r"rounded has shape \(4, 2\), expected \(4, 3\)"),
    ],
)
def test_what_is_not_prepared_from_the_bank_is_refused(change, error, message):
    prepared = prepare_rows(torch.ones(4, 3))._replace(**change)
    with pytest.raises(error, match=message):
        nearest_rows(torch.ones(2, 3), prepared, 2)


def test_parts_of_the_queries_give_the_same(monkeypatch):
    query, bank = rows(50, 12, 60)
    expected = nearest_rows(query, bank, 4)
    monkeypatch.setattr(cpu, "PRODUCTS", 60 * 7)
    assert torch.equal(nearest_rows(query, bank, 4), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_finite_chooses_rows_that_exist(value, each_backend):
    query, bank = rows(6, 5, 30)
    query[2, 1] = value
    index = nearest_rows(query, bank, 3)
    assert index.min() >= 0
    assert index.max() < 30
    check(query[[0, 5]], bank, 3)


def test_half_precision_is_compared_in_float32(each_backend):
    query, bank = (tensor.half() for tensor in rows(9, 20, 40))
    with torch.no_grad():
        assert torch.equal(
            nearest_rows(query, bank, 4).sort(1).values, nearest_rows(query.float(), bank.float(), 4).sort(1).values
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(2, 3, 4)}, ValueError, r"query has shape \(2, 3, 4\), expected \(R, C\)"),
        ({"bank": torch.ones(4, 5)}, ValueError, r"bank has shape \(4, 5\), expected \(M, 3\)"),
        ({"bank": torch.ones(4, 3).half()}, TypeError, "bank is torch.float16 and query is torch.float32"),
        ({"nearest": 0}, ValueError, "nearest is 0, expected an integer from 1 to 4"),
        ({"nearest": 5}, ValueError, "nearest is 5, expected an integer from 1 to 4"),
        ({"nearest": True}, ValueError, "nearest is True"),
        ({"query": []}, TypeError, "query is of type list, expected a tensor"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    arguments = {"query": torch.ones(2, 3), "bank": torch.ones(4, 3), "nearest": 2}
    with pytest.raises(error, match=message):
        nearest_rows(**{**arguments, **change})
