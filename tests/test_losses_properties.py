"""What must hold for any batch: invariances, bounds, and two ways of saying the same."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_core import sweep
from contrastive_core.losses import (
    alignment,
    info_nce,
    margin_contrastive,
    negative_cosine,
    nt_xent,
    siglip,
    sup_con,
    symmetric_info_nce,
    uniformity,
)

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
few = settings(max_examples=50)
counts = st.integers(2, 9)
temperatures = st.floats(0.05, 5)


@st.composite
def vectors(draw, *rows, sizes=counts):
    """float64 tensors `rows d`, where a row count of None is drawn once and shared by all that have it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n, d = draw(sizes), draw(st.integers(1, 6))
    scale = draw(st.sampled_from([0.1, 1.0, 3.0]))
    tensors = [scale * torch.randn(r or n, d, dtype=torch.float64, generator=generator) for r in rows]
    return tensors if len(rows) > 1 else tensors[0]


def diagonal(loss, **options):
    """As a loss of two views: each query's positive is the key in its row."""
    return lambda a, b: loss(a, b, torch.arange(len(a)), **options)


def thirds(a, b):
    """sup_con of both views in three classes."""
    return sup_con(torch.cat([a, b]), torch.arange(len(a)).repeat(2) % 3)


BY_ANGLE = {
    "nt_xent": nt_xent,
    "nt_xent, decoupled": partial(nt_xent, decoupled=True),
    "sup_con": thirds,
    "symmetric_info_nce": symmetric_info_nce,
    "negative_cosine": negative_cosine,
    "alignment": alignment,
    "uniformity": lambda a, b: uniformity(torch.cat([a, b])),
}
BY_PRODUCT = {
    "info_nce": diagonal(info_nce),
    "info_nce, decoupled": diagonal(info_nce, decoupled=True),
    "siglip": diagonal(siglip, bias=-1.0),
    "margin_contrastive": lambda a, b: margin_contrastive(a, b, torch.arange(len(a)) % 2 == 0, margin=3.0),
}
LOSSES = BY_ANGLE | BY_PRODUCT


# ---- invariances ----


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("sup_con", "margin_contrastive")])
@few
@given(views=vectors(None, None), data=st.data())
def test_the_order_of_the_images_does_not_matter(name, views, data):
    a, b = views
    order = torch.tensor(data.draw(st.permutations(range(len(a)))))
    close(LOSSES[name](a[order], b[order]), LOSSES[name](a, b))


@few
@given(views=vectors(None, None), data=st.data())
def test_rows_follow_the_order_of_the_images(views, data):
    a, b = views
    order = torch.tensor(data.draw(st.permutations(range(len(a)))))
    rows = nt_xent(a, b, reduction="none").view(2, -1)
    close(nt_xent(a[order], b[order], reduction="none").view(2, -1), rows[:, order])
    labels = torch.arange(len(a)) % 2
    close(sup_con(a[order], labels[order], reduction="none"), sup_con(a, labels, reduction="none")[order])


@few
@given(tensors=vectors(None, 7, 3), data=st.data())
def test_the_order_of_the_keys_does_not_matter(tensors, data):
    queries, keys, shared = tensors
    positive = torch.arange(len(queries)) % 7
    order = torch.tensor(data.draw(st.permutations(range(7))))
    loss = info_nce(queries, keys, positive, shared_keys=shared, reduction="none")
    close(info_nce(queries, keys[order], order.argsort()[positive], shared_keys=shared.flip(0), reduction="none"), loss)


@pytest.mark.parametrize("name", BY_ANGLE)
@few
@given(views=vectors(None, None), factors=st.lists(st.floats(1e-3, 1e3), min_size=9, max_size=9))
def test_lengths_do_not_matter_where_angles_are_compared(name, views, factors):
    a, b = views
    lengths = torch.tensor(factors, dtype=torch.float64)[: len(a), None]
    close(BY_ANGLE[name](a * lengths, b / lengths), BY_ANGLE[name](a, b))


