"""The losses that plug into CPC and SimCLR by configuration alone: the same four names in both forms of call."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from processes import in_a_group
from torch import distributed as dist

from contrastive_core.losses import (
    SigmoidLoss,
    cosine_info_nce,
    info_nce,
    normalize,
    nt_xent,
    siglip,
    symmetric_info_nce,
    two_view_info_nce,
)
from contrastive_core.method import Batch
from contrastive_core.metrics import count_negatives
from cpc.configs import config_folder
from cpc.context import ContextNetwork
from cpc.method import CPC

FOLDER = Path(config_folder()) / "loss"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the definitions, one pair at a time ----


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def contrast(own, others, decoupled):
    """-log( exp(own) / sum of exp ), the sum with the positive or, decoupled, without it."""
    return math.log(math.fsum(math.exp(score) for score in others + [own] * (not decoupled))) - own


def loop_two_views(z1, z2, temperature, decoupled):
    views, n = torch.cat([z1, z2]), len(z1)
    for i, view in enumerate(views):
        other = (i + n) % (2 * n)
        scores = [dot(view, key) / temperature for key in views]
        yield contrast(scores[other], [s for k, s in enumerate(scores) if k not in (i, other)], decoupled)


def loop_cosine(queries, keys, positive, temperature, mask, decoupled):
    for i, query in enumerate(queries):
        scores = [cosine(query, key) / temperature for key in keys]
        others = [s for j, s in enumerate(scores) if j != positive[i] and mask[i, j]]
        yield contrast(scores[positive[i]], others, decoupled)


def loop_sigmoid(queries, keys, positive, temperature, bias, score):
    for i, query in enumerate(queries):
        logits = [score(query, key) / temperature + bias for key in keys]
        yield math.fsum(math.log1p(math.exp(-s if j == positive[i] else s)) for j, s in enumerate(logits))


def by_hand(rows, reduction):
    rows = torch.tensor(list(rows), dtype=torch.float64)
    return {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]


REDUCTIONS = ("none", "mean", "sum")
QUERIES, KEYS, POSITIVE = numbers(5, 3), numbers(9, 3, seed=1), torch.tensor([8, 0, 3, 3, 6])
Z1, Z2 = numbers(4, 3, seed=2), numbers(4, 3, seed=3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("decoupled", [False, True])
def test_two_view_info_nce_by_a_double_loop(decoupled, reduction):
    loss = two_view_info_nce(Z1, Z2, temperature=0.7, decoupled=decoupled, reduction=reduction)
    torch.testing.assert_close(loss, by_hand(loop_two_views(Z1, Z2, 0.7, decoupled), reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("decoupled", [False, True])
def test_cosine_info_nce_by_a_double_loop(decoupled, reduction):
    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[torch.arange(5), POSITIVE] = True
    loss = cosine_info_nce(
        QUERIES, KEYS, POSITIVE, temperature=0.7, mask=mask, decoupled=decoupled, reduction=reduction
    )
    expected = by_hand(loop_cosine(QUERIES, KEYS, POSITIVE, 0.7, mask, decoupled), reduction)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("score", [dot, cosine])
def test_sigmoid_loss_by_a_double_loop(score, reduction):
    module = SigmoidLoss(0.7, -1.5, normalised=score is cosine, reduction=reduction).double()
    loss = module(QUERIES, KEYS, POSITIVE)
    expected = by_hand(loop_sigmoid(QUERIES, KEYS, POSITIVE, 0.7, -1.5, score), reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)  # log T begins in float32
    views = by_hand(loop_sigmoid(Z1, Z2, range(4), 0.7, -1.5, score), reduction)
    torch.testing.assert_close(module(Z1, Z2), views, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_gradients_are_those_of_finite_differences(decoupled, reduction):
    options = {"decoupled": decoupled, "reduction": reduction, "gather": False}
    temperature = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    queries, keys, z1, z2 = (rows.clone().requires_grad_() for rows in (QUERIES, KEYS, Z1, Z2))

    def predictions(queries, keys, temperature):
        return cosine_info_nce(queries, keys, POSITIVE, temperature=temperature, **options)

    def views(z1, z2, temperature):
        return two_view_info_nce(z1, z2, temperature=temperature, **options)

    assert torch.autograd.gradcheck(predictions, (queries, keys, temperature))
    assert torch.autograd.gradcheck(views, (z1, z2, temperature))


def sigmoid_as_function(module):
    """Of queries, keys and both learned numbers, for a check of all gradients."""

    def function(queries, keys, log_temperature, bias):
        parameters = {"temperature.log_temperature": log_temperature, "bias": bias}
        return torch.func.functional_call(module, parameters, (queries, keys, POSITIVE))

    return function


@pytest.mark.parametrize("normalised", [False, True])
def test_the_sigmoid_loss_passes_gradients_to_its_own_numbers(normalised):
    module = SigmoidLoss(0.9, -1.0, normalised=normalised, reduction="none").double()
    own = [p.detach().clone().requires_grad_() for p in (module.temperature.log_temperature, module.bias)]
    queries, keys = QUERIES.clone().requires_grad_(), KEYS.clone().requires_grad_()
    assert torch.autograd.gradcheck(sigmoid_as_function(module), (queries, keys, *own))


EXAMPLES = [
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
]


@pytest.mark.parametrize(("written_in", "expression", "value"), EXAMPLES, ids=[e for _, e, _ in EXAMPLES])
def test_examples_of_the_docstrings(written_in, expression, value):
    assert expression in " ".join(written_in.__doc__.split())
    assert eval(expression).detach() == pytest.approx(value, rel=1e-6)


# ---- where forms must agree ----


def close(*values):
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decoupled", [False, True])
def test_two_view_info_nce_of_unit_vectors_is_nt_xent(decoupled):
    options = {"temperature": 0.3, "decoupled": decoupled, "reduction": "none"}
    torch.testing.assert_close(two_view_info_nce(normalize(Z1), normalize(Z2), **options), nt_xent(Z1, Z2, **options))


def test_views_in_the_form_of_predictions():
    """First views as queries; keys are both views but the query itself, or the second views only."""
    both, n = torch.cat([Z1, Z2]), len(Z1)
    not_itself = ~torch.eye(n, 2 * n, dtype=torch.bool)
    here, there = torch.arange(n), torch.arange(n) + n
    for dots, views in ((info_nce, two_view_info_nce), (cosine_info_nce, nt_xent)):
        form = partial(dots, Z1, both, there, mask=not_itself, temperature=0.3, reduction="none")
        torch.testing.assert_close(form(), views(Z1, Z2, temperature=0.3, reduction="none")[:n])
    halves = [cosine_info_nce(a, b, here, temperature=0.3) for a, b in ((Z1, Z2), (Z2, Z1))]
    torch.testing.assert_close(sum(halves) / 2, symmetric_info_nce(Z1, Z2, temperature=0.3))
    close(SigmoidLoss()(Z1, Z2), SigmoidLoss()(Z1, Z2, here))


def test_a_sigmoid_loss_that_learns_nothing_is_siglip():
    fixed = SigmoidLoss(0.3, -2.0, learn=False, normalised=False)
    expected = siglip(QUERIES, KEYS, POSITIVE, temperature=0.3, bias=-2.0)
    assert torch.equal(fixed(QUERIES, KEYS, POSITIVE), expected)
    assert not fixed.state_dict()


def test_the_order_of_images_and_of_views_does_not_matter():
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))
    for loss in (two_view_info_nce, SigmoidLoss()):
        close(loss(Z1[order], Z2[order]), loss(Z1, Z2))
        close(loss(Z2, Z1), loss(Z1, Z2))


def test_lengths_count_for_dot_products_only():
    longer = torch.arange(1.0, 6)[:, None] * QUERIES, 7 * KEYS, POSITIVE
    for loss in (cosine_info_nce, SigmoidLoss()):
        close(loss(*longer), loss(QUERIES, KEYS, POSITIVE))
    for loss in (info_nce, SigmoidLoss(normalised=False)):
        assert not torch.isclose(loss(*longer), loss(QUERIES, KEYS, POSITIVE), rtol=0.01)
    assert not torch.isclose(two_view_info_nce(3 * Z1, Z2), two_view_info_nce(Z1, Z2), rtol=0.01)


@pytest.mark.parametrize("length", [1e-3, 1e2, 1e4])
def test_scores_of_any_size_are_right_in_float32(length):
    z1, z2 = numbers(40, 8) * length, numbers(40, 8, seed=1) * length
    exact = two_view_info_nce(z1, z2)
    torch.testing.assert_close(two_view_info_nce(z1.float(), z2.float()).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_float32_under_autocast_too(precision):
    queries, keys, z1, z2 = (rows.to(precision) for rows in (QUERIES, KEYS, Z1, Z2))
    losses = {
        "cosine": (cosine_info_nce, (queries, keys, POSITIVE)),
        "two views": (two_view_info_nce, (z1, z2)),
        "sigmoid": (SigmoidLoss(), (queries, keys, POSITIVE)),
    }
    for loss, arguments in losses.values():
        exact = loss(*(a.float() if a.is_floating_point() else a for a in arguments))
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(*arguments)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact)


def test_negatives_are_counted_by_the_losses_themselves():
    assert count_negatives(cosine_info_nce, QUERIES, KEYS, POSITIVE).tolist() == [8] * 5
    assert count_negatives(two_view_info_nce, Z1, Z2).tolist() == [6] * 8


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cosine_info_nce(QUERIES[0], KEYS, POSITIVE), r"queries have shape \(3,\) and keys \(9, 3\)"),
        (lambda: cosine_info_nce(QUERIES, KEYS[:, :2], POSITIVE), "pass n d and m d with the same d"),
        (lambda: cosine_info_nce(QUERIES, KEYS, QUERIES), "pass one integer index into keys"),
        (lambda: cosine_info_nce(QUERIES, KEYS, POSITIVE + 1), "positive holds 9, and there are 9 keys"),
        (lambda: cosine_info_nce(QUERIES, KEYS, POSITIVE, temperature=0), "temperature=0: pass a number above 0"),
        (lambda: two_view_info_nce(Z1, Z2[:3]), r"the views have shapes \(4, 3\) and \(3, 3\): pass n d twice"),
        (lambda: two_view_info_nce(Z1, Z2, reduction="max"), "reduction='max'"),
        (lambda: two_view_info_nce(Z1, Z2, gather="rings"), "gather='rings'"),
        (lambda: two_view_info_nce(Z1[:1], Z2[:1], decoupled=True), "negatives only and there are none"),
        (lambda: SigmoidLoss()(QUERIES, KEYS), "the views have shapes"),  # whose index was forgotten
        (lambda: SigmoidLoss()(QUERIES, KEYS, POSITIVE[:4]), "pass one integer index"),
        (lambda: SigmoidLoss(gather="ring")(Z1, Z2), "gather='ring': pass None, True or False"),
        (lambda: SigmoidLoss(0.001), "temperature=0.001"),
    ],
)
def test_what_does_not_fit_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- by configuration ----


def configured(name, form, dot=10.0, cosine=0.1):
    """The loss of configs/loss/NAME.yaml, as a method gets it from `${loss.predictions}` or `${loss.views}`."""
    loss = OmegaConf.load(FOLDER / f"{name}.yaml")
    cfg = OmegaConf.create({"temperature": {"dot": dot, "cosine": cosine}, "loss": loss, "own": f"${{loss.{form}}}"})
    return instantiate(cfg.own)


def test_the_four_names():
    assert NAMES == ["dcl", "info_nce", "nt_xent", "sigmoid"]


IDENTICAL = {  # n views of a kind, m keys
    "info_nce": lambda n, m: (math.log(m), math.log(2 * n - 1)),
    "dcl": lambda n, m: (math.log(m - 1), math.log(2 * n - 2)),
    "nt_xent": lambda n, m: (math.log(m), math.log(2 * n - 1)),
    "sigmoid": lambda n, m: (m * math.log(2), n * math.log(2)),  # cos / 0.1 - 10 = 0
}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_identical_features_give_the_closed_form(name):
    of_predictions, of_views = IDENTICAL[name](4, 9)
    loss = configured(name, "predictions")(torch.ones(2, 6), torch.ones(9, 6), torch.tensor([0, 5]), gather=False)
    assert float(loss) == pytest.approx(of_predictions, rel=1e-5)
    assert float(configured(name, "views")(torch.ones(4, 6), torch.ones(4, 6))) == pytest.approx(of_views, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["predictions", "views"])
@torch.no_grad()
def test_the_temperature_is_the_configuration_s(name, form):
    """Dot products fall with `temperature.dot`, cosines with `temperature.cosine`, and neither with the other's."""
    arguments = (QUERIES, KEYS, POSITIVE) if form == "predictions" else (Z1, Z2)
    values = [
        float(configured(name, form, *temperatures)(*arguments)) for temperatures in ((1, 0.1), (2, 0.1), (1, 0.2))
    ]
    by_dot = name == "info_nce" or (name, form) == ("dcl", "predictions")
    assert (values[0] != values[1], values[0] != values[2]) == (by_dot, not by_dot)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["predictions", "views"])
