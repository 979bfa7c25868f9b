"""Exponential moving averages of weights: Polyak averaging, and the teachers of MoCo and BYOL."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def ema_update_(teacher: nn.Module, model: nn.Module, decay: float) -> None:
    """teacher = decay * teacher + (1 - decay) * model, for every parameter; buffers are copied.

    Raises ValueError if decay is outside 0..1. Example: decay 0 makes the teacher equal to the model.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}: pass a number from 0 (copy the model) to 1 (keep the teacher)")
    torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - decay)
    for own, other in zip(teacher.buffers(), model.buffers(), strict=True):
        own.copy_(other)


def polyak_decay(step: int, decay: float = 0.9999) -> float:
    """min(decay, (1 + step) / (10 + step)): a short run does not average in its random start.

    Example: `polyak_decay(0) == 0.1`, and 0.9999 from step 89,990 on.
    """
    return min(decay, (1 + step) / (10 + step))
