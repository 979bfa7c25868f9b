"""Gaussian noise a pixel, from one number an image.

Noise for every pixel can't come from the CPU: for 18,432 patches of 80 px it is 1.4 GB a step. So the CPU draws a
64-bit key an image, and the images' device hashes (key, pixel) with the same counter-based generator. The bits are
the same on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from contrastive_core.augment.rows import check_images, check_probability, on_chosen, per_image
from contrastive_core.randomness import _GOLDEN, Randomness, _shift_right, mix64
from contrastive_core.transfer import to_device


def noise_like(images: Tensor, key: Tensor) -> Tensor:
    """Standard normal numbers in the shape of images n c h w; key n int64 decides them all. At most 5.3 in size."""
    if key.shape != (len(images),):
        raise ValueError(f"expected a key an image, {len(images)} in all, got {tuple(key.shape)}")
    counters = torch.arange(1, images[0].numel() + 1, device=images.device) * _GOLDEN
    bits = mix64(to_device(key, images.device)[:, None] + counters)
    # 23 bits, so that 2 bits + 1 - 2**23 is odd and exact in float32: never 0 nor +-1, where erfinv is infinite
    centred = (_shift_right(bits, 41) * 2 + (1 - 2**23)).to(torch.float32) * 2.0**-23
    return (torch.erfinv(centred) * math.sqrt(2)).view_as(images).to(images.dtype)


def add_noise(images: Tensor, key: Tensor, std: Tensor) -> Tensor:
    """Images plus noise of standard deviation std (n), clipped to [0, 1]; std 0 is the identity."""
    return noise_like(images, key).mul_(per_image(std, images)).add_(images).clamp_(0, 1)


class GaussianNoise(nn.Module):
    """Noise of a standard deviation drawn uniformly in 0 .. std for each image, clipped to [0, 1].

    `forward(images n c h w in [0, 1], randomness) -> n c h w`.
    """

    def __init__(self, std: float = 0.1, probability: float = 1.0, stream: str = "noise") -> None:
        super().__init__()
        if std < 0:
            raise ValueError(f"std is at least 0, got {std}")
        self.std, self.probability, self.stream = std, check_probability(probability), stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0 or self.std == 0:
            return images
        check_images(images)
        chosen = randomness.bernoulli(f"{self.stream}/chosen", self.probability)
        key = randomness.integers(f"{self.stream}/key", 2**62)
        return on_chosen(images, chosen, add_noise, key, randomness.uniform(f"{self.stream}/std", high=self.std))
