"""One table of all runs in a folder: `python tools/runs.py FOLDER`.

A run is a folder with a `config.yaml` and a lock. It is running while its lock is held, done once its encoder is
exported, killed otherwise: `resume=auto` goes on with that one. A folder that cannot be read is named, and left out.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from contrastive_core.reading import read_json, read_yaml
from contrastive_core.run_log import read_metrics
from cpc.label_curves import BEST

STATES = ("running", "done", "killed")


@dataclass(frozen=True)
class RunRow:
    """What the table says of a run.

    name: its path below the folder. method, data: what the configuration builds. step, steps: optimizer steps done, and
    in all. loss, chance, knn: of the last row that has them, nan = none. saving, labels: the largest label saving over
    the best from scratch that a sweep in the folder found for it, at least, and at how many labels; nan = none.
    collapsed: whether the export says so.
    """

    name: str
    state: str
    method: str
    data: str
    step: int
    steps: int
    loss: float
    chance: float
    knn: float
    saving: float
    labels: float
    collapsed: bool


COLUMNS = [field.name for field in fields(RunRow)]


def is_locked(run: Path) -> bool:
    """Whether a process is at work in a run's folder: the kernel drops the lock when it ends, however it ends."""
    descriptor = os.open(run / ".lock", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def state_of(run: Path) -> str:
    """One of `STATES`."""
    if is_locked(run):
        return "running"
    return "done" if (run / "encoder.json").is_file() else "killed"


def _built(config: dict[str, Any], key: str) -> str:
    """The last part of what a key's `_target_` names. Example: "cpc.method.CPC" is CPC."""
    node = config.get(key)
    return str(node.get("_target_", "")).rpartition(".")[2] if isinstance(node, dict) else ""


def _last(rows: Sequence[dict[str, Any]], key: str) -> float:
    return next((float(row[key]) for row in reversed(rows) if row.get(key) is not None), math.nan)


def read_run(run: Path, folder: Path, savings: dict[Path, tuple[float, float]]) -> RunRow:
    """A run's row. Raises OSError or ValueError for a folder that cannot be read."""
    config = read_yaml(run / "config.yaml")
    if not isinstance(config, dict) or not isinstance(config.get("steps"), int):
        raise ValueError(f"{run / 'config.yaml'} is not a run's configuration: it has no steps")
    rows = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    card = read_json(run / "encoder.json") if (run / "encoder.json").is_file() else {}
    saving, labels = savings.get(run.resolve(), (math.nan, math.nan))
    return RunRow(
        name=str(run.relative_to(folder)),
        state=state_of(run),
        method=_built(config, "method"),
        data=_built(config, "data"),
        step=int(max((row["step"] for row in rows), default=0)),
        steps=config["steps"],
        loss=_last(rows, "loss"),
        chance=_last(rows, "chance_loss"),
        knn=_last(rows, "knn"),
        saving=saving,
        labels=labels,
        collapsed=bool(card.get("collapsed")),
    )


def savings_in(folder: Path) -> dict[Path, tuple[float, float]]:
    """For every run that a label sweep below the folder knows, its method's largest saving and at how many labels."""
    found: dict[Path, tuple[float, float]] = {}
    for file in sorted(folder.rglob("summary.json")):
        try:
            summary = read_json(file, largest=1 << 26)
            best: dict[str, tuple[float, float]] = {}
            for row in (row for row in summary["savings"] if row["against"] == BEST):
                if row["saving"].startswith("<"):  # worse than the whole curve: nothing is saved at least
                    continue
                pair = float(row["saving"].removeprefix("> ")), float(row["labels"])  # "> 2.0": the curve ends before
                best[row["method"]] = max(pair, best.get(row["method"], pair))
            for method, runs in summary["runs"].items():
                for run in runs if method in best else ():
                    found[Path(run).resolve()] = max(best[method], found.get(Path(run).resolve(), best[method]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # some other program's summary
            continue
    return found


def runs_in(folder: Path) -> Iterator[Path]:
    """Folders of runs below a folder, or the folder itself, by name."""
    for config in sorted(folder.rglob("config.yaml")):
        if (config.parent / ".lock").is_file():
            yield config.parent


def holds_runs(config: Any) -> bool:
    """Whether a configuration is tools/simclr_v2.py's, whose folder holds its steps' runs and is none itself."""
    return isinstance(config, dict) and {"pretrain", "finetune", "distill"} <= config.keys()


def table_of(folder: Path) -> tuple[list[RunRow], list[str]]:
    """All runs below a folder, and a line for each that cannot be read.

    Raises NotADirectoryError where there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder: pass the one that holds the runs, such as runs")
    savings, rows, unread = savings_in(folder), [], []
    for run in runs_in(folder):
        try:
            if not holds_runs(read_yaml(run / "config.yaml")):
                rows.append(read_run(run, folder, savings))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            unread.append(f"{run.relative_to(folder)} cannot be read: {' '.join(str(error).split())}")
    return rows, unread


def sorted_by(rows: Sequence[RunRow], column: str) -> list[RunRow]:
    """Numbers from the largest, missing ones last; losses and words from the smallest."""

    def place(row: RunRow) -> tuple[bool, Any]:
        value = getattr(row, column)
        if isinstance(value, str):
            return False, value
        return math.isnan(value), value if column in ("loss", "chance") else -value

    return sorted(rows, key=place)


def _shown(row: RunRow) -> list[str]:
    numbers = ["" if math.isnan(number) else f"{number:.3f}" for number in (row.loss, row.chance, row.knn)]
    saving = "" if math.isnan(row.saving) else f"{row.saving:.1f} at {row.labels:.0f}"
    state = f"{row.state}, collapsed" if row.collapsed else row.state
    return [row.name, state, row.method, row.data, f"{row.step}/{row.steps}", *numbers, saving]


HEAD = ["run", "state", "method", "data", "steps", "loss", "chance", "knn", "label saving"]


def as_text(rows: Sequence[RunRow]) -> str:
    """The table for a terminal."""
    lines = [HEAD, *map(_shown, rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def write_csv(rows: Sequence[RunRow], file: Path) -> None:
    """The same with all digits; what is not known is empty."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        for row in rows:
            known = {name: "" if isinstance(v, float) and math.isnan(v) else v for name, v in asdict(row).items()}
            writer.writerow(known)


EPILOG = """examples:
  python tools/runs.py runs                                  # every run, by name
  python tools/runs.py runs --sort knn --method CPC          # the best probes of one method first
  python tools/runs.py runs --state killed                   # which want resume=auto
  python tools/runs.py runs --csv runs.csv

exit codes: 0 done, 2 a mistake"""


def main() -> None:
    """Print the table, and write it where --csv says; a mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    order = "numbers from the largest, losses and words from the smallest"
    parser.add_argument("--sort", choices=COLUMNS, default="name", help=order)
    parser.add_argument("--method", help="only this method's, as the table writes it")
    parser.add_argument("--data", help="only on this data, as the table writes it")
    parser.add_argument("--state", choices=STATES, help="only in this state")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    asked = parser.parse_args()
    try:
        rows, unread = table_of(asked.folder)
        chosen = [
            row
            for row in sorted_by(rows, asked.sort)
            if all(getattr(asked, name) in (None, getattr(row, name)) for name in ("method", "data", "state"))
        ]
        if asked.csv is not None:
            write_csv(chosen, asked.csv)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(as_text(chosen))
    for line in unread:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