def test_a_few_steps_find_the_positives(name, form):
    loss = configured(name, form, dot=1.0)
    a = numbers(6, 8).float().requires_grad_()
    b = numbers(12 if form == "predictions" else 6, 8, seed=1).float().requires_grad_()
    positive = torch.tensor([11, 0, 7, 3, 4, 5]) if form == "predictions" else torch.arange(6)
    more = (positive,) if form == "predictions" else ()
    optimizer = torch.optim.Adam([a, b, *getattr(loss, "parameters", list)()], lr=0.1)
    values = []
    for _ in range(40):
        values.append(loss(a, b, *more, gather=False))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[-1] < values[0] - 0.3
    assert torch.equal((normalize(a) @ normalize(b).T).argmax(1), positive)


def tiny_cpc(loss):
    class Pixels(torch.nn.Module):
        dim = 6

        def forward(self, patches):
            return patches.flatten(1)

    torch.manual_seed(0)
    return CPC(Pixels(), offsets=[1], target_dim=4, context=partial(ContextNetwork, width=5, layers=1), loss=loss)


GRIDS = Batch((numbers(2, 3, 3, 6, 1, 1).float(),), torch.arange(2), torch.arange(2))


@pytest.mark.parametrize("name", NAMES)
def test_cpc_takes_each_of_them(name):
    method = tiny_cpc(configured(name, "predictions"))
    loss, _ = method(GRIDS)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_what_the_sigmoid_loss_learns_is_part_of_the_method():
    """Four directions call the loss four times before one backward pass."""
    method = tiny_cpc(SigmoidLoss())
    own = {"loss.bias", "loss.temperature.log_temperature"}
    assert own <= set(method.state_dict()) & {name for name, _ in method.named_parameters()}
    before = {name: method.state_dict()[name].clone() for name in own}
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        method(GRIDS)[0].backward()
        optimizer.step()
    assert all(not torch.equal(method.state_dict()[name], value) for name, value in before.items())
    resumed = tiny_cpc(SigmoidLoss(0.5, 0.0))
    resumed.load_state_dict(method.state_dict())
    assert torch.equal(resumed(GRIDS)[0], method(GRIDS)[0])


