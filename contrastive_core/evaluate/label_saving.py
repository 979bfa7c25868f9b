"""How many labels pre-training saves: the number that CPC v2's figure 1 is drawn for (Henaff et al. 2020).

saving(n) = n_s / n:  trained with n labels, the pre-trained network is as good as the one from scratch with n_s.

n_s is read off the scratch curve: its mean accuracies made to rise (isotonic regression) and joined by straight lines
over log(labels). Where the pre-trained network is better than all of that curve, n_s is beyond its last point and the
saving is censored, "> x"; where it is worse than the first point, "< x". Neither is ever left out: that would leave
out the best and the worst results.

The interval is a paired bootstrap over three crossed levels. What was drawn is drawn again with replacement:
pre-training runs, label draws (the same for both arms, which were given the same ones) and test images (the same for
all). Of few runs or draws it is too narrow, as any bootstrap is: that of three numbers ends at the least and the
largest of them, and covers three cases of four where their spread is all there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 2000
_AT_ONCE = 100
"""Resamples that are worked on together: 24 MiB for 10,000 images."""
_EQUAL = 1e-9
"""Accuracies this near are one: sums in another order differ in their last digits."""


class Saving(NamedTuple):
    """n_s / n: `value`, inf or 0 where it is censored, and `bound`, which it is then above or below."""

    value: float
    bound: float

    def __str__(self) -> str:
        """Example: `str(Saving(math.inf, 5.0))` is "> 5.0", `str(Saving(2.5, 2.5))` is "2.5", and 0.998 is "0.99"."""
        return {math.inf: "> ", 0.0: "< "}.get(self.value, "") + _shown(self.bound)


def _shown(factor: float) -> str:
    """Two digits, and never 1.0 for what is a little less or more: on which side it is decides what is said of it."""
    if 0.95 <= factor < 1.05 and abs(factor - 1) > _EQUAL:
        hundredths = f"{factor:.2f}"
        return hundredths if hundredths != "1.00" else "0.99" if factor < 1 else "1.01"
    return f"{factor:.2g}" if factor < 0.95 else f"{factor:.{1 if factor < 100 else 0}f}"


class SavingInterval(NamedTuple):
    """A saving and the ends of its interval, each of which may be censored."""

    saving: Saving
    low: Saving
    high: Saving


def rising(accuracies: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The nearest numbers that never fall: isotonic regression, all points with one weight unless they have their own.

    Example: [0.1, 0.5, 0.3] becomes [0.1, 0.4, 0.4].
    """
    from scipy.optimize import isotonic_regression  # scikit-learn's takes twenty times as long, over its checks

    fitted: list[float] = isotonic_regression(np.asarray(accuracies, dtype=np.float64), weights=weights).x.tolist()
    return fitted


def labels_needed(
    labels: Sequence[int], accuracies: Sequence[float], target: float, weights: Sequence[float] | None = None
) -> float:
    """The fewest labels with which a curve reaches an accuracy; inf beyond its end, 0 below its beginning.

    The curve is made to rise, which lowers a point that a later one does not reach. An accuracy that was measured at a
    point is reached there all the same: else what is worse than the curve at its peak would lie beyond its end.

    Args:
        labels: of the curve's points, rising, above 0.
        accuracies: at these points.
        target: the accuracy to be reached.
        weights: of the points where the curve is made to rise, such as their draws; None = all alike.

    Raises ValueError where the points do not fit each other or do not rise.

    Example: a curve of 0.2 at 10 and 0.6 at 1,000 labels reaches 0.4 at 100; of 0.2, 0.6 and 0.5 at 10, 100 and 1,000
    reaches 0.58 at 100.
    """
    if len(labels) != len(accuracies) or not labels or sorted(set(labels)) != list(labels) or labels[0] < 1:
        raise ValueError(f"a curve of {list(labels)} labels and {len(accuracies)} accuracies: pass rising label counts")
    if accuracies[0] > target + _EQUAL:
        return 0.0
    measured = (count for count, accuracy in zip(labels, accuracies, strict=True) if accuracy >= target - _EQUAL)
    return min(float(next(measured, math.inf)), _read_off(labels, rising(accuracies, weights), target))


def _read_off(labels: Sequence[int], curve: Sequence[float], target: float) -> float:
    """As `labels_needed`, of a curve that rises."""
    if target < curve[0] - _EQUAL:
        return 0.0
    if target > curve[-1] + _EQUAL:
        return math.inf
    after = next(index for index, accuracy in enumerate(curve) if accuracy >= target - _EQUAL)
    if curve[after] <= target + _EQUAL:
        return float(labels[after])
    share = (target - curve[after - 1]) / (curve[after] - curve[after - 1])
    logs = math.log(labels[after - 1]), math.log(labels[after])
    return math.exp(logs[0] + share * (logs[1] - logs[0]))


def label_saving(
    count: int,
    accuracy: float,
    labels: Sequence[int],
    scratch: Sequence[float],
    weights: Sequence[float] | None = None,
) -> Saving:
    """n_s / n for a pre-trained network with `count` labels, against a curve from scratch.

    Args: `accuracy`: of the pre-trained network; `labels`, `scratch`: the curve's points; `weights`: theirs, as
    `labels_needed`.

    Raises ValueError as `labels_needed`.

    Example: 0.4 with 25 labels against 0.2 at 10 and 0.6 at 1,000 saves 4.0; 0.7 saves more than 40.0.
    """
    needed = labels_needed(labels, scratch, accuracy, weights)
    bound = {math.inf: labels[-1], 0.0: labels[0]}.get(needed, needed)
    return Saving(needed if needed in (0.0, math.inf) else needed / count, bound / count)


