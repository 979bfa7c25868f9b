"""How many labels pre-training saves: `python tools/sweep_labels.py runs=[DIR,...] labels=[20,40,100] out=DIR`.

A grid of label counts, choices of labels, first weights and protocols, against the best of several networks and probes
that start from nothing. Every cell is a file: the same command goes on where it was, on one machine or on many
(`-m shard=0,1 shards=2 hydra/launcher=joblib`), and draws the curve while it grows.

This is an entry point, and what it may be told is in `cpc.sweep_schema`. Which arms runs make is in `cpc.label_arms`;
what there is to learn by, name by name, in `cpc.label_recipes`, how it learns in `cpc.label_protocols`, and from which
labels in `cpc.label_choices`; what cells share in `cpc.label_bench`, their files in `cpc.label_cells`; what they come
to, in `cpc.label_curves` and `cpc.label_report`, and what their reader has to know in `cpc.label_notes`.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from contrastive_core.data import (
    BadImages,
    LabelList,
    Splits,
    decodable,
    labels_listed,
    sample_ids,
)
from contrastive_core.encoders import small_cnn_for
from cpc.encoder_card import read_card
from cpc.entry import Incomplete, build, check_complete, command, start_accelerator
from cpc.evaluate import labelled
from cpc.features import load_head
from cpc.foreign import run_config
from cpc.label_arms import arms_of, grouped_runs, has_patches, other_networks
from cpc.label_bench import Bench, Cell, Plan
from cpc.label_cells import CellFolder, CellsDiffer
from cpc.label_choices import Choices, check_classes, decodable_choices, drawn_choices, listed_choices
from cpc.label_costs import duration, planned_seconds
from cpc.label_curves import SCRATCH
from cpc.label_notes import (
    encoded_once,
    lengths_from_scratch,
    mirrored,
    notes,
    of_runs_that_are_there,
    with_what_other_commands_knew,
)
from cpc.label_protocols import Both, Length
from cpc.label_recipes import run_cell
from cpc.label_report import write_failures, write_report
from cpc.mirroring import labelled_flip
from cpc.mistakes import wants_traceback
from cpc.run import as_written, plain, take_data_of_
from cpc.run_folder import check_no_file
from cpc.seen_images import seen_among
from cpc.sweep_schema import SweepSchema, amounts_of, check_asked

logger = logging.getLogger(__name__)

REPORT_EVERY = 120
"""Seconds between two drawings of the curve while it grows, or ten times what one takes: thousands of resamples."""


# ---- what runs decide ----


def take_over_(cfg: DictConfig) -> None:
    """Fill in what runs decide: the first one's data where none are given, how large images are, whether they flip.

    Images are as large as any run's, and made smaller for those that were trained on smaller ones.
    """
    inputs = [read_card(str(run))[1]["input"] for run in cfg.runs]
    cfg.load_size = cfg.load_size or max(fed.get("load_size") or fed["image_size"] for fed in inputs)
    take_data_of_(cfg, str(cfg.runs[0]))
    if cfg.augmentation.flip is None:
        cfg.augmentation.flip = labelled_flip(plain(cfg.data), list(cfg.runs), as_written(cfg.views))
    cfg.cnn = sized_cnn(plain(cfg.cnn), max(fed["image_size"] for fed in inputs))
    check_complete(cfg)


def check_head_layer(cfg: DictConfig) -> None:
    """Raise ValueError where protocol head is asked for a layer that a run's head does not have."""
    for run in cfg.runs if "head" in cfg.protocols else ():
        head = read_card(str(run))[1].get("head")
        if head and cfg.head_layer > (layers := len(load_head(run).layers)):
            raise ValueError(f"head_layer={cfg.head_layer}: the head of {run} has {layers} layers, pass 0 to {layers}")


def sized_cnn(node: dict[str, Any], image_size: int) -> dict[str, Any]:
    """The ordinary network with widths, and stem, for images of this size where none are given.

    Example: of 32 px `{"_target_": "contrastive_core.encoders.SmallCNN", "widths": None}` gets four widths; another
    class, which has none, loses the key.
    """
    if node.get("widths", ()) is not None:
        return node
    rest = {name: value for name, value in node.items() if name != "widths"}
    small = str(node["_target_"]).endswith(".SmallCNN")
    return small_cnn_for(image_size) | rest if small else rest


# ---- the grid ----


