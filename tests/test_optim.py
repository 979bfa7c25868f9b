"""Learning rates, groups, LARS and moving averages: closed forms, steps by hand, and timm's LARS."""

import copy
import math
import re
from functools import partial

import pytest
import timm.optim
import torch
from accelerate import Accelerator
from torch import nn

from contrastive_core.checkpoint import load_checkpoint_, save_checkpoint
from contrastive_core.momentum import cosine_momentum, ema_update_, polyak_decay, teacher_of
from contrastive_core.optim import (
    LARS,
    Together,
    constant,
    linear_scaling,
    parameter_groups,
    set_learning_rate_,
    square_root_scaling,
    step_decay,
    warmup_cosine,
)

# ---- learning rates ----


def test_warmup_then_half_a_cosine():
    factor = partial(warmup_cosine, warmup=0.1)
    assert factor(0.0) == 0
    assert factor(0.05) == pytest.approx(0.5)
    assert factor(0.1) == 1
    assert factor(0.55) == pytest.approx(0.5)
    assert factor(1.0) == pytest.approx(0, abs=1e-15)
    assert warmup_cosine(0.0) == 1
    assert warmup_cosine(0.25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert warmup_cosine(1.0, warmup=1.0) == 1  # all warm-up
    assert constant(0.3) == 1


def test_steps_down_are_moco_s():
    epochs = [(epoch + 0.5) / 200 for epoch in range(200)]
    expected = [1.0] * 120 + [0.1] * 40 + [0.01] * 40
    assert [step_decay(progress) for progress in epochs] == pytest.approx(expected)
    assert step_decay(0.6) == 0.1  # from there on
    assert step_decay(0.4, at=[0.5, 0.25], factor=0.5) == 0.5
    assert step_decay(1.0, at=()) == 1


def test_both_scalings_are_simclr_s_and_meet_at_4096():
    assert linear_scaling(0.3, 4096) == pytest.approx(4.8) == square_root_scaling(0.075, 4096)
    assert linear_scaling(0.3, 256) == 0.3
    assert linear_scaling(0.3, 512, base=1024) == 0.15
    assert square_root_scaling(0.075, 256) == pytest.approx(1.2)


def test_every_group_keeps_its_own_base_rate():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for factor in (0.0, 0.5, 0.25):  # from the base rate each time, not from the last one
        assert set_learning_rate_(optimizer, factor) == pytest.approx(0.1 * factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.02 * factor])


@pytest.mark.parametrize("first", [0, 1])
def test_a_constant_rate_stays_and_the_other_one_is_reported(first):
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))]}]
    groups[first]["constant_rate"] = True
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for factor in (0.0, 0.5):
        assert set_learning_rate_(optimizer, factor) == pytest.approx(0.1 * factor)
        assert optimizer.param_groups[first]["lr"] == 0.1
        assert optimizer.param_groups[1 - first]["lr"] == pytest.approx(0.1 * factor)


def test_where_all_rates_are_constant_that_is_the_rate():
    optimizer = torch.optim.SGD(parameter_groups(nn.Linear(1, 1), constant_rate=["weight", "bias"]), lr=0.1)
    assert set_learning_rate_(optimizer, 0.5) == 0.1


# ---- parameter groups ----


