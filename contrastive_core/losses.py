"""Contrastive losses: which key, out of these, belongs to this query?

Pure functions of tensors, and thin modules around the two best known; importing this module loads torch and einops
only. All of them

- are exact at any size without holding the matrix of scores (`contrastive_core.sweep`);
- compute in float32 (float64 for float64 inputs), whatever the inputs' precision or autocast;
- compare with the keys of all processes where torch.distributed is initialised, with every process's share of the
  gradient (`contrastive_core.gather`), unless told `gather=False`; evaluation on one process says so;
- let NaN and infinity through, never a plausible number in their place.

`gather`: None = whenever torch.distributed is initialised; True; False = this process's keys only; "ring" = keys of
all processes, of which only two shares are held at a time (`contrastive_core.ring`). Each process gives back the mean
over its own queries (weighted, where processes hold different numbers), so that DDP's average of losses and
gradients is that of the joint batch. `reduction="none"` gives the rows of this process as they are; `"sum"` is refused
where keys are gathered, since DDP's average would be the sum over the number of processes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from contrastive_core.gather import all_gather, exchange, first_row
from contrastive_core.ring import ring_odds
from contrastive_core.sweep import (
    SAFE_RANGE,
    Mask,
    Pairs,
    full_precision,
    row_sweep,
    sigmoid_sweep,
    swept,
    symmetric_sweep,
)

Gather = bool | Literal["ring"] | None
Reduction = Literal["mean", "sum", "none"]
Shares = list[tuple[int, ...]]
"""What every process holds, in rank order: queries, keys and the vectors' dimension."""


# ---- arguments: one clear line for what does not fit ----


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


def _check_views(z1: Tensor, z2: Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"the views have shapes {tuple(z1.shape)} and {tuple(z2.shape)}: pass n d twice")


def _check_temperature(temperature: float | Tensor) -> None:
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature={temperature}: pass a number above 0")


def _check_reduction(reduction: str, shares: Shares) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction={reduction!r}: pass "mean", "sum" or "none"')
    if reduction == "sum" and len(shares) > 1:
        raise ValueError('reduction="sum" means nothing under DDP\'s average: pass "mean", or "none" and sum yourself')


def _shares(gather: Gather, *numbers: int, ring: bool = True) -> Shares:
    """The numbers of all processes that take part: those of this one alone where nothing is gathered."""
    if gather not in (None, False, True) and not (ring and gather == "ring"):
        raise ValueError(f"gather={gather!r}: pass None, True or False" + ring * ', or "ring"')
    return [numbers] if gather is False else exchange(*numbers)


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    return {"mean": losses.mean, "sum": losses.sum}.get(reduction, lambda: losses)()


# ---- contrasting with many keys ----


