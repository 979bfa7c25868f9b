"""What a sweep's cells come to, on cells whose every prediction is known."""

from __future__ import annotations

import csv
import dataclasses
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cpc.label_report import (
    BEST,
    SAME,
    SCRATCH,
    Arms,
    CellResult,
    accuracy_rows,
    balanced,
    best_protocol,
    curves_of,
    read_results,
    savings_of,
    scratch_curves,
    shown_protocols,
    write_report,
)

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
    draws: int = 9,
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
    """Right on 8, 20 and 32 of 40 with 10, 40 and 160 labels, at every draw alike."""
    return [
        cell(SCRATCH, protocol, labels, right, seed=seed)
        for seed in seeds or (0,)
        for labels, right in {10: 8, 40: 20, 160: 32}.items()
    ]


def found(results: list[CellResult], against: str = BEST, **options: Tensor) -> dict[int, dict[str, Any]]:
    """The savings of the one pre-trained arm by number of labels."""
    rows = savings_of(curves_of(results), options.pop("truth", TRUTH), **options)
    return {row["labels"]: row for row in rows if row["against"] == against}


# ---- which curve from scratch ----


def test_the_best_from_scratch_is_the_best_at_each_number_of_labels():
    results = [
        cell(SCRATCH, "cnn", 10, 12),
        cell(SCRATCH, "patches", 10, 8),
        cell(SCRATCH, "image", 10, 9),
        cell(SCRATCH, "cnn", 40, 20),
        cell(SCRATCH, "patches", 40, 24),
        cell(SCRATCH, "image", 40, 22),
        cell(SCRATCH, "svm", 160, 30),
        cell("CPC", "linear", 10, 40),
        cell("random", "linear", 40, 40),
    ]
    for order in (results, results[::-1]):
        curves = scratch_curves(curves_of(order))
        named = {name: {labels: protocol for labels, (protocol, _) in curve.items()} for name, curve in curves.items()}
        assert named == {BEST: {10: "cnn", 40: "patches", 160: "svm"}, SAME: {10: "image", 40: "patches"}}
        assert [list(curve) for curve in curves.values()] == [[10, 40, 160], [10, 40]]
        assert curves[BEST][10][1].accuracies(10) == [12 / 40]


def test_the_best_is_so_in_the_mean_over_draws():
    lucky = [cell(SCRATCH, "cnn", 10, right, seed=seed) for seed, right in enumerate([36, 4])]
    steady = [cell(SCRATCH, "patches", 10, 22, seed=seed) for seed in (0, 1)]
    assert scratch_curves(curves_of(lucky + steady))[BEST][10][0] == "patches"


def test_without_a_network_of_the_same_kind_there_is_one_curve():
    assert list(scratch_curves(curves_of([cell(SCRATCH, "svm", 10, 8), cell("CPC", "linear", 10, 9)]))) == [BEST]
    assert scratch_curves(curves_of([cell("CPC", "patches", 10, 9)])) == {}


# ---- savings ----


def test_a_saving_that_is_known_and_sure():
    """Right with 10 labels on exactly the images on which scratch is with 40: 4.0, whatever images are drawn."""
    row = found([*scratch(), cell("CPC", "linear", 10, 20)])[10]
    assert row == {
        "method": "CPC",
        "protocol": "linear",
        "labels": 10,
        "against": BEST,
        "saving": "4.0",
        "low": "4.0",
        "high": "4.0",
        "saves": True,
        "draws": 1,
        "runs": 1,
    }


@pytest.mark.parametrize(
    ("labels", "right", "saving", "saves"),
    [
        (10, 40, "> 16.0", True),
        (40, 40, "> 4.0", True),
        (160, 40, "> 1.0", True),
        (10, 32, "16.0", True),
        (40, 20, "1.0", False),
        (160, 20, "0.25", False),
        (10, 0, "< 1.0", False),
        (40, 0, "< 0.25", False),
    ],
)
def test_savings_within_and_beyond_the_curve(labels, right, saving, saves):
    row = found([*scratch(), cell("CPC", "linear", labels, right)])[labels]
    assert (row["saving"], row["low"], row["high"], row["saves"]) == (saving, saving, saving, saves)


