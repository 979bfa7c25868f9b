"""Every loss against a double loop over Python floats, and its gradient against autograd of a dense float64 version."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_core import losses, sweep
from contrastive_core.losses import (
    InfoNCELoss,
    NTXentLoss,
    SigmoidLoss,
    Temperature,
    alignment,
    cosine_info_nce,
    distillation,
    exponential_contrastive,
    info_nce,
    margin_contrastive,
    negative_cosine,
    normalize,
    nt_xent,
    siglip,
    sup_con,
    symmetric_info_nce,
    two_view_info_nce,
    uniformity,
)

Vector = Sequence[float]


# ---- the definitions, one pair at a time, in Python's floats ----


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def unit(a: Vector) -> Vector:
    norm = math.sqrt(dot(a, a))
    return [x / norm for x in a] if norm else a


def units(rows: Tensor) -> list[Vector]:
    return [unit(row) for row in rows.tolist()]


def contrast(own: float, negatives: Vector, decoupled: bool = False) -> float:
    """-log( exp(own) / sum of exp ), the sum with the positive or, decoupled, without it."""
    scores = [*negatives] if decoupled else [own, *negatives]
    top = max(scores)
    return math.log(math.fsum(math.exp(score - top) for score in scores)) + top - own


def loop_info_nce(queries, keys, positive, shared=None, temperature=1.0, mask=None, decoupled=False):
    keys = [] if keys is None else keys.tolist()
    for i, query in enumerate(queries.tolist()):
        own = None if positive.ndim == 2 else int(positive[i])
        match = positive[i].tolist() if own is None else keys[own]
        negatives = [key for j, key in enumerate(keys) if j != own and (mask is None or mask[i, j])]
        negatives += [] if shared is None else shared.tolist()
        scores = [dot(query, key) / float(temperature) for key in negatives]
        yield contrast(dot(query, match) / float(temperature), scores, decoupled)


def loop_nt_xent(z1, z2, temperature, decoupled=False):
    views, n = units(torch.cat([z1, z2])), len(z1)
    for i, view in enumerate(views):
        other = (i + n) % (2 * n)
        scores = [dot(view, key) / float(temperature) for key in views]
        yield contrast(scores[other], [s for j, s in enumerate(scores) if j not in (i, other)], decoupled)


def loop_sup_con(views, labels, temperature):
    views, labels = units(views), labels.tolist()
    for i, view in enumerate(views):
        scores = [dot(view, key) / float(temperature) for key in views]
        positives = [j for j, label in enumerate(labels) if label == labels[i] and j != i]
        parts = [contrast(scores[p], [s for j, s in enumerate(scores) if j not in (i, p)]) for p in positives]
        yield math.fsum(parts) / len(parts) if parts else 0.0


def loop_symmetric(a, b, temperature):
    pairs = torch.arange(len(a))
    a, b = (torch.tensor(units(rows), dtype=torch.float64) for rows in (a, b))
    there, back = (loop_info_nce(x, y, pairs, temperature=temperature) for x, y in ((a, b), (b, a)))
    yield from ((x + y) / 2 for x, y in zip(there, back, strict=True))


def loop_siglip(queries, keys, positive, temperature, bias):
    for query, own in zip(queries.tolist(), positive.tolist(), strict=True):
        logits = [dot(query, key) / float(temperature) + float(bias) for key in keys.tolist()]
        yield math.fsum(math.log1p(math.exp(-s if j == own else s)) for j, s in enumerate(logits))


def loop_uniformity(features, t):
    rows = units(features)
    pairs = [(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
    squares = [math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in pairs]
    yield math.log(math.fsum(math.exp(-t * square) for square in squares) / len(pairs))


def loop_alignment(z1, z2, alpha):
    distances = [math.dist(x, y) ** alpha for x, y in zip(units(z1), units(z2), strict=True)]
    yield math.fsum(distances) / len(distances)


def loop_margin(z1, z2, same, margin):
    for x, y, alike in zip(z1.tolist(), z2.tolist(), same.tolist(), strict=True):
        distance = math.dist(x, y)
        yield distance**2 / 2 if alike else max(0.0, margin - distance) ** 2 / 2


def loop_exponential(z1, z2, same, bound):
    for x, y, alike in zip(z1.tolist(), z2.tolist(), same.tolist(), strict=True):
        energy = math.fsum(abs(a - b) for a, b in zip(x, y, strict=True))
        yield 2 / bound * energy**2 if alike else 2 * bound * math.exp(-2.77 * energy / bound)


def loop_distillation(student, teacher, temperature):
    for taught, logits in zip(teacher.tolist(), student.tolist(), strict=True):
        expected = [math.exp(-contrast(s / temperature, [o / temperature for o in taught], True)) for s in taught]
        surprise = [contrast(s / temperature, [o / temperature for o in logits], True) for s in logits]
        yield dot(expected, surprise)


# ---- the same with all scores at once, for autograd ----


def dense_info_nce(queries, keys, positive, shared=None, temperature=1.0, mask=None, decoupled=False):
    keys = queries.new_empty(0, queries.shape[1]) if keys is None else keys
    scores = queries @ keys.T / temperature
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if shared is not None:
        scores = torch.cat([scores, queries @ shared.T / temperature], 1)
    if positive.ndim == 2:
        scores = torch.cat([(queries * positive).sum(1, keepdim=True) / temperature, scores], 1)
        positive = torch.zeros(len(queries), dtype=torch.long)
    if not decoupled:
        return F.cross_entropy(scores, positive, reduction="none")
    others = scores.scatter(1, positive[:, None], -torch.inf)
    return others.logsumexp(1) - scores.gather(1, positive[:, None]).squeeze(1)


def dense_nt_xent(z1, z2, temperature, decoupled=False):
    views, n = F.normalize(torch.cat([z1, z2])), len(z1)
    others = ~torch.eye(2 * n, dtype=torch.bool)
    partner = torch.arange(2 * n).roll(n)
    return dense_info_nce(views, views, partner, temperature=temperature, mask=others, decoupled=decoupled)


def dense_sup_con(views, labels, temperature):
    views = F.normalize(views)
    itself = torch.eye(len(views), dtype=torch.bool)
    log_p = (views @ views.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positives = (labels[:, None] == labels) & ~itself
    return -torch.where(positives, log_p, 0).sum(1) / positives.sum(1).clamp(min=1)


def dense_symmetric(a, b, temperature):
    scores, pairs = F.normalize(a) @ F.normalize(b).T / temperature, torch.arange(len(a))
    return sum(F.cross_entropy(s, pairs, reduction="none") for s in (scores, scores.T)) / 2


def dense_siglip(queries, keys, positive, temperature, bias):
    signs = 2 * F.one_hot(positive, len(keys)) - 1
    return -F.logsigmoid(signs * (queries @ keys.T / temperature + bias)).sum(1)


def dense_uniformity(features, t):
    return torch.pdist(F.normalize(features)).square().mul(-t).exp().mean().log()


def dense_alignment(z1, z2, alpha):
    return (F.normalize(z1) - F.normalize(z2)).norm(dim=1).pow(alpha).mean()


def dense_margin(z1, z2, same, margin):
    distance = (z1 - z2).norm(dim=1)
    return torch.where(same, distance.square(), (margin - distance).relu().square()) / 2


def dense_exponential(z1, z2, same, bound):
    energy = (z1 - z2).abs().sum(1)
    return torch.where(same, 2 / bound * energy**2, 2 * bound * torch.exp(-2.77 / bound * energy))


def dense_distillation(student, teacher, temperature):
    return F.cross_entropy(student / temperature, (teacher / temperature).softmax(1).detach(), reduction="none")


# ---- one table of cases, which the other files of losses use too ----


@dataclass(frozen=True)
class Case:
    """A loss with all but its differentiable tensors fixed, and two other ways to its rows.

    loss(*tensors, reduction=...) is ours; rows(*tensors) the dense one; loop(*tensors) the double loop. A shape of
    () draws a number in 0.3..1.3: a temperature or a bias. Losses without a `reduction` give one row.
    """

    loss: Callable[..., Tensor]
    rows: Callable[..., Tensor]
    loop: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    reductions: tuple[str, ...] = ("mean", "sum", "none")
    mean: Callable[[Tensor], Tensor] = Tensor.mean
    constant: tuple[int, ...] = ()  # tensors that never get a gradient

    def tensors(self, seed: int = 0, needs: Sequence[int] | None = None) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            torch.randn(shape, dtype=torch.float64, generator=generator)
            if shape
            else 0.3 + torch.rand((), dtype=torch.float64, generator=generator)
            for shape in self.shapes
        ]
        needed = self.differentiable if needs is None else needs
        return [tensor.requires_grad_(i in needed) for i, tensor in enumerate(drawn)]

    @property
    def differentiable(self) -> list[int]:
        return [i for i in range(len(self.shapes)) if i not in self.constant]

    def reduced(self, rows: Tensor, reduction: str) -> Tensor:
        return {"mean": self.mean, "sum": Tensor.sum}.get(reduction, lambda rows: rows)(rows)


N, M, D, K = 4, 6, 3, 5
POSITIVE = torch.tensor([5, 0, 2, 2])  # in no order, and one key twice
ALLOWED = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
LABELS = torch.tensor([3, 0, 3, 7, 0, 3])  # three positives, two, one, and an anchor (7) without any
SAME = torch.tensor([True, False, False, True])


def info_nce_case(kind: str, shared: bool, mask: str | None, decoupled: bool) -> Case:
    """kind: where the positive is: an "index" into keys, an "own" key beside them, "alone" = own and no keys."""
    passed = {None: None, "tensor": ALLOWED, "function": lambda rows, cols: ALLOWED[rows, cols]}[mask]

    def ours(*tensors, reduction):
        return call(partial(info_nce, mask=passed, reduction=reduction), "shared_keys", *tensors)

    def call(loss, shared_name, queries, temperature, *others):
        others = list(others)
        keys = None if kind == "alone" else others.pop(0)
        positive = POSITIVE if kind == "index" else others.pop(0)
        more = {shared_name: others.pop(0)} if shared else {}
        return loss(queries, keys, positive, temperature=temperature, decoupled=decoupled, **more)

    allowed = ALLOWED if mask else None
    shapes = (N, D), (), *[(M, D)] * (kind != "alone"), *[(N, D)] * (kind != "index"), *[(K, D)] * shared
    return Case(
        ours, partial(call, partial(dense_info_nce, mask=allowed), "shared"),
        partial(call, partial(loop_info_nce, mask=allowed), "shared"), shapes,
    )  # fmt: skip


INFO_NCE = {
    f"info_nce: {kind}{', shared keys' * shared}{f', mask as a {mask}' if mask else ''}{', decoupled' * decoupled}": (
        info_nce_case(kind, shared, mask, decoupled)
    )
    for kind, shared, mask, decoupled in product(
        ["index", "own", "alone"], [False, True], [None, "tensor", "function"], [False, True]
    )
    if kind != "alone" or (shared and mask is None)
}

CASES = INFO_NCE | {
    "nt_xent": Case(
        lambda a, b, t, reduction: nt_xent(a, b, temperature=t, reduction=reduction),
        dense_nt_xent,
        loop_nt_xent,
        ((N, D), (N, D), ()),
    ),
    "nt_xent, decoupled": Case(
        lambda a, b, t, reduction: nt_xent(a, b, temperature=t, decoupled=True, reduction=reduction),
        partial(dense_nt_xent, decoupled=True),
        partial(loop_nt_xent, decoupled=True),
        ((N, D), (N, D), ()),
    ),
    "sup_con": Case(
        lambda views, t, reduction: sup_con(views, LABELS, temperature=t, reduction=reduction),
        lambda views, t: dense_sup_con(views, LABELS, t),
        lambda views, t: loop_sup_con(views, LABELS, t),
        ((6, D), ()),
        mean=lambda rows: rows.sum() / 5,  # of the anchors that have a positive
    ),
    "symmetric_info_nce": Case(
        lambda a, b, t, reduction: symmetric_info_nce(a, b, temperature=t, reduction=reduction),
        dense_symmetric,
        loop_symmetric,
        ((N, D), (N, D), ()),
    ),
    "siglip": Case(
        lambda q, k, t, bias, reduction: siglip(q, k, POSITIVE, temperature=t, bias=-bias, reduction=reduction),
        lambda q, k, t, bias: dense_siglip(q, k, POSITIVE, t, -bias),
        lambda q, k, t, bias: loop_siglip(q, k, POSITIVE, t, -bias),
        ((N, D), (M, D), (), ()),
    ),
    "negative_cosine": Case(
        negative_cosine,
        lambda a, b: -F.cosine_similarity(a, b),
        lambda a, b: (-dot(x, y) for x, y in zip(units(a), units(b), strict=True)),
        ((N, D), (N, D)),
    ),
    **{
        f"alignment, alpha={alpha}": Case(
            lambda a, b, reduction, alpha=alpha: alignment(a, b, alpha=alpha),
            partial(dense_alignment, alpha=alpha),
            partial(loop_alignment, alpha=alpha),
            ((N, D), (N, D)),
            ("mean",),
        )
        for alpha in (1.0, 2.0, 3.0)
    },
    **{
        f"uniformity, t={t}": Case(
            lambda features, reduction, t=t: uniformity(features, t=t),
            partial(dense_uniformity, t=t),
            partial(loop_uniformity, t=t),
            ((5, D),),
            ("mean",),
        )
        for t in (2.0, 0.5)
    },
    "margin_contrastive": Case(
        lambda a, b, reduction: margin_contrastive(a, b, SAME, margin=3.0, reduction=reduction),
        lambda a, b: dense_margin(a, b, SAME, 3.0),
        lambda a, b: loop_margin(a, b, SAME, 3.0),
        ((N, D), (N, D)),
    ),
    "exponential_contrastive": Case(
        lambda a, b, reduction: exponential_contrastive(a, b, SAME, bound=5.0, reduction=reduction),
        lambda a, b: dense_exponential(a, b, SAME, 5.0),
        lambda a, b: loop_exponential(a, b, SAME, 5.0),
        ((N, D), (N, D)),
    ),
    "distillation": Case(
        lambda s, t, reduction: distillation(s, t, temperature=0.5, reduction=reduction),
        partial(dense_distillation, temperature=0.5),
        partial(loop_distillation, temperature=0.5),
        ((N, D), (N, D)),
        constant=(1,),
    ),
}
REDUCED = [(name, reduction) for name, case in CASES.items() for reduction in case.reductions]

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def gradients(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of a weighted sum of all entries, so that rows cannot cancel or swap unnoticed."""
    weights = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view_as(value)
    needed = [tensor for tensor in tensors if tensor.requires_grad]
    return list(torch.autograd.grad((value * weights).sum(), needed))