class _UnitRows(torch.autograd.Function):
    """x / |x|, by hand: few operations, and a zero row stays zero, with a zero gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        inverse = norm.reciprocal()
        inverse.masked_fill_(norm == 0, 0).masked_fill_(norm.isinf(), torch.nan)
        unit = rows * inverse
        ctx.save_for_backward(unit, inverse)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        unit, inverse = ctx.saved_tensors
        along = (unit * gradient).sum(1, keepdim=True)
        return torch.addcmul(gradient, unit, along, value=-1).mul_(inverse)


def normalize(rows: Tensor) -> Tensor:
    """Rows `n d` over their L2 norms, in float32 (float64 for float64); a zero row stays zero, its gradient too.

    An epsilon under the norm, as elsewhere, is 0 in float16 and a gradient of 1e12 in float32.

    Example: `normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))` is [[0.6, 0.8], [0, 0]].
    """
    return _UnitRows.apply(full_precision(rows))


def info_nce(
    queries: Tensor,
    keys: Tensor | None,
    positive: Tensor,
    *,
    shared_keys: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | Mask | None = None,
    decoupled: bool = False,
    reduction: Reduction = "mean",
    gather: Gather = None,
) -> Tensor:
    """InfoNCE: the cross-entropy of picking each query's positive out of all keys.

    L_i = -log( exp(q_i . k_p(i) / T) / sum_j exp(q_i . k_j / T) )   (van den Oord et al. 2018, equation 4)

    Nothing is normalised: CPC scores with plain dot products (CPC v2: times 0.1, a temperature of 10); a method
    that compares by angle calls `normalize` first.

    Args:
        queries: `n d`.
        keys: `m d`, this process's candidates, gathered over processes; None = only `shared_keys`.
        positive: `n` int64, the index into `keys` of each query's match; or `n d`, a key of its own for each query,
            with which no other query is compared (MoCo).
        shared_keys: `k d`, candidates that are the same on every process and never gathered (queue, memory bank).
        temperature: T > 0; a tensor may be learned.
        mask: `n m` bool, True = compared, or a function of a row slice and a column slice that gives such a block and
            is asked for a block at a time. It covers `keys`; shared keys and those of other processes are compared.
        decoupled: leave the positive out of the sum (DCL; Yeh et al. 2022, equation 6).
        reduction: "mean", "sum" or "none" (`n`).
        gather: see the module's docstring.

    Raises:
        ValueError: shapes or dtypes that don't fit, a mask that leaves out a positive, an unknown reduction.

    Example: identical keys give log m: `info_nce(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 5]))` is
    2.0794 = log 8.
    """
    own = positive if positive.ndim == 2 and positive.is_floating_point() else None
    if keys is None:
        if own is None or shared_keys is None:
            raise ValueError("keys=None: pass shared_keys, and each query's own key as positive (n d)")
        keys = queries.new_empty(0, *queries.shape[1:])
    _check_candidates(queries, keys, positive, shared_keys, mask)
    _check_temperature(temperature)
    n, m = len(queries), len(keys)
    shares = _shares(gather, n, m, queries.shape[1])
    _check_shares(shares, decoupled, own is None, 0 if shared_keys is None else len(shared_keys))
    _check_reduction(reduction, shares)

    queries = full_precision(queries) / temperature
    keys = full_precision(keys)
    shared_keys = None if shared_keys is None else full_precision(shared_keys)
    scores = None if own is None else (queries * full_precision(own)).sum(1)
    index = positive if own is None else None
    pairs = Pairs(index, mask=_as_function(mask), width=m, decoupled=decoupled)
    counts = [m for _, m, _ in shares]
    gathered = len(counts) > 1 and sum(counts) > 0
    if gathered and gather == "ring":
        odds = ring_odds(queries, keys, scores, pairs, shared_keys, counts)
        return _weighted(odds if decoupled else F.softplus(odds, threshold=88), reduction, shares)

    if gathered:
        keys, pairs = all_gather(keys, counts), pairs.moved(first_row(counts))
    if shared_keys is not None:
        keys = torch.cat([keys, shared_keys])
    losses = swept(partial(row_sweep, pairs=pairs), queries, keys, scores, summed=reduction != "none")
    return _weighted(losses, reduction, shares)


def _check_candidates(
    queries: Tensor, keys: Tensor, positive: Tensor, shared_keys: Tensor | None, mask: Tensor | Mask | None
) -> None:
    if positive.ndim == 2 and positive.is_floating_point():
        if positive.shape != queries.shape:
            raise ValueError(
                f"positive has shape {tuple(positive.shape)}, queries {tuple(queries.shape)}: "
                f"pass an own key for each query (n d), or an integer (n)"
            )
        positive = torch.zeros(len(queries), dtype=torch.int64, device="meta")
    check_pairs(queries, keys, positive)
    if shared_keys is not None and (shared_keys.ndim != 2 or shared_keys.shape[1] != queries.shape[1]):
        raise ValueError(f"shared_keys have shape {tuple(shared_keys.shape)}: pass k d with d = {queries.shape[1]}")
    if isinstance(mask, Tensor) and (mask.dtype != torch.bool or mask.shape != (len(queries), len(keys))):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: pass bool of ({len(queries)}, {len(keys)})"
        )


def _check_shares(shares: Shares, decoupled: bool, in_keys: bool, shared: int) -> None:
    """What only shows with the numbers (n, m, d) of all processes: all raise alike, so that none waits for another."""
    if len({d for _, _, d in shares}) > 1:
        raise ValueError(f"processes pass vectors of d = {[d for _, _, d in shares]}: pass the same d on all of them")
    if sum(n for n, _, _ in shares) == 0:
        raise ValueError("queries are empty: pass at least one")
    negatives = sum(m for _, m, _ in shares) + shared - in_keys
    if decoupled and negatives < 1:
        raise ValueError("decoupled=True compares with negatives only and there are none: pass more keys")


def _as_function(mask: Tensor | Mask | None) -> Mask | None:
    return (lambda rows, cols: mask[rows, cols]) if isinstance(mask, Tensor) else mask


def _weighted(losses: Tensor, reduction: str, shares: Shares) -> Tensor:
    """Reduce, so that the average over processes is the mean over the joint batch: shares[rank][0] rows a process."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() * (len(shares) / sum(share[0] for share in shares))


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    decoupled: bool = False,
    reduction: Reduction = "mean",
    gather: Gather = None,
) -> Tensor:
    """NT-Xent: InfoNCE by cosine among both views of all images, a view left out of its own candidates.

    l(i, j) = -log( exp(cos(z_i, z_j) / T) / sum_{k != i} exp(cos(z_i, z_k) / T) ), averaged over the 2n ordered
    pairs (i, j) of views of one image   (Chen et al. 2020, equation 1 and algorithm 1)

    An anchor has 2 (n - 1) negatives, n over all processes. google-research/simclr's value is twice this one.

    Args:
        z1, z2: `n d`, the views' projections; normalised here, a zero vector stays zero.
        temperature: T > 0, 0.1 for ImageNet, 0.5 for CIFAR-10 in the paper; a tensor may be learned.
        decoupled: leave the positive out of the sum (DCL; Yeh et al. 2022, equation 6).
        reduction: "mean", "sum" or "none" (`2n`, the first views' losses first).
        gather: see the module's docstring.

    Raises:
        ValueError: shapes that differ, an unknown reduction.

    Example: identical projections give log(2n - 1): `nt_xent(torch.ones(4, 8), torch.ones(4, 8))` is 1.9459 = log 7.
    """
    _check_views(z1, z2)
    _check_temperature(temperature)
    n = len(z1)
    shares: Shares = [(2 * rows, 2 * rows, d) for rows, d in _shares(gather, n, z1.shape[1])]
    _check_shares([(rows, rows - 1, d) for rows, _, d in shares], decoupled, True, 0)
    _check_reduction(reduction, shares)

    views = normalize(torch.cat([z1, z2]))
    bound = _bound(views, temperature)
    if len(shares) == 1 and 2 * bound <= SAFE_RANGE[views.dtype]:
        sweep = partial(symmetric_sweep, bound=bound, decoupled=decoupled)
        losses = swept(sweep, views * temperature**-0.5, summed=reduction != "none")
        return _weighted(losses, reduction, shares)

    itself = torch.arange(2 * n, device=views.device)
    pairs = Pairs(itself.roll(n), itself, decoupled=decoupled)
    queries = views / temperature
    counts = [rows for rows, _, _ in shares]
    if gather == "ring" and len(shares) > 1:
        odds = ring_odds(queries, views, None, pairs, None, counts)
        return _weighted(odds if decoupled else F.softplus(odds, threshold=88), reduction, shares)
    if len(shares) > 1:
        views, pairs = all_gather(views, counts), pairs.moved(first_row(counts))
    losses = swept(partial(row_sweep, pairs=pairs), queries, views, None, summed=reduction != "none")
    return _weighted(losses, reduction, shares)


