"""The softmax over all pairs, exact, without ever holding the matrix of scores.

A loss that compares n queries with m keys needs the scores S_ij = q_i . k_j only to sum over them. So a sweep goes
over blocks of rows: it computes a block of scores, reduces it to a loss a row and, where a gradient is wanted, to what
the block adds to the gradients, and forgets it. Memory is O(n d + m d + block) in place of O(n m).

Everything is said with the *negatives*, the candidates that are not the positive p(i):

    X_i = log sum_j exp(S_ij)        over the negatives j of i
    L_i = log(1 + exp(X_i - S_ip))   InfoNCE, the cross-entropy of picking the positive
    L_i = X_i - S_ip                 decoupled (DCL, Yeh et al. 2022, equation 6), with dL_i/dX_i = 1

With w_i = dL_i/dX_i (InfoNCE: 1 - P(positive)) and N_ij = exp(S_ij - X_i), the gradients are

    dL/dq_i = w_i (sum_j N_ij k_j - k_p)        dL/dk_j = sum_i w_i N_ij q_i, less w_i q_i for the positive

Unlike 1 - softmax, w_i keeps its digits when the positive wins by far: a loss of 1e-12 is 1e-12, not rounding.

Two kinds of sweep share the work:
- `row_sweep`: any queries and keys. A block is some rows and all columns, so a row's sum is known while the block is
  still there: three products of matrices, forward and backward together.
- `symmetric_sweep`: the queries are the keys (NT-Xent in one process). S is symmetric, so only blocks on and above
  the diagonal are computed, twice: two products' worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Mask = Callable[[slice, slice], Tensor]
"""A block of a mask: (row slice, column slice) -> bool, True = compared."""

Weights = Tensor | float | None
"""Of each row's loss in what is differentiated: `n`, the same number for all, or None = no gradient is wanted."""

Sweep = Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]
"""sweep(*tensors, weights=None, needs) -> a loss a row, and gradients of sum(weights * losses) for what needs them."""


@dataclass(frozen=True)
class Pairs:
    """Which keys a query is compared with, and which of them is its positive.

    positive: `n` int64, the positive's column; None where the caller brings the positive's score.
    itself: `n` int64, a column that is left out (NT-Xent: the query itself).
    mask: for the `width` columns from `first` on; all others are compared.
    least: keys that the mask has to let through in every row.
    decoupled: leave the positive out of the sum.
    """

    positive: Tensor | None = None
    itself: Tensor | None = None
    mask: Mask | None = None
    first: int = 0
    width: int = 0
    least: int = 0
    decoupled: bool = False

    def negatives_(self, scores: Tensor, rows: slice) -> Tensor:
        """Set the scores `r m` of these rows to -inf wherever a key is not a negative, in place."""
        if self.mask is not None:
            allowed = self.mask(rows, slice(0, self.width))
            problem = block_problem(allowed, rows, self.width)
            if not problem and self.positive is not None:
                own = allowed.gather(1, self.positive[rows, None] - self.first).squeeze(1)
                problem = masked_positive_problem(own, rows.start)
            if not problem and self.least:
                problem = masked_negatives_problem(allowed.sum(1) >= self.least, rows.start)
            if problem:
                raise ValueError(problem)
            scores[:, self.first : self.first + self.width].masked_fill_(~allowed, -torch.inf)
        for column in (self.positive, self.itself):
            if column is not None:
                scores.scatter_(1, column[rows, None], -torch.inf)
        return scores

    def moved(self, by: int) -> Pairs:
        """The same pairs among keys in front of which `by` others were put."""
        positive = None if self.positive is None else self.positive + by
        itself = None if self.itself is None else self.itself + by
        return replace(self, positive=positive, itself=itself, first=self.first + by)


def block_problem(allowed: Tensor, rows: slice, width: int) -> str:
    """What a mask function gave is a bool block; "" = it is."""
    expected = (rows.stop - rows.start, width)
    if isinstance(allowed, Tensor) and allowed.dtype == torch.bool and allowed.shape == expected:
        return ""
    got = f"{allowed.dtype} of shape {tuple(allowed.shape)}" if isinstance(allowed, Tensor) else allowed
    return f"mask gave {got} for {rows}: return bool of {expected}"


def masked_positive_problem(own: Tensor, first: int) -> str:
    """A mask lets every positive through; "" = it does. `own`: `n` bool, of the queries from number `first` on."""
    if own.all():
        return ""
    row = first + int((~own).nonzero()[0])
    return f"the mask leaves out the positive of query {row}: set it True, or drop that query"


def masked_negatives_problem(enough: Tensor, first: int) -> str:
    """A mask lets every query have a negative; "" = it does. `enough`: `n` bool, of the queries from `first` on."""
    if enough.all():
        return ""
    row = first + int((~enough).nonzero()[0])
    compared = "decoupled=True compares with negatives only"
    return f"{compared} and the mask leaves query {row} none: set another key True, or drop that query"


