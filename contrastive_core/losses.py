"""Contrastive losses: which key, out of these, belongs to this query?

Pure functions of tensors, and thin modules around the two best known; importing this module loads torch and einops
only. All of them

- are exact at any size without holding the matrix of scores (`contrastive_core.sweep`);
- compute in float32 (float64 for float64 inputs), whatever the inputs' precision or autocast, and return that;
- let NaN through, never a plausible number in its place; an infinity shows in the loss or in its gradients.

Those that compare images with one another take the keys of all processes, each with its full gradient
(`contrastive_core.gather`). `gather`: None or True = where torch.distributed is initialised; False = this process's
keys only, as evaluation on one process must say; "ring" = keys of all processes, of which a few shares are held at a
time (`contrastive_core.ring`). Each process gives back the mean over its own queries, weighted where processes hold
different numbers, so that DDP's average of losses and gradients is that of the joint batch. `reduction="none"` gives
this process's rows as they are; `"sum"` is refused where keys are gathered, since DDP's average would be the sum over
the number of processes. The losses without a `gather` are plain means over this process's rows.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive_core.gather import all_gather, first_row
from contrastive_core.kernels import fastest_row_sweep, supported
from contrastive_core.loss_arguments import (
    Gather,
    Reduction,
    Shares,
    agreed_shares,
    check_negatives,
    labels_problem,
    mask_problem,
    options_problem,
    own_key_problem,
    pairs_problem,
    raise_if,
    same_problem,
    shared_keys_problem,
    views_problem,
)
from contrastive_core.ring import ring_log_odds
from contrastive_core.sweep import (
    SAFE_SCORE,
    SECOND_DERIVATIVES,
    Mask,
    Pairs,
    full_precision,
    full_precision_of,
    scaled_rows,
    scaled_rows_gradient,
    side_by_side,
    sigmoid_sweep,
    swept,
    symmetric_sweep,
    two_view_sweep,
)


def _scale(reduction: str, shares: Shares) -> float | None:
    """What to multiply the sum of this process's losses by; None = don't sum.

    For the mean 1 / queries of the joint batch, times the processes, over which DDP averages.
    """
    return {"none": None, "sum": 1.0, "mean": len(shares) / sum(n for n, _ in shares)}[reduction]


def _reduced(losses: Tensor, scale: float | None) -> Tensor:
    return losses if scale is None else losses.sum() * scale


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    return {"mean": losses.mean, "sum": losses.sum}.get(reduction, lambda: losses)()


# ---- contrasting with many keys ----


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        unit, inverse = scaled_rows(rows, 1.0)
        ctx.save_for_backward(unit, inverse)
        return unit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError(SECOND_DERIVATIVES)
        unit, inverse = ctx.saved_tensors
        return scaled_rows_gradient(gradient, unit, inverse, 1.0)


def normalize(rows: Tensor) -> Tensor:
    """Rows `n d` over their L2 norms, in float32 (float64 for float64); a zero row stays zero, its gradient too.

    An epsilon under the norm, as elsewhere, is 0 in float16 and a gradient of 1e12 in float32.

    Example: `normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))` is [[0.6, 0.8], [0, 0]].
    """
    if rows.ndim != 2:
        raise ValueError(f"rows have shape {tuple(rows.shape)}: pass n d")
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
            is asked for a block at a time, more than once. It covers `keys`; shared keys and those of other
            processes are compared. Neither it nor `positive` may change before the backward pass.
        decoupled: leave the positive out of the sum (DCL; Yeh et al. 2022, equation 6). A query without negatives,
            whose loss is 0 otherwise, is refused: the logarithm of an empty sum is no loss.
        reduction: "mean", "sum" or "none" (`n`).
        gather: see the module's docstring.

    Raises:
        ValueError: shapes or dtypes that don't fit, a mask that leaves out a positive or, decoupled, all negatives of
            a query, an unknown reduction.

    Example: identical keys give log m: `info_nce(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 5]))` is
    2.0794 = log 8.
    """
    own = positive if positive.ndim == 2 and positive.is_floating_point() else None
    index = positive if own is None else None
    problem = ""
    if keys is None:
        if own is None or shared_keys is None:
            problem = "keys=None: pass shared_keys, and each query's own key as positive (n d)"
        keys = queries.detach()[:0] if queries.ndim else queries.detach()  # or the queue would get a gradient
    problem = (
        problem
        or (pairs_problem(queries, keys, positive) if own is None else own_key_problem(queries, keys, own))
        or shared_keys_problem(shared_keys, queries.shape[1])
        or mask_problem(mask, len(queries), len(keys), index)
        or options_problem(temperature, reduction)
    )
    shares = agreed_shares(problem, gather, queries, keys, reduction=reduction)
    counts, scale = [m for _, m in shares], _scale(reduction, shares)
    check_negatives(decoupled, sum(counts) + (0 if shared_keys is None else len(shared_keys)) - (own is None))

    precision = full_precision_of(queries, keys, shared_keys, own)
    queries, keys = queries.to(precision) / _exact(temperature, precision), keys.to(precision)
    shared_keys = None if shared_keys is None else shared_keys.to(precision)
    scores = None if own is None else (queries * own.to(precision)).sum(1)
    # a mask may leave a query nothing to be compared with where it covers all keys that there are
    covered = len(counts) == 1 and (shared_keys is None or len(shared_keys) == 0)
    least = 1 + (own is None) if decoupled and covered else 0
    pairs = Pairs(index, mask=_as_function(mask), width=len(keys), least=least, decoupled=decoupled)
    gathered = len(counts) > 1 and sum(counts) > 0
    if gathered and gather == "ring":
        log_odds = ring_log_odds(queries, keys, scores, pairs, shared_keys, counts)
        return _reduced(log_odds if decoupled else F.softplus(log_odds, threshold=88), scale)
    if gathered:
        keys, pairs = all_gather(keys, counts), pairs.moved(first_row(counts))
    if shared_keys is not None:
        keys = torch.cat([keys, shared_keys])
    return swept(partial(fastest_row_sweep, pairs=pairs), queries, keys, scores, scale=scale)