# ---- values and gradients ----


@pytest.mark.parametrize("name", CASES)
def test_against_a_double_loop(name):
    case = CASES[name]
    for seed in range(3):
        tensors = case.tensors(seed, needs=())
        expected = torch.tensor(list(case.loop(*tensors)), dtype=torch.float64)
        value = case.loss(*tensors, reduction=case.reductions[-1])
        close(value, expected if case.reductions[-1] == "none" else expected.squeeze())
        assert value.dtype == torch.float64


@pytest.mark.parametrize(("name", "reduction"), REDUCED)
def test_value_and_gradient_are_those_of_the_dense_loss(name, reduction):
    case = CASES[name]
    tensors = case.tensors()
    expected = case.reduced(case.rows(*tensors), reduction)
    value = case.loss(*tensors, reduction=reduction)
    close(value, expected)
    for ours, theirs in zip(gradients(value, tensors), gradients(expected, tensors), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(("name", "reduction"), REDUCED)
def test_gradcheck(name, reduction):
    """Everything learned at once, then each tensor alone: queries without keys, keys without queries, the bias ..."""
    case = CASES[name]
    for needs in {tuple(case.differentiable), *((i,) for i in case.differentiable)}:
        assert torch.autograd.gradcheck(partial(case.loss, reduction=reduction), case.tensors(needs=needs))


@pytest.mark.parametrize("name", CASES)
def test_nothing_learned_keeps_no_graph(name):
    case = CASES[name]
    assert not case.loss(*case.tensors(needs=()), reduction="mean").requires_grad
    with torch.no_grad():
        assert not case.loss(*case.tensors(), reduction="mean").requires_grad


def test_the_teacher_gets_no_gradient():
    student, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    distillation(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["info_nce: index", "nt_xent", "sup_con", "symmetric_info_nce", "siglip"])
def test_a_graph_serves_two_backwards_and_sums(name, reduction):
    """Gradients kept in the graph are neither used up nor changed by a backward, and a factor scales them."""
    case = CASES[name]
    tensors = case.tensors()
    value = case.loss(*tensors, reduction=reduction).sum()
    first = torch.autograd.grad(value, tensors, retain_graph=True)
    second = torch.autograd.grad(value * 3 + value, tensors)
    for once, fourfold in zip(first, second, strict=True):
        close(fourfold, 4 * once)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["info_nce: index", "nt_xent", "sup_con", "symmetric_info_nce", "siglip"])
