"""Ablations from the command line: `python tools/ablate.py ablation=NAME out=DIR [overrides for every cell]`.

A grid of pre-training runs, each composed from the configuration of tools/pretrain.py, the overrides of its row and of
its column, and evaluated by kNN and a linear probe of the frozen encoder. The table and the figure are drawn again
after every cell, so that a grid can be looked at while it grows; started again, it goes on where it was.

This is an entry point. What a grid is stands in configs/ablation/NAME.yaml.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from contrastive_core.ablation_plots import heatmap_figure, line_figure
from contrastive_core.data import BadImages, Splits, label_fraction
from contrastive_core.evaluate.knn import knn_accuracy
from contrastive_core.evaluate.linear import linear_probe
from contrastive_core.evaluate.report import LabelledFeatures
from contrastive_core.optim import square_root_scaling
from contrastive_core.plots import format_table, save_figure
from contrastive_core.run_log import read_metrics
from cpc.encoder_card import read_card
from cpc.entry import (
    Incomplete,
    bracketed,
    build,
    check_complete,
    command,
    config_search,
    list_keys,
    start_accelerator,
)
from cpc.evaluate import extract, labelled
from cpc.features import load_encoder, load_head
from cpc.mistakes import wants_traceback
from cpc.pretrain import PretrainSchema, pretrain
from cpc.run import as_written, check_numbers, plain
from cpc.run_folder import check_folder

FIGURES = ("heatmap", "lines")
EVALUATE_ON = ("test", "validation")

SHOWN = {"linear probe": "linear", "kNN": "knn"}
"""The panels of a figure, and the number that each shows."""

HELD_OUT = 0.2
"""The share of each class's training images that `evaluate_on=validation` keeps for itself."""

FOLDS = 2
"""Of the linear probe's choice of its regulariser: with 5 a probe takes three times as long as a cell's training on the
digits, for the same accuracies."""

LAST_ROWS = 5
"""Rows of `metrics.jsonl` at a run's end whose mean is its loss and its accuracy."""


@dataclass
class Grid:
    """An ablation, as configs/ablation/NAME.yaml describes it.

    Every override in it is one of tools/pretrain.py's. They are joined (`merged_overrides`) in this order: `every`, the
    command line, the row's, the column's.
    """

    title: str
    rows: dict[str, list[str]]  # label: overrides
    columns: dict[str, list[str]]
    every: list[str] = field(default_factory=list)  # overrides of every cell
    row_name: str = ""  # beside the figure's axes
    column_name: str = ""
    figure: str = "heatmap"  # or lines
    show: dict[str, str] = field(default_factory=dict)  # a panel: its number; none = SHOWN
    symmetric: bool = False  # (row, column) = (column, row): only the upper right half is run
    row_means: bool = False  # of a heat-map
    position: str | None = None  # lines: the number along the horizontal axis; null = the columns, equally far apart
    head: bool = False  # also probe what the projection head puts out: knn_head, linear_head
    leave_out: dict[str, list[str]] = field(default_factory=dict)  # row: columns that have no meaning with it


@dataclass
class AblateSchema:
    """Types of the top-level keys of configs/ablate.yaml."""

    ablation: Grid
    out: str
    evaluate_on: str
    overrides: list[str]


@dataclass(frozen=True)
class Cell:
    """A run of the grid: its labels, its overrides, and its folder below `out`."""

    row: str
    column: str
    overrides: list[str]
    folder: str

    def __str__(self) -> str:
        return f"{self.row} x {self.column}"


# --- the grid


def cells_of(grid: Grid, overrides: Sequence[str] = ()) -> list[Cell]:
    """The cells to run, row by row; `overrides` are for all of them.

    Raises ValueError for a figure or label that does not exist, and labels that would share a folder.

    Example: of a symmetric grid of 3 x 3 there are 6.
    """
    _check_grid(grid)
    cells = []
    for i, (row, of_row) in enumerate(grid.rows.items()):
        for j, (column, of_column) in enumerate(grid.columns.items()):
            if column in grid.leave_out.get(row, ()) or (grid.symmetric and j < i):
                continue
            merged = merged_overrides(grid.every, overrides, of_row, of_column)
            cells.append(Cell(row, column, merged, f"{folder_name(row)}/{folder_name(column)}"))
    return cells


