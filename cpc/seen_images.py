"""Whether test images were seen before: by training on labels, or, labelled or not, by pre-training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from contrastive_core.data import ImageDataset, Splits, UndecodableImage, sample_ids
from cpc.foreign import READERS, run_data


def count_seen(test: ImageDataset, others: ImageDataset) -> int:
    """How many test images are among others, at the size that both are decoded at.

    They are looked for by identity (`sample_ids`: bytes, or the end of a path), and are the same where their pixels
    are: `train/cat/1.png` and `test/cat/1.png` may be two images.

    Example: of a data set in itself, all.
    """
    places = {number: place for place, number in enumerate(sample_ids(others).tolist())}
    pairs = [(index, places[number]) for index, number in enumerate(sample_ids(test).tolist()) if number in places]
    return sum(_same(test, index, others, place) for index, place in pairs)


def _same(test: ImageDataset, index: int, others: ImageDataset, place: int) -> bool:
    try:
        return torch.equal(test.decode(index), others.decode(place))
    except UndecodableImage:
        return False


def seen_notes(
    test: ImageDataset, training: Mapping[str, Any], runs: Sequence[str], read: Callable[[Mapping[str, Any]], Splits]
) -> list[str]:
    """What a report has to say of test images that were seen, or may have been.

    Args:
        training: the configuration of the data that has the labels.
        runs: folders of runs, each of which says what it was pre-trained on.
        read: data as a configuration has it.
    """
    sources, said = {"the training images": training}, []
    for run in runs:
        try:
            sources[f"those that {run} was pre-trained on"] = {**run_data(run), "size": test.size}
        except (OSError, ValueError) as error:
            said.append(_unknown(run, error))
    found: dict[str, int] = {}
    for what, data in sources.items():
        if data.get("_target_") in READERS:  # few of its images are looked at: decoding all would cost their memory
            data = {**data, "cache": False}
        written = json.dumps(data, sort_keys=True)
        if written not in found:
            try:
                found[written] = count_seen(test, read(data).train)
            except (OSError, ValueError) as error:
                said.append(_unknown(what, error))
                continue
        if found[written]:
            said.append(f"{found[written]} of {len(test)} test images are among {what}")
    if found and not any(found.values()):
        said.append("no test image was found among those that were trained on, by its bytes or the end of its path")
    return said


def _unknown(what: str, error: Exception) -> str:
    return f"whether test images are among {what} is not known: {' '.join(str(error).split())}"
