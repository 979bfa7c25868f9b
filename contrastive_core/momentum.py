"""Exponential moving averages of weights: Polyak averaging, and the teachers of MoCo and BYOL."""

from __future__ import annotations

import copy
import math
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def ema_update_(
    teacher: nn.Module, model: nn.Module, decay: float, *, buffers: Literal["copy", "keep"] = "copy"
) -> None:
    """teacher = decay * teacher + (1 - decay) * model, for every parameter.

    Args:
        teacher, model: of the same architecture; the teacher is changed in place.
        decay: 0..1; MoCo's and BYOL's momentum.
        buffers: "copy" = the teacher takes the model's: for an average that runs in eval mode, whose BatchNorm has no
            forward passes of its own. "keep" = the teacher's stay: for one that runs in train mode, whose BatchNorm
            statistics come from its own forward passes (MoCo's published code moves parameters only).

    Raises ValueError if decay is outside 0..1, `buffers` is another word, or the two do not hold the same tensors.

    Example: decay 0 makes the teacher's parameters equal to the model's.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}: pass a number from 0 (copy the model) to 1 (keep the teacher)")
    if buffers not in ("copy", "keep"):
        raise ValueError(f'buffers={buffers!r}: pass "copy" or "keep"')
    own: list[Tensor] = list(teacher.parameters())
    other: list[Tensor] = list(model.parameters())
    # the shapes too: lerp would stretch a row of the model over a matrix of the teacher in silence
    if [p.shape for p in own] != [p.shape for p in other]:
        raise ValueError(
            f"the teacher's {len(own)} parameters are not of the shapes of the model's {len(other)}: "
            f"pass a teacher made by teacher_of(model)"
        )
    if own:
        torch._foreach_lerp_(own, other, 1 - decay)
    if buffers == "copy":
        _copy_buffers_(teacher, model)


@torch.no_grad()
def _copy_buffers_(teacher: nn.Module, model: nn.Module) -> None:
    own, other = list(teacher.buffers()), list(model.buffers())
    if [b.shape for b in own] != [b.shape for b in other]:
        raise ValueError(
            f"the teacher's {len(own)} buffers are not of the shapes of the model's {len(other)}: "
            f'pass a teacher made by teacher_of(model), or buffers="keep"'
        )
    for kept, value in zip(own, other, strict=True):
        kept.copy_(value)


def check_momentum(momentum: float) -> float:
    """The momentum itself, or ValueError unless 0 <= momentum <= 1."""
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum}: pass a number from 0 (copy the model) to 1 (keep the teacher)")
    return momentum


def teacher_of(model: Module) -> Module:
    """A deep copy that learns nothing by itself: no parameter requires a gradient.

    It stays in the mode that the model is in, train mode as a rule, and is meant to: the teachers of MoCo and BYOL
    normalise by the statistics of the batch in front of them, as the model does. Running statistics lag behind weights
    that change, and at the start they are 0 and 1, which are nobody's statistics.

    Example: `teacher_of(nn.Linear(3, 2)).weight.requires_grad` is False.
    """
    return copy.deepcopy(model).requires_grad_(False)


def cosine_momentum(progress: float, base: float) -> float:
    """1 - (1 - base) (cos(pi progress) + 1) / 2: from `base` up towards 1, where the teacher stands still.

    (BYOL, section 3.1, whose progress is k/K, of step k of K counted from 0, as in its code and in MoCo v3's.)

    Args:
        progress: share of the optimizer steps before this one, 0..1, as `Method.after_step` is given it.
        base: the momentum of the first step, 0..1: 0.996 for BYOL's 1000 epochs, 0.99 for 300 or 100.

    Raises ValueError for another base. Example: `cosine_momentum(0.5, 0.99) == 0.995`.
    """
    return 1 - (1 - check_momentum(base)) * (math.cos(math.pi * progress) + 1) / 2


def polyak_decay(step: int, decay: float = 0.9999) -> float:
    """min(decay, (1 + step) / (10 + step)): a short run does not average in its random start.

    Example: `polyak_decay(0) == 0.1`, and 0.9999 from step 89,990 on.
    """
    return min(decay, (1 + step) / (10 + step))
