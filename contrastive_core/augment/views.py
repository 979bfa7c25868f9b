"""Views: augmented versions of the same images, as each paper draws them, in batches on the images' device.

`Views` holds a pipeline (a list of augmentations) for each view and gives each numbers of its own. The functions
below return the papers' pipelines: `simclr`, `moco_v1`, `moco_v2`, `moco_v3`, `byol`, `pirl`, `supervised`; `labelled`,
`digits` and `chosen` are no paper's. Their knobs are None for the paper's own number. `JigsawViews` are PIRL's.

Colours are jittered in PIL's convention, as MoCo's and PIRL's code and SimCLR's second release do. SimCLR's first
release and BYOL's code add to the brightness, scale the contrast about each channel's mean, and the saturation in HSV.
Crops are bilinear and, for speed, not antialiased; the PyTorch papers' are (PIL), SimCLR's and BYOL's are bicubic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from contrastive_core.augment.blur import GaussianBlur
from contrastive_core.augment.channel_drop import ChannelDrop
from contrastive_core.augment.colour import ColourJitter, RandomGrey, RandomPhotometric, RandomSobel, RandomSolarize
from contrastive_core.augment.elastic import ElasticDeformation
from contrastive_core.augment.image import (
    CentreFit,
    RandomAffine,
    RandomCrop,
    RandomCutout,
    RandomFlip,
    RandomQuarterTurn,
    RandomResizedCrop,
)
from contrastive_core.augment.noise import GaussianNoise
from contrastive_core.augment.parts import Parts
from contrastive_core.randomness import Randomness
from contrastive_core.transfer import to_device

AMPLITUDE = 0.05
"""Largest displacement of elastic deformation as a share of the side, 11 px of 224: ours, as for CPC v2's patches."""