@few
@given(views=vectors(None, None), temperature=temperatures)
def test_the_gradient_turns_a_vector_and_does_not_stretch_it(views, temperature):
    a, b = (view.requires_grad_() for view in views)
    for loss in (nt_xent, symmetric_info_nce):
        for view, gradient in zip(
            (a, b), torch.autograd.grad(loss(a, b, temperature=temperature), (a, b)), strict=True
        ):
            close((view * gradient).sum(1), torch.zeros(len(view), dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
@few
@given(views=vectors(None, None), seed=st.integers(0, 2**32))
def test_turning_all_vectors_alike_changes_nothing(name, views, seed):
    a, b = views
    d = a.shape[1]
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    close(LOSSES[name](a @ turn, b @ turn), LOSSES[name](a, b))


@pytest.mark.parametrize("name", ["nt_xent", "nt_xent, decoupled", "symmetric_info_nce", "alignment", "uniformity"])
@few
@given(views=vectors(None, None))
def test_the_views_may_be_swapped(name, views):
    a, b = views
    close(LOSSES[name](b, a), LOSSES[name](a, b))


@few
@given(views=vectors(None, None))
def test_swapping_the_views_swaps_the_rows(views):
    a, b = views
    first, second = nt_xent(a, b, reduction="none").view(2, -1)
    close(nt_xent(b, a, reduction="none"), torch.cat([second, first]))


@few
@given(tensors=vectors(None, 7, 1))
def test_moving_all_keys_alike_changes_nothing(tensors):
    """All of a query's scores move by the same number. So the keys' gradients sum to zero."""
    queries, keys, step = tensors
    positive = torch.arange(len(queries)) % 7
    keys.requires_grad_()
    loss = info_nce(queries, keys, positive)
    close(info_nce(queries, keys + step, positive), loss)
    (gradient,) = torch.autograd.grad(loss, keys)
    close(gradient.sum(0), torch.zeros(keys.shape[1], dtype=torch.float64))


# ---- bounds ----


@few
@given(tensors=vectors(None, 7, 3), temperature=temperatures)
def test_info_nce_lies_between_zero_and_its_upper_bound(tensors, temperature):
    """0 <= L_i <= log m + (the highest score - the positive's): at most log m for a positive scored best.

    The mutual information's bound is I >= log m - E[L] (van den Oord et al. 2018, section 2.3): an estimate is never
    above log m, and it is below 0 only where positives are scored lower than others.
    """
    queries, keys, shared = tensors
    positive = torch.arange(len(queries)) % 7
    rows = info_nce(queries, keys, positive, shared_keys=shared, temperature=temperature, reduction="none")
    scores = queries @ torch.cat([keys, shared]).T / temperature
    behind = scores.amax(1) - scores.gather(1, positive[:, None]).squeeze(1)
    rounding = 1e-13 * (1 + scores.abs().amax(1))
    assert (rows >= 0).all()
    assert (rows >= behind - rounding).all()
    assert (rows <= math.log(7 + 3) + behind + rounding).all()


@few
@given(tensors=vectors(None, None))
def test_nothing_known_of_the_positive_costs_log_m_at_least(tensors):
    """Averaged over all keys as the positive, whatever the scores: where I = 0 the bound's estimate is not above 0."""
    queries, keys = tensors
    m = len(keys)
    for reduction, bound in (("mean", math.log(m)), ("sum", m * m * math.log(m))):
        everyone = queries.repeat_interleave(m, 0), keys, torch.arange(m).repeat(len(queries))
        assert info_nce(*everyone, reduction=reduction) >= bound - 1e-9 * m * m


@few
@given(views=vectors(None, None), temperature=temperatures)
def test_losses_of_cosines_lie_within_their_bounds(views, temperature):
    a, b = views
    n = len(a)
    assert 0 <= nt_xent(a, b, temperature=temperature) <= math.log(2 * n - 1) + 2 / temperature
    assert 0 <= symmetric_info_nce(a, b, temperature=temperature) <= math.log(n) + 2 / temperature
    assert nt_xent(a, a, temperature=temperature) <= math.log(2 * n - 1) + 1e-12  # no score is above the positive's
    assert -1 - 1e-12 <= negative_cosine(a, b) <= 1 + 1e-12
    assert 0 <= alignment(a, b) <= 4 + 1e-12
    assert -8 - 1e-12 <= uniformity(a) <= 1e-12
    assert siglip(a, b, torch.arange(n)) >= 0


@few
@given(views=vectors(None, None), temperature=temperatures)
def test_alignment_is_twice_the_cosine_s_distance(views, temperature):
    a, b = views
    close(alignment(a, b), 2 + 2 * negative_cosine(a, b))


@few
@given(tensors=vectors(None, 5, 3), temperature=temperatures)
def test_decoupled_is_less(tensors, temperature):
    """By log P(negative): L = log(1 + exp(L_decoupled))."""
    queries, keys, shared = tensors
    arguments = queries, keys, torch.arange(len(queries)) % 5
    options = {"shared_keys": shared, "temperature": temperature, "reduction": "none"}
    rows, decoupled = (info_nce(*arguments, decoupled=flag, **options) for flag in (False, True))
    assert (decoupled <= rows).all()
    close(torch.nn.functional.softplus(decoupled, threshold=700), rows)


# ---- the same said twice ----


@few
@given(tensors=vectors(None, 6, 1), decoupled=st.booleans())
def test_another_key_raises_every_loss(tensors, decoupled):
    """By log(1 + its share of the others' sum)."""
    queries, keys, extra = tensors
    positive = torch.arange(len(queries)) % 6
    loss = partial(info_nce, positive=positive, decoupled=decoupled, reduction="none")
    before, after = loss(queries, keys), loss(queries, torch.cat([keys, extra]))
    others = (queries @ keys.T).double()
    if decoupled:
        others = others.scatter(1, positive[:, None], -torch.inf)
    close(after - before, torch.log1p((queries @ extra.T).squeeze(1).sub(others.logsumexp(1)).exp()))
    close(loss(queries, keys, shared_keys=extra), after)


@few
@given(tensors=vectors(None, 8, 2), data=st.data())
def test_a_mask_is_a_deletion_of_keys(tensors, data):
    """A query at a time, values and gradients: a key left out weighs nothing."""
    queries, keys, shared = tensors
    n = len(queries)
    positive = torch.arange(n) % 8
    bits = data.draw(st.lists(st.booleans(), min_size=8 * n, max_size=8 * n))
    mask = torch.tensor(bits).view(n, 8)
    mask[torch.arange(n), positive] = True
    queries.requires_grad_()
    keys.requires_grad_()
    rows = info_nce(queries, keys, positive, shared_keys=shared, mask=mask, reduction="none")
    deleted = [
        info_nce(queries[i : i + 1], keys[mask[i]], mask[i, : positive[i]].sum()[None], shared_keys=shared)
        for i in range(n)
    ]
    close(rows, torch.stack(deleted))
    ours, theirs = (torch.autograd.grad(value, (queries, keys)) for value in (rows.sum(), sum(deleted)))
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])


