"""What a label sweep's cells come to: a table, a curve, and how many labels pre-training saves.

At each number of labels the scratch curve is the best of all networks and probes that started from nothing, best by
their mean accuracy on the test images: where that choice errs, it errs in their favour. Beside it stands the curve of
the same network from random weights.
"""

from __future__ import annotations

import csv
import json
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive_core.evaluate.label_saving import SavingInterval, saving_interval
from contrastive_core.label_plots import Curve, SavingArrow, label_figure
from contrastive_core.plots import format_table, save_figure

SCRATCH = "scratch"
BEST, SAME = "best from scratch", "same network from scratch"


@dataclass(frozen=True)
class CellResult:
    """A finished cell: which arm with which labels, and the class that it gave to every test image."""

    method: str
    protocol: str
    repeat: int
    amount: str
    labels: int
    fraction: float
    seed: int
    split: str
    accuracy: float
    class_accuracy: float
    draws: int
    setting: dict[str, float]
    seconds: float
    predictions: Tensor


def read_results(files: Sequence[Path]) -> list[CellResult]:
    """Of all cells whose file is there."""
    results = []
    for file in files:
        if file.is_file():
            written = json.loads(file.read_text())
            written["predictions"] = torch.tensor(written["predictions"], dtype=torch.int64)
            results.append(CellResult(**{name: written[name] for name in CellResult.__dataclass_fields__}))
    return results


@dataclass(frozen=True)
class Arms:
    """The results of one curve: by number of labels and seed, those of every pre-training run."""

    cells: dict[int, dict[int, dict[int, CellResult]]]  # labels: seed: repeat

    @staticmethod
    def of(results: Sequence[CellResult]) -> Arms:
        """Results of one method and protocol."""
        cells: dict[int, dict[int, dict[int, CellResult]]] = {}
        for result in results:
            cells.setdefault(result.labels, {}).setdefault(result.seed, {})[result.repeat] = result
        return Arms(cells)

    def accuracies(self, labels: int, by: str = "accuracy") -> list[float]:
        """Of every seed the mean over the runs; `by` "class_accuracy": of the classes' mean accuracies."""
        by_seed = sorted(self.cells[labels].items())
        return [statistics.mean(getattr(one, by) for one in of_seed.values()) for _, of_seed in by_seed]

    def repeats(self) -> set[int]:
        """The pre-training runs that have a result."""
        return {repeat for by_seed in self.cells.values() for of_seed in by_seed.values() for repeat in of_seed}

    def seeds(self, labels: int) -> set[int]:
        """The choices of labels of which every run has its result."""
        repeats = {repeat for of_seed in self.cells[labels].values() for repeat in of_seed}
        return {seed for seed, of_seed in self.cells[labels].items() if repeats <= of_seed.keys()}

    def planned(self, labels: int) -> int:
        """How many choices of labels there are to be."""
        return max(one.draws for of_seed in self.cells[labels].values() for one in of_seed.values())

    def right(self, labels: int, seeds: Sequence[int], truth: Tensor) -> Tensor:
        """`runs draws images` bool for these seeds, which every run has."""
        repeats = sorted({repeat for of_seed in self.cells[labels].values() for repeat in of_seed})
        cells = [[self.cells[labels][seed][repeat] for seed in seeds] for repeat in repeats]
        return torch.stack([torch.stack([cell.predictions == truth for cell in of_run]) for of_run in cells])


def curves_of(results: Sequence[CellResult]) -> dict[tuple[str, str], Arms]:
    """Every arm's results by method and protocol."""
    named: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        named.setdefault((result.method, result.protocol), []).append(result)
    return {name: Arms.of(mine) for name, mine in named.items()}