def full_precision(rows: Tensor) -> Tensor:
    """In float32, or float64 as it is."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def full_precision_of(*tensors: Tensor | None) -> torch.dtype:
    """float64 where one of them has it, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


BLOCK = {"cpu": 2**22, "cuda": 2**26}
"""Scores held at once: 16 MiB of float32 on a CPU, where a block should stay in the cache, 256 MiB on a GPU."""


def row_blocks(n: int, m: int, device: str) -> Iterator[slice]:
    """Slices of rows so that a block with all m columns holds about BLOCK scores, of 32 rows at the least."""
    rows = max(BLOCK.get(device, BLOCK["cuda"]) // max(m, 1), 32)
    count = -(-n // rows)
    for i in range(count):  # of even sizes
        yield slice(i * n // count, (i + 1) * n // count)


def row_sweep(
    queries: Tensor,
    keys: Tensor,
    own: Tensor | None,
    *,
    pairs: Pairs,
    weights: Weights = None,
    needs: tuple[bool, ...] = (False, False, False),
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """A loss for each query, and the gradients of their weighted sum.

    Args:
        queries: `n d`, over the temperature. keys: `m d`.
        own: `n`, the positives' scores where `pairs.positive` is None; None = 0, so that decoupled rows are X_i.
        weights: of each row's loss.
        needs: whether queries, keys, own need a gradient.
    """
    losses = queries.new_empty(len(queries))
    d_queries = torch.empty_like(queries) if needs[0] and weights is not None else None
    d_keys = torch.zeros_like(keys) if needs[1] and weights is not None else None
    d_own = torch.empty_like(losses) if needs[2] and own is not None and weights is not None else None
    for rows in row_blocks(len(queries), len(keys), queries.device.type):
        scores = queries[rows] @ keys.T
        if pairs.positive is not None:  # from the same product as the others, so that equal keys score equally
            own_score = scores.gather(1, pairs.positive[rows, None]).squeeze(1)
        else:
            own_score = scores.new_zeros(()) if own is None else own[rows]

        # N_ij up to a factor, and X_i; a row without negatives has X_i = -inf
        pairs.negatives_(scores, rows)
        lowest = torch.finfo(scores.dtype).min
        highest = scores.amax(1).clamp_min_(lowest) if len(keys) else scores.new_full((len(scores),), lowest)
        negatives = scores.sub_(highest[:, None]).exp_()
        total = negatives.sum(1)
        # the two scores first: a large one would round the logarithm away. own_score * 0, so that an infinite positive
        # gives NaN and not 0
        log_odds = total.log().add_(highest - own_score).add_(own_score * 0)
        losses[rows] = log_odds if pairs.decoupled else F.softplus(log_odds, threshold=88)
        if weights is None:
            continue

        w = slopes(log_odds, weights_of(weights, rows), pairs.decoupled)
        scale = (w / total.clamp_min(1))[:, None]  # the highest adds 1: less is 0, without negatives
        if d_queries is not None:
            torch.mm(negatives, keys, out=d_queries[rows]).mul_(scale)
            if pairs.positive is not None:
                d_queries[rows].addcmul_(keys[pairs.positive[rows]], w[:, None], value=-1)
        if d_keys is not None:
            d_keys.addmm_(negatives.T, queries[rows] * scale)
            if pairs.positive is not None:
                d_keys.index_add_(0, pairs.positive[rows], queries[rows] * w[:, None], alpha=-1)
        if d_own is not None:
            torch.neg(w, out=d_own[rows])
    return losses, (d_queries, d_keys, d_own)


def weights_of(weights: Tensor | float, rows: slice) -> Tensor | float:
    """The weights of some rows."""
    return weights[rows] if isinstance(weights, Tensor) else weights


def slopes(log_odds: Tensor, weights: Tensor | float, decoupled: bool) -> Tensor:
    """w_i, the weight of a row's loss times dL_i/dX_i."""
    return (torch.ones_like(log_odds) if decoupled else log_odds.sigmoid()).mul_(weights)


def sigmoid_sweep(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor,
    *,
    positive: Tensor,
    weights: Weights = None,
    needs: tuple[bool, ...] = (False, False, False),
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The sigmoid loss of each query: sum_j softplus(S_ij + b), less S_ip + b for the positive.

    Arguments as in `row_sweep`; `bias` is a scalar. With G_ij = sigmoid(S_ij + b) - [j = p(i)] the gradients are
    dL/dq_i = sum_j G_ij k_j, dL/dk_j = sum_i G_ij q_i and dL/db = sum_ij G_ij.
    """
    losses = queries.new_empty(len(queries))
    d_queries = torch.empty_like(queries) if needs[0] and weights is not None else None
    d_keys = torch.zeros_like(keys) if needs[1] and weights is not None else None
    d_bias = torch.zeros_like(bias) if needs[2] and weights is not None else None
    for rows in row_blocks(len(queries), len(keys), queries.device.type):
        scores = torch.addmm(bias, queries[rows], keys.T)
        scores.scatter_(1, positive[rows, None], -scores.gather(1, positive[rows, None]))
        losses[rows] = F.softplus(scores, threshold=88).sum(1)
        if weights is None:
            continue
        slope = scores.sigmoid_()
        slope.scatter_(1, positive[rows, None], -slope.gather(1, positive[rows, None]))
        weight = weights_of(weights, rows)
        slope.mul_(weight[:, None] if isinstance(weight, Tensor) else weight)
        if d_queries is not None:
            torch.mm(slope, keys, out=d_queries[rows])
        if d_keys is not None:
            d_keys.addmm_(slope.T, queries[rows])
        if d_bias is not None:
            d_bias += slope.sum()
    return losses, (d_queries, d_keys, d_bias)


SIDE = 1024
"""Rows and columns of a block of the symmetric sweep; even, so that no pair of views is cut."""

SAFE_SCORE = {torch.float32: 40.0, torch.float64: 350.0}
"""Scores between minus this and this can be exponentiated and summed as they are, without a running maximum."""


def symmetric_sweep(
    views: Tensor,
    *,
    decoupled: bool = False,
    weights: Weights = None,
    needs: tuple[bool, ...] = (False,),
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """NT-Xent of `views` (`2n d`, rows 2i and 2i + 1 being views of one image) against themselves.

    With u_i = w_i / sum_j exp(S_ij):  dL/dz_i = sum_j (u_i + u_j) exp(S_ij) z_j - (w_i + w_p) z_p.

    Args:
        views: unit vectors over the root of the temperature, whose scores are within SAFE_SCORE.
        weights, needs: as in `row_sweep`.
    """
    n, images = len(views), len(views) // 2
    whole = _on_diagonal(views) if n <= SIDE else None  # a single block need not be made twice
    total = (_row_sums(views) if whole is None else whole.sum(1)).view(images, 2)
    two = views.view(images, 2, -1)
    log_odds = total.log().sub_((two[:, 0] * two[:, 1]).sum(1, keepdim=True))
    losses = log_odds if decoupled else F.softplus(log_odds, threshold=88)
    if weights is None or not needs[0]:
        return losses.view(n), (None,)

    w = slopes(log_odds, weights.view(images, 2) if isinstance(weights, Tensor) else weights, decoupled)
    u = (w / total.clamp_min_(torch.finfo(total.dtype).tiny)).view(n)
    pairs = w.sum(1).neg_()
    if whole is not None:
        return losses.view(n), (torch.mm(_slopes_on_diagonal_(whole, u, pairs), views),)
    return losses.view(n), (_symmetric_gradient(views, u, pairs),)


def _on_diagonal(views: Tensor) -> Tensor:
    """exp(S) of views with themselves; 0 for a view itself and for its other view."""
    block = torch.mm(views, views.T).exp_()
    _own_pairs(block).zero_()
    return block


def _slopes_on_diagonal_(block: Tensor, u: Tensor, pairs: Tensor) -> Tensor:
    """dL/dS_ij + dL/dS_ji of a block on the diagonal, in place of its exp(S); `pairs` is that of two views' score."""
    block.mul_(u[:, None] + u)
    own = _own_pairs(block)
    own[0, 1] = own[1, 0] = pairs
    return block


def _own_pairs(block: Tensor) -> Tensor:
    """Of a block on the diagonal, the entries of a view with the views of its image: `2 2 images`, a view of it."""
    images = len(block) // 2
    return block.view(images, 2, images, 2).diagonal(dim1=0, dim2=2)


def _beside(views: Tensor, rows: slice) -> Iterator[slice]:
    """The columns of the blocks to the right of the one on the diagonal."""
    for left in range(rows.stop, len(views), SIDE):
        yield slice(left, min(left + SIDE, len(views)))


def _block_rows(views: Tensor) -> Iterator[slice]:
    for top in range(0, len(views), SIDE):
        yield slice(top, min(top + SIDE, len(views)))


def _row_sums(views: Tensor) -> Tensor:
    """sum_j exp(S_ij) over the negatives, a block at a time, on and above the diagonal."""
    total = views.new_zeros(len(views))
    for rows in _block_rows(views):
        total[rows] += _on_diagonal(views[rows]).sum(1)
        for cols in _beside(views, rows):
            block = torch.mm(views[rows], views[cols].T).exp_()
            total[rows] += block.sum(1)
            total[cols] += block.sum(0)
    return total


def _symmetric_gradient(views: Tensor, u: Tensor, pairs: Tensor) -> Tensor:
    """The gradient of the views, from the same blocks made again."""
    gradient = torch.zeros_like(views)
    for rows in _block_rows(views):
        images = slice(rows.start // 2, rows.stop // 2)
        gradient[rows].addmm_(_slopes_on_diagonal_(_on_diagonal(views[rows]), u[rows], pairs[images]), views[rows])
        for cols in _beside(views, rows):
            block = torch.mm(views[rows], views[cols].T).exp_().mul_(u[rows, None] + u[cols])
            gradient[rows].addmm_(block, views[cols])
            gradient[cols].addmm_(block.T, views[rows])
    return gradient


def scaled_rows(rows: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """Rows `n d` scaled to an L2 norm of `length`, and the factors `n 1`; a zero row stays zero, its factor too."""
    # in float64: in float32 the squares of 1e-22 vanish, and those of 1e20 overflow
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    factor = norm.reciprocal_().mul_(length).nan_to_num_(nan=torch.nan, posinf=0.0).to(rows.dtype)
    if rows.dtype == torch.float64:  # whose squares may overflow still: no plausible zero for it
        factor.masked_fill_(factor == 0, torch.nan).masked_fill_((rows == 0).all(1, keepdim=True), 0)
    return rows * factor, factor


def scaled_rows_gradient(gradient: Tensor, scaled: Tensor, factor: Tensor, length: float) -> Tensor:
    """The gradient of the rows from that of `scaled_rows`: its part across the row, times the factor."""
    along = (scaled * gradient).sum(1, keepdim=True)
    return torch.addcmul(gradient, scaled, along, value=-(length**-2)).mul_(factor)


def side_by_side(z1: Tensor, z2: Tensor) -> Tensor:
    """Two views `n d` of each image -> `2n d`, an image's two views being neighbours."""
    return torch.stack([z1, z2], 1).flatten(0, 1)


def two_view_sweep(
    z1: Tensor,
    z2: Tensor,
    *,
    length: float,
    decoupled: bool = False,
    weights: Weights = None,
    needs: tuple[bool, ...] = (False, False),
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """`symmetric_sweep` of views `n d` each, put side by side and scaled to `length`.

    The whole of NT-Xent as one differentiable function: where rows are few, each costs more than its arithmetic.
    """
    views, factor = scaled_rows(side_by_side(z1, z2), length)
    losses, (gradient,) = symmetric_sweep(views, decoupled=decoupled, weights=weights, needs=(any(needs),))
    if gradient is None:
        return losses, (None, None)
    gradient = scaled_rows_gradient(gradient, views, factor, length)
    return losses, gradient.view(len(z1), 2, -1).unbind(1)


class _Swept(torch.autograd.Function):
    """A sweep as a differentiable function: the sum of all losses times `scale`, or (None) a loss a row.

    For the sum the gradient is known up to a factor before the backward comes, so it is formed in the forward pass,
    while the blocks are there. For rows it is recomputed.
    """

    @staticmethod
    def forward(ctx: Any, sweep: Sweep, scale: float | None, queries: Tensor, *others: Tensor | None) -> Tensor:
        ctx.sweep, ctx.summed, ctx.needs = sweep, scale is not None, tuple(ctx.needs_input_grad[2:])
        tensors = queries, *others
        with full_precision_island(queries.device.type):
            if scale is not None and any(ctx.needs):
                losses, gradients = sweep(*tensors, weights=scale, needs=ctx.needs)
                ctx.save_for_backward(*gradients)
            else:
                losses, _ = sweep(*tensors)
                ctx.save_for_backward(*tensors)
        return losses if scale is None else losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(SECOND_DERIVATIVES)
        if ctx.summed:
            return None, None, *(None if g is None else g * gradient for g in ctx.saved_tensors)
        with full_precision_island(gradient.device.type):
            _, gradients = ctx.sweep(*ctx.saved_tensors, weights=gradient, needs=ctx.needs)
        return None, None, *gradients


SECOND_DERIVATIVES = (
    "no graph of the gradient is kept: for second derivatives write the loss in torch's own operations, "
    "e.g. F.cross_entropy(queries @ keys.T / temperature, positive)"
)


def full_precision_island(device: str) -> AbstractContextManager[Any]:
    """Autocast off: a product of float32 matrices comes out in half precision under it."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def swept(sweep: Sweep, queries: Tensor, *others: Tensor | None, scale: float | None) -> Tensor:
    """The losses of a sweep with gradients: their sum times `scale`, or where that is None a loss a row, `n`."""
    if torch.compiler.is_compiling() and len(queries) > SIDE:  # a graph of every block would be long in the making
        return torch.compiler.disable(_Swept.apply)(sweep, scale, queries, *others)
    return _Swept.apply(sweep, scale, queries, *others)