@few
@given(tensors=vectors(None, 5, 4))
def test_shared_keys_are_keys_of_which_none_is_a_positive(tensors):
    queries, keys, shared = tensors
    positive = torch.arange(len(queries)) % 5
    close(info_nce(queries, keys, positive, shared_keys=shared), info_nce(queries, torch.cat([keys, shared]), positive))


@few
@given(views=vectors(None, None), temperature=temperatures)
def test_nt_xent_is_info_nce_with_each_view_masked_out_for_itself(views, temperature):
    z = torch.cat([view / view.norm(dim=1, keepdim=True) for view in views])
    partner, others = torch.arange(len(z)).roll(len(z) // 2), ~torch.eye(len(z), dtype=torch.bool)
    for decoupled in (False, True):
        loss = info_nce(z, z, partner, mask=others, temperature=temperature, decoupled=decoupled, reduction="none")
        close(nt_xent(*views, temperature=temperature, decoupled=decoupled, reduction="none"), loss)


@settings(max_examples=60)
@given(
    views=vectors(None, None, sizes=st.integers(1, 40)),
    block=st.integers(1, 200),
    side=st.sampled_from([2, 4, 6, 10, 32]),
    temperature=st.sampled_from([1.0, 0.1, 0.002]),
    reduction=st.sampled_from(["mean", "none"]),
)
def test_the_size_of_blocks_does_not_matter(views, block, side, temperature, reduction):
    a, b = (view.requires_grad_() for view in views)

    def everything():
        options = {"temperature": temperature, "reduction": reduction}
        for loss in (nt_xent(a, b, **options), symmetric_info_nce(a, b, **options), diagonal(siglip)(a, b)):
            yield loss.detach()
            yield from torch.autograd.grad(loss.sum(), (a, b))

    whole = list(everything())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sweep.BLOCK, "cpu", block)
        patch.setattr(sweep, "SIDE", side)
        for part, expected in zip(everything(), whole, strict=True):
            close(part, expected)
