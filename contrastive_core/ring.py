"""Contrast with the keys of all processes while holding those of a few, however many there are.

Gathering puts all keys on every process: O(m d) for the joint m. Here each process passes a share of keys on to the
next and takes one from the one before, and scores its own queries against whatever share is visiting. After as many
rounds as there are processes every query has met every key (ring attention's exchange; Liu et al. 2023). In the
backward pass the shares go round once more, each with the gradient that it has collected so far, and come home.

With o_is = X_is - S_ip for the negatives of share s, the row's log-odds are o_i = log sum_s exp(o_is), and
do_i/do_is = exp(o_is - o_i): each share is a decoupled `row_sweep` with these weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from contrastive_core.gather import world
from contrastive_core.kernels import fastest_row_sweep
from contrastive_core.sweep import SECOND_DERIVATIVES, Pairs, full_precision_island


def pass_on(*shares: Tensor, counts: Sequence[int], at: int) -> tuple[Tensor, ...]:
    """Send tensors of `counts[at]` rows to the next process, receive ones of `counts[at - 1]` from the one before."""
    rank, size = world()
    arriving = [share.new_empty(counts[(at - 1) % size], *share.shape[1:]) for share in shares]
    transfers = [
        transfer
        for leaving, coming in zip(shares, arriving, strict=True)
        for transfer in (
            dist.P2POp(dist.isend, leaving.contiguous(), (rank + 1) % size),
            dist.P2POp(dist.irecv, coming, (rank - 1) % size),
        )
    ]
    for request in dist.batch_isend_irecv(transfers):
        request.wait()
    return tuple(arriving)


class _RingLogOdds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, own: Tensor, shared: Tensor | None, pairs: Pairs, counts: list[int]
    ) -> Tensor:
        ctx.pairs, ctx.counts = pairs, counts
        rank = world()[0]
        log_odds, visiting = [], keys
        with full_precision_island(queries.device.type):
            for hop in range(len(counts)):
                if hop:
                    (visiting,) = pass_on(visiting, counts=counts, at=rank - hop + 1)
                log_odds.append(_share_sweep(queries, visiting, own, pairs if hop == 0 else None)[0])
            if shared is not None:
                log_odds.append(_share_sweep(queries, shared, own, None)[0])
        shares = torch.stack(log_odds)
        total = shares.logsumexp(0)
        ctx.save_for_backward(queries, keys, own, shared, shares, total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(SECOND_DERIVATIVES)
        queries, keys, own, shared, shares, total = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:3])
        rank, size = world()
        # a row without any negative has total = -inf, and no gradient
        weights = (shares - total.clamp_min(torch.finfo(total.dtype).min)).exp_().mul_(gradient)
        d_queries, d_own = torch.zeros_like(queries), torch.zeros_like(own)
        visiting, collected = keys, torch.zeros_like(keys)
        with full_precision_island(queries.device.type):
            for hop in range(size):
                pairs = ctx.pairs if hop == 0 else None
                _, parts = _share_sweep(queries, visiting, own, pairs, weights=weights[hop], needs=needs)
                _add_(parts, d_queries, collected, d_own)
                if hop + 1 < size:
                    visiting, collected = pass_on(visiting, collected, counts=ctx.counts, at=rank - hop)
                else:  # only the gradient comes home
                    (collected,) = pass_on(collected, counts=ctx.counts, at=rank - hop)
            d_shared = None
            if shared is not None:
                needs = (needs[0], ctx.needs_input_grad[3], needs[2])
                _, parts = _share_sweep(queries, shared, own, None, weights=weights[size], needs=needs)
                d_shared = parts[1]
                _add_((parts[0], None, parts[2]), d_queries, None, d_own)
        return d_queries, collected, d_own, d_shared, None, None


def _share_sweep(queries: Tensor, keys: Tensor, own: Tensor, pairs: Pairs | None, **options: Any) -> Any:
    """A decoupled sweep over one share: `pairs` where it is this process's own, None where it is a visitor."""
    at_home = pairs is not None and pairs.positive is not None
    pairs = Pairs(decoupled=True) if pairs is None else replace(pairs, decoupled=True)
    return fastest_row_sweep(queries, keys, None if at_home else own, pairs=pairs, **options)


def _add_(parts: tuple[Tensor | None, ...], *totals: Tensor | None) -> None:
    for part, total in zip(parts, totals, strict=True):
        if part is not None and total is not None:
            total += part


def ring_log_odds(
    queries: Tensor, keys: Tensor, own: Tensor | None, pairs: Pairs, shared: Tensor | None, counts: list[int]
) -> Tensor:
    """The log-odds `n` against the positive, log sum_j exp(S_ij - S_ip), over the negatives of all processes.

    Args:
        queries: `n d`, over the temperature. keys: `m d`, this process's; `counts` tells every process's m.
        own: `n`, the positives' scores where `pairs.positive` is None.
        pairs: this process's queries with its own keys.
        shared: `k d`, keys that are the same on every process.
    """
    if own is None:
        own = (queries * keys[pairs.positive]).sum(1)
    return _RingLogOdds.apply(queries, keys, own, shared, pairs, counts)