def siamese():
    """An encoder with norms of several kinds, a layer that does not learn, and a predictor."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 6), nn.LayerNorm(6))
    predictor = nn.Sequential(nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 6))
    frozen = nn.Linear(6, 6).requires_grad_(False)
    return nn.ModuleDict({"predictor": predictor, "frozen": frozen, "predictors": nn.Linear(6, 6), "encoder": encoder})


def named(module, groups):
    names = {id(p): name for name, p in module.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


def settings(groups):
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


EXCLUDED = {"weight_decay": 0.0, "adapt": False}


def test_groups_by_hand():
    module = siamese()
    groups = parameter_groups(module, constant_rate=["predictor"])
    assert named(module, groups) == [
        ["predictors.weight", "encoder.0.weight", "encoder.3.weight"],
        [
            "predictors.bias",
            "encoder.0.bias",
            "encoder.1.weight",
            "encoder.1.bias",
            "encoder.3.bias",
            "encoder.4.weight",
            "encoder.4.bias",
        ],
        ["predictor.0.weight", "predictor.2.weight"],
        ["predictor.1.weight", "predictor.1.bias", "predictor.2.bias"],
    ]
    assert settings(groups) == [{}, EXCLUDED, {"constant_rate": True}, {**EXCLUDED, "constant_rate": True}]


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("constant_rate", [(), ["predictor"], ["predictor.0", "predictor."], ["encoder"]])
def test_every_parameter_that_learns_is_in_one_group(exclude, constant_rate):
    module = siamese()
    groups = parameter_groups(module, exclude=exclude, constant_rate=constant_rate)
    learning = [name for name, p in module.named_parameters() if p.requires_grad]
    assert sorted(name for group in named(module, groups) for name in group) == sorted(learning)
    assert all(group["params"] for group in groups)
    again = siamese()
    assert named(module, groups) == named(again, parameter_groups(again, exclude=exclude, constant_rate=constant_rate))


def test_without_exclusion_or_constant_rates_the_one_group_is_the_parameters():
    module = siamese()
    (group,) = parameter_groups(module, exclude=False)
    expected = [p for p in module.parameters() if p.requires_grad]
    assert [id(p) for p in group.pop("params")] == [id(p) for p in expected]
    assert group == {}


def test_a_norm_of_any_shape_is_excluded_and_a_shared_weight_counts_once():
    module = nn.ModuleDict({"norm": nn.LayerNorm((4, 2, 2)), "a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    assert named(module, parameter_groups(module)) == [["a.weight"], ["norm.weight", "norm.bias", "a.bias", "b.bias"]]
    assert len(parameter_groups(nn.Conv2d(1, 1, 1, bias=False))) == 1
    assert settings(parameter_groups(nn.BatchNorm1d(2))) == [EXCLUDED]
    assert parameter_groups(nn.Linear(1, 1).requires_grad_(False)) == []


@pytest.mark.parametrize("argument", ["exclude_also", "constant_rate"])
@pytest.mark.parametrize("beginning", ["predicto", "frozen", "0", "", "bias"])
def test_a_beginning_that_nothing_has_is_named(beginning, argument):
    message = f"{argument}={beginning!r} begins no learned parameter's name: pass one of predictor, predictors, enc"
    with pytest.raises(ValueError, match=re.escape(message)):
        parameter_groups(siamese(), **{argument: ["predictor", beginning]})


@pytest.mark.parametrize("exclude", [True, False])
def test_other_parameters_can_be_excluded_by_name(exclude):
    module = nn.ModuleDict({"trunk": nn.Linear(3, 3), "classifier": nn.Linear(3, 2)})
    groups = parameter_groups(module, exclude=exclude, exclude_also=["classifier"])
    biases = ["trunk.bias"] if exclude else []
    kept = [] if exclude else ["trunk.bias"]
    assert named(module, groups) == [
        ["trunk.weight", *kept],
        [*biases, "classifier.weight", "classifier.bias"],
    ]
    assert settings(groups)[-1] == EXCLUDED


def test_lars_learns_a_classifier_that_starts_at_zero_only_where_it_does_not_adapt_it():
    """The ratio holds a weight near 0 to a thousandth of next to nothing: it keeps its first batch's direction."""
    torch.manual_seed(0)
    means = torch.nn.functional.normalize(torch.randn(100, 64), dim=1)

    def loss_after_training(exclude_also):
        classifier = nn.ModuleDict({"classifier": nn.Linear(64, 100, bias=False)})
        nn.init.zeros_(classifier["classifier"].weight)
        optimizer = LARS(parameter_groups(classifier, exclude_also=exclude_also), lr=0.16)
        for step in range(100):
            labels = torch.randint(100, (64,), generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(classifier["classifier"](8 * means[labels]), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert loss_after_training(["classifier"]) < 0.05
    assert loss_after_training([]) > 2  # log 100 = 4.6


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0),
    "LARS": partial(LARS, lr=0.1),
}