def cells_of(cfg: DictConfig, bench: Bench) -> list[Cell]:
    """All cells: arm by arm its choices of labels, the same for each."""
    asked = {name: list(cfg[name]) for name in ("protocols", "random", "scratch")}
    return [Cell(arm, amount, seed) for arm in arms_of(list(cfg.runs), **asked) for amount, seed in bench.choices]


def share_of(cells: Sequence[Cell], choices: int, shard: int, shards: int) -> list[Cell]:
    """A shard's cells: one choice of labels in `shards`, beginning one later from arm to arm.

    Args: `cells`: as `cells_of` has them, so many `choices` an arm.

    Example: of two arms with two choices each, two shards have one choice of either arm, and not the same.
    """
    return [cell for place, cell in enumerate(cells) if sum(divmod(place, choices)) % shards == shard]


def run_cells(bench: Bench, cells: Sequence[Cell], folder: CellFolder) -> Iterator[tuple[Cell, str]]:
    """Run cells and yield each with what went wrong, "" = nothing; says what is left and for how long."""
    planned = planned_seconds(bench, cells)
    # one draw of everything before the next: the curve is there early
    order = sorted(cells, key=lambda cell: cell.seed)
    print(f"{len(order)} cells to do, planned {duration(sum(planned.values()))} in this process", flush=True)
    took, expected = 0.0, 0.0
    for place, cell in enumerate(order):
        began = time.perf_counter()
        wrong = ""
        try:
            result = run_cell(bench, cell)
            folder.keep(cell, result)
        except Exception as error:  # whatever it is, the other cells are worth having
            if wants_traceback():
                traceback.print_exc()
            wrong = " ".join(f"{type(error).__name__}: {error}".split())
            folder.keep_failure(cell, wrong)
        took, expected = took + time.perf_counter() - began, expected + planned[cell]
        left = sum(planned[other] for other in order[place + 1 :]) * (took / expected if expected else 1.0)
        said = f"failed: {wrong}" if wrong else f"{result['accuracy']:.3f}"
        rest = len(order) - place - 1
        still = f"{rest} {'cell' if rest == 1 else 'cells'} left" + (f", about {duration(left)}" if rest else "")
        print(f"{cell}, {bench.choices[cell.amount, cell.seed].digest}: {said}; {still}", flush=True)
        yield cell, wrong


# ---- the command ----


def lengths_of(cfg: DictConfig) -> dict[str, Length | Both]:
    """How long every protocol trains: from scratch, and SimCLRv2's, as long as both phases of CPC's fine-tuning."""
    phases = {
        # 10, not 10.0: cells that are there say how they were made as the command line has it
        name: Length(each.least, int(each.passes) if each.passes.is_integer() else each.passes, each.most)
        for name, each in cfg.steps.items()
    }
    both = Both(tuple(phases.values()), cfg.scratch_times)
    return {**phases, "scratch": both, "head": Both(tuple(phases.values()), 1.0)}


def bench_of(cfg: DictConfig) -> Bench:
    """What the configuration describes, images read."""
    accelerator = start_accelerator(precision=cfg.precision, device=cfg.device, threads=cfg.threads)
    splits = labelled(build(cfg.data))
    check_classes(splits)
    choices = choices_of(cfg, splits)
    assert splits.test is not None
    test = decodable(splits.test, BadImages(cfg.bad_images), cfg.workers)
    written = plain(cfg)
    plan = Plan(
        views=build(cfg.views),
        cnn=partial(build, cfg.cnn),
        lengths=lengths_of(cfg),
        **{name: written[name] for name in ("classifier", "settings", "batch_size", "encodings")},
        **{name: written[name] for name in ("head_layer", "mode", "readout", "seed", "workers", "precision")},
        described={name: written[name] for name in ("views", "cnn")},
    )
    return Bench(plan, Splits(splits.train, test), choices, accelerator)


def choices_of(cfg: DictConfig, splits: Splits) -> Choices:
    """Which labels of the training images every cell learns from; mistakes are told before any image is decoded."""
    train, ids = splits.train, sample_ids(splits.train)
    draws = {"draws": cfg.draws, "few": cfg.few, "draws_above": cfg.draws_above, "of": train.labels}
    listed = {LabelList(file): labels_listed(train, file) for file in cfg.label_lists}

    def choose(labels: Tensor) -> Choices:
        return listed_choices(listed, labels, ids) if listed else drawn_choices(amounts_of(cfg), labels, ids, **draws)

    return decodable_choices(choose, train, BadImages(cfg.bad_images), cfg.workers)


