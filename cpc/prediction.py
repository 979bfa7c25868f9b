"""From offsets to pairs of context cell and target cell.

Everything is said on a grid that was turned so that the direction reads downward (`cpc.context.turn`). An offset of
k pairs the context at (row, col) with the target at (row + k, col); the last k rows have nothing to predict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cpc.context import DIRECTIONS, turn


def first_disjoint_offset(size: int, stride: int) -> int:
    """The first offset whose patch shares no pixel with the context cell's: ceil(size / stride).

    Example: `first_disjoint_offset(80, 36) == 3`, what the paper's pseudo-code predicts (i = 2, offset i + 1).
    """
    return -(-size // stride)


def check_offsets(offsets: Sequence[int], rows: int, cols: int, directions: Sequence[str] = DIRECTIONS) -> None:
    """Raise ValueError unless the offsets are different, each at least 1, and leave cells to predict from.

    Down and up that takes rows, right and left columns. Example: offset 3 down a grid of 6x2 is a legal one.
    """
    lengths = {"rows": rows} if {"down", "up"} & set(directions) else {}
    lengths |= {"columns": cols} if {"right", "left"} & set(directions) else {}
    if not offsets:
        raise ValueError("offsets is empty: pass at least one, e.g. offsets=[3]")
    check_each_once(offsets)
    for offset in offsets:
        if offset < 1:
            raise ValueError(f"offset {offset} predicts nothing ahead: pass offsets of at least 1")
        if offset >= min(lengths.values()):
            raise ValueError(
                f"offset {offset} needs at least {offset + 1} {' and '.join(lengths)}, the grid has {rows}x{cols}: "
                f"lower `offsets` or the stride"
            )


def check_each_once(offsets: Sequence[int]) -> None:
    """Raise ValueError for an offset that is there twice: it would count twice, with one head."""
    if len(set(offsets)) < len(offsets):
        raise ValueError(f"offsets={list(offsets)}: pass each once")


def positive_cells(
    b: int, rows: int, cols: int, offset: int, direction: str, device: torch.device | None = None
) -> Tensor:
    """For each prediction, the index of its target among the `(b rows cols)` flattened, unturned targets.

    Returns `n` int64 with n = b (rows - offset) cols on the turned grid, in the order of
    `turn(context, direction)[:, :-offset]` flattened. It turns the grid of indices as the latents are turned, so
    that the two cannot disagree.

    Example: `positive_cells(1, 3, 2, 1, "down")` is [2, 3, 4, 5].
    """
    cells = rearrange(
        torch.arange(b * rows * cols, device=device), "(b rows cols) -> b rows cols", rows=rows, cols=cols
    )
    return rearrange(turn(cells, direction)[:, offset:], "b rows cols -> (b rows cols)")


class PredictionHeads(nn.Module):
    """A linear map (the paper's 1x1 convolution) from context to target space for each offset.

    `forward(context: b rows cols d)` on a turned grid -> by offset, predictions `b (rows - offset) cols d'` of the
    cells `offset` rows ahead.

    Raises ValueError for a target_dim below 1, and an offset that is there twice.

    Example: `PredictionHeads(4, 3, [2])(torch.ones(1, 7, 7, 4))[2].shape` is (1, 5, 7, 3).
    """

    def __init__(self, dim: int, target_dim: int, offsets: Sequence[int]) -> None:
        super().__init__()
        if target_dim < 1:
            raise ValueError(f"target_dim={target_dim}: pass at least 1")
        check_each_once(offsets)
        self.offsets, self.target_dim = tuple(offsets), target_dim
        self.heads = nn.ModuleDict({str(offset): nn.Linear(dim, target_dim) for offset in offsets})

    def forward(self, context: Tensor) -> dict[int, Tensor]:
        # All in one product: a slice of the contexts for each offset costs more, in its gradient, than the few rows
        # from which the nearer offsets are predicted and the others are not.
        heads = [self.heads[str(offset)] for offset in self.offsets]
        weight, bias = (torch.cat([getattr(head, name) for head in heads]) for name in ("weight", "bias"))
        rows = context.shape[1]
        found = F.linear(context[:, : rows - min(self.offsets)], weight, bias).split(self.target_dim, dim=-1)
        return {offset: part[:, : rows - offset] for offset, part in zip(self.offsets, found, strict=True)}
