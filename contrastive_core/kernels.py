"""`row_sweep` for a GPU: the same losses and gradients, without a score ever leaving the chip.

The plain sweep computes a block of scores in one kernel and reads it again in six others, so on a GPU it waits for
memory. Here a tile of scores is made, summed and forgotten within one kernel (`contrastive_core.triton_sweep`, after
FlashAttention; Dao et al. 2022), which takes four products of matrices in place of three and next to no traffic.

`supported` says where that works; everywhere else `contrastive_core.sweep.row_sweep` gives the same numbers. Triton
is loaded by the first call that may need it, not by importing this module: some machines have none.

Products follow torch's setting for float32: one TF32 product where it allows that, else three of them, which add up
to float32's precision ("tf32x3": 3 x TF32 on the tensor cores, since plain float32 products are none of theirs).
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_core import sweep
from contrastive_core.sweep import Pairs, Weights, slopes


def supported(queries: Tensor, keys: Tensor, pairs: Pairs) -> bool:
    """Whether `row_sweep` of this module can take these: float32 on an NVIDIA GPU with TF32, no mask, d not too large.

    The largest d is that of `contrastive_core.triton_sweep.TILES`: 256 where TF32 is allowed, else 128 (64 on a GPU
    with less shared memory than an H100). With TRITON_INTERPRET=1 in the environment from the start, tensors on a CPU
    are taken too, slowly: that is how the kernels are tested without a GPU.

    Example: `supported(torch.ones(2, 4), torch.ones(8, 4), Pairs())` is False, there being no GPU in it.
    """
    if pairs.mask is not None or queries.device != keys.device or not queries.dtype == keys.dtype == torch.float32:
        return False
    if torch.compiler.is_compiling():  # a graph has its own fusion, and cannot look into ours
        return False
    if queries.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return False
    elif queries.device.type != "cuda" or torch.version.cuda is None:
        return False
    if not has_triton():
        return False

    from contrastive_core import triton_sweep

    return triton_sweep.runs_on(queries.device) and triton_sweep.tile_for(queries) is not None


@cache
def has_triton() -> bool:
    """Whether triton is installed; it is not loaded for that."""
    return find_spec("triton") is not None


def row_sweep(
    queries: Tensor,
    keys: Tensor,
    own: Tensor | None,
    *,
    pairs: Pairs,
    weights: Weights = None,
    needs: tuple[bool, ...] = (False, False, False),
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """A loss for each query, and the gradients of their weighted sum: `contrastive_core.sweep.row_sweep`, on a GPU.

    Args:
        queries, keys, own, weights, needs: as there, where `supported` says yes.
        pairs: without a mask.
    """
    from contrastive_core.triton_sweep import sum_over_keys, sum_over_queries

    d_queries = d_keys = d_own = None
    highest, total, scores, centres = sum_over_keys(
        queries, keys, pairs.positive, pairs.itself, centres=needs[0] and weights is not None
    )
    if scores is None:
        scores = total.new_zeros(()) if own is None else own
    # the two scores first, and an infinite positive gives NaN and not 0: as there
    log_odds = total.log().add_(highest - scores).add_(scores * 0)
    losses = log_odds if pairs.decoupled else F.softplus(log_odds, threshold=88)
    if weights is None:
        return losses, (None, None, None)

    w = slopes(log_odds, weights, pairs.decoupled)
    if centres is not None:
        d_queries = centres.mul_(w[:, None])
        if pairs.positive is not None:
            d_queries.addcmul_(keys[pairs.positive], w[:, None], value=-1)
    if needs[1]:
        d_keys = sum_over_queries(queries, keys, pairs.positive, pairs.itself, highest, w / total.clamp_min(1))
        if pairs.positive is not None:
            d_keys.index_add_(0, pairs.positive, queries * w[:, None], alpha=-1)
    if needs[2] and own is not None:
        d_own = -w
    return losses, (d_queries, d_keys, d_own)


def fastest_row_sweep(
    queries: Tensor, keys: Tensor, own: Tensor | None, *, pairs: Pairs, **options: Any
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """`row_sweep` of this module where it is supported, else that of `contrastive_core.sweep`; decided at each call."""
    on_chip = supported(queries, keys, pairs)
    return (row_sweep if on_chip else sweep.row_sweep)(queries, keys, own, pairs=pairs, **options)
