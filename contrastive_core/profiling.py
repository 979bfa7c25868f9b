"""Where a run's steps go: a trace of a few of them and a table by part, for `profile=true`."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from torch.profiler import record_function as part

__all__ = ["PARTS", "part", "part_table", "profiled"]

PARTS = ("load", "views", "forward", "backward", "clip", "optimizer step", "after step")
"""What `train_steps` names its parts; `backward` is the backward pass, exchange between processes included."""

SKIPPED, WATCHED = 4, 5
"""Steps at the start that are slower than others, and steps that are watched after them."""


@contextmanager
def profiled(folder: Path | None, steps: int) -> Iterator[Callable[[], None]]:
    """Watch a few of `steps` steps, and leave `trace.json.gz` and `profile.txt` in the folder; None = do neither.

    Yields what to call after each step. The trace opens in chrome://tracing or ui.perfetto.dev. Where there are no more
    steps than would be skipped, all are watched.
    """
    if folder is None:
        yield lambda: None
        return
    skips = steps > SKIPPED
    watched = min(WATCHED, steps - SKIPPED) if skips else steps

    def write(watch: profile) -> None:
        _write(watch, folder, watched)

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    plan = schedule(wait=SKIPPED - 1, warmup=1, active=watched, repeat=1) if skips else None
    with profile(activities=activities, schedule=plan, on_trace_ready=write, acc_events=True) as watch:
        yield watch.step


def _write(watch: profile, folder: Path, steps: int) -> None:
    trace = folder / "trace.json"
    watch.export_chrome_trace(str(trace))
    with trace.open("rb") as read, gzip.open(f"{trace}.gz", "wb") as packed:
        shutil.copyfileobj(read, packed)
    trace.unlink()
    averages = watch.key_averages()
    on_gpu = torch.cuda.is_available()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operations = averages.table(sort_by=by, row_limit=40, max_name_column_width=60)
    (folder / "profile.txt").write_text(f"{part_table(averages, steps, on_gpu=on_gpu)}\n\n{operations}\n")


def part_table(averages: Any, steps: int, *, on_gpu: bool) -> str:
    """Milliseconds of a step by part, and each part's share of them; of the GPU's time beside it where there is one.

    The host's time of a part in which it waits for the GPU is the waiting.
    """
    of = {event.key: event for event in averages if event.key in PARTS}
    host = {name: of[name].cpu_time_total / steps / 1e3 for name in PARTS if name in of}
    device = {name: of[name].device_time_total / steps / 1e3 for name in PARTS if name in of} if on_gpu else {}
    lines = [f"{steps} steps, milliseconds of one{', the host and the GPU' if on_gpu else ''}"]
    for name, milliseconds in host.items():
        line = f"{name:16} {milliseconds:10.2f} {milliseconds / sum(host.values()):6.1%}"
        gpu = f" {device[name]:10.2f} {device[name] / max(sum(device.values()), 1e-9):6.1%}" if on_gpu else ""
        lines.append(line + gpu)
    return "\n".join(lines)
