"""Accuracy against labels, as CPC v2's figure 1 (Henaff et al. 2020): what is saved is an arrow between two curves."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from contrastive_core.evaluate.label_saving import Saving
from contrastive_core.plots import BLUE, INK, MUTED, PALE, RUST, new_figure, tidy_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

COLOURS = (BLUE, RUST, "#1a7f5a", "#7b5aa6", "#b8860b", "#444444")


ROWS_OF_WORDS = 5
"""Places for what an arrow says, above it and below: many arrows may lie close together."""


class Curve(NamedTuple):
    """A line: `points` are accuracies in 0..1, one a choice of labels, by number of labels."""

    name: str
    points: Mapping[int, Sequence[float]]
    baseline: bool = False


class SavingArrow(NamedTuple):
    """`saving` of the curve at this place in the list, at a number of labels and an accuracy.

    sure: whether its whole interval lies above 1, of enough choices of labels to say so.
    """

    labels: int
    accuracy: float
    saving: Saving
    curve: int
    sure: bool = True


def label_figure(
    curves: Sequence[Curve], arrows: Sequence[SavingArrow] = (), *, measure: str = "test accuracy"
) -> Figure:
    """Accuracy in percent against labels on a log axis, a band of one deviation over the choices of labels.

    An arrow runs from its curve to where a saving of x would lie: x times as many labels at the same accuracy. Savings
    of one and less are not drawn, censored ones as far as they are known; those that are not sure are dotted. A line is
    pale over numbers of labels at which others were measured and it was not.

    Raises ValueError for no curve with a point.

    Example: `label_figure([Curve("a", {10: [0.4, 0.6]})])` has a point at 50 %.
    """
    if not any(curve.points for curve in curves):
        raise ValueError(f"{len(curves)} curves without a point: pass accuracies by number of labels")
    figure, grid = new_figure(1, 1, (7.2, 4.6))
    axes = grid[0, 0]
    axes.set_xscale("log")
    colours = iter(COLOURS * (1 + len(curves) // len(COLOURS)))
    shades = [MUTED if curve.baseline else next(colours) for curve in curves]
    counts = sorted({labels for curve in curves for labels in curve.points})
    for curve, colour in zip(curves, shades, strict=True):
        _line(axes, curve, colour, counts)
    drawn = [arrow for arrow in arrows if arrow.saving.value > 0 and arrow.saving.bound > 1.05]
    for arrow in drawn:
        _arrow(axes, arrow, shades[arrow.curve])
    if not all(arrow.sure for arrow in drawn):
        axes.plot([], [], ":", color=INK, linewidth=1.1, label="dotted: not sure")
    axes.set_xticks(counts, [f"{labels:,}" for labels in counts])
    axes.set_xticks([], minor=True)
    tidy_axes(axes, "labels", f"{measure} (%)")
    axes.legend(labelcolor=INK, loc="best", edgecolor=PALE)  # framed: a single point beside it is none of its own
    figure.draw_without_rendering()  # only then is it known where the axes lie
    taken = [axes.transData.transform_bbox(_shaft(arrow)) for arrow in drawn]
    for arrow in drawn:
        _say(axes, arrow, shades[arrow.curve], taken)
    return figure


def _line(axes: Axes, curve: Curve, colour: str, counts: Sequence[int]) -> None:
    labels = sorted(curve.points)
    means = [100 * statistics.mean(curve.points[count]) for count in labels]
    spreads = [100 * statistics.stdev(curve.points[count]) if len(curve.points[count]) > 1 else 0.0 for count in labels]
    style = "--" if curve.baseline else "-"
    heights = dict(zip(labels, means, strict=True))
    covered = [count for count in counts if labels and labels[0] <= count <= labels[-1]]
    broken = [heights.get(count, math.nan) for count in covered]
    axes.plot(covered, broken, style, color=colour, marker="o", markersize=4, linewidth=1.8, label=curve.name)
    for ends in itertools.pairwise(labels):
        if covered.index(ends[1]) - covered.index(ends[0]) > 1:
            axes.plot(ends, [heights[end] for end in ends], style, color=colour, linewidth=1.8, alpha=0.35)
    low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(labels, low, high, color=colour, alpha=0.15, linewidth=0)


def _shaft(arrow: SavingArrow) -> Bbox:
    """From its curve to its head: labels and percent."""
    from matplotlib.transforms import Bbox

    height = 100 * arrow.accuracy
    return Bbox([(arrow.labels, height), (arrow.labels * arrow.saving.bound, height)])


def _arrow(axes: Axes, arrow: SavingArrow, colour: str) -> None:
    start, end = _shaft(arrow).get_points()
    line = {"arrowstyle": "->", "color": colour, "linewidth": 1.1, "linestyle": "-" if arrow.sure else ":"}
    axes.annotate("", end, start, arrowprops=line)


def _say(axes: Axes, arrow: SavingArrow, colour: str, taken: list[Bbox]) -> None:
    """The saving above or below its arrow, as near as none of `taken` lies, to which its place is added.

    Further away than the next row, a thin line says whose it is.
    """
    lead = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
    from matplotlib.text import Text

    sides = (1, -1) if arrow.curve % 2 == 0 else (-1, 1)  # two curves that lie close have theirs on either side
    for away, share, side in itertools.product(range(ROWS_OF_WORDS), (0.5, 0.3, 0.7), sides):
        above = 3 + 10 * away if side > 0 else -10 - 10 * away
        words = axes.annotate(
            f"{arrow.saving}x",
            (arrow.labels * arrow.saving.bound**share, 100 * arrow.accuracy),
            (0, above),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=colour,
            arrowprops=lead if away > 1 else None,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},  # a curve may pass behind it
        )
        words.get_window_extent()  # only now is it where it belongs; with its line, which may cross others
        place = Text.get_window_extent(words).padded(2)
        if not any(place.overlaps(other) for other in taken):
            break
        words.remove()
    else:
        axes.add_artist(words)
    taken.append(place)