class Augmentation(Protocol):
    """Anything that maps images, or a patch grid, to augmented ones with the numbers it is handed."""

    def __call__(self, images: Tensor, randomness: Randomness) -> Tensor: ...


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 0..1; floats pass as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std per channel, for `... 3 h w` in 0..1."""
    centre, scale = (to_device(torch.tensor(each, dtype=images.dtype), images.device) for each in (mean, std))
    return (images - centre.view(3, 1, 1)) / scale.view(3, 1, 1)


class Views(nn.Module):
    """A view for each pipeline: `forward(images b 3 h w, randomness) -> tuple of b 3 image_size image_size`.

    Images are uint8, or floats in [0, 1]; views are normalised. Every view draws numbers of its own, and those of
    view i are the same whatever other views there are.

    Args:
        pipelines: the augmentations of each view, in order; each pipeline must end at `image_size` pixels a side.
        mean, std: per channel, of images in [0, 1].
        image_size: pixels a side.
        channel_drop: probability of colour dropping (two of three channels) at the end of every pipeline.
        elastic: probability of elastic deformation at the end of every pipeline, before the colour dropping, by up to
            `AMPLITUDE` of the side.

    Raises:
        ValueError: for no pipeline, two steps of a pipeline that draw from one stream, a probability outside 0 .. 1,
            or a view of another size.

    Example: `Views([[], []], mean=[0, 0, 0], std=[1, 1, 1], image_size=32)` returns 32 px images twice as they are.
    """

    def __init__(
        self,
        pipelines: Sequence[Sequence[Augmentation]],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        channel_drop: float = 0.0,
        elastic: float = 0.0,
    ) -> None:
        super().__init__()
        if not pipelines:
            raise ValueError("pipelines is empty: pass a list of augmentations for each view, two for most methods")
        self.mean, self.std, self.image_size = tuple(mean), tuple(std), image_size
        self.pipelines = tuple(_with_additions(pipeline, channel_drop, elastic) for pipeline in pipelines)

    def forward(self, images: Tensor, randomness: Randomness) -> tuple[Tensor, ...]:
        images = to_float(images)
        return tuple(
            self._view(pipeline, images, Parts(randomness, 1, f"view {index}"))
            for index, pipeline in enumerate(self.pipelines)
        )

    def _view(self, pipeline: Sequence[Augmentation], images: Tensor, randomness: Randomness) -> Tensor:
        view = _applied(pipeline, images, randomness)
        _check_size(view, self.image_size, "a view", "image_size")
        return normalise(view, self.mean, self.std)


class JigsawViews(nn.Module):
    """PIRL's image and jigsaw: `forward(images b 3 h w, randomness) -> (image b 3 s s, tiles b 9 3 t t)`.

    Misra and van der Maaten (2020). A second crop of the image is cut into 3 x 3 cells; each gives a tile, a window at
    a random place in it, so that tiles don't line up; the nine are in an order drawn uniformly for each image. Then
    every tile is augmented with numbers of its own. Both are normalised; images are uint8, or floats in [0, 1].

    Args:
        image: the augmentations of the image view, which must end at `image_size` pixels a side: `pirl(image_size)`.
        tiles: the augmentations of every tile, which keep its size: `pirl(None)`.
        mean, std: per channel, of images in [0, 1].
        image_size: pixels a side of the image view.
        cell: pixels a side of a cell; None = 85 / 224 of image_size, rounded (12 at 32 px).
        tile_size: pixels a side of a tile; None = 64 / 85 of the cell, rounded (9 of 12 px).
        scale: range of the second crop's share of the image's area.
        channel_drop, elastic: probabilities, as in `Views`, for the image and for every tile.

    9 tiles of 64 px, cells of 85 px of a crop to 255 px of scale 0.6 .. 1, and colours drawn for each tile are those
    of the authors' code in VISSL; that the paper's are the same is believed, not verified. VISSL's code never draws
    the last of the 22 places a window has along a side; here each is as likely.

    Raises:
        ValueError: for a tile larger than its cell, or a view or tile that an augmentation left at another size.

    Example: on an image whose nine cells each have a colour of their own, with no augmentations, scale (1, 1) and
    cell = side / 3, the tiles are those nine colours in some order.
    """

    def __init__(
        self,
        image: Sequence[Augmentation],
        tiles: Sequence[Augmentation],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        cell: int | None = None,
        tile_size: int | None = None,
        scale: tuple[float, float] = (0.6, 1.0),
        channel_drop: float = 0.0,
        elastic: float = 0.0,
    ) -> None:
        super().__init__()
        self.mean, self.std, self.image_size = tuple(mean), tuple(std), image_size
        self.cell = cell or max(1, round(image_size * 85 / 224))
        self.tile_size = tile_size or max(1, round(self.cell * 64 / 85))
        if self.tile_size > self.cell:
            raise ValueError(f"a tile of {self.tile_size} px doesn't fit a cell of {self.cell} px: lower `tile_size`")
        self.image = _with_additions(image, channel_drop, elastic)
        self.tiles = _with_additions(tiles, channel_drop, elastic)
        self.source = RandomResizedCrop(3 * self.cell, (scale[0], scale[1]), stream="jigsaw/crop")
        self.window = RandomCrop(self.tile_size, stream="jigsaw/window")

    def forward(self, images: Tensor, randomness: Randomness) -> tuple[Tensor, Tensor]:
        images = to_float(images)
        image = _applied(self.image, images, Parts(randomness, 1, "image"))
        _check_size(image, self.image_size, "the image view", "image_size")
        each = Parts(randomness, 9, "tiles")
        tiles = _applied(self.tiles, self.window(self._shuffled_cells(images, randomness), each), each)
        _check_size(tiles, self.tile_size, "a tile", "tile_size")
        tiles = rearrange(tiles, "(b tiles) c h w -> b tiles c h w", tiles=9)
        return normalise(image, self.mean, self.std), normalise(tiles, self.mean, self.std)

    def _shuffled_cells(self, images: Tensor, randomness: Randomness) -> Tensor:
        """The nine cells of each image's second crop, (b tiles) c cell cell, in an order of its own."""
        cells = self.source(images, randomness)
        cells = rearrange(cells, "b c (rows h) (cols w) -> (b rows cols) c h w", rows=3, cols=3)
        order = randomness.uniform("jigsaw/order", 9).argsort(dim=1)
        flat = (torch.arange(len(order))[:, None] * 9 + order).flatten()
        return cells.index_select(0, to_device(flat, cells.device))


def _with_additions(pipeline: Sequence[Augmentation], channel_drop: float, elastic: float) -> tuple[Augmentation, ...]:
    """The pipeline with the two additions at its end, where they are drawn at all; ValueError if streams collide."""
    steps = (
        *pipeline,
        *_drawn(
            ElasticDeformation(elastic, AMPLITUDE, of_side=True, stream="added/elastic"),
            ChannelDrop(channel_drop, stream="added/channel_drop"),
        ),
    )
    streams = [getattr(step, "stream", f"step {index}") for index, step in enumerate(steps)]
    twice = sorted({stream for stream in streams if streams.count(stream) > 1})
    if twice:
        raise ValueError(f"two steps draw from the stream {twice[0]!r}: give one of them another `stream`")
    return steps


