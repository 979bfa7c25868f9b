"""The sixteen operations of AutoAugment (Cubuk et al. 2019), drawn at random for each image.

Every operation is `identity + magnitude * span * t`, with t uniform in (-1, 1) where it works both ways and in
[0, 1) where it doesn't: magnitude 1 gives AutoAugment's ranges, 0 the identity. Translations and Cutout are shares
of the side, from their pixels on AutoAugment's 331 px images. kornia's AutoAugment and RandAugment draw one policy
a batch; here each image draws its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from contrastive_core.augment import colour
from contrastive_core.augment.geometry import affine, affine_matrix, cut_out, mix
from contrastive_core.augment.parts import parts_of
from contrastive_core.augment.rows import by_group, check_images
from contrastive_core.randomness import Randomness
from contrastive_core.transfer import to_device

# name: (identity, span at magnitude 1, works both ways)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "ShearX": (0, 0.3, True),  # slope
    "ShearY": (0, 0.3, True),
    "TranslateX": (0, 150 / 331, True),  # share of the side
    "TranslateY": (0, 150 / 331, True),
    "Rotate": (0, 30, True),  # degrees
    "AutoContrast": (0, 0, False),
    "Invert": (0, 0, False),
    "Equalize": (0, 0, False),
    "Solarize": (256 / 255, -256 / 255, False),  # threshold: 256 .. 0 of 255
    "Posterize": (8, -4, False),  # bits, rounded
    "Contrast": (1, 0.9, True),  # factor
    "Color": (1, 0.9, True),
    "Brightness": (1, 0.9, True),
    "Sharpness": (1, 0.9, True),
    "Cutout": (0, 60 / 331, False),  # share of the side
    "SamplePairing": (0, 0.4, False),  # weight of the other image
}
SIXTEEN = tuple(_RANGES)
_GEOMETRIC = SIXTEEN[:5]

AUTOAUGMENT = tuple(name for name in SIXTEEN if name != "SamplePairing")
"""The default: fifteen. SamplePairing is off, because it makes an image's result depend on the rest of the batch."""


