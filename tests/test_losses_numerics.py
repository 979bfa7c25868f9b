"""Half precision, cold temperatures, zero vectors, autocast: finite and right; NaN and infinity: never hidden.

The measure is always the dense loss in float64 on the very numbers that were passed, rounded as they are.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from test_losses import CASES, dense_info_nce, dense_nt_xent, dense_siglip, dense_sup_con, dense_symmetric
from torch import Tensor
from torch.nn import functional as F

from contrastive_core import losses
from contrastive_core.losses import (
    info_nce,
    margin_contrastive,
    negative_cosine,
    normalize,
    nt_xent,
    siglip,
    sup_con,
    symmetric_info_nce,
    uniformity,
)


def pairs(a: Tensor) -> Tensor:
    return torch.arange(len(a))


def classes(a: Tensor) -> Tensor:
    return pairs(a).repeat(2) % 3


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows)


def both(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # under bfloat16's autocast torch.cat refuses float16
        return torch.cat([a, b])


# ours and the dense one, of two views `n d` and a temperature
LOSSES = {
    "nt_xent": (lambda a, b, t: nt_xent(a, b, temperature=t), lambda a, b, t: dense_nt_xent(a, b, t).mean()),
    "nt_xent, rows": (
        lambda a, b, t: nt_xent(a, b, temperature=t, reduction="none").mean(),
        lambda a, b, t: dense_nt_xent(a, b, t).mean(),
    ),
    "info_nce": (
        lambda a, b, t: info_nce(a, b, pairs(a), temperature=t),
        lambda a, b, t: dense_info_nce(a, b, pairs(a), temperature=t).mean(),
    ),
    "info_nce by angle": (
        lambda a, b, t: info_nce(normalize(a), normalize(b), pairs(a), temperature=t),
        lambda a, b, t: dense_info_nce(unit(a), unit(b), pairs(a), temperature=t).mean(),
    ),
    "info_nce, own keys": (
        lambda a, b, t: info_nce(a, None, b, shared_keys=-b.detach(), temperature=t),
        lambda a, b, t: dense_info_nce(a, None, b, -b.detach(), temperature=t).mean(),
    ),
    "sup_con": (
        lambda a, b, t: sup_con(both(a, b), classes(a), temperature=t),
        lambda a, b, t: dense_sup_con(torch.cat([a, b]), classes(a), t).mean(),
    ),
    "symmetric_info_nce": (
        lambda a, b, t: symmetric_info_nce(a, b, temperature=t),
        lambda a, b, t: dense_symmetric(a, b, t).mean(),
    ),
    "siglip": (
        lambda a, b, t: siglip(a, b, pairs(a), temperature=t, bias=-3.0),
        lambda a, b, t: dense_siglip(a, b, pairs(a), t, -3.0).mean(),
    ),
}
UNSCALED = ("info_nce", "info_nce, own keys", "siglip")  # not normalised, so scores grow with the vectors


def draw(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, 16, generator=generator)
    if kind == "zero vector":
        a[2] = 0
    return {
        "gaussian": (a, b),
        "one image": (a[:1], b[:1]),
        "zero vector": (a, b),
        "all zero": (a * 0, b * 0),
        "identical": (torch.ones(8, 16), torch.ones(8, 16)),
        "close views": (a, a + 0.05 * b),
        "times 1e4": ((a * 1e4).clamp(-1e4, 1e4), (b * 1e4).clamp(-1e4, 1e4)),
        "times 1e-4": (a * 1e-4, b * 1e-4),
    }[kind]


KINDS = ["gaussian", "one image", "zero vector", "all zero", "identical", "close views", "times 1e4", "times 1e-4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_accurate(found: Tensor, exact: Tensor, error: float, terms: float) -> None:
    """Within `error` of the longest row, what rounding to the dtype adds, and what is left where `terms` cancel."""
    limits = torch.finfo(found.dtype)
    rounding = limits.eps * exact.abs() + 2 * limits.smallest_normal * limits.eps
    allowed = error * exact.norm(dim=-1).max() + rounding + 5e-7 * terms
    assert bool(((found.double() - exact).abs() <= allowed).all()), (found.double() - exact).abs().max()


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_finite_and_as_exact_as_float32_allows(name, kind, dtype, autocast):
    """Also with the backward inside the autocast block, where the backward's products would be rounded as well."""
    ours, dense = LOSSES[name]
    for temperature in (0.5, 0.1, 0.07, 0.01):
        a, b = (view.to(dtype).requires_grad_() for view in draw(kind))
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            value = ours(a, b, temperature)
            value.backward()
        exact_a, exact_b = (view.detach().double().requires_grad_() for view in (a, b))
        exact = dense(exact_a, exact_b, temperature)
        exact.backward()

        # a score of s is known to s * 2^-24, and a loss no better
        longest = float(exact_a.detach().norm(dim=1).max() * exact_b.detach().norm(dim=1).max())
        score = (longest if name in UNSCALED else 1.0) / temperature
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=1e-5, abs=2e-6 * max(score, 1))
        for view, exact_view in ((a, exact_a), (b, exact_b)):
            assert view.grad.dtype == dtype
            if not exact_view.grad.to(dtype).isfinite().all():
                continue  # too long for float16, and rightly infinite
            assert view.grad.isfinite().all()
            zero = (view == 0).all(1)
            if name not in UNSCALED:
                assert torch.equal(view.grad[zero], torch.zeros_like(view.grad[zero]))
                exact_view.grad[zero] = 0  # F.normalize's is 1e12 there
            if score < 1e5:  # beyond, an error of a score is no longer small beside 1
                length = exact_view.detach().norm(dim=1)
                terms = score / length[length > 0].min() if length.any() else 0.0
                assert_accurate(view.grad, exact_view.grad, 2e-5 + 1e-6 * score, float(terms))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_numbers_come_back_in_float32_or_float64(name, dtype):
    ours, _ = LOSSES[name]
    a, b = (view.to(dtype).requires_grad_() for view in draw("gaussian"))
    value = ours(a, b, 0.1)
    value.backward()
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert a.grad.dtype == b.grad.dtype == dtype


