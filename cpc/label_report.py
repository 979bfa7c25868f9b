"""What a label sweep writes: a table of cells, a curve with what is saved, a summary in numbers and a page to read."""

from __future__ import annotations

import csv
import json
import math
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

from contrastive_core.label_plots import Curve, SavingArrow, label_figure
from contrastive_core.plots import format_table, save_figure
from cpc.label_curves import (
    BEST,
    SCRATCH,
    ArmCurve,
    CellResult,
    Curves,
    LabelSaving,
    ScratchCurve,
    curves_of,
    savings_of,
    scratch_curves,
)

NO_SAVING = "none yet: it compares cells of protocols= with cells of scratch="
MEASURES = {"accuracy": "test accuracy", "class_accuracy": "mean test accuracy of the classes"}


@dataclass(frozen=True)
class Comparison:
    """By one measure of accuracy, "accuracy" or "class_accuracy": the curves from scratch, and all savings."""

    by: str
    scratch: dict[str, ScratchCurve]
    savings: list[LabelSaving]

    @staticmethod
    def of(curves: Curves, truth: Tensor, by: str, other_networks: Sequence[str]) -> Comparison:
        """What pre-training comes to by this measure."""
        savings = savings_of(curves, truth, per_class=by == "class_accuracy", other_networks=other_networks)
        return Comparison(by, scratch_curves(curves, by), savings)


def accuracy_rows(curves: Curves) -> list[dict[str, Any]]:
    """Mean and deviation of every arm at every number of labels."""
    rows = []
    for (method, protocol), curve in curves.items():
        for labels in sorted(curve.cells):
            accuracies = curve.accuracies(labels)
            cells = [cell for of_seed in curve.cells[labels].values() for cell in of_seed.values()]
            rows.append(
                {
                    "method": method,
                    "protocol": protocol,
                    "labels": labels,
                    "accuracy": statistics.mean(accuracies),
                    "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                    "class accuracy": statistics.mean(curve.accuracies(labels, "class_accuracy")),
                    "cells": len(cells),
                    "seconds": round(sum(cell.seconds for cell in cells), 1),
                }
            )
    return rows


def saving_numbers(saving: LabelSaving) -> dict[str, Any]:
    """The same for programs: the labels n_s that scratch needs, and of the interval's ends; null where censored."""
    ends = saving.interval._asdict().items()
    return {f"{name}_labels": end.bound * saving.labels if 0 < end.value < math.inf else None for name, end in ends}


def saving_row(saving: LabelSaving) -> dict[str, Any]:
    """A saving as it is written down: "2.5", or censored "> 10.0" and "< 1.0"."""
    ends = {name: str(end) for name, end in saving.interval._asdict().items()}
    named = {"method": saving.method, "protocol": saving.protocol, "labels": saving.labels, "against": saving.against}
    of = {"draws": saving.draws, "scratch_draws": saving.scratch_draws, "runs": saving.runs}
    return named | ends | {"saves": saving.saves} | of


