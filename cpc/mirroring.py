"""How often labelled images are mirrored: what the runs that are gone on from say of it, and what none of them can.

A mirrored digit may be another digit, and a mirrored photograph is one more photograph. Who learns from labels alone
gains or loses most by it, so a guess is told.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpc.foreign import check_plain, run_config, run_data
from cpc.run_folder import differing_keys
from cpc.verbosity import is_main_process

logger = logging.getLogger(__name__)

USUAL_FLIP = 0.5
"""The probability with which images are mirrored where nobody says: that of every recipe of photographs."""

_HOW_IT_IS_READ = {"size", "test", "cache", "index", "shards_at_a_time", "download"}
"""Keys of data that change nothing of what the training images show."""
_IF_LIKE_PHOTOGRAPHS = "pass augmentation.flip=0.5 where they may be, as photographs may"
_IF_LIKE_LETTERS = "pass augmentation.flip=0 where left and right differ, as in letters"


def labelled_flip(data: Mapping[str, Any], runs: Sequence[str], views: Mapping[str, Any]) -> float | None:
    """The probability with which labelled images are mirrored: 0 of digits, else the least that runs say; None = 0.5.

    Of images that no run was trained on it is a guess, which the log tells where the views mirror at all.

    Args: `data`, `views`: as a configuration writes them. `runs`: folders.

    Raises ValueError where a run's probability is no number.
    """
    if data["_target_"] == "contrastive_core.data.mnist5k":
        return 0.0
    said = [flip for run in runs if (flip := run_crop_and_flip(run)["flip"]) is not None]
    flip = min(said, default=None)
    if views_mirror(views) and is_main_process() and not any(_trained_on(data, run) for run in runs):
        nobody = f"{runs[0]} does not say" if len(runs) == 1 else "no run says"
        usual = USUAL_FLIP if flip is None else flip
        mirrored, hint = f"mirrored with a probability of {usual:g}", _IF_LIKE_LETTERS
        if usual == 0:
            mirrored, hint = "not mirrored", _IF_LIKE_PHOTOGRAPHS
        logger.warning("%s that it was trained on these images, which are %s: %s", nobody, mirrored, hint)
    return flip


def views_mirror(views: Mapping[str, Any]) -> bool:
    """Whether views for learning from labels, of which there is one, have a probability of mirroring, None among them.

    Example: {"pipelines": [{"flip": None}]} have one, {"pipelines": [{"size": 28}]} have none.
    """
    return "flip" in (views.get("pipelines") or [{}])[0]


def run_crop_and_flip(run: str) -> dict[str, Any]:
    """A run's own range of crops and probability of flips, as `crop_and_flip` of what it was asked for.

    Raises ValueError where what it says is neither numbers nor a list of these.
    """
    written, before = run_config(run)
    own = crop_and_flip(before)
    check_plain(own, written)
    return own


def crop_and_flip(config: Mapping[str, Any]) -> dict[str, Any]:
    """The range of crops and the probability of flips of a run's configuration, each None where it does not say.

    What flips nothing has a probability of 0: its images may have a handedness.

    Example: {"augmentation": {"flip": 0.1}} gives {"crop": None, "flip": 0.1}.
    """
    theirs = config.get("augmentation")
    own = {name: theirs.get(name) if isinstance(theirs, dict) else None for name in ("crop", "flip")}
    if own["flip"] is None and _never_flips(config.get("views")):
        own["flip"] = 0.0
    return own


def _never_flips(views: Any) -> bool:
    """Whether views are patches of images that were not flipped, or pipelines that have no flip at all."""
    steps, pipelines = (views.get(name) if isinstance(views, dict) else None for name in ("image_augment", "pipelines"))
    if isinstance(steps, list):
        return not any("Flip" in str(step.get("_target_")) for step in steps)
    without = "contrastive_core.augment.views.digits"
    return isinstance(pipelines, list) and all(str(each.get("_target_")) == without for each in pipelines)


def _trained_on(data: Mapping[str, Any], run: str) -> bool:
    """Whether a run says that it was trained on the training images of this data."""
    try:
        theirs = run_data(run)
    except (FileNotFoundError, ValueError):
        return False
    return not set(differing_keys(_located(data), _located(theirs))) - _HOW_IT_IS_READ


def _located(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same with paths that are there as they are from everywhere."""
    return {
        name: str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value
        for name, value in data.items()
    }