# ---- what five libraries get wrong, each in the setting where they do ----

NT_XENT_SETTINGS = [  # dtype, temperature, kind of views, autocast, tolerance
    pytest.param(torch.float32, 0.01, "gaussian", False, 2e-6, id="cold in float32: one NaN, one exception"),
    pytest.param(torch.float16, 0.07, "gaussian", False, 2e-6, id="float16 inputs: two NaN"),
    pytest.param(torch.float16, 0.5, "zero vector", False, 2e-6, id="a zero vector in float16: five NaN"),
    pytest.param(torch.bfloat16, 0.1, "close views", False, 2e-6, id="bfloat16 inputs: one negative loss"),
    pytest.param(torch.float32, 0.5, "gaussian", True, 1e-6, id="autocast: errors up to 0.0034"),
]


@pytest.mark.parametrize(("dtype", "temperature", "kind", "autocast", "tolerance"), NT_XENT_SETTINGS)
def test_nt_xent_where_other_libraries_fail(dtype, temperature, kind, autocast, tolerance):
    a, b = (view.to(dtype) for view in draw(kind))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = nt_xent(a, b, temperature=temperature)
    assert float(value) == pytest.approx(
        float(dense_nt_xent(a.double(), b.double(), temperature).mean()), rel=tolerance
    )
    assert value > 0


def test_nt_xent_of_one_image_is_zero():
    assert nt_xent(torch.randn(1, 4), torch.randn(1, 4)) == 0


def test_the_zero_vector_in_float16_is_nan_in_lightly():
    loss = pytest.importorskip("lightly.loss", reason="pip install lightly: shows what its NTXentLoss gives")
    a, b = (view.half() for view in draw("zero vector"))
    assert loss.NTXentLoss()(a, b).isnan()
    assert nt_xent(a, b, temperature=0.5).isfinite()


