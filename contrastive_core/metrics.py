"""What to watch while a contrastive method trains."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_core.losses import check_pairs


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
def feature_std(features: Tensor) -> Tensor:
    """Mean over channels of the standard deviation of the L2-normalised features `b d`: about 1/sqrt(d), 0 on collapse.

    The collapse alarm of Chen and He 2021, figure 2. Example: identical features give 0.
    """
    features = features.float()
    return (features / features.norm(dim=1, keepdim=True).clamp_min(1e-6)).std(0, correction=0).mean()