def _bound(views: Tensor, temperature: float | Tensor) -> float:
    """The largest score of unit vectors, 1/T; infinite where a learned T would have to be fetched from a device."""
    if not isinstance(temperature, Tensor):
        return 1 / temperature
    return 1 / float(temperature.detach()) if temperature.device.type == "cpu" else math.inf


def sup_con(
    views: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    gather: Gather = None,
) -> Tensor:
    """SupCon: contrast with several positives, all views of the anchor's class.

    L_i = -1/|P(i)| sum_{p in P(i)} log( exp(cos_ip / T) / sum_{a != i} exp(cos_ia / T) )
    (Khosla et al. 2020, equation 2, L_out)

    With an image's number for a label, and two views of each image, it is `nt_xent`.

    Args:
        views: `n d`, any number of views of each image; normalised here.
        labels: `n` integers.
        temperature: T > 0; a tensor may be learned.
        reduction: "mean" over the anchors that have a positive, "sum", or "none" (`n`, 0 where there is none).
        gather: see the module's docstring; no "ring".

    Raises:
        ValueError: shapes or dtypes that don't fit, an unknown reduction.

    Example: identical views of one class give log(n - 1):
    `sup_con(torch.ones(4, 8), torch.zeros(4, dtype=torch.long))` is 1.0986 = log 3.
    """
    if views.ndim != 2 or labels.shape != views.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"views have shape {tuple(views.shape)}, labels {tuple(labels.shape)} of {labels.dtype}: "
            f"pass n d and n integers"
        )
    _check_temperature(temperature)
    shares = _shares(gather, len(views), len(views), views.shape[1], ring=False)
    _check_shares(shares, False, False, 0)
    _check_reduction(reduction, shares)
    views, first = normalize(views), 0
    keys, classes = views, labels
    if len(shares) > 1:
        counts = [rows for rows, _, _ in shares]
        keys, classes, first = all_gather(views, counts), all_gather(labels, counts), first_row(counts)

    # the mean over positives of q . k_p is q . (sum of the class's keys - the anchor) / |P|: no matrix is needed
    _, class_of, sizes = torch.unique(classes, return_inverse=True, return_counts=True)
    own_class = class_of[first : first + len(views)]
    positives = sizes[own_class] - 1
    class_sums = keys.new_zeros(len(sizes), keys.shape[1]).index_add(0, class_of, keys)
    queries = views / temperature
    scores = (queries * (class_sums[own_class] - views)).sum(1) / positives.clamp_min(1)

    itself = torch.arange(first, first + len(views), device=views.device)
    sweep = partial(row_sweep, pairs=Pairs(itself=itself, decoupled=True))
    losses = swept(sweep, queries, keys, scores, summed=False)
    losses = torch.where(positives > 0, losses, 0)
    if reduction != "mean":
        return _weighted(losses, reduction, shares)
    anchors = (sizes[class_of] > 1).sum().clamp_min(1)
    return losses.sum() * len(shares) / anchors


