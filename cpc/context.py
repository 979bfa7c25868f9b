"""The context network, and turning the grid for the four directions.

The network reads the latent grid downward: the context of a cell summarises its own row and the rows above, never
those below (Henaff et al. 2020, appendix, "CPC" pseudo-code). For the other three directions the grid is turned,
not the network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

DIRECTIONS = ("down", "up", "right", "left")


def turn(grid: Tensor, direction: str) -> Tensor:
    """Turn `b rows cols ...` so that reading it downward reads the original in `direction`.

    down = as it is, up = rows flipped, right = transposed, left = columns flipped, then transposed.
    Raises ValueError for another word. Example: `turn(grid, "up")[:, 0]` is the last row of `grid`.
    """
    if direction == "down":
        return grid
    if direction == "up":
        return grid.flip(1)
    if direction == "right":
        return grid.transpose(1, 2)
    if direction == "left":
        return grid.flip(2).transpose(1, 2)
    raise ValueError(f"direction {direction!r} is not one of {', '.join(DIRECTIONS)}")


def turn_back(grid: Tensor, direction: str) -> Tensor:
    """The inverse of `turn`. Example: `turn_back(turn(grid, "left"), "left")` equals `grid`."""
    return turn(grid, "left").flip(1, 2) if direction == "left" else turn(grid, direction)


class ContextBlock(nn.Module):
    """One residual block of the pseudo-code, on `b d rows cols`.

    1x1 (dim to width), ReLU; 1x3, no ReLU; one row of zeros on top, 2x1, ReLU; 1x1 (width to dim); add.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(dim, width, 1)
        self.across = nn.Conv2d(width, width, (1, 3), padding=(0, 1))
        self.down = nn.Conv2d(width, width, (2, 1))
        self.grow = nn.Conv2d(width, dim, 1)

    def forward(self, grid: Tensor) -> Tensor:
        hidden = self.across(F.relu(self.shrink(grid)))
        hidden = F.relu(self.down(F.pad(hidden, (0, 0, 1, 0))))
        return grid + self.grow(hidden)


class ContextNetwork(nn.Module):
    """The masked-convolution context network, reading downward: `b rows cols d` -> `b rows cols d`.

    Args:
        dim: d, the width of the latents and of the context.
        width: channels inside the residual blocks (256 in the paper, beside 4096-dimensional latents).
        layers: residual blocks (5 in the paper), each of which sees one row further up and one column further
            to both sides: the context of (row, col) depends on rows row - layers .. row and
            columns col - layers .. col + layers.

    The last ReLU stands after the loop over blocks, as in most transcriptions of the pseudo-code (one has it
    inside). There is no normalisation.
    """

    def __init__(self, dim: int, width: int = 256, layers: int = 5) -> None:
        super().__init__()
        if min(dim, width) < 1 or layers < 0:
            raise ValueError(f"dim={dim}, width={width}, layers={layers}: pass at least 1, 1 and 0")
        self.arguments = {"dim": dim, "width": width, "layers": layers}
        self.blocks = nn.Sequential(*(ContextBlock(dim, width) for _ in range(layers)))

    def forward(self, latents: Tensor) -> Tensor:
        grid = rearrange(latents, "b rows cols d -> b d rows cols")
        return rearrange(F.relu(self.blocks(grid)), "b d rows cols -> b rows cols d")


class Contexts(nn.Module):
    """Latents with what every direction's context network says of them: `b rows cols d` -> `b rows cols (1 + n) d`.

    CPC v1 reads out contexts where v2 reads out latents (van den Oord et al. 2018, section 2.1). A context sees more of
    the image than a patch does, and each cell of the grid has one for each of the n directions.

    Args:
        networks: context networks by name.
        context_of: for every direction the name of its network.

    Attributes: `dim`, the width of what comes out.

    Raises ValueError for no network, networks of unlike width, and a direction whose network there is not.

    Example: of four directions the first d of the 5 d numbers are the latents.
    """

    def __init__(self, networks: nn.ModuleDict, context_of: Mapping[str, str]) -> None:
        super().__init__()
        widths: set[int] = {network.arguments["dim"] for network in networks.values()}  # type: ignore[index, misc]
        unknown = [direction for direction, name in context_of.items() if name not in networks]
        if len(widths) != 1 or unknown or not set(context_of) <= set(DIRECTIONS):
            raise ValueError(
                f"networks {sorted(networks)} of widths {sorted(widths)} for {dict(context_of)}: pass one width, "
                f"and for each of {', '.join(DIRECTIONS)} the name of its network"
            )
        self.networks, self.context_of = networks, dict(context_of)
        self.dim: int = (1 + len(self.context_of)) * widths.pop()

    def forward(self, latents: Tensor) -> Tensor:
        contexts = [
            turn_back(self.networks[name](turn(latents, direction)), direction)
            for direction, name in self.context_of.items()
        ]
        return torch.cat([latents, *contexts], dim=-1)