def test_what_may_be_luck_is_not_said_to_save():
    """Right on 9 images where scratch is right on 8 others: 1.1, and less than 1 where other images are drawn."""
    row = found([*scratch(), cell("CPC", "linear", 10, range(30, 39))])[10]
    assert (row["saving"], row["low"], row["saves"]) == ("1.1", "< 1.0", False)


def test_both_curves_are_compared_with():
    """Against the best a saving of 4, and of 16 against the same network, which needs 160 labels for as much."""
    same = [cell(SCRATCH, "image", labels, right) for labels, right in {10: 4, 40: 12, 160: 20}.items()]
    results = [*scratch(), *same, cell("CPC", "linear", 10, 20)]
    assert [found(results, against)[10]["saving"] for against in (BEST, SAME)] == ["4.0", "16.0"]


def test_every_arm_that_is_not_from_scratch_has_its_rows():
    results = [*scratch(), cell("CPC", "svm", 40, 20), cell("CPC", "svm", 10, 20), cell("random", "linear", 10, 8)]
    rows = savings_of(curves_of(results), TRUTH)
    assert [(row["method"], row["protocol"], row["labels"], row["saving"]) for row in rows] == [
        ("CPC", "svm", 10, "4.0"),
        ("CPC", "svm", 40, "1.0"),
        ("random", "linear", 10, "1.0"),
    ]


def test_draws_are_paired_by_their_seed():
    """Each draw as right with 10 labels as scratch with 40 of the same draw: sure of 4.0, in whatever order they came.

    Were draw 5 held against draw 2, the interval would be wide.
    """
    results = []
    for seed, fewer in {2: 0, 5: 7}.items():
        results += [cell(SCRATCH, "cnn", 10, 9 - fewer, seed=seed), cell(SCRATCH, "cnn", 160, 36, seed=seed)]
        results += [cell(SCRATCH, "cnn", 40, 24 - fewer, seed=seed), cell("CPC", "knn", 10, 24 - fewer, seed=seed)]
    for order in (results, results[::-1], results[4:] + results[:4]):
        row = found(order)[10]
        assert [row[name] for name in ("saving", "low", "high", "draws")] == ["4.0", "4.0", "4.0", 2]


def test_runs_and_draws_are_counted_and_averaged_over():
    """Two runs of two draws, right on 14 and on 26 of 40: in the mean on 20, as scratch with 40."""
    runs = [
        cell("CPC", "linear", 10, right, seed=seed, repeat=repeat)
        for repeat, right in enumerate([14, 26])
        for seed in (0, 1)
    ]
    row = found([*scratch(0, 1), *runs])[10]
    assert (row["saving"], row["runs"], row["draws"]) == ("4.0", 2, 2)
    assert float(row["low"]) < 3 < 5 < float(row["high"]), "runs that differ"
    assert Arms.of(runs).accuracies(10) == pytest.approx([0.5, 0.5])
    right = Arms.of(runs[::-1]).right(10, [1, 0], TRUTH)
    assert right.shape == (2, 2, 40)
    assert right.sum(2).tolist() == [[14, 14], [26, 26]]


def test_a_missing_cell_leaves_its_draw_out_and_no_other():
    runs = [
        cell("CPC", "linear", labels, 20, seed=seed, repeat=repeat)
        for labels in (10, 40)
        for seed in (0, 1)
        for repeat in (0, 1)
    ]
    assert {labels: row["draws"] for labels, row in found([*scratch(0, 1), *runs]).items()} == {10: 2, 40: 2}
    for gone in range(4):
        rows = found([*scratch(0, 1), *runs[:gone], *runs[gone + 1 :]])
        assert {labels: row["draws"] for labels, row in rows.items()} == {10: 1, 40: 2}
    assert found(runs) == {}
    assert found([*scratch(2), *runs]) == {}, "not one draw in common"
    assert Arms.of(runs[:3]).seeds(10) == {0}


def test_one_draw_of_many_labels_stands_for_all_draws_of_few():
    """From 160 labels on there is one draw from scratch: draws of 10 labels that are as good as it save 16."""
    one_above = [one for one in scratch(0, 1, 2) if one.labels < 160] + [cell(SCRATCH, "cnn", 160, 32, draws=1)]
    few = [cell("CPC", "linear", 10, 32, seed=seed) for seed in (0, 1, 2)]
    many = cell("CPC", "linear", 160, 32)
    rows = found([*one_above, *few, many])
    assert [rows[10][name] for name in ("saving", "low", "high", "draws")] == ["16.0", "16.0", "16.0", 3]
    assert [rows[160][name] for name in ("saving", "low", "high", "draws")] == ["1.0", "1.0", "1.0", 1]