def _check_grid(grid: Grid) -> None:
    if grid.figure not in FIGURES:
        raise ValueError(f"figure={grid.figure}: pass one of {', '.join(FIGURES)}")
    for name, labels in (("rows", list(grid.rows)), ("columns", list(grid.columns))):
        if len({folder_name(label) for label in labels}) < max(1, len(labels)):
            raise ValueError(f"the {name} {labels} are none, or share a folder: pass labels that differ in a letter")
    if grid.symmetric and list(grid.rows) != list(grid.columns):
        raise ValueError(f"symmetric, but rows {list(grid.rows)} and columns {list(grid.columns)} have other labels")
    for row, columns in grid.leave_out.items():
        if row not in grid.rows or not set(columns) <= set(grid.columns):
            raise ValueError(f"leave_out names {row}: {list(columns)}, which is no row with columns of the grid")


def merged_overrides(*lists: Sequence[str]) -> list[str]:
    """Overrides joined; what a later list says of a key takes away what the lists before said of it and below it.

    Example: (["encoder=a", "encoder.width=1", "seed=0"], ["encoder=b"]) gives ["seed=0", "encoder=b"].
    """
    merged: list[str] = []
    for later in lists:
        keys = [f"{_key(override)}." for override in later]
        merged = [earlier for earlier in merged if not any(f"{_key(earlier)}.".startswith(key) for key in keys)]
        merged += later
    return merged


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~").strip()


def folder_name(label: str) -> str:
    """The label with everything that a shell would stumble over as a dash. Example: "t 0.1 / b" gives "t-0.1-b"."""
    return re.sub(r"[^\w.]+", "-", label).strip("-.")


def compose(cell: Cell, out: Path) -> DictConfig:
    """The configuration that tools/pretrain.py would have with the cell's overrides, in the cell's folder.

    Raises ValueError that names the cell where hydra does not take an override.
    """
    try:
        with config_search():
            cfg = hydra.compose("pretrain", cell.overrides)
        cfg.run_dir, cfg.resume = str(out / cell.folder), "auto"
        check_complete(cfg)
        check_numbers(cfg)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{cell}: {error}") from error
    return cfg


@functools.lru_cache(maxsize=1)
def _loaded(data: str) -> Splits:
    splits: Splits = build(OmegaConf.create(json.loads(data)))
    return splits


def load_splits(data: DictConfig) -> Splits:
    """The images that a cell's `data` names; the last ones asked for are kept."""
    return _loaded(json.dumps(plain(data)))


def steps_in(epochs: float, *, _root_: DictConfig) -> int:
    """`${steps_in:EPOCHS}` in a cell: the optimizer steps in which it sees every training image so often.

    epochs * images / batch_size, rounded. Example: 5 epochs of 4,000 images in batches of 64 are 312 steps.
    """
    return max(1, round(epochs * len(load_splits(_root_.data).train) / _root_.batch_size))


def distinct(*names: str) -> list[str]:
    """`${distinct:a,b}` in a cell: the names without repeats. Example: "crop", "crop" gives ["crop"]."""
    return list(dict.fromkeys(names))


# --- one cell


def evaluation_splits(splits: Splits, evaluate_on: str) -> Splits:
    """What is probed with, and on: the labelled training images, and the test images or some of the former.

    "validation" holds out a fifth of each class, always the same, from the probes' training rows. They were seen in
    pre-training, without their labels; the test images are not touched.

    Raises ValueError for another word, and where there are no such images or no labels.
    """
    if evaluate_on not in EVALUATE_ON:
        raise ValueError(f"evaluate_on={evaluate_on}: pass one of {', '.join(EVALUATE_ON)}")
    if evaluate_on == "test":
        return labelled(splits)
    train = labelled(Splits(splits.train, splits.train)).train
    held = torch.zeros(len(train), dtype=torch.bool)
    held[label_fraction(train.labels, HELD_OUT)] = True
    return Splits(train.subset((~held).nonzero().flatten()), train.subset(held.nonzero().flatten()))