# ---- several processes ----

COUNTS = {"equal": [3, 3], "unequal": [2, 5], "one has none": [0, 4]}


def by_cosine(a, b, gather, own):
    return cosine_info_nce(a, torch.cat([b, a.flip(1)]), torch.arange(len(a)), gather=gather)


def by_sigmoid(a, b, gather, own, **options):
    names = ("temperature.log_temperature", "bias")
    module = SigmoidLoss(**options).double()
    return torch.func.functional_call(module, dict(zip(names, own, strict=True)), (a, b), {"gather": gather})


MEANS = {
    "two views": lambda a, b, gather, own: two_view_info_nce(a, b, gather=gather),
    "two views, ring": lambda a, b, gather, own: two_view_info_nce(a, b, gather=gather and "ring"),
    "two views, decoupled": lambda a, b, gather, own: two_view_info_nce(a, b, decoupled=True, gather=gather),
    "cosine": by_cosine,
    "sigmoid": by_sigmoid,
    "sigmoid, dot products": partial(by_sigmoid, normalised=False),
}


def gradients_of_joint(loss, counts, rank=None):
    """The mean and its gradients by a map, by log T and by the bias, averaged over processes as DDP does."""
    weight = torch.eye(4, dtype=torch.float64).requires_grad_()
    own = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-0.5, -1.0)]
    joint = [numbers(sum(counts), 4, seed=seed) for seed in (0, 1)]
    a, b = ((rows if rank is None else rows.split(counts)[rank]) @ weight for rows in joint)
    value = loss(a, b, rank is not None, own)
    gradients = torch.autograd.grad(value, [weight, *own], allow_unused=True)
    results = [value.detach(), *(g for g in gradients if g is not None)]
    for tensor in results if rank is not None else []:
        dist.all_reduce(tensor)
        tensor /= 2
    return results


