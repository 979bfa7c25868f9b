"""Settings are chosen with the few labels alone, evenly, and by no more trials than were promised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contrastive_core.evaluate.selection import selection_parts, successive_halving


def labels_of(*counts: int) -> torch.Tensor:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("counts", "held"),
    [
        ((1, 1, 1), []),
        ((1, 5), []),
        ((2, 2), [2, 2]),
        ((4, 9), [1 + 3, 1 + 2, 1 + 2, 1 + 2]),
        ((10, 10), [4, 4, 4, 4, 4]),
        ((19, 19), [8, 8, 8, 8, 6]),
        ((20, 20), [8]),
        ((20, 40), [12]),
        ((40, 40), [16]),
    ],
)
def test_how_labels_are_parted(counts, held):
    labels = labels_of(*counts)
    parts = selection_parts(labels)
    assert [len(part.held) for part in parts] == held
    for fit, out in parts:
        assert sorted([*fit.tolist(), *out.tolist()]) == list(range(len(labels)))
        assert set(labels[fit].tolist()) == set(labels[out].tolist()) == set(range(len(counts)))


@given(counts=st.lists(st.integers(2, 30), min_size=2, max_size=5), seed=st.integers(0, 9))
def test_folds_hold_every_label_out_once_and_every_class_in_its_share(counts, seed):
    labels = labels_of(*counts)
    parts = selection_parts(labels, seed=seed)
    for part in parts:
        for label, count in enumerate(counts):
            assert abs(int((labels[part.held] == label).sum()) - count / (5 if len(parts) == 1 else len(parts))) < 1
    if len(parts) > 1:
        assert torch.cat([part.held for part in parts]).sort().values.tolist() == list(range(len(labels)))


def test_the_seed_decides_and_nothing_else():
    labels = labels_of(9, 9)
    first, again, other = (selection_parts(labels, seed=seed)[0].held.tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("labels", [[], [[0, 1]], [0.0, 1.0], [0, -1]])
def test_labels_that_are_none_are_refused(labels):
    with pytest.raises(ValueError, match="pass `n` integers from 0"):
        selection_parts(torch.tensor(labels))


def test_halving_finds_the_best_and_tries_the_rest_for_less():
    tried = []

    def score(setting, share):
        tried.append((setting, share))
        return -abs(setting - 5)

    assert successive_halving(range(8), score) == 5
    shares = [share for _, share in tried]
    assert [shares.count(share) for share in (0.25, 0.5, 1.0)] == [8, 4, 2]
    assert [setting for setting, share in tried if share == 0.5] == [3, 4, 5, 6]


def test_a_late_bloomer_is_lost_and_a_good_half_is_not():
    """What halving promises and what it does not: the score at each share decides."""
    early = {"late": 0.1, "steady": 0.5, "poor": 0.0, "fair": 0.4}
    whole = early | {"late": 0.9}
    scores = {0.5: early, 1.0: whole}
    assert successive_halving(list(early), lambda setting, share: scores[share][setting]) == "steady"
    assert successive_halving(["late", "steady"], lambda setting, share: scores[share][setting]) == "late"


@pytest.mark.parametrize(
    ("count", "trials"), [(1, []), (2, [2]), (3, [3, 2]), (4, [4, 2]), (5, [5, 3, 2]), (6, [6, 3, 2]), (16, [16, 8, 4])]
)
def test_few_settings_take_few_trials(count, trials):
    shares: list[float] = []

    def score(setting, share):
        shares.append(share)
        return float(setting)

    assert successive_halving(range(count), score) == count - 1
    assert [shares.count(share) for share in (0.25, 0.5, 1.0) if share in shares] == trials
    assert not trials or shares[-1] == 1.0, "the last choice is by whole trials"


def test_a_score_that_is_no_number_never_wins():
    for scores in ([math.nan, 0.9, 0.1, 0.2], [0.1, math.nan, 0.9, 0.2], [0.0, 0.2, 0.9, math.nan]):
        assert successive_halving(range(4), lambda place, share, scores=scores: scores[place]) == scores.index(0.9)


def test_a_shuffled_copy_is_parted_alike():
    labels, ids = labels_of(9, 9), torch.randperm(18, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(2))
    one = selection_parts(labels, ids=ids)[0].held
    other = selection_parts(labels[order], ids=ids[order])[0].held
    assert set(ids[one].tolist()) == set(ids[order][other].tolist())


def test_of_equals_the_first():
    assert successive_halving("abcd", lambda setting, share: 0.0) == "a"


@pytest.mark.parametrize(
    ("settings", "shares"), [([], (1.0,)), ("ab", ()), ("ab", (0.5, 0.25)), ("ab", (0.5, 1.5)), ("ab", (0.0, 1.0))]
)
def test_what_cannot_be_halved_is_refused(settings, shares):
    with pytest.raises(ValueError, match="shares that rise to 1"):
        successive_halving(settings, lambda setting, share: 0.0, shares=shares)
