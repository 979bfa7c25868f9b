"""How many labels pre-training saves: `python tools/sweep_labels.py runs=[DIR,...] labels=[20,40,100] out=DIR`.

A grid of label counts, choices of labels, first weights and protocols, against the best of several networks and probes
that start from nothing. Every cell is a file: the same command goes on where it was, on one machine or on many
(`-m shard=0,1 shards=2 hydra/launcher=joblib`), and draws the curve while it grows.

This is an entry point. What there is to learn by, name by name, is in `cpc.label_recipes`, how it learns in
`cpc.label_protocols`, and from which labels in `cpc.label_choices`; what cells share in `cpc.label_bench`, their files
in `cpc.label_cells`; what they come to, in `cpc.label_curves` and `cpc.label_report`, and what their reader has to know
in `cpc.label_notes`.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from contrastive_core.data import (
    BadImages,
    LabelAmount,
    LabelList,
    Splits,
    decodable,
    labels_listed,
    names_listed,
    sample_ids,
)
from contrastive_core.encoders import small_cnn_for
from cpc.encoder_card import read_card
from cpc.entry import Incomplete, build, check_complete, command, start_accelerator, wants_traceback
from cpc.evaluate import labelled
from cpc.finetune import run_crop_and_flip
from cpc.foreign import run_config, run_data
from cpc.frozen_encoder import MODES
from cpc.label_bench import Arm, Bench, Cell, Plan, run_fingerprint
from cpc.label_cells import CellFolder, check_trials
from cpc.label_choices import Choices, check_classes, decodable_choices, drawn_choices, listed_choices
from cpc.label_costs import duration, planned_seconds
from cpc.label_curves import SCRATCH
from cpc.label_notes import (
    encoded_once,
    lengths_from_scratch,
    notes,
    of_runs_that_are_there,
    with_what_other_commands_knew,
)
from cpc.label_protocols import Both, Length
from cpc.label_recipes import RECIPES, protocols_of, run_cell
from cpc.label_report import write_failures, write_report
from cpc.run import plain
from cpc.run_folder import MAY_CHANGE, check_no_file, differing_keys
from cpc.seen_images import seen_among

LEAST = {"lr": 0, "weight_decay": 0, "encoder_lr": 0, "neighbours": 1, "cells": 1}
"""The least that a setting may say."""

LEARNED_FROM_LABELS = ("Classifier", "Distill")

REPORT_EVERY = 120
"""Seconds between two drawings of the curve while it grows, or ten times what one takes: thousands of resamples."""


@dataclass
class LengthSchema:
    """Types of the keys below each of `steps`."""

    least: int
    passes: float
    most: int


@dataclass
class StepsSchema:
    """Types of the keys below `steps`."""

    classifier: LengthSchema
    finetune: LengthSchema


@dataclass
class SweepSchema:
    """Types of the top-level keys of configs/sweep_labels.yaml."""

    runs: list[str]
    out: str
    fractions: list[float]
    labels: list[int]
    labels_per_class: list[int]
    label_lists: list[str]
    seeds: int
    few: float
    seeds_above: int
    protocols: list[str]
    random: list[str]
    scratch: list[str]
    mode: str | None
    readout: str
    steps: StepsSchema
    scratch_times: float
    batch_size: int
    encodings: int
    head_layer: int
    classifier: dict[str, Any]
    cnn: Any
    settings: dict[str, Any]
    shard: int
    shards: int
    seed: int
    bad_images: float
    workers: int
    precision: str
    device: str | None
    threads: int | None
    load_size: int | None
    image_size: int | None
    mean: list[float]
    std: list[float]
    augmentation: dict[str, Any]
    data: Any = None
    views: Any = None


# ---- what is asked for ----


def check_asked(cfg: DictConfig) -> None:
    """Raise ValueError that names the first key whose value cannot be meant, before anything is read."""
    _check_arms(cfg)
    _check_numbers(cfg)
    _check_choices(cfg)
    asked = [RECIPES[name] for name in (*cfg.protocols, *cfg.random, *cfg.scratch)]
    for name, keys in {recipe.settings: recipe.in_a_setting for recipe in asked if recipe.settings}.items():
        _check_settings(name, keys, cfg.settings.get(name))
    named = [(SCRATCH, name) for name in cfg.scratch] + [("pre-trained", name) for name in cfg.protocols]
    trained = [arm for arm in named if RECIPES[arm[1]].takes_steps]
    check_trials({arm: len(cfg.settings[RECIPES[arm[1]].settings]) for arm in trained})


def _check_arms(cfg: DictConfig) -> None:
    for name, hint in {"runs": "[DIR,...], folders of finished runs", "out": "DIR, where the results go"}.items():
        if OmegaConf.is_missing(cfg, name) or not cfg[name]:
            raise ValueError(f"not given: {name}; pass {name}={hint}")
    for name in ("protocols", "random", "scratch"):
        unknown = [protocol for protocol in cfg[name] if protocol not in protocols_of(name)]
        if unknown:
            raise ValueError(f"{name}={unknown}: pass some of {', '.join(protocols_of(name))}")
    if not (cfg.protocols or cfg.random or cfg.scratch):
        raise ValueError("no arm asked for: pass protocols=, random= or scratch=, or leave them as they are")
    if not amounts_of(cfg) and not cfg.label_lists:
        raise ValueError(
            "no labels asked for: pass fractions=[0.01,0.1], labels=[20,40], labels_per_class=[1,2] or "
            "label_lists=[FILE]"
        )
    if amounts_of(cfg) and cfg.label_lists:
        raise ValueError(
            "label_lists beside fractions=, labels= or labels_per_class=: lists and draws make no common curve, pass "
            "either, each with an out= of its own"
        )
    for file in cfg.label_lists:
        names_listed(file)


def _check_numbers(cfg: DictConfig) -> None:
    least = dict.fromkeys(("seeds", "seeds_above", "batch_size", "encodings", "shards"), 1)
    for name, number in (least | {"workers": 0, "head_layer": 0}).items():
        if cfg[name] < number:
            raise ValueError(f"{name}={cfg[name]}: pass at least {number}")
    for name in ("few", "bad_images"):
        if not 0 <= cfg[name] <= 1:
            raise ValueError(f"{name}={cfg[name]}: pass a share from 0 to 1")
    dropout = cfg.classifier.get("dropout")
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise ValueError(f"classifier.dropout={dropout}: pass a share from 0 to below 1")
    with torch.device("meta"):  # its sizes, whatever they are, without the memory
        build({"_target_": "cpc.latent_classifier.LatentClassifier", "dim": 1, "classes": 2, **plain(cfg.classifier)})
    if not 0 <= cfg.shard < cfg.shards:
        raise ValueError(f"shard={cfg.shard} of shards={cfg.shards}: pass 0 to {cfg.shards - 1}")
    for name, length in cfg.steps.items():
        if not (1 <= length.least <= length.most and 0 <= length.passes < math.inf):
            raise ValueError(f"steps.{name}={dict(length)}: pass 1 <= least <= most, and passes of at least 0")
    if not cfg.scratch_times >= 1:
        raise ValueError(f"scratch_times={cfg.scratch_times}: pass at least 1, as many steps as both phases together")


def _check_choices(cfg: DictConfig) -> None:
    if cfg.mode is not None and cfg.mode not in MODES:
        raise ValueError(f"mode={cfg.mode}: pass one of {', '.join(MODES)}, or null")
    if cfg.readout not in ("grid", "context"):
        raise ValueError(f"readout={cfg.readout}: pass grid, or context for CPC's latents with their contexts")
    if cfg.precision == "fp16":
        raise ValueError("precision=fp16: pass precision=bf16 or precision=no")


def _check_settings(name: str, keys: Sequence[str], settings: Any) -> None:
    shown = f"'settings.{name}=[{{{','.join(f'{key}:NUMBER' for key in keys)}}}]'"
    if not settings:
        raise ValueError(f"settings.{name} has none: pass {shown}, one setting or more")
    for setting in settings:
        if not (OmegaConf.is_dict(setting) and setting.keys() == set(keys)):  # a shell may have eaten braces and commas
            raise ValueError(f"settings.{name} has {setting!r}: pass {shown} in quotes, one setting or more")
        for key, value in setting.items():
            if not (isinstance(value, int | float) and value >= LEAST[key]):
                raise ValueError(f"settings.{name} has {key}={value}: pass a number of at least {LEAST[key]}")


def amounts_of(cfg: DictConfig) -> list[LabelAmount]:
    """The label counts that are asked for, in the order given."""
    kinds = {"fraction": cfg.fractions, "labels": cfg.labels, "labels_per_class": cfg.labels_per_class}
    return [LabelAmount(kind, float(value)) for kind, values in kinds.items() for value in values]


def grouped_runs(runs: Sequence[str]) -> dict[str, list[str]]:
    """Runs by the name of their method; those whose configurations differ in the seed alone are repeats of one.

    Raises FileNotFoundError and ValueError where one is no finished run.

    Example: two seeds of CPC and one SimCLR give {"CPC": [a, b], "SimCLR": [c]}; another CPC is "CPC 2".
    """
    groups: dict[str, list[str]] = {}
    prints: dict[str, str] = {}
    for run in runs:
        _, card = read_card(run)
        if card.get("classifier") or card.get("method") in LEARNED_FROM_LABELS:
            raise ValueError(
                f"{run} has learned from labels ({card.get('method')}): pass runs that were pre-trained without"
            )
        twin = prints.setdefault(run_fingerprint(run), run)
        if twin != run or runs.count(run) > 1:
            raise ValueError(f"{run} and {twin} are the same run: pass each once")
        method = str(read_card(run)[1].get("method", "encoder"))
        names = [method, *(f"{method} {number}" for number in range(2, len(runs) + 1))]
        name = next(name for name in names if name not in groups or _repeats(groups[name][0], run))
        groups.setdefault(name, []).append(run)
    return groups


def _repeats(first: str, other: str) -> bool:
    one, another = (run_config(run)[1] for run in (first, other))
    return bool(one) and set(differing_keys(one, another)) <= {"seed", *MAY_CHANGE}


def arms_of(cfg: DictConfig) -> list[Arm]:
    """Every arm, those from scratch first; without "patches" from scratch where the first run's encoder has none.

    The same network from scratch is the first run's; the ordinary one sees images as large as any run's, so that no run
    is held against a network that sees less than it does.

    Raises ValueError for "head" where no run has one.
    """
    first = str(cfg.runs[0])
    groups = grouped_runs(list(cfg.runs))
    largest = max(map(str, cfg.runs), key=lambda run: read_card(run)[1]["input"]["image_size"])
    arms = [
        Arm(SCRATCH, protocol, largest if protocol == "cnn" else first)
        for protocol in cfg.scratch
        if protocol != "patches" or has_patches(first)
    ]
    arms += [Arm("random", protocol, first) for protocol in cfg.random]
    with_head = [run for run in cfg.runs if read_card(run)[1].get("head")]
    if "head" in cfg.protocols and not with_head:
        raise ValueError("protocols names head, and none of the runs has a projection head: leave it out")
    return arms + [
        Arm(method, protocol, run, repeat)
        for method, runs in groups.items()
        for repeat, run in enumerate(runs)
        for protocol in cfg.protocols
        if protocol != "head" or run in with_head
    ]


def has_patches(run: str) -> bool:
    """Whether a run's encoder was trained on patches."""
    return bool(read_card(run)[1]["input"].get("patch_size"))


