"""What a reader of a label sweep's report has to know about where its numbers come from.

A folder may hold the cells of several commands, each of which knows its own runs: what all of them knew is kept in
summary.json, and the last one to draw the report says it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contrastive_core.reading import read_json
from cpc.label_bench import Bench, Cell, Plan
from cpc.label_cells import CellFolder
from cpc.label_curves import SCRATCH, CellResult
from cpc.label_recipes import RECIPES, networks_from_scratch
from cpc.mirroring import USUAL_FLIP, views_mirror
from cpc.seen_images import LABELLED, seen_notes

FROZEN = ("linear", "knn", "classifier")
"""Protocols on features of a frozen encoder."""


# ---- what all commands in a folder know ----


def with_what_other_commands_knew(summary: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The part of `about` that holds for the whole folder: what is known of others' arms, which are in the figure too.

    Of a summary that cannot be read nothing is known: the cells are what counts.
    """
    try:
        before = read_json(summary, largest=1 << 26)
        runs = {**before.get("runs", {}), **about["runs"]}
        for method, mine in before.get("runs", {}).items():  # a command may name the first of them alone
            runs[method] = max(runs[method], mine, key=len)
        seen = {**before.get("seen", {}), **about["seen"]}
        lists = ("commands", "probed", "without_patches")
        return {"runs": runs, "seen": seen} | {
            name: list(dict.fromkeys([*before.get(name, []), *about[name]])) for name in lists
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def of_runs_that_are_there(seen: Mapping[str, int | str], groups: Mapping[str, Sequence[str]]) -> dict[str, int | str]:
    """What is known of test images in what methods with results were pre-trained on; of each something is said."""
    runs = {run: seen.get(run, "no command has looked") for of_method in groups.values() for run in of_method}
    lost = {method: "the summary of the command that made its cells is gone" for method in groups if not groups[method]}
    return {LABELLED: seen[LABELLED]} | runs | lost


def notes(about: Mapping[str, Any], folder: CellFolder) -> list[str]:
    """What a reader of the report has to know about where its numbers come from."""
    said = seen_notes(about["seen"], about["test_images"])
    if about["probed"]:
        watched = ", ".join(about["probed"])
        said.append(f"a kNN probe with labels of training images watched pre-training, for its log alone: {watched}")
    if about["other_networks"] and folder.trained_from_scratch() is not None:
        others = ", ".join(about["other_networks"])
        said.append(f"{others}: another network than the one from scratch, so no row against the same network")
    said += [
        f"no network on patches from scratch: the first run, {run}, was trained on whole images"
        for run in about["without_patches"]
    ]
    return said


def encoded_once(bench: Bench, cells: Sequence[Cell]) -> list[str]:
    """How many images a command's frozen protocols encode, but for augmented ones, in place of all for every cell."""
    read = [cell for cell in cells if cell.arm.protocol in FROZEN and cell.arm.method != SCRATCH]
    if not read:
        return []
    again = sum(len(bench.choices[cell.amount, cell.seed].indices) + len(bench.test) for cell in read)
    encoders = {(cell.arm.run, cell.arm.method == "random") for cell in read}
    once = len(encoders) * (len(bench.used) + len(bench.test))
    return [
        f"features of {once:,} images are encoded once a process for {len(read)} cells on frozen encoders, in place of "
        f"{again:,} for every cell again: {again / once:.1f} times as many"
    ]


def mirrored(plan: Plan, results: Sequence[CellResult]) -> list[str]:
    """How often labelled images are mirrored where a network learns from them, if that is what its views say."""
    views = plan.described["views"]
    networks = {name for name, recipe in RECIPES.items() if recipe.takes_steps}
    if not views_mirror(views) or networks.isdisjoint(cell.protocol for cell in results):
        return []
    flip = views["pipelines"][0]["flip"]
    flip = USUAL_FLIP if flip is None else flip
    return [f"networks learn from images that are mirrored with a probability of {flip:g}"]


def lengths_from_scratch(plan: Plan, results: Sequence[CellResult]) -> list[str]:
    """How long the networks from scratch were trained, with the fewest labels and with the most; where too shortly."""
    scratch = plan.lengths["scratch"]
    trained = {cell.labels for cell in results if cell.method == SCRATCH and cell.protocol in networks_from_scratch()}
    said = []
    for labels in sorted({min(trained), max(trained)}) if trained else ():
        steps = scratch.steps(labels, plan.batch_size)
        passes = steps * min(plan.batch_size, labels) / labels
        said.append(f"{steps:,} steps with {labels:,} labels, {passes:,.0f} passes over them")
    cut = sorted(labels for labels in trained if scratch.cut_short(labels, plan.batch_size))
    too_low = f"from {cut[0]:,} labels on the curve may be too low, and what is saved too large" if cut else ""
    return [
        *([f"networks from scratch are trained for {' and '.join(said)}: scratch_times"] if said else []),
        *([f"{too_low}: steps.*.most cuts networks from scratch short there, raise it"] if cut else []),
    ]
