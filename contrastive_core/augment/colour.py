"""Colour: pixel by pixel, or by an image's own statistics. Images n c h w in [0, 1] in and out.

Two conventions live side by side in the literature, and both are here under their own names. PIL's (AutoAugment,
SimCLR in PyTorch) blends with another image: black, the mean grey, the grey image. TensorFlow's (Inception) adds
to the brightness, scales the contrast about each channel's mean, and scales the saturation of HSV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_core.augment.rows import by_group, check_images, check_probability, on_chosen, per_image
from contrastive_core.randomness import Randomness

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL and torchvision (which rounds the last two)


def luminance(images: Tensor) -> Tensor:
    """Brightness as the eye weighs it, n 1 h w: 0.299 R + 0.587 G + 0.114 B; a single channel is returned as it is."""
    check_images(images, channels=(1, 3))
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return torch.add(red * _LUMA[0], green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).unsqueeze(1)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """other + factor (images - other), clipped to [0, 1]: PIL's enhancement; factor (n) 1 gives the images, 0 other."""
    weight = per_image(factor, images)
    return (images * weight + other * (1 - weight)).clamp_(0, 1)


def grey(images: Tensor) -> Tensor:
    """Every channel replaced by the luminance, n c h w."""
    return luminance(images).repeat(1, images.shape[1], 1, 1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's brightness: a blend with black, factor (n) >= 0; 1 is the identity."""
    return (images * per_image(factor, images)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's contrast: a blend with the image's mean luminance, factor (n) >= 0; 1 is the identity."""
    return blend(images, luminance(images).mean((2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's colour: a blend with the grey image, factor (n) >= 0; 1 is the identity, 0 is grey."""
    return blend(images, luminance(images), factor)


def brighten(images: Tensor, delta: Tensor) -> Tensor:
    """TensorFlow's brightness: delta (n), in [-1, 1], added to every pixel; 0 is the identity."""
    return (images + per_image(delta, images)).clamp_(0, 1)


def channel_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """TensorFlow's contrast: factor (n) >= 0 scales each channel about its own mean; 1 is the identity."""
    return blend(images, images.mean((2, 3), keepdim=True), factor)


def hsv_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """TensorFlow's saturation: S of HSV times factor (n) >= 0, at most 1; hue and value stay. 1 is the identity.

    With V = max and S = (max - min) / max a channel becomes max - (max - channel) min(factor, 1 / S), so no hue is
    computed: kornia's adjust_saturation gives the same numbers at three times the cost.
    """
    check_images(images, channels=(3,))
    value = images.amax(1, keepdim=True)
    spread = value - images.amin(1, keepdim=True)
    ratio = torch.minimum(per_image(factor, images), value / spread.clamp_(min=1e-6))
    return (value - (value - images) * ratio).clamp_(0, 1)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Hue of HSV turned by turns (n), in shares of the circle (TensorFlow's unit); 0 and 1 are the identity.

    A channel is min + (max - min) times a trapezoid of the hue, which takes neither HSV's saturation nor its six
    cases: kornia's adjust_hue gives the same numbers at several times the cost.

    Example: a third of a turn takes pure red to pure green.
    """
    check_images(images, channels=(3,))
    red, green, blue = images.unbind(1)
    highest, lowest = images.amax(1), images.amin(1)
    spread = highest - lowest
    # selection by lerp with weights 0 and 1, which is exact, and on a CPU twenty times as fast as where
    red_leads, green_leads = (red >= highest).to(images.dtype), (green >= highest).to(images.dtype)
    hue = torch.lerp(torch.lerp(red - green, blue - red, green_leads), green - blue, red_leads)
    hue /= spread.clamp(min=1e-6)
    hue += (4 - 2 * green_leads) * (1 - red_leads)
    hue += per_image(6 * turns, hue)
    hue -= 6 * torch.floor(hue / 6)  # 0 .. 6: red, yellow, green, cyan, blue, magenta
    weights = torch.stack([(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], dim=1).clamp_(0, 1)
    return weights.mul_(spread.unsqueeze(1)).add_(lowest.unsqueeze(1))


def invert(images: Tensor) -> Tensor:
    """1 - images."""
    return 1 - images


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Pixels at or above threshold (n), in 0 .. 1, inverted; above 1 is the identity."""
    flipped = images >= per_image(threshold, images)
    return (images - flipped.to(images.dtype)).abs_()


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The first `bits` (n, 1 .. 8) of the eight bits a pixel has; 8 rounds to whole levels and changes no 8-bit image.

    Differs from kornia's posterize, which truncates (0.7 * 255 in float32 may be 178.49999) instead of rounding.
    """
    step = per_image(torch.exp2(8 - bits.float()), images)
    return images.mul(255).round_().div_(step).floor_().mul_(step).div_(255)


def auto_contrast(images: Tensor) -> Tensor:
    """Each channel stretched to fill [0, 1]; a channel that spans less than one level of 255 stays as it is."""
    lowest, highest = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = highest - lowest < 1 / 255
    lowest, spread = lowest.masked_fill(flat, 0.0), (highest - lowest).masked_fill(flat, 1.0)
    return (images - lowest).div_(spread).clamp_(0, 1)


def equalize(images: Tensor) -> Tensor:
    """Each channel's histogram made flat: a level becomes the share of pixels below it, of those below the highest.

    PIL's rule over 256 levels without its integer step, (pixels - those at the highest level) // 255: that step is
    0, and so PIL changes nothing, in any image of fewer than 256 pixels, which is every patch up to 15 px. kornia's
    keeps the step and loops over channels. A channel of one level stays as it is.
    """
    levels = (images * 255).round_().to(torch.int64).flatten(2)
    histogram = torch.zeros(*levels.shape[:2], 256, dtype=torch.int32, device=images.device)
    histogram.scatter_add_(2, levels, torch.ones((), dtype=torch.int32, device=images.device).expand_as(levels))
    below = histogram.cumsum(2, dtype=torch.int32) - histogram
    share = below.gather(2, levels).view_as(images).to(images.dtype)
    highest = share.amax((2, 3), keepdim=True)
    return torch.where(highest > 0, share / highest.clamp(min=1), images)


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's sharpness: a blend with the smoothed image, factor (n); 1 is the identity, 0 smooth, 2 sharp.

    The smoothing is PIL's (1 1 1, 1 5 1, 1 1 1) / 13; the outermost pixels stay. Sums of shifted images, because a
    depthwise convolution (kornia's sharpness) takes five times as long. Images under 3 px stay as they are.
    """
    check_images(images)
    if min(images.shape[2:]) < 3:
        return images
    box = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    box = box[..., :-2] + box[..., 1:-1] + box[..., 2:]
    inner = images[:, :, 1:-1, 1:-1]
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = blend(inner, box.add_(inner, alpha=4).div_(13), factor)
    return result


def sobel(images: Tensor) -> Tensor:
    """The length of the luminance's gradient, in every channel, n c h w: Sobel's, in units per pixel, at most 0.71.

    Along x (1, 2, 1) / 4 across rows of half the difference of the neighbours, likewise along y; the border is
    repeated. A ramp that rises by 0.1 a pixel gives 0.1.
    """
    padded = F.pad(luminance(images), (1, 1, 1, 1), mode="replicate")
    smooth_y = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    smooth_x = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    gradient = torch.hypot(smooth_y[..., 2:] - smooth_y[..., :-2], smooth_x[:, :, 2:] - smooth_x[:, :, :-2]) / 8
    return gradient.repeat(1, images.shape[1], 1, 1)


def remap_histogram(images: Tensor, slopes: Tensor) -> Tensor:
    """Each channel through a rising curve of k straight pieces from (0, 0) to (1, 1): a monotone change of histogram.

    Args:
        images: n c h w.
        slopes: n c k, positive, the pieces' relative slopes; only their ratios count.

    Example: equal slopes are the identity; slopes (3, 1) take 0.5 to 0.75.
    """
    if slopes.ndim != 3 or slopes.shape[:2] != images.shape[:2]:
        raise ValueError(f"expected slopes n c k for images {tuple(images.shape)}, got {tuple(slopes.shape)}")
    pieces = slopes.shape[2]
    slopes = per_image(slopes / slopes.mean(2, keepdim=True), images).unsqueeze(-1)
    result = torch.zeros_like(images)
    for piece in range(pieces):
        result.addcmul_((images - piece / pieces).clamp_(0, 1 / pieces), slopes[:, :, piece])
    return result.clamp_(0, 1)


class RandomGrey(nn.Module):
    """Grey with a probability: `forward(images n c h w in [0, 1], randomness) -> n c h w`."""

    def __init__(self, probability: float = 0.25, stream: str = "grey") -> None:
        super().__init__()
        self.probability, self.stream = check_probability(probability), stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images, channels=(1, 3))
        return on_chosen(images, randomness.bernoulli(f"{self.stream}/chosen", self.probability), grey)


class RandomSolarize(nn.Module):
    """Pixels at or above a threshold inverted, with a probability (BYOL's second view: 0.2).

    `forward(images n c h w in [0, 1], randomness) -> n c h w`. threshold: 0 .. 1; 0.5 in BYOL, 128 / 255 in PIL's
    default, which no 8-bit image can tell from it.
    """

    def __init__(self, probability: float = 0.2, threshold: float = 0.5, stream: str = "solarize") -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is between 0 and 1, got {threshold}: divide one of 8 bits by 255")
        self.probability, self.threshold, self.stream = check_probability(probability), threshold, stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images)
        chosen = randomness.bernoulli(f"{self.stream}/chosen", self.probability)
        return on_chosen(images, chosen, solarize, torch.full((len(chosen),), self.threshold))


class RandomPhotometric(nn.Module):
    """Posterized, sharpened, solarized and stretched, in this order, with a probability (PIRL's, as in VISSL's code).

    4 to 8 bits, a sharpness factor of 0.1 .. 1.9, a threshold of 0 .. 256 levels of 255, then auto contrast: each
    drawn uniformly, all four or none. `forward(images n c h w in [0, 1], randomness) -> n c h w`.
    """

    def __init__(self, probability: float = 0.66, stream: str = "photometric") -> None:
        super().__init__()
        self.probability, self.stream = check_probability(probability), stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images, channels=(1, 3))
        chosen = randomness.bernoulli(f"{self.stream}/chosen", self.probability)
        bits = 4 + randomness.integers(f"{self.stream}/bits", 5)
        factor = randomness.uniform(f"{self.stream}/sharpness", low=0.1, high=1.9)
        threshold = randomness.integers(f"{self.stream}/threshold", 257) / 255
        return on_chosen(images, chosen, _photometric, bits, factor, threshold)