def symmetric_info_nce(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    reduction: Reduction = "mean",
    gather: Gather = None,
) -> Tensor:
    """InfoNCE both ways between two modalities: a_i picks b_i among all b, and b_i picks a_i among all a.

    L = 1/2 ( InfoNCE(a -> b) + InfoNCE(b -> a) ) by cosine   (Radford et al. 2021, figure 3)

    Args:
        a, b: `n d`, pairs by row; normalised here.
        temperature: T > 0; a tensor may be learned.
        reduction: "mean", "sum" or "none" (`n`).
        gather: see the module's docstring.

    Raises:
        ValueError: shapes that differ, an unknown reduction.

    Example: identical rows give log n: `symmetric_info_nce(torch.ones(4, 8), torch.ones(4, 8))` is 1.3863 = log 4.
    """
    _check_views(a, b)
    a, b = normalize(a), normalize(b)
    pairs = torch.arange(len(a), device=a.device)
    loss = partial(info_nce, positive=pairs, temperature=temperature, reduction=reduction, gather=gather)
    return (loss(a, b) + loss(b, a)) / 2


def siglip(
    queries: Tensor,
    keys: Tensor,
    positive: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    reduction: Reduction = "mean",
    gather: Gather = None,
) -> Tensor:
    """SigLIP's sigmoid loss: every pair of query and key is a question of its own, match or not.

    L_i = - sum_j log sigmoid( y_ij (q_i . k_j / T + b) ),  y = 1 for the positive, else -1
    (Zhai et al. 2023, section 3.2; their t is 1/T)

    As in `info_nce` nothing is normalised.

    Args:
        queries: `n d`. keys: `m d`, gathered over processes. positive: `n` int64, index into `keys`.
        temperature, bias: numbers, or tensors that are learned; the paper starts at 1/T = 10 and -10.
        reduction: "mean" over queries, "sum" or "none" (`n`).
        gather: see the module's docstring; no "ring".

    Raises:
        ValueError: shapes or dtypes that don't fit, an unknown reduction.

    Example: scores of 0 and no bias give m log 2: `siglip(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([0, 5]),
    bias=0.0)` is 5.5452 = 8 log 2.
    """
    check_pairs(queries, keys, positive)
    _check_temperature(temperature)
    shares = _shares(gather, len(queries), len(keys), queries.shape[1], ring=False)
    _check_shares(shares, False, True, 0)
    _check_reduction(reduction, shares)
    queries, keys = full_precision(queries) / temperature, full_precision(keys)
    if len(shares) > 1:
        counts = [rows for _, rows, _ in shares]
        keys, positive = all_gather(keys, counts), positive + first_row(counts)
    bias = torch.as_tensor(bias, dtype=queries.dtype, device=queries.device)
    losses = swept(partial(sigmoid_sweep, positive=positive), queries, keys, bias, summed=reduction != "none")
    return _weighted(losses, reduction, shares)


