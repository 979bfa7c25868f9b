"""All-gather that carries gradients, for any number of rows a process.

`torch.distributed.all_gather` cuts the graph, and putting back only the local shard keeps just a part of the
gradient: a row of this process is a candidate for the queries of every other process too. The backward here sums
the gradients that all processes have for a row.

Processes may hold different numbers of rows (a last batch). What they must agree on first are the numbers:

    counts = row_counts(len(rows))        # one small exchange
    gathered = all_gather(rows, counts)   # in rank order; this process's begin at first_row(counts)
    loss = own_mean * mean_weight(counts)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F


def world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def exchange(*numbers: int) -> list[tuple[int, ...]]:
    """The integers of every process, in rank order. All processes must call it, with as many numbers.

    Example: on two processes, `exchange(3, 7)` and `exchange(2, 8)` both give [(3, 7), (2, 8)].
    """
    if world()[1] == 1:
        return [numbers]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    everyone = [torch.empty_like(own) for _ in range(world()[1])]
    dist.all_gather(everyone, own)
    return [tuple(row) for row in torch.stack(everyone).tolist()]


def agree(problem: str, *numbers: int) -> list[tuple[int, ...]]:
    """`exchange`, where no process has a problem with its arguments; else ValueError on all, so that none waits.

    Args:
        problem: what is wrong with this process's arguments and what to pass instead; "" = nothing.
    """
    everyone = exchange(bool(problem), *numbers)
    if problem:
        raise ValueError(problem)
    for rank, (misfit, *_) in enumerate(everyone):
        if misfit:
            raise ValueError(f"process {rank} passed what does not fit: see its own error")
    return [agreed[1:] for agreed in everyone]


def row_counts(count: int) -> list[int]:
    """How many rows each process holds, in rank order."""
    return [rows for (rows,) in exchange(count)]


def first_row(counts: Sequence[int]) -> int:
    """Where this process's rows begin among the gathered ones. Example: [3, 2] on rank 1 gives 3."""
    return sum(counts[: world()[0]])


def mean_weight(counts: Sequence[int]) -> float:
    """What to multiply this process's mean by, so that DDP's average over processes is the mean of the joint batch.

    n_local x W / n_global: 1 where all counts are equal. Example: with [3, 1] rank 0 gets 1.5 and rank 1 gets 0.5.
    """
    return len(counts) * counts[world()[0]] / sum(counts)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        longest = max(counts)  # every process sends as many rows
        padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, longest - len(rows))).contiguous()
        shards = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(shards, padded)
        return torch.cat([shard[:count] for shard, count in zip(shards, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise NotImplementedError("gathered rows have no second derivatives: compute them in one process")
        # to each process its own rows' gradients, which it adds up: half the bytes of summing all rows everywhere, and
        # fewer than gloo's reduce_scatter, which does just that
        own = ctx.counts[dist.get_rank()]
        theirs = gradients[0].new_empty(len(ctx.counts) * own, *gradients[0].shape[1:])
        dist.all_to_all_single(theirs, gradients[0].contiguous(), [own] * len(ctx.counts), ctx.counts)
        return theirs.unflatten(0, (len(ctx.counts), own)).sum(0), None


def all_gather(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """The rows of all processes, in rank order, with gradients: `n ...` -> `(sum of n) ...`.

    Args:
        rows: `n ...`; n may differ between processes, the rest may not.
        counts: every process's n, from `row_counts`; None = exchange them here.

    Where torch.distributed is not initialised, or with one process, `rows` is returned as it is.

    Raises ValueError where `counts` does not say how many rows this process holds.

    Example: on two processes holding [[0.]] and [[1.]], both get [[0.], [1.]].
    """
    rank, size = world()
    if size == 1:
        return rows
    counts = list(row_counts(len(rows)) if counts is None else counts)
    if len(counts) != size or counts[rank] != len(rows):
        raise ValueError(f"counts={counts}, but process {rank} of {size} holds {len(rows)} rows: pass row_counts(n)")
    return _AllGather.apply(rows, counts)
