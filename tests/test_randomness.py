"""Random numbers as data: the same address, the same number; another address, an unrelated one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from contrastive_core.augment import Parts
from contrastive_core.randomness import _GOLDEN, Randomness, mix64

PLACES = torch.arange(64)


def test_the_mixer_is_splitmix64s() -> None:
    """The published test vector: the first outputs of SplitMix64 from the seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    outputs = mix64(1234567 + torch.arange(1, 5) * _GOLDEN)
    assert [output % 2**64 for output in outputs.tolist()] == expected


def test_the_same_address_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    used, fresh = Randomness(3, 5, PLACES), Randomness(3, 5, PLACES)
    used.uniform("other", 7)
    used.normal("crop", 3)
    assert torch.equal(used.uniform("crop", 2), fresh.uniform("crop", 2))
    assert torch.equal(used.uniform("crop", 2), used.uniform("crop", 2))


def test_numbers_do_not_depend_on_the_rest_of_the_batch() -> None:
    places = torch.tensor([41, 3, 17])
    for method in ("uniform", "normal"):
        whole = getattr(Randomness(3, 5, PLACES), method)("crop", 4)
        assert torch.equal(getattr(Randomness(3, 5, places), method)("crop", 4), whole[places])


def test_more_numbers_of_a_stream_begin_with_the_fewer() -> None:
    randomness = Randomness(3, 5, PLACES)
    assert torch.equal(randomness.uniform("crop", 8)[:, :3], randomness.uniform("crop", 3))


@pytest.mark.parametrize(
    "other",
    [
        Randomness(4, 5, PLACES),
        Randomness(-3, 5, PLACES),
        Randomness(3, 6, PLACES),
        Randomness(3, 5, PLACES + 64),
        Randomness(3, 5, PLACES + 2**40),
        Randomness(3 + 2**40, 5, PLACES),
    ],
    ids=["seed", "negative seed", "step", "place", "far place", "large seed"],
)
def test_another_address_gives_unrelated_numbers(other: Randomness) -> None:
    ours, theirs = Randomness(3, 5, PLACES).uniform("crop", 64).flatten(), other.uniform("crop", 64).flatten()
    assert (ours == theirs).float().mean() < 0.001
    assert abs(np.corrcoef(ours, theirs)[0, 1]) < 5 / 64  # five standard errors of 64 * 64 pairs


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**64 - 1, -1, -(2**63)])
def test_every_64_bit_seed_works(seed: int) -> None:
    u = Randomness(seed, 0, PLACES).uniform("crop", 256)
    assert abs(u.mean() - 0.5) < 5 * 12**-0.5 / 128


def test_a_stream_is_its_name() -> None:
    randomness = Randomness(0, 0, PLACES)
    streams = torch.stack([randomness.uniform(name, 512).flatten() for name in ("flip", "crop", "crop/x", "crop/y")])
    correlation = torch.corrcoef(streams) - torch.eye(4)
    assert correlation.abs().max() < 5 / streams.shape[1] ** 0.5


@pytest.mark.parametrize(
    ("seed", "step", "places", "draws"),
    [
        (0, 0, torch.arange(1), 65536),
        (0, 0, torch.arange(65536), 1),
        (-7, 10**6, torch.arange(256) * 1024, 256),
    ],
    ids=["along the counter", "along the places", "strided places"],
)
def test_uniform_numbers_are_uniform(seed: int, step: int, places: torch.Tensor, draws: int) -> None:
    u = Randomness(seed, step, places).uniform("crop", draws).flatten()
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.chisquare(torch.histc(u, 256, 0, 1).numpy()).pvalue > 1e-3
    # neighbours too: a 16 x 16 table of each number and the next
    table = torch.histc((u[:-1] * 16).floor() * 16 + (u[1:] * 16).floor(), 256, 0, 256)
    assert stats.chisquare(table.numpy()).pvalue > 1e-3


def test_numbers_of_successive_steps_are_uniform() -> None:
    u = torch.cat([Randomness(0, step, torch.tensor([7])).uniform("crop", 4) for step in range(4096)]).flatten()
    assert stats.chisquare(torch.histc(u, 64, 0, 1).numpy()).pvalue > 1e-3


def test_the_range_is_the_one_asked_for() -> None:
    u = Randomness(0, 0, PLACES).uniform("crop", 256, low=-3.0, high=5.0)
    assert -3 <= u.min() < -2.99
    assert 4.99 < u.max() <= 5


def test_normal_numbers_are_normal() -> None:
    assert stats.kstest(Randomness(0, 0, PLACES).normal("noise", 512).flatten().numpy(), "norm").pvalue > 1e-3


def test_integers_are_uniform() -> None:
    k = Randomness(0, 0, PLACES).integers("operation", 15, 512).flatten()
    assert k.dtype == torch.int64
    assert stats.chisquare(torch.bincount(k, minlength=15).numpy()).pvalue > 1e-3


def test_bernoulli_keeps_its_probability() -> None:
    randomness = Randomness(0, 0, PLACES)
    hits = int(randomness.bernoulli("flip", 0.2, 512).sum())
    assert stats.binomtest(hits, 64 * 512, 0.2).pvalue > 1e-3
    assert not randomness.bernoulli("flip", 0.0, 512).any()
    assert randomness.bernoulli("flip", 1.0, 512).all()


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before, u = torch.get_rng_state(), Randomness(0, 0, PLACES).normal("noise", 3)
    torch.manual_seed(1)
    assert torch.equal(u, Randomness(0, 0, PLACES).normal("noise", 3))
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())


def test_parts_follow_their_image() -> None:
    whole = Parts(Randomness(3, 5, PLACES), 36)
    alone = Parts(Randomness(3, 5, torch.tensor([41])), 36)
    assert whole.uniform("crop", 2).shape == (64 * 36, 2)
    assert whole.bernoulli("crop", 0.5).shape == (64 * 36,)
    assert torch.equal(alone.uniform("crop", 2), whole.uniform("crop", 2)[41 * 36 : 42 * 36])
    assert torch.equal(alone.integers("crop", 9), whole.integers("crop", 9)[41 * 36 : 42 * 36])


def test_a_part_never_repeats_its_image_or_another_part() -> None:
    randomness = Randomness(3, 5, PLACES)
    numbers = [
        randomness.uniform("crop", 36),
        Parts(randomness, 36).uniform("crop").view(64, 36),
        Parts(randomness, 36, "crops").uniform("crop").view(64, 36),
    ]
    correlation = torch.corrcoef(torch.stack([each.flatten() for each in numbers])) - torch.eye(3)
    assert correlation.abs().max() < 5 / (64 * 36) ** 0.5
    between_parts = torch.corrcoef(Parts(Randomness(3, 5, torch.arange(4096)), 6).uniform("crop").view(-1, 6).T)
    assert (between_parts - torch.eye(6)).abs().max() < 5 / 64


def test_an_image_has_parts() -> None:
    with pytest.raises(ValueError, match="at least one part, got count=0"):
        Parts(Randomness(0, 0, PLACES), 0)
