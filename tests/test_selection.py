"""Settings are chosen with the few labels alone, evenly, and by no more trials than were promised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contrastive_core.evaluate.selection import (
    Rows,
    choose_setting,
    selection_parts,
    successive_halving,
    whole_trials,
)


def labels_of(*counts: int) -> torch.Tensor:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("counts", "held"),
    [
        ((1, 1, 1), []),
        ((1, 5), [2, 2, 1]),
        ((1, 2, 1), [1, 1]),
        ((1, 20), [4]),
        ((2, 2), [2, 2]),
        ((2, 9), [1 + 5, 1 + 4]),
        ((3, 3), [2, 2, 2]),
        ((4, 9), [2 + 3, 1 + 3, 1 + 3]),
        ((10, 10), [8, 6, 6]),
        ((19, 19), [14, 12, 12]),
        ((19, 90), [7 + 30, 6 + 30, 6 + 30]),
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
        assert set(labels[fit].tolist()) == set(range(len(counts)))
        assert set(labels[out].tolist()) == {label for label, count in enumerate(counts) if count > 1}


def test_one_image_of_a_rare_class_does_not_keep_the_others_from_choosing():
    labels = labels_of(1, 9, 9)
    (alone,) = (labels == 0).nonzero().flatten().tolist()
    assert all(alone in part.fit.tolist() for part in selection_parts(labels))


@given(counts=st.lists(st.integers(2, 30), min_size=2, max_size=5), seed=st.integers(0, 9))
def test_folds_hold_every_label_out_once_and_every_class_in_its_share(counts, seed):
    labels = labels_of(*counts)
    parts = selection_parts(labels, seed=seed)
    assert len(parts) == (1 if min(counts) >= 20 else min(3, *counts))
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


# ---- a protocol's setting, chosen with the chosen labels alone ----


class Recording:
    """A protocol whose settings are the shares of the images that they get right; it writes down what it is asked."""

    def __init__(self, labels: torch.Tensor, settings: list[float]) -> None:
        self.labels, self.settings = labels, settings
        self.asked: list[tuple[list[int], list[int], float, float, int]] = []
        self.parts: set[str] = set()

    def predict(self, fit: torch.Tensor, at: Rows, setting: float, share: float, seed: int) -> torch.Tensor:
        self.parts.add(at.part)
        self.asked.append((fit.tolist(), at.indices.tolist(), setting, share, seed))
        wrong = torch.arange(len(at.indices)) >= round(setting * len(at.indices))
        return self.labels[at.indices] + wrong.long()


def training_labels(classes: int = 3, a_class: int = 60) -> torch.Tensor:
    return torch.arange(classes).repeat(a_class)


def chosen_of(labels: torch.Tensor, count: int, seed: int = 1) -> torch.Tensor:
    """`count` of each class, sorted as `labels_per_class` has them, and seldom at the beginning."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == label][:count] for label in labels.unique()]).sort().values


@pytest.mark.parametrize("count", [2, 3, 10, 20, 40])
def test_trials_are_of_the_chosen_training_images_and_none_else(count):
    labels = training_labels()
    chosen = chosen_of(labels, count)
    protocol = Recording(labels, [0.1, 0.9, 0.5, 0.3])
    assert choose_setting(protocol, chosen, labels, seed=7) == 0.9
    assert protocol.parts == {"train"}
    for fit, held, _, _, seed in protocol.asked:
        assert sorted([*fit, *held]) == chosen.tolist(), "apart, and all of them"
        assert set(labels[fit].tolist()) == set(labels[held].tolist()) == {0, 1, 2}
        assert seed == 7


@pytest.mark.parametrize("count", [3, 20])
def test_labels_that_were_not_chosen_are_not_looked_at(count):
    labels = training_labels()
    chosen, asked = chosen_of(labels, count), []
    for hidden in (0, -1, 99):
        known = torch.full_like(labels, hidden)
        known[chosen] = labels[chosen]
        protocol = Recording(labels, [0.2, 0.7])
        assert choose_setting(protocol, chosen, known, seed=0) == 0.7
        asked.append(protocol.asked)
    assert asked[0] == asked[1] == asked[2]