def sweep(cfg: DictConfig) -> Path:
    """Run what is left of this process's share of the grid; returns the folder. Raises Incomplete if a cell failed."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a sweep's processes are shards: pass -m shard=0,1 shards=2, without accelerate launch")
    check_asked(cfg)
    take_over_(cfg)
    check_head_layer(cfg)
    check_no_file(Path(cfg.out), "out")
    out, bench = Path(cfg.out), bench_of(cfg)
    cells, folder = cells_of(cfg, bench), CellFolder(out / "cells")
    folder.check(bench, cells)
    missing = {cell for cell in cells if not folder.has(cell)}
    mine = [cell for cell in share_of(cells, len(bench.choices), cfg.shard, cfg.shards) if cell in missing]
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(cells)} cells, {len(cells) - len(missing)} are there already")
    about = known_of(cfg, bench)
    failed: dict[str, str] = {}
    due = time.monotonic() + REPORT_EVERY
    for cell, wrong in run_cells(bench, mine, folder) if mine else ():
        failed |= {str(cell): wrong} if wrong else {}
        if (began := time.monotonic()) > due:
            try:
                _report(out, cells, bench, about)
            except CellsDiffer:  # with another command's, which began at the same time: more of them are of no use
                raise
            except Exception as error:  # a disk that is full for a while, say: the cells that are left are worth having
                logger.warning("the curve could not be drawn, which is tried again: %s", error)
            due = time.monotonic() + max(REPORT_EVERY, 10 * (time.monotonic() - began))
    drawn = None
    while (there := folder.there()) != drawn:  # of shards that end together the one that looked first may write last
        _report(out, cells, bench, about)
        drawn = there
    if failed:
        raise Incomplete(f"{len(failed)} of {len(mine)} cells failed: the same command tries them again")
    return out


def _report(out: Path, cells: Sequence[Cell], bench: Bench, about: dict[str, Any]) -> None:
    """Of all cells in the folder, other commands' and other shards' too."""
    folder = CellFolder(out / "cells")
    folder.check(bench, cells)
    results = folder.results()
    if not results:
        write_failures(out, folder.failures())
    else:
        features = {
            "encoded": sum(table.encoded for table in bench.tables.values()),
            "seconds": round(sum(table.seconds for table in bench.tables.values()), 1),
        }
        missing = sum(not folder.has(cell) for cell in cells)
        about = {**about, "cells": len(results) + missing, "features": features, "failed": folder.failures()}
        about |= with_what_other_commands_knew(out / "summary.json", about)
        methods = dict.fromkeys(result.method for result in results if result.method not in (SCRATCH, "random"))
        groups = {method: about["runs"].get(method, []) for method in methods}
        about["other_networks"] = other_networks(groups, folder.trained_from_scratch())
        about["seen"] = of_runs_that_are_there(about["seen"], groups)
        about["notes"] = notes(about, folder) + lengths_from_scratch(bench.plan, results)
        about["notes"] += mirrored(bench.plan, results) + encoded_once(bench, cells)
        write_report(out, results, bench.test.labels, about)


def known_of(cfg: DictConfig, bench: Bench) -> dict[str, Any]:
    """What a command knows of its images and runs, for the report and for later commands in the folder."""
    return {
        "commands": [shown_command()],
        "runs": grouped_runs(list(cfg.runs)),
        "train_images": len(bench.labels),
        "test_images": len(bench.test),
        "classes": bench.classes,
        "torch": torch.__version__,
        "scikit-learn": version("scikit-learn"),
        "seen": seen_among(bench.test, plain(cfg.data), cfg.runs, build),
        "probed": [run for run in cfg.runs if (run_config(run)[1].get("probe_every") or 0) > 0],
        "without_patches": [first for first in cfg.runs[:1] if "patches" in cfg.scratch and not has_patches(first)],
    }


def shown_command() -> str:
    """What does all cells of this command in one process, whichever launcher and shard this is."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra is None or hydra.job.config_name != "sweep_labels":  # another command's sweep, as the demo's
        return shlex.join(["python", *sys.argv])
    given = [each for each in hydra.overrides.task if not each.startswith(("shard=", "shards="))]
    own = [
        f"--config-dir={source.path}" for source in hydra.runtime.config_sources if source.provider == "command-line"
    ]
    return shlex.join(["python", "tools/sweep_labels.py", *own, *given])


main = command("sweep_labels", sweep, schema=SweepSchema)


if __name__ == "__main__":
    main()