class AutoAugmentPrimitives(nn.Module):
    """`draws` operations in turn, each drawn uniformly over `operations`, on its own for every image and every draw.

    `forward(images n c h w in [0, 1], randomness) -> n c h w`. CPC v2 applies two to each patch.

    Args:
        draws: operations an image, one after the other; 0 is the identity.
        operations: names of those enabled, among `SIXTEEN`; repeats don't count.
        magnitude: 0 .. 1, shrinks every range towards the identity; 1 is AutoAugment's. AutoContrast, Invert and
            Equalize have no range: leave them out to be gentler.
        fill: what moves in from outside and what Cutout leaves; 0.5 is AutoAugment's grey.

    SamplePairing mixes in a part of another image of the same call, never of the same image, so its result depends
    on the batch and, over processes, on how it is shared out: it is off by default.

    Raises:
        ValueError: for unknown operations, negative draws, a magnitude outside 0 .. 1, or SamplePairing on one image.

    Example: `AutoAugmentPrimitives(1, ["Invert"])(images, randomness)` is `1 - images`.
    """

    def __init__(
        self,
        draws: int = 2,
        operations: Sequence[str] = AUTOAUGMENT,
        magnitude: float = 1.0,
        fill: float = 0.5,
        stream: str = "primitives",
    ) -> None:
        super().__init__()
        unknown = sorted(set(operations) - set(SIXTEEN))
        if unknown:
            raise ValueError(f"unknown operations {', '.join(unknown)}: choose among {', '.join(SIXTEEN)}")
        if draws < 0 or not 0 <= magnitude <= 1:
            raise ValueError(f"draws is at least 0, magnitude within 0 .. 1, got draws={draws}, magnitude={magnitude}")
        self.draws, self.magnitude, self.fill, self.stream = draws, magnitude, fill, stream
        self.operations = tuple(name for name in SIXTEEN if name in operations)  # in the table's order

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.draws == 0 or not self.operations:
            return images
        check_images(images, channels=(1, 3))
        which = randomness.integers(f"{self.stream}/operation", len(self.operations), self.draws)
        numbers = randomness.uniform(f"{self.stream}/numbers", self.draws, 3)
        for draw in range(self.draws):
            images = self._once(images, which[:, draw], numbers[:, draw], parts_of(randomness))
        return images

    def _once(self, images: Tensor, which: Tensor, numbers: Tensor, parts: int) -> Tensor:
        """One operation an image: which n, an index into self.operations; numbers n 3 in [0, 1): level, then place."""
        level = self._levels(which, numbers[:, 0])
        names = self.operations
        geometric = sum(name in _GEOMETRIC for name in names)

        def move(x: Tensor, rows: Tensor) -> Tensor:
            return self._move(x, which[rows], level[rows])

        operations: list[Callable[[Tensor, Tensor], Tensor]] = [move] if geometric else []
        for name in names[geometric:]:
            operations.append(self._pixelwise(name, images, level, numbers[:, 1:], parts))
        # the geometric operations stand first and share a group: one resampling serves them all
        group = (which - max(geometric - 1, 0)).clamp(min=0)
        return by_group(images, group, operations)

    def _levels(self, which: Tensor, t: Tensor) -> Tensor:
        """The level of each image's operation, in the operation's unit: which n, t n in [0, 1) -> n."""
        identity, span, both_ways = torch.tensor([_RANGES[name] for name in self.operations])[which].unbind(1)
        return identity + self.magnitude * span * torch.where(both_ways > 0, 2 * t - 1, t)

    def _move(self, images: Tensor, which: Tensor, level: Tensor) -> Tensor:
        """Shears, translations and turns, whichever each image drew, in one resampling."""
        h, w = images.shape[2:]
        drawn = {
            name: level * (which == self.operations.index(name)) if name in self.operations else torch.zeros_like(level)
            for name in _GEOMETRIC
        }
        matrix = affine_matrix(
            angle=drawn["Rotate"],
            shear_x=drawn["ShearX"],
            shear_y=drawn["ShearY"],
            shift_x=w * drawn["TranslateX"],
            shift_y=h * drawn["TranslateY"],
        )
        return affine(images, matrix, self.fill)

    def _pixelwise(
        self, name: str, images: Tensor, level: Tensor, place: Tensor, parts: int
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The operation called name, as by_group wants it: (images m c h w, rows m) -> m c h w."""
        if name == "Cutout":
            return lambda x, rows: cut_out(x, place[rows, 0], place[rows, 1], level[rows], self.fill)
        if name == "SamplePairing":
            partner = to_device(partners(len(images), parts, place[:, 0]), images.device)
            return lambda x, rows: mix(x, images.index_select(0, partner[to_device(rows, x.device)]), level[rows])
        if name in _UNLEVELLED:
            return lambda x, rows: _UNLEVELLED[name](x)
        return lambda x, rows: _LEVELLED[name](x, level[rows])


_UNLEVELLED = {"AutoContrast": colour.auto_contrast, "Invert": colour.invert, "Equalize": colour.equalize}
_LEVELLED = {
    "Solarize": colour.solarize,
    "Posterize": lambda images, bits: colour.posterize(images, bits.round()),
    "Contrast": colour.contrast,
    "Color": colour.saturation,
    "Brightness": colour.brightness,
    "Sharpness": colour.sharpen,
}


def partners(n: int, parts: int, u: Tensor) -> Tensor:
    """For each of n parts, `parts` of them an image, the index of a part of another image: uniform over all of those.

    Raises:
        ValueError: if all parts come from one image.

    Example: with two images of one part each, `partners(2, 1, u)` is (1, 0) whatever u in [0, 1).
    """
    if n <= parts:
        raise ValueError("SamplePairing needs a second image in the batch: raise the batch size or leave it out")
    steps = (u.double() * (n - parts)).long()  # past the image's own parts, around the batch
    start = torch.arange(n) // parts * parts
    return (start + parts + steps) % n
