"""Accuracy against labels, as CPC v2's figure 1 (Henaff et al. 2020): what is saved is an arrow between two curves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from contrastive_core.evaluate.label_saving import Saving
from contrastive_core.plots import BLUE, INK, MUTED, RUST, new_figure, tidy_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, RUST, "#1a7f5a", "#7b5aa6", "#b8860b", "#444444")


class Curve(NamedTuple):
    """A line: `points` are accuracies in 0..1, one a choice of labels, by number of labels."""

    name: str
    points: Mapping[int, Sequence[float]]
    baseline: bool = False


class SavingArrow(NamedTuple):
    """`saving` of the curve at this place in the list, at a number of labels and an accuracy.

    sure: whether its whole interval lies above 1, of more than one choice of labels where several are to be.
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
    of one and less are not drawn, censored ones as far as they are known; those that are not sure are dotted.

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
    for curve, colour in zip(curves, shades, strict=True):
        _line(axes, curve, colour)
    drawn = [arrow for arrow in arrows if arrow.saving.value > 0 and arrow.saving.bound > 1.05]
    for arrow in drawn:
        _arrow(axes, arrow, shades[arrow.curve])
    if not all(arrow.sure for arrow in drawn):
        axes.plot([], [], ":", color=INK, linewidth=1.1, label="dotted: may save nothing")
    counts = sorted({labels for curve in curves for labels in curve.points})
    axes.set_xticks(counts, [f"{labels:,}" for labels in counts])
    axes.set_xticks([], minor=True)
    tidy_axes(axes, "labels", f"{measure} (%)")
    axes.legend(frameon=False, labelcolor=INK, loc="best")
    return figure


def _line(axes: Axes, curve: Curve, colour: str) -> None:
    labels = sorted(curve.points)
    means = [100 * statistics.mean(curve.points[count]) for count in labels]
    spreads = [100 * statistics.stdev(curve.points[count]) if len(curve.points[count]) > 1 else 0.0 for count in labels]
    style = "--" if curve.baseline else "-"
    axes.plot(labels, means, style, color=colour, marker="o", markersize=4, linewidth=1.8, label=curve.name)
    low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(labels, low, high, color=colour, alpha=0.15, linewidth=0)


def _arrow(axes: Axes, arrow: SavingArrow, colour: str) -> None:
    height, end = 100 * arrow.accuracy, arrow.labels * arrow.saving.bound
    line = {"arrowstyle": "->", "color": colour, "linewidth": 1.1, "linestyle": "-" if arrow.sure else ":"}
    axes.annotate("", (end, height), (arrow.labels, height), arrowprops=line)
    axes.annotate(
        f"{arrow.saving}x",
        ((arrow.labels * end) ** 0.5, height),
        (0, 3 if arrow.curve % 2 == 0 else -10),  # two curves that lie close together have theirs on either side
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},  # a curve may pass behind it
    )
