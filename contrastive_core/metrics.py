"""What to watch while a contrastive method trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contrastive_core.loss_arguments import check_pairs


@torch.no_grad()
def contrast_accuracy(queries: Tensor, keys: Tensor, positive: Tensor, *, limit: int = 128) -> Tensor:
    """How often a query scores its positive highest among all keys, in 0..1 (a tie with another key counts as a miss).

    Args:
        queries: `n d`. keys: `m d`. positive: `n` int64, index into keys.
        limit: at most this many queries are looked at, spread evenly over the rows; all keys are candidates.

    Example: with `queries = keys = torch.eye(4)` and `positive = torch.arange(4)` it is 1.
    """
    check_pairs(queries, keys, positive)
    chosen = torch.linspace(0, len(queries) - 1, min(limit, len(queries))).round().long().to(queries.device)
    positive = positive[chosen]
    with torch.autocast(queries.device.type, enabled=False):  # in bf16 close scores tie
        scores = queries[chosen].float() @ keys.float().T
    own = scores.gather(1, positive[:, None]).squeeze(1)
    best_other = scores.scatter_(1, positive[:, None], -torch.inf).amax(1)
    return (own > best_other).float().mean()


@torch.no_grad()
def count_negatives(loss: Callable[..., Tensor], queries: Tensor, *others: Tensor | None, **options: Any) -> Tensor:
    """How many negatives each query truly has, over all processes: asked of the loss, with its own way of leaving out.

    With scores of 0 the decoupled loss is the logarithm of their number. It costs as much as the loss.

    Args:
        loss: `info_nce` or `nt_xent`, or another with their `decoupled` and `reduction`.
        queries: `n d` (`nt_xent`: the first views); only their shape matters.
        others, options: what the loss is given beside them; every process must call where keys are gathered.

    Returns `n` (`nt_xent`: `2n`) counts, 0 for a query that has none; where no query has one the loss raises.

    Example: `count_negatives(nt_xent, torch.rand(4, 8), torch.rand(4, 8))` is [6, 6, 6, 6, 6, 6, 6, 6].
    """
    options = {**options, "temperature": 1.0, "decoupled": True, "reduction": "none"}
    # in float64, whose exponential of a logarithm is right to the last of a billion keys
    zeros = [o if o is None or not o.is_floating_point() else o.new_zeros(o.shape, dtype=torch.float64) for o in others]
    return loss(queries.new_zeros(queries.shape, dtype=torch.float64), *zeros, **options).exp().round()


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Mean over channels of the standard deviation of the L2-normalised features `b d`: about 1/sqrt(d), 0 on collapse.

    The collapse alarm of Chen and He 2021, figure 2. Example: identical features give 0.
    """
    features = features.float()
    return (features / features.norm(dim=1, keepdim=True).clamp_min(1e-6)).std(0, correction=0).mean()
