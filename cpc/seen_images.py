"""Whether test images were seen before: by training on labels, or, labelled or not, by pre-training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from contrastive_core.data import ImageDataset, Splits, UndecodableImage, content_ids, sample_ids
from contrastive_core.data.images import Stored
from cpc.foreign import READERS, run_data

LOOKED_INTO = 200_000
"""Images that are opened one by one to find copies under other names: on a network's disk they take minutes."""


def count_seen(test: ImageDataset, others: ImageDataset) -> int:
    """How many test images are among others, at the size that both are decoded at.

    They are looked for by identity (`sample_ids`: bytes, or the end of a path) and by what they hold, whatever they are
    called (`content_ids`), and are the same where their pixels are: `train/cat/1.png` and `test/cat/1.png` may be two
    images. Where one of the data sets is of pixels and the other of files, all are decoded. More than `LOOKED_INTO`
    others are known by their identity alone.

    Example: of a data set in itself, all.
    """
    of_content = content_ids if _of_pixels(test) == _of_pixels(others) else _pixel_ids
    ways = [lambda images: sample_ids(images).tolist(), *([of_content] if len(others) <= LOOKED_INTO else [])]
    places: dict[int, list[int]] = {}
    for way in ways:
        for place, number in enumerate(way(others)):
            if number is not None:
                places.setdefault(number, []).append(place)
    asked = zip(*(way(test) for way in ways), strict=True)
    return sum(
        any(_same(test, index, others, place) for number in {*numbers} for place in places.get(number, ()))
        for index, numbers in enumerate(asked)
    )


def _of_pixels(images: ImageDataset) -> bool:
    return not isinstance(images.source, Stored) and isinstance(images.source[0], np.ndarray)


def _pixel_ids(images: ImageDataset) -> list[int | None]:
    """`content_ids` of what images are decoded to."""
    numbers: list[int | None] = []
    for index in range(len(images)):
        try:
            numbers.append(hash(images.decode(index).numpy().tobytes()))
        except UndecodableImage:
            numbers.append(None)
    return numbers


def _same(test: ImageDataset, index: int, others: ImageDataset, place: int) -> bool:
    try:
        return torch.equal(test.decode(index), others.decode(place))
    except UndecodableImage:
        return False


Seen = Mapping[str, int | str]
"""By run, and by `LABELLED`, how many test images are among what it was trained on, or why that is not known."""
LABELLED = ""
"""Of the training images themselves."""


def seen_among(
    test: ImageDataset, training: Mapping[str, Any], runs: Sequence[str], read: Callable[[Mapping[str, Any]], Splits]
) -> dict[str, int | str]:
    """How many test images are among the training images and what each run was pre-trained on, or why nobody knows.

    Args:
        training: the configuration of the data that has the labels.
        runs: folders of runs, each of which says what it was pre-trained on.
        read: data as a configuration has it.
    """
    counted: dict[str, int] = {}

    def count(data: Mapping[str, Any]) -> int:
        if data.get("_target_") in READERS:  # few of its images are looked at: decoding all would cost their memory
            data = {**data, "cache": False}
        written = json.dumps(data, sort_keys=True)
        if written not in counted:
            counted[written] = count_seen(test, read(data).train)
        return counted[written]

    seen: dict[str, int | str] = {}
    for run in (LABELLED, *runs):
        try:
            seen[run] = count({**run_data(run), "size": test.size} if run else training)
        except (OSError, ValueError, ImportError) as error:
            seen[run] = " ".join(str(error).split())
    return seen


def seen_notes(seen: Seen, images: int) -> list[str]:
    """What a report has to say of test images that were seen, or may have been.

    Args: `seen`: as `seen_among`, of everything that has results; `images`: how many test images there are.

    Example: `seen_notes({LABELLED: 2}, 100)` is ["2 of 100 test images are among the training images"].
    """
    named = {run: f"those that {run} was pre-trained on" if run else "the training images" for run in seen}
    if all(count == 0 for count in seen.values()):
        return [
            "no test image was found among those that were trained on, by the end of its path, or by its bytes "
            f"(of up to {LOOKED_INTO:,} images, none of them in shards on a server)"
        ]
    unknown = {run: why for run, why in seen.items() if isinstance(why, str)}
    return [
        *(f"whether test images are among {named[run]} is not known: {why}" for run, why in unknown.items()),
        *(f"{seen[run]} of {images} test images are among {named[run]}" for run in seen if run not in unknown),
    ]