def test_autocast_rounds_the_loss_of_lightly():
    loss = pytest.importorskip("lightly.loss", reason="pip install lightly: shows what its NTXentLoss gives")
    a, b = draw("gaussian")
    exact = float(dense_nt_xent(a.double(), b.double(), 0.1).mean())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (float(value) for value in (loss.NTXentLoss(0.1)(a, b), nt_xent(a, b, temperature=0.1)))
    assert abs(ours - exact) < 1e-5 < 1e-4 < abs(theirs - exact)


# ---- losses that are almost zero keep their digits ----


TINY = {
    **{name: ours for name, (ours, _) in LOSSES.items()},
    "sup_con": lambda a, b, t: sup_con(torch.cat([a, b]), pairs(a).repeat(2), temperature=t),
    "siglip": lambda a, b, t: siglip(a, b, pairs(a), temperature=t / 2, bias=-1 / t),
}


@pytest.mark.parametrize("temperature", [0.05, 0.035, 0.02])
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_loss_and_its_gradient_are_right_to_their_digits(name, temperature):
    """1 - softmax would be 0, or 6e-8, where the loss is 1e-12."""
    noise = 0.01 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    a, b = (torch.eye(8) + noise).requires_grad_(), (torch.eye(8) + noise.T + 0.002).requires_grad_()
    value = TINY[name](a, b, temperature)
    value.backward()
    # the dense loss in float64 has lost its digits too: sum the small terms instead
    exact_a, exact_b = (view.detach().double().requires_grad_() for view in (a, b))
    exact = small_terms(name, exact_a, exact_b, temperature)
    exact.backward()
    assert float(exact.detach()) < 1e-5
    assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=1e-4)
    for found, expected in ((a.grad, exact_a.grad), (b.grad, exact_b.grad)):
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-4


def small_terms(name, a, b, t):
    """The loss as log1p of a sum of exp(S_ij - S_ip) in float64."""
    if name not in UNSCALED:
        a, b = unit(a), unit(b)
    if name in ("nt_xent", "nt_xent, rows", "sup_con"):
        views, n = torch.cat([a, b]), len(a)
        scores, own = views @ views.T / t, (a * b).sum(1).repeat(2) / t
        negative = ~torch.eye(n, dtype=torch.bool).repeat(2, 2)
        return torch.log1p(((scores - own[:, None]).exp() * negative).sum(1)).mean()
    own = (a * b).sum(1, keepdim=True) / t
    others = ~torch.eye(len(a), dtype=torch.bool)
    if name == "siglip":
        wrong, missed = (2 * a @ b.T / t - 1 / t).exp() * others, (1 / t - 2 * own).exp()
        return (torch.log1p(wrong).sum(1) + torch.log1p(missed)[:, 0]).mean()
    if name == "info_nce, own keys":
        return torch.log1p((-a @ b.detach().T / t - own).exp().sum(1)).mean()
    there = torch.log1p(((a @ b.T / t - own).exp() * others).sum(1))
    back = torch.log1p(((b @ a.T / t - own).exp() * others).sum(1))
    return ((there + back) / 2 if name == "symmetric_info_nce" else there).mean()


@pytest.mark.parametrize("distance", [5.0, 14.0, 40.0, 87.0, 90.0, 200.0])
def test_two_keys_far_apart(distance):
    """log(1 + exp(-x)) on paper, and x the other way round."""
    query, keys = torch.ones(1, 1), torch.tensor([[distance / 2], [-distance / 2]])
    won, lost = (info_nce(query, keys, torch.tensor([index])).item() for index in (0, 1))
    assert won == pytest.approx(math.log1p(math.exp(-distance)), rel=1e-5, abs=1e-44)
    assert lost == pytest.approx(distance, rel=1e-6, abs=math.exp(-distance) * 1.1)