def test_second_derivatives_are_refused_with_another_way(name, reduction):
    case = CASES[name]
    tensors = case.tensors()
    value = case.loss(*tensors, reduction=reduction).sum()
    with pytest.raises(NotImplementedError, match="for second derivatives write the loss in torch's own"):
        torch.autograd.grad(value, tensors, create_graph=True)


@pytest.mark.parametrize("loss", [negative_cosine, alignment])
def test_second_derivatives_of_cosine_losses_are_refused_too(loss):
    """Also where the other side's gradient is stopped, as in SimSiam and BYOL, and nothing else would notice."""
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match="for second derivatives write the loss in torch's own"):
        torch.autograd.grad(loss(a, b), a, create_graph=True)


# ---- closed forms, and the docstrings' examples ----

EXAMPLES = [  # (where it is written, the expression, its value)
    (info_nce, "info_nce(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 5]))", math.log(8)),
    (nt_xent, "nt_xent(torch.ones(4, 8), torch.ones(4, 8))", math.log(7)),
    (
        cosine_info_nce,
        "cosine_info_nce(torch.ones(2, 4), torch.arange(1.0, 9)[:, None].expand(8, 4), torch.tensor([0, 5]))",
        math.log(8),
    ),
    (two_view_info_nce, "two_view_info_nce(torch.ones(4, 8), torch.ones(4, 8))", math.log(7)),
    (
        SigmoidLoss,
        "SigmoidLoss(bias=0.0)(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([0, 5]))",
        8 * math.log(2),
    ),
    (sup_con, "sup_con(torch.ones(4, 8), torch.zeros(4, dtype=torch.long))", math.log(3)),
    (symmetric_info_nce, "symmetric_info_nce(torch.ones(4, 8), torch.ones(4, 8))", math.log(4)),
    (siglip, "siglip(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([0, 5]), bias=0.0)", 8 * math.log(2)),
    (InfoNCELoss, "InfoNCELoss()(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 5]))", math.log(8)),
    (NTXentLoss, "NTXentLoss()(torch.ones(4, 8), torch.ones(4, 8))", math.log(7)),
    (Temperature, "Temperature(0.07)()", 0.07),
    (Temperature, "Temperature(0.07, learn=True)()", 0.07),
    (normalize, "normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))", [[0.6, 0.8], [0, 0]]),
    (negative_cosine, "negative_cosine(torch.ones(3, 4), torch.ones(3, 4))", -1),
    (alignment, "alignment(torch.eye(3), -torch.eye(3))", 4),
    (uniformity, "uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))", -8),
    (margin_contrastive, "margin_contrastive(torch.ones(1, 4), torch.ones(1, 4), torch.tensor([False]))", 0.5),
    (
        exponential_contrastive,
        "exponential_contrastive(torch.ones(1, 4), torch.ones(1, 4), torch.tensor([False]), bound=4)",
        8,
    ),
    (distillation, "distillation(torch.zeros(2, 10), torch.zeros(2, 10))", math.log(10)),
]


