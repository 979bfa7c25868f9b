"""Contrastive losses: which key, out of these, belongs to this query?

Pure functions of tensors; importing this module loads torch and einops only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_core.gather import all_gather, first_row, world


def check_pairs(queries: Tensor, keys: Tensor, positive: Tensor) -> None:
    """Raise ValueError unless queries are `n d`, keys `m d` and positive `n` integers."""
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)} and keys {tuple(keys.shape)}: pass n d and m d with the same d"
        )
    if positive.shape != queries.shape[:1] or positive.is_floating_point():
        raise ValueError(
            f"positive has shape {tuple(positive.shape)} and dtype {positive.dtype}: "
            f"pass one integer index into keys for each of the {len(queries)} queries"
        )


def info_nce(
    queries: Tensor,
    keys: Tensor,
    positive: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    gather: bool | None = None,
) -> Tensor:
    """InfoNCE: the cross-entropy of picking each query's positive out of all keys.

    L_i = -log( exp(q_i . k_p(i) / T) / sum_j exp(q_i . k_j / T) )   (van den Oord et al. 2018, equation 4)

    Nothing is normalised: CPC scores with plain dot products (CPC v2: times 0.1, a temperature of 10); a method
    that compares by angle normalises first. The logits are computed in float32 (float64 for float64 inputs) whatever
    the inputs' precision or autocast.

    Args:
        queries: `n d`.
        keys: `m d`, the candidates; with gathering, this process's share of them.
        positive: `n` int64, the index into `keys` of each query's match.
        temperature: T > 0; a tensor may be learned.
        reduction: "mean", "sum" or "none" (`n`).
        gather: compare with the keys of all processes; None = whenever torch.distributed is initialised. Each
            process returns the loss of its own queries, so that DDP's average is the joint batch's gradient.

    Raises:
        ValueError: shapes or dtypes that don't fit, an unknown reduction.

    Example: identical keys give log m: `info_nce(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 5]))` is
    2.0794 = log 8.
    """
    check_pairs(queries, keys, positive)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction={reduction!r}: pass "mean", "sum" or "none"')
    if world()[1] > 1 if gather is None else gather:
        positive = positive + first_row(len(keys))
        keys = all_gather(keys)
    precision = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        logits = (queries.to(precision) / temperature) @ keys.to(precision).T
        return F.cross_entropy(logits, positive, reduction=reduction)
