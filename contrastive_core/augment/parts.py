"""Numbers for several parts of an image: the patches of a grid, or the crops of a multi-crop view.

The numbers of part i are a function of its image's address and of i, in streams of their own, so a module that
runs on whole images and on their parts never sees one number twice.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from contrastive_core.randomness import Randomness


class Parts(Randomness):
    """The randomness of b images, for `count` parts of each: every draw returns `(b count) *shape`, image by image.

    Args:
        whole: the images' randomness.
        count: parts an image, at least 1.
        name: what the parts are; another name gives other numbers.

    Raises:
        ValueError: if count is below 1.

    Example: `Parts(randomness, 36).uniform("flip")` has 36 numbers an image; its first 36 are those of the first
    image, whatever other images the batch holds.
    """

    def __init__(self, whole: Randomness, count: int, name: str = "parts") -> None:
        if count < 1:
            raise ValueError(f"an image has at least one part, got count={count}")
        self._whole, self.count, self._name = whole, count, name

    def _bits(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        bits = self._whole._bits(f"{self._name}/{stream}", (self.count, *shape))
        return rearrange(bits, "b count ... -> (b count) ...")


def parts_of(randomness: Randomness) -> int:
    """How many consecutive rows of a batch come from one image: 1 for whole images."""
    return randomness.count if isinstance(randomness, Parts) else 1