@pytest.mark.parametrize("best", range(5))
@pytest.mark.parametrize("count", [2, 5, 20])
def test_the_best_setting_wins_wherever_it_stands(best, count):
    labels, settings = training_labels(), [0.1, 0.3, 0.2, 0.4, 0.5]
    settings[best] = 0.95
    assert choose_setting(Recording(labels, settings), chosen_of(labels, count), labels, seed=0) == 0.95


@pytest.mark.parametrize(("settings", "count"), [([0.4], 10), ([0.4], 1), ([0.1, 0.9], 1), ([0.1, 0.9, 0.5], 1)])
def test_where_there_is_nothing_to_choose_or_to_judge_by_it_is_the_first_without_a_trial(settings, count):
    labels = training_labels()
    protocol = Recording(labels, settings)
    assert choose_setting(protocol, chosen_of(labels, count), labels, seed=0) == settings[0]
    assert protocol.asked == []


@pytest.mark.parametrize("count", [2, 5])
def test_the_seed_parts_the_labels(count):
    labels, asked = training_labels(), []
    for seed in (0, 0, 1):
        protocol = Recording(labels, [0.1, 0.9])
        choose_setting(protocol, chosen_of(labels, count), labels, seed=seed)
        asked.append([held for _, held, *_ in protocol.asked])
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize("settings", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 12, 20, 40])
def test_the_cost_that_is_told_is_the_cost(settings, count):
    labels = training_labels()
    chosen = chosen_of(labels, count)
    protocol = Recording(labels, [place / 20 for place in range(settings)])
    choose_setting(protocol, chosen, labels, seed=0)
    folds = len(selection_parts(labels[chosen]))
    assert whole_trials(settings, folds) == pytest.approx(sum(share for *_, share, _ in protocol.asked) + 1)


@pytest.mark.parametrize(
    ("settings", "folds", "trials"),
    [(1, 3, 1), (2, 3, 7), (2, 1, 3), (5, 0, 1), (3, 2, 2 * 3.5 + 1), (8, 3, 3 * 6 + 1), (16, 1, 4 + 4 + 4 + 1)],
)
def test_costs_by_hand(settings, folds, trials):
    assert whole_trials(settings, folds) == trials


def test_a_shuffled_copy_chooses_alike_and_tries_the_same_images():
    """Who an image is decides, not where it stands: so the same labels give the same setting after a re-ordering."""

    class ByIdentity(Recording):
        """Right or wrong by the image's identity, and by which images were learned from."""

        def __init__(self, labels: torch.Tensor, ids: torch.Tensor) -> None:
            super().__init__(labels, [3, 5, 7, 11])
            self.ids = ids

        def predict(self, fit: torch.Tensor, at: Rows, setting: float, share: float, seed: int) -> torch.Tensor:
            fitted, held = (self.ids[rows] for rows in (fit, at.indices))
            self.asked.append((sorted(fitted.tolist()), sorted(held.tolist()), setting, share, seed))
            return self.labels[at.indices] + ((held + fitted.sum()) % int(setting) > 1)

    labels, generator = training_labels(), torch.Generator().manual_seed(5)
    ids = torch.randint(1 << 40, (len(labels),), generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    back = order.argsort()
    for count in (2, 6, 25):
        chosen = chosen_of(labels, count)
        one, other = ByIdentity(labels, ids), ByIdentity(labels[order], ids[order])
        first = choose_setting(one, chosen, labels, seed=2, ids=ids)
        again = choose_setting(other, back[chosen].sort().values, labels[order], seed=2, ids=ids[order])
        assert first == again
        assert one.asked == other.asked


def test_a_setting_that_diverges_in_one_fold_is_worst():
    class Diverges:
        settings = ("bad", "worse than nothing")

        def predict(self, fit, at, setting, share, seed):
            if setting == "bad" and 0 in at.indices:
                raise FloatingPointError
            return torch.full((len(at.indices),), 9 if setting != "bad" else 0)

    labels = torch.arange(2).repeat(5)
    assert choose_setting(Diverges(), torch.arange(10), labels, seed=0) == "worse than nothing"
