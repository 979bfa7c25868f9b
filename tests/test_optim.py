"""Learning rates and moving averages: closed forms."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from contrastive_core.momentum import ema_update_, polyak_decay
from contrastive_core.optim import constant, set_learning_rate_, warmup_cosine


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


def test_every_group_keeps_its_own_base_rate():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for factor in (0.0, 0.5, 0.25):  # from the base rate each time, not from the last one
        assert set_learning_rate_(optimizer, factor) == pytest.approx(0.1 * factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.02 * factor])


def test_the_average_is_the_formula_and_buffers_are_copied():
    torch.manual_seed(0)
    teacher, model = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    model(torch.randn(5, 3))
    expected = [0.75 * t + 0.25 * m for t, m in zip(teacher.parameters(), model.parameters(), strict=True)]
    ema_update_(teacher, model, 0.75)
    torch.testing.assert_close(list(teacher.parameters()), expected)
    assert torch.equal(teacher[1].running_mean, model[1].running_mean)
    assert teacher[1].num_batches_tracked == 1


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


def test_polyak_decay_forgets_a_random_start():
    assert polyak_decay(0) == 0.1
    assert polyak_decay(89_989) < 0.9999 == polyak_decay(89_991) == polyak_decay(10**9)
    weight_of_the_start = math.prod(polyak_decay(step) for step in range(200))
    assert weight_of_the_start < 1e-6
    assert polyak_decay(1000, decay=0.9) == 0.9
