"""A run's folder: choosing it once for all processes, and refusing to write over another run."""

from __future__ import annotations

import fcntl
import random
import string
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from contrastive_core.checkpoint import checkpoints_in, latest_checkpoint, replacing
from contrastive_core.reading import read_yaml

MAY_CHANGE = ("recompute", "shard", "save_every", "keep_checkpoints", "log_every", "trackers", "probe_every",
              "probe_images", "workers", "device", "threads", "timeout", "profile", "run_dir", "resume")  # fmt: skip
"""Keys that may differ when a run is resumed: they change what is written or how fast, not what is learned."""


OF_A_RUN = ("checkpoints", "metrics.jsonl", "encoder.safetensors", "encoder.json")
"""What a run writes after its config.yaml and would replace."""


def default_run_dir(name: str) -> str:
    """runs/<name>-<time>-<4 letters>; the letters keep apart two runs of one second."""
    letters = "".join(random.SystemRandom().choices(string.ascii_lowercase, k=4))
    return f"runs/{Path(name).name}-{time.strftime('%Y%m%d-%H%M%S')}-{letters}"


def choose_run_dir(run_dir: str | None, name: str, accelerator: Accelerator) -> Path:
    """`run_dir`, or where it is None a new one named after `name`, chosen by the main process for all."""
    chosen = [run_dir or (default_run_dir(name) if accelerator.is_main_process else None)]
    if accelerator.num_processes > 1:
        chosen = broadcast_object_list(chosen)
    return Path(str(chosen[0]))


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the keys whose values differ. Example: ({"a": {"b": 1}}, {"a": {"b": 2}}) gives ["a.b"]."""
    names: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            names += differing_keys(before, after, f"{prefix}{key}.")
        elif _without_nulls(before) != _without_nulls(after):
            names.append(f"{prefix}{key}")
    return names


def _without_nulls(value: Any) -> Any:
    """A key that is null says as much as one that is not there: older runs lack what recipes have been given since."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def check_no_file(folder: Path, key: str) -> None:
    """Raise NotADirectoryError, which names the key, where a file is in a folder's way."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{key}={folder}: {there} is a file, pass another folder")


def may_change(key: str) -> bool:
    """Whether a key, or a step's own (`pretrain.save_every` of tools/simclr_v2.py), changes nothing that is learned."""
    first, _, rest = key.partition(".")
    return (
        first in MAY_CHANGE
        or key == "data.index"
        or (first in ("pretrain", "finetune", "distill") and rest in MAY_CHANGE)
    )


def check_folder(
    run_dir: Path, config: dict[str, Any], *, resume: bool, may_differ: Callable[[str], bool] = may_change
) -> None:
    """See that a run with this configuration may be at work in `run_dir`. Writes nothing.

    may_differ: whether a key, by its dotted name, may be another than the run's so far.

    Raises FileExistsError for a folder that holds a run unless `resume`, or what is left of one; NotADirectoryError
    where a file is in its way, ValueError when `config` differs from the run's in a key that may not differ.
    """
    check_no_file(run_dir, "run_dir")
    written = run_dir / "config.yaml"
    if not written.is_file():
        left = [name for name in OF_A_RUN if (run_dir / name).exists()]
        if left:  # a run that began here would take their place
            raise FileExistsError(
                f"{run_dir} holds {', '.join(left)} but no config.yaml: bring the run's own back, or use a new run_dir"
            )
        return
    if not resume:
        raise FileExistsError(f"{run_dir} holds a run: pass resume=auto to go on with it, or another run_dir")
    before = read_yaml(written)
    if not isinstance(before, dict):
        raise ValueError(f"{written} is not a run's configuration: it holds no keys")
    changed = [key for key in differing_keys(before, config) if not may_differ(key)]
    if changed:
        raise ValueError(
            f"{run_dir} was run with other settings of {', '.join(changed)}: use its own, or a new run_dir"
        )


def saved_checkpoints(run_dir: Path) -> list[str]:
    """The names of the checkpoints in a run's folder, damaged ones too, in the order of their steps."""
    return [path.name for path in checkpoints_in(run_dir / "checkpoints")]


def checkpoint_to_resume(run_dir: Path, accelerator: Accelerator) -> Path | None:
    """The last whole checkpoint of the run in `run_dir`; None where there is none at all.

    The main process looks and all go on from what it found. Raises ValueError on all where every one is damaged.
    """
    found: list[Path | str | None] = [None]
    if accelerator.is_main_process and (run_dir / "config.yaml").is_file():
        try:
            found = [latest_checkpoint(run_dir / "checkpoints")]
        except ValueError as error:
            found = [str(error)]
    if accelerator.num_processes > 1:
        found = broadcast_object_list(found)
    if isinstance(found[0], str):
        raise ValueError(found[0])
    return found[0]


@contextmanager
def claimed(
    run_dir: Path,
    config: dict[str, Any],
    accelerator: Accelerator,
    *,
    resume: bool,
    saved: list[str],
    may_differ: Callable[[str], bool] = may_change,
) -> Iterator[None]:
    """Write `config.yaml` if there is none, and keep every other run out of the folder until the end.

    saved: what `saved_checkpoints` said before one of them was read. may_differ: as `check_folder`'s; with another
    than its own the file is written anew.

    Raises FileExistsError where another run is at work in the folder, or was since one looked.
    """
    accelerator.wait_for_everyone()  # all have looked before the main process writes
    with _locked(run_dir) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            check_folder(run_dir, config, resume=resume, may_differ=may_differ)
            if saved_checkpoints(run_dir) != saved:  # to go on from an older one would undo what that run has done
                raise FileExistsError(f"another run went on in {run_dir} meanwhile: start this one again")
            if not (run_dir / "config.yaml").is_file() or may_differ is not may_change:
                with replacing(run_dir / "config.yaml") as partial:
                    partial.write_text(yaml.safe_dump(config, sort_keys=False))
        yield


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a") as lock:  # the kernel drops the lock with the process, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"another run is at work in {run_dir}: wait for its end, or use a new run_dir"
            ) from None
        yield
