"""What is done to a whole image: crops, flips, turns, affine jitter, cutout. Modules over `geometry`'s functions.

Each is `forward(images n c h w in [0, 1], randomness) -> n c h w`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_core.augment.geometry import affine, affine_matrix, crop, cut_out, flip, resized_crop, shift_window
from contrastive_core.augment.rows import by_group, check_images, check_probability, on_chosen
from contrastive_core.randomness import Randomness


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class RandomCrop(nn.Module):
    """A window of the given size at a random place, of the image or of the image with its border reflected.

    Args:
        size: rows and columns of the window, in pixels.
        padding: pixels of reflected border added on each side first (CIFAR's crop: size 32, padding 4).

    Raises:
        ValueError: if the window is larger than the padded image, or padding not smaller than the image.

    Example: at the image's own size and without padding it is the identity.
    """

    def __init__(self, size: int | tuple[int, int], padding: int = 0, stream: str = "crop") -> None:
        super().__init__()
        if padding < 0:
            raise ValueError(f"padding is at least 0, got {padding}")
        self.size, self.padding, self.stream = _pair(size), padding, stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        check_images(images)
        if self.padding:
            if self.padding >= min(images.shape[2:]):
                raise ValueError(f"padding {self.padding} reflects more than an image of {tuple(images.shape[2:])} has")
            images = F.pad(images, (self.padding,) * 4, mode="reflect")
        spare = [images.shape[2] - self.size[0], images.shape[3] - self.size[1]]
        if min(spare) < 0:
            raise ValueError(
                f"a crop of {self.size} doesn't fit an image of {tuple(images.shape[2:])} (padding included): "
                "resize the images, raise `padding`, or lower `size`"
            )
        if max(spare) == 0:
            return images
        u = randomness.uniform(f"{self.stream}/corner", 2)
        top, left = (u * (torch.tensor(spare) + 1)).long().unbind(1)
        return crop(images, top, left, self.size)


class RandomResizedCrop(nn.Module):
    """A random part of the image, of random area and aspect ratio, resized to `size` (Inception's, SimCLR's crop).

    The part is drawn as torchvision draws it: up to ten times an area and a ratio, until the box, in whole pixels,
    fits; then a place for it, uniformly. If none of the ten fits, it is the largest central part whose ratio is in
    range. SimCLR's own code draws up to a hundred times, then takes the whole image.

    Args:
        size: rows and columns of the result, in pixels.
        scale: range of the part's share of the image's area, within 0 .. 1.
        ratio: range of width / height, in pixels, drawn log-uniformly.
        antialias: whether a reduced part is smoothed first, as PIL does. Without, which is several times as fast on
            a CPU, load images at most about twice as large as `size`.

    Example: scale (1, 1) and ratio (1, 1) resize a square image as a whole.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        antialias: bool = False,
        stream: str = "crop",
    ) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(
                f"scale lies within 0 .. 1 and ratio above 0, low end first, got {tuple(scale)} and {tuple(ratio)}"
            )
        self.size, self.scale, self.ratio = _pair(size), (scale[0], scale[1]), (ratio[0], ratio[1])
        self.antialias, self.stream = antialias, stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        check_images(images)
        box = self._boxes((images.shape[2], images.shape[3]), randomness)
        if len(box) != len(images):
            raise ValueError(f"the randomness is for {len(box)} images, got {len(images)}: build it with their places")
        return resized_crop(images, box, self.size, self.antialias)

    def _boxes(self, image: tuple[int, int], randomness: Randomness) -> Tensor:
        """top, left, height, width in pixels, n 4 int64, for images of the given rows and columns."""
        sides = torch.tensor(image)
        area = randomness.uniform(f"{self.stream}/area", 10, low=self.scale[0], high=self.scale[1]).double()
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(randomness.uniform(f"{self.stream}/ratio", 10, low=low, high=high).double())
        area = area * (image[0] * image[1])
        tries = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=2).round().long()  # n 10 2
        fits = ((tries > 0) & (tries <= sides)).all(2)
        first = fits.int().argmax(1)  # the first of the largest
        drawn = tries.gather(1, first[:, None, None].expand(-1, 1, 2)).squeeze(1)
        some = fits.any(1, keepdim=True)
        size = torch.where(some, drawn, torch.tensor(_central(image, self.ratio)))
        places = (randomness.uniform(f"{self.stream}/corner", 2).double() * (sides - size + 1)).long()
        return torch.cat([torch.where(some, places, (sides - size) // 2), size], dim=1)


def _central(image: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int]:
    """Rows and columns of the largest part of an image (rows, columns) whose width / height is in range."""
    h, w = image
    if w / h < ratio[0]:
        return min(h, max(1, round(w / ratio[0]))), w
    if w / h > ratio[1]:
        return h, min(w, max(1, round(h * ratio[1])))
    return h, w


class RandomFlip(nn.Module):
    """Left and right swapped with a probability; None = 0.5."""

    def __init__(self, probability: float | None = None, stream: str = "flip") -> None:
        super().__init__()
        self.probability, self.stream = check_probability(0.5 if probability is None else probability), stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images)
        return on_chosen(images, randomness.bernoulli(f"{self.stream}/chosen", self.probability), flip)


class RandomQuarterTurn(nn.Module):
    """Turned by 0, 90, 180 or 270 degrees, each as likely (SimCLR's "rotate", figure 4). Images must be square."""

    def __init__(self, stream: str = "quarter_turn") -> None:
        super().__init__()
        self.stream = stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        check_images(images)
        if images.shape[2] != images.shape[3]:
            raise ValueError(f"a quarter turn needs square images, got {tuple(images.shape[2:])}: crop them first")
        turns = [_quarters(k) for k in range(4)]
        return by_group(images, randomness.integers(f"{self.stream}/turns", 4), turns)


def _quarters(turns: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, rows: torch.rot90(images, turns, (2, 3))


class RandomCutout(nn.Module):
    """A square set to `fill` with a probability (DeVries and Taylor 2017), centred anywhere, clipped at the border.

    Args:
        probability: of changing an image.
        side: range of the square's side as a share of the image's, drawn uniformly; DeVries and Taylor's is half the
            side for CIFAR-10.
        fill: what the square is set to.

    Example: probability 1 and side (2, 2) leave nothing but `fill`.
    """

    def __init__(
        self,
        probability: float = 0.5,
        side: tuple[float, float] = (0.5, 0.5),
        fill: float = 0.0,
        stream: str = "cutout",
    ) -> None:
        super().__init__()
        if not 0 <= side[0] <= side[1]:
            raise ValueError(f"side is a range of shares of the image's side, low end first, got {tuple(side)}")
        self.probability, self.side = check_probability(probability), (side[0], side[1])
        self.fill, self.stream = fill, stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images)
        chosen = randomness.bernoulli(f"{self.stream}/chosen", self.probability)
        x, y = randomness.uniform(f"{self.stream}/centre", 2).unbind(1)
        side = randomness.uniform(f"{self.stream}/side", low=self.side[0], high=self.side[1])
        return on_chosen(images, chosen, lambda i, x, y, s: cut_out(i, x, y, s, self.fill), x, y, side)


class CentreFit(nn.Module):
    """The middle of the image at a fixed size: its short side resized to `size` pixels, the long one cut to it.

    Nothing is random. Antialiased; an image of that size stays as it is.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        check_images(images)
        h, w = images.shape[2:]
        if min(h, w) != self.size:
            h, w = (self.size * side // min(h, w) for side in (h, w))
            images = F.interpolate(images, (h, w), mode="bilinear", antialias=True).clamp_(0, 1)
        top, left = round((h - self.size) / 2), round((w - self.size) / 2)
        return images[:, :, top : top + self.size, left : left + self.size]


class RandomAffine(nn.Module):
    """Turned, scaled, sheared and shifted at random, in one resampling.

    Args:
        probability: of changing an image.
        degrees: largest turn either way.
        translate: largest shift either way, as a share of each side.
        scale: range of the picture's scale, drawn log-uniformly.
        shear: largest shearing along x and along y, in degrees either way.
        fill: what lies outside the picture; None reflects it.

    Example: with every range 0, and scale (1, 1), it is the identity.
    """

    def __init__(
        self,
        probability: float = 1.0,
        degrees: float = 0.0,
        translate: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        shear: float = 0.0,
        fill: float | None = 0.0,
        stream: str = "affine",
    ) -> None:
        super().__init__()
        if min(degrees, translate, shear) < 0 or not 0 < scale[0] <= scale[1]:
            raise ValueError(
                "degrees, translate and shear are at least 0, scale above 0 and low end first, got "
                f"degrees={degrees}, translate={translate}, shear={shear}, scale={tuple(scale)}"
            )
        self.probability, self.degrees, self.translate = check_probability(probability), degrees, translate
        self.scale, self.shear, self.fill, self.stream = (scale[0], scale[1]), shear, fill, stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images)
        chosen = randomness.bernoulli(f"{self.stream}/chosen", self.probability)
        angle, right, down, slope_x, slope_y = randomness.uniform(f"{self.stream}/level", 5, low=-1, high=1).unbind(1)
        low, high = math.log(self.scale[0]), math.log(self.scale[1])
        h, w = images.shape[2:]
        matrix = affine_matrix(
            angle=self.degrees * angle,
            shear_x=torch.tan(torch.deg2rad(self.shear * slope_x)),
            shear_y=torch.tan(torch.deg2rad(self.shear * slope_y)),
            shift_x=self.translate * w * right,
            shift_y=self.translate * h * down,
            scale=torch.exp(randomness.uniform(f"{self.stream}/scale", low=low, high=high)),
        )
        return on_chosen(images, chosen, lambda x, m: affine(x, m, self.fill), matrix)


class SpatialJitter(nn.Module):
    """CPC v1's jitter: a random sub-crop, put back at the centre of an image that is `fill` around it.

    Args:
        share: of the side that the crop keeps; 60 / 64 in CPC v1, which crops 60 of 64 pixels. Rounded to whole pixels.
        fill: the border's value. The v1 text doesn't give it; 0.5, the middle of the range, is ours.

    Example: share 1 is the identity.
    """

    def __init__(self, share: float = 60 / 64, fill: float = 0.5, stream: str = "jitter") -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"share is above 0 and at most 1, got {share}: 60 of 64 pixels is 0.9375")
        self.share, self.fill, self.stream = share, fill, stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        check_images(images)
        h, w = images.shape[2:]
        size = (max(1, round(h * self.share)), max(1, round(w * self.share)))
        if size == (h, w):
            return images
        u = randomness.uniform(f"{self.stream}/corner", 2)
        top, left = (u * (torch.tensor([h - size[0], w - size[1]]) + 1)).long().unbind(1)
        return shift_window(images, top, left, size, self.fill)