def write_csv(path: Path, results: Sequence[CellResult]) -> None:
    """A row a cell."""
    names = [name for name in CellResult.__dataclass_fields__ if name != "predictions"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for result in results:
            written = {name: getattr(result, name) for name in names}
            writer.writerow((written | {"setting": json.dumps(result.setting)}).values())


# ---- the picture ----


def draw(path: Path, curves: Curves, compared: Comparison) -> None:
    """Accuracy against labels: the best protocol of every method, the best from scratch, and what is saved.

    Lines are of what was measured. Where the best from scratch lacks choices of labels, savings are read off with those
    filled in, beside its line.
    """
    by, drawn = compared.by, []
    best = compared.scratch.get(BEST)
    if best:
        points = {labels: point.curve.accuracies(labels, by) for labels, point in best.points.items()}
        drawn.append(Curve(BEST, points, baseline=True))
    arrows = []
    for method in dict.fromkeys(method for method, _ in curves if method != SCRATCH):
        for protocol in shown_protocols(curves, method, by):
            curve = curves[method, protocol]
            points = {labels: curve.accuracies(labels, by) for labels in sorted(curve.cells)}
            if method == "random" and len(points) < 2 and drawn:
                continue  # a dot far below squeezes all lines into a strip; it is in the tables
            drawn.append(Curve(f"{method}, {protocol}", points))
            if method != "random":
                arrows += [
                    SavingArrow(
                        each.labels,
                        statistics.mean(points[each.labels]),
                        each.interval.saving,
                        len(drawn) - 1,
                        each.saves,
                    )
                    for each in compared.savings
                    if (each.method, each.protocol, each.against) == (method, protocol, BEST)
                ]
    save_figure(label_figure(drawn, arrows, measure=MEASURES[by]), path)


def shown_protocols(curves: Curves, method: str, by: str = "accuracy") -> list[str]:
    """The best protocol of a method, and that of fewer label counts which is most above it at one of them, if any."""
    best = best_protocol(curves, method, by)
    line = curves[method, best]

    def gain(curve: ArmCurve) -> float:
        shared = curve.cells.keys() & line.cells.keys()
        return max(
            (statistics.mean(curve.accuracies(n, by)) - statistics.mean(line.accuracies(n, by)) for n in shared),
            default=0.0,
        )

    fewer = {
        protocol: gain(curve)
        for (name, protocol), curve in curves.items()
        if name == method and len(curve.cells) < len(line.cells)
    }
    above = max(fewer, key=lambda protocol: fewer[protocol], default=best)
    return [best, above] if fewer.get(above, 0.0) > 0 else [best]


def best_protocol(curves: Curves, method: str, by: str = "accuracy") -> str:
    """Of a method's protocols the one with the highest mean, of those with the most label counts."""
    mine = {protocol: curve for (name, protocol), curve in curves.items() if name == method}
    most = max(len(curve.cells) for curve in mine.values())
    whole = {protocol: curve for protocol, curve in mine.items() if len(curve.cells) == most}
    shared = set.intersection(*(set(curve.cells) for curve in whole.values()))

    def mean(protocol: str) -> float:
        curve = whole[protocol]
        return statistics.mean(statistics.mean(curve.accuracies(labels, by)) for labels in shared or curve.cells)

    return max(whole, key=mean)


# ---- all of it ----


def write_report(out: Path, results: Sequence[CellResult], truth: Tensor, about: dict[str, Any]) -> None:
    """label_efficiency.csv and .png, summary.json and report.md of the cells that are done.

    Where classes are of unequal size everything is compared by the mean accuracy of the classes, too, and drawn so.

    Args: `truth`: `m` int64, the test images' classes. `about`: what the command knows, written down as it is; of it
    "other_networks" are the methods that the same network from scratch is not held against.
    """
    curves = curves_of(results)
    uneven = len(torch.bincount(truth).unique()) > 1
    compared = [Comparison.of(curves, truth, by, about["other_networks"]) for by in list(MEASURES)[: 1 + uneven]]
    splits = {f"{result.amount}, seed {result.seed}": result.split for result in results}
    about = {
        **about,
        "python": platform.python_version(),
        "seconds": round(sum(result.seconds for result in results), 1),
    }
    summary = {**about, "accuracies": accuracy_rows(curves)}
    for one, suffix in zip(compared, ("", "_per_class"), strict=False):
        summary[f"savings{suffix}"] = [saving_row(saving) | saving_numbers(saving) for saving in one.savings]
        summary[f"scratch{suffix}"] = {
            name: {labels: point.protocol for labels, point in curve.points.items()}
            for name, curve in one.scratch.items()
        }
    report = _report(about, curves, compared, splits, len(results))
    with whole_files(out) as partial:
        write_csv(partial("label_efficiency.csv"), results)
        partial("summary.json").write_text(json.dumps(summary | {"splits": splits}, indent=1) + "\n")
        partial("report.md").write_text(report)
        draw(partial("label_efficiency.png"), curves, compared[-1])


def write_failures(out: Path, failed: Sequence[str]) -> None:
    """report.md where no cell is done: what went wrong, a line each; without any, nothing."""
    if failed:
        with whole_files(out) as partial:
            lines = [
                "# How many labels pre-training saves",
                "",
                "No cell is done.",
                "",
                *(f"- {said}" for said in failed),
            ]
            partial("report.md").write_text("\n".join(lines) + "\n")


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
    about: Mapping[str, Any], curves: Curves, compared: Sequence[Comparison], splits: Mapping[str, str], cells: int
) -> str:
    lines = [
        "# How many labels pre-training saves",
        "",
        "![accuracy against labels](label_efficiency.png)",
        "",
        f"{cells} of {about['cells']} cells; {about['train_images']:,} training and {about['test_images']:,} test "
        f"images of {about['classes']} classes; torch {about['torch']}, scikit-learn {about['scikit-learn']}, "
        f"Python {about['python']}; "
        f"{about['seconds'] / 3600:.2f} h.",
        "",
        *[f"    {command}" for command in about["commands"]],
        "",
        *[f"- {note}" for note in about["notes"]],
        *[f"- failed: {said}" for said in about["failed"]],
        *_what_intervals_leave_out(curves),
        "- of a method's protocols the picture shows the one that does best on the test images, in its favour: all are"
        " in the tables",
        "",
        "## Accuracy: the mean over choices of labels and runs, and the deviation over choices",
        "",
        "```",
        format_table(accuracy_rows(curves)),
        "```",
        "",
    ]
    for one in compared:
        rows = [saving_row(saving) for saving in one.savings]
        lines += [
            f"## Label saving by {MEASURES[one.by]}: n_s / n, and its 95 % interval",
            "",
            *_about_scratch(one.scratch),
            "",
            "```",
            format_table(rows) if rows else NO_SAVING,
            "```",
            "",
        ]
    lines += ["## Splits", "", "```", *[f"{digest}  {name}" for name, digest in splits.items()], "```", ""]
    return "\n".join(lines)


