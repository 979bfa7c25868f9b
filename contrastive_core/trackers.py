"""Where the rows of a run go beside metrics.jsonl: TensorBoard, W&B, trackio, through accelerate's classes.

They are conveniences: `metrics.jsonl` has every row, and a tracker that fails is left behind with one warning. What
accelerate's classes do not do is done here: a configuration of configurations, and going on in the same run.
"""

from __future__ import annotations

import json
import os
import random
import string
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contrastive_core.checkpoint import replacing
from contrastive_core.reading import read_json

TRACKERS = ("tensorboard", "wandb", "trackio")

PROJECT = "cpc-images"
"""What runs are gathered under, unless WANDB_PROJECT or TRACKIO_PROJECT names another."""


def check_trackers(names: Sequence[str]) -> None:
    """See that every tracker is known and its package there; starts none.

    Raises ValueError for a name that is none of `TRACKERS`, or twice there, ImportError for a missing package.

    Example: `check_trackers([])` asks for none.
    """
    if not set(names) <= set(TRACKERS) or len(set(names)) < len(names):
        came = ",".join(map(str, names))
        raise ValueError(f"trackers=[{came}]: pass any of {', '.join(TRACKERS)}, each once, or [] for none")
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # wandb leaves folders of its name, which Python could import
            raise ImportError(f'trackers=[{name}]: {name} is not installed: pip install "cpc-images[trackers]"')


def dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration of configurations as one, with dotted keys; an empty one stays a value.

    Example: `dotted({"a": {"b": [1], "c": {}}})` is {"a.b": [1], "a.c": {}}.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= dotted(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def identity(run_dir: Path, name: str, made: Callable[[], str]) -> str:
    """What a tracker calls this run: the same whenever it goes on, kept in the folder's trackers.json."""
    file = run_dir / "trackers.json"
    known = read_json(file) if file.is_file() else {}
    if name not in known:
        known[name] = made()
        with replacing(file) as rewritten:
            rewritten.write_text(json.dumps(known) + "\n")
    return str(known[name])


def letters(count: int = 8) -> str:
    """Small letters that no seed decides: two runs of one seed are two runs."""
    return "".join(random.SystemRandom().choices(string.ascii_lowercase, k=count))


class Trackers:
    """Sends the rows of a run to its trackers. Use it on the main process.

    Args:
        run_dir: the run's folder, which is there. names: of `TRACKERS`. config: what they show as its configuration.
        start: optimizer steps done before. warn: told in a line which tracker failed; the run goes on without it.
        quiet: nothing of their own is to be printed.

    Example: with `names=[]` nothing is written.
    """

    def __init__(
        self,
        run_dir: Path,
        names: Sequence[str],
        config: Mapping[str, Any],
        *,
        start: int,
        warn: Callable[[str], None],
        quiet: bool = False,
    ) -> None:
        self._warn = warn
        starts: dict[str, Callable[..., Any]] = {
            "tensorboard": partial(_tensorboard, start=start),
            "wandb": partial(_wandb, quiet=quiet),
            "trackio": _trackio,
        }
        self._open: dict[str, Any] = {}
        if names:
            from accelerate import PartialState

            PartialState()  # there already where a run is; accelerate's classes ask it who they are
        for name in names:
            tracker = self._tried(name, partial(starts[name], run_dir, dict(config)))
            self._open |= {} if tracker is None else {name: tracker}

    def log(self, row: Mapping[str, float]) -> None:
        """Send a row; `step` is among its names."""
        values = {name: value for name, value in row.items() if name != "step"}
        for name, tracker in list(self._open.items()):
            # wandb refuses steps that it has seen, such as those after a checkpoint that a killed run had gone on from
            own, step = (dict(row), None) if name == "wandb" else (values, int(row["step"]))
            self._tried(name, partial(tracker.log, own, step=step))

    def close(self) -> None:
        """Write what is still to be written."""
        for name, tracker in list(self._open.items()):
            self._tried(name, _finish_trackio if name == "trackio" else tracker.finish)

    def _tried(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever it is: a run of days does not end for want of a chart
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(f"{name} failed and is left out from here on ({reason}); metrics.jsonl has every row")
            return None


def _tensorboard(run_dir: Path, config: dict[str, Any], start: int) -> Any:
    """The configuration is a text: hparams take words and numbers alone, and add a folder at every start."""
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", run_dir, purge_step=start + 1)
    tracker.start()
    if config:
        lines = [f"    {key}: {json.dumps(value)}" for key, value in dotted(config).items()]  # indented: as it is
        tracker.log({"config": "\n".join(lines)}, step=start)
    return tracker


def _wandb(run_dir: Path, config: dict[str, Any], quiet: bool) -> Any:
    """Rows have their step as a value, by which they are drawn."""
    from accelerate.tracking import WandBTracker

    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        id=identity(run_dir, "wandb", letters),
        name=run_dir.resolve().name,
        dir=str(run_dir),
        config=config,
        resume=None if offline else "allow",  # offline it warns that it cannot know; the id is what counts
        settings={"console": "off"} | ({"silent": True} if quiet else {}),  # the progress bar is no log
    )
    tracker.start()
    tracker.tracker.define_metric("*", step_metric="step")
    return tracker


def _trackio(run_dir: Path, config: dict[str, Any]) -> Any:
    """It knows a run by its name; accelerate's store_init_configuration would add a key to the configuration."""
    from accelerate.tracking import TrackioTracker

    tracker = TrackioTracker(
        os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=identity(run_dir, "trackio", lambda: f"{run_dir.resolve().name}-{letters(4)}"),
        config=config,
        resume="allow",
        embed=False,
    )
    tracker.start()
    return tracker


def _finish_trackio() -> None:
    """Accelerate's finish ends the run alone: trackio ends it again at exit, which prints a line."""
    import trackio

    trackio.finish()
