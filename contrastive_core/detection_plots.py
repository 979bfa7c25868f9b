"""Boxes over images: those that are there, and those that were found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from contrastive_core.data.boxes import Boxes
from contrastive_core.plots import INK, MUTED, RUST, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUE = "#1a9850"


def plot_found(
    images: Sequence[tuple[Tensor, Boxes]],
    found: Sequence[Mapping[str, Tensor]],
    class_names: Sequence[str],
    path: str | Path,
    *,
    least_score: float = 0.5,
) -> None:
    """Write a PNG of images `3 h w` uint8, four a row: true boxes green, found ones of at least such a score red.

    found: of each image boxes `n 4`, labels `n` from 0 and scores `n`. Above each found box stand its class and score.
    """
    cols = min(4, len(images))
    rows = math.ceil(len(images) / cols)
    figure, grid = new_figure(rows, cols, (2.4 * cols, 2.55 * rows))
    for axes in grid.flat[len(images) :]:
        axes.set_axis_off()
    for axes, (image, boxes), seen in zip(grid.flat, images, found, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(MUTED)
        for box in boxes.boxes:
            _rectangle(axes, box, TRUE, 2.2)
        for box, label, score in zip(seen["boxes"], seen["labels"], seen["scores"], strict=True):
            if score >= least_score:
                _rectangle(axes, box, RUST, 1.1)
                said = f"{class_names[int(label)]} {float(score):.2f}"
                paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
                axes.text(float(box[0]), float(box[1]), said, fontsize=6.5, color=INK, va="bottom", bbox=paper)
    figure.suptitle("green: there; brown: found, with class and score", color=INK, fontsize=10)
    save_figure(figure, path)


def _rectangle(axes: Axes, box: Tensor, colour: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box.tolist()
    # a pixel's own coordinates are its middle
    axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width))
