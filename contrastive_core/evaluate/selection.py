"""Choosing settings with few labels, and with nothing else: no test image and no other label has a say.

The labels themselves are parted. From A_CLASS_FOR_A_PART labels a class up a fifth of them is held out once; with fewer
every label is held out in turn (stratified folds). The only label of a class is never held out; where every class has
but one there is nothing to judge by, and the settings are to be fixed beforehand, on other data. Whatever is chosen is
fitted again to all labels: those held out count as labels.

Settings are tried by successive halving (Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and
Hyperparameter Optimization"): all of them for a small share of the steps, the better half for more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from contrastive_core.randomness import Randomness

A_CLASS_FOR_A_PART = 20
HELD_OUT = 5
"""One of so many labels of each class is held out, where there are enough for a part."""
FOLDS = 3
"""At most: more would judge a little better, and take as many more trainings."""
SHARES = (0.25, 0.5, 1.0)
"""Of the steps, for all settings, for half of them and for a quarter."""

Setting = TypeVar("Setting")


class Part(NamedTuple):
    """Places among the few labels: those to `fit`, and those `held` out to judge by; sorted int64."""

    fit: Tensor
    held: Tensor


def selection_parts(labels: Tensor, *, seed: int = 0, ids: Tensor | None = None) -> list[Part]:
    """How few labels are parted for choosing settings: one part, folds, or nothing where each class has one label.

    Args:
        labels: `n` int64 from 0, of the images that may be used.
        seed: of the parting; it has no part in which labels these are.
        ids: `n` int64, the images' identities (`contrastive_core.data.sample_ids`); None = their places.

    Every part holds every class of several labels on both sides, of which the rarest decides between a part and folds;
    the only label of a class is always among those to fit.

    Raises ValueError for labels of another shape, none, or one below 0.

    Example: of 2 labels a class there are two folds; of 40 a class, one part that holds out 8 of each.
    """
    if labels.dim() != 1 or not len(labels) or labels.is_floating_point() or int(labels.min()) < 0:
        raise ValueError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}: pass `n` integers from 0")
    of_its_class = labels.bincount()[labels]
    several = of_its_class > 1
    if not several.any():
        return []
    rarest = int(of_its_class[several].min())
    rank = _rank_in_class(labels, seed, ids)
    if rarest >= A_CLASS_FOR_A_PART:
        return [_part(several & (rank % HELD_OUT == 0))]
    folds = min(FOLDS, rarest)
    return [_part(several & (rank % folds == fold)) for fold in range(folds)]


def _rank_in_class(labels: Tensor, seed: int, ids: Tensor | None) -> Tensor:
    """Each label's place in a random order of its class, from 0."""
    order = Randomness(seed, 0, torch.arange(len(labels)) if ids is None else ids).integers("selection", 1 << 62)
    rank = torch.empty_like(labels)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rank[rows[order[rows].argsort(stable=True)]] = torch.arange(len(rows))
    return rank


def _part(held: Tensor) -> Part:
    return Part((~held).nonzero().flatten(), held.nonzero().flatten())


def successive_halving(
    settings: Sequence[Setting], score: Callable[[Setting, float], float], *, shares: Sequence[float] = SHARES
) -> Setting:
    """The setting that scores highest, of those that were among the better half each time before.

    Args:
        settings: to choose from, at least one; of equals the first is kept.
        score: `score(setting, share)` tries a setting for a share of the steps; higher is better, NaN is worst.
        shares: rising, at most 1. For few settings the first ones are left out: of eight or fewer, the last choice is
            between two or less that have had the last share.

    Raises ValueError for no settings, and shares that do not rise up to 1 at most.

    Example: 8 settings are tried for a quarter of the steps, 4 for half, and 2 for all of them: 6 whole trials.
    """
    if not settings or list(shares) != sorted(set(shares)) or not shares or not 0 < shares[0] <= shares[-1] <= 1:
        raise ValueError(f"{len(settings)} settings, shares {list(shares)}: pass settings, and shares that rise to 1")
    left = list(settings)
    halvings = (len(left) - 1).bit_length()  # that leave one
    for share in shares[-halvings:] if halvings else ():
        scores = [score(setting, share) for setting in left]
        best = sorted(range(len(left)), key=lambda place: math.inf if math.isnan(scores[place]) else -scores[place])
        most = 1 if share == shares[-1] else -(-len(left) // 2)
        left = [left[place] for place in sorted(best[:most])]
    return left[0]


class Rows(NamedTuple):
    """Some images of a data set's training or test part: `part` is "train" or "test", `indices` `n` int64."""

    part: str
    indices: Tensor


class LabelProtocol(Protocol[Setting]):
    """A way of using few labels: frozen features and a probe, fine-tuning, training from scratch.

    settings: what it may be tried with; the first is the one that was fixed beforehand, on other data.
    """

    settings: Sequence[Setting]

    def cost(self, labels: int) -> float:
        """How much work a whole trial with so many labels is, above 0, in a unit of its own; plans go by it."""
        ...

    def predict(self, fit: Tensor, at: Rows, setting: Setting, share: float, seed: int) -> Tensor:
        """The class that each image of `at` is given after learning from training images `fit` and their labels.

        share: of the optimizer steps, above 0 and at most 1; what has no steps does not look at it.
        """
        ...


def choose_setting(
    protocol: LabelProtocol[Setting], chosen: Tensor, labels: Tensor, *, seed: int, ids: Tensor | None = None
) -> Setting:
    """The setting of a protocol that does best among the chosen labels themselves.

    Args:
        chosen: `m` int64, the training images whose labels may be used.
        labels: `n` int64, of all training images; no others than those chosen are looked at.
        seed: of the parting, and of every trial.
        ids: `n` int64, the images' identities; None = their indices.

    With one label of every class there is nothing to judge by: the first setting, which was fixed beforehand. A setting
    whose training diverges (FloatingPointError) is worst.

    Example: of one setting, that one, without a trial.
    """
    if len(protocol.settings) == 1:
        return protocol.settings[0]
    parts = selection_parts(labels[chosen], seed=seed, ids=chosen if ids is None else ids[chosen])
    if not parts:
        return protocol.settings[0]

    def score(setting: Setting, share: float) -> float:
        right = 0
        for part in parts:
            held = chosen[part.held]
            try:
                predictions = protocol.predict(chosen[part.fit], Rows("train", held), setting, share, seed)
            except FloatingPointError:
                return math.nan
            right += int((predictions == labels[held]).sum())
        return right / sum(len(part.held) for part in parts)

    return successive_halving(protocol.settings, score)


def whole_trials(settings: int, folds: int, shares: Sequence[float] = SHARES) -> float:
    """How many whole trainings `choose_setting` and the last fit to all labels take.

    Args: `settings`: how many; `folds`: 1 for one held-out part, 0 where every class has one label.

    Example: one setting takes 1; two settings judged in three folds take 7.
    """
    tried: list[float] = []

    def score(setting: int, share: float) -> float:
        tried.append(share)
        return 0.0

    if folds and settings > 1:
        successive_halving(range(settings), score, shares=shares)
    return folds * sum(tried) + 1