@pytest.mark.parametrize(("written_in", "expression", "value"), EXAMPLES, ids=[e for _, e, _ in EXAMPLES])
def test_examples_of_the_docstrings(written_in, expression, value):
    assert expression in " ".join(written_in.__doc__.split())
    result = torch.as_tensor(eval(expression, vars(losses) | {"torch": torch})).detach()
    torch.testing.assert_close(result, torch.tensor(value, dtype=torch.float32), check_dtype=False)


def test_no_example_is_left_out():
    public = [value for name, value in vars(losses).items() if not name.startswith("_")]  # torch.compile adds its own
    ours = [value for value in public if getattr(value, "__module__", "") == losses.__name__]
    shown = {value for value in ours if "Example:" in (value.__doc__ or "")}
    assert shown == {written_in for written_in, _, _ in EXAMPLES}


@pytest.mark.parametrize("m", [1, 8, 100])
def test_identical_keys_give_log_m(m):
    loss = info_nce(torch.randn(3, 4), torch.ones(m, 4), torch.zeros(3, dtype=torch.long))
    assert float(loss) == pytest.approx(math.log(m), abs=1e-5)


@pytest.mark.parametrize("n", [2, 5, 50])
def test_identical_views_give_the_log_of_their_candidates(n):
    ones = torch.ones(n, 4, dtype=torch.float64)
    close(nt_xent(ones, ones), torch.tensor(math.log(2 * n - 1), dtype=torch.float64))
    close(nt_xent(ones, ones, decoupled=True), torch.tensor(math.log(2 * n - 2), dtype=torch.float64))
    close(sup_con(ones, torch.zeros(n, dtype=torch.long)), torch.tensor(math.log(n - 1), dtype=torch.float64))


def test_sup_con_with_an_image_number_for_a_label_is_nt_xent():
    z1, z2 = torch.randn(2, 7, 5, dtype=torch.float64)
    images = torch.randperm(7)
    close(sup_con(torch.cat([z1, z2]), images.repeat(2), temperature=0.3), nt_xent(z1, z2, temperature=0.3))


def test_sup_con_without_any_positive_is_zero_with_a_zero_gradient():
    views = torch.randn(3, 4, requires_grad=True)
    loss = sup_con(views, torch.arange(3))
    loss.backward()
    assert loss == 0
    assert torch.equal(views.grad, torch.zeros(3, 4))


def test_own_keys_are_an_index_into_keys_of_which_a_query_sees_one():
    """MoCo's form is the index form with the other queries' keys masked out."""
    queries, own, queue = (torch.randn(rows, 3, dtype=torch.float64) for rows in (4, 4, 9))
    by_index = info_nce(queries, own, torch.arange(4), shared_keys=queue, mask=torch.eye(4, dtype=torch.bool))
    close(info_nce(queries, None, own, shared_keys=queue), by_index)


def test_a_query_whose_negatives_are_all_masked_costs_nothing():
    queries, keys = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[torch.arange(3), torch.arange(3)] = True
    mask[2] = True
    rows = info_nce(queries, keys, torch.arange(3), mask=mask, reduction="none")
    assert rows[:2].tolist() == [0, 0]
    assert rows[2] > 0
    rows.sum().backward()
    assert torch.equal(queries.grad[:2], torch.zeros(2, 4))
    assert keys.grad.isfinite().all()


@pytest.mark.parametrize("gather", [None, False, True, "ring"])
def test_alone_every_way_of_gathering_is_the_same(gather):
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64)
    close(nt_xent(z1, z2, gather=gather), nt_xent(z1, z2))
    close(info_nce(z1, z2, torch.arange(6), gather=gather), info_nce(z1, z2, torch.arange(6)))
    close(symmetric_info_nce(z1, z2, gather=gather), symmetric_info_nce(z1, z2))


