"""Data sets of the Hugging Face kind: Arrow files that are mapped into memory, and so may be larger than it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contrastive_core.data.images import ImageDataset, Stored
from contrastive_core.data.sources import Splits, cached_splits

_SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` leaves behind."""


class HuggingFaceImages(Stored):
    """A column of encoded images of a `datasets.Dataset`, which maps its Arrow files into memory as they are read."""

    def __init__(self, rows: Any, column: str, source: str) -> None:
        self.rows, self.column, self.source = rows, column, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes | str:  # type: ignore[override]  # no slices
        cell = self.rows[int(index)][self.column] or {}
        return cell.get("bytes") or cell.get("path") or b""

    def take(self, indices: Sequence[int]) -> HuggingFaceImages:
        """The images at these places."""
        return HuggingFaceImages(self.rows.select(list(indices)), self.column, self.source)

    def name(self, index: int) -> str:
        """The source and the row."""
        return f"{self.source} row {index}"

    def identity(self, index: int) -> bytes:
        """The encoded image."""
        content = self[index]
        return content if isinstance(content, bytes) else os.fsencode("/".join(Path(content).parts[-2:]))


def huggingface(
    path: str,
    *,
    size: int,
    name: str | None = None,
    train: str = "train",
    test: str | None = None,
    image: str = "image",
    label: str | None = "label",
    cache: bool = True,
) -> Splits:
    """Images of a Hugging Face data set (`pip install "cpc-images[data]"`), mapped into memory and read at random.

    Args:
        path: a folder that `save_to_disk` wrote, a folder of parquet files, or a name on the hub, which is downloaded.
        name: the configuration, where the data set has several.
        train, test: the splits; None: the one called "test", if there is one.
        image, label: the columns; `label=None` for none. Null is unlabelled.
        size: pixels a side.
        cache: whether to decode into memory what fits.

    A data set's own code is never run: `datasets` from 4.0 on has no way to.

    Raises ImportError without `datasets`, FileNotFoundError for what is not there, ValueError for a split or column
    that the data set has not.

    Example: `huggingface("folder", size=96)` for a folder of `train-*.parquet`.
    """
    loaded = _load(path, name)
    if test is None and "test" in loaded and train != "test":
        test = "test"
    wanted = [train] if test is None else [train, test]
    if missing := [split for split in wanted if split not in loaded]:
        raise ValueError(
            f"{path} has the splits {', '.join(loaded)} and no {missing[0]!r}: set data.train and data.test"
        )
    splits = {split: loaded[split] for split in wanted}
    parts = [_of_rows(rows, image, label, f"{path} {split}", size) for split, rows in splits.items()]
    return cached_splits(parts[0], parts[1] if len(parts) == 2 else None, cache)


def _load(path: str, name: str | None) -> Mapping[str, Any]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ImportError('datasets is not installed: pip install "cpc-images[data]"') from error
    try:
        saved = Path(path).is_dir() and any((Path(path) / file).is_file() for file in _SAVED)
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, name)
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"no data set {path}: set data.path to a folder or a name ({reason})") from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _of_rows(rows: Any, image: str, label: str | None, source: str, size: int) -> ImageDataset:
    import datasets

    for column in filter(None, (image, label)):
        if column not in rows.column_names:
            raise ValueError(
                f"{source} has the columns {', '.join(rows.column_names)} and no {column!r}: set data.image and "
                f"data.label, data.label=null = unlabelled"
            )
    images = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    encoded = HuggingFaceImages(images, image, source)
    if label is None:
        return ImageDataset(encoded, size=size)
    numbers = [-1 if number is None else number for number in rows.with_format(None)[label]]
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"{source}: column {label!r} holds no integers: number the classes from 0")
    return ImageDataset(encoded, size=size, labels=numbers, class_names=getattr(rows.features[label], "names", None))
