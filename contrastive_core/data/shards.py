"""Collections that are larger than memory or than one file: tar shards as WebDataset writes them.

A stream hands out images in an order that depends on how many read it, on the size of a buffer and on where it was
interrupted, and needs a state to go on from. Here shards are read at random: one pass over the headers tells where each
image lies, and from then on an image is a number, as in every other data set. So the order is that of `sample_order`,
a function of (seed, epoch): the same on any number of processes and workers, none of which sees another's images, and a
run goes on in the midst of a shard with nothing saved but its step.

Where reading at random is slow (a spinning disk), `shards_at_a_time` mixes the images of so many shards at a time,
other ones together in every epoch, and reads stay within those.
"""

from __future__ import annotations

import logging
import os
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from contrastive_core.data.images import ImageDataset, Stored, class_numbers
from contrastive_core.data.shard_files import RangeReader, fetched, find_shards, is_remote, opened, state_of
from contrastive_core.data.sources import EXTENSIONS, Splits, StrPath, cached_splits

logger = logging.getLogger(__name__)

LARGEST_IMAGE = 1 << 28
"""Bytes of an encoded image above which it is not read: 256 MiB, a hundred times a large photograph."""

LONGEST_LABEL = 32
"""Bytes of a `.cls` file above which it is no label."""

LONGEST_KEY = 512
"""Characters above which a name is no sample's: all names of a collection take as many as the longest."""

READERS = 8
"""Remote shards whose headers are read at the same time."""


class Member(NamedTuple):
    """Where an image lies in its shard: the first byte and how many; the sample's key; its label, -1 = none."""

    start: int
    length: int
    key: str
    label: int


class Headers(NamedTuple):
    """A shard's images, and its state when they were read; None = it is broken, and no index may keep that."""

    members: list[Member]
    state: tuple[int, int] | None


class TarImages(Stored):
    """The images of tar shards, each read when it is asked for: encoded bytes by number, in the order of the shards.

    Args:
        files: the shards.
        shard, start, length: `n` integers, for each image its shard and where it lies there.
        keys: `n` names, without the shard's.
    """

    def __init__(
        self, files: Sequence[str], shard: np.ndarray, start: np.ndarray, length: np.ndarray, keys: np.ndarray
    ) -> None:
        self.files, self.shard, self.start, self.length, self.keys = tuple(files), shard, start, length, keys
        self._reader = RangeReader()

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # no slices, which nobody asks for
        length = int(self.length[index])
        if length > LARGEST_IMAGE:
            raise ValueError(f"{length:,} bytes are no image, the limit is {LARGEST_IMAGE:,}")
        read = self._reader.read(self.files[int(self.shard[index])], int(self.start[index]), length)
        if len(read) < length:
            raise ValueError(
                f"its shard ends after {len(read)} of its {length} bytes: it was changed since it was read"
            )
        return read

    def take(self, indices: Sequence[int]) -> TarImages:
        """The images at these places."""
        chosen = np.asarray(indices, dtype=np.int64)
        return TarImages(self.files, self.shard[chosen], self.start[chosen], self.length[chosen], self.keys[chosen])

    def beginning(self, index: int, count: int) -> tuple[int, bytes] | None:
        """Of a shard on a disk of ours: to ask a server for each of a million images takes hours."""
        file, length = self.files[int(self.shard[index])], int(self.length[index])
        if is_remote(file):
            return None
        return length, self._reader.read(file, int(self.start[index]), min(length, count))

    def name(self, index: int) -> str:
        """The shard's path and the sample's key."""
        return f"{self.files[int(self.shard[index])]} {self.keys[index]}"

    def file_name(self, index: int) -> str:
        """The last part of the key."""
        return str(self.keys[index]).rpartition("/")[2]

    def identity(self, index: int) -> bytes:
        """The last two parts of the key, as of a file's path: a million images are not read to draw a split."""
        return "/".join(str(self.keys[index]).split("/")[-2:]).encode(errors="surrogateescape")


