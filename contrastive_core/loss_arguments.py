"""What does not fit a loss, in one clear line: what came, and what to pass instead.

A `..._problem` is such a line, or "" where all is well. It becomes an error only when the processes agree on how much
each of them holds (`agreed_shares`), so that an error on one is an error on all and none is left waiting.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from contrastive_core.gather import agree, world
from contrastive_core.sweep import Mask, block_problem, full_precision_of, masked_positive_problem, row_blocks

Gather = bool | Literal["ring"] | None
Reduction = Literal["mean", "sum", "none"]
Shares = list[tuple[int, int]]
"""How many queries and keys every process holds, in rank order."""


def check_pairs(queries: Tensor, keys: Tensor, positive: Tensor) -> None:
    """Raise ValueError unless queries are `n d`, keys `m d` and positive `n` integers."""
    if problem := pairs_problem(queries, keys, positive):
        raise ValueError(problem)


def rows_problem(queries: Tensor, keys: Tensor) -> str:
    """Queries are `n d` and keys `m d`."""
    if queries.ndim == keys.ndim == 2 and queries.shape[1] == keys.shape[1]:
        return ""
    return f"queries have shape {tuple(queries.shape)} and keys {tuple(keys.shape)}: pass n d and m d with the same d"


def pairs_problem(queries: Tensor, keys: Tensor, positive: Tensor) -> str:
    """... and positive is `n` int64 within the keys, where looking costs nothing."""
    if problem := rows_problem(queries, keys):
        return problem
    if positive.shape != queries.shape[:1] or positive.dtype != torch.int64:
        return (
            f"positive has shape {tuple(positive.shape)} and dtype {positive.dtype}: "
            f"pass one integer index into keys for each of the {len(queries)} queries (int64)"
        )
    # elsewhere looking would cost a wait for the device, or break a graph
    if positive.device.type == "cpu" and len(positive) and not torch.compiler.is_compiling():
        lowest, highest = positive.aminmax()
        if lowest < 0 or highest >= len(keys):
            wrong = int(lowest if lowest < 0 else highest)
            return (
                f"positive holds {wrong}, and there are {len(keys)} keys here: pass indices from 0 to {len(keys) - 1}"
            )
    return ""


def own_key_problem(queries: Tensor, keys: Tensor, own: Tensor) -> str:
    """Queries are `n d`, keys `m d` and each query's own key `n d`."""
    if own.shape == queries.shape:
        return rows_problem(queries, keys)
    return (
        f"positive has shape {tuple(own.shape)}, queries {tuple(queries.shape)}: "
        f"pass an own key for each query (n d), or an integer (n)"
    )


def views_problem(z1: Tensor, z2: Tensor) -> str:
    """Both views are `n d`."""
    if z1.ndim == 2 and z1.shape == z2.shape:
        return ""
    return f"the views have shapes {tuple(z1.shape)} and {tuple(z2.shape)}: pass n d twice"


def shared_keys_problem(shared_keys: Tensor | None, d: int) -> str:
    """Shared keys are `k d`, or None."""
    if shared_keys is None or (shared_keys.ndim == 2 and shared_keys.shape[1] == d):
        return ""
    return f"shared_keys have shape {tuple(shared_keys.shape)}: pass k d with d = {d}"


def mask_problem(mask: Tensor | Mask | None, n: int, m: int, positive: Tensor | None) -> str:
    """A mask that is a tensor is bool `n m`, and leaves no positive out.

    A function is asked here only where an error must not wait for the sweep, since other processes would.
    """
    if mask is None:
        return ""
    if m == 0:
        return "mask covers keys, and there are none: leave it out (shared keys are all compared)"
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool or mask.shape != (n, m):
            return f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: pass bool of ({n}, {m})"
        if positive is None:
            return ""
        return masked_positive_problem(mask.gather(1, positive[:, None]).squeeze(1), 0)
    if world()[1] == 1 or positive is None:
        return ""
    for rows in row_blocks(n, m, positive.device.type):
        allowed = mask(rows, slice(0, m))
        problem = block_problem(allowed, rows, m) or masked_positive_problem(
            allowed.gather(1, positive[rows, None]).squeeze(1), rows.start
        )
        if problem:
            return problem
    return ""


def options_problem(temperature: float | Tensor, reduction: str) -> str:
    """The temperature is one number above 0, and the reduction one of three."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            return f"temperature has shape {tuple(temperature.shape)}: pass one number"
        looked_at = temperature.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked_at and temperature <= 0:  # NaN shall reach the loss
            return f"temperature={temperature.item()}: pass a number above 0"
    elif not 0 < temperature < math.inf:
        return f"temperature={temperature}: pass a number above 0"
    if reduction not in ("mean", "sum", "none"):
        return f'reduction={reduction!r}: pass "mean", "sum" or "none"'
    return ""


def raise_if(problem: str) -> None:
    """Raise ValueError where there is a problem: for losses that other processes take no part in."""
    if problem:
        raise ValueError(problem)


def agreed_shares(
    problem: str, gather: Gather, queries: Tensor, keys: Tensor, *, reduction: str = "mean", ring: bool = True
) -> Shares:
    """The numbers of queries and keys of all processes that take part: of this one alone where nothing is gathered."""
    if not (gather is None or isinstance(gather, bool) or (ring and gather == "ring")):
        problem = f"gather={gather!r}: pass None, True or False" + ring * ', or "ring"'
    if gather is False or world()[1] == 1:
        raise_if(problem)
        shares: Shares = [(len(queries), len(keys))]
    else:
        exact = full_precision_of(queries, keys) == torch.float64
        slopes = keys.requires_grad and torch.is_grad_enabled()
        sizes = (0, 0, 0) if problem else (len(queries), len(keys), queries.shape[1])
        everyone = agree(problem, *sizes, exact, slopes)
        # all processes see the same numbers from here on, and raise alike
        for what, values in zip(
            ("vectors of d", "float64", "keys that need a gradient"), list(zip(*everyone, strict=True))[2:], strict=True
        ):
            if len(set(values)) > 1:
                raise ValueError(f"processes pass {what} = {list(values)}: pass the same on all of them")
        shares = [(n, m) for n, m, *_ in everyone]
    if sum(n for n, _ in shares) == 0:
        raise ValueError("queries are empty: pass at least one")
    if reduction == "sum" and len(shares) > 1:
        raise ValueError('reduction="sum" means nothing under DDP\'s average: pass "mean", or "none" and sum yourself')
    return shares


def check_negatives(decoupled: bool, negatives: int) -> None:
    """Raise ValueError where the decoupled sum would be empty; the number is that of all processes, so all raise."""
    if decoupled and negatives < 1:
        raise ValueError("decoupled=True compares with negatives only and there are none: pass more keys")


def labels_problem(views: Tensor, labels: Tensor) -> str:
    """Views are `n d` and labels `n` integers."""
    if views.ndim == 2 and labels.shape == views.shape[:1] and not labels.is_floating_point():
        return ""
    got = f"views have shape {tuple(views.shape)}, labels {tuple(labels.shape)} of {labels.dtype}"
    return f"{got}: pass n d and n integers"


def same_problem(z1: Tensor, z2: Tensor, same: Tensor) -> str:
    """Both views are `n d`, and `same` is `n` bool."""
    if same.shape != z1.shape[:1] or same.dtype != torch.bool:
        return f"same has shape {tuple(same.shape)} and dtype {same.dtype}: pass {len(z1)} bools"
    return views_problem(z1, z2)