def run_cell(cell: Cell, cfg: DictConfig, *, evaluate_on: str, head: bool) -> dict[str, Any]:
    """Train and evaluate one cell, or what is left of that; returns its numbers, written to `cell.json` as well.

    A finished run is evaluated again only if that was on other images, or without the head where that is asked for.

    Raises ValueError where the folder's run had other settings, and whatever training raises.
    """
    run = Path(cfg.run_dir)
    check_folder(run, plain(cfg), resume=True)
    done = read_numbers(run)
    if done is not None and done["evaluate_on"] == evaluate_on and ("linear_head" in done or not head):
        return done
    began = time.perf_counter()
    if not (run / "encoder.json").is_file():  # the last file that training writes
        with contextlib.redirect_stdout(io.StringIO()):  # where its encoder is: known here
            pretrain(cfg)
    numbers: dict[str, Any] = {**course(run), **probed(run, cfg, evaluate_on, head)}
    seconds = round(time.perf_counter() - began + (done["seconds"] if done else 0), 1)
    numbers |= {"seconds": seconds, "evaluate_on": evaluate_on, "overrides": cell.overrides}
    partial = run / "cell.json.partial"
    partial.write_text(json.dumps(numbers, indent=1) + "\n")
    partial.rename(run / "cell.json")
    return numbers


def read_numbers(run: Path) -> dict[str, Any] | None:
    """What `run_cell` wrote; None for a cell that is not finished."""
    written = run / "cell.json"
    numbers: dict[str, Any] | None = json.loads(written.read_text()) if written.is_file() else None
    return numbers


def course(run: Path) -> dict[str, Any]:
    """How the training ended: the means of the last logged losses and of the method's own accuracies."""
    rows = [row for row in read_metrics(run) if row.get("loss") is not None][-LAST_ROWS:]
    means = {name: [row[name] for row in rows if row.get(name) is not None] for name in ("loss", "accuracy")}
    named = {"loss": "loss", "accuracy": "task_accuracy"}
    return {named[name]: float(np.mean(values)) for name, values in means.items() if values}


def probed(run: Path, cfg: DictConfig, evaluate_on: str, head: bool) -> dict[str, Any]:
    """Accuracies of kNN and of a linear probe of the frozen encoder, with `head` behind its projection head as well."""
    encoder = load_encoder(run)
    accelerator = start_accelerator(precision=cfg.precision, device=cfg.device, threads=cfg.threads)
    read: nn.Module = Beside(encoder, projection_head(run)).eval() if head else encoder
    splits = evaluation_splits(load_splits(cfg.data), evaluate_on)
    options = {"batch_size": encoder.batch_size, "workers": cfg.workers, "bad_images": BadImages(cfg.bad_images)}
    together = extract(read.to(accelerator.device), splits, accelerator, **options)
    numbers: dict[str, Any] = {"parameters": sum(p.numel() for p in encoder.parameters())}
    for suffix, columns in {"": slice(encoder.dim), "_head": slice(encoder.dim, None)}.items():
        if suffix == "" or head:
            part = together._replace(train=together.train[:, columns], test=together.test[:, columns])
            numbers |= {f"{name}{suffix}": value for name, value in accuracies(part).items()}
    return numbers


def accuracies(features: LabelledFeatures) -> dict[str, float]:
    """kNN and linear probe with all training labels."""
    return {"knn": float(knn_accuracy(*features)), "linear": linear_probe(*features, folds=FOLDS).accuracy}