def webdataset(
    train: StrPath | Sequence[StrPath],
    test: StrPath | Sequence[StrPath] | None = None,
    *,
    size: int,
    shards_at_a_time: int | None = None,
    index: StrPath | None = None,
    cache: bool = True,
) -> Splits:
    """Images from tar shards as WebDataset writes them: what shares a name up to the first dot is a sample.

    A sample's image is its first file with an image's suffix; the log tells how many others are passed over. Its label
    is the number in its `.cls` file, from 0, if it has one. Of files of one name the last counts, as where tar unpacks
    them. Nothing is unpacked here, so that no path in a shard leads anywhere; links and samples without image are
    passed over. A shard that is no tar, or ends too soon, is named in the log, and what comes before the break counts.

    Args:
        train, test: a folder of `.tar` files, a pattern such as "shards/train-*.tar" or "train-{000..146}.tar", a file,
            or several of these; also URLs (https, s3, gs, hf, ...: what fsspec knows), of which each image is fetched
            when it is asked for. `workers` fetch side by side; `index` saves reading all headers at every start.
        size: pixels a side.
        shards_at_a_time: mix the images of so many shards at a time; None = all of them.
        index: a file (`.npz`) that keeps where images lie, made where there is none and anew when a shard has changed.
        cache: whether to decode into memory what fits.

    Raises FileNotFoundError where there is no shard, ValueError where no shard holds an image, OSError for a shard that
    cannot be read at all: the same command then has all of them, or ends.

    Example: a shard of `1.jpg`, `1.cls`, `2.jpg` holds two images, of which the second has no label.
    """
    known = {} if index is None else _read_index(Path(index))
    parts = [
        _of_shards(find_shards(where, argument), known, size, shards_at_a_time)
        for where, argument in ((train, "data.train"), (test, "data.test"))
        if where is not None
    ]
    if index is not None:
        _write_index(Path(index), known)
    classes = max(part.classes for part in parts)
    for part in parts:
        part.class_names = tuple(map(str, range(classes)))
    return cached_splits(parts[0], parts[1] if len(parts) == 2 else None, cache)


def _of_shards(files: list[str], known: dict[str, Headers], size: int, shards_at_a_time: int | None) -> ImageDataset:
    missing = [file for file in files if file not in known]
    with ThreadPoolExecutor(READERS if any(map(is_remote, missing)) else 1) as readers:
        known.update(zip(missing, readers.map(read_shard, missing), strict=True))
    members = [known[file].members for file in files]
    rows = [(shard, *member) for shard, some in enumerate(members) for member in some]
    if not rows:
        raise ValueError(f"{len(files)} shards from {files[0]} on hold no image: their files need an image's suffix")
    shard, start, length, keys, labels = zip(*rows, strict=True)
    places = [np.array(numbers, dtype=np.int64) for numbers in (shard, start, length)]
    source = TarImages(files, places[0], places[1], places[2], np.array(keys))
    dataset = ImageDataset(
        source, size=size, labels=list(labels), class_names=class_numbers(max(labels), len(rows), files[0])
    )
    if shards_at_a_time is not None:
        if shards_at_a_time < 1:
            raise ValueError(f"shards_at_a_time={shards_at_a_time}: pass 1 or more, or null to mix all images")
        dataset.shards, dataset.shards_at_a_time = torch.from_numpy(source.shard), shards_at_a_time
    return dataset


