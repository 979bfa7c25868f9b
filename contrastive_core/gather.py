"""All-gather that carries gradients.

`torch.distributed.all_gather` cuts the graph, and putting back only the local shard keeps just a part of the
gradient: a row of this process is a candidate for the queries of every other process too. The backward here sums
the gradients that all processes have for a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        shards = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, rows)
        return torch.cat(shards)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def all_gather(rows: Tensor) -> Tensor:
    """The rows of all processes, in rank order, with gradients: `n ...` -> `(world n) ...`.

    Every process must hold the same number of rows. Where torch.distributed is not initialised, or with one
    process, `rows` is returned as it is.

    Example: on two processes holding [[0.]] and [[1.]], both get [[0.], [1.]].
    """
    return rows if world()[1] == 1 else _AllGather.apply(rows)


def first_row(count: int) -> int:
    """Where this process's `count` rows begin among the gathered ones: rank * count."""
    return world()[0] * count