MISFITS = {  # on the second process alone: the first may not wait for it
    "cosine": lambda rank: cosine_info_nce(Z1[0] if rank else Z1, Z2, torch.arange(4)),
    "two views": lambda rank: two_view_info_nce(Z1, Z2[rank:]),
    "sigmoid": lambda rank: SigmoidLoss()(Z1, Z2, torch.arange(4 - rank)),
}


def error_of(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return "no error"


def one_process(rank):
    result = {
        name: {loss: gradients_of_joint(function, counts, rank) for loss, function in MEANS.items()}
        for name, counts in COUNTS.items()
    }
    result["misfits"] = {name: error_of(call, rank) for name, call in MISFITS.items()}
    return result


@pytest.fixture(scope="module")
def two_processes():
    return in_a_group(2, one_process)


@pytest.mark.parametrize("counts", list(COUNTS))
@pytest.mark.parametrize("loss", list(MEANS))
def test_two_processes_give_the_joint_batch_s_mean_and_gradients(two_processes, counts, loss):
    expected = gradients_of_joint(MEANS[loss], COUNTS[counts])
    assert len(expected) == (4 if "sigmoid" in loss else 2)
    for result in two_processes:
        for ours, joint in zip(result[counts][loss], expected, strict=True):
            torch.testing.assert_close(ours, joint, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("misfit", list(MISFITS))
def test_what_does_not_fit_on_one_process_keeps_none_waiting(two_processes, misfit):
    first, second = (result["misfits"][misfit] for result in two_processes)
    assert first == "process 1 passed what does not fit: see its own error"
    assert "pass" in second
    assert second != first