def _photometric(images: Tensor, bits: Tensor, factor: Tensor, threshold: Tensor) -> Tensor:
    return auto_contrast(solarize(sharpen(posterize(images, bits), factor), threshold))


class RandomSobel(nn.Module):
    """The edges of the luminance in every channel, with a probability: one of SimCLR's seven (figure 4)."""

    def __init__(self, probability: float = 0.5, stream: str = "sobel") -> None:
        super().__init__()
        self.probability, self.stream = check_probability(probability), stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images, channels=(1, 3))
        return on_chosen(images, randomness.bernoulli(f"{self.stream}/chosen", self.probability), sobel)


class HistogramRemap(nn.Module):
    """The colour-histogram augmentation: each channel through a random rising curve of its own.

    CPC v2 applies "colour-histogram augmentations" after De Fauw et al. (2018) with probability 0.2 and gives no
    parameters. Ours: `pieces` equal pieces of the range, each with a slope exp(u log strength), u uniform in
    (-1, 1), then scaled so that 0 and 1 stay. So levels are crowded here and spread there, never swapped.

    Args:
        probability: of changing an image.
        strength: largest ratio of a slope to 1 before scaling, >= 1; 1 is the identity.
        pieces: of the curve, >= 2.
    """

    def __init__(
        self, probability: float = 0.2, strength: float = 2.5, pieces: int = 4, stream: str = "histogram"
    ) -> None:
        super().__init__()
        if strength < 1 or pieces < 2:
            raise ValueError(f"strength is at least 1 and pieces at least 2, got strength={strength}, pieces={pieces}")
        self.probability, self.strength, self.pieces = check_probability(probability), strength, pieces
        self.stream = stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images)
        chosen = randomness.bernoulli(f"{self.stream}/chosen", self.probability)
        u = randomness.uniform(f"{self.stream}/slopes", images.shape[1], self.pieces, low=-1, high=1)
        return on_chosen(images, chosen, remap_histogram, self.strength**u)