def _applied(pipeline: Sequence[Augmentation], images: Tensor, randomness: Randomness) -> Tensor:
    for step in pipeline:
        images = step(images, randomness)
    return images


def _check_size(images: Tensor, size: int, what: str, argument: str) -> None:
    if images.shape[2:] != (size, size):
        raise ValueError(
            f"{what} is {images.shape[2]}x{images.shape[3]} px after its augmentations, {argument} is {size}: "
            f"let its pipeline crop to {size} px, or load images of that size"
        )


# --- the papers' pipelines


def simclr(
    size: int,
    *,
    strength: float | None = None,
    blur: float | None = None,
    flip: float | None = None,
    crop: Sequence[float] | None = None,
) -> list[nn.Module]:
    """SimCLR's, v1 and v2: crop, flip, jitter, grey, blur (Chen et al. 2020, appendix A). The same for both views.

    Args:
        size: pixels a side of the view.
        strength: s of the jitter's ranges 0.8 s, 0.8 s, 0.8 s, 0.2 s; None = 1. The paper's CIFAR-10 has 0.5.
        blur: probability; None = 0.5. The paper's CIFAR-10 has 0.
        flip: probability; None = 0.5.
        crop: range of the crop's share of the area; None = 0.08 .. 1.

    A probability or strength of 0 leaves a step out.

    Example: `simclr(32, strength=0.5, blur=0.0)` has four steps: crop, flip, jitter of probability 0.8, grey of 0.2.
    """
    s = _strength(strength)
    return _drawn(
        RandomResizedCrop(size, _range(crop, 0.08)),
        RandomFlip(_or(flip, 0.5)),
        *_jitter(0.8, s * 0.8, s * 0.8, s * 0.8, s * 0.2),
        RandomGrey(0.2),
        GaussianBlur(_or(blur, 0.5)),
    )


def moco_v1(
    size: int,
    *,
    strength: float | None = None,
    blur: float | None = None,
    flip: float | None = None,
    crop: Sequence[float] | None = None,
) -> list[nn.Module]:
    """MoCo v1's: crop, grey, jitter, flip (He et al. 2020, as in the authors' code). The same for both views.

    Args:
        size: pixels a side of the view.
        strength: times the jitter's ranges 0.4, 0.4, 0.4, 0.4, which every image gets; None = 1.
        blur: probability, before the flip; None = 0: v1 has none.
        flip: probability; None = 0.5.
        crop: range of the crop's share of the area; None = 0.2 .. 1.

    Example: `moco_v1(224)` has four steps; grey, of probability 0.2, stands before the jitter.
    """
    s = _strength(strength)
    return _drawn(
        RandomResizedCrop(size, _range(crop, 0.2)),
        RandomGrey(0.2),
        *_jitter(1.0, s * 0.4, s * 0.4, s * 0.4, s * 0.4),
        GaussianBlur(_or(blur, 0.0)),
        RandomFlip(_or(flip, 0.5)),
    )


def moco_v2(
    size: int,
    *,
    strength: float | None = None,
    blur: float | None = None,
    flip: float | None = None,
    crop: Sequence[float] | None = None,
) -> list[nn.Module]:
    """MoCo v2's and SimSiam's: crop, jitter, grey, blur, flip (Chen et al. 2020, as in the authors' code).

    Args:
        size: pixels a side of the view.
        strength: times the jitter's ranges 0.4, 0.4, 0.4, 0.1, of probability 0.8; None = 1.
        blur: probability; None = 0.5. SimSiam's CIFAR-10 has 0.
        flip: probability; None = 0.5.
        crop: range of the crop's share of the area; None = 0.2 .. 1.

    Example: `moco_v2(32, blur=0.0)` has four steps: crop, jitter, grey of probability 0.2, flip.
    """
    s = _strength(strength)
    return _drawn(
        RandomResizedCrop(size, _range(crop, 0.2)),
        *_jitter(0.8, s * 0.4, s * 0.4, s * 0.4, s * 0.1),
        RandomGrey(0.2),
        GaussianBlur(_or(blur, 0.5)),
        RandomFlip(_or(flip, 0.5)),
    )