@pytest.mark.parametrize("own_keys", [False, True], ids=["", "own keys"])
@pytest.mark.parametrize("score", [4e4, 4e6, 4e7])
def test_a_large_score_that_all_keys_share_costs_no_digits(score, own_keys):
    """Added to the score, log 7 is rounded away; in float32 the scores themselves are exact. Keys differ where queries
    are 0, so that there is a gradient of the queries.
    """
    index = torch.tensor([0, 5])
    queries = torch.cat([torch.full((2, 4), score / 4), torch.zeros(2, 1)], 1)
    keys = torch.cat([torch.ones(8, 4), torch.randn(8, 1, generator=torch.Generator().manual_seed(0))], 1)
    a, b = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    exact_a, exact_b = (rows.double().requires_grad_() for rows in (queries, keys))
    positive, expected = index, F.cross_entropy(exact_a @ exact_b.T, index)
    if own_keys:  # the query's own, and all of the keys beside it
        positive = b[index]
        scores = torch.cat([(exact_a * exact_b[index]).sum(1, keepdim=True), exact_a @ exact_b.T], 1)
        expected = F.cross_entropy(scores, index * 0)
    value = info_nce(a, None if own_keys else b, positive, shared_keys=b if own_keys else None)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, right in zip(torch.autograd.grad(value, (a, b)), torch.autograd.grad(expected, (exact_a, exact_b)),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6 * right.abs().max().item())


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_is_negative(name):
    ours, _ = LOSSES[name]
    for kind in KINDS:
        a, b = draw(kind)
        for first, second in ((a, b), (a, a), (torch.eye(8), torch.eye(8))):
            assert ours(first, second, 0.03) >= 0


def test_sup_con_of_two_equal_views_is_not_negative():
    views = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    assert sup_con(views, torch.arange(8).repeat(2), temperature=0.03, reduction="none").min() >= 0


def test_uniformity_of_close_features_keeps_its_digits():
    """On collapse it nears 0 from below: log of a mean near 1."""
    features = torch.ones(6, 4, dtype=torch.float64)
    features += 0.01 * torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, found = float(uniformity(features)), float(uniformity(features.float()))
    assert exact < 0
    assert found == pytest.approx(exact, abs=2e-6)


# ---- norms ----


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_a_zero_row_stays_zero_with_a_zero_gradient(dtype):
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]], dtype=dtype, requires_grad=True)
    unit_rows = normalize(rows)
    (unit_rows * torch.tensor([[1.0, 0.0]])).sum().backward()
    assert unit_rows.dtype == torch.promote_types(dtype, torch.float32)
    expected = torch.tensor([[0.6, 0.8], [0, 0], [-5 / 13, 12 / 13]], dtype=unit_rows.dtype)
    torch.testing.assert_close(unit_rows.detach(), expected)
    # d/dx of x / |x|: y^2 / |x|^3 and -x y / |x|^3
    gradient = torch.tensor([[16 / 125, -12 / 125], [0, 0], [144 / 2197, 60 / 2197]], dtype=dtype)
    torch.testing.assert_close(rows.grad, gradient)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-19, 1e-4, 1e4, 1e18, 1e20, 1e30])