def test_strided_inputs_are_read_as_they_are():
    queries, keys = torch.randn(3, 4, dtype=torch.float64).T, torch.randn(3, 12, dtype=torch.float64)[:, ::2].T
    assert not queries.is_contiguous()
    loss = info_nce(queries, keys, POSITIVE, temperature=0.5)
    close(loss, info_nce(queries.contiguous(), keys.contiguous(), POSITIVE, temperature=0.5))
    close(nt_xent(queries, keys[:4]), nt_xent(queries.contiguous(), keys[:4].contiguous()))


def test_no_input_is_changed():
    for case in CASES.values():
        tensors = case.tensors()
        before = [tensor.detach().clone() for tensor in tensors]
        value = case.loss(*tensors, reduction="mean")
        torch.autograd.grad(value, [tensors[i] for i in case.differentiable])
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


# ---- wrong arguments: what came, and what to pass ----

Q, KEYS, P = torch.zeros(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 2])
MASK = torch.ones(3, 5, dtype=torch.bool)
OWN = torch.arange(5) == P[:, None]
LONELY = OWN | torch.tensor([[True], [False], [True]])  # query 1 is compared with its positive alone
SHARED = torch.zeros(2, 4)
TWO = torch.zeros(2, 3)
BOOLS = torch.tensor([True, False])

WRONG = [  # (a call, the words of its error)
    (lambda: info_nce(Q, torch.ones(5, 6), P), r"queries have shape \(3, 4\) and keys \(5, 6\): pass n d and m d"),
    (lambda: info_nce(torch.zeros(3, 4, 1), KEYS, P), r"queries have shape \(3, 4, 1\).*with the same d"),
    (lambda: info_nce(torch.zeros(4), KEYS, P), r"queries have shape \(4,\)"),
    (lambda: info_nce(Q, torch.ones(5, 6), Q), r"keys \(5, 6\)"),
    (lambda: info_nce(Q, KEYS[0], P), r"keys \(4,\): pass n d and m d"),
    (lambda: info_nce(Q, KEYS, P[:2]), r"positive has shape \(2,\).*index into keys for each of the 3 queries"),
    (lambda: info_nce(Q, KEYS, P[:, None]), r"positive has shape \(3, 1\).*one integer index into keys"),
    (lambda: info_nce(Q, KEYS, P.float()), r"dtype torch\.float32: pass one integer index"),
    (lambda: info_nce(Q, KEYS, torch.ones(3, 5)), r"positive has shape \(3, 5\), queries \(3, 4\): pass an own key"),
    (lambda: info_nce(Q, None, P, shared_keys=SHARED), "keys=None: pass shared_keys, and each query's own key"),
    (lambda: info_nce(Q, None, Q), "keys=None: pass shared_keys"),
    (lambda: info_nce(Q, KEYS, P, shared_keys=torch.ones(2, 5)), r"shared_keys have shape \(2, 5\): pass k d with d"),
    (lambda: info_nce(Q, KEYS, P, shared_keys=torch.ones(4)), r"shared_keys have shape \(4,\): pass k d with d = 4"),
    (lambda: info_nce(Q, KEYS, P, mask=MASK.T), r"mask has shape \(5, 3\) .*bool: pass bool of \(3, 5\)"),
    (lambda: info_nce(Q, KEYS, P, mask=MASK.float()), r"dtype torch\.float32: pass bool of \(3, 5\)"),
    (lambda: info_nce(Q, KEYS, P, shared_keys=SHARED, mask=torch.ones(3, 7).bool()), r"pass bool of \(3, 5\)"),
    (lambda: info_nce(Q, KEYS, P, mask=~MASK), "the mask leaves out the positive of query 0: set it True, or drop"),
    (lambda: info_nce(Q, KEYS, P, mask=lambda rows, cols: ~MASK[rows, cols]), "the positive of query 0"),
    (lambda: info_nce(Q, KEYS, P, mask=lambda rows, cols: MASK.T), r"mask gave torch\.bool of shape \(5, 3\) for sli"),
    (
        lambda: info_nce(Q, KEYS, P, mask=lambda rows, cols: MASK.int()),
        r"mask gave torch\.int32.*return bool of \(3, 5",
    ),
    (lambda: info_nce(Q, KEYS, P, mask=lambda rows, cols: MASK[0]), r"shape \(5,\) .*return bool of \(3, 5\)"),
    (lambda: info_nce(Q, KEYS[:1], P * 0, decoupled=True), "decoupled=True compares with negatives only and there are"),
    (lambda: info_nce(Q, KEYS[:0], Q, decoupled=True), "there are none: pass more keys"),
    (lambda: info_nce(Q, KEYS, P, mask=LONELY, decoupled=True), "negatives only and the mask leaves query 1 none: set"),
    (lambda: info_nce(Q, KEYS, Q, mask=LONELY & ~OWN, decoupled=True), "query 1 none: set another key True, or drop"),
    (
        lambda: info_nce(Q, KEYS, P, mask=lambda rows, cols: LONELY[rows, cols], decoupled=True, reduction="none"),
        "the mask leaves query 1 none",
    ),
    (lambda: info_nce(Q[:0], KEYS, P[:0]), "queries are empty: pass at least one"),
    (lambda: info_nce(Q, KEYS, P, temperature=0), "temperature=0: pass a number above 0"),
    (lambda: info_nce(Q, KEYS, P, temperature=-0.1), r"temperature=-0\.1: pass a number above 0"),
    (lambda: info_nce(Q, KEYS, P, temperature=math.nan), "temperature=nan"),
    (lambda: info_nce(Q, KEYS, P, reduction="max"), """reduction='max': pass "mean", "sum" or "none\""""),
    (lambda: info_nce(Q, KEYS, P, reduction=None), "reduction=None"),
    (lambda: info_nce(Q, KEYS, P, gather="all"), """gather='all': pass None, True or False, or "ring\""""),
    (lambda: nt_xent(Q, KEYS), r"the views have shapes \(3, 4\) and \(5, 4\): pass n d twice"),
    (lambda: nt_xent(Q[0], Q[0]), r"\(4,\) and \(4,\): pass n d twice"),
    (lambda: nt_xent(Q[:0], Q[:0]), "queries are empty"),
    (lambda: nt_xent(Q[:1], Q[:1], decoupled=True), "decoupled=True compares with negatives only"),
    (lambda: nt_xent(Q, Q, temperature=0.0), r"temperature=0\.0"),
    (lambda: nt_xent(Q, Q, reduction="max"), "reduction='max'"),
    (lambda: nt_xent(Q, Q, gather="all"), "gather='all'"),
    (lambda: sup_con(Q, P[:2]), r"views have shape \(3, 4\), labels \(2,\) of torch\.int64: pass n d and n integers"),
    (lambda: sup_con(Q[0], P), r"views have shape \(4,\)"),
    (lambda: sup_con(Q, P.float()), r"of torch\.float32: pass n d and n integers"),
    (lambda: sup_con(Q[:0], P[:0]), "are empty"),
    (lambda: sup_con(Q, P, temperature=-1), "temperature=-1"),
    (lambda: sup_con(Q, P, reduction="max"), "reduction='max'"),
    (lambda: sup_con(Q, P, gather="ring"), "gather='ring': pass None, True or False$"),
    (lambda: symmetric_info_nce(Q, KEYS), r"\(3, 4\) and \(5, 4\): pass n d twice"),
    (lambda: symmetric_info_nce(Q[:0], Q[:0]), "are empty"),
    (lambda: symmetric_info_nce(Q, Q, temperature=0), "temperature=0"),
    (lambda: symmetric_info_nce(Q, Q, reduction="max"), "reduction='max'"),
    (lambda: siglip(Q, torch.ones(5, 6), P), r"keys \(5, 6\)"),
    (lambda: siglip(Q, KEYS, Q), r"positive has shape \(3, 4\) and dtype torch\.float32: pass one integer index"),
    (lambda: siglip(Q, KEYS, P, temperature=0), "temperature=0"),
    (lambda: siglip(Q, KEYS, P, reduction="max"), "reduction='max'"),
    (lambda: siglip(Q, KEYS, P, gather="ring"), "gather='ring'"),
    (lambda: InfoNCELoss(temperature=0), "temperature=0"),
    (lambda: NTXentLoss(temperature=-1, learn_temperature=True), "temperature=-1"),
    (lambda: NTXentLoss(reduction="max")(Q, Q), "reduction='max'"),
    (lambda: negative_cosine(Q, KEYS), r"\(3, 4\) and \(5, 4\): pass n d twice"),
    (lambda: negative_cosine(Q, Q, reduction="max"), "reduction='max'"),
    (lambda: alignment(Q, KEYS), r"\(3, 4\) and \(5, 4\): pass n d twice"),
    (lambda: uniformity(Q[0]), r"features have shape \(4,\): pass n d"),
    (lambda: uniformity(Q[:1]), "features have .* at least two"),
    (lambda: uniformity(Q, gather="ring"), "gather='ring'"),
    (lambda: margin_contrastive(TWO, TWO[:1], BOOLS), r"\(2, 3\) and \(1, 3\): pass n d twice"),
    (lambda: margin_contrastive(TWO, TWO, BOOLS[:1]), r"same has shape \(1,\) and dtype torch\.bool: pass 2 bools"),
    (lambda: margin_contrastive(TWO, TWO, BOOLS.long()), r"dtype torch\.int64: pass 2 bools"),
    (lambda: margin_contrastive(TWO, TWO, BOOLS, reduction="max"), "reduction='max'"),
    (lambda: exponential_contrastive(TWO, TWO, BOOLS.float(), bound=1), r"dtype torch\.float32: pass 2 bools"),
    (lambda: exponential_contrastive(TWO, TWO[0], BOOLS, bound=1), "pass n d twice"),
    (lambda: distillation(TWO, Q), r"\(2, 3\) \(student\) and \(3, 4\) \(teacher\): pass n classes twice"),
    (lambda: distillation(TWO[0], TWO[0]), "pass n classes twice"),
    (lambda: distillation(TWO, TWO, temperature=0), "temperature=0"),
    (lambda: distillation(TWO, TWO, reduction="max"), "reduction='max'"),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=[words for _, words in WRONG])
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