def _what_intervals_leave_out(curves: Curves) -> list[str]:
    """Runs and choices of labels that there are few of, or that are missing."""
    said = [
        "- intervals of few choices of labels, or runs, are too narrow: what is called 95 % holds in about 84 % of"
        " cases with five choices, 75 % with three; two to four are never said to save anything"
    ]
    arms = {name: curve for name, curve in curves.items() if name[0] not in (SCRATCH, "random")}
    for (method, protocol), curve in arms.items():
        of_one = ", ".join(str(labels) for labels in sorted(curve.cells) if len(curve.repeats(labels)) == 1)
        if of_one:
            said.append(
                f"- one pre-training run of {method} {protocol} at {of_one} labels: intervals leave its luck out"
            )
    single = {labels for curve in curves.values() for labels in curve.cells if curve.planned(labels) == 1}
    if single:
        counts = ", ".join(map(str, sorted(single)))
        said.append(
            f"- one choice of labels at {counts}: intervals leave its luck out; few=1 gives as many as elsewhere, "
            "where these are not all labels"
        )
    for (method, protocol), curve in curves.items():
        for labels, of_seeds in sorted(curve.cells.items()):
            done, whole = sum(map(len, of_seeds.values())), curve.planned(labels) * len(curve.repeats())
            if done < whole:
                of_few_runs = any(len(of_seed) < len(curve.repeats(labels)) for of_seed in of_seeds.values())
                said.append(
                    f"- {method} {protocol} has {done} of {whole} cells with {labels} labels"
                    + (": in savings, runs differ elsewhere as they do where several were measured" * of_few_runs)
                )
    return said


def _about_scratch(scratch: Mapping[str, ScratchCurve]) -> list[str]:
    """What pre-training is held against at each number of labels."""
    if BEST not in scratch:
        return []
    best = scratch[BEST]
    named = [f"{point.protocol} at {labels} (of {', '.join(point.measured)})" for labels, point in best.points.items()]
    return [
        "- the best from scratch is chosen at each number of labels on the test images, in its favour: "
        + ", ".join(named),
        *[
            f"- left out of the {name}: {labels} labels, with {', '.join(those)} alone, which does not lead beside it"
            for name, curve in scratch.items()
            for labels, those in curve.left_out.items()
        ],
    ]