def byol(
    size: int,
    *,
    view: int,
    strength: float | None = None,
    blur: float | None = None,
    flip: float | None = None,
    crop: Sequence[float] | None = None,
    solarise: float | None = None,
) -> list[nn.Module]:
    """BYOL's: crop, flip, jitter, grey, blur, solarise (Grill et al. 2020, appendix B), unlike by view.

    Args:
        size: pixels a side of the view.
        view: 1 or 2.
        strength: times the jitter's ranges 0.4, 0.4, 0.2, 0.1, of probability 0.8; None = 1.
        blur: probability; None = 1 for view 1, 0.1 for view 2.
        flip: probability; None = 0.5.
        crop: range of the crop's share of the area; None = 0.08 .. 1.
        solarise: probability; None = 0 for view 1, 0.2 for view 2.

    Raises:
        ValueError: for another view.

    Example: `byol(224, view=1)` has five steps and `byol(224, view=2)` six, the last a solarisation of probability 0.2.
    """
    if view not in (1, 2):
        raise ValueError(f"BYOL's view is 1 or 2, got {view}")
    s = _strength(strength)
    return _drawn(
        RandomResizedCrop(size, _range(crop, 0.08)),
        RandomFlip(_or(flip, 0.5)),
        *_jitter(0.8, s * 0.4, s * 0.4, s * 0.2, s * 0.1),
        RandomGrey(0.2),
        GaussianBlur(_or(blur, 1.0 if view == 1 else 0.1)),
        RandomSolarize(_or(solarise, 0.0 if view == 1 else 0.2)),
    )


def moco_v3(
    size: int,
    *,
    view: int,
    strength: float | None = None,
    blur: float | None = None,
    flip: float | None = None,
    crop: Sequence[float] | None = None,
    solarise: float | None = None,
) -> list[nn.Module]:
    """MoCo v3's for a ResNet: `byol`'s with crops of 0.2 .. 1 (Chen, Xie and He 2021, as in the authors' code).

    For a ViT the authors' commands leave the crops at 0.08 .. 1. Differs from the code: it flips last, which gives the
    same pictures, as no other step tells left from right.

    Args:
        size: pixels a side of the view.
        view: 1 or 2.
        strength, blur, flip, solarise: as in `byol`.
        crop: range of the crop's share of the area; None = 0.2 .. 1.
    """
    crop = _range(crop, 0.2)
    return byol(size, view=view, strength=strength, blur=blur, flip=flip, crop=crop, solarise=solarise)


def pirl(
    size: int | None,
    *,
    strength: float | None = None,
    blur: float | None = None,
    flip: float | None = None,
    crop: Sequence[float] | None = None,
) -> list[nn.Module]:
    """PIRL's: crop, jitter, photometric changes, grey, flip (as in the authors' code, VISSL), for image and tiles.

    Args:
        size: pixels a side of the view; None leaves the crop out, for tiles.
        strength: times the jitter's ranges 0.4, 0.4, 0.4, 0.2, which every image and tile gets; None = 1. At 0 the
            photometric changes are left out too: they solarize.
        blur: probability, before the flip; None = 0.
        flip: probability; None = 0.5.
        crop: range of the crop's share of the area; None = 0.08 .. 1.

    Example: `pirl(224)` has five steps, `pirl(None)` four.
    """
    s = _strength(strength)
    return _drawn(
        *([] if size is None else [RandomResizedCrop(size, _range(crop, 0.08))]),
        *_jitter(1.0, s * 0.4, s * 0.4, s * 0.4, s * 0.2),
        RandomPhotometric(0.66 if s else 0.0),
        RandomGrey(0.2),
        GaussianBlur(_or(blur, 0.0)),
        RandomFlip(_or(flip, 0.5)),
    )


def supervised(size: int, *, flip: float | None = None, crop: Sequence[float] | None = None) -> list[nn.Module]:
    """Crop and flip: what the papers train linear classifiers and fine-tune with.

    Args:
        size: pixels a side of the view.
        flip: probability; None = 0.5.
        crop: range of the crop's share of the area; None = 0.08 .. 1.
    """
    return _drawn(RandomResizedCrop(size, _range(crop, 0.08)), RandomFlip(_or(flip, 0.5)))


def labelled(*, flip: float | None = None, strength: float | None = None) -> list[nn.Module]:
    """For learning from few labels: moved, turned, scaled, sheared and deformed a little, and flipped. No paper's.

    The picture is reflected at its border, so that it does for black margins and for photographs.

    Args:
        flip: probability; None = 0.5. 0 where left and right mean something.
        strength: times the ranges (15 degrees, a tenth of the side, a scale of 0.85 .. 1.18, a shear of 10 degrees, and
            for half the pictures a deformation of 0.08 of the side); None = 1.

    Example: `labelled(flip=0.0)` has two steps.
    """
    s = _strength(strength)
    return _drawn(
        RandomFlip(_or(flip, 0.5)),
        RandomAffine(1.0, 15 * s, 0.1 * s, (0.85**s, 0.85**-s), 10 * s, fill=None),
        ElasticDeformation(0.5, 0.08 * s, of_side=True),
    )


