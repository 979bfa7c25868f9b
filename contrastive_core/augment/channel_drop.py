"""Colour dropping (Doersch, Gupta and Efros 2015): all but one of an image's channels are lost.

It keeps a network from solving patch tasks by chromatic aberration. CPC v2 drops two of the three in each patch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from contrastive_core.augment.noise import noise_like
from contrastive_core.augment.rows import check_images, check_probability, on_chosen
from contrastive_core.randomness import Randomness
from contrastive_core.transfer import to_device

Fill = Literal["zero", "noise", "repeat"]
_FILLS = ("zero", "noise", "repeat")


def drop_channels(images: Tensor, rank: Tensor, drop: int, fill: Fill, key: Tensor) -> Tensor:
    """Images n c h w with the `drop` channels of highest rank replaced.

    Args:
        images: n c h w in [0, 1].
        rank: n c, a permutation of 0 .. c-1 for each image; the channels of rank < c - drop stay.
        drop: how many channels go, 0 .. c-1.
        fill: "zero"; "repeat", the channel of rank 0; "noise", Gaussian about 0.5 with a hundredth of the standard
            deviation of the channel of rank 0 (Doersch's, whose images have their mean subtracted).
        key: n int64, decides the noise.

    Example: red (1, 0, 0) keeping channel 0 of three: (1, 0, 0) with "zero", (1, 1, 1) with "repeat".
    """
    kept = to_device((rank < images.shape[1] - drop)[:, :, None, None], images.device)
    if fill == "zero":
        return images * kept
    first = to_device(rank.argmin(1)[:, None, None, None], images.device)
    channel = images.gather(1, first.expand(-1, 1, *images.shape[2:]))
    if fill == "repeat":
        return torch.lerp(channel.expand_as(images), images, kept.to(images.dtype))  # exact, and faster than where
    spread = channel.std((2, 3), keepdim=True, correction=0) / 100
    noise = noise_like(images, key).mul_(spread).add_(0.5).clamp_(0, 1)
    return torch.lerp(noise, images, kept.to(images.dtype))


class ChannelDrop(nn.Module):
    """Colour dropping: `forward(images n c h w in [0, 1], randomness) -> n c h w`. Apply it before normalisation.

    Args:
        probability: of dropping channels from an image. CPC v2 doesn't print it; 1, every patch, is ours.
        drop: how many channels go; two of three in the paper, and one stays whichever way it falls.
        fill: "zero", "noise" (Doersch's) or "repeat" (the kept channel); see `drop_channels`.

    Raises:
        ValueError: for an unknown fill, a probability outside 0 .. 1, or images with no more channels than `drop`.

    Example: `ChannelDrop()(torch.ones(1, 3, 2, 2), randomness).sum()` is 4: one channel of four ones is left.
    """

    def __init__(
        self, probability: float = 1.0, drop: int = 2, fill: Fill = "zero", stream: str = "channel_drop"
    ) -> None:
        super().__init__()
        if fill not in _FILLS:
            raise ValueError(f"fill is one of {', '.join(_FILLS)}, got {fill!r}")
        if drop < 1:
            raise ValueError(f"drop is at least 1, got {drop}: set probability to 0 to keep all channels")
        self.probability, self.drop, self.fill, self.stream = check_probability(probability), drop, fill, stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images)
        channels = images.shape[1]
        if channels <= self.drop:
            raise ValueError(f"can't drop {self.drop} of {channels} channels: lower `drop`, or switch channel drop off")
        chosen = randomness.bernoulli(f"{self.stream}/chosen", self.probability)
        rank = randomness.uniform(f"{self.stream}/rank", channels).argsort(dim=1)
        key = randomness.integers(f"{self.stream}/key", 2**62) if self.fill == "noise" else torch.zeros(len(rank))
        return on_chosen(images, chosen, lambda x, r, k: drop_channels(x, r, self.drop, self.fill, k), rank, key)
