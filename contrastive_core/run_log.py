"""What a run tells while it goes: a progress bar, TensorBoard, and `metrics.jsonl`, a JSON object a line."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from contrastive_core.checkpoint import replacing

logger = logging.getLogger(__name__)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, in order; an unfinished last line is left out."""
    file = Path(run_dir) / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"no metrics.jsonl in {run_dir}: pass the folder of a run")
    lines = file.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class RunLog:
    """Writes the rows of one run; opened again at `start`, it first cuts the rows that came after.

    Args:
        run_dir: the run's folder. start, steps: optimizer steps done, and in all.

    Use it as a context manager on the main process. Where this module's logger is set to warnings alone, there is no
    progress bar.
    """

    def __init__(self, run_dir: Path, *, start: int, steps: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        file = run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(run_dir) if row["step"] <= start] if file.is_file() else []
        with replacing(file) as rewritten:
            rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = file.open("a")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
        self._quiet = logger.level >= logging.WARNING
        options = {"unit": "step", "dynamic_ncols": True, "mininterval": 1.0, "disable": self._quiet}
        self._bar = tqdm(total=steps, initial=start, **options)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._file.close()
        self._tensorboard.close()

    def advance(self) -> None:
        """One more optimizer step is done."""
        self._bar.update()

    def write(self, row: dict[str, float]) -> None:
        """Write a row; `step` is an int, the rest are numbers, null in the file where they are not finite."""
        self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._tensorboard.add_scalar(name, value, int(row["step"]))
        if "loss" in row:
            chance = f" (chance {row['chance_loss']:.3f})" if "chance_loss" in row else ""
            self._bar.set_postfix_str(
                f"loss {row['loss']:.3f}{chance}, {row.get('images_per_second', float('nan')):.0f} images/s"
            )

    def say(self, text: str, *, warning: bool = False) -> None:
        """Print a line above the progress bar; where there is none, warnings alone, on stderr."""
        if warning or not self._quiet:
            self._bar.write(text, file=sys.stderr if self._quiet else sys.stdout)