def scratch_curves(
    curves: Mapping[tuple[str, str], Arms], by: str = "accuracy"
) -> dict[str, dict[int, tuple[str, Arms]]]:
    """For `BEST` and `SAME`: at each number of labels the protocol from scratch that does best, with its results.

    Those of which all planned choices of labels are done go before the others, whose means may be of lucky ones.
    by: "accuracy" or "class_accuracy".
    """
    allowed = {BEST: None, SAME: ("patches", "image")}
    found: dict[str, dict[int, tuple[str, Arms]]] = {}
    for name, protocols in allowed.items():
        mine = {
            protocol: arms
            for (method, protocol), arms in curves.items()
            if method == SCRATCH and (protocols is None or protocol in protocols)
        }
        for labels in sorted({labels for arms in mine.values() for labels in arms.cells}):
            there = {protocol: arms for protocol, arms in mine.items() if labels in arms.cells}

            def rank(protocol: str, there: dict[str, Arms] = there, labels: int = labels) -> tuple[bool, float]:
                arms = there[protocol]
                whole = len(arms.seeds(labels)) >= arms.planned(labels)
                return whole, statistics.mean(arms.accuracies(labels, by))

            best = max(there, key=rank)
            found.setdefault(name, {})[labels] = (best, there[best])
    return found


def savings_of(
    curves: Mapping[tuple[str, str], Arms], truth: Tensor, *, per_class: bool = False
) -> list[dict[str, Any]]:
    """The label saving of every pre-trained arm at every number of labels, against both curves from scratch.

    Args:
        truth: `m` int64, the test images' classes.
        per_class: by the mean accuracy of the classes, which also decides which protocol from scratch is the best.
    """
    rows = []
    weights = balanced(truth) if per_class else None
    for against, scratch in scratch_curves(curves, "class_accuracy" if per_class else "accuracy").items():
        for (method, protocol), arms in curves.items():
            if method == SCRATCH:
                continue
            for labels in sorted(arms.cells):
                seeds = common_seeds(arms, labels, scratch)
                if seeds:
                    interval = _saving(labels, arms, scratch, seeds, truth, weights)
                    runs = max(len(of_seed) for of_seed in arms.cells[labels].values())
                    named = {"method": method, "protocol": protocol, "labels": labels, "against": against}
                    rows.append(named | _saving_row(interval) | {"draws": len(seeds), "runs": runs})
    return rows


def common_seeds(arms: Arms, labels: int, scratch: Mapping[int, tuple[str, Arms]]) -> list[int]:
    """The choices of labels that an arm and the whole scratch curve have; one that is the only planned one aside."""
    seeds = arms.seeds(labels)
    for count, (_, from_scratch) in scratch.items():
        if from_scratch.planned(count) > 1:
            seeds &= from_scratch.seeds(count)
    return sorted(seeds)


def _saving(
    labels: int,
    arms: Arms,
    scratch: Mapping[int, tuple[str, Arms]],
    seeds: Sequence[int],
    truth: Tensor,
    weights: Tensor | None,
) -> SavingInterval:
    points: dict[int, Tensor] = {}
    for count, (_, from_scratch) in scratch.items():
        # above a tenth of the labels one choice may be planned: it stands for all
        drawn = seeds if from_scratch.planned(count) > 1 else sorted(from_scratch.cells[count])[:1]
        points[count] = from_scratch.right(count, drawn, truth)[0].expand(len(seeds), -1)
    right = arms.right(labels, seeds, truth)
    if weights is not None:
        right, points = right * weights, {count: there * weights for count, there in points.items()}
    return saving_interval(labels, right, points)


def _saving_row(interval: SavingInterval) -> dict[str, Any]:
    """`saves`: whether the whole interval is above 1; censored at a bound below 1, nothing is known."""
    return {
        "saving": str(interval.saving),
        "low": str(interval.low),
        "high": str(interval.high),
        "saves": interval.low.value > 1 and interval.low.bound >= 1,
    }


