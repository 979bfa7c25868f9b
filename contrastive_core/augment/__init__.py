"""Augmentations as functions of numbers: images n c h w in [0, 1] and a number an image in, images out.

Each operation comes twice. A pure function takes its numbers as arguments, one an image, and is the reference:
`brightness(images, factor)`. A thin module draws the numbers from a `Randomness` and hands the function only
the images that are drawn: `ColourJitter(...)(images, randomness)`. `Parts` gives several parts of an image
(patches, crops) numbers of their own, so the same modules serve whole images and patch grids.

Numbers are drawn and grouped on the CPU; pixels stay on their device, and nothing here waits for it.
"""

from contrastive_core.augment.blur import GaussianBlur
from contrastive_core.augment.channel_drop import ChannelDrop, drop_channels
from contrastive_core.augment.colour import (
    ColourJitter,
    HistogramRemap,
    InceptionColour,
    RandomGrey,
    RandomPhotometric,
    RandomSobel,
    RandomSolarize,
)
from contrastive_core.augment.elastic import ElasticDeformation, elastic
from contrastive_core.augment.image import (
    CentreFit,
    RandomAffine,
    RandomCrop,
    RandomCutout,
    RandomFlip,
    RandomQuarterTurn,
    RandomResizedCrop,
    SpatialJitter,
)
from contrastive_core.augment.noise import GaussianNoise
from contrastive_core.augment.parts import Parts
from contrastive_core.augment.primitives import AUTOAUGMENT, SIXTEEN, AutoAugmentPrimitives
from contrastive_core.augment.seeded import Seeded
from contrastive_core.augment.views import JigsawViews, Views

__all__ = [
    "AUTOAUGMENT",
    "SIXTEEN",
    "AutoAugmentPrimitives",
    "CentreFit",
    "ChannelDrop",
    "ColourJitter",
    "ElasticDeformation",
    "GaussianBlur",
    "GaussianNoise",
    "HistogramRemap",
    "InceptionColour",
    "JigsawViews",
    "Parts",
    "RandomAffine",
    "RandomCrop",
    "RandomCutout",
    "RandomFlip",
    "RandomGrey",
    "RandomPhotometric",
    "RandomQuarterTurn",
    "RandomResizedCrop",
    "RandomSobel",
    "RandomSolarize",
    "Seeded",
    "SpatialJitter",
    "Views",
    "drop_channels",
    "elastic",
]
