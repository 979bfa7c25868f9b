"""What to watch while a contrastive method trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from contrastive_core.loss_arguments import check_pairs
from contrastive_core.transfer import to_device


@torch.no_grad()
def contrast_accuracy(
    queries: Tensor,
    keys: Tensor,
    positive: Tensor,
    *,
    limit: int = 128,
    compared: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """How often a query scores its positive highest among all keys, in 0..1 (a tie with another key counts as a miss).

    Args:
        queries: `n d`. keys: `m d`. positive: `n` int64, index into keys.
        limit: at most this many queries are looked at, spread evenly over the rows.
        compared: numbers of queries `r` -> the keys that each is compared with, bool `r m`; None = all.

    Example: with `queries = keys = torch.eye(4)` and `positive = torch.arange(4)` it is 1.
    """
    check_pairs(queries, keys, positive)
    chosen = spread_rows(len(queries), queries.device, limit)
    positive = positive[chosen]
    mask = None if compared is None else compared(chosen)
    return contrast_hits(queries[chosen], keys, positive, mask=mask).float().mean()


def spread_rows(n: int, device: torch.device, limit: int = 128) -> Tensor:
    """At most `limit` of n rows, the first and the last among them. Example: of 5, limit 3, they are 0, 2 and 4."""
    return to_device(torch.linspace(0, n - 1, min(limit, n)).round().long(), device)


@torch.no_grad()
def contrast_hits(queries: Tensor, keys: Tensor, positive: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Which queries score their positive highest among all keys, bool `n` (a tie with another key counts as a miss).

    queries, keys, positive: as `contrast_accuracy`'s. mask: `n m` bool, True = compared; None = all.

    Example: with `queries = keys = torch.zeros(2, 4)` and `positive = torch.arange(2)` it is False for both.
    """
    with torch.autocast(queries.device.type, enabled=False):  # in bf16 close scores tie
        scores = queries.float() @ keys.float().T
    own = scores.gather(1, positive[:, None]).squeeze(1)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    best_other = scores.scatter_(1, positive[:, None], -torch.inf).amax(1)
    return own > best_other


