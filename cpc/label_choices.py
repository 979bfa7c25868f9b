"""Which labels the cells of a sweep learn from: drawn, amount by amount and seed by seed, or as others list them.

All of a choice's images can be decoded. Only those that some choice holds are looked at, since at ImageNet's size a
hundredth of the labels would else begin with a million images that nobody asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from contrastive_core.data import (
    BadImages,
    ImageDataset,
    LabelAmount,
    LabelList,
    LabelSplit,
    Splits,
    decodable_rows,
    split_digest,
)

Choices = Mapping[tuple[LabelAmount | LabelList, int], LabelSplit]
"""The labels of every amount and seed; of lists of as many labels each has a seed of its own."""


def check_classes(splits: Splits) -> None:
    """Raise ValueError where training has no image of a class, or test has a class more. All images are labelled."""
    assert splits.test is not None
    train, test = splits.train, splits.test
    classes = len(train.labels.unique())
    if int(train.labels.max()) != classes - 1:
        empty = sorted(set(range(train.classes)) - set(train.labels.tolist()))
        raise ValueError(f"no training image has a label of class {empty[0]}: number the classes that there are from 0")
    if int(test.labels.max()) >= classes:
        raise ValueError(f"test images have classes up to {int(test.labels.max())}, there are {classes} to learn")


def drawn_choices(
    amounts: Sequence[LabelAmount],
    labels: Tensor,
    ids: Tensor,
    *,
    draws: int,
    few: float,
    draws_above: int,
    of: Tensor | None = None,
) -> Choices:
    """What every amount and seed choose: `draws` choices up to the share `few` of the labels, `draws_above` above it.

    Seeds that choose the same images, as all do where an amount is of all labels, are one choice.

    Args:
        labels, ids: `n` int64, of all training images; -1 = none.
        of: `n` int64, the labels before some were lost, of which shares are: what an amount chooses is then the same
            beside whatever others. None = `labels`.
    """
    choices: dict[tuple[LabelAmount | LabelList, int], LabelSplit] = {}
    whole = labels if of is None else of
    labelled = whole[whole >= 0]
    for amount in amounts:
        count = len(amount.choose(labels, ids=ids, of=of))
        others = [str(other) for other, _ in choices if len(choices[other, 0].indices) == count]
        if others:
            raise ValueError(f"{amount} and {others[0]} are {count} labels both: leave one of them out")
        # a share of every class is rounded, so that its sum may be a little more
        for seed in range(draws if count <= few * len(labelled) + len(labelled.unique()) / 2 else draws_above):
            indices = amount.choose(labels, seed=seed, ids=ids, of=of)
            split = LabelSplit(indices, split_digest(ids, labels, indices))
            if split.digest not in {other.digest for other in choices.values()}:
                choices[amount, seed] = split
    return choices


def listed_choices(listed: Mapping[LabelList, Tensor], labels: Tensor, ids: Tensor) -> Choices:
    """What lists name, those without a label left out; lists of as many labels are several choices of that number.

    Args: `listed`: `labels_listed` of each. `labels`, `ids`: as `drawn_choices`.

    Raises ValueError for a list without a class that there is, which would make a curve from scratch fall for no other
    reason, and for two of one name, or of the same images.
    """
    choices: dict[tuple[LabelAmount | LabelList, int], LabelSplit] = {}
    of_as_many: Counter[int] = Counter()
    for names, indices in listed.items():
        if str(names) in {str(other) for other, _ in choices}:
            raise ValueError(f"{names} twice: give each list a file name of its own")
        chosen = indices[labels[indices] >= 0]
        split = LabelSplit(chosen, split_digest(ids, labels, chosen))
        same = [other for (other, _), before in choices.items() if before.digest == split.digest]
        if same:
            raise ValueError(f"{names} and {same[0]} name the same images: pass each list once")
        lacking = sorted(set(labels[labels >= 0].tolist()) - set(labels[chosen].tolist()))
        if lacking:
            raise ValueError(f"{names} has no image of class {lacking[0]}: pass lists that have all classes")
        choices[names, of_as_many[len(chosen)]] = split
        of_as_many[len(chosen)] += 1
    return choices


def decodable_choices(
    choose: Callable[[Tensor], Choices], train: ImageDataset, bad_images: BadImages, workers: int
) -> Choices:
    """What `choose` makes of the labels `n` of the images that can be decoded.

    A chosen image that cannot be loses its label (-1), and all is chosen again, so that the next of its class takes its
    place. Images that nobody chooses are not looked at.

    Raises ValueError where a class has no image left, TooManyBadImages above the accepted share.
    """
    labels = train.labels.clone()
    looked_at = torch.zeros(len(labels), dtype=torch.bool)
    while True:
        choices = choose(labels)
        used = used_by(choices)
        unknown = used[~looked_at[used]]
        if not len(unknown):
            return choices
        looked_at[unknown] = True
        good = decodable_rows(train, bad_images, workers, at=unknown)
        labels[unknown[~torch.isin(unknown, good)]] = -1
        gone = set(train.labels.tolist()) - set(labels.tolist())
        if gone:
            raise ValueError(f"no training image of class {min(gone)} can be decoded: mend the data or leave it out")


def used_by(choices: Choices) -> Tensor:
    """The training images that some choice holds: sorted indices, int64."""
    return torch.cat([choice.indices for choice in choices.values()]).unique()