def train_(module, optimizer, steps=3, schedule=None):
    for step in range(steps):
        if schedule is not None:
            set_learning_rate_(optimizer, schedule(step))
        images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        features = module["encoder"](images)
        module["predictors"](module["predictor"](features)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_without_decay_the_groups_change_nothing(name):
    one, other = siamese(), siamese()
    ours = train_(one, OPTIMIZERS[name](parameter_groups(one)))
    plain = train_(other, OPTIMIZERS[name](other.parameters()))
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.usefixtures("as_a_new_process")
def test_optimizers_take_the_groups_and_accelerate_keeps_them(name):
    module = siamese()
    groups = parameter_groups(module, constant_rate=["predictor"])
    module, optimizer = Accelerator(cpu=True).prepare(module, OPTIMIZERS[name](groups))
    ours = ("adapt", "constant_rate")
    prepared = [{key: group[key] for key in group if key in ours} for group in optimizer.param_groups]
    expected = [{}, {"adapt": False}, {"constant_rate": True}, {"adapt": False, "constant_rate": True}]
    assert prepared == [({"adapt": True} if name == "LARS" else {}) | keys for keys in expected]
    assert [group["weight_decay"] for group in optimizer.param_groups][1::2] == [0, 0]
    train_(module, optimizer, schedule=lambda step: 0.5)
    base = OPTIMIZERS[name].keywords["lr"]
    assert [group["lr"] for group in optimizer.param_groups] == [base / 2, base / 2, base, base]


# ---- LARS ----

CONVENTIONS = ["simclr", "moco_v3"]


def steps_of(optimizer, weight, gradients, rates=None):
    after = []
    for i, gradient in enumerate(gradients):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[i]
        weight.grad = torch.tensor(gradient, dtype=weight.dtype).view_as(weight)
        optimizer.step()
        after.append(weight.detach().clone())
    return torch.stack(after)


def parameter(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


# w = (3, 4), and weight decay 0.5 makes the gradient (-1.5, 0) into g = (0, 2): r = 0.4 * 5 / 2 = 1, r g = (0, 2). At a
# rate of 2 both conventions step to (3, 0). There (-1.5, 1) becomes (0, 1): r = 0.4 * 3 / 1, r g = (0, 1.2).
GRADIENTS = [[-1.5, 0.0], [-1.5, 1.0]]


@pytest.mark.parametrize(
    ("convention", "rates", "second"),
    [
        ("simclr", [2, 2], -4.4),  # v = 4, then 0.5 * 4 + 2 * 1.2
        ("moco_v3", [2, 2], -4.4),  # v = 2, then 0.5 * 2 + 1.2, times 2
        ("simclr", [2, 1], -3.2),  # v = 0.5 * 4 + 1 * 1.2: the first step keeps its rate
        ("moco_v3", [2, 1], -2.2),  # v = 0.5 * 2 + 1.2, times 1
    ],
)
def test_two_steps_by_hand(convention, rates, second):
    weight = parameter(3, 4)
    optimizer = LARS([weight], lr=2, momentum=0.5, weight_decay=0.5, trust=0.4, convention=convention)
    expected = torch.tensor([[3, 0], [3, second]], dtype=torch.float64)
    torch.testing.assert_close(steps_of(optimizer, weight, GRADIENTS, rates), expected)
    assert weight.grad.tolist() == GRADIENTS[1]  # left as it was


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_nesterov_and_no_momentum_by_hand(convention):
    options = {"lr": 2, "weight_decay": 0.5, "trust": 0.4, "convention": convention}
    ahead, without = parameter(3, 4), parameter(3, 4)
    after = steps_of(LARS([ahead], momentum=0.5, nesterov=True, **options), ahead, GRADIENTS[:1])
    torch.testing.assert_close(after[0], torch.tensor([3, 4 - (0.5 * 4 + 4)], dtype=torch.float64))
    optimizer = LARS([without], momentum=0, **options)
    expected = torch.tensor([[3, 0], [3, -2.4]], dtype=torch.float64)
    torch.testing.assert_close(steps_of(optimizer, without, GRADIENTS), expected)
    assert not optimizer.state


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def trained(optimizer_of, rates):
    module = two_layers()
    optimizer = optimizer_of(module)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        module(inputs).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


CONSTANT, CHANGING = [20.0] * 6, [5.0, 10.0, 20.0, 15.0, 5.0, 1.0]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("convention", "rates"), [("simclr", CONSTANT), ("moco_v3", CONSTANT), ("moco_v3", CHANGING)])
def test_agrees_with_timm(convention, rates, nesterov):
    """timm's without weight decay, for its ratio is trust |w| / (|g| + weight_decay |w| + eps); rate after momentum."""
    ours = trained(lambda m: LARS(m.parameters(), 1.0, convention=convention, nesterov=nesterov), rates)
    options = {"momentum": 0.9, "nesterov": nesterov, "eps": 0.0, "always_adapt": True}
    timms = trained(lambda m: timm.optim.Lars(m.parameters(), 1.0, **options), rates)
    torch.testing.assert_close(ours, timms, rtol=1e-10, atol=1e-12)


def test_the_conventions_part_where_the_rate_changes():
    def difference(rates):
        one, other = (trained(lambda m, c=c: LARS(m.parameters(), 1.0, convention=c), rates) for c in CONVENTIONS)
        return (one - other).abs().max().item()

    assert difference(CONSTANT) < 1e-12
    assert difference(CHANGING) > 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("convention", "rates"), [("simclr", [0.1] * 6), ("moco_v3", [0.1, 0.02, 0.1, 0.3, 0.1, 0.01])]
)
def test_an_excluded_group_is_sgd_s(convention, rates, nesterov):
    options = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    ours = trained(
        lambda m: LARS([{"params": m.parameters(), "adapt": False}], 0.1, convention=convention, **options), rates
    )
    theirs = trained(lambda m: torch.optim.SGD(m.parameters(), 0.1, **options), rates)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_step_follows_the_weights_and_not_the_gradient():
    """At any scale of the loss a first step is lr * trust * |w| long."""
    for scale in (1e-4, 1.0, 1e4):
        weight = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
        before, optimizer = weight.detach().clone(), LARS([weight], lr=2.0, trust=0.01)
        weight.grad = scale * torch.ones_like(weight)
        optimizer.step()
        assert (weight - before).norm().item() == pytest.approx(0.02 * before.norm().item(), rel=1e-4)