UNCLEAR = [  # what torch alone would answer with a number or with words about its inside
    (lambda: info_nce(Q, KEYS, torch.tensor([0, 1, 5])), r"positive.* 5"),
    (lambda: info_nce(Q, KEYS, torch.tensor([0, 1, -1])), r"positive.* -1"),
    (lambda: info_nce(Q, KEYS, torch.tensor([0, 1, 5]), shared_keys=SHARED), r"positive.* 5"),
    (lambda: siglip(Q, KEYS, torch.tensor([0, 1, 5])), r"positive.* 5"),
    (lambda: info_nce(Q, KEYS, torch.tensor([True, False, True])), r"positive.* torch\.bool"),
    (lambda: siglip(Q, KEYS, P, bias=torch.zeros(5)), "bias"),
    (lambda: info_nce(Q, KEYS, P, temperature=torch.tensor(-1.0)), "temperature"),
    (lambda: nt_xent(Q, Q, temperature=torch.tensor(-1.0)), "temperature"),
    (lambda: exponential_contrastive(TWO, TWO, BOOLS, bound=0), "bound=0"),
    (lambda: margin_contrastive(TWO, TWO, BOOLS, margin=-1), "margin=-1"),
    (lambda: Temperature(0.001, learn=True), r"0\.001"),
]


@pytest.mark.parametrize(("call", "words"), UNCLEAR, ids=[words for _, words in UNCLEAR])
def test_what_torch_would_not_explain_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", ["queries", "keys", "own", "shared_keys"])
def test_one_input_in_float64_lifts_the_others(name):
    """A float64 queue beside a float32 network is an answer, as in torch's own arithmetic, not an error of `mm`."""
    tensors = {"queries": torch.randn(3, 4), "keys": torch.randn(5, 4), "own": torch.randn(3, 4), "shared_keys": SHARED}

    def loss(queries, keys, own, shared_keys):
        return info_nce(queries, keys, own, shared_keys=shared_keys)

    exact = loss(**{key: value.double() for key, value in tensors.items()})
    mixed = loss(**tensors | {name: tensors[name].double()})
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_positive_that_is_masked_in_a_later_block_is_named(monkeypatch):
    monkeypatch.setitem(sweep.BLOCK, "cpu", 64)
    queries, keys = torch.randn(100, 3), torch.randn(100, 3)
    mask = torch.ones(100, 100, dtype=torch.bool)
    mask[77, 77] = False
    for passed in (mask, lambda rows, cols: mask[rows, cols]):
        with pytest.raises(ValueError, match="the mask leaves out the positive of query 77"):
            info_nce(queries, keys, torch.arange(100), mask=passed)


