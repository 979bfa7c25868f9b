"""The sweeps: blocks of any size give what one block gives, and nothing of the size of all scores is ever made."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from test_losses import close, dense_info_nce, dense_nt_xent, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_core import sweep
from contrastive_core.losses import info_nce, normalize, nt_xent, siglip, sup_con, symmetric_info_nce, uniformity
from contrastive_core.sweep import Pairs, row_blocks, row_sweep, sigmoid_sweep, symmetric_sweep

N, M, D, K = 70, 90, 4, 7
POSITIVE = torch.arange(N).roll(13)
MASK = torch.rand(N, M, generator=torch.Generator().manual_seed(1)) < 0.3
MASK[torch.arange(N), POSITIVE] = True

LOSSES = {
    "info_nce": lambda q, k, own, shared, reduction: info_nce(q, k, POSITIVE, reduction=reduction),
    "info_nce, decoupled": lambda q, k, own, shared, reduction: info_nce(
        q, k, POSITIVE, decoupled=True, reduction=reduction
    ),
    "info_nce, masked, shared keys": lambda q, k, own, shared, reduction: info_nce(
        q, k, POSITIVE, shared_keys=shared, mask=MASK, reduction=reduction
    ),
    "info_nce, mask as a function": lambda q, k, own, shared, reduction: info_nce(
        q, k, POSITIVE, shared_keys=shared, mask=lambda rows, cols: MASK[rows, cols], reduction=reduction
    ),
    "info_nce, own keys": lambda q, k, own, shared, reduction: info_nce(
        q, k, own, shared_keys=shared, mask=MASK, reduction=reduction
    ),
    "info_nce, own keys and a queue": lambda q, k, own, shared, reduction: info_nce(
        q, None, own, shared_keys=k, reduction=reduction
    ),
    "nt_xent": lambda q, k, own, shared, reduction: nt_xent(q, own, reduction=reduction),
    "nt_xent, decoupled": lambda q, k, own, shared, reduction: nt_xent(q, own, decoupled=True, reduction=reduction),
    "nt_xent, cold": lambda q, k, own, shared, reduction: nt_xent(q, own, temperature=0.002, reduction=reduction),
    "sup_con": lambda q, k, own, shared, reduction: sup_con(k, POSITIVE.repeat(2)[:M] % 9, reduction=reduction),
    "symmetric_info_nce": lambda q, k, own, shared, reduction: symmetric_info_nce(q, own, reduction=reduction),
    "siglip": lambda q, k, own, shared, reduction: siglip(q, k, POSITIVE, bias=-2.0, reduction=reduction),
    "uniformity": lambda q, k, own, shared, reduction: uniformity(k),
}  # fmt: skip


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, D, dtype=dtype, generator=generator).requires_grad_() for rows in (N, M, N, K)]


def value_and_gradients(name, reduction):
    inputs = tensors()
    value = LOSSES[name](*inputs, reduction)
    weights = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view_as(value)
    return value.detach(), torch.autograd.grad((value * weights).sum(), inputs, allow_unused=True)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setitem(sweep.BLOCK, "cpu", 64)
    monkeypatch.setattr(sweep, "SIDE", 16)
    assert [block.stop - block.start for block in row_blocks(N, M, "cpu")] == [23, 23, 24]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_many_blocks_are_one_block(name, reduction, request):
    whole, whole_gradients = value_and_gradients(name, reduction)
    request.getfixturevalue("small_blocks")
    value, parts = value_and_gradients(name, reduction)
    close(value, whole)
    for part, gradient in zip(parts, whole_gradients, strict=True):
        assert (part is None) == (gradient is None)
        if part is not None:
            close(part, gradient)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 65, 97, 1000])
@pytest.mark.parametrize("m", [0, 1, 50, 10**7])
@pytest.mark.parametrize("block", [1, 64, 2**22])
def test_blocks_of_rows_cover_each_row_once(monkeypatch, n, m, block):
    monkeypatch.setitem(sweep.BLOCK, "cpu", block)
    blocks = list(row_blocks(n, m, "cpu"))
    assert [row for rows in blocks for row in range(rows.start, rows.stop)] == list(range(n))
    sizes = [rows.stop - rows.start for rows in blocks]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 32 or max(sizes) * m <= block


def test_a_mask_is_asked_for_each_row_once_and_for_its_own_columns(small_blocks):
    asked = []

    def mask(rows, cols):
        asked.append((rows, cols))
        return MASK[rows, cols]

    queries, keys, _, shared = tensors()
    info_nce(queries, keys, POSITIVE, shared_keys=shared, mask=mask)
    assert [row for rows, _ in asked for row in range(rows.start, rows.stop)] == list(range(N))
    assert {(cols.start, cols.stop) for _, cols in asked} == {(0, M)}


# ---- the sweeps themselves ----


def test_a_decoupled_row_without_negatives_has_the_gradient_of_its_positive_alone():
    query, key = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    pairs = Pairs(torch.tensor([0]), decoupled=True)
    losses, (d_query, d_key, _) = row_sweep(query, key, None, pairs=pairs, weights=5.0, needs=(True, True, False))
    assert losses == -math.inf
    close(d_query, -5 * key)
    close(d_key, -5 * query)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("side", [2, 4, 6, 100])
@pytest.mark.parametrize("images", range(1, 11))
def test_symmetric_sweep_is_row_sweep_is_dense(monkeypatch, images, side, decoupled):
    decoupled = decoupled and images > 1  # one image has no negatives
    monkeypatch.setattr(sweep, "SIDE", side)
    n, temperature = 2 * images, 0.3
    generator = torch.Generator().manual_seed(images)
    views = normalize(torch.randn(n, 3, dtype=torch.float64, generator=generator)) * temperature**-0.5
    weights = 0.5 + torch.rand(n, dtype=torch.float64, generator=generator)
    itself = torch.arange(n)
    pairs = Pairs(itself.view(-1, 2).flip(1).flatten(), itself, decoupled=decoupled)

    losses, (gradient,) = symmetric_sweep(views, decoupled=decoupled, weights=weights, needs=(True,))
    by_rows, (d_queries, d_keys, d_own) = row_sweep(
        views, views, None, pairs=pairs, weights=weights, needs=(True, True, False)
    )
    leaf = views.clone().requires_grad_()
    dense = dense_info_nce(leaf, leaf, pairs.positive, mask=~torch.eye(n, dtype=torch.bool), decoupled=decoupled)
    (expected,) = torch.autograd.grad((dense * weights).sum(), leaf)
    close(losses, dense)
    close(by_rows, dense)
    close(gradient, expected)
    close(d_queries + d_keys, expected)
    assert d_own is None


def test_a_sweep_gives_only_what_is_needed():
    queries, keys = (torch.randn(rows, 3) for rows in (4, 5))
    pairs, weights, bias = Pairs(torch.arange(4)), torch.ones(4), torch.zeros(())
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        _, found = row_sweep(queries, keys, torch.zeros(4), pairs=Pairs(), weights=weights, needs=needs)
        assert tuple(part is not None for part in found) == needs
        _, found = sigmoid_sweep(queries, keys, bias, positive=torch.arange(4), weights=weights, needs=needs)
        assert tuple(part is not None for part in found) == needs
    assert row_sweep(queries, keys, None, pairs=pairs)[1] == (None, None, None)
    assert row_sweep(queries, keys, None, pairs=pairs, needs=(True, True, True))[1] == (None, None, None)
    assert symmetric_sweep(queries)[1] == (None,)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_to_nt_xent_agree_where_they_meet(dtype, reduction):
    """Above SAFE_SCORE the symmetric sweep's plain exponentials would overflow, and rows take over."""
    edge = 1 / sweep.SAFE_SCORE[dtype]
    z1, z2 = (normalize(torch.randn(9, 4, dtype=torch.float64)).requires_grad_() for _ in range(2))
    found = []
    for temperature in (edge * (1 + 1e-6), edge * (1 - 1e-6)):
        value = nt_xent(z1.to(dtype), z2.to(dtype), temperature=temperature, reduction=reduction).double()
        expected = dense_nt_xent(z1.to(dtype).double(), z2.to(dtype).double(), temperature)
        torch.testing.assert_close(value, expected.mean() if reduction == "mean" else expected, rtol=1e-4, atol=1e-5)
        found.append(gradients(value, (z1, z2)))
    for above, below in zip(*found, strict=True):
        torch.testing.assert_close(above, below, rtol=1e-3, atol=1e-4)


