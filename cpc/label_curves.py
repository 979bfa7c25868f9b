"""How many labels pre-training saves, out of a label sweep's cells: curves, what they are held against, savings.

At each number of labels the scratch curve is the best of all networks and probes that started from nothing, best by
their accuracy on the test images: where that choice errs, it errs in their favour. Beside it stands the curve of the
same network from random weights.

A grid may be half done. What is missing must not make the baseline worse, since that makes the saving larger:

- Protocols are compared on the choices of labels that both have: a failed cell does not cost the best its place.
- A number of labels where none of those that lead beside it was measured is left out of the scratch curve: logistic
  regression alone does not continue a network's curve, nor begin it. Who leads is found where most were measured, and
  from there on upwards and downwards. Beyond the curve's ends a saving is censored, "> x" and "< x".
- Nothing is said to save on fewer than five choices of labels, of either side, but where one is planned of many labels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_core.evaluate.label_saving import SavingInterval, filled_in, saving_interval
from contrastive_core.reading import read_json

SCRATCH = "scratch"
BEST, SAME = "best from scratch", "same network from scratch"
OF_THE_SAME_NETWORK = ("patches", "image")
LARGEST_CELL = 1 << 27
"""Bytes of a cell's file: ten million test images."""
ENOUGH_CHOICES = 5
"""Of labels, to say that anything is saved. By luck alone five are all better in 3 % of cases, three in 12 %."""
MANY_LABELS, MANY_OF_A_CLASS = 2000, 20
"""From there on a single choice stands for all, where no second is planned. With 40 labels, 3 points from choice to
choice and 1,000 test images, one choice alone says of nothing that it saves in 20 % of cases."""


@dataclass(frozen=True)
class CellResult:
    """A finished cell: which arm with which labels, and the class that it gave to every test image."""

    method: str
    protocol: str
    repeat: int
    amount: str
    labels: int
    fraction: float
    seed: int
    split: str
    accuracy: float
    class_accuracy: float
    draws: int
    setting: dict[str, float]
    seconds: float
    predictions: Tensor


_NUMBER = (int, float)
_OF_A_CELL: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("method", "protocol", "amount", "split"), str),
    **dict.fromkeys(("repeat", "labels", "seed", "draws"), int),
    **dict.fromkeys(("fraction", "accuracy", "class_accuracy", "seconds"), _NUMBER),
    **dict.fromkeys(("setting", "shared", "asked"), dict),
    "predictions": list,
}
"""What a cell's file says, and as what."""


def read_cell(file: Path) -> dict[str, Any]:
    """What a cell's file says, predictions as `m` int64; ValueError that names it where it is no whole cell."""
    written = read_json(file, largest=LARGEST_CELL)
    said = written if isinstance(written, dict) else {}
    wrong = [name for name, kind in _OF_A_CELL.items() if not isinstance(said.get(name), kind)]
    if not wrong:
        known = all(type(each) is int and -1 <= each < 2**31 for each in said["predictions"])
        settings, steps = (said["asked"].get(name, kind()) for name, kind in (("settings", list), ("steps", dict)))
        wrong = ["predictions"] * (not known)
        wrong += ["asked"] * (not isinstance(settings, list) or not isinstance(steps, dict))
    if wrong:
        raise ValueError(f"{file} is no cell of a label sweep, for want of {wrong[0]}: remove it, and it is made again")
    return {**said, "predictions": torch.tensor(said["predictions"], dtype=torch.int64)}


def read_results(files: Sequence[Path]) -> list[CellResult]:
    """Of all cells whose file is there; ValueError that names one which is no whole cell."""
    cells = [read_cell(file) for file in files if file.is_file()]
    return [CellResult(**{name: cell[name] for name in CellResult.__dataclass_fields__}) for cell in cells]