def saving_interval(
    count: int,
    pretrained: Tensor,
    scratch: Mapping[int, Tensor],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> SavingInterval:
    """The saving with `count` labels, and its bootstrap interval.

    Args:
        count: labels of the pre-trained network, n.
        pretrained: `runs draws images`, whether it was right: a row for each pre-training run and label draw. A row of
            NaN is one that is not there: it is taken to differ from the other runs of its draw as its run does in the
            draws that both have.
        scratch: `draws images` by number of labels: the same label draws and test images, from scratch. A row of NaN is
            a draw that is not there: its point is the mean over the others, in every resample. Where that draw is
            harder or easier, that is wrong: fill it in (`filled_in`) where something else was measured on it.
        resamples: at least 1.
        level: of the interval, between 0 and 1.
        seed: of the resampling.

    A draw from scratch that is not there is not there in any resample. A point weighs as many as it has draws where the
    curve is made to rise. With one pre-training run the interval leaves the luck of pre-training out.

    Raises ValueError for shapes that do not fit each other, a point without a draw, a draw without a run, fewer than
    one label or resample, another level.

    Example: where both are right on the same images at the same count, and the curve rises, the saving is 1.
    """
    if count < 1 or resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"count={count}, resamples={resamples}, level={level}: pass at least 1, 1, and between 0 and 1"
        )
    _check_shapes(pretrained, scratch)
    labels = sorted(scratch)
    curves, there = _without_nan(torch.stack([scratch[number].double() for number in labels]))
    right = filled_in(pretrained.double())
    points_weigh = there.sum(1).double().tolist()
    runs, draws, images = right.shape
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = []
    for part in torch.arange(resamples).split(_AT_ONCE):
        weights = _redrawn(images, len(part), generator) / images
        chosen_runs, chosen_draws = (_redrawn(number, len(part), generator) / number for number in (runs, draws))
        mean = torch.einsum("r d i, s i, s r, s d -> s", right, weights, chosen_runs, chosen_draws)
        curve = torch.einsum("l d i, s i, s l d -> s l", curves, weights, _over_those_there(chosen_draws, there))
        values += [
            label_saving(count, one, labels, points, points_weigh).value
            for one, points in zip(mean.tolist(), curve.tolist(), strict=True)
        ]
    means = (curves.mean(2) * there).sum(1) / there.sum(1)
    point = label_saving(count, right.mean().item(), labels, means.tolist(), points_weigh)
    tails = [(1 - level) / 2, (1 + level) / 2]
    # an end that is censored is an infinity: no mean with its neighbour, which would be one too
    ends = np.quantile(values, tails, method="nearest").tolist()
    bounds = {math.inf: labels[-1] / count, 0.0: labels[0] / count}
    low, high = (Saving(end, bounds.get(end, end)) for end in ends)
    return SavingInterval(point, low, high)


def _without_nan(right: Tensor) -> tuple[Tensor, Tensor]:
    """The same with 0 for NaN, and which rows `... images` are there."""
    return right.nan_to_num(), ~right.isnan().any(-1)


def filled_in(right: Tensor) -> Tensor:
    """`runs draws images` with what is not there (NaN) as the sum of a run's part and a draw's part, by least squares.

    So a lucky run that was measured more often than the others does not stand for them: cells that are missing are
    as much worse as their runs are elsewhere. Where runs share no draw a cell is what the draw's other runs are. Every
    draw has a run that is there. The sum may be below 0 or above 1.

    Example: of runs with 1 and 3 in one draw, and 2 and nothing in another, the fourth is 4.
    """
    known, there = _without_nan(right)
    if there.all():
        return known
    runs, draws = there.shape
    little = 1e-4  # the smallest parts that fit: where nothing tells runs and draws apart, it is the draw
    of_run = little * torch.eye(runs, dtype=right.dtype)[:, None].expand(runs, draws, runs)
    of_draw = torch.eye(draws, dtype=right.dtype)[None].expand(runs, draws, draws)
    parts = torch.cat([of_run, of_draw], dim=2)
    fitted = parts @ (torch.linalg.pinv(parts[there]) @ known[there])
    return torch.where(there[..., None], known, fitted)


def _redrawn(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` is among as many draws with replacement: `resamples count`, rows that sum to count."""
    drawn = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def _over_those_there(weights: Tensor, there: Tensor) -> Tensor:
    """Weights for each point, which sum to 1 over what it has; all alike where nothing of that was drawn.

    Args: `weights`: `resamples draws`; `there`: `points draws` bool. Returns `resamples points draws`.
    """
    of_point = weights[:, None] * there
    none = of_point.sum(2, keepdim=True) == 0
    of_point = torch.where(none, there.double(), of_point)
    return of_point / of_point.sum(2, keepdim=True)


def _check_shapes(pretrained: Tensor, scratch: Mapping[int, Tensor]) -> None:
    expected = tuple(pretrained.shape[1:])
    shapes = {number: tuple(right.shape) for number, right in scratch.items()}
    wrong = {number: shape for number, shape in shapes.items() if shape != expected}
    if pretrained.dim() != 3 or not scratch or wrong or 0 in pretrained.shape:
        raise ValueError(
            f"pretrained {tuple(pretrained.shape)}, scratch {wrong or shapes}: pass `runs draws images` and, for each "
            "number of labels, `draws images`"
        )
    empty = [number for number, right in scratch.items() if right.isnan().any(1).all()]
    if empty:
        raise ValueError(f"scratch has no draw at {empty[0]} labels: leave that number out")
    if pretrained.isnan().any(2).all(0).any():
        raise ValueError("pretrained has a draw that no run has: leave that draw out, of scratch too")
