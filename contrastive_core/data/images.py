"""Encoded images as a map-style data set of uint8 squares.

Whatever comes in (JPEG bytes, a path to a 16-bit PNG, a grey array) comes out as `3 size size` uint8. An image
that cannot be decoded never stops a run by itself: it is named, and the next one that can be decoded stands in.
"""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torch.utils.dlpack import from_dlpack

logger = logging.getLogger(__name__)

Encoded = bytes | str | Path | np.ndarray
"""An image as a source holds it: encoded bytes, a path, or pixels `h w`, `h w 1`, `h w 3` or `h w 4` uint8."""

CACHE_LIMIT = 2 * 1024**3
"""Bytes of pixels above which a data set is not decoded into memory: CIFAR-10 at 32 px takes 0.15 GB."""

LARGEST_LABEL = 100_000
"""A number above which a label is that of no class, unless there are so many images."""

LONGEST_SEARCH = 1000
"""Undecodable images in a row after which the search for a stand-in gives up."""


class Stored(Sequence[Encoded]):
    """Images that lie elsewhere and are read one by one: `__getitem__` by number, `len`, and what is below."""

    def take(self, indices: Sequence[int]) -> Stored:
        """The images at these places, unread."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What a person would call the image."""
        raise NotImplementedError

    def file_name(self, index: int) -> str:
        """The last part of its file's name, as lists of images have it; of a tar's without its suffix."""
        return Path(self.name(index)).name

    def identity(self, index: int) -> bytes:
        """What `contrastive_core.data.identity` tells the image from others by."""
        raise NotImplementedError

    def beginning(self, index: int, count: int) -> tuple[int, bytes] | None:
        """As `beginning_of` the image; None where it lies so far away that a million of them take hours."""
        return beginning_of(self[index], count)


def beginning_of(encoded: Encoded, count: int) -> tuple[int, bytes]:
    """How many bytes an image has, and its first `count`; of pixels all. Raises OSError for a file that is not there.

    Example: of `b"abcd"` and 2, `(4, b"ab")`.
    """
    if isinstance(encoded, np.ndarray):
        return encoded.nbytes, str(encoded.shape).encode() + encoded.tobytes()
    if isinstance(encoded, bytes):
        return len(encoded), encoded[:count]
    with open(encoded, "rb") as file:
        return os.fstat(file.fileno()).st_size, file.read(count)


class UndecodableImage(ValueError):
    """An image that could not be turned into pixels; the message holds its name and the reason."""


class Sample(NamedTuple):
    """One item: image `3 size size` uint8; label, -1 = unlabelled; index in the data set, the stand-in's if one
    was needed; fault, the name and reason of the image that could not be decoded, else empty."""

    image: Tensor
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a sample for
    fault: str = ""