def read_shard(file: str) -> Headers:
    """The images of a shard, by their headers; a break is named in the log, and ends the list.

    So are images that are passed over.

    Raises OSError where it cannot be read: a disk or a line that fails now and then must not make another data set.
    """
    images: dict[str, tarfile.TarInfo] = {}
    numbers: dict[str, bytes] = {}
    broken, passed_over = "", 0
    state = state_of(file)
    if is_remote(file):
        fetched(file, 0, tarfile.BLOCKSIZE)  # a server without ranges is told of now, and not image by image
    try:
        # not compressed: a place in a compressed file cannot be gone to
        with opened(file) as bytes_of, tarfile.open(fileobj=bytes_of, mode="r:") as shard:
            for member in shard:
                if member.size < 0:  # the next header would be one of those before, without an end
                    raise tarfile.ReadError(f"a file of {member.size} bytes")
                if member.offset_data + member.size > state[0]:
                    raise tarfile.ReadError("it ends within a file")
                key, _, suffix = _sample(member.name)
                if not member.isreg():
                    continue
                if suffix == "cls" and member.size <= LONGEST_LABEL and (text := shard.extractfile(member)) is not None:
                    numbers[key] = text.read()
                elif f".{suffix.rpartition('.')[2]}" in EXTENSIONS:
                    first = images.setdefault(key, member) if len(key) <= LONGEST_KEY else None
                    passed_over += first is not member
                    if first is not None and first.name == member.name:
                        images[key] = member
            # tarfile takes a header that is cut off or damaged for the end, which is at least a block of zeros
            bytes_of.seek(shard.offset)
            rest = bytes_of.read(tarfile.RECORDSIZE)
            if len(rest) < tarfile.BLOCKSIZE or any(rest):
                raise tarfile.ReadError(f"neither a header nor the end at byte {shard.offset:,}")
    except (tarfile.TarError, EOFError, ValueError) as error:  # ValueError: of a header's numbers
        broken = " ".join(str(error).split())
        logger.warning("broken shard %s: %s; the %d images before that are used", file, broken, len(images))
    if passed_over:
        logger.warning(
            "%s: %d images are passed over, whose names up to the first dot are those of others, or longer than %d",
            file, passed_over, LONGEST_KEY,
        )  # fmt: skip
    labels = {key: _label(text, file, key) for key, text in numbers.items() if key in images}
    members = [Member(member.offset_data, member.size, key, labels.get(key, -1)) for key, member in images.items()]
    return Headers(members, None if broken or not state[1] else state)


def _sample(name: str) -> tuple[str, str, str]:
    """The key of a sample, a dot, the suffix: the name is split at the first dot behind the last slash."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return folder + slash + key, dot, suffix.lower()


def _label(text: bytes, file: str, key: str) -> int:
    try:
        label = int(text)
    except ValueError:
        label = 1 << 63
    if not -(1 << 63) <= label < 1 << 63:
        raise ValueError(f"{file}: the label of {key} is {text[:20]!r}: number the classes from 0")
    return label


def _read_index(index: Path) -> dict[str, Headers]:
    """The shards that are as they were when the index was written."""
    if not index.is_file():
        return {}
    try:
        with index.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            tables = {name: kept[name] for name in ("files", "states", "shard", "start", "length", "keys", "labels")}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{index} is no index of shards ({error}): pass another data.index, or remove it") from error
    files, bounds = tables["files"].tolist(), np.searchsorted(tables["shard"], np.arange(len(tables["files"]) + 1))
    known = {}
    for place, file in enumerate(files):
        state = tuple(tables["states"][place].tolist())
        if (is_remote(file) or Path(file).is_file()) and state_of(file) == state:
            rows = slice(bounds[place], bounds[place + 1])
            columns = (tables[name][rows].tolist() for name in ("start", "length", "keys", "labels"))
            known[file] = Headers([Member(*row) for row in zip(*columns, strict=True)], state)
    return known


def _write_index(index: Path, known: Mapping[str, Headers]) -> None:
    """Keep what is known of whole shards, unless that is kept already; all or nothing, whoever else does the same."""
    whole = {file: headers for file, headers in known.items() if headers.state is not None}
    if _read_index(index).keys() == whole.keys():
        return
    rows = [(shard, *member) for shard, headers in enumerate(whole.values()) for member in headers.members]
    if not rows:  # all images are in broken ones
        return
    shard, start, length, keys, labels = zip(*rows, strict=True)
    temporary = index.with_name(f".{index.name}.{os.getpid()}.npz")
    index.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        temporary,
        files=np.array(list(whole)),
        states=np.array([headers.state for headers in whole.values()]),
        shard=np.array(shard, dtype=np.int64),
        start=np.array(start, dtype=np.int64),
        length=np.array(length, dtype=np.int64),
        keys=np.array(keys),
        labels=np.array(labels, dtype=np.int64),
    )
    temporary.replace(index)