def test_nt_xent_by_rows_is_nt_xent(monkeypatch):
    """The path of several processes and of a temperature that is learned on a GPU."""
    a, _, b, _ = tensors()
    symmetric = [nt_xent(a, b, decoupled=decoupled) for decoupled in (False, True)]
    monkeypatch.setitem(sweep.SAFE_SCORE, torch.float64, 0.0)
    for decoupled, expected in zip((False, True), symmetric, strict=True):
        value = nt_xent(a, b, decoupled=decoupled)
        close(value, expected)
        for ours, theirs in zip(gradients(value, (a, b)), gradients(expected, (a, b)), strict=True):
            close(ours, theirs)


def test_at_the_size_of_real_blocks():
    """More views than SIDE, in float32, against the dense loss in float64."""
    z1, z2 = torch.randn(2, 1100, 8, generator=torch.Generator().manual_seed(0))
    z1.requires_grad_()
    value = nt_xent(z1, z2, temperature=0.2)
    (gradient,) = torch.autograd.grad(value, z1)
    leaf = z1.detach().double().requires_grad_()
    dense = dense_nt_xent(leaf, z2.double(), 0.2).mean()
    (expected,) = torch.autograd.grad(dense, leaf)
    assert 2 * len(z1) > 2 * sweep.SIDE
    assert float(value.detach()) == pytest.approx(float(dense.detach()), rel=1e-6)
    assert float((gradient.double() - expected).norm() / expected.norm()) < 1e-5