@pytest.mark.parametrize(("weight", "gradient"), [([0.0, 0.0], [3.0, 4.0]), ([3.0, 4.0], [0.0, 0.0])])
def test_a_norm_of_zero_means_no_adaptation(weight, gradient):
    zero = parameter(*weight)
    after = steps_of(LARS([zero], lr=0.5), zero, [gradient])
    expected = torch.tensor([weight], dtype=torch.float64) - 0.5 * torch.tensor([gradient], dtype=torch.float64)
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_tensor_in_half_precision_has_a_norm(dtype):
    weight = nn.Parameter(torch.full((512, 512), 200, dtype=dtype))  # |w| = 102,400: fp16 ends at 65,504
    weight.grad = torch.full_like(weight, 0.1)
    LARS([weight], lr=10.0, trust=0.01).step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 180), rtol=0, atol=1)


def test_a_parameter_without_a_gradient_stands_still():
    moving, still = parameter(3, 4), parameter(3, 4)
    optimizer = LARS([moving, still], lr=1.0)
    steps_of(optimizer, moving, [[1.0, 0.0]])
    assert still.tolist() == [3, 4]
    assert list(optimizer.state) == [moving]
    moving.grad = None
    before = moving.detach().clone()
    optimizer.step()  # nothing to do, and no momentum carries it on
    assert torch.equal(moving, before)