def decode_square(encoded: Encoded | Image.Image, size: int) -> Tensor:
    """Decode one image to `3 size size` uint8: short side resized to `size`, the centre square kept.

    Grey becomes three equal channels; transparency is laid over white; 16-bit grey keeps its upper 8 bits; of an
    animation the first frame counts; a photograph is turned as its EXIF orientation says. An image whose short
    side is `size` already is cropped and not resampled.

    Raises whatever PIL raises on a bad image (OSError, SyntaxError, ValueError and others).

    Example: a white 2 x 1 JPEG gives `torch.full((3, size, size), 255)`.
    """
    if isinstance(encoded, np.ndarray):
        return _centre_square(_pixels(_image_of_array(encoded)), size)
    if isinstance(encoded, Image.Image):
        return _centre_square(_pixels(ImageOps.exif_transpose(encoded)), size)
    image = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
    # a JPEG decodes at 1/2, 1/4 or 1/8 of its size, several times as fast; half as large again as what is needed
    # leaves the antialiasing to our own filter
    image.draft(None, (3 * size // 2, 3 * size // 2))
    ImageOps.exif_transpose(image, in_place=True)  # which copies nothing where there is nothing to turn
    return _centre_square(_pixels(image), size)


def _pixels(image: Image.Image) -> Tensor:
    """`h w 4` uint8, of which the first three are red, green and blue; `h w 3` for images of many megapixels.

    PIL keeps four bytes a pixel. To take three of them out costs a third of what decoding a JPEG does, so that is left
    until the image is small: its memory is read as it is, by Arrow's interface, which an image in several blocks lacks.
    """
    import pyarrow  # takes a fifth of a second to load, which arrays do not need

    image = as_rgb(image)
    image.load()
    try:
        packed = from_dlpack(pyarrow.array(image).flatten())
    except ValueError:
        return torch.from_numpy(np.array(image))
    return packed.view(image.height, image.width, 4)


def _image_of_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"pixels are {pixels.dtype} of shape {pixels.shape}: pass uint8 `h w` or `h w channels`")
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def as_rgb(image: Image.Image) -> Image.Image:
    """Of whatever PIL has opened, as `decode_square` says; ValueError for pixels that are floats."""
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is not known: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip at 255 and give white
        wide = np.asarray(image)  # of 16 bits, or of 32 of which PIL fills as many
        image = Image.fromarray((wide.clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _centre_square(pixels: Tensor, size: int) -> Tensor:
    """`h w 3` or `h w 4` -> `3 size size`, the short side brought to `size`."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side].permute(2, 0, 1)
    if side != size:
        # torch's filter for uint8 is PIL's, which it widens when it shrinks, in a third of the time
        square = F.interpolate(square[None], (size, size), mode="bilinear", antialias=True)[0]
    return square[:3].contiguous()


def _at(source: Sequence[Encoded] | np.ndarray, chosen: list[int]) -> Sequence[Encoded] | np.ndarray:
    if isinstance(source, Stored):
        return source.take(chosen)
    return source[chosen] if isinstance(source, np.ndarray) else [source[i] for i in chosen]


def class_numbers(highest: int, images: int, where: str) -> list[str]:
    """Names of classes that have numbers only, up to the highest label, of so many images; [] for -1.

    Raises ValueError, which says `where`, for a label that numbers something else than classes.

    Example: `class_numbers(2, 10, "a.parquet")` is ["0", "1", "2"].
    """
    if highest > max(LARGEST_LABEL, 10 * images):
        raise ValueError(f"{where}: the highest label of {images:,} images is {highest:,}: number the classes from 0")
    return [str(label) for label in range(highest + 1)]


class ImageDataset(Dataset[Sample]):
    """Images of one size over a sequence of encoded ones; item i is a `Sample`.

    Args:
        source: the images, each bytes, a path or an array (`Encoded`); an array `n h w c` is such a sequence too.
        size: side of the square that each image becomes, in pixels.
        labels: `n` integers from 0, -1 where unknown; None = all unknown.
        class_names: a name a class; by default the numbers up to the highest label.
        names: a name an image, for messages; by default its path, or "image 17".

    Attributes: `labels`: `n` int64; `classes`: how many, 0 when unlabelled; `class_names`; `size`; `pixels`:
    `n 3 size size` uint8 once cached, else None; `faults`: what is known to be undecodable, index -> name and reason;
    `shards`: `n` int64, where training is to mix the images of `shards_at_a_time` shards at a time, else None.

    Raises ValueError when the numbers of images, labels and names differ, or a label lies outside the classes.

    Example: `ImageDataset([b"not an image", grey_png], size=8)[0]` has index 1 and fault "image 0: ...".
    """

    def __init__(
        self,
        source: Sequence[Encoded] | np.ndarray,
        *,
        size: int,
        labels: Tensor | Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        count = len(source)
        if size < 1:
            raise ValueError(f"size {size} px: pass at least 1")
        if count == 0:
            raise ValueError("a data set of no images: check the path or the split")
        self.source, self.size, self.names = source, size, names
        self.labels = torch.full((count,), -1) if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        if self.labels.shape != (count,) or (names is not None and len(names) != count):
            named = "no" if names is None else len(names)
            raise ValueError(f"{count} images with labels {tuple(self.labels.shape)} and {named} names: pass one each")
        if class_names is None:
            class_names = class_numbers(int(self.labels.max()), count, "labels")
        self.class_names = tuple(class_names)
        if int(self.labels.min()) < -1 or int(self.labels.max()) >= max(1, self.classes):
            low, high = int(self.labels.min()), int(self.labels.max())
            raise ValueError(
                f"labels run from {low} to {high} for {self.classes} classes: number them from 0, -1 = none"
            )
        self.shards: Tensor | None = None
        self.shards_at_a_time = 0
        self.pixels: Tensor | None = None
        self.faults: dict[int, str] = {}
        self._stand_ins = torch.arange(count)

    @property
    def classes(self) -> int:
        """How many classes there are, 0 when unlabelled."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """What a person would call the image: its path, "FILE row 17" or "image 17"."""
        if self.names is not None:
            return self.names[index]
        if isinstance(self.source, Stored):
            return self.source.name(index)
        item = self.source[index]
        return str(item) if isinstance(item, str | Path) else f"image {index}"

    def file_name(self, index: int) -> str:
        """The last part of that, as lists of images have it; of an image in a tar without its suffix."""
        if self.names is None and isinstance(self.source, Stored):
            return self.source.file_name(index)
        return Path(self.name(index)).name

    def decode(self, index: int) -> Tensor:
        """The image at `index`, `3 size size` uint8, or UndecodableImage with its name and the reason."""
        if index in self.faults:
            raise UndecodableImage(self.faults[index])
        if self.pixels is not None:
            return self.pixels[index].clone()
        return self._decode(index)

    def _decode(self, index: int) -> Tensor:
        try:
            return decode_square(self.source[index], self.size)
        except MemoryError:
            raise
        except Exception as error:  # a broken file makes PIL raise almost anything: OSError, SyntaxError, struct.error
            reason = " ".join(str(error).split()) or type(error).__name__
            if "cannot identify image file" in reason:  # PIL adds the address of our buffer
                reason = "not an image that PIL knows" if self.source[index] else "empty"
            raise UndecodableImage(f"{self.name(index)}: {reason}") from error

    def __getitem__(self, index: int) -> Sample:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"image {index} of {count}")
        fault = ""
        for place in range(index % count, index % count + min(count, LONGEST_SEARCH)):
            try:
                return Sample(self.decode(place % count), int(self.labels[place % count]), place % count, fault)
            except UndecodableImage as error:
                fault = fault or str(error)
        raise UndecodableImage(f"{fault}; nor can the {min(count, LONGEST_SEARCH) - 1} images after it be decoded")

    def stand_ins(self, indices: Tensor) -> Tensor:
        """For a cached data set: each index, or that of the next decodable image. `b` -> `b` int64."""
        return self._stand_ins[indices]

    def subset(self, indices: Tensor | Sequence[int]) -> ImageDataset:
        """The images at these indices, in this order, with the same classes; index 0 is the first of them."""
        chosen = torch.as_tensor(indices, dtype=torch.int64).tolist()
        stored = isinstance(self.source, Stored)
        part = ImageDataset(
            _at(self.source, chosen),
            size=self.size,
            labels=self.labels[chosen],
            class_names=self.class_names,
            names=None if stored and self.names is None else [self.name(i) for i in chosen],
        )
        if self.shards is not None:
            part.shards, part.shards_at_a_time = self.shards[chosen], self.shards_at_a_time
        if self.pixels is not None:
            faults = {place: self.faults[i] for place, i in enumerate(chosen) if i in self.faults}
            part._keep(self.pixels[chosen], faults)
        return part

    def cached(self) -> ImageDataset:
        """The same data set with every image decoded once into one uint8 tensor: batches then are one indexing.

        Decodes on `torch.get_num_threads()` threads (PIL releases the interpreter lock). Images that cannot be
        decoded are remembered in `faults`. Raises ValueError above CACHE_LIMIT bytes, UndecodableImage when no
        image can be decoded.
        """
        count, size = len(self), self.size
        if self.pixels is not None:
            return self
        if self.bytes_decoded > CACHE_LIMIT:
            raise ValueError(
                f"{count:,} images of {size} px take {self.bytes_decoded / 1e9:.1f} GB decoded, the limit is "
                f"{CACHE_LIMIT / 1e9:.1f}: leave the cache off and use `workers`, or take a smaller size"
            )
        start = time.perf_counter()
        pixels = np.zeros((count, 3, size, size), dtype=np.uint8)
        faults: dict[int, str] = {}

        def fill(first: int) -> None:
            for i in range(first, min(first + 500, count)):
                try:
                    pixels[i] = self._decode(i).numpy()
                except UndecodableImage as error:
                    faults[i] = str(error)

        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            list(pool.map(fill, range(0, count, 500)))
        logger.info("decoded %s images of %d px in %.1f s", f"{count:,}", size, time.perf_counter() - start)
        whole = ImageDataset(self.source, size=size, labels=self.labels, class_names=self.class_names, names=self.names)
        whole._keep(torch.from_numpy(pixels), faults)
        return whole

    @property
    def bytes_decoded(self) -> int:
        """Bytes that all pixels take once decoded."""
        return len(self) * 3 * self.size**2

    def _keep(self, pixels: Tensor, faults: dict[int, str]) -> None:
        count = len(self)
        if len(faults) == count:
            raise UndecodableImage(f"none of the {count} images can be decoded; the first is {faults[0]}")
        self.pixels, self.faults = pixels, dict(sorted(faults.items()))
        for i in reversed(self.faults):  # from the end, so that a run of bad ones passes the stand-in down
            self._stand_ins[i] = self._stand_ins[(i + 1) % count]
        for i in reversed(self.faults):  # once more for a run that goes over the end to image 0
            self._stand_ins[i] = self._stand_ins[(i + 1) % count]
