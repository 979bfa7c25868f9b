"""Who an image is, wherever its data set lies and in whatever order: what label splits are drawn by and checked by.

An image's identity is a hash of its encoded bytes or pixels; of one that is a file, or a file in a tar shard, of the
last two parts of its path, `n01440764/n01440764_10026.JPEG`, since a million files are not read to draw a split. So the
same split comes out on another machine, under another root, from a shuffled copy. Two images that are one by that rule
(the same bytes, or `x/s/1.png` and `y/s/1.png`) have one identity: they go by their order in the data set, and a digest
does not tell one from the other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from contrastive_core.data.images import Encoded, ImageDataset, Stored, beginning_of

SPLIT_VERSION = 1
"""Of the way splits are drawn. Any change that gives other images another number, and another digest to all splits."""

BEGINNING = 4096
"""Bytes of an image that are read to find its copies: its header, and of a photograph some of its pixels."""


def sample_ids(dataset: ImageDataset) -> Tensor:
    """An identity for each image: `n` int64.

    Example: two data sets of the same JPEG bytes in another order have the same identities in that order.
    """
    source = dataset.source
    if isinstance(source, Stored):
        return torch.tensor([_hash(source.identity(index)) for index in range(len(source))], dtype=torch.int64)
    return torch.tensor([_number(source[index]) for index in range(len(source))], dtype=torch.int64)


def content_ids(dataset: ImageDataset) -> list[int | None]:
    """A number for what each image holds, whatever it is called: the same for copies, None where it cannot be read.

    Of its length and first bytes, which tell photographs apart: the rest of a million files is not read. So two images
    of one number are one only where their pixels are. Images in shards that lie elsewhere have None.

    Example: `train/cat/1.png` and its copy `all/17.png` have the same number.
    """
    return [_content(dataset.source, index) for index in range(len(dataset))]


def _content(source: Sequence[Encoded] | np.ndarray, index: int) -> int | None:
    try:
        if isinstance(source, Stored):
            part = source.beginning(index, BEGINNING)
        else:
            part = beginning_of(source[index], BEGINNING)
    except (OSError, ValueError):
        return None
    return None if part is None else _hash(b"%d " % part[0] + part[1])


def dataset_digest(dataset: ImageDataset) -> str:
    """Twelve hexadecimal digits that stand for which images these are, in their order: names and labels, no pixels.

    Of a path the name alone counts, so that another root changes nothing. Two processes, or a run and the one that it
    goes on with, draw the same batches only where this is the same.

    Example: a folder of images and its copy elsewhere have the same one; with one image less the copy has another.
    """
    digest = hashlib.sha256("\n".join(dataset.class_names).encode(errors="surrogateescape"))
    digest.update(dataset.labels.numpy().tobytes())
    for index in range(len(dataset)):
        digest.update(os.fsencode(os.path.basename(dataset.name(index))) + b"\0")
    return digest.hexdigest()[:12]


def split_digest(ids: Tensor, labels: Tensor, indices: Tensor) -> str:
    """Twelve hexadecimal digits that stand for the chosen images and their labels: the first of a SHA-256.

    Args:
        ids, labels: `n` int64 of the whole data set.
        indices: `m` int64, the chosen ones in any order.

    Example: the same choice has the same digest on every machine, and one label more has another.
    """
    chosen = sorted(zip(ids[indices].tolist(), labels[indices].tolist(), strict=True))
    lines = [f"version {SPLIT_VERSION}", *(f"{number} {label}" for number, label in chosen)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


class LabelSplit(NamedTuple):
    """The images whose labels are used: sorted `indices` `m` int64, and their `digest`, "" where there are none."""

    indices: Tensor
    digest: str

    def __str__(self) -> str:
        """Example: "40 labels, split 0f3c21a4b5d6"."""
        return f"{len(self.indices):,} labels" + (f", split {self.digest}" if self.digest else "")


def _number(encoded: Encoded) -> int:
    if isinstance(encoded, str | Path):
        content = os.fsencode("/".join(Path(encoded).parts[-2:]))
    elif isinstance(encoded, bytes):
        content = encoded
    else:
        content = str(encoded.shape).encode() + encoded.tobytes()
    return _hash(content)


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)