class InfoNCELoss(nn.Module):
    """`info_nce` as a module that can hold a learned temperature.

    Args:
        temperature: T > 0, the first value if `learn_temperature`.
        learn_temperature: learn log T, bounded below by 0.01 (CLIP; Radford et al. 2021, section 2.5).
        decoupled, reduction, gather: as in `info_nce`.

    Example: `InfoNCELoss()(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 5]))` is 2.0794 = log 8.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        learn_temperature: bool = False,
        decoupled: bool = False,
        reduction: Reduction = "mean",
        gather: Gather = None,
    ) -> None:
        super().__init__()
        self.temperature = Temperature(temperature, learn=learn_temperature)
        self.options: dict[str, Any] = {"decoupled": decoupled, "reduction": reduction, "gather": gather}

    def forward(
        self,
        queries: Tensor,
        keys: Tensor | None,
        positive: Tensor,
        *,
        shared_keys: Tensor | None = None,
        mask: Tensor | Mask | None = None,
    ) -> Tensor:
        return info_nce(
            queries, keys, positive, shared_keys=shared_keys, mask=mask, temperature=self.temperature(), **self.options
        )


class NTXentLoss(nn.Module):
    """`nt_xent` as a module that can hold a learned temperature; arguments as in `InfoNCELoss`.

    Example: `NTXentLoss()(torch.ones(4, 8), torch.ones(4, 8))` is 1.9459 = log 7.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learn_temperature: bool = False,
        decoupled: bool = False,
        reduction: Reduction = "mean",
        gather: Gather = None,
    ) -> None:
        super().__init__()
        self.temperature = Temperature(temperature, learn=learn_temperature)
        self.options: dict[str, Any] = {"decoupled": decoupled, "reduction": reduction, "gather": gather}

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(z1, z2, temperature=self.temperature(), **self.options)


class Temperature(nn.Module):
    """A temperature: a number, or exp of a parameter, at least `lowest` (CLIP's bound on its logit scale of 100).

    Example: `Temperature(0.07)()` is 0.07; `Temperature(0.07, learn=True)()` is a tensor of 0.07 with a gradient.
    """

    def __init__(self, value: float, *, learn: bool = False, lowest: float = 0.01) -> None:
        super().__init__()
        _check_temperature(value)
        self.value, self.lowest = value, lowest
        self.log_temperature = nn.Parameter(torch.tensor(math.log(value))) if learn else None

    def forward(self) -> float | Tensor:
        if self.log_temperature is None:
            return self.value
        return self.log_temperature.exp().clamp_min(self.lowest)


# ---- without a sum over negatives ----