def balanced(truth: Tensor) -> Tensor:
    """Weights with a mean of 1 that make the mean over images the mean of the classes' accuracies."""
    counts = torch.bincount(truth).double()
    present = (counts > 0).sum()
    return (len(truth) / (present * counts.clamp(min=1)))[truth]


# ---- what is written ----


def accuracy_rows(curves: Mapping[tuple[str, str], Arms]) -> list[dict[str, Any]]:
    """Mean and deviation of every arm at every number of labels."""
    rows = []
    for (method, protocol), arms in curves.items():
        for labels in sorted(arms.cells):
            accuracies = arms.accuracies(labels)
            cells = [cell for of_seed in arms.cells[labels].values() for cell in of_seed.values()]
            rows.append(
                {
                    "method": method,
                    "protocol": protocol,
                    "labels": labels,
                    "accuracy": statistics.mean(accuracies),
                    "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                    "class accuracy": statistics.mean(cell.class_accuracy for cell in cells),
                    "cells": len(cells),
                    "seconds": round(sum(cell.seconds for cell in cells), 1),
                }
            )
    return rows


def write_csv(path: Path, results: Sequence[CellResult]) -> None:
    """A row a cell."""
    names = [name for name in CellResult.__dataclass_fields__ if name != "predictions"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(result, name) for name in names] for result in results)


