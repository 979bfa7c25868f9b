import math

import pytest
import torch

from contrastive_core.losses import info_nce
from contrastive_core.metrics import contrast_accuracy, feature_std

torch.manual_seed(0)


def double_loop(queries, keys, positive, temperature):
    """Equation 4 of van den Oord et al. 2018, a query and a key at a time."""
    total = 0.0
    for query, own in zip(queries, positive, strict=True):
        scores = [math.exp(float(query @ key) / temperature) for key in keys]
        total -= math.log(scores[own] / sum(scores))
    return total / len(queries)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (3, 5, 2), (7, 4, 8)])
@pytest.mark.parametrize("temperature", [0.5, 10.0])
def test_against_a_double_loop(n, m, d, temperature):
    queries, keys = torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    positive = torch.randint(m, (n,))
    expected = double_loop(queries, keys, positive, temperature)
    assert float(info_nce(queries, keys, positive, temperature=temperature)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("m", [1, 8, 100])
def test_identical_keys_give_log_m(m):
    loss = info_nce(torch.randn(3, 4), torch.ones(m, 4), torch.zeros(3, dtype=torch.long))
    assert float(loss) == pytest.approx(math.log(m), abs=1e-5)


def test_reductions_agree():
    queries, keys, positive = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    rows = info_nce(queries, keys, positive, reduction="none")
    assert rows.shape == (6,)
    torch.testing.assert_close(info_nce(queries, keys, positive), rows.mean())
    torch.testing.assert_close(info_nce(queries, keys, positive, reduction="sum"), rows.sum())


def test_permuting_the_keys_changes_nothing():
    queries, keys, positive = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    order = torch.randperm(9)
    torch.testing.assert_close(
        info_nce(queries, keys[order], order.argsort()[positive]), info_nce(queries, keys, positive)
    )


def test_gradients():
    queries = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    positive = torch.tensor([0, 4, 4])
    assert torch.autograd.gradcheck(
        lambda q, k, t: info_nce(q, k, positive, temperature=t), (queries, keys, temperature)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_float32(dtype):
    queries, keys, positive = torch.randn(8, 16) * 4, torch.randn(16, 16) * 4, torch.arange(8)
    halves = queries.to(dtype), keys.to(dtype)
    exact = info_nce(halves[0].double(), halves[1].double(), positive, temperature=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(*halves, positive, temperature=0.05)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)
    assert info_nce(queries.to(dtype) * 0, keys.to(dtype), positive).isfinite()


@pytest.mark.parametrize(
    ("queries", "keys", "positive", "words"),
    [
        ((3, 4), (5, 6), (3,), r"queries have shape \(3, 4\) and keys \(5, 6\)"),
        ((3, 4, 1), (5, 4), (3,), "pass n d and m d with the same d"),
        ((3, 4), (5, 4), (2,), "one integer index into keys for each of the 3 queries"),
        ((3, 4), (5, 4), (3, 1), "one integer index into keys"),
    ],
)
def test_wrong_shapes_are_named(queries, keys, positive, words):
    with pytest.raises(ValueError, match=words):
        info_nce(torch.zeros(queries), torch.zeros(keys), torch.zeros(positive, dtype=torch.long))


def test_other_wrong_arguments_are_named():
    queries = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"dtype torch\.float32"):
        info_nce(queries, queries, torch.zeros(2))
    with pytest.raises(ValueError, match='reduction=\'max\': pass "mean", "sum" or "none"'):
        info_nce(queries, queries, torch.arange(2), reduction="max")


def test_contrast_accuracy_counts_only_clear_wins():
    eye = torch.eye(4)
    assert contrast_accuracy(eye, eye, torch.arange(4)) == 1
    assert contrast_accuracy(eye, eye, torch.tensor([0, 1, 3, 2])) == 0.5
    assert contrast_accuracy(torch.ones(3, 4), torch.ones(5, 4), torch.arange(3)) == 0  # ties
    many = torch.eye(1000)
    half = torch.arange(1000)
    half[500:] = 0
    assert contrast_accuracy(many, many, half, limit=100) == pytest.approx(0.5, abs=0.02)


def test_feature_std():
    assert feature_std(torch.ones(10, 4)) == 0
    assert feature_std(torch.zeros(10, 4)) == 0
    assert float(feature_std(torch.randn(4000, 64))) == pytest.approx(1 / 8, rel=0.02)


def test_contrast_accuracy_is_not_rounded_under_autocast():
    """Scores that differ by a thousandth tie in bf16, and a tie is a miss."""
    queries = torch.ones(8, 4)
    keys = torch.full((8, 4), 10.0)
    keys[3] += 0.01
    with torch.autocast("cpu", torch.bfloat16):
        assert contrast_accuracy(queries, keys, torch.full((8,), 3)) == 1