def test_a_queue_gets_no_gradient_that_nobody_asked_for(monkeypatch):
    asked, sweep_of = [], losses.fastest_row_sweep

    def seen(*tensors, needs=(), **options):
        asked.append(needs)
        return sweep_of(*tensors, needs=needs, **options)

    monkeypatch.setattr(losses, "fastest_row_sweep", seen)
    queries, own = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    info_nce(queries, None, own, shared_keys=SHARED).backward()
    assert asked == [(True, False, True)]


def test_the_positive_of_an_own_key_cannot_be_masked():
    """The mask covers keys, and a query's own key is none of them."""
    queries, keys, own = (torch.randn(rows, 4, dtype=torch.float64) for rows in (3, 5, 3))
    loss = info_nce(queries, keys, own, shared_keys=SHARED.double(), mask=torch.zeros(3, 5, dtype=torch.bool))
    close(loss, info_nce(queries, None, own, shared_keys=SHARED.double()))


WRONG_TOGETHER = [  # (what the other process passes: n, m, d, float64, slopes; a call; the words of its error)
    ((3, 5, 8, 0, 0), lambda: info_nce(Q, KEYS, P), r"processes pass vectors of d = \[4, 8\]: pass the same"),
    ((3, 5, 4, 1, 0), lambda: info_nce(Q, KEYS, P), r"processes pass float64 = \[0, 1\]: pass the same"),
    ((3, 5, 4, 0, 1), lambda: info_nce(Q, KEYS, P), r"processes pass keys that need a gradient = \[0, 1\]"),
    ((3, 5, 4, 0, 0), lambda: info_nce(Q, KEYS, P, reduction="sum"), """reduction="sum" means nothing under DDP's"""),
    ((3, 3, 8, 0, 0), lambda: nt_xent(Q, Q), r"processes pass vectors of d = \[4, 8\]"),
    ((3, 3, 4, 0, 0), lambda: nt_xent(Q, Q, reduction="sum"), 'pass "mean", or "none" and sum yourself'),
    ((3, 3, 4, 0, 0), lambda: sup_con(Q, P, reduction="sum"), 'pass "mean", or "none" and sum yourself'),
    ((3, 5, 4, 0, 0), lambda: siglip(Q, KEYS, P, reduction="sum"), 'pass "mean", or "none" and sum yourself'),
    ((3, 3, 4, 0, 0), lambda: symmetric_info_nce(Q, Q, reduction="sum"), 'pass "mean", or "none" and sum yourself'),
]


@pytest.mark.parametrize(("other", "call", "words"), WRONG_TOGETHER)
def test_what_only_several_processes_can_get_wrong(monkeypatch, other, call, words):
    """As two processes see it, of which only the numbers that they exchange first are there."""

    def exchange(misfit, *numbers):
        return [(int(misfit), *map(int, numbers)), (0, *other)]

    for module in ("gather", "loss_arguments"):
        monkeypatch.setattr(f"contrastive_core.{module}.world", lambda: (0, 2))
    monkeypatch.setattr("contrastive_core.gather.exchange", exchange)
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_temperature_of_any_precision_and_shape_is_taken_as_exactly_as_it_is(kind, shape):
    temperature = torch.full(shape, 0.07, dtype=kind)
    exact = float(temperature.double())
    queries, keys = torch.randn(6, 8), torch.randn(6, 8)
    for loss in (
        nt_xent,
        symmetric_info_nce,
        lambda q, k, **options: info_nce(q, k, torch.arange(6), **options),
        lambda q, k, **options: sup_con(torch.cat([q, k]), torch.arange(6).repeat(2), **options),
        lambda q, k, **options: siglip(q, k, torch.arange(6), **options),
    ):
        close(loss(queries, keys, temperature=temperature), loss(queries, keys, temperature=exact), rtol=1e-5)


def test_normalize_takes_rows_only():
    with pytest.raises(ValueError, match=r"rows have shape \(2, 3, 4\): pass n d"):
        normalize(torch.ones(2, 3, 4))


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_query_whose_mask_leaves_its_positive_alone(decoupled):
    """Costs nothing, decoupled is refused (`WRONG`), and is compared with shared keys all the same."""
    queries, keys, shared = torch.randn(3, 4), torch.randn(5, 4), torch.randn(6, 4)
    if not decoupled:
        assert info_nce(queries, keys, P, mask=LONELY, reduction="none")[1] == 0
    losses = info_nce(queries, keys, P, mask=LONELY, shared_keys=shared, decoupled=decoupled, reduction="none")
    expected = dense_info_nce(queries, keys, P, shared, mask=LONELY, decoupled=decoupled)
    torch.testing.assert_close(losses, expected)


# ---- modules ----


def test_a_call_says_whether_to_gather():
    """As CPC does, which gathers its targets once for all its calls: so it can learn a temperature."""
    loss = InfoNCELoss(10.0, learn_temperature=True)
    close(loss(Q, KEYS, P, gather=False), info_nce(Q, KEYS, P, temperature=10.0))
    assert loss(Q, KEYS, P, gather=False).requires_grad
    close(NTXentLoss(0.3)(Q, Q, gather=False), nt_xent(Q, Q, temperature=0.3))
    with pytest.raises(ValueError, match="gather='rings'"):  # the call's goes before the module's
        NTXentLoss(0.3, gather=False)(Q, Q, gather="rings")