class InceptionColour(nn.Module):
    """The colour augmentation of Inception (Szegedy et al. 2014) as TF-slim has it, in a random order per image.

    brightness + delta, saturation of HSV times a factor, hue turned, contrast about the channel means times a
    factor, each drawn uniformly. Differs from TF-slim: all 24 orders instead of four, and clipped to [0, 1] after
    each of the four instead of once at the end, so that HSV sees colours only.

    Args:
        probability: of changing an image.
        brightness: largest addition or subtraction; 32 / 255 in TF-slim.
        contrast, saturation: half-width of the factor about 1; 0.5 gives 0.5 .. 1.5.
        hue: largest turn, as a share of the circle (TensorFlow's unit); 0.2 is 72 degrees.
    """

    def __init__(
        self,
        probability: float = 0.8,
        brightness: float = 32 / 255,
        contrast: float = 0.5,
        saturation: float = 0.5,
        hue: float = 0.2,
        stream: str = "inception",
    ) -> None:
        super().__init__()
        self.probability, self.stream = check_probability(probability), stream
        _check_strengths(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        self._steps = [
            (brighten, 0.0, brightness),
            (channel_contrast, 1.0, contrast),
            (hsv_saturation, 1.0, saturation),
            (shift_hue, 0.0, hue),
        ]

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        return _jitter(images, randomness, self.probability, self._steps, self.stream)


class ColourJitter(nn.Module):
    """Brightness, contrast, saturation and hue in PIL's convention, in a random order per image (SimCLR's jitter).

    Args:
        probability: of changing an image; 0.8 in SimCLR.
        brightness, contrast, saturation: half-width of the factor about 1, whose lower end is at least 0.
        hue: largest turn, as a share of the circle.
        A strength of 0 leaves the operation out; the first two also take grey images (c = 1).
    """

    def __init__(
        self,
        probability: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
        stream: str = "colour",
    ) -> None:
        super().__init__()
        self.probability, self.stream = check_probability(probability), stream
        _check_strengths(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        self._steps = [
            (_BRIGHTNESS, 1.0, brightness),
            (_CONTRAST, 1.0, contrast),
            (_SATURATION, 1.0, saturation),
            (shift_hue, 0.0, hue),
        ]

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        return _jitter(images, randomness, self.probability, self._steps, self.stream)


def _check_strengths(**strengths: float) -> None:
    for name, strength in strengths.items():
        if strength < 0:
            raise ValueError(f"{name}={strength}: pass at least 0, which leaves it out")


_Operation = Callable[[Tensor, Tensor], Tensor]
_BRIGHTNESS, _CONTRAST, _SATURATION = brightness, contrast, saturation  # the constructor's arguments hide the names


def _at(operation: _Operation, level: Tensor) -> _Operation:
    """The operation as by_group wants it: (images m c h w, rows m) -> m c h w."""
    return lambda images, rows: operation(images, level[rows])


def _jitter(
    images: Tensor,
    randomness: Randomness,
    probability: float,
    steps: Sequence[tuple[_Operation, float, float]],
    stream: str,
) -> Tensor:
    """Each (operation, centre, half-width) once, at a level uniform in its range, in an order drawn per image."""
    if probability == 0:
        return images
    check_images(images)
    chosen = randomness.bernoulli(f"{stream}/chosen", probability)
    centre, half_width = torch.tensor([(centre, half_width) for _, centre, half_width in steps]).unbind(1)
    low, high = centre - half_width, centre + half_width
    low = torch.where(centre == 1, low.clamp(min=0), low)  # a factor is never negative
    levels = torch.lerp(low, high, randomness.uniform(f"{stream}/level", len(steps)))
    order = randomness.uniform(f"{stream}/order", len(steps)).argsort(dim=1)
    active = [step for step, (_, _, half_width) in enumerate(steps) if half_width]

    def in_turn(images: Tensor, order: Tensor, levels: Tensor) -> Tensor:
        operations = [_at(operation, levels[:, step]) for step, (operation, _, _) in enumerate(steps)]
        for slot in range(order.shape[1]):
            images = by_group(images, order[:, slot], operations)
        return images

    if len(active) < len(steps):  # an operation of strength 0 leaves the others' order and levels as they were
        order = order[torch.isin(order, torch.tensor(active, dtype=order.dtype))].view(len(order), len(active))
    return on_chosen(images, chosen, in_turn, order, levels)
