"""The classifier that CPC v2 puts on a grid of latents: a ResNet that sees where things are (Henaff et al. 2020, A.4).

A linear readout of mean-pooled latents throws the grid away. The paper keeps it: a network without stride on the grid,
then the mean and a linear layer. Its "ResNet-33" is `LatentClassifier(4096, classes, blocks=11, width=4096,
bottleneck=1024)`: 11 blocks of three convolutions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cpc.encoders import ResidualBlock, normalisation


class LatentClassifier(nn.Module):
    """Logits `b classes` of a grid of latents `b rows cols d`.

    Args:
        dim: of a latent, d.
        classes: how many.
        blocks: residual blocks on the grid; 0 = the mean over the grid and a linear layer.
        width: channels of the blocks.
        bottleneck: inner width of a block's 1x1, 3x3, 1x1 convolutions; None = two 3x3.
        dropout: probability of dropping a number of the mean, 0..1.
        norm: of the blocks, as `cpc.encoders.normalisation`; the paper's is not known.

    The linear layer starts at zero, so that the first prediction is uniform. `arguments` are those it was built with:
    `LatentClassifier(**classifier.arguments)` is another of its kind.

    Raises ValueError for fewer than two classes, no channel, and latents that are no grid of this dimension.

    Example: the paper's, on 4,096 dimensions, has 196 million parameters below its linear layer.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        blocks: int = 1,
        width: int = 128,
        bottleneck: int | None = None,
        dropout: float = 0.0,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if classes < 2 or blocks < 0:
            raise ValueError(f"{classes} classes, blocks={blocks}: pass at least 2 classes, and blocks from 0")
        if width < 1 or (bottleneck is not None and bottleneck < 1):
            raise ValueError(f"width={width} bottleneck={bottleneck}: pass at least 1 channel")
        channels = [dim, *[width] * blocks]
        self.dim = dim
        shape = {"blocks": blocks, "width": width, "bottleneck": bottleneck}
        self.arguments: dict[str, Any] = {"dim": dim, "classes": classes, **shape, "dropout": dropout, "norm": norm}
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(inner, outer, stride=1, bottleneck=bottleneck, norm=norm)
                for inner, outer in pairwise(channels)
            )
        )
        self.final_norm = normalisation(norm if blocks else "none", channels[-1])
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels[-1], classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, latents: Tensor) -> Tensor:
        if latents.dim() != 4 or latents.shape[3] != self.dim:
            raise ValueError(f"latents {tuple(latents.shape)}: pass `b rows cols d` with d = {self.dim}")
        maps = self.blocks(rearrange(latents, "b rows cols d -> b d rows cols"))
        if len(self.blocks):  # pre-activation blocks end without one; the latents themselves stay as they are
            maps = F.relu(self.final_norm(maps))
        logits: Tensor = self.linear(self.dropout(maps.mean((2, 3))))
        return logits