def test_modules_are_the_functions():
    queries, keys, shared = (torch.randn(rows, D, dtype=torch.float64) for rows in (N, M, K))
    options = {"decoupled": True, "reduction": "none", "gather": False}
    arguments = {"shared_keys": shared, "mask": ALLOWED}
    module = InfoNCELoss(0.3, **options)
    close(module(queries, keys, POSITIVE, **arguments),
          info_nce(queries, keys, POSITIVE, temperature=0.3, **arguments, **options))  # fmt: skip
    close(module(queries, None, queries, shared_keys=shared),
          info_nce(queries, None, queries, temperature=0.3, shared_keys=shared, **options))  # fmt: skip
    close(NTXentLoss(0.3, **options)(queries, keys[:N]), nt_xent(queries, keys[:N], temperature=0.3, **options))
    close(InfoNCELoss()(queries, keys, POSITIVE), info_nce(queries, keys, POSITIVE))
    close(NTXentLoss()(queries, keys[:N]), nt_xent(queries, keys[:N]))
    assert not list(module.parameters())


MODULES = [
    (InfoNCELoss, lambda module, q, k: module(q, k, torch.arange(len(q)))),
    (NTXentLoss, lambda module, q, k: module(q, k)),
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("kind", "call"), MODULES, ids=["InfoNCELoss", "NTXentLoss"])
def test_gradcheck_of_a_learned_temperature(kind, call, reduction):
    module = kind(0.4, learn_temperature=True, reduction=reduction).double()
    (parameter,) = module.parameters()
    assert parameter.item() == pytest.approx(math.log(0.4))

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, queries, keys):
            return call(self.module, queries, keys)

    def value(queries, keys, log_temperature):
        name = "module.temperature.log_temperature"
        return torch.func.functional_call(Called(), {name: log_temperature}, (queries, keys))

    queries, keys = (torch.randn(N, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(value, (queries, keys, parameter.detach().clone().requires_grad_()))


@pytest.mark.parametrize(("kind", "call"), MODULES, ids=["InfoNCELoss", "NTXentLoss"])
def test_a_learned_temperature_follows_the_loss(kind, call):
    """Where positives win, a lower temperature lowers the loss: it falls, and stops at the bound."""
    module = kind(0.5, learn_temperature=True)
    z = normalize(torch.randn(6, 16))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = call(module, z, z).item()
    for _ in range(20):
        optimizer.zero_grad()
        call(module, z, z).backward()
        optimizer.step()
    assert module.temperature().item() < 0.4
    assert call(module, z, z).item() < before
    with torch.no_grad():
        module.temperature.log_temperature.fill_(-100.0)
    assert module.temperature().item() == pytest.approx(0.01)
    assert call(module, z, z).isfinite()


def test_a_temperature_below_its_bound_can_rise_again():
    """An optimizer's step may carry log T below the bound; a gradient of zero there would hold it for good."""
    temperature = Temperature(0.02, learn=True)
    with torch.no_grad():
        temperature.log_temperature.fill_(math.log(0.009))
    optimizer = torch.optim.SGD(temperature.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (-temperature()).backward()  # a loss that wants it higher
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 2
    assert temperature().item() > 0.01


def test_a_learned_temperature_is_fetched_without_a_warning():
    """torch warns once a process where a tensor with a gradient becomes a number: here, each time."""
    torch.set_warn_always(True)
    try:
        NTXentLoss(0.2, learn_temperature=True)(TWO, TWO).backward()
    finally:
        torch.set_warn_always(False)


def test_a_learned_temperature_is_saved_with_the_module():
    module = InfoNCELoss(0.2, learn_temperature=True)
    restored = InfoNCELoss(0.7, learn_temperature=True)
    restored.load_state_dict(module.state_dict())
    assert restored.temperature().item() == pytest.approx(0.2)


@pytest.mark.parametrize("make", [
    lambda value: InfoNCELoss(value, learn_temperature=True),
    lambda value: NTXentLoss(value, learn_temperature=True),
    lambda value: SigmoidLoss(value, -20 * value),
], ids=["InfoNCELoss", "NTXentLoss", "SigmoidLoss"])  # fmt: skip
def test_learned_numbers_have_a_row_and_are_read_from_scalars(make):
    """As states have them that were saved before `fully_shard`, which refuses scalars, was there."""
    module, restored = make(0.2), make(0.7)
    assert {parameter.shape for parameter in module.parameters()} == {(1,)}
    assert module.temperature().shape == ()
    scalars = {f"0.{name}": value.reshape(()) for name, value in module.state_dict().items()}
    copied = copy.deepcopy(restored)
    torch.nn.ModuleList([copied]).load_state_dict(scalars)
    assert all(value.shape == () for value in scalars.values())  # the caller's own
    for name, value in module.state_dict().items():
        assert torch.equal(copied.state_dict()[name], value)
        assert not torch.equal(restored.state_dict()[name], value)
    pairs = [torch.arange(2)] if isinstance(module, InfoNCELoss) else []
    assert module(TWO, TWO, *pairs).shape == ()


@pytest.mark.parametrize("decoupled", [False, True])
def test_nt_xent_with_a_memory_is_info_nce_with_shared_keys(decoupled: bool) -> None:
    """SimCLRv2's negatives, against the general loss: an anchor is left out of its own candidates, a memory is not."""
    generator = torch.Generator().manual_seed(0)
    z1, z2, memory = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (6, 6, 9))
    z1.requires_grad_()
    got = nt_xent(z1, z2, shared_keys=memory, temperature=0.3, decoupled=decoupled)
    (gradient,) = torch.autograd.grad(got, z1)
    views = normalize(torch.cat([z1, z2]))
    expected = info_nce(views, views, torch.arange(12).roll(6), shared_keys=normalize(memory), temperature=0.3,
                        mask=~torch.eye(12, dtype=torch.bool), decoupled=decoupled)  # fmt: skip
    (expected_gradient,) = torch.autograd.grad(expected, z1)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    same = torch.ones(4, 8)
    torch.testing.assert_close(nt_xent(same, same, shared_keys=torch.ones(9, 8)), torch.tensor(math.log(7 + 9)))
    with pytest.raises(ValueError, match="shared_keys have shape"):
        nt_xent(z1, z2, shared_keys=torch.ones(9, 4))
