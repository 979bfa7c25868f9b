"""Learning rates as pure functions of progress, so that there is no scheduler to prepare, save or step too often."""

from __future__ import annotations

import math

from torch.optim import Optimizer


def constant(progress: float) -> float:
    """The base learning rate throughout (CPC v2)."""
    return 1.0


def warmup_cosine(progress: float, *, warmup: float = 0.0) -> float:
    """Linear warm-up over the first `warmup` share of the run, then half a cosine down to 0.

    Args:
        progress: share of the optimizer steps done, 0..1.
        warmup: share of the run, 0..1.

    Returns the factor on the base learning rate, 0..1. Example: `warmup_cosine(0.5) == 0.5`.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-12)))


def set_learning_rate_(optimizer: Optimizer, factor: float) -> float:
    """Set every group to `factor` times its own base rate; returns the first group's rate.

    A group's base rate is the one that it was built with, kept in it as `initial_lr`.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])
