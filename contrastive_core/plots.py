"""Pictures and tables of a run: loss against chance, confusion, retrieval. Each function writes one small PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BLUE, RUST, MUTED, PALE = "#222222", "#2166ac", "#b2521b", "#8a8a8a", "#e6e6e6"
RIGHT, WRONG = "#1a9850", "#d73027"

Rows = Sequence[Mapping[str, Any]]
StrPath = str | os.PathLike[str]


def new_figure(rows: int, cols: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure that belongs to no window system and no global state, and its axes, `rows cols`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, cols, squeeze=False, **options)


def save_figure(figure: Figure, path: StrPath) -> None:
    """As a PNG of 256 colours: a third of the bytes, and nobody sees the difference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(100)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def tidy_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Name the axes, and leave of their frame and grid what helps to read off a value."""
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, length=3)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def plot_loss(metrics_rows: Rows, path: StrPath) -> None:
    """The loss over the steps against the loss of chance, and the kNN probe's accuracy where rows have `knn`.

    metrics_rows: the lines of `metrics.jsonl`: `step` and any of `loss`, `chance_loss`, `knn` (0 to 1); the rows of a
    probe need no loss. Raises ValueError when no row has a loss.

    Example: `plot_loss([{"step": 1, "loss": 5.1, "chance_loss": 5.3}], "loss.png")`.
    """
    loss, chance, knn = (_curve(metrics_rows, key) for key in ("loss", "chance_loss", "knn"))
    if not len(loss):
        raise ValueError(f"none of the {len(metrics_rows)} rows has a finite `loss`: pass the lines of metrics.jsonl")
    panels = 2 if len(knn) else 1
    figure, grid = new_figure(1, panels, (4.6 * panels + 0.6, 3.4))
    axes = grid[0, 0]
    many = len(loss) > 100
    axes.plot(
        *loss.T, color=BLUE, linewidth=1 if many else 1.8, alpha=0.3 if many else 1, label=None if many else "loss"
    )
    if many:  # a single batch's loss is noisy: a running mean over a fiftieth of the run shows the course
        axes.plot(*_running_mean(loss, len(loss) // 50).T, color=BLUE, linewidth=1.8, label="loss")
    if len(chance):
        axes.plot(*chance.T, color=MUTED, linestyle="--", linewidth=1.4, label="chance")
    tidy_axes(axes, "optimizer step", "contrastive loss (nats)")
    axes.legend(frameon=False, labelcolor=INK)
    if len(knn):
        probe = grid[0, 1]
        probe.plot(knn[:, 0], 100 * knn[:, 1], color=RUST, marker="o", markersize=3.5, linewidth=1.6)
        falls = len(knn) > 1 and knn[-1, 1] < knn[-2, 1]
        probe.annotate(
            f"{100 * knn[-1, 1]:.1f} %",
            (knn[-1, 0], 100 * knn[-1, 1]),
            (0, -16 if falls else 7),  # on the side that the line does not come from
            textcoords="offset points",
            ha="right",
            color=RUST,
        )
        probe.margins(y=0.15)
        tidy_axes(probe, "optimizer step", "kNN among training images (%)")
    save_figure(figure, path)


def _curve(rows: Rows, key: str) -> np.ndarray:
    """`n 2`: step and value of the rows that have a finite one."""
    points = [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
    return np.array([point for point in points if np.isfinite(point).all()]).reshape(-1, 2)


def _running_mean(curve: np.ndarray, width: int) -> np.ndarray:
    """Means over `width` neighbouring points, `n - width + 1` of them."""
    window = np.ones(max(1, width)) / max(1, width)
    return np.stack([np.convolve(column, window, mode="valid") for column in curve.T], axis=1)


def plot_confusion(
    labels: Tensor, predictions: Tensor, path: StrPath, class_names: Sequence[str] | None = None
) -> None:
    """The share of each class (a row) that was taken for each class (a column), in percent, with the accuracy above.

    labels, predictions: `n` integers from 0. Cells are numbered up to 20 classes.

    Raises ValueError for lengths that differ, or too few names.
    """
    labels, predictions = torch.as_tensor(labels).long(), torch.as_tensor(predictions).long()
    if labels.shape != predictions.shape or labels.dim() != 1 or len(labels) == 0:
        raise ValueError(f"labels {tuple(labels.shape)}, predictions {tuple(predictions.shape)}: pass n and n, n > 0")
    classes = 1 + int(torch.maximum(labels, predictions).max())
    names = [str(i) for i in range(classes)] if class_names is None else [_short(name, 14) for name in class_names]
    if len(names) < classes or int(torch.minimum(labels, predictions).min()) < 0:
        raise ValueError(f"{len(names)} class names for classes up to {classes - 1}: pass one a class, numbered from 0")
    classes = len(names)
    counts = torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes).double()
    share = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = min(9.0, 2.2 + 0.38 * classes)
    figure, grid = new_figure(1, 1, (side + 0.4, side))
    axes = grid[0, 0]
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    few = classes <= 20
    ticks = range(0, classes, 1 if few else -(-classes // 20))
    upright = max(map(len, names)) > 2
    axes.set_xticks(
        ticks, [names[i] for i in ticks], rotation=45 if upright else 0, ha="right" if upright else "center"
    )
    axes.set_yticks(ticks, [names[i] for i in ticks])
    for row, col in zip(*np.nonzero(share >= 0.5), strict=True) if few else ():
        shade = "white" if share[row, col] > 55 else INK
        axes.text(col, row, f"{share[row, col]:.0f}", ha="center", va="center", fontsize=8, color=shade)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    accuracy = (labels == predictions).double().mean().item()
    axes.set_title(f"accuracy {100 * accuracy:.1f} %   (rows in %)", fontsize=10, color=INK)
    save_figure(figure, path)


def plot_retrieval(
    queries: Tensor,
    neighbours: Tensor,
    path: StrPath,
    *,
    query_labels: Tensor | None = None,
    neighbour_labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """A row a query: the query, then its nearest training images, nearest first.

    queries: `n 3 h w` uint8; neighbours: `n k 3 h w` uint8; query_labels `n` and neighbour_labels `n k`: with both,
    a neighbour's frame is green where its class is the query's and red where it is not.

    Raises ValueError for shapes that do not fit.
    """
    if queries.dim() != 4 or neighbours.dim() != 5 or len(queries) != len(neighbours) or len(queries) == 0:
        raise ValueError(
            f"queries {tuple(queries.shape)}, neighbours {tuple(neighbours.shape)}: pass n 3 h w, n k 3 h w"
        )
    framed = query_labels is not None and neighbour_labels is not None
    n, k = neighbours.shape[:2]
    figure, grid = new_figure(
        n, k + 1, (0.72 * (k + 1) + 1.2, 0.72 * n + 0.4), gridspec_kw={"wspace": 0.06, "hspace": 0.06}
    )
    for row in range(n):
        _show(grid[row, 0], queries[row], INK)
        if query_labels is not None:
            label = int(query_labels[row])
            name = class_names[label] if class_names is not None else str(label)
            grid[row, 0].set_ylabel(_short(name, 12), rotation=0, ha="right", va="center", fontsize=9, color=INK)
        for col in range(k):
            same = framed and int(neighbour_labels[row, col]) == int(query_labels[row])  # type: ignore[index]
            _show(grid[row, col + 1], neighbours[row, col], (RIGHT if same else WRONG) if framed else MUTED)
    grid[0, 0].set_title("query", fontsize=9, color=INK)
    title = grid[0, 1].set_title("nearest training images", fontsize=9, color=INK, loc="left")
    title.set_in_layout(False)  # else its column is made as wide as the text
    save_figure(figure, path)


def _show(axes: Axes, image: Tensor, frame: str) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(2)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def format_table(rows: Rows) -> str:
    """Rows of named values as a plain-text table; columns in the order in which they first appear.

    Numbers are right-aligned, floats with three decimals; what a row lacks is a dash.

    Example: `format_table([{"probe": "kNN", "accuracy": 0.5}])` is

        probe  accuracy
        -----  --------
        kNN       0.500
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [all(not isinstance(row.get(column), str) for row in rows) for column in columns]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