def draw(path: Path, curves: Mapping[tuple[str, str], Arms], savings: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy against labels: the best protocol of every method, the best from scratch, and what is saved."""
    drawn = []
    best = scratch_curves(curves).get(BEST, {})
    if best:
        drawn.append(
            Curve(BEST, {labels: arms.accuracies(labels) for labels, (_, arms) in best.items()}, baseline=True)
        )
    arrows = []
    for method in dict.fromkeys(method for method, _ in curves if method != SCRATCH):
        for protocol in shown_protocols(curves, method):
            arms = curves[method, protocol]
            points = {labels: arms.accuracies(labels) for labels in sorted(arms.cells)}
            drawn.append(Curve(f"{method}, {protocol}", points))
            if method != "random":
                arrows += [
                    SavingArrow(row["labels"], statistics.mean(points[row["labels"]]), row["saving"], len(drawn) - 1)
                    for row in savings
                    if (row["method"], row["protocol"], row["against"]) == (method, protocol, BEST)
                ]
    save_figure(label_figure(drawn, arrows), path)


def shown_protocols(curves: Mapping[tuple[str, str], Arms], method: str) -> list[str]:
    """The best protocol of a method, and that of fewer label counts which is most above it at one of them, if any."""
    best = best_protocol(curves, method)
    line = curves[method, best]

    def gain(arms: Arms) -> float:
        shared = arms.cells.keys() & line.cells.keys()
        return max(
            (statistics.mean(arms.accuracies(n)) - statistics.mean(line.accuracies(n)) for n in shared), default=0.0
        )

    fewer = {
        protocol: gain(arms)
        for (name, protocol), arms in curves.items()
        if name == method and len(arms.cells) < len(line.cells)
    }
    above = max(fewer, key=lambda protocol: fewer[protocol], default=best)
    return [best, above] if fewer.get(above, 0.0) > 0 else [best]


def best_protocol(curves: Mapping[tuple[str, str], Arms], method: str) -> str:
    """Of a method's protocols the one with the highest mean, of those with the most label counts."""
    mine = {protocol: arms for (name, protocol), arms in curves.items() if name == method}
    most = max(len(arms.cells) for arms in mine.values())
    whole = {protocol: arms for protocol, arms in mine.items() if len(arms.cells) == most}
    shared = set.intersection(*(set(arms.cells) for arms in whole.values()))

    def mean(protocol: str) -> float:
        arms = whole[protocol]
        return statistics.mean(statistics.mean(arms.accuracies(labels)) for labels in shared or arms.cells)

    return max(whole, key=mean)


def write_report(out: Path, results: Sequence[CellResult], truth: Tensor, about: dict[str, Any]) -> None:
    """label_efficiency.csv and .png, summary.json and report.md of the cells that are done.

    Args: `truth`: `m` int64, the test images' classes. `about`: what the command knows, written down as it is.
    """
    curves = curves_of(results)
    savings = savings_of(curves, truth)
    uneven = len(torch.bincount(truth).unique()) > 1
    per_class = savings_of(curves, truth, per_class=True) if uneven else []
    splits = {f"{result.amount}, seed {result.seed}": result.split for result in results}
    chosen = {
        name: {labels: protocol for labels, (protocol, _) in curve.items()}
        for name, curve in scratch_curves(curves).items()
    }
    about = {
        **about,
        "python": platform.python_version(),
        "seconds": round(sum(result.seconds for result in results), 1),
    }
    summary = {
        **about,
        "accuracies": accuracy_rows(curves),
        "savings": savings,
        **({"savings_per_class": per_class} if uneven else {}),
        "scratch": chosen,
        "splits": splits,
    }
    report = _report(about, curves, savings, per_class, chosen, splits, len(results))
    with whole_files(out) as partial:
        write_csv(partial("label_efficiency.csv"), results)
        partial("summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        partial("report.md").write_text(report)
        draw(partial("label_efficiency.png"), curves, savings)


@contextmanager
def whole_files(out: Path) -> Iterator[Callable[[str], Path]]:
    """Files that come into their folder whole and together, whatever other processes write there.

    Yields `partial(name)`, the path to write `out/name` to until the end.
    """
    with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as folder:
        yield lambda name: Path(folder) / name
        for written in sorted(Path(folder).iterdir()):
            written.replace(out / written.name)


def _report(
    about: Mapping[str, Any],
    curves: Mapping[tuple[str, str], Arms],
    savings: Sequence[Mapping[str, Any]],
    per_class: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, Mapping[int, str]],
    splits: Mapping[str, str],
    cells: int,
) -> str:
    there: dict[str, set[int]] = {}  # of a command before, which had other runs, too
    for (name, _), arms in curves.items():
        there.setdefault(name, set()).update(arms.repeats())
    runs = {name: len(repeats) for name, repeats in there.items() if name not in (SCRATCH, "random")}
    runs |= {name: len(folders) for name, folders in about["runs"].items()}
    few = [name for name, count in runs.items() if count == 1]
    lines = [
        "# How many labels pre-training saves",
        "",
        "![accuracy against labels](label_efficiency.png)",
        "",
        f"{cells} of {about['cells']} cells; {about['train_images']:,} training and {about['test_images']:,} test "
        f"images of {about['classes']} classes; torch {about['torch']}, Python {about['python']}; "
        f"{about['seconds'] / 3600:.2f} h.",
        "",
        f"    {about['command']}",
        "",
        *[f"- {note}" for note in about["notes"]],
        *[f"- one pre-training run of {name}: its intervals leave the luck of pre-training out" for name in few],
        *[f"- failed: {said}" for said in about["failed"]],
        "- of a method's protocols the picture shows the one that does best on the test images, in its favour: all are"
        " in the tables",
        "- the best from scratch is chosen at each number of labels on the test images, in its favour: "
        + ", ".join(f"{protocol} at {labels}" for labels, protocol in chosen.get(BEST, {}).items()),
        "",
        "## Accuracy: the mean over choices of labels and runs, and the deviation over choices",
        "",
        "```",
        format_table(accuracy_rows(curves)),
        "```",
        "",
        "## Label saving: n_s / n, and its 95 % interval",
        "",
        "```",
        format_table(savings) if savings else "none yet",
        "```",
        "",
    ]
    if per_class:
        lines += ["The same by the mean accuracy of the classes:", "", "```", format_table(per_class), "```", ""]
    lines += ["## Splits", "", "```", *[f"{digest}  {name}" for name, digest in splits.items()], "```", ""]
    return "\n".join(lines)