@dataclass(frozen=True)
class ArmCurve:
    """The results of one method and protocol: by number of labels and seed, those of every pre-training run."""

    cells: dict[int, dict[int, dict[int, CellResult]]]  # labels: seed: repeat

    @staticmethod
    def of(results: Sequence[CellResult]) -> ArmCurve:
        """Results of one method and protocol; ValueError for two of the same run and choice of labels."""
        cells: dict[int, dict[int, dict[int, CellResult]]] = {}
        for result in results:
            of_seed = cells.setdefault(result.labels, {}).setdefault(result.seed, {})
            if result.repeat in of_seed:
                both = f"{of_seed[result.repeat].amount} and {result.amount}"
                raise ValueError(f"{result.method} {result.protocol} is there for {both}, the same labels: remove one")
            of_seed[result.repeat] = result
        return ArmCurve(cells)

    def by_seed(self, labels: int, by: str = "accuracy") -> dict[int, float]:
        """Of every seed the mean over the runs; `by` "class_accuracy": of the classes' mean accuracies.

        A run that lacks a seed counts there as in `saving_interval`: as it differs from the others elsewhere.
        """
        seeds, repeats = self.seeds(labels), sorted(self.repeats(labels))
        of_seeds = [self.cells[labels][seed] for seed in seeds]
        known = [
            [getattr(of_seed[repeat], by) if repeat in of_seed else math.nan for of_seed in of_seeds]
            for repeat in repeats
        ]
        filled = filled_in(torch.tensor(known, dtype=torch.float64)[..., None])[..., 0]
        return dict(zip(seeds, filled.mean(0).tolist(), strict=True))

    def accuracies(self, labels: int, by: str = "accuracy") -> list[float]:
        """The same without the seeds."""
        return list(self.by_seed(labels, by).values())

    def repeats(self, labels: int | None = None) -> set[int]:
        """The pre-training runs that have a result, with so many labels or with any number."""
        asked = self.cells.values() if labels is None else [self.cells[labels]]
        return {repeat for by_seed in asked for of_seed in by_seed.values() for repeat in of_seed}

    def seeds(self, labels: int) -> list[int]:
        """The choices of labels of which some run has its result, in order."""
        return sorted(self.cells[labels])

    def planned(self, labels: int) -> int:
        """How many choices of labels there are to be."""
        return max(one.draws for of_seed in self.cells[labels].values() for one in of_seed.values())

    def right(self, labels: int, seeds: Sequence[int], truth: Tensor) -> Tensor:
        """`runs draws images` float64 for these seeds, NaN where a run has no result; of the runs that have one."""
        of_seeds = [self.cells[labels].get(seed, {}) for seed in seeds]
        missing = torch.full((len(truth),), math.nan, dtype=torch.float64)
        return torch.stack([
            torch.stack([
                (of_seed[repeat].predictions == truth).double() if repeat in of_seed else missing
                for of_seed in of_seeds
            ])
            for repeat in sorted(set().union(*of_seeds))
        ])  # fmt: skip


Curves = Mapping[tuple[str, str], ArmCurve]
"""Every arm's results by method and protocol."""


def curves_of(results: Sequence[CellResult]) -> dict[tuple[str, str], ArmCurve]:
    """Every arm's results by method and protocol."""
    named: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        named.setdefault((result.method, result.protocol), []).append(result)
    return {name: ArmCurve.of(mine) for name, mine in named.items()}


# ---- what pre-training is held against ----


class ScratchPoint(NamedTuple):
    """At one number of labels the protocol from scratch that does best, and the results of all that were measured."""

    protocol: str
    measured: dict[str, ArmCurve]

    @property
    def curve(self) -> ArmCurve:
        """The best one's results."""
        return self.measured[self.protocol]

    def connected(self, labels: int, seeds: Collection[int]) -> list[ArmCurve]:
        """The best one's results, and those of the others that share some of these choices of labels with it.

        Of the others nothing tells how much worse they are, so that what they have says nothing of what it lacks.
        """
        shared = set(self.curve.seeds(labels)) & set(seeds)
        others = [curve for name, curve in self.measured.items() if name != self.protocol]
        return [self.curve, *(curve for curve in others if shared & set(curve.seeds(labels)))]


@dataclass(frozen=True)
class ScratchCurve:
    """The best from scratch by number of labels, and the numbers that are left out since none of the best is there."""

    points: dict[int, ScratchPoint]
    left_out: dict[int, tuple[str, ...]]