def test_a_sparse_gradient_is_refused():
    words = nn.Embedding(4, 2, sparse=True)
    words(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient: build the embedding with sparse=False"):
        LARS(words.parameters(), lr=1.0).step()


def test_a_closure_computes_the_loss():
    weight = parameter(3, 4)
    optimizer = LARS([weight], lr=1.0)

    def loss():
        optimizer.zero_grad()
        value = weight.square().sum()
        value.backward()
        return value.item()

    assert optimizer.step(loss) == 25
    torch.testing.assert_close(weight.detach(), parameter(3, 4).detach() * (1 - 1e-3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr=-0.1: pass a learning rate of at least 0"),
        ({"momentum": 1.0}, "momentum=1.0: pass a number from 0 (none) to below 1"),
        ({"momentum": -0.5}, "momentum=-0.5: pass a number from 0 (none) to below 1"),
        ({"weight_decay": -1e-6}, "weight_decay=-1e-06: pass a number of at least 0"),
        ({"trust": 0.0}, "trust=0.0: pass a number above 0, or adapt=False in the group"),
        ({"convention": "moco"}, "convention='moco': pass one of simclr, moco_v3"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov=True needs momentum: pass a momentum above 0"),
    ],
)
def test_what_lars_cannot_take_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LARS([parameter(1, 2)], **{"lr": 1.0, **options})
    with pytest.raises(ValueError, match=re.escape(message)):
        LARS([{"params": [parameter(1, 2)], **options}], lr=1.0)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_checkpoint_gives_back_every_bit(tmp_path, convention):
    def start():
        module = siamese().to(memory_format=torch.channels_last)
        return module, LARS(parameter_groups(module, constant_rate=["predictor"]), lr=3.0, convention=convention)

    module, optimizer = start()
    train_(module, optimizer)
    saved = save_checkpoint(tmp_path, 3, {"method": module}, optimizer, {})
    resumed, its_optimizer = start()
    load_checkpoint_(saved, {"method": resumed}, its_optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    its_parameters = [p for group in its_optimizer.param_groups for p in group["params"]]
    for p, q in zip(parameters, its_parameters, strict=True):
        assert list(optimizer.state[p]) == ["momentum_buffer"]
        assert torch.equal(optimizer.state[p]["momentum_buffer"], its_optimizer.state[q]["momentum_buffer"])
    for a, b in zip(train_(module, optimizer), train_(resumed, its_optimizer), strict=True):
        assert torch.equal(a, b)


def test_lars_lowers_a_loss():
    module = siamese()
    optimizer = LARS(parameter_groups(module), lr=0.5, weight_decay=1e-6, trust=0.1)
    images = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (module["predictor"](module["encoder"](images)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- several optimizers as one ----


def halves():
    """CPC v2's two: a classifier for SGD with momentum, in two groups, and an encoder for Adam."""
    module = siamese()
    classifier = torch.optim.SGD(parameter_groups(module["predictor"]), lr=0.1, momentum=0.9, weight_decay=0.01)
    rest = [*module["encoder"].parameters(), *module["predictors"].parameters()]
    return module, [classifier, torch.optim.Adam(rest, lr=1e-2)]


def forward_and_backward(module, step):
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step))
    module["predictors"](module["predictor"](module["encoder"](images))).square().mean().backward()


def test_together_is_each_by_itself_to_the_last_bit():
    (module, both), (alone, optimizers) = halves(), halves()
    together = Together(both)
    for step in range(4):
        before = [p.detach().clone() for p in module.parameters()]
        for net in (module, alone):
            forward_and_backward(net, step)
        together.step()
        together.zero_grad()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(p, q) for p, q in zip(module.parameters(), alone.parameters(), strict=True))
        assert all(p.grad is None for p in module.parameters())
        moved = {name for (name, p), q in zip(module.named_parameters(), before, strict=True) if not torch.equal(p, q)}
        assert moved == {name for name, p in module.named_parameters() if p.requires_grad}


def test_one_rate_reaches_both():
    module, optimizers = halves()
    together = Together(optimizers)
    for factor in (0.5, 0.0, 0.25):
        assert set_learning_rate_(together, factor) == pytest.approx(0.1 * factor)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        assert rates == [pytest.approx([0.1 * factor] * 2), pytest.approx([1e-2 * factor])]
    set_learning_rate_(together, 0.0)
    before = [p.detach().clone() for p in module.parameters()]
    forward_and_backward(module, 0)
    together.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_together_goes_on_from_its_state_and_its_rates_still_reach_both():
    def train(module, together, steps):
        for step in steps:
            set_learning_rate_(together, 1 / (1 + step))
            forward_and_backward(module, step)
            together.step()
            together.zero_grad()
        return [p.detach().clone() for p in module.parameters()]

    module, optimizers = halves()
    together = Together(optimizers)
    train(module, together, range(3))
    weights, state = copy.deepcopy((module.state_dict(), together.state_dict()))
    resumed, its_optimizers = halves()
    its_together = Together(its_optimizers)
    resumed.load_state_dict(weights)
    its_together.load_state_dict(state)
    for a, b in zip(train(module, together, range(3, 6)), train(resumed, its_together, range(3, 6)), strict=True):
        assert torch.equal(a, b)
    assert [group["lr"] for optimizer in its_optimizers for group in optimizer.param_groups] == pytest.approx(
        [0.1 / 6, 0.1 / 6, 1e-2 / 6]
    )


def test_together_s_state_is_numbered_as_one_optimizer_s():
    """As checkpoints want it: by parameter, those of the second after those of the first."""
    module, optimizers = halves()
    together = Together(optimizers)
    forward_and_backward(module, 0)
    together.step()
    state = together.state_dict()
    parameters = [parameter for group in together.param_groups for parameter in group["params"]]
    assert [number for group in state["param_groups"] for number in group["params"]] == list(range(len(parameters)))
    for number, entry in state["state"].items():
        (kept,) = [name for name in entry if name in ("momentum_buffer", "exp_avg")]
        assert entry[kept].shape == parameters[number].shape
    assert sorted(state["state"]) == list(range(len(parameters)))


def test_what_together_cannot_take_is_named():
    with pytest.raises(ValueError, match=r"^0 optimizers of 0 parameters: pass some, and none twice$"):
        Together([])
    shared, own = parameter(1, 2), parameter(3)
    with pytest.raises(ValueError, match=r"^2 optimizers of 3 parameters: pass some, and none twice$"):
        Together([torch.optim.SGD([shared], 0.1), torch.optim.Adam([own, shared], 0.1)])
    together = Together([torch.optim.SGD([shared], 0.1), torch.optim.Adam([own], 0.1)])
    with pytest.raises(ValueError, match="cannot share a closure: call backward before step"):
        together.step(lambda: 0.0)
    said = r"^the state of groups of \[1\] parameters for \[1, 1\]: pass that of optimizers like these$"
    with pytest.raises(ValueError, match=said):
        together.load_state_dict(Together([torch.optim.SGD([shared], 0.1)]).state_dict())


# ---- moving averages ----


def with_statistics():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize("buffers", ["copy", "keep"])
def test_the_average_is_the_formula_and_buffers_are_copied_or_kept(buffers):
    torch.manual_seed(0)
    teacher, model = with_statistics(), with_statistics()
    model(torch.randn(5, 3))
    expected = [0.75 * t + 0.25 * m for t, m in zip(teacher.parameters(), model.parameters(), strict=True)]
    kept = [b.clone() for b in (model if buffers == "copy" else teacher).buffers()]
    ema_update_(teacher, model, 0.75, buffers=buffers)
    torch.testing.assert_close(list(teacher.parameters()), expected)
    assert [b.tolist() for b in teacher.buffers()] == [b.tolist() for b in kept]
    assert teacher[1].num_batches_tracked == (1 if buffers == "copy" else 0)


def test_buffers_are_copied_unless_told_otherwise():
    teacher, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model(torch.randn(5, 2))
    ema_update_(teacher, model, 1.0)
    assert torch.equal(teacher.running_mean, model.running_mean)
    assert teacher.num_batches_tracked == 1


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_ends_of_the_decay_are_exact(decay):
    teacher, model = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = (model if decay == 0 else teacher).weight.detach().clone()
    ema_update_(teacher, model, decay)
    assert torch.equal(teacher.weight, expected)


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_outside_0_to_1_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay is {decay}"):
        ema_update_(nn.Linear(1, 1), nn.Linear(1, 1), decay)


@pytest.mark.parametrize(
    ("teacher", "model", "message"),
    [
        (
            nn.Linear(3, 2, bias=False),
            nn.Linear(3, 2),
            "the teacher's 1 parameters are not of the shapes of the model's 2",
        ),
        (nn.Linear(3, 2), nn.Linear(3, 1), "the teacher's 2 parameters are not of the shapes of the model's 2"),
        (
            nn.BatchNorm1d(2, track_running_stats=False),
            nn.BatchNorm1d(2),
            "the teacher's 0 buffers are not of the shapes",
        ),
    ],
)
def test_a_teacher_of_another_shape_is_refused(teacher, model, message):
    before = [p.detach().clone() for p in teacher.parameters()]
    with pytest.raises(ValueError, match=re.escape(message)):
        ema_update_(teacher, model, 0.5)
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), before, strict=True))