@torch.no_grad()
def count_negatives(loss: Callable[..., Tensor], queries: Tensor, *others: Tensor | None, **options: Any) -> Tensor:
    """How many negatives each query truly has, over all processes: asked of the loss, with its own way of leaving out.

    With scores of 0 the loss is the logarithm of one more than their number. It costs as much as the loss.

    `cpc.negatives.count_negatives` is another: how many a CPC prediction has by the choice of `method.negatives`, from
    the numbers of images and cells alone.

    Args:
        loss: `info_nce` or `nt_xent`, or another with their `decoupled`, which is False here, and `reduction`.
        queries: `n d` (`nt_xent`: the first views); only their shape matters.
        others, options: what the loss is given beside them; every process must call where keys are gathered.

    Returns `n` (`nt_xent`: `2n`) counts, 0 for a query that has none.

    Example: `count_negatives(nt_xent, torch.rand(4, 8), torch.rand(4, 8))` is [6, 6, 6, 6, 6, 6, 6, 6].
    """
    options = {**options, "temperature": 1.0, "decoupled": False, "reduction": "none"}
    # in float64, whose exponential of a logarithm is right to the last of a billion keys
    zeros = [o if o is None or not o.is_floating_point() else o.new_zeros(o.shape, dtype=torch.float64) for o in others]
    return loss(queries.new_zeros(queries.shape, dtype=torch.float64), *zeros, **options).expm1().round()


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Mean over channels of the standard deviation of the L2-normalised features `b d`: about 1/sqrt(d), 0 on collapse.

    The collapse alarm of Chen and He 2021, figure 2. Example: identical features give 0.
    """
    features = features.float()
    return (features / features.norm(dim=1, keepdim=True).clamp_min(1e-6)).std(0, correction=0).mean()


@torch.no_grad()
def effective_rank(features: Tensor, *, limit: int = 256) -> Tensor:
    """RankMe: over how many dimensions features `b d` spread, from 1 to min(b, d, limit).

    exp( - sum_k p_k log p_k ),  p_k = s_k / sum_j s_j + 1e-7,  s the singular values (Garrido et al. 2023, equation 1)

    As in the paper the mean is not taken away, so features that share a large mean have a small rank: those after a
    ReLU, and all that are about to collapse. Differs from the paper: cut off at min(b, d), which 1e-7 would pass.

    Args:
        features: `b d`, their lengths count; a rank is compared only with ranks of as many rows.
        limit: at most this many rows are looked at, spread evenly. 256 of d = 2048 take 10 ms of one CPU core; the
            paper looks at 25,600 to rank encoders, which tells more than an alarm needs.

    Returns a float64 scalar; 1 for zeros, NaN where a number is not finite. On a GPU the host waits for it, since
    torch's eigenvalues ask the device whether they have converged.

    Raises ValueError for another shape or no rows. Example: `effective_rank(torch.eye(4))` is 4.
    """
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"features have shape {tuple(features.shape)}: pass b d, at least one row")
    if len(features) > limit:
        features = features[to_device(torch.linspace(0, len(features) - 1, limit).round().long(), features.device)]
    # in float64, where a product with itself costs singular values above 1e-8 of the largest no digit that counts
    rows = features.double()
    largest = rows.abs().max()
    finite = largest.isfinite()  # eigenvalues of what is not would be an error, or no answer
    rows = torch.where(finite, rows, 1.0) / torch.where(finite, largest, 1.0).clamp_min(torch.finfo(rows.dtype).tiny)
    if len(rows) > rows.shape[1]:
        rows = rows.T
    singular = torch.linalg.eigvalsh(rows @ rows.T).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(rows.dtype).tiny) + 1e-7
    return torch.where(finite, torch.special.entr(share).sum().exp().clamp(1, len(rows)), math.nan)


_watching: ContextVar[bool] = ContextVar("watching", default=True)


@contextmanager
def watching(on: bool) -> Iterator[None]:
    """Within: whether somebody looks at the metrics; else `spread_metrics` leaves out what the device is waited for."""
    token = _watching.set(on)
    try:
        yield
    finally:
        _watching.reset(token)


LEAST_SPREAD, LEAST_RANK = 0.01, 1.5
"""`collapsed` says what was measured."""


@torch.no_grad()
def spread_metrics(vectors: Tensor) -> dict[str, Tensor]:
    """What tells a collapse of projections (CPC: targets) `n d`, for `collapsed`: {"spread", "effective_rank"}.

    spread: `feature_std` in units of 1/sqrt(d), 1 = even over the sphere, 0 = one point. effective_rank: of at most 64
    rows; left out in a step that nobody looks at (`watching`), since a GPU would stand still for it in every one.

    Example: the rows of `torch.ones(4, 8)` have spread 0 and effective rank 1.
    """
    found = {"spread": feature_std(vectors) * math.sqrt(vectors.shape[1])}
    return found | ({"effective_rank": effective_rank(vectors, limit=64)} if _watching.get() else {})


def collapsed(spread: float, rank: float) -> str:
    """Whether a network gives every image the same vector: one line that says so, or "".

    An alarm where `spread` is below 0.01 or `rank` below 1.5. Each sees what the other does not: vectors in one line,
    some opposite, may have a healthy spread, and their rank is 1; a point with even noise around it has almost no
    spread, and in 2048 dimensions a rank of 3.

    Args:
        spread, rank: as `spread_metrics` gives them, of 32 vectors or more, since a rank is at most their number; NaN
            raises no alarm.

    Give it projections (CPC: targets), not features: those look alike in good and collapsed runs. Measured, spread,
    then rank, of 64 photographs unless said:

    - untrained ResNets (8, 18 and 50 layers, d = 64 to 2048; LayerNorm or BatchNorm; noise, smooth images, photographs
      and digits): features at least 0.05 and 3.7; projections 0.7 and 27 with BatchNorm in the head, 0.04 and 2.7
      without;
    - SimSiam, 600 steps of a ResNet-8: projections 0.7 to 1 and more than 10 throughout, features down to 0.04 and 2.1;
    - ... without its stop-gradient: projections 0.02 and 1.3, or with a BatchNorm at their end 0.4 and 1.1; features
      0.2 to 0.3 and 2.5 to 2.7;
    - CPC on digits, 400 steps: targets 0.3 to 0.9 and more than 10; with `SigmoidLoss` at least 0.1 and 5, where
      features pass through 0.03 and 1.7; with a regression in their place targets of 0.01 and 1.4 after 100 steps.

    Nearer the bounds come photographs of a twentieth of the contrast (0.03 and 1.7) and a BatchNorm encoder in
    evaluation mode (0.02 and 1.7). False alarms: networks without any norm, head included (digits: 0.01 and 1.4).

    Example: `collapsed(0.9, 40.0)` is "", `collapsed(0.002, 1.1)` a line with these numbers.
    """
    if not (spread < LEAST_SPREAD or rank < LEAST_RANK):
        return ""
    return (
        f"collapsed: the projections' spread is {spread:.2g} (0 = one point, 1 = even over the sphere), "
        f"their effective rank {rank:.1f}"
    )
