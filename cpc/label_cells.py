"""The folder of a label sweep: a file for every cell that is done, and one for what went wrong with a cell.

Whatever command or process comes to the folder, cells that are there are skipped, and stand in one curve with the new:
`CellFolder.check` refuses those that cannot.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contrastive_core.data import LISTED, LabelList
from cpc.label_bench import Bench, Cell
from cpc.label_curves import OF_THE_SAME_NETWORK, SCRATCH, CellResult, read_cell, read_results
from cpc.label_recipes import asked_of, making_of
from cpc.run_folder import differing_keys


class CellsDiffer(ValueError):
    """Cells of one folder that cannot stand in one curve."""


@dataclass(frozen=True)
class CellFolder:
    """The files of all cells below `path`, whichever command has made them."""

    path: Path

    def has(self, cell: Cell) -> bool:
        """Whether a cell is done."""
        return (self.path / cell.file).is_file()

    def keep(self, cell: Cell, result: dict[str, Any]) -> None:
        """Write a finished cell's file, whole or not at all."""
        written = self.path / cell.file
        written.parent.mkdir(parents=True, exist_ok=True)
        partial = written.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(result) + "\n")
        partial.rename(written)
        self._failure(cell).unlink(missing_ok=True)

    def keep_failure(self, cell: Cell, wrong: str) -> None:
        """Write down what went wrong with a cell, for the report, whichever process draws it."""
        self._failure(cell).parent.mkdir(parents=True, exist_ok=True)
        self._failure(cell).write_text(f"{cell}: {wrong}\n")

    def there(self) -> set[Path]:
        """The files of cells that are done, and of those that went wrong."""
        return {*self._files(), *self.path.rglob("*.failed")}

    def results(self) -> list[CellResult]:
        """Of all cells that are done."""
        return read_results(self._files())

    def failures(self) -> list[str]:
        """What went wrong with cells that are not done since, a line each."""
        said = []
        for file in sorted(self.path.rglob("*.failed")):
            try:
                said.append(file.read_text().strip())
            except FileNotFoundError:  # another process has just made it good
                continue
        return [each for each in said if each]  # one may be in the midst of being written

    def check(self, bench: Bench, cells: Sequence[Cell]) -> None:
        """Raise CellsDiffer where cells that are there cannot stand in one curve with those that are asked for.

        A second command may add arms and label counts. What it may not: other images, other steps where networks are
        trained, in an arm that is there other settings or another readout, another encoder under the name of one that
        is there, other choices of as many labels, the same choice by another name, lists beside draws. Another command
        may have begun at the same time: what holds at the start has to hold before anything is drawn.
        """
        shared = _as_written(bench.shared)
        asked = {arm: _as_written(asked_of(bench, arm)) for arm in dict.fromkeys(cell.arm for cell in cells)}
        arms = {(arm.method, arm.repeat, arm.protocol): what for arm, what in asked.items()}
        encoders = {_first_weights(*name): what["encoder"] for name, what in arms.items() if "encoder" in what}
        choices = {
            (len(choice.indices), seed): (str(amount), choice.digest)
            for (amount, seed), choice in bench.choices.items()
        }
        digests = {(str(amount), seed): choice.digest for (amount, seed), choice in bench.choices.items()}
        of_lists = {isinstance(amount, LabelList) for amount, _ in bench.choices}
        tried = {(arm.method, arm.protocol): len(what["settings"]) for arm, what in asked.items() if "steps" in what}
        for written in self._files():
            if not written.is_file():  # someone has just removed it, to have it made again
                continue
            result = read_cell(written)
            differing = differing_keys(shared, result["shared"])
            differing += ["number of test images"] if len(result["predictions"]) != len(bench.test) else []
            name = result["method"], result["repeat"], result["protocol"]
            there = result["asked"]
            tried |= {(name[0], name[2]): len(there["settings"])} if "steps" in there else {}
            if name in arms:
                differing += differing_keys(arms[name], there)
            else:
                expected = _as_written(making_of(bench, there.get("steps", ())))
                expected["encoder"] = encoders.get(_first_weights(*name), there.get("encoder"))
                differing += differing_keys(expected, {part: there.get(part) for part in expected})
            amount, digest = choices.get((result["labels"], result["seed"]), (result["amount"], result["split"]))
            named = digests.get((result["amount"], result["seed"]), result["split"])
            if {digest, named} != {result["split"]}:
                differing.append(f"choice of {result['labels']} labels")
            if differing:
                of = ", ".join(differing)
                raise CellsDiffer(f"{written} was made with another {of}: pass another out, or remove it")
            if of_lists != {result["amount"].startswith(f"{LISTED}=")}:
                raise CellsDiffer(f"{written}: lists of labels and draws make no common curve, pass another out")
            if name in arms and amount != result["amount"]:
                raise CellsDiffer(f"{written} has the labels of {amount}: pass {result['amount']}, or another out")
        check_trials(tried)

    def trained_from_scratch(self) -> Any:
        """The architecture and input of what "image" and "patches" have trained; None where there is neither."""
        for protocol in OF_THE_SAME_NETWORK:
            for written in sorted((self.path / f"{SCRATCH}-0" / protocol).glob("*.json")):
                return json.loads(written.read_text())["asked"]["encoder"]
        return None

    def _files(self) -> list[Path]:
        return sorted(self.path.rglob("*.json"))

    def _failure(self, cell: Cell) -> Path:
        return (self.path / cell.file).with_suffix(".failed")


def check_trials(tried: Mapping[tuple[str, str], int]) -> None:
    """Raise CellsDiffer where a network from scratch has fewer settings to choose from than a pre-trained one.

    Args: `tried`: by method and protocol, of those that are trained, how many settings each has.
    """
    scratch = {arm: count for arm, count in tried.items() if arm[0] == SCRATCH}
    others = {arm: count for arm, count in tried.items() if arm[0] not in (SCRATCH, "random")}
    fewest = min(scratch, key=scratch.__getitem__, default=None)
    most = max(others, key=others.__getitem__, default=None)
    if fewest and most and scratch[fewest] < others[most]:
        raise CellsDiffer(
            f"{' '.join(fewest)} has {scratch[fewest]} of settings.scratch to choose from, {' '.join(most)} has "
            f"{others[most]}: pass as many, and another out where cells are there already"
        )


def _first_weights(method: str, repeat: int, protocol: str) -> tuple[str, int, str]:
    """A name for an arm's first weights: all protocols of a run have the same, each from scratch its own."""
    return method, repeat, protocol if method in (SCRATCH, "random") else ""


def _as_written(value: Any) -> Any:
    """As it comes back from a file: tuples are lists there."""
    return json.loads(json.dumps(value))
