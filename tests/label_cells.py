"""Cells of a label sweep whose every prediction is known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cpc.label_curves import BEST, SCRATCH, CellResult, curves_of, savings_of
from cpc.label_report import saving_row

TRUTH = torch.arange(4).repeat(10)
"""Of 40 test images, as many of each class."""


def cell(
    method: str,
    protocol: str,
    labels: int,
    right: int | Iterable[int],
    *,
    seed: int = 0,
    repeat: int = 0,
    draws: int = 1,
    truth: Tensor = TRUTH,
) -> CellResult:
    """Right on the first so many test images, or on those named, and on no other."""
    correct = torch.zeros(len(truth), dtype=torch.bool)
    correct[list(range(right) if isinstance(right, int) else right)] = True
    return CellResult(
        method=method,
        protocol=protocol,
        repeat=repeat,
        amount=f"labels={labels}",
        labels=labels,
        fraction=labels / 1000,
        seed=seed,
        split=f"digest{labels}{seed}",
        accuracy=correct.double().mean().item(),
        class_accuracy=torch.stack([correct[truth == label].double().mean() for label in truth.unique()]).mean().item(),
        draws=draws,
        setting={"lr": 0.1},
        seconds=1.5,
        predictions=truth + ~correct,
    )


def scratch(*seeds: int, protocol: str = "cnn") -> list[CellResult]:
    """Right on 8, 20 and 32 of 40 with 10, 40 and 160 labels, at every draw alike, all that are to be."""
    return [
        cell(SCRATCH, protocol, labels, right, seed=seed, draws=len(seeds) or 1)
        for seed in seeds or (0,)
        for labels, right in {10: 8, 40: 20, 160: 32}.items()
    ]


UNEVEN = torch.tensor([0] * 30 + [1] * 10)


def uneven_cells() -> list[CellResult]:
    """From scratch a fifth, a half and four fifths of each class are right; pre-trained, 14 of 30 and 6 of 10."""

    def right(common: int, rare: int) -> list[int]:
        return [*range(common), *range(30, 30 + rare)]

    curve = {10: right(6, 2), 40: right(15, 5), 160: right(24, 8)}
    cells = [cell(SCRATCH, "cnn", labels, images, truth=UNEVEN) for labels, images in curve.items()]
    return [*cells, cell("CPC", "linear", 10, right(14, 6), truth=UNEVEN)]


def found(results: list[CellResult], against: str = BEST, **options: Tensor) -> dict[int, dict[str, Any]]:
    """The savings of the one pre-trained arm by number of labels."""
    rows = [saving_row(saving) for saving in savings_of(curves_of(results), options.pop("truth", TRUTH), **options)]
    return {row["labels"]: row for row in rows if row["against"] == against}
