"""How long the cells of a label sweep will take, from a few timed steps of every arm."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from contrastive_core.evaluate.selection import LabelProtocol, Rows, selection_parts, whole_trials
from cpc.label_bench import Bench, Cell
from cpc.label_protocols import FeatureTable, FinetuneProtocol, LatentProtocol, ProbeProtocol
from cpc.label_recipes import protocol_of

SAMPLE = 64
"""Images by which encoding is timed, at least."""


def planned_seconds(bench: Bench, cells: Sequence[Cell]) -> dict[Cell, float]:
    """How long each cell should take: a few steps, or one probe, of every arm are timed where its labels are fewest.

    Encoding images as they are, once for all cells of an encoder, is counted with the first of them. It is an estimate:
    a support vector machine's cost rises faster than its labels. An arm that cannot be timed takes no time: its cells
    say what is wrong with it.
    """
    seconds: dict[Cell, float] = {}
    counted: set[FeatureTable] = set()
    for arm in dict.fromkeys(cell.arm for cell in cells):
        mine = {cell: bench.choices[cell.amount, cell.seed].indices for cell in cells if cell.arm == arm}
        fewest = min(mine.values(), key=len)
        try:
            protocol = protocol_of(bench, arm, fewest)
            copies = seconds_of_copies(protocol)
            table = table_of(protocol)
            few = table and table.of_others(torch.cat([fewest, bench.used[:SAMPLE]]).unique())
            trial, image = timings(with_little_to_encode(protocol, few), fewest)
            seconds |= {
                cell: whole_trials(len(protocol.settings), len(selection_parts(bench.labels[labels])))
                * trial * protocol.cost(len(labels)) / protocol.cost(len(fewest))
                + image * len(bench.test) + copies
                for cell, labels in mine.items()
            }  # fmt: skip
            if table and few and few.encoded and not table.encoded and table not in counted:
                counted.add(table)
                first = min(mine, key=lambda cell: cell.seed)
                seconds[first] += few.seconds / few.encoded * (len(bench.used) + len(bench.test))
        except Exception:
            seconds |= dict.fromkeys(mine, 0.0)
    return seconds


def table_of(protocol: LabelProtocol[Any]) -> FeatureTable | None:
    """The features that a protocol reads; None where it classifies images."""
    return protocol.table if isinstance(protocol, ProbeProtocol | LatentProtocol) else None


def with_little_to_encode(protocol: LabelProtocol[Any], few: FeatureTable | None) -> LabelProtocol[Any]:
    """The same with features of few images, and one augmented copy of each: a plan is not to wait for all."""
    if isinstance(protocol, ProbeProtocol) and few:
        return replace(protocol, table=few)
    if isinstance(protocol, LatentProtocol):
        return replace(protocol, table=few or protocol.table, encodings=1)
    if isinstance(protocol, FinetuneProtocol):
        return replace(protocol, first=replace(protocol.first, encodings=1))
    return protocol


def seconds_of_copies(protocol: LabelProtocol[Any]) -> float:
    """Seconds that a cell's augmented copies take to encode, by one of an image; 0 where it has none.

    They are about as many whatever the cell's labels.
    """
    latents = protocol.first if isinstance(protocol, FinetuneProtocol) else protocol
    if not isinstance(latents, LatentProtocol):
        return 0.0
    one = replace(latents, encodings=1)
    began = time.perf_counter()
    _ = one.copies
    return (time.perf_counter() - began) * latents.copies_each


def timings(protocol: LabelProtocol[Any], chosen: Tensor) -> tuple[float, float]:
    """Seconds of one whole trial, of a network by a few of its steps, and of classifying one image."""

    def timed(share: float, images: int = 1) -> float:
        began = time.perf_counter()
        at = Rows("train", chosen.repeat(-(-images // len(chosen)))[:images])
        protocol.predict(chosen, at, protocol.settings[0], share, 0)
        return time.perf_counter() - began

    if isinstance(protocol, ProbeProtocol):
        protocol.table.at(Rows("train", chosen))  # encoded once, and counted apart
        return timed(1.0), 0.0
    timed(1e-9)
    image = max(0.0, timed(1e-9, 65) - timed(1e-9)) / 64
    steps = protocol.cost(len(chosen))
    short, longer = min(1.0, 4 / steps), min(1.0, 16 / steps)
    if longer <= short:
        return timed(1.0), image
    return max(0.0, timed(longer) - timed(short)) / (longer - short), image


def duration(seconds: float) -> str:
    """Seconds as people say them. Example: `duration(7200)` is "2.0 h", `duration(90)` is "90 s"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