def test_kept_buffers_need_no_counterpart():
    ema_update_(nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2), 0.5, buffers="keep")


def test_another_word_for_the_buffers_is_refused():
    with pytest.raises(ValueError, match='buffers=\'average\': pass "copy" or "keep"'):
        ema_update_(nn.Linear(1, 1), nn.Linear(1, 1), 0.5, buffers="average")


def test_a_module_without_parameters_has_nothing_to_average():
    ema_update_(nn.Identity(), nn.Identity(), 0.5)


@pytest.mark.parametrize("training", [True, False])
def test_a_teacher_is_a_copy_that_does_not_learn(training):
    model = with_statistics().train(training)
    model[0].bias.requires_grad_(False)
    teacher = teacher_of(model)
    assert teacher.training == teacher[1].training == training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    with torch.no_grad():
        model[0].weight.add_(1)
    assert not torch.equal(teacher[0].weight, model[0].weight)
    ema_update_(teacher, model, 0.0)
    assert torch.equal(teacher[0].weight, model[0].weight)


def test_a_teacher_s_statistics_are_those_of_its_own_batches():
    torch.manual_seed(0)
    model = nn.BatchNorm1d(2)
    teacher, batch = teacher_of(model), torch.randn(8, 2) * 3 + 5
    teacher(batch)
    model(-batch)
    ema_update_(teacher, model, 0.9, buffers="keep")
    torch.testing.assert_close(teacher.running_mean, 0.1 * batch.mean(0))


def test_the_teacher_s_momentum_rises_to_1():
    assert cosine_momentum(0.0, 0.996) == pytest.approx(0.996)
    assert cosine_momentum(0.5, 0.99) == pytest.approx(0.995)
    assert cosine_momentum(1.0, 0.97) == pytest.approx(1)
    assert cosine_momentum(0.25, 0.0) == pytest.approx(1 - (math.sqrt(0.5) + 1) / 2)
    values = [cosine_momentum(i / 20, 0.9) for i in range(21)]
    assert values == sorted(values)


def test_polyak_decay_forgets_a_random_start():
    assert polyak_decay(0) == 0.1
    assert polyak_decay(89_989) < 0.9999 == polyak_decay(89_991) == polyak_decay(10**9)
    weight_of_the_start = math.prod(polyak_decay(step) for step in range(200))
    assert weight_of_the_start < 1e-6
    assert polyak_decay(1000, decay=0.9) == 0.9
