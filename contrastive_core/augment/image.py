"""What is done to a whole image before anything else: crops, flips, affine jitter. Modules over `geometry`'s functions.

Each is `forward(images n c h w in [0, 1], randomness) -> n c h w`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_core.augment.geometry import affine, affine_matrix, crop, flip, resized_crop, shift_window
from contrastive_core.augment.rows import check_images, check_probability, on_chosen
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

    Args:
        size: rows and columns of the result, in pixels.
        scale: range of the part's share of the image's area, within 0 .. 1.
        ratio: range of width / height, drawn log-uniformly.

    A part longer than the image along one side is cut to it (torchvision tries again up to ten times instead).
    Bilinear without antialiasing: load images at most about twice as large as `size`.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        stream: str = "crop",
    ) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"scale lies within 0 .. 1 and ratio above 0, low end first, got {scale} and {ratio}")
        self.size, self.scale, self.ratio, self.stream = _pair(size), scale, ratio, stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        check_images(images)
        h, w = images.shape[2:]
        area = randomness.uniform(f"{self.stream}/area", low=self.scale[0], high=self.scale[1])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(randomness.uniform(f"{self.stream}/ratio", low=low, high=high)) * h / w
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        u = randomness.uniform(f"{self.stream}/corner", 2)
        x, y = width / 2 + u[:, 0] * (1 - width), height / 2 + u[:, 1] * (1 - height)
        return resized_crop(images, torch.stack([x, y, width, height], dim=1), self.size)


class RandomFlip(nn.Module):
    """Left and right swapped with a probability."""

    def __init__(self, probability: float = 0.5, stream: str = "flip") -> None:
        super().__init__()
        self.probability, self.stream = check_probability(probability), stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images)
        return on_chosen(images, randomness.bernoulli(f"{self.stream}/chosen", self.probability), flip)


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