def test_the_length_of_a_vector_does_not_matter(size):
    """Squares of float32 numbers beyond 1e19 overflow, and below 1e-23 vanish; the vectors are finite and not zero."""
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalize(rows * size), normalize(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_with_nan_or_infinity_has_a_nan(value):
    rows = torch.randn(3, 4)
    rows[1, 2] = value
    assert normalize(rows)[1].isnan().any()  # so every product with it is NaN
    assert normalize(rows)[[0, 2]].isfinite().all()


# ---- NaN in, NaN out; infinity shows in the loss or, where the loss has a limit, in a gradient ----

# (the case, the tensor's place): where infinity has a finite answer and slope, which are the limits
FINITE_LIMIT = {("margin_contrastive", 0), ("margin_contrastive", 1)}  # others are far enough apart: 0
FINITE_LIMIT |= {("exponential_contrastive", 0), ("exponential_contrastive", 1)}
FINITE_LIMIT |= {("distillation", 1)}  # a teacher's -inf: this class has no probability


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", CASES)
def test_one_bad_number_anywhere_shows(name, value):
    case = CASES[name]
    hidden = []
    for seed in range(3):
        for place, tensor in enumerate(case.tensors(seed, needs=())):
            if not math.isnan(value) and (tensor.ndim == 0 or (name, place) in FINITE_LIMIT):
                continue
            for entry in range(tensor.numel()):
                tensors = [t.float() for t in case.tensors(seed, needs=())]
                tensors[place].view(-1)[entry] = value
                tensors = [t.requires_grad_() for t in tensors]
                result = case.loss(*tensors, reduction="mean")
                shows = not result.isfinite()
                if not shows and not math.isnan(value):
                    gradients = torch.autograd.grad(result, tensors, allow_unused=True)
                    shows = not all(g is None or g.isfinite().all() for g in gradients)
                if not shows:
                    hidden.append((seed, place, entry, result.item()))
    assert not hidden, f"(seed, tensor, entry, loss): {hidden}"


HIDING = {  # an infinite score that a plain sum of exponentials would take for a clear win, or for nothing
    "the positive's score is inf, the others' -inf": ([[math.inf]], [[1.0], [-1.0]], 0),
    "the positive's score is inf, the others' finite": ([[1.0, 0.0]], [[math.inf, 1.0], [1.0, 1.0]], 0),
    "a negative's score is -inf": ([[1.0]], [[1.0], [-math.inf]], 0),
    "all scores are -inf": ([[-math.inf]], [[1.0], [1.0]], 0),
    "the positive's score is -inf": ([[1.0]], [[-math.inf], [1.0]], 0),
    "a negative's score is inf": ([[1.0]], [[1.0], [math.inf]], 0),
}


def shows(loss, *tensors):
    tensors = [tensor.requires_grad_() for tensor in tensors]
    result = loss(*tensors)
    return not all(t.isfinite().all() for t in (result, *torch.autograd.grad(result, tensors)))


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_positive_of_infinite_score_gives_nan_as_cross_entropy_does(decoupled):
    """Its limit would be 0, the best loss there is, for a network that has blown up."""
    query, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.inf, 1.0], [1.0, 1.0]])
    assert info_nce(query, keys, torch.tensor([0]), decoupled=decoupled).isnan()
    assert info_nce(query, None, keys[:1], shared_keys=keys[1:], decoupled=decoupled).isnan()


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("setting", HIDING)
def test_info_nce_does_not_hide_infinity(setting, decoupled):
    query, keys, positive = HIDING[setting]
    query, keys, positive = torch.tensor(query), torch.tensor(keys), torch.tensor([positive])
    own, others = keys[positive].clone(), keys[1:].clone()
    assert shows(lambda q, k: info_nce(q, k, positive, decoupled=decoupled), query, keys)
    assert shows(lambda q, o: info_nce(q, None, o, shared_keys=others, decoupled=decoupled), query, own)


@pytest.mark.parametrize("setting", HIDING)
def test_siglip_does_not_hide_infinity(setting):
    query, keys, positive = HIDING[setting]
    assert shows(lambda q, k: siglip(q, k, torch.tensor([positive])), torch.tensor(query), torch.tensor(keys))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_temperatures_and_biases_show(value):
    a, b = draw("gaussian")
    bad = torch.tensor(value)
    assert not siglip(a, b, pairs(a), bias=bad).isfinite()
    if math.isnan(value):
        assert nt_xent(a, b, temperature=bad).isnan()
        assert info_nce(a, b, pairs(a), temperature=bad).isnan()
        assert sup_con(a, pairs(a) % 3, temperature=bad).isnan()
        assert siglip(a, b, pairs(a), temperature=bad).isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_reaches_the_gradient(name):
    """So that an optimizer, or a scaler of float16's gradients, can skip the step."""
    ours, _ = LOSSES[name]
    a, b = draw("gaussian")
    a[3, 4] = math.nan
    a.requires_grad_()
    ours(a, b, 0.1).backward()
    assert a.grad.isnan().any()


def test_losses_without_negatives_are_finite_where_vectors_coincide():
    a = torch.randn(3, 4, requires_grad=True)
    same = torch.tensor([True, False, True])
    for value in (
        negative_cosine(a, a.detach()),
        losses.alignment(a, a.detach()),
        losses.alignment(a, a.detach(), alpha=1.0),
        margin_contrastive(a, a.detach(), same),
        losses.exponential_contrastive(a, a.detach(), same, bound=4.0),
    ):
        (gradient,) = torch.autograd.grad(value, a)
        assert value.isfinite()
        assert gradient.isfinite().all()
