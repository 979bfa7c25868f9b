"""A few labels of many: nested choices, so that the images with 1 % of the labels are among those with 2 %.

Each image has a place in the order of its class by a random number of its own, a function of (seed, identity) alone,
where its identity is what `sample_ids` gives, or else its index. So a curve over fractions adds images and exchanges
none, every class is there at every point of it, and an image's place does not change when others gain or lose their
labels. `labels_listed` reads a choice that others have made.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_core.data.images import ImageDataset
from contrastive_core.randomness import Randomness

LISTED = "label_list"
"""What the labels of a list are called, as "fraction" and "labels" are those that were drawn."""

_A_LIST = "pass a list of this data set's file names, one a line"


def label_fraction(
    labels: Tensor, fraction: float, *, seed: int = 0, ids: Tensor | None = None, of: Tensor | None = None
) -> Tensor:
    """The images that keep their labels when a share of them is kept: sorted indices, int64.

    Of a class of n images round(fraction n) are taken, and at least one. Rounded and not up, since a curve over few
    labels would otherwise be drawn with more than it says: at 1 % of 120 images a class, up is twice as many.

    Args:
        labels: `n` integers, -1 = unlabelled.
        fraction: of the labelled images, above 0 and at most 1.
        seed: other seeds take other images; any integer.
        ids: `n` int64, the images' identities, as `sample_ids` gives them; None = their indices.
        of: `n` integers, the labels that it is a share of, where some images have lost theirs since; None = `labels`.

    Raises ValueError for a fraction out of range, no labels, and fewer than one label a class to be had.

    Example: at 1.0, all labelled images; of `[0, 0, 1, 1, -1]` at 0.5, one image a class.
    """
    whole = _rows_by_class(labels if of is None else of)
    classes = [rows[labels[rows] >= 0] for rows in whole]
    labelled = sum(map(len, whole))
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction}: pass a share of the labelled images above 0 and at most 1")
    if round(fraction * labelled, 6) < len(classes):  # 0.29 * 100 is less than 29
        raise ValueError(
            f"fraction {fraction} of {labelled} labelled images is less than one for each of {len(classes)} classes: "
            f"pass at least {math.ceil(len(classes) / labelled * 1e4) / 1e4:g}, or labels_per_class=1"
        )
    return _first(classes, [max(1, round(fraction * len(rows))) for rows in whole], seed, ids)


def labels_per_class(labels: Tensor, count: int, *, seed: int = 0, ids: Tensor | None = None) -> Tensor:
    """`count` images of each class: sorted indices, `classes * count` int64.

    Args: as `label_fraction`'s, whose order this is: a smaller choice lies inside a larger one of either kind.

    Raises ValueError where there are no labels, and for a count below 1 or above the number of the rarest class.

    Example: of `[0, 0, 1, 1, -1]` with count 2, `[0, 1, 2, 3]`.
    """
    classes = _rows_by_class(labels)
    fewest = min(map(len, classes))
    if not 1 <= count <= fewest:
        raise ValueError(
            f"{count} labels a class, the rarest of {len(classes)} classes has {fewest}: pass 1 to {fewest}"
        )
    return _first(classes, [count] * len(classes), seed, ids)


class LabelAmount(NamedTuple):
    """How many labels: `kind` is "fraction", "labels" or "labels_per_class", `value` the share, or the number.

    Example: `str(LabelAmount("labels", 40))` is "labels=40".
    """

    kind: str
    value: float

    def __str__(self) -> str:
        whole = math.isfinite(self.value) and self.value == int(self.value)
        return f"{self.kind}={int(self.value) if whole else self.value}"

    def choose(self, labels: Tensor, *, seed: int = 0, ids: Tensor | None = None, of: Tensor | None = None) -> Tensor:
        """The images that keep their labels: sorted indices, int64. All kinds follow one order (`label_fraction`).

        "labels" are as many of each class; `of` is for fractions alone. Raises ValueError where there are not so many,
        or no such number of each.

        Example: of `[0, 0, 1, 1, -1]`, `LabelAmount("labels", 4)` takes [0, 1, 2, 3].
        """
        if self.kind == "fraction":
            return label_fraction(labels, self.value, seed=seed, ids=ids, of=of)
        if self.kind not in ("labels", "labels_per_class") or not float(self.value).is_integer():
            raise ValueError(f"{self}: pass fraction=F, or whole numbers as labels=N or labels_per_class=N")
        count = int(self.value)
        if self.kind == "labels_per_class":
            return labels_per_class(labels, count, seed=seed, ids=ids)
        classes = max(1, len(labels[labels >= 0].unique()))
        if count % classes or count < 1:
            below = max(classes, count // classes * classes)
            raise ValueError(f"labels={count} for {classes} classes: pass a multiple, {below} or {below + classes}")
        return labels_per_class(labels, count // classes, seed=seed, ids=ids)


class LabelList(NamedTuple):
    """The labels of the images that a text file names, which `labels_listed` reads.

    Example: `str(LabelList("lists/1percent.txt"))` is "label_list=1percent.txt".
    """

    file: str

    def __str__(self) -> str:
        return f"{LISTED}={Path(self.file).name}"


def labels_listed(dataset: ImageDataset, file: str | Path) -> Tensor:
    """The images that a text file names, a file name a line: sorted indices, int64.

    For the lists of SimCLR's semi-supervised runs (google-research/simclr, `1percent.txt` and `10percent.txt` of
    ImageNet's file names). Images are known by the last part of their name, those in tar shards by that without a
    suffix; blank lines are skipped. Which classes the list holds is its own affair.

    Raises FileNotFoundError for a missing file; ValueError for a list of nothing, a name that no labelled image or more
    than one has, or that stands there twice.

    Example: for files `a/1.png` and `b/2.png`, a list of the line `2.png` gives [1].
    """
    wanted = names_listed(file)
    places: dict[str, list[int]] = {}
    for index in (dataset.labels >= 0).nonzero().flatten().tolist():
        places.setdefault(dataset.file_name(index), []).append(index)
    found = {name: places.get(name) or places.get(name.partition(".")[0], []) for name in wanted}
    wrong = [f"{len(those)} labelled images are called {name}" for name, those in found.items() if len(those) != 1]
    indices = sorted(those[0] for those in found.values() if those)
    wrong += [f"{dataset.file_name(one)} stands there twice" for one, next_ in pairwise(indices) if one == next_]
    if wrong:
        raise ValueError(f"{file}: {wrong[0]}: {_A_LIST}")
    return torch.tensor(indices, dtype=torch.int64)


def names_listed(file: str | Path) -> list[str]:
    """The names in a list as `labels_listed` reads it, each once and without its folders.

    Raises FileNotFoundError for a missing file, ValueError for a list of nothing and for a name that is there twice.

    Example: a list of the lines `a/1.png` and `2.png` gives ["1.png", "2.png"].
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}: pass a list of image file names, one a line")
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {_A_LIST}") from error
    names = [line.strip().rpartition("/")[2] for line in text.split("\n") if line.strip()]
    twice = [f"{name} stands there {count} times" for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        raise ValueError(f"{file}: {twice[0] if twice else 'no name'}: {_A_LIST}")
    return names


def only_labelled(dataset: ImageDataset, indices: Tensor) -> ImageDataset:
    """The same images with the labels at these indices; every other label is -1.

    For training on all images and few labels (SimCLR v2's distillation). Pixels, encoded images, names, faults and
    stand-ins are shared with `dataset`, nothing is copied but the labels. A stand-in has its own label, or none.

    Args: `indices`: int64, as `label_fraction` gives them.

    Raises ValueError where an index is outside of the data set or has no label to keep.

    Example: with `label_fraction(dataset.labels, 1.0)`, the labels are those of `dataset`.
    """
    count = len(dataset)
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        low, high = int(indices.min()), int(indices.max())
        raise ValueError(f"indices run from {low} to {high} for {count} images: pass 0 to {count - 1}")
    without = indices[dataset.labels[indices] < 0]
    if len(without):
        raise ValueError(f"{len(without)} of the indices have no label, the first is {int(without[0])}: leave them out")
    few = copy.copy(dataset)
    few.labels = torch.full_like(dataset.labels, -1)
    few.labels[indices] = dataset.labels[indices]
    return few


def _rows_by_class(labels: Tensor) -> list[Tensor]:
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}: pass `n` integers")
    rows = [(labels == label).nonzero().flatten() for label in labels[labels >= 0].unique()]
    if not rows:
        raise ValueError(f"none of {labels.numel()} images has a label: pass labels from 0, -1 = unlabelled")
    return rows


def _first(classes: list[Tensor], counts: list[int], seed: int, ids: Tensor | None) -> Tensor:
    chosen = []
    for rows, count in zip(classes, counts, strict=True):
        places = rows if ids is None else ids[rows]
        order = Randomness(seed, 0, places).integers("label order", 1 << 62).argsort(stable=True)
        chosen.append(rows[order[:count]])
    return torch.cat(chosen).sort().values