def scratch_curves(curves: Curves, by: str = "accuracy") -> dict[str, ScratchCurve]:
    """For `BEST` and `SAME`, where there are any: the best from scratch by "accuracy" or "class_accuracy".

    Example: of a CNN at 10 and 40 labels, and a worse SVM at 10, 40 and 160, the points are the CNN's at 10 and 40, and
    160 is left out.
    """
    scratch = {protocol: curve for (method, protocol), curve in curves.items() if method == SCRATCH}
    same = {protocol: curve for protocol, curve in scratch.items() if protocol in OF_THE_SAME_NETWORK}
    return {name: _best_curve(mine, by) for name, mine in {BEST: scratch, SAME: same}.items() if mine}


def _best_curve(curves: Mapping[str, ArmCurve], by: str) -> ScratchCurve:
    counts = sorted({labels for curve in curves.values() for labels in curve.cells})
    there = {labels: {name: curve for name, curve in curves.items() if labels in curve.cells} for labels in counts}
    points: dict[int, ScratchPoint] = {}
    left_out: dict[int, tuple[str, ...]] = {}
    start = counts.index(_most_measured(there))
    for way in (counts[start:], counts[start::-1]):
        leading = set(curves)
        for labels in way:
            measured = dict(sorted(there[labels].items()))
            if leading.isdisjoint(measured):
                left_out[labels] = tuple(measured)
                continue
            scores = {protocol: curve.by_seed(labels, by) for protocol, curve in there[labels].items()}
            best = _best(scores)
            points[labels] = ScratchPoint(best, measured)
            leading = {protocol for protocol, score in scores.items() if _as_good(score, scores[best])}
    return ScratchCurve(dict(sorted(points.items())), dict(sorted(left_out.items())))


def _most_measured(there: Mapping[int, Mapping[str, ArmCurve]]) -> int:
    """The labels of most protocols; of those alike where they have most other points; of those the fewest."""

    def measured(labels: int) -> tuple[int, int, int]:
        curves = there[labels].values()
        return len(curves), sum(len(curve.cells) for curve in curves), -labels

    return max(there, key=measured)


def _best(scores: Mapping[str, Mapping[int, float]]) -> str:
    """The protocol that is ahead of most others, each time in the mean over the seeds that both have."""

    def rank(protocol: str) -> tuple[int, float]:
        mine = scores[protocol]
        ahead = sum(statistics.mean(_differences(mine, other)) > 0 for other in scores.values())
        return ahead, statistics.mean(mine.values())

    return max(sorted(scores), key=rank)


def _as_good(score: Mapping[int, float], best: Mapping[int, float]) -> bool:
    """Whether the mean over the seeds that both have is less than a standard error below the best's, or not below."""
    differences = _differences(best, score)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return statistics.mean(differences) <= error