def test_of_many_draws_from_scratch_those_of_the_arm_are_taken():
    """Draw 1 from scratch is twice as good, and the pre-trained arm has draw 0 alone."""
    lucky = [cell(SCRATCH, "cnn", labels, 40, seed=1) for labels in (10, 40, 160)]
    assert found([*scratch(0), *lucky, cell("CPC", "linear", 10, 20)])[10]["saving"] == "4.0"


# ---- the mean over classes ----


@pytest.mark.parametrize("counts", [(10, 10), (30, 5, 1), (7, 0, 21), (1, 99)])
def test_balanced_weights_make_the_mean_over_images_that_over_classes(counts):
    truth = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    weights = balanced(truth)
    assert weights.mean().item() == pytest.approx(1)
    right = torch.rand(6, len(truth), generator=torch.Generator().manual_seed(0)) < 0.6
    of_class = torch.stack([right[:, truth == label].double().mean(1) for label in truth.unique()])
    torch.testing.assert_close((right * weights).mean(1), of_class.mean(0))


def test_classes_of_one_size_have_weights_of_1():
    assert balanced(TRUTH).tolist() == [1.0] * 40
    assert balanced(torch.tensor([0, 0, 0, 1])).tolist() == pytest.approx([2 / 3] * 3 + [2.0])


UNEVEN = torch.tensor([0] * 30 + [1] * 10)


def uneven_cells() -> list[CellResult]:
    """From scratch a fifth, a half and four fifths of each class are right; pre-trained, 14 of 30 and 6 of 10."""

    def right(common: int, rare: int) -> list[int]:
        return [*range(common), *range(30, 30 + rare)]

    curve = {10: right(6, 2), 40: right(15, 5), 160: right(24, 8)}
    cells = [cell(SCRATCH, "cnn", labels, images, truth=UNEVEN) for labels, images in curve.items()]
    return [*cells, cell("CPC", "linear", 10, right(14, 6), truth=UNEVEN)]


def test_savings_by_the_mean_over_classes():
    """Right on 20 of 40 is as many as scratch with 40 labels; on 14 / 30 and 6 / 10 of the classes, more."""
    plain, weighted = (found(uneven_cells(), truth=UNEVEN, **options)[10] for options in ({}, {"per_class": True}))
    assert plain["saving"] == "4.0"
    share = ((14 / 30 + 6 / 10) / 2 - 0.5) / 0.3
    assert float(weighted["saving"]) == pytest.approx(4 * 4**share, abs=0.05) != 4


# ---- tables ----


def test_accuracies_are_means_over_runs_and_deviations_over_draws():
    runs = [
        cell("CPC", "linear", 10, right, seed=seed, repeat=repeat)
        for (seed, repeat), right in {(0, 0): 10, (0, 1): 14, (1, 0): 20, (1, 1): 20}.items()
    ]
    low, high = accuracy_rows(curves_of([cell("CPC", "linear", 40, 30), *runs]))
    assert low == {
        "method": "CPC",
        "protocol": "linear",
        "labels": 10,
        "accuracy": pytest.approx(0.4),
        "spread": pytest.approx(0.2 / 2**0.5),  # of 12 / 40 and 20 / 40
        "class accuracy": pytest.approx(0.4),
        "cells": 4,
        "seconds": 6.0,
    }
    assert (high["labels"], high["accuracy"], high["spread"], high["cells"]) == (40, 0.75, 0.0, 1)


def test_the_best_protocol_is_so_over_the_curve_and_not_where_a_cell_was_early():
    results = [
        *[cell("CPC", "linear", labels, right) for labels, right in {10: 20, 40: 22}.items()],
        *[cell("CPC", "svm", labels, right) for labels, right in {10: 10, 40: 36}.items()],
        cell("CPC", "finetune", 40, 40),
        cell("SimCLR", "knn", 10, 40),
    ]
    assert best_protocol(curves_of(results), "CPC") == "svm"
    assert best_protocol(curves_of(results[:2]), "CPC") == "linear"