class Beside(nn.Module):
    """Features `b d` and what a head makes of them, side by side: `b 3 h w` -> `b (d out)`."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images)
        return torch.cat([features, self.head(features)], dim=1)


def projection_head(run: Path) -> nn.Module:
    """The head that a run ended with, in eval mode; the identity where it had none."""
    _, card = read_card(run)
    return load_head(run).eval() if card.get("head") else nn.Identity()


# --- the results


def write_results(out: Path, grid: Grid, results: Sequence[tuple[Cell, dict[str, Any]]], **about: Any) -> None:
    """results.csv, results.json, results.md and figure.png of the cells that are done; `about` goes into the JSON."""
    table = [{"row": cell.row, "column": cell.column, **_numbers(numbers)} for cell, numbers in results]
    names = list(dict.fromkeys(name for row in table for name in row))
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(table)
    cells = [{"row": cell.row, "column": cell.column, "folder": cell.folder, **numbers} for cell, numbers in results]
    record = {"ablation": grid.title, **about, "torch": torch.__version__, "grid": asdict(grid), "cells": cells}
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "results.md").write_text(
        f"{grid.title}\n\n```\n{format_table(table)}\n```\n" if table else f"{grid.title}\n"
    )
    draw(out / "figure.png", grid, results)


def _numbers(numbers: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if isinstance(value, int | float)}


def draw(path: Path, grid: Grid, results: Sequence[tuple[Cell, dict[str, Any]]]) -> None:
    """The grid's figure; cells without a number are drawn as such."""
    panels = {title: values_of(grid, results, number) for title, number in (grid.show or SHOWN).items()}
    rows, columns = list(grid.rows), list(grid.columns)
    if grid.figure == "heatmap":
        figure = heatmap_figure(
            panels,
            rows,
            columns,
            title=grid.title,
            row_name=grid.row_name,
            column_name=grid.column_name,
            row_means=grid.row_means,
        )
    else:
        positions = values_of(grid, results, grid.position) if grid.position else None
        figure = line_figure(panels, rows, columns, title=grid.title, column_name=grid.column_name, positions=positions)
    save_figure(figure, path)


def values_of(grid: Grid, results: Sequence[tuple[Cell, dict[str, Any]]], number: str) -> np.ndarray:
    """One number of every cell as `rows cols`, NaN where there is none; a symmetric grid's lower half is the upper."""
    rows, columns = list(grid.rows), list(grid.columns)
    values = np.full((len(rows), len(columns)), math.nan)
    for cell, numbers in results:
        values[rows.index(cell.row), columns.index(cell.column)] = numbers.get(number, math.nan)
    return np.where(np.isnan(values), values.T, values) if grid.symmetric else values


# --- the command


def ablate(cfg: DictConfig) -> Path:
    """Run what is left of a grid; returns its folder. Raises Incomplete if a cell failed."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a grid runs in one process: python tools/ablate.py, without accelerate launch")
    if OmegaConf.is_missing(cfg, "out"):
        raise ValueError("not given: out; pass out=DIR, where the cells and the figure go")
    grid, out = read_grid(cfg), Path(cfg.out)
    cells = cells_of(grid, list(cfg.overrides))
    planned = [(cell, compose(cell, out)) for cell in cells]  # a mistake is told before anything is run
    evaluation_splits(load_splits(planned[0][1].data), cfg.evaluate_on)
    learns = [str(cell) for cell, planned_cfg in planned if planned_cfg.method._target_.endswith("Classifier")]
    if cfg.evaluate_on == "validation" and learns:
        raise ValueError(f"{learns[0]} trains on the labels it would be validated by: pass evaluate_on=test")
    out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("contrastive_core.data").setLevel(logging.WARNING)  # said once, not again for every cell
    failed = run_cells(grid, out, planned, cfg.evaluate_on)
    if len(failed) < len(cells):
        print(f"written to {out}: results.csv, results.json, results.md, figure.png")
    if failed:
        raise Incomplete(f"{len(failed)} of {len(cells)} cells failed: the same command tries them again")
    return out


def run_cells(grid: Grid, out: Path, planned: Sequence[tuple[Cell, DictConfig]], evaluate_on: str) -> dict[str, str]:
    """Run every cell, those that are there already first; returns what went wrong, by the cell's name."""
    kept = [read_numbers(Path(cfg.run_dir)) for _, cfg in planned]
    order = sorted(range(len(planned)), key=lambda i: kept[i] is None)
    results: dict[int, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for place, i in enumerate(order):
        cell, cfg = planned[i]
        try:
            results[i] = run_cell(cell, cfg, evaluate_on=evaluate_on, head=grid.head)
        except Exception as error:  # whatever it is, the other cells are worth having
            if wants_traceback():  # as everywhere: the whole traceback
                raise
            failed[str(cell)] = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"failed: {cell}: {failed[str(cell)]}", file=sys.stderr, flush=True)
        else:
            done = [(images_seen(planned[j][1]), numbers["seconds"]) for j, numbers in results.items()]
            left = time_left(done, [images_seen(planned[j][1]) for j in order[place + 1 :]])
            print(f"{cell}: {described(results[i])}; {'kept' if results[i] == kept[i] else left}", flush=True)
        if results and (place + 1 == len(order) or results.get(i) != kept[i]):  # an empty figure helps nobody
            so_far = [(planned[j][0], results[j]) for j in sorted(results)]
            write_results(out, grid, so_far, evaluate_on=evaluate_on, failed=failed)
    return failed


