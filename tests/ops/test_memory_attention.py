import numpy as np
import pytest
import torch

from bkd_fast.ops import sparse_memory_attention
from bkd_fast.ops.memory_attention import reference

SETTINGS = [
    (threshold, temperature, renormalize)
    for threshold, temperature in ((0.002, 1.0), (0.1, 0.3), (0.0, 0.05))
    for renormalize in (False, True)
]


def tensors(rows=(2, 5), items=9, channels=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(*rows, channels, generator=generator, dtype=torch.float64)
    return query.to(dtype), torch.randn(items, channels, generator=generator, dtype=torch.float64).to(dtype)


def loop(query, memory, threshold, temperature, renormalize):
    """Eq. 6-10, one row at a time."""
    query, memory = query.numpy(), memory.numpy()
    result = np.zeros_like(query)
    for index in np.ndindex(*query.shape[:-1]):
        z = query[index]
        cosine = np.array([z @ m / max(np.linalg.norm(z) * np.linalg.norm(m), 1e-8) for m in memory])
        weight = np.exp(cosine / temperature)
        weight /= weight.sum()
        sparse = np.maximum(weight - threshold, 0) * weight / (np.abs(weight - threshold) + 1e-12)
        if renormalize and sparse.sum() > 0:
            sparse /= sparse.sum()
        result[index] = sparse @ memory
    return torch.from_numpy(result)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("rows", [(2, 5), (), (0,), (3, 2, 2)])
def test_equals_a_loop_over_the_equations(settings, rows):
    query, memory = tensors(rows)
    torch.testing.assert_close(sparse_memory_attention(query, memory, *settings), loop(query, memory, *settings))


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_are_derivatives(settings):
    query, memory = (value.requires_grad_() for value in tensors())
    assert torch.autograd.gradcheck(lambda q, m: sparse_memory_attention(q, m, *settings), (query, memory))


def test_rows_are_cut_into_pieces_without_a_trace(monkeypatch):
    query, memory = (value.requires_grad_() for value in tensors((23,)))
    whole = torch.autograd.grad(sparse_memory_attention(query, memory, 0.05, 0.2, True).square().sum(), (query, memory))
    monkeypatch.setattr("bkd_fast.ops.memory_attention.reference.ROWS", 5)
    pieces = torch.autograd.grad(
        sparse_memory_attention(query, memory, 0.05, 0.2, True).square().sum(), (query, memory)
    )
    for first, second in zip(whole, pieces, strict=True):
        torch.testing.assert_close(first, second)


def test_a_threshold_above_every_weight_reads_nothing():
    query, memory = (value.requires_grad_() for value in tensors())
    output = sparse_memory_attention(query, memory, 0.9, 1.0, True)
    assert not output.any()
    output.sum().backward()
    assert not query.grad.any()
    assert not query.grad.isnan().any()


def test_the_printed_threshold_prunes_nothing():
    """docs/equations.md: at temperature 1 no weight of 200 falls under 0.002, at 0.05 most do."""
    query, memory = tensors((500,), items=200, channels=64)
    assert (reference.memory_attention_weights(query, memory, 0.002, 1.0, False) > 0).all()
    kept = (reference.memory_attention_weights(query, memory, 0.002, 0.05, False) > 0).double().mean()
    assert kept < 0.5


def test_a_low_temperature_reads_the_nearest_item():
    query, memory = tensors((50,))
    nearest = torch.cosine_similarity(query.unsqueeze(1), memory.unsqueeze(0), dim=2).argmax(1)
    torch.testing.assert_close(sparse_memory_attention(query, memory, 0.002, 1e-6, True), memory[nearest])


def test_zero_vectors_are_similar_to_nothing():
    query, memory = tensors((3,))
    query[1] = 0
    output = sparse_memory_attention(query.requires_grad_(), memory, 0.0, 0.5, False)
    torch.testing.assert_close(output[1], memory.mean(0))
    output.sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_twice_as_much_as_pytorch(dtype):
    """flash-attention's rule: twice the error of the same formula in the same precision."""
    query, memory = tensors((64,), items=50, channels=32, dtype=dtype)
    exact = loop(query.double(), memory.double(), 0.002, 0.1, True)
    output = sparse_memory_attention(query, memory, 0.002, 0.1, True)
    assert output.dtype == dtype
    normal = torch.nn.functional.normalize
    weights = (normal(query, dim=1) @ normal(memory, dim=1).t() / 0.1).softmax(1)
    weights = torch.where(weights > 0.002, weights, 0)
    plain = (weights / weights.sum(1, keepdim=True)) @ memory
    assert (output.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3, 4), torch.zeros(5, 3), 0.1), r"memory has shape \(5, 3\), expected \(I, 4\)"),
        ((torch.zeros(3, 4), torch.zeros(0, 4), 0.1), "at least one item"),
        ((torch.zeros(()), torch.zeros(5, 4), 0.1), r"expected \(..., N\)"),
        ((torch.zeros(3, 4, dtype=torch.long), torch.zeros(5, 4), 0.1), "query is torch.int64"),
        ((torch.zeros(3, 4), torch.zeros(5, 4, device="meta"), 0.1), "one device"),
        ((torch.zeros(3, 4), torch.zeros(5, 4), 1.5), "threshold is 1.5, expected 0 to 1"),
        ((torch.zeros(3, 4), torch.zeros(5, 4), 0.1, 0.0), "temperature is 0.0, expected a positive number"),
    ],
)
def test_what_does_not_fit_is_named(arguments, words):
    with pytest.raises((TypeError, ValueError), match=words):
        sparse_memory_attention(*arguments)
