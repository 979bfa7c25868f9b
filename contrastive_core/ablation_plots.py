"""Figures of a grid of runs: a heat-map as SimCLR's figure 5 (Chen et al. 2020), or lines as its figures 7 to 9.

A panel is a name and an array `rows cols` of shares in 0..1, NaN where there is no number (yet). Several panels stand
side by side. Both functions return the figure: `contrastive_core.plots.save_figure` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from contrastive_core.plots import BLUE, INK, MUTED, RIGHT, RUST, new_figure, tidy_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Panels = Mapping[str, np.ndarray]

NOTHING = "#ececec"
"""The colour of a cell without a number."""

MARKERS = "osD^vP*X"
GAP = 0.35
"""Between the last column and the means, in cells."""


def heatmap_figure(
    panels: Panels,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    row_name: str = "",
    column_name: str = "",
    row_means: bool = False,
) -> Figure:
    """Every number in its cell, in percent, darker where it is higher; each panel has a scale of its own.

    A cell without a number is grey and has a dash.

    Args:
        panels: by name, `rows cols` each.
        rows, columns: the labels of both axes, the first row at the top.
        title, row_name, column_name: over the panels, and beside both axes.
        row_means: also the mean of each row, set apart, as the last column of SimCLR's figure 5; a dash where the row
            is not complete.

    Raises ValueError for no panel, and for an array that does not fit the labels.

    Example: `heatmap_figure({"linear": np.eye(2)}, ["a", "b"], ["c", "d"])` has 100.0 on its diagonal.
    """
    _check(panels, rows, columns)
    shown = len(columns) + (1 + GAP if row_means else 0)
    longest = max(map(len, rows))
    width, height = 0.56 * shown + 0.075 * longest + 1.3, 0.42 * len(rows) + 1.7
    figure, grid = new_figure(1, len(panels), (max(4.0, width * len(panels)), max(2.6, height)))
    for axes, (name, values) in zip(grid[0], panels.items(), strict=True):
        _heatmap(axes, np.asarray(values, dtype=float), name, row_means)
        labels, places = list(columns), [float(place) for place in range(len(columns))]
        if row_means:
            labels, places = [*labels, "mean"], [*places, len(columns) + GAP]
        slanted = max(map(len, labels)) > 5
        axes.set_xticks(places, labels, rotation=45 if slanted else 0, ha="right" if slanted else "center")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(column_name, color=INK)
        axes.set_ylabel(row_name, color=INK)
        axes.tick_params(length=0, colors=INK)
        axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def _heatmap(axes: Axes, values: np.ndarray, name: str, row_means: bool) -> None:
    from matplotlib.colors import Normalize

    rows, columns = values.shape
    axes.set_title(f"{name} (%)", fontsize=10, color=INK)
    axes.set_facecolor("white")
    finite = 100 * values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 100.0)
    scale = Normalize(low, max(high, low + 0.1))  # one number alone has no range
    _cells(axes, values, scale, 0.0)
    if row_means:
        _cells(axes, values.mean(axis=1, keepdims=True), scale, columns + GAP)
    axes.set_xlim(-0.5, columns - 0.5 + (1 + GAP if row_means else 0))
    axes.set_ylim(rows - 0.5, -0.5)
    if len(finite):
        bar = axes.figure.colorbar(axes.images[0], ax=axes, shrink=0.85, pad=0.03, aspect=25)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, colors=INK, labelsize=8)


def _cells(axes: Axes, values: np.ndarray, scale: Normalize, left: float) -> None:
    """Numbered cells, the centre of the first column at `left`."""
    from matplotlib import colormaps

    rows, columns = values.shape
    percent = np.ma.masked_invalid(100 * values)
    colours = colormaps["Blues"].with_extremes(bad=NOTHING)
    extent = (left - 0.5, left + columns - 0.5, rows - 0.5, -0.5)
    axes.imshow(percent, cmap=colours, norm=scale, extent=extent, aspect="auto", interpolation="nearest")
    for row, column in np.ndindex(rows, columns):
        known = bool(np.isfinite(values[row, column]))
        text = f"{100 * values[row, column]:.1f}" if known else "–"
        shade = ("white" if scale(100 * values[row, column]) > 0.55 else INK) if known else MUTED
        axes.text(left + column, row, text, ha="center", va="center", fontsize=8, color=shade)


def line_figure(
    panels: Panels,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    column_name: str = "",
    positions: np.ndarray | None = None,
) -> Figure:
    """A line for each row over the columns, in percent; a line is broken where a number is missing.

    Args:
        panels, rows, columns, title: as `heatmap_figure`'s.
        column_name: what the horizontal axis shows.
        positions: `rows cols`, each point's place on a logarithmic horizontal axis, such as the number of parameters
            in SimCLR's figure 7; the points then carry their columns' labels. None = the columns, equally far apart.

    Raises ValueError for no panel, and for an array that does not fit the labels.

    Example: `line_figure({"linear": np.eye(2)}, ["a", "b"], ["c", "d"])` has two lines, from 100 to 0 and back.
    """
    _check(panels if positions is None else {**panels, "positions": positions}, rows, columns)
    figure, grid = new_figure(1, len(panels), (3.8 * len(panels) + 0.6 + 0.085 * max(map(len, rows)), 3.4))
    places = np.tile(np.arange(len(columns), dtype=float), (len(rows), 1)) if positions is None else positions
    for axes, (name, values) in zip(grid[0], panels.items(), strict=True):
        _lines(axes, places, 100 * np.asarray(values, dtype=float), rows)
        tidy_axes(axes, column_name, f"{name} (%)")
        axes.margins(x=0.08, y=0.12)
        if positions is None:
            axes.set_xticks(range(len(columns)), columns)
            axes.set_xlim(-0.4, len(columns) - 0.6)  # also columns that have no number yet
        else:
            _labelled_points(axes, positions, 100 * np.asarray(values, dtype=float), columns)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, labelcolor=INK, fontsize=9)
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def _lines(axes: Axes, places: np.ndarray, percent: np.ndarray, rows: Sequence[str]) -> None:
    from matplotlib import colormaps

    few = (BLUE, RUST, RIGHT, INK)
    shades = few if len(rows) <= len(few) else colormaps["viridis"](np.linspace(0, 0.9, len(rows)))
    for i, name in enumerate(rows):
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(places[i], percent[i], color=shades[i], marker=marker, markersize=5, linewidth=1.6, label=name)


def _labelled_points(axes: Axes, positions: np.ndarray, percent: np.ndarray, columns: Sequence[str]) -> None:
    if np.isfinite(positions).any():
        axes.set_xscale("log")
    for (row, column), value in np.ndenumerate(percent):
        if np.isfinite(value):
            at = (positions[row, column], value)
            above = (0, 6)
            axes.annotate(columns[column], at, above, textcoords="offset points", ha="center", fontsize=7, color=MUTED)


def _check(panels: Panels, rows: Sequence[str], columns: Sequence[str]) -> None:
    if not panels:
        raise ValueError("no panel to draw: pass at least one array `rows cols` by its name")
    for name, values in panels.items():
        if np.shape(values) != (len(rows), len(columns)):
            raise ValueError(
                f"the panel {name!r} has shape {np.shape(values)} for {len(rows)} rows and {len(columns)} columns: "
                f"pass an array `rows cols`"
            )