# ---- memory ----


class LargestResult(TorchDispatchMode):
    """The most elements that any operation's result keeps in memory."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                size = result.untyped_storage().nbytes() // result.element_size()
                self.elements = max(self.elements, size)
        return results


def largest_and_kept(loss, *inputs):
    """The largest result of forward and backward, and all elements that the graph keeps between them."""
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t)
    with LargestResult() as largest:
        with hooks:
            value = loss(*inputs).sum()
        value.backward()
    return largest.elements, sum(kept)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "sup_con", "symmetric_info_nce", "siglip", "uniformity"])
def test_the_matrix_of_scores_is_never_made(small_blocks, name, reduction):
    n, d = 192, 2
    a, b = (torch.randn(n, d).requires_grad_() for _ in range(2))
    pairs, classes = torch.arange(n), torch.arange(n) % 5
    loss, scores = {
        "info_nce": (partial(info_nce, positive=pairs, reduction=reduction), n * n),
        "nt_xent": (partial(nt_xent, reduction=reduction), 4 * n * n),
        "sup_con": (lambda a, b: sup_con(a + b, classes, reduction=reduction), n * n),
        "symmetric_info_nce": (partial(symmetric_info_nce, reduction=reduction), n * n),
        "siglip": (partial(siglip, positive=pairs, reduction=reduction), n * n),
        "uniformity": (lambda a, b: uniformity(a + b), n * n),
    }[name]
    largest, kept = largest_and_kept(loss, a, b)
    assert largest <= 32 * n  # a block
    assert kept <= 16 * n * d + 16 * n
    assert max(largest, kept) < scores / 4


def test_the_measure_of_memory_would_notice():
    a, b = (torch.randn(192, 2).requires_grad_() for _ in range(2))
    largest, kept = largest_and_kept(lambda a, b: dense_info_nce(a, b, torch.arange(192)), a, b)
    assert largest >= 192**2
    assert kept >= 192**2


# ---- torch.compile ----


def compiled_cases():
    positive = torch.arange(12)
    return {
        "nt_xent": lambda a, b: nt_xent(a, b, temperature=0.2),
        "nt_xent, cold": lambda a, b: nt_xent(a, b, temperature=0.01),
        "nt_xent, learned temperature": lambda a, b: nt_xent(a, b, temperature=(a * b).mean().exp()),
        "nt_xent, rows": lambda a, b: nt_xent(a, b, temperature=0.2, reduction="none"),
        "info_nce": lambda a, b: info_nce(a, b, positive),
        "info_nce, rows": lambda a, b: info_nce(a, b, positive, reduction="none"),
    }


def compare_compiled(name, **options):
    loss = compiled_cases()[name]
    torch.compiler.reset()
    compiled = torch.compile(loss, **options)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(12, 5, generator=generator).requires_grad_() for _ in range(2)]
    for scale in (1.0, 0.5):  # the second call reuses what the first compiled
        scaled = [(tensor.detach() * scale).requires_grad_() for tensor in inputs]
        value, expected = compiled(*scaled), loss(*scaled)
        torch.testing.assert_close(value, expected)
        for ours, theirs in zip(gradients(value, scaled), gradients(expected, scaled), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", compiled_cases())
def test_compiled_is_the_same(name, fullgraph):
    compare_compiled(name, backend="aot_eager", fullgraph=fullgraph)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own look at a tensor between graphs
def test_compiled_with_more_rows_than_a_block_is_the_same(monkeypatch):
    """The sweep is left out of the graph then."""
    monkeypatch.setattr(sweep, "SIDE", 8)
    compare_compiled("nt_xent", backend="aot_eager")
    compare_compiled("info_nce", backend="aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning")  # inductor's own call
@pytest.mark.parametrize("name", compiled_cases())
def test_compiled_by_inductor_is_the_same(name):
    compare_compiled(name, backend="inductor")


# ---- what a row without a usable score gives ----


def test_an_empty_sum_is_minus_infinity():
    """decoupled rows without a negative: log of an empty sum, and a gradient without NaN."""
    queries, keys = torch.ones(2, 3), torch.ones(1, 3)
    pairs = Pairs(torch.zeros(2, dtype=torch.long), decoupled=True)
    losses, (d_queries, d_keys, _) = row_sweep(
        queries, keys, None, pairs=pairs, weights=torch.ones(2), needs=(True, True, False)
    )
    assert losses.tolist() == [-math.inf, -math.inf]
    assert d_queries.isfinite().all()
    assert d_keys.isfinite().all()