def test_results_are_read_back_and_missing_files_are_none(tmp_path: Path):
    cells = [cell("CPC", "linear", 10, 20), cell(SCRATCH, "cnn", 40, 30, seed=3)]
    files = [tmp_path / "a.json", tmp_path / "not yet.json", tmp_path / "b.json"]
    for file, one in zip((files[0], files[2]), cells, strict=True):
        written = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
        file.write_text(json.dumps({**written, "predictions": one.predictions.tolist(), "asked": {"seed": 1}}))
    read = read_results(files)
    for one, other in zip(read, cells, strict=True):
        assert torch.equal(one.predictions, other.predictions)
        assert one.predictions.dtype == torch.int64
        assert dataclasses.replace(one, predictions=TRUTH) == dataclasses.replace(other, predictions=TRUTH)


# ---- what is written ----

ABOUT: dict[str, Any] = {
    "command": "python tools/sweep_labels.py labels=[10,40]",
    "runs": {"CPC": ["a", "b"], "SimCLR": ["c"]},
    "train_images": 4000,
    "test_images": 40,
    "classes": 4,
    "torch": "9.9.9",
    "notes": ["a note"],
    "cells": 12,
    "failed": ["CPC 0, svm: labels=10, seed 1: ValueError: no such thing"],
}
COLUMNS = ["method", "protocol", "repeat", "amount", "labels", "fraction", "seed", "split", "accuracy"]
COLUMNS += ["class_accuracy", "draws", "setting", "seconds"]


def test_the_report_is_four_files(tmp_path: Path):
    results = [*scratch(), cell("CPC", "linear", 10, 20), cell("CPC", "svm", 10, 24)]
    write_report(tmp_path, results, TRUTH, ABOUT)
    names = ["label_efficiency.csv", "label_efficiency.png", "report.md", "summary.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with Image.open(tmp_path / "label_efficiency.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 400


def test_the_csv_has_a_row_a_cell(tmp_path: Path):
    results = [*scratch(0, 1), cell("CPC", "linear", 10, 20, seed=1, repeat=2)]
    write_report(tmp_path, results, TRUTH, ABOUT)
    with (tmp_path / "label_efficiency.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert len(rows) == len(results)
    last = {name: rows[-1][name] for name in COLUMNS[:9]}
    assert last == {
        "method": "CPC",
        "protocol": "linear",
        "repeat": "2",
        "amount": "labels=10",
        "labels": "10",
        "fraction": "0.01",
        "seed": "1",
        "split": "digest101",
        "accuracy": "0.5",
    }


def test_the_report_says_what_its_reader_has_to_know(tmp_path: Path):
    results = [*scratch(0, 1, protocol="patches"), *[cell("CPC", "linear", 10, 20, seed=seed) for seed in (0, 1)]]
    write_report(tmp_path, results, TRUTH, ABOUT)
    lines = (tmp_path / "report.md").read_text().splitlines()
    for expected in (
        "8 of 12 cells; 4,000 training and 40 test images of 4 classes; torch 9.9.9, "
        f"Python {platform.python_version()}; 0.00 h.",
        "    python tools/sweep_labels.py labels=[10,40]",
        "- a note",
        "- one pre-training run of SimCLR: its intervals leave the luck of pre-training out",
        "- failed: CPC 0, svm: labels=10, seed 1: ValueError: no such thing",
        "- the best from scratch is chosen at each number of labels on the test images, in its favour: "
        "patches at 10, patches at 40, patches at 160",
        "digest101  labels=10, seed 1",
        "digest1600  labels=160, seed 0",
    ):
        assert expected in lines
    assert len([line for line in lines if line.startswith("digest")]) == 6, "each split once"
    assert [line.split() for line in lines if "4.0" in line] == [
        ["CPC", "linear", "10", *against.split(), "4.0", "4.0", "4.0", "True", "2", "1"] for against in (BEST, SAME)
    ]
    assert not any("mean accuracy of the classes" in line for line in lines), "they are of one size"


def test_the_luck_of_another_command_s_single_run_is_told_too(tmp_path: Path):
    results = [*scratch(), cell("CPC", "linear", 10, 20), cell("random", "linear", 10, 8)]
    write_report(tmp_path, results, TRUTH, {**ABOUT, "runs": {"SimCLR": ["c"]}})
    told = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("- one pre-training")]
    assert [line.split()[5] for line in told] == ["CPC:", "SimCLR:"]


def test_the_summary_is_the_same_in_numbers(tmp_path: Path):
    results = [*scratch(protocol="patches"), cell("CPC", "linear", 10, 20)]
    write_report(tmp_path, results, TRUTH, ABOUT)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: summary[name] for name in ABOUT} == ABOUT
    assert summary["seconds"] == 4 * 1.5
    assert summary["savings"] == savings_of(curves_of(results), TRUTH)
    assert summary["accuracies"] == accuracy_rows(curves_of(results))
    assert summary["scratch"] == {name: dict.fromkeys(["10", "40", "160"], "patches") for name in (BEST, SAME)}
    assert summary["splits"]["labels=40, seed 0"] == "digest400"
    assert "savings_per_class" not in summary


