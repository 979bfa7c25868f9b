"""Every evaluation of a frozen encoder as rows of one table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from contrastive_core.evaluate.features import pool_grid
from contrastive_core.evaluate.knn import knn_accuracy
from contrastive_core.evaluate.linear import ProbeFunction, few_label_accuracy, linear_probe


class LabelledFeatures(NamedTuple):
    """Features of the training and of the test images, `n ...` each, with their labels `n`."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def pooled(self, cells: int) -> LabelledFeatures:
        """The latent grids `n rows cols d` averaged into cells x cells and laid side by side."""
        return self._replace(train=pool_grid(self.train, cells), test=pool_grid(self.test, cells))


def few_label_row(
    features: LabelledFeatures,
    per_class: int,
    draws: int,
    classifier: ProbeFunction = linear_probe,
    *,
    ids: Tensor | None = None,
) -> dict[str, Any]:
    """Mean and deviation over label draws: {"labels", "accuracy", "spread" (None of one), "draws": each accuracy}.

    ids: the training images' identities, as `few_label_accuracy`.
    """
    accuracies = few_label_accuracy(*features, per_class=per_class, draws=draws, classifier=classifier, ids=ids)
    return {
        "labels": per_class * len(features.train_labels.unique()),
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if draws > 1 else None,
        "draws": accuracies,
    }


def probe_rows(
    readouts: Mapping[str, LabelledFeatures],
    *,
    per_class: Sequence[int] = (),
    draws: int = 5,
    all_labels: bool = True,
    ids: Tensor | None = None,
) -> list[dict[str, Any]]:
    """kNN and linear probes, on all and on few labels, for each readout.

    Args:
        readouts: features `n d` by the readout's name ("mean", "2x2").
        per_class: label counts a class for the few-label rows, each the mean over `draws` draws.
        all_labels: also use all training labels (kNN and the linear probe).
        ids: the training images' identities, as `few_label_accuracy`.

    Returns rows {"readout", "probe", "labels", "accuracy", ...}.
    """
    rows: list[dict[str, Any]] = []
    for readout, features in readouts.items():
        few = [few_label_row(features, number, draws, ids=ids) for number in per_class]
        rows += [{"readout": readout, "probe": "linear", **row} for row in few]
        if all_labels:
            for probe, accuracy in (("kNN", knn_accuracy(*features)), ("linear", linear_probe(*features).accuracy)):
                labels = len(features.train_labels)
                rows.append({"readout": readout, "probe": probe, "labels": labels, "accuracy": accuracy})
    return rows
