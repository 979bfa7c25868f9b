"""Every evaluation of a frozen encoder as rows of one table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from contrastive_core.evaluate.features import pool_grid
from contrastive_core.evaluate.knn import knn_accuracy
from contrastive_core.evaluate.linear import Classifier, few_label_accuracy, linear_probe, paper_linear_probe


class LabelledFeatures(NamedTuple):
    """Features of the training and of the test images, `n ...` each, with their labels `n`."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def pooled(self, cells: int) -> LabelledFeatures:
        """The latent grids `n rows cols d` averaged into cells x cells and laid side by side."""
        return self._replace(train=pool_grid(self.train, cells), test=pool_grid(self.test, cells))

    def labelled(self) -> LabelledFeatures:
        """Without the rows that have no label (-1)."""
        train, test = self.train_labels >= 0, self.test_labels >= 0
        return LabelledFeatures(self.train[train], self.train_labels[train], self.test[test], self.test_labels[test])


def few_label_row(
    features: LabelledFeatures, per_class: int, draws: int, classifier: Classifier = linear_probe
) -> dict[str, Any]:
    """Mean and deviation over label draws: {"labels", "accuracy", "spread", "draws": each accuracy}."""
    accuracies = few_label_accuracy(*features, per_class=per_class, draws=draws, classifier=classifier)
    return {
        "labels": per_class * len(features.train_labels.unique()),
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if draws > 1 else 0.0,
        "draws": accuracies,
    }


def frozen_rows(
    grids: Mapping[str, LabelledFeatures],
    *,
    cells: Sequence[int] = (1, 2),
    per_class: Sequence[int] = (),
    draws: int = 5,
    all_labels: bool = True,
    paper_epochs: int = 0,
) -> list[dict[str, Any]]:
    """kNN, linear probes on all and on few labels, and the paper's probe, for each mode and readout.

    Args:
        grids: by mode ("patches", "image"), latent grids `n rows cols d`.
        cells: readouts: 1 = the mean over the grid, 2 = 2x2 cells side by side, ...
        per_class: label counts a class for the few-label rows, each the mean over `draws` draws.
        all_labels: also use all training labels (kNN and the linear probe).
        paper_epochs: epochs of the paper's linear probe on the grid; 0 leaves it out.

    Returns rows {"mode", "readout", "probe", "labels", "accuracy", ...}.
    """
    rows: list[dict[str, Any]] = []
    for mode, grid in grids.items():
        labels = len(grid.train_labels)
        for count in cells:
            features = grid.pooled(count)
            names = {"mode": mode, "readout": "mean" if count == 1 else f"{count}x{count}"}
            rows += [{**names, "probe": "linear", **few_label_row(features, number, draws)} for number in per_class]
            if all_labels:
                accuracy = knn_accuracy(*features)
                rows.append({**names, "probe": "kNN", "labels": labels, "accuracy": accuracy})
                rows.append(
                    {**names, "probe": "linear", "labels": labels, "accuracy": linear_probe(*features).accuracy}
                )
        if paper_epochs:
            accuracy = paper_linear_probe(*grid, epochs=paper_epochs).accuracy
            rows.append({"mode": mode, "readout": "grid", "probe": "paper", "labels": labels, "accuracy": accuracy})
    return rows
