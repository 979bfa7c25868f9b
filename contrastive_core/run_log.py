"""What a run tells while it goes: a progress bar, its trackers, and `metrics.jsonl`, a JSON object a line."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from contrastive_core.checkpoint import replacing
from contrastive_core.reading import parse_json
from contrastive_core.trackers import Trackers

logger = logging.getLogger(__name__)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, in order; an unfinished last line is left out.

    Raises FileNotFoundError where there is none, ValueError, which names the line, for one that is no row.
    """
    file = Path(run_dir) / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"no metrics.jsonl in {run_dir}: pass the folder of a run")
    return [_row(line, f"line {place} of {file}") for place, line in _lines(file)]


def _lines(file: Path) -> list[tuple[int, bytes]]:
    """Whole lines with something in them, and their places from 1."""
    return [(place, line) for place, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1) if line]


def _row(line: bytes, where: str) -> dict[str, Any]:
    row = parse_json(line, where)
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError(f"{where} is no row of metrics: it wants a step, an integer")
    return cast(dict[str, Any], row)


class RunLog:
    """Writes the rows of one run; opened again at `start`, it first cuts the rows that came after.

    Args:
        run_dir: the run's folder. start, steps: optimizer steps done, and in all.
        trackers: where rows go beside the file, of `contrastive_core.trackers.TRACKERS`. config: what these show of it.

    Use it as a context manager on the main process. Where this module's logger is set to warnings alone, there is no
    progress bar.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        start: int,
        steps: int,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        file = run_dir / "metrics.jsonl"
        kept = self._rows_until(file, start) if start and file.is_file() else []
        with replacing(file) as rewritten:
            rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = file.open("a")
        self._quiet = logger.level >= logging.WARNING
        options = {"unit": "step", "dynamic_ncols": True, "mininterval": 1.0, "disable": self._quiet}
        self._bar = tqdm(total=steps, initial=start, **options)
        self._trackers = Trackers(run_dir, trackers, config or {}, start=start, warn=self._warn, quiet=self._quiet)

    def _rows_until(self, file: Path, start: int) -> list[dict[str, Any]]:
        """What the run had written up to a step; a crash of the machine may have left no rows behind it."""
        kept = []
        for place, line in _lines(file):
            try:
                kept.append(_row(line, f"line {place} of {file}"))
            except ValueError as error:
                logger.warning("%s: it is left out", error)
        return [row for row in kept if row["step"] <= start]

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._trackers.close()
        self._bar.close()

    def sync(self) -> None:
        """Bring the rows to the disk: before a checkpoint, which a resumed run believes to come after them."""
        os.fsync(self._file.fileno())

    def advance(self) -> None:
        """One more optimizer step is done."""
        self._bar.update()

    def write(self, row: dict[str, float]) -> None:
        """Write a row; `step` is an int, the rest are numbers, null in the file where they are not finite."""
        self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n")
        self._file.flush()
        self._trackers.log(row)
        if "loss" in row:
            chance = f" (chance {row['chance_loss']:.3f})" if "chance_loss" in row else ""
            self._bar.set_postfix_str(
                f"loss {row['loss']:.3f}{chance}, {row.get('images_per_second', float('nan')):.0f} images/s"
            )

    def _warn(self, text: str) -> None:
        self.say(text, warning=True)

    def say(self, text: str, *, warning: bool = False) -> None:
        """Print a line above the progress bar; where there is none, warnings alone, on stderr."""
        if warning or not self._quiet:
            self._bar.write(text, file=sys.stderr if self._quiet else sys.stdout)