def network_of(encoder: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two networks the same, of a card or of what a cell depends on: architecture, image and patch size."""
    fed = encoder["input"]
    return encoder["architecture"], fed["image_size"], fed.get("patch_size")


def other_networks(groups: Mapping[str, Sequence[str]], encoder: Mapping[str, Any] | None) -> list[str]:
    """The methods whose network is another than this one, or whose run is not there to say."""

    def has_it(run: str) -> bool:
        try:
            return encoder is not None and network_of(read_card(run)[1]) == network_of(encoder)
        except (FileNotFoundError, ValueError):
            return False

    return [method for method, runs in groups.items() if not (runs and has_it(runs[0]))]


def take_over_(cfg: DictConfig) -> None:
    """Fill in what runs decide: the first one's data where none are given, how large images are, whether they flip.

    Images are as large as any run's, and made smaller for those that were trained on smaller ones.
    """
    first = str(cfg.runs[0])
    inputs = [read_card(str(run))[1]["input"] for run in cfg.runs]
    cfg.load_size = cfg.load_size or max(fed.get("load_size") or fed["image_size"] for fed in inputs)
    if cfg.data is None:
        cfg.data = {**run_data(first), "size": "${load_size}"}
    flips = [flip for run in cfg.runs if (flip := run_crop_and_flip(run)["flip"]) is not None]
    if cfg.augmentation.flip is None and flips:
        cfg.augmentation.flip = min(flips)
    cfg.cnn = sized_cnn(plain(cfg.cnn), max(fed["image_size"] for fed in inputs))
    check_complete(cfg)


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
    return [Cell(arm, amount, seed) for arm in arms_of(cfg) for amount, seed in bench.choices]


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
    seeds = {"seeds": cfg.seeds, "few": cfg.few, "seeds_above": cfg.seeds_above}
    listed = {LabelList(file): labels_listed(train, file) for file in cfg.label_lists}

    def choose(labels: Tensor) -> Choices:
        return listed_choices(listed, labels, ids) if listed else drawn_choices(amounts_of(cfg), labels, ids, **seeds)

    return decodable_choices(choose, train, BadImages(cfg.bad_images), cfg.workers)


def sweep(cfg: DictConfig) -> Path:
    """Run what is left of this process's share of the grid; returns the folder. Raises Incomplete if a cell failed."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a sweep's processes are shards: pass -m shard=0,1 shards=2, without accelerate launch")
    check_asked(cfg)
    take_over_(cfg)
    check_no_file(Path(cfg.out), "out")
    out, bench = Path(cfg.out), bench_of(cfg)
    cells, folder = cells_of(cfg, bench), CellFolder(out / "cells")
    folder.check(bench, cells)
    missing = [cell for cell in cells if not folder.has(cell)]
    mine = [cell for cell in share_of(cells, len(bench.choices), cfg.shard, cfg.shards) if cell in set(missing)]
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(cells)} cells, {len(cells) - len(missing)} are there already")
    about = known_of(cfg, bench)
    failed: dict[str, str] = {}
    due = time.monotonic() + REPORT_EVERY
    for cell, wrong in run_cells(bench, mine, folder) if mine else ():
        failed |= {str(cell): wrong} if wrong else {}
        if (began := time.monotonic()) > due:
            _report(out, cells, bench, about)
            due = time.monotonic() + max(REPORT_EVERY, 10 * (time.monotonic() - began))
    _report(out, cells, bench, about)
    if failed:
        raise Incomplete(f"{len(failed)} of {len(mine)} cells failed: the same command tries them again")
    return out


def _report(out: Path, cells: Sequence[Cell], bench: Bench, about: dict[str, Any]) -> None:
    """Of all cells in the folder, other commands' and other shards' too."""
    folder = CellFolder(out / "cells")
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
        about["notes"] = notes(about, folder) + lengths_from_scratch(bench.plan, results) + encoded_once(bench, cells)
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