def _differences(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """Seed by seed; of the means where no seed is in both."""
    shared = one.keys() & other.keys()
    if not shared:
        return [statistics.mean(one.values()) - statistics.mean(other.values())]
    return [one[seed] - other[seed] for seed in sorted(shared)]


# ---- savings ----


class LabelSaving(NamedTuple):
    """What a method saves with a protocol and a number of labels, against one of the curves from scratch.

    draws, runs: how many choices of labels and pre-training runs of the method's went into the interval.
    scratch_draws: the fewest choices of labels of a point from scratch that the interval depends on.
    thin: whether both sides have too few choices of labels in common to say that anything is saved.
    """

    method: str
    protocol: str
    labels: int
    against: str
    interval: SavingInterval
    draws: int
    runs: int
    scratch_draws: int
    thin: bool

    @property
    def saves(self) -> bool:
        """Whether the whole interval is above 1; censored at a bound below 1, or of few choices, nothing is known."""
        return self.interval.low.value > 1 and self.interval.low.bound >= 1 and not self.thin


def savings_of(
    curves: Curves, truth: Tensor, *, per_class: bool = False, other_networks: Collection[str] = ()
) -> list[LabelSaving]:
    """The label saving of every pre-trained arm at every number of labels, against both curves from scratch.

    Args:
        truth: `m` int64, the test images' classes.
        per_class: by the mean accuracy of the classes, which also decides which protocol from scratch is the best.
        other_networks: methods whose network is not the one that was trained from scratch: without a row of `SAME`.

    Example: with 10 labels right on the images on which the best from scratch is with 40, an arm saves 4.0.
    """
    rows = []
    weights = balanced(truth) if per_class else None
    needed = needed_choices(curves, len(truth.unique()))
    for against, scratch in scratch_curves(curves, "class_accuracy" if per_class else "accuracy").items():
        for (method, protocol), arm in curves.items():
            if method == SCRATCH or (against == SAME and method in other_networks):
                continue
            for labels in sorted(arm.cells):
                interval = _interval(labels, arm, scratch, truth, weights)
                read = _points_read(labels, interval, scratch)
                held = LabelSaving(
                    method,
                    protocol,
                    labels,
                    against,
                    interval,
                    draws=len(arm.seeds(labels)),
                    runs=len(arm.repeats(labels)),
                    scratch_draws=min(len(curve.seeds(count)) for count, curve in read.items()),
                    thin=_is_thin(labels, arm, read, needed),
                )
                rows.append(held)
    return rows


def _points_read(labels: int, interval: SavingInterval, scratch: ScratchCurve) -> dict[int, ArmCurve]:
    """The curve's points that a saving depends on: as far as the one behind the interval's end."""
    end = interval.high.bound * labels * (1 - 1e-9)
    behind = min((count for count in scratch.points if count >= end), default=max(scratch.points))
    return {count: point.curve for count, point in scratch.points.items() if count <= behind}


def needed_choices(curves: Curves, classes: int) -> dict[int, int]:
    """By the number of labels how many choices of them it takes to say that anything is saved.

    Example: of ten classes one with 2,000 labels, where no arm has or is to have a second; five with 1,990.
    """
    planned: dict[int, int] = {}
    for curve in curves.values():
        planned |= {labels: max(curve.planned(labels), planned.get(labels, 0)) for labels in curve.cells}
    many = max(MANY_LABELS, MANY_OF_A_CLASS * classes)
    return {labels: 1 if count == 1 and labels >= many else ENOUGH_CHOICES for labels, count in planned.items()}


def _is_thin(labels: int, arm: ArmCurve, read: Mapping[int, ArmCurve], needed: Mapping[int, int]) -> bool:
    """Whether an arm and the points it is held against have too few choices of labels in common."""
    mine = set(arm.seeds(labels))
    several = [set(curve.seeds(count)) for count, curve in read.items() if needed[count] > 1]
    return any(len(mine & seeds) < needed[labels] for seeds in [mine, *several])


def _interval(
    labels: int, arm: ArmCurve, scratch: ScratchCurve, truth: Tensor, weights: Tensor | None
) -> SavingInterval:
    seeds = arm.seeds(labels)
    right = arm.right(labels, seeds, truth)
    points = {count: _from_scratch(point, count, seeds, truth) for count, point in scratch.points.items()}
    if weights is not None:
        right, points = right * weights, {count: there * weights for count, there in points.items()}
    return saving_interval(labels, right, points)


def _from_scratch(point: ScratchPoint, labels: int, seeds: Sequence[int], truth: Tensor) -> Tensor:
    """The best one's `draws images` for these choices of labels, NaN for those on which nothing was measured.

    A choice that it lacks is as hard for it as for the other protocols from scratch that share some with it: the easy
    ones may be what it has.
    Without one of its own the mean of the others stands for all.
    """
    there = point.curve.seeds(labels)
    if set(there).isdisjoint(seeds):
        return point.curve.right(labels, there, truth)[0].mean(0).expand(len(seeds), -1)
    right = torch.cat([curve.right(labels, seeds, truth) for curve in point.connected(labels, seeds)])
    known = ~right.isnan().all(2).all(0)
    right[:, known] = filled_in(right[:, known])
    return right[0]


def balanced(truth: Tensor) -> Tensor:
    """Weights `m` float64 with a mean of 1 that make the mean over images the mean of the classes' accuracies.

    Args: `truth`: `m` int64. Example: of classes 0, 0, 0, 1 the weights are 2/3 three times, and 2.
    """
    counts = torch.bincount(truth).double()
    present = (counts > 0).sum()
    return (len(truth) / (present * counts.clamp(min=1)))[truth]