def test_classes_of_unlike_size_have_their_own_savings(tmp_path: Path):
    write_report(tmp_path, uneven_cells(), UNEVEN, ABOUT)
    summary = json.loads((tmp_path / "summary.json").read_text())
    (plain,), (weighted,) = summary["savings"], summary["savings_per_class"]
    assert plain["saving"] == "4.0" != weighted["saving"]
    assert "The same by the mean accuracy of the classes:" in (tmp_path / "report.md").read_text().splitlines()


@pytest.mark.parametrize("results", [[cell("CPC", "linear", 10, 20)], scratch(), [cell("random", "knn", 10, 3)]])
def test_a_report_of_the_first_cells_has_no_savings_yet(tmp_path: Path, results):
    write_report(tmp_path, results, TRUTH, ABOUT)
    assert "none yet" in (tmp_path / "report.md").read_text().splitlines()
    assert json.loads((tmp_path / "summary.json").read_text())["savings"] == []


def test_a_curve_that_lacks_a_draw_is_compared_on_the_others():
    pretrained = [cell("CPC", "linear", 10, 20, seed=seed) for seed in (0, 1, 2)]
    without_one = [each for each in scratch(0, 1, 2) if (each.labels, each.seed) != (40, 1)]
    assert found([*without_one, *pretrained])[10]["draws"] == 2
    one_draw_above = [*scratch(1, 2), cell(SCRATCH, "patches", 1000, 36, seed=0, draws=1), *pretrained[1:]]
    assert found(one_draw_above)[10]["draws"] == 2


def test_what_is_beyond_the_curve_from_scratch_is_not_said_to_save():
    beyond = found([*scratch(0), cell("CPC", "linear", 1000, 40)])[1000]
    assert (beyond["saving"], beyond["saves"]) == ("> 0.16", False)


def test_the_best_by_class_is_what_classes_are_compared_with():
    """A protocol that says the larger class to everything is the best by images, and not by classes."""
    truth = torch.repeat_interleave(torch.arange(2), torch.tensor([30, 10]))
    results = []
    for labels, share in {10: 0, 40: 1}.items():
        results.append(cell(SCRATCH, "svm", labels, range(30), truth=truth))
        results.append(cell(SCRATCH, "cnn", labels, [*range(18 + share), *range(30, 36 + share)], truth=truth))
    results.append(cell("CPC", "linear", 10, [*range(18), *range(30, 36)], truth=truth))
    curves = curves_of(results)
    assert scratch_curves(curves)[BEST][10][0] == "svm"
    (row,) = [row for row in savings_of(curves, truth, per_class=True) if row["against"] == BEST]
    assert row["saving"] == "1.0"


def test_one_planned_draw_of_a_better_network_is_not_hidden_by_many_of_a_worse():
    pixels = [cell(SCRATCH, "svm", 40, 20, seed=seed, draws=3) for seed in (0, 1, 2)]
    network = cell(SCRATCH, "cnn", 40, 36, draws=1)
    unfinished = cell(SCRATCH, "image", 40, 40, draws=3)
    assert scratch_curves(curves_of([*pixels, network, unfinished]))[BEST][40][0] == "cnn"


def test_a_point_above_the_line_is_shown_beside_it():
    line = [cell("CPC", "linear", labels, 20 + labels // 10) for labels in (10, 40, 160)]
    assert shown_protocols(curves_of(line), "CPC") == ["linear"]
    above = cell("CPC", "finetune", 40, 30)
    assert shown_protocols(curves_of([*line, above, cell("CPC", "knn", 40, 26)]), "CPC") == ["linear", "finetune"]
    assert shown_protocols(curves_of([*line, cell("CPC", "knn", 40, 20)]), "CPC") == ["linear"]