def digits(size: int | None, *, strength: float | None = None, blur: float | None = None) -> list[nn.Module]:
    """For digits and other line drawings on black: moved, deformed, blurred, partly covered, noisy. No paper's.

    No colour, no flips and no inversion: a digit is grey and has a handedness.

    Args:
        size: pixels a side of the view, to which the image is fitted; None leaves that out, for tiles.
        strength: times the ranges of the moves (15 degrees, a tenth of the side, a scale of 0.8 .. 1.25, a shear of 10
            degrees), of the deformation (`AMPLITUDE`) and of the noise (0.1); None = 1.
        blur: probability; None = 0.5. At most a sigma of 1 px.

    Example: `digits(28)` has six steps.
    """
    s = _strength(strength)
    return _drawn(
        *([] if size is None else [CentreFit(size)]),
        RandomAffine(1.0, 15 * s, 0.1 * s, (0.8**s, 0.8**-s), 10 * s),
        ElasticDeformation(0.5, AMPLITUDE * s, of_side=True, fill=0.0),
        GaussianBlur(_or(blur, 0.5), (0.1, 1.0)),
        RandomCutout(0.5, (0.2, 0.4)),
        GaussianNoise(0.1 * s),
    )


def chosen(size: int, names: Sequence[str]) -> list[nn.Module]:
    """A pipeline of exactly the named operations, in the order given: for SimCLR's study of compositions (figure 5).

    Without "crop" the image is only fitted to the size first: resized on its short side and cut at the centre.

    Args:
        size: pixels a side of the view.
        names: among crop, flip, jitter, grey, blur (as in `simclr`), solarise (0.2), cutout (half the side), noise (of
            standard deviation up to 0.1), sobel, rotate (by 0, 90, 180 or 270 degrees), channel_drop, elastic. Where
            the paper prints no probability (cutout, noise, sobel, channel_drop, elastic) it is 0.5: ours.

    Raises:
        ValueError: for an unknown name, or one named twice.

    Example: `chosen(32, ["crop", "jitter"])` has two steps, `chosen(32, [])` one, which only fits the size.
    """
    steps: dict[str, nn.Module] = {
        "crop": RandomResizedCrop(size),
        "flip": RandomFlip(),
        "jitter": ColourJitter(0.8, 0.8, 0.8, 0.8, 0.2),
        "grey": RandomGrey(0.2),
        "blur": GaussianBlur(),
        "solarise": RandomSolarize(),
        "cutout": RandomCutout(),
        "noise": GaussianNoise(0.1, 0.5),
        "sobel": RandomSobel(),
        "rotate": RandomQuarterTurn(),
        "channel_drop": ChannelDrop(0.5),
        "elastic": ElasticDeformation(0.5, AMPLITUDE, of_side=True),
    }
    unknown = [name for name in names if name not in steps]
    if unknown:
        raise ValueError(f"unknown augmentation {unknown[0]!r}: choose among {', '.join(steps)}")
    if len(set(names)) < len(names):
        raise ValueError(f"an augmentation is named twice in {', '.join(names)}: name each at most once")
    return [*([] if "crop" in names else [CentreFit(size)]), *(steps[name] for name in names)]


def _or(value: float | None, papers: float) -> float:
    return papers if value is None else value


def _strength(value: float | None) -> float:
    if value is not None and value < 0:
        raise ValueError(f"strength={value}: pass at least 0, 1 = the paper's")
    return _or(value, 1.0)


def _range(crop: Sequence[float] | None, papers: float) -> tuple[float, float]:
    return (papers, 1.0) if crop is None else (crop[0], crop[1])


def _jitter(
    probability: float, brightness: float, contrast: float, saturation: float, hue: float
) -> list[ColourJitter]:
    """None at all where no range is left, at strength 0."""
    if not any((brightness, contrast, saturation, hue)):
        return []
    return [ColourJitter(probability, brightness, contrast, saturation, hue)]


def _drawn(*steps: nn.Module) -> list[nn.Module]:
    """The steps that are drawn at all."""
    return [step for step in steps if getattr(step, "probability", 1) != 0]