def _as_function(mask: Tensor | Mask | None) -> Mask | None:
    return (lambda rows, cols: mask[rows, cols]) if isinstance(mask, Tensor) else mask


def cosine_info_nce(
    queries: Tensor,
    keys: Tensor,
    positive: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    mask: Tensor | Mask | None = None,
    decoupled: bool = False,
    reduction: Reduction = "mean",
    gather: Gather = None,
) -> Tensor:
    """`info_nce` by cosine: NT-Xent where queries and keys are different things, CPC's predictions and targets.

    L_i = -log( exp(cos(q_i, k_p(i)) / T) / sum_j exp(cos(q_i, k_j) / T) )   (Chen et al. 2020, equation 1)

    Differs from the paper: a prediction is not among the targets, so no key is left out as the query itself.

    Args:
        queries: `n d`. keys: `m d`. positive: `n` int64, index into `keys`. Normalised here, a zero row stays zero.
        temperature: T > 0, 0.1 in the paper; a tensor may be learned.
        mask, decoupled, reduction, gather: as in `info_nce`.

    Raises:
        ValueError: as `info_nce` does.

    Example: keys of one direction give log m, whatever their lengths:
    `cosine_info_nce(torch.ones(2, 4), torch.arange(1.0, 9)[:, None].expand(8, 4), torch.tensor([0, 5]))` is
    2.0794 = log 8.
    """
    problem = pairs_problem(queries, keys, positive) or options_problem(temperature, reduction)
    agreed_shares(problem, gather, queries, keys, reduction=reduction)  # or a wrong shape would raise on one process
    return info_nce(
        normalize(queries),
        normalize(keys),
        positive,
        temperature=temperature,
        mask=mask,
        decoupled=decoupled,
        reduction=reduction,
        gather=gather,
    )


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    shared_keys: Tensor | None = None,
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
        shared_keys: `k d`, further negatives of every anchor, the same on every process and never gathered
            (SimCLRv2's memory); normalised here too.
        temperature: T > 0, 0.1 for ImageNet, 0.5 for CIFAR-10 in the paper; a tensor may be learned.
        decoupled: leave the positive out of the sum (DCL; Yeh et al. 2022, equation 6).
        reduction: "mean", "sum" or "none" (`2n`, the first views' losses first).
        gather: see the module's docstring.

    Raises:
        ValueError: shapes that differ, an unknown reduction.

    Example: identical projections give log(2n - 1): `nt_xent(torch.ones(4, 8), torch.ones(4, 8))` is 1.9459 = log 7.
    """
    problem = views_problem(z1, z2) or options_problem(temperature, reduction)
    problem = problem or shared_keys_problem(shared_keys, z1.shape[1])
    images = agreed_shares(problem, gather, z1, z2, reduction=reduction)
    shares = [(2 * rows, 2 * rows) for rows, _ in images]
    check_negatives(decoupled, sum(rows for rows, _ in shares) - 2 + (0 if shared_keys is None else len(shared_keys)))
    scale = _scale(reduction, shares)
    precision = full_precision_of(z1, z2, shared_keys)
    z1, z2, temperature = z1.to(precision), z2.to(precision), _exact(temperature, precision)
    largest = _largest_score(temperature)
    shared = None if shared_keys is None else normalize(shared_keys.to(precision))
    by_rows = len(shares) > 1 or largest > SAFE_SCORE[precision] or supported(z1, z2, Pairs())
    if by_rows or shared is not None:
        views = normalize(side_by_side(z1, z2))
        losses = _nt_xent_by_rows(views, shared, temperature, decoupled, shares, scale, gather)
    elif isinstance(temperature, Tensor):
        views = normalize(side_by_side(z1, z2)) * temperature**-0.5
        losses = swept(partial(symmetric_sweep, decoupled=decoupled), views, scale=scale)
    else:
        sweep = partial(two_view_sweep, length=temperature**-0.5, decoupled=decoupled)
        losses = swept(sweep, z1, z2, scale=scale)
    return losses if scale is not None else losses.view(-1, 2).T.flatten()  # the first views' losses first


def _nt_xent_by_rows(
    views: Tensor,
    shared: Tensor | None,
    temperature: float | Tensor,
    decoupled: bool,
    shares: Shares,
    scale: float | None,
    gather: Gather,
) -> Tensor:
    """Queries and keys apart: where there are keys that are no queries, or scores are too large to sum as they are."""
    itself = torch.arange(len(views), device=views.device)
    pairs = Pairs(itself.view(-1, 2).flip(1).flatten(), itself, decoupled=decoupled)
    queries = views / temperature
    counts = [rows for rows, _ in shares]
    if gather == "ring" and len(shares) > 1:
        log_odds = ring_log_odds(queries, views, None, pairs, shared, counts)
        return _reduced(log_odds if decoupled else F.softplus(log_odds, threshold=88), scale)
    if len(shares) > 1:
        views, pairs = all_gather(views, counts), pairs.moved(first_row(counts))
    if shared is not None:
        views = torch.cat([views, shared])
    return swept(partial(fastest_row_sweep, pairs=pairs), queries, views, None, scale=scale)


def two_view_info_nce(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    decoupled: bool = False,
    reduction: Reduction = "mean",
    gather: Gather = None,
) -> Tensor:
    """InfoNCE by dot product among both views of all images: `nt_xent` of projections that are not normalised.

    l(i, j) = -log( exp(z_i . z_j / T) / sum_{k != i} exp(z_i . z_k / T) ), averaged over the 2n ordered
    pairs (i, j) of views of one image   (Chen et al. 2020, table 5, the rows without an l2 norm)

    Args:
        z1, z2: `n d`, the views' projections; their lengths count.
        temperature: T > 0; the paper's rows have 10 and 100. A tensor may be learned.
        decoupled, reduction, gather: as in `nt_xent`. Decoupled it has no lower bound: lengths grow without end.

    Raises:
        ValueError: shapes that differ, an unknown reduction.

    Example: identical projections give log(2n - 1):
    `two_view_info_nce(torch.ones(4, 8), torch.ones(4, 8))` is 1.9459 = log 7.
    """
    problem = views_problem(z1, z2) or options_problem(temperature, reduction)
    images = agreed_shares(problem, gather, z1, z2, reduction=reduction)
    shares = [(2 * rows, 2 * rows) for rows, _ in images]
    check_negatives(decoupled, sum(rows for rows, _ in shares) - 2)
    scale = _scale(reduction, shares)
    precision = full_precision_of(z1, z2)
    views = side_by_side(z1.to(precision), z2.to(precision))
    losses = _nt_xent_by_rows(views, None, _exact(temperature, precision), decoupled, shares, scale, gather)
    return losses if scale is not None else losses.view(-1, 2).T.flatten()  # the first views' losses first


def _exact(temperature: float | Tensor, precision: torch.dtype) -> float | Tensor:
    """A learned temperature as a scalar of the precision that everything is computed in."""
    return temperature.to(precision).reshape(()) if isinstance(temperature, Tensor) else temperature


def _largest_score(temperature: float | Tensor) -> float:
    """Of unit vectors, 1/T; infinite where a learned T would have to be fetched from a device, or out of a graph."""
    if not isinstance(temperature, Tensor):
        return 1 / temperature
    known = temperature.device.type == "cpu" and not torch.compiler.is_compiling()
    return 1 / float(temperature.detach()) if known else math.inf


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
        labels: `n` integers; each is a class, -1 like any other.
        temperature: T > 0; a tensor may be learned.
        reduction: "mean" over the anchors that have a positive, "sum", or "none" (`n`, 0 where there is none).
        gather: see the module's docstring; no "ring".

    Raises:
        ValueError: shapes or dtypes that don't fit, an unknown reduction.

    Example: identical views of one class give log(n - 1):
    `sup_con(torch.ones(4, 8), torch.zeros(4, dtype=torch.long))` is 1.0986 = log 3.
    """
    problem = labels_problem(views, labels) or options_problem(temperature, reduction)
    shares = agreed_shares(problem, gather, views, views, reduction=reduction, ring=False)
    views, first = normalize(views), 0
    keys, classes = views, labels
    if len(shares) > 1:
        counts = [rows for rows, _ in shares]
        keys, classes, first = all_gather(views, counts), all_gather(labels, counts), first_row(counts)

    queries = views / _exact(temperature, views.dtype)
    itself = torch.arange(first, first + len(views), device=views.device)
    _, class_of, sizes = torch.unique(classes, return_inverse=True, return_counts=True)
    own_class = class_of[itself]
    positives = sizes[own_class] - 1

    # one positive: InfoNCE, whose small losses keep their digits
    index_sums = sizes.new_zeros(len(sizes)).index_add(0, class_of, torch.arange(len(keys), device=views.device))
    one = (positives == 1).nonzero().squeeze(1)
    pair = Pairs(index_sums[own_class[one]] - itself[one], itself[one])
    paired = swept(partial(fastest_row_sweep, pairs=pair), queries[one], keys, None, scale=None)

    # several: their mean score is q . (the class's sum - the anchor) / |P|, which takes no matrix
    several = (positives != 1).nonzero().squeeze(1)
    class_sums = keys.new_zeros(len(sizes), keys.shape[1]).index_add(0, class_of, keys)
    scores = (queries * (class_sums[own_class] - views)).sum(1) / positives.clamp_min(1)
    others = Pairs(itself=itself[several], decoupled=True)
    spread = swept(partial(fastest_row_sweep, pairs=others), queries[several], keys, scores[several], scale=None)
    losses = queries.new_zeros(len(views)).index_add(0, one, paired).index_add(0, several, spread)
    losses = torch.where(positives > 0, losses, 0)
    if reduction != "mean":
        return _reduced(losses, _scale(reduction, shares))
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
    problem = views_problem(a, b) or options_problem(temperature, reduction)
    agreed_shares(problem, gather, a, b, reduction=reduction)
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
    problem = pairs_problem(queries, keys, positive) or options_problem(temperature, reduction)
    if isinstance(bias, Tensor) and bias.numel() != 1:
        problem = problem or f"bias has shape {tuple(bias.shape)}: pass one number"
    shares = agreed_shares(problem, gather, queries, keys, reduction=reduction, ring=False)
    precision = full_precision_of(queries, keys)
    queries, keys = queries.to(precision) / _exact(temperature, precision), keys.to(precision)
    if len(shares) > 1:
        counts = [m for _, m in shares]
        keys, positive = all_gather(keys, counts), positive + first_row(counts)
    bias = torch.as_tensor(bias, dtype=precision, device=queries.device).reshape(())
    sweep = partial(sigmoid_sweep, positive=positive)
    return swept(sweep, queries, keys, bias, scale=_scale(reduction, shares))


class InfoNCELoss(nn.Module):
    """`info_nce` as a module that can hold a learned temperature.

    Args:
        temperature: T > 0, the first value if `learn_temperature`.
        learn_temperature: learn log T, bounded below by 0.01 (CLIP; Radford et al. 2021, section 2.5).
        decoupled, reduction, gather: as in `info_nce`; a call's own `gather` goes before the module's.

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
        gather: Gather = None,
    ) -> Tensor:
        options = self.options | ({} if gather is None else {"gather": gather})
        return info_nce(
            queries, keys, positive, shared_keys=shared_keys, mask=mask, temperature=self.temperature(), **options
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

    def forward(self, z1: Tensor, z2: Tensor, *, shared_keys: Tensor | None = None, gather: Gather = None) -> Tensor:
        options = self.options | ({} if gather is None else {"gather": gather})
        return nt_xent(z1, z2, shared_keys=shared_keys, temperature=self.temperature(), **options)


class SigmoidLoss(nn.Module):
    """`siglip` as a module that learns its temperature and bias, of queries and keys or of two views.

    L = -1/n sum_ij log sigmoid( y_ij (q_i . k_j / T + b) ),  y = 1 for a query's positive, else -1
    (Zhai et al. 2023, algorithm 1; their t' is -log T)

    Args:
        temperature: T > 0, the first value if `learn`; with `learn` at least 0.01.
        bias: b, the first value if `learn`. The paper's, -10, answers "no match" to all pairs of unit vectors.
        learn: learn log T and b, of shape (1,) each in the state_dict. Differs from the paper: T is bounded below by
            0.01 (`Temperature`). Give the optimizer both without weight decay.
        normalised: compare by cosine as the paper does; False = by dot product.
        reduction, gather: as in `siglip`; a call's own `gather` goes before the module's.

    Called with `queries: n d, keys: m d, positive: n`, or with two views `n d` each: `positive=None` says that row i
    belongs to row i. Two views are compared with each other, not among themselves, as the paper's images and texts.

    Example: scores of 0 and no bias give m log 2: `SigmoidLoss(bias=0.0)(torch.zeros(2, 4), torch.ones(8, 4),
    torch.tensor([0, 5]))` is 5.5452 = 8 log 2.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        *,
        learn: bool = True,
        normalised: bool = True,
        reduction: Reduction = "mean",
        gather: Gather = None,
    ) -> None:
        super().__init__()
        self.temperature = Temperature(temperature, learn=learn)
        self.bias = nn.Parameter(torch.tensor([float(bias)])) if learn else bias
        self.normalised, self.reduction, self.gather = normalised, reduction, gather
        self.register_load_state_dict_pre_hook(_numbers_as_rows_)

    def forward(
        self, queries: Tensor, keys: Tensor, positive: Tensor | None = None, *, gather: Gather = None
    ) -> Tensor:
        gather = self.gather if gather is None else gather
        problem = views_problem(queries, keys) if positive is None else pairs_problem(queries, keys, positive)
        agreed_shares(problem, gather, queries, keys, reduction=self.reduction, ring=False)
        if positive is None:
            positive = torch.arange(len(queries), device=queries.device)
        if self.normalised:
            queries, keys = normalize(queries), normalize(keys)
        options: dict[str, Any] = {"reduction": self.reduction, "gather": gather}
        return siglip(queries, keys, positive, temperature=self.temperature(), bias=self.bias, **options)


class Temperature(nn.Module):
    """A temperature: a number, or exp of a parameter, at least `lowest` (CLIP's bound on its logit scale of 100).

    The parameter has the shape (1,), since weights are split over processes by rows (`contrastive_core.sharding`).

    Example: `Temperature(0.07)()` is 0.07; `Temperature(0.07, learn=True)()` is a scalar of 0.07 with a gradient.
    """

    def __init__(self, value: float, *, learn: bool = False, lowest: float = 0.01) -> None:
        super().__init__()
        if not value >= (lowest if learn else math.ulp(0.0)):
            raise ValueError(f"temperature={value}: pass a number above 0, and if it is learned at least {lowest}")
        self.value, self.lowest = value, lowest
        self.log_temperature = nn.Parameter(torch.tensor([math.log(value)])) if learn else None
        self.register_load_state_dict_pre_hook(_numbers_as_rows_)

    def forward(self) -> float | Tensor:
        if self.log_temperature is None:
            return self.value
        self.bound_()
        return self.log_temperature.exp().reshape(())

    @torch.no_grad()
    def bound_(self) -> None:
        """Put log T back to its bound, the parameter itself, as CLIP does.

        A clamp of its value alone would have no gradient to rise again; with one, the parameter would fall on and be
        long in coming back. Of weights that are split over processes `shard_` bounds what is held.
        """
        if self.log_temperature is not None:
            self.log_temperature.clamp_(min=math.log(self.lowest))


def _numbers_as_rows_(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Read a module's learned numbers, of shape (1,), from a state in which they are scalars, as they once were."""
    for key in [prefix + name for name, _ in module.named_parameters(recurse=False)]:
        if isinstance(state.get(key), Tensor) and state[key].ndim == 0:
            state[key] = state[key].reshape(1)


# ---- without a sum over negatives ----


def negative_cosine(predictions: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """-cos(p_i, z_i), from -1 (aligned) to 1 (Chen and He 2021, equation 1; BYOL's ||p - z||^2 is 2 plus twice this).

    Args:
        predictions, targets: `n d`; normalised here. Stop the targets' gradient where the method says so.
        reduction: "mean", "sum" or "none" (`n`).

    Raises ValueError where shapes differ. Example: `negative_cosine(torch.ones(3, 4), torch.ones(3, 4))` is -1.
    """
    raise_if(views_problem(predictions, targets) or options_problem(1, reduction))
    return _reduce(-(normalize(predictions) * normalize(targets)).sum(1), reduction)


def alignment(z1: Tensor, z2: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Mean distance between positives, E ||z1_i - z2_i||^alpha on the unit sphere (Wang and Isola 2020, section 4.1.1).

    Args:
        z1, z2: `n d`; normalised here. alpha: the distance's power, 2 in the paper.

    Raises ValueError where shapes differ. Example: opposite unit vectors give 4:
    `alignment(torch.eye(3), -torch.eye(3))`.
    """
    raise_if(views_problem(z1, z2))
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
    wanted = "pass n d with at least two rows"
    problem = "" if features.ndim == 2 else f"features have shape {tuple(features.shape)}: {wanted}"
    shares = agreed_shares(problem, gather, features, features, ring=False)
    counts = [rows for rows, _ in shares]
    if sum(counts) < 2:
        raise ValueError(f"features have shape {tuple(features.shape)}: {wanted}")
    features, first = normalize(features), 0
    keys = features
    if len(counts) > 1:
        keys, first = all_gather(features, counts), first_row(counts)
    itself = torch.arange(first, first + len(features), device=features.device)
    sweep = partial(fastest_row_sweep, pairs=Pairs(itself=itself, decoupled=True))
    rows = swept(sweep, features * (2 * t), keys, None, scale=None)
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
    if not margin > 0:
        raise ValueError(f"margin={margin}: pass a number above 0")
    raise_if(same_problem(z1, z2, same) or options_problem(1, reduction))
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
    if not bound > 0:
        raise ValueError(f"bound={bound}: pass a number above 0")
    raise_if(same_problem(z1, z2, same) or options_problem(1, reduction))
    energy = (full_precision(z1) - full_precision(z2)).abs().sum(1)
    return _reduce(torch.where(same, 2 / bound * energy**2, 2 * bound * (-2.77 / bound * energy).exp()), reduction)


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
    raise_if(options_problem(temperature, reduction))
    taught = (full_precision(teacher_logits.detach()) / temperature).softmax(1)
    return _reduce(-(taught * (full_precision(student_logits) / temperature).log_softmax(1)).sum(1), reduction)
