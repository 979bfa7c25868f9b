"""Augmentations of other libraries in a pipeline of `Views`: kornia's, or torchvision's of batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contrastive_core.augment.rows import check_images
from contrastive_core.randomness import Randomness

_SEEDS = 1 << 32  # torch's CPU generator looks at the lower 32 bits of a seed


class Seeded(nn.Module):
    """A module whose numbers come from torch's generator, as kornia's do, as one of our augmentations.

    `forward(images n c h w in [0, 1], randomness) -> n c h' w'` in [0, 1]. For the time of the call the generator is
    seeded by the numbers of the first image, and then put back. So a run repeats and resumes exactly. What our own
    augmentations have and this cannot: an image's numbers depend on how many are in the batch and on which is the
    first, so that more processes, or a batch in parts, are another run.

    Args:
        module: `n c h w` -> `n c h' w'`; it draws from torch's CPU generator only, which is kornia's default.
        stream: names its numbers; two in a pipeline need two names.

    Example: with kornia imported as K, `Seeded(K.RandomHorizontalFlip(p=1.0))` flips every image.
    """

    def __init__(self, module: nn.Module, stream: str = "seeded") -> None:
        super().__init__()
        self.module, self.stream = module, stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        check_images(images)
        if not len(images):
            return images
        seed = int(randomness.integers(self.stream, _SEEDS)[0])
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed CUDA's generators as well, which belong to the model
            torch.default_generator.manual_seed(seed)
            augmented: Tensor = self.module(images)
        return augmented.clamp(0, 1)