def described(numbers: dict[str, Any]) -> str:
    """The two accuracies in a line."""
    return f"linear {numbers['linear']:.3f}, kNN {numbers['knn']:.3f}"


def read_grid(cfg: DictConfig) -> Grid:
    """The ablation's description; references in its overrides are for the cells to resolve."""
    described = as_written(cfg.ablation)
    return Grid(**described)


def images_seen(cfg: DictConfig) -> int:
    """How many images a cell trains on, counted each time: what its duration goes by."""
    return int(cfg.steps) * int(cfg.batch_size)


def time_left(done: Sequence[tuple[int, float]], left: Sequence[int]) -> str:
    """How many cells are left, and how long they take if every image takes as long as it did so far.

    done: images and seconds of each cell that is done, at least one. left: images of each that is not.

    Example: `time_left([(100, 60.0)], [100, 200])` is "2 cells left, about 3 min".
    """
    if not left:
        return "none left"
    seconds = sum(left) * sum(took for _, took in done) / sum(images for images, _ in done)
    about = (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
    return f"{len(left)} {'cell' if len(left) == 1 else 'cells'} left, about {about}"


OWN_KEYS = ("ablation", "out", "evaluate_on", "overrides", "hydra", "verbosity")


def arguments(given: Sequence[str]) -> list[str]:
    """Command-line arguments in which every override that is not a key of configs/ablate.yaml is one for the cells.

    Hydra's own options, such as --config-dir DIR, come first: it wants all overrides in a row.

    Example: ["out=x", "steps=9"] gives ["out=x", "overrides=['steps=9']"].
    """
    options: list[str] = []
    own: list[str] = []
    for_cells: list[str] = []
    for argument in given:
        group = re.split(r"[./@=]", argument.lstrip("+~"))[0]
        if argument.startswith("-") or not (argument.startswith("~") or "=" in argument):
            options.append(argument)
        elif group in OWN_KEYS:
            own.append(argument)
        else:
            for_cells.append(bracketed(argument, list_keys(PretrainSchema)))
    joined = [f"overrides=[{','.join(map(_quoted, for_cells))}]"] if for_cells else []
    return [*options, *own, *joined]


def _quoted(text: str) -> str:
    """In hydra's grammar, where a backslash counts only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


OmegaConf.register_new_resolver("steps_in", steps_in, replace=True)
OmegaConf.register_new_resolver("square_root_scaling", square_root_scaling, replace=True)
OmegaConf.register_new_resolver("distinct", distinct, replace=True)
_command = command("ablate", ablate, schema=AblateSchema)


def main() -> None:
    """The command; overrides of tools/pretrain.py are handed on to every cell."""
    sys.argv[1:] = arguments(sys.argv[1:])
    _command()


if __name__ == "__main__":
    main()
