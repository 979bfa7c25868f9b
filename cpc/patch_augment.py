"""The per-patch augmentations of CPC v2 (Henaff et al. 2020, appendix A), each patch with numbers of its own.

Neighbouring patches overlap and share an image's light, colour and texture; a network that may use those predicts
patches without understanding any. So every patch is changed on its own, all patches of a batch in one graph.
"""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

from contrastive_core.augment import (
    AUTOAUGMENT,
    AutoAugmentPrimitives,
    ChannelDrop,
    ColourJitter,
    ElasticDeformation,
    GaussianNoise,
    HistogramRemap,
    InceptionColour,
    Parts,
    RandomAffine,
    RandomGrey,
    SpatialJitter,
)
from contrastive_core.augment.channel_drop import Fill
from contrastive_core.randomness import Randomness


class PatchAugment(nn.Module):
    """Steps in turn over every patch: `forward(patches b rows cols c ph pw in [0, 1], randomness) -> the same shape`.

    Args:
        steps: modules `forward(images n c h w, randomness) -> n c h w`, such as those of `contrastive_core.augment`;
            here n is b rows cols and the randomness has numbers for each patch. None: the patches as they are.

    Raises:
        ValueError: for patches of another shape, or two steps that draw from one stream.

    Example: `PatchAugment([RandomGrey(1.0)])` makes every patch grey.
    """

    def __init__(self, steps: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        streams = [getattr(step, "stream", f"step {index}") for index, step in enumerate(steps)]
        twice = sorted({stream for stream in streams if streams.count(stream) > 1})
        if twice:
            raise ValueError(f"two steps draw from the stream {twice[0]!r}: give one of them another `stream`")
        self.steps = nn.ModuleList(steps)

    def forward(self, patches: Tensor, randomness: Randomness) -> Tensor:
        if patches.ndim != 6:
            raise ValueError(f"expected patches b rows cols c ph pw, got shape {tuple(patches.shape)}")
        b, rows, cols = patches.shape[:3]
        flat = rearrange(patches, "b rows cols c ph pw -> (b rows cols) c ph pw")
        each = Parts(randomness, rows * cols, name="patches")
        for step in self.steps:
            flat = step(flat, each)
        return rearrange(flat, "(b rows cols) c ph pw -> b rows cols c ph pw", b=b, rows=rows, cols=cols)


def patch_augment_v2(
    primitives: int = 2,
    operations: Sequence[str] = AUTOAUGMENT,
    magnitude: float = 1.0,
    elastic: float = 0.2,
    elastic_amplitude: float = 0.05,
    elastic_shear: float = 0.2,
    histogram: float = 0.2,
    colour: float = 0.8,
    colour_strength: float = 1.0,
    grey: float = 0.25,
    channel_drop: float = 1.0,
    channel_drop_fill: Fill = "zero",
    jitter: float = 1.0,
    noise: float = 0.0,
    fill: float = 0.5,
) -> PatchAugment:
    """CPC v2's list in the paper's order, its numbers as defaults. A probability, count or std of 0 leaves a step out.

    Args:
        primitives: AutoAugment operations a patch, one after the other.
        operations: which are enabled; by default the sixteen without SamplePairing.
        magnitude: 0 .. 1, shrinks the operations' ranges; 1 is AutoAugment's.
        elastic: probability of elastic deformation and shearing (De Fauw et al. 2018), drawn together.
        elastic_amplitude: largest displacement along each axis as a share of the patch's side (not published; ours:
            4 px at 80 px).
        elastic_shear: largest slope of shearing (not published; ours).
        histogram: probability of the colour-histogram augmentation (see `HistogramRemap`).
        colour: probability of Inception's colour augmentation.
        colour_strength: scales its four ranges; 1 is TF-slim's.
        grey: probability of a grey patch.
        channel_drop: probability of losing two of the three channels (not published; ours: always).
        channel_drop_fill: "zero", "noise" or "repeat".
        jitter: v1's sub-crop as a share of the side; 60 / 64 in v1, 1 leaves it out (v2 doesn't mention it).
        noise: largest standard deviation of added noise (not in the paper).
        fill: what moves in from outside a patch; 0.5 is grey.

    Example: `patch_augment_v2(primitives=0, elastic=0, histogram=0, colour=0, grey=0, channel_drop=0)` has no steps.
    """
    steps: list[tuple[bool, nn.Module]] = [
        (jitter < 1, SpatialJitter(jitter, fill)),
        (primitives > 0 and len(operations) > 0, AutoAugmentPrimitives(primitives, operations, magnitude, fill)),
        (elastic > 0, ElasticDeformation(elastic, elastic_amplitude, shear=elastic_shear, of_side=True)),
        (histogram > 0, HistogramRemap(histogram)),
        (colour > 0, _inception(colour, colour_strength)),
        (grey > 0, RandomGrey(grey)),
        (channel_drop > 0, ChannelDrop(channel_drop, fill=channel_drop_fill)),
        (noise > 0, GaussianNoise(noise)),
    ]
    return PatchAugment([step for enabled, step in steps if enabled])


def _inception(probability: float, strength: float) -> InceptionColour:
    return InceptionColour(probability, 32 / 255 * strength, 0.5 * strength, 0.5 * strength, 0.2 * strength)


def patch_augment_v1(
    jitter: float = 60 / 64,
    grey: float = 1.0,
    channel_drop: float = 0.0,
    channel_drop_fill: Fill = "zero",
    fill: float = 0.5,
) -> PatchAugment:
    """CPC v1's: a 60 of 64 px sub-crop put back at the centre, on grey images (van den Oord et al. 2018).

    Args:
        jitter: the sub-crop as a share of the side; 1 leaves it out.
        grey: probability of a grey patch; v1 makes every image grey, 0 keeps the colours (v2's rung 0).
        channel_drop: probability of losing two of the three channels: v2's first rung of augmentation, not in v1.
        channel_drop_fill: "zero", "noise" or "repeat".
        fill: the border's value (not published).

    Example: `patch_augment_v1(jitter=1, grey=0)` has no steps.
    """
    steps: list[tuple[bool, nn.Module]] = [
        (jitter < 1, SpatialJitter(jitter, fill)),
        (grey > 0, RandomGrey(grey)),
        (channel_drop > 0, ChannelDrop(channel_drop, fill=channel_drop_fill)),
    ]
    return PatchAugment([step for enabled, step in steps if enabled])


def patch_augment_digits(
    affine: float = 1.0,
    degrees: float = 10.0,
    translate: float = 0.08,
    scale: tuple[float, float] = (0.9, 1.1),
    shear: float = 5.0,
    elastic: float = 0.5,
    elastic_amplitude: float = 0.08,
    brightness: float = 0.4,
    contrast: float = 0.4,
    noise: float = 0.15,
    primitives: int = 0,
    operations: Sequence[str] = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Sharpness", "Cutout"),
    magnitude: float = 0.5,
) -> PatchAugment:
    """For digits and other line drawings on black: small moves, light and noise; no colour, flips or inversion.

    Not in a paper. Each patch is turned, shifted, scaled and sheared a little (probability `affine`; ranges as in
    `RandomAffine`), deformed (probability `elastic`, amplitude a share of the side), then its brightness and contrast
    are scaled by factors within 1 -+ these, and noise of standard deviation up to `noise` is added. Any number of
    channels that is 1 or 3. A probability, count or strength of 0 leaves a step out.
    """
    steps: list[tuple[bool, nn.Module]] = [
        (primitives > 0 and len(operations) > 0, AutoAugmentPrimitives(primitives, operations, magnitude, fill=0.0)),
        (affine > 0, RandomAffine(affine, degrees, translate, scale, shear)),
        (elastic > 0, ElasticDeformation(elastic, elastic_amplitude, of_side=True, fill=0.0)),
        (max(brightness, contrast) > 0, ColourJitter(1.0, brightness, contrast, 0.0, 0.0)),
        (noise > 0, GaussianNoise(noise)),
    ]
    return PatchAugment([step for enabled, step in steps if enabled])
