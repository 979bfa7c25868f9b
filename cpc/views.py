"""CPC's view of a batch: one grid of patches, each augmented on its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from contrastive_core.augment.views import Augmentation, normalise, to_float
from contrastive_core.randomness import Randomness
from cpc.patches import extract_patches, grid_side

__all__ = ["Augmentation", "PatchViews", "normalise", "to_float"]


class PatchViews(nn.Module):
    """Image augmentation, cutting, patch augmentation, normalisation: uint8 `b 3 s s` -> (`b rows cols 3 ph pw`,).

    Args:
        image_size: pixels a side that are cut into patches, after `image_augment`.
        patch_size, stride: the grid, in pixels.
        mean, std: per channel, of images in 0..1.
        image_augment: of the whole image, in order; the last must leave `image_size` pixels a side (a random crop).
        patch_augment: of the grid, every patch with its own numbers; before normalisation, as channel drop asks.

    Raises ValueError if the grid does not fit `image_size`, naming the sizes that do.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        stride: int,
        mean: Sequence[float],
        std: Sequence[float],
        image_augment: Sequence[Augmentation] = (),
        patch_augment: Augmentation | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.stride = image_size, patch_size, stride
        self.grid = grid_side(image_size, patch_size, stride)
        self.mean, self.std = tuple(mean), tuple(std)
        self.image_augment, self.patch_augment = tuple(image_augment), patch_augment

    def forward(self, images: Tensor, randomness: Randomness) -> tuple[Tensor]:
        images = to_float(images)
        for augment in self.image_augment:
            images = augment(images, randomness)
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {images.shape[-2]}x{images.shape[-1]} px before cutting, image_size is "
                f"{self.image_size}: end image_augment with a crop to {self.image_size} px or set load_size to it"
            )
        patches = extract_patches(images, self.patch_size, self.stride)
        if self.patch_augment is not None:
            patches = self.patch_augment(patches, randomness)
        return (normalise(patches, self.mean, self.std),)