def negative_cosine(predictions: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """-cos(p_i, z_i), from -1 (aligned) to 1 (Chen and He 2021, equation 1; BYOL's ||p - z||^2 is 2 plus twice this).

    Args:
        predictions, targets: `n d`; normalised here. Stop the targets' gradient where the method says so.
        reduction: "mean", "sum" or "none" (`n`).

    Raises ValueError where shapes differ. Example: `negative_cosine(torch.ones(3, 4), torch.ones(3, 4))` is -1.
    """
    _check_views(predictions, targets)
    _check_reduction(reduction, [()])
    return _reduce(-(normalize(predictions) * normalize(targets)).sum(1), reduction)


def alignment(z1: Tensor, z2: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Mean distance between positives, E ||z1_i - z2_i||^alpha on the unit sphere (Wang and Isola 2020, section 4.1.1).

    Args:
        z1, z2: `n d`; normalised here. alpha: the distance's power, 2 in the paper.

    Raises ValueError where shapes differ. Example: opposite unit vectors give 4:
    `alignment(torch.eye(3), -torch.eye(3))`.
    """
    _check_views(z1, z2)
    return torch.linalg.vector_norm(normalize(z1) - normalize(z2), dim=1).pow(alpha).mean()


def uniformity(features: Tensor, *, t: float = 2.0, gather: Gather = None) -> Tensor:
    """How evenly features cover the unit sphere: log E exp(-t ||x - y||^2) over distinct pairs, 0 on collapse.

    (Wang and Isola 2020, section 4.1.2.)

    Args:
        features: `n d`, n at least 2; normalised here. t: > 0, 2 in the paper.
        gather: pairs over all processes; every process gets the joint batch's value.

    Raises ValueError for another shape. Example: two opposite unit vectors give -4 t:
    `uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))` is -8.
    """
    counts = [rows for (rows,) in _shares(gather, len(features), ring=False)]
    if features.ndim != 2 or sum(counts) < 2:
        raise ValueError(f"features have shape {tuple(features.shape)}: pass n d with at least two rows")
    features, first = normalize(features), 0
    keys = features
    if len(counts) > 1:
        keys, first = all_gather(features, counts), first_row(counts)
    itself = torch.arange(first, first + len(features), device=features.device)
    sweep = partial(row_sweep, pairs=Pairs(itself=itself, decoupled=True))
    rows = swept(sweep, features * (2 * t), keys, None, summed=False)
    rows = all_gather(rows, counts) if len(counts) > 1 else rows
    # ||x - y||^2 = |x|^2 + |y|^2 - 2 x . y, the squares being 1
    return rows.logsumexp(0) - 2 * t - math.log(len(rows) * (len(rows) - 1))


def margin_contrastive(
    z1: Tensor, z2: Tensor, same: Tensor, *, margin: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """Pull pairs of a kind together, push others at least a margin apart.

    L = 1/2 D^2 for a pair of a kind, 1/2 max(0, m - D)^2 for another, D = ||z1 - z2||
    (Hadsell, Chopra and LeCun 2006, equation 4, whose Y = 0 is our `same`)

    Args:
        z1, z2: `n d`, not normalised here; unit vectors are at most 2 apart.
        same: `n` bool, True = a pair of a kind.
        margin: m > 0, in the units of D.
        reduction: "mean", "sum" or "none" (`n`).

    Raises ValueError for shapes or dtypes that don't fit. Example: two coinciding vectors of different kinds cost
    m^2 / 2: `margin_contrastive(torch.ones(1, 4), torch.ones(1, 4), torch.tensor([False]))` is 0.5.
    """
    _check_same(z1, z2, same, reduction)
    difference = full_precision(z1) - full_precision(z2)
    # squared for pairs of a kind: the root's slope at 0 is infinite (for others torch takes 0)
    apart = (margin - torch.linalg.vector_norm(difference, dim=1)).clamp_min(0)
    return _reduce(torch.where(same, difference.square().sum(1), apart.square()) / 2, reduction)


def exponential_contrastive(
    z1: Tensor, z2: Tensor, same: Tensor, *, bound: float, reduction: Reduction = "mean"
) -> Tensor:
    """The contrastive loss of face verification, by L1 distance.

    L = 2/Q E^2 for a pair of a kind, 2 Q exp(-2.77 E / Q) for another, E = |z1 - z2|_1
    (Chopra, Hadsell and LeCun 2005, equation 8)

    Args:
        z1, z2: `n d`. same: `n` bool, True = a pair of a kind.
        bound: Q > 0, the largest E that the network's output allows (for d outputs in 0..1 it is d).
        reduction: "mean", "sum" or "none" (`n`).

    Raises ValueError for shapes or dtypes that don't fit. Example: two coinciding vectors of different kinds cost 2 Q:
    `exponential_contrastive(torch.ones(1, 4), torch.ones(1, 4), torch.tensor([False]), bound=4)` is 8.
    """
    _check_same(z1, z2, same, reduction)
    energy = (full_precision(z1) - full_precision(z2)).abs().sum(1)
    return _reduce(torch.where(same, 2 / bound * energy**2, 2 * bound * (-2.77 / bound * energy).exp()), reduction)


def _check_same(z1: Tensor, z2: Tensor, same: Tensor, reduction: str) -> None:
    _check_views(z1, z2)
    _check_reduction(reduction, [()])
    if same.shape != z1.shape[:1] or same.dtype != torch.bool:
        raise ValueError(f"same has shape {tuple(same.shape)} and dtype {same.dtype}: pass {len(z1)} bools")


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy of the student's softened predictions under the teacher's.

    L = - sum_y P_T(y; T) log P_S(y; T), P(y; T) = softmax(logits / T)_y   (Chen et al. 2020b, SimCLRv2, equation 2)

    Differs from Hinton et al. 2015 and from SimCLRv2's published code: not multiplied by T^2.

    Args:
        student_logits, teacher_logits: `n classes`; the teacher gets no gradient.
        temperature: T > 0: 0.1 for self-distillation, 1 from a big to a small network in the paper.
        reduction: "mean", "sum" or "none" (`n`).

    Raises ValueError where shapes differ. Example: flat logits give log(classes):
    `distillation(torch.zeros(2, 10), torch.zeros(2, 10))` is 2.3026 = log 10.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits have shapes {tuple(student_logits.shape)} (student) and {tuple(teacher_logits.shape)} (teacher): "
            f"pass n classes twice"
        )
    _check_temperature(temperature)
    _check_reduction(reduction, [()])
    taught = (full_precision(teacher_logits.detach()) / temperature).softmax(1)
    return _reduce(-(taught * (full_precision(student_logits) / temperature).log_softmax(1)).sum(1), reduction)
