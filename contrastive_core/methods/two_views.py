"""What methods share: taking the views of a batch, and what to watch of two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contrastive_core.losses import normalize
from contrastive_core.metrics import contrast_accuracy, feature_std, spread_metrics


def two(views: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The two views of a batch. Raises ValueError where there are not two."""
    if len(views) != 2:
        raise ValueError(f"the batch has {len(views)} views: pass two of every image")
    return views[0], views[1]


def one(views: tuple[Tensor, ...]) -> Tensor:
    """The view of a batch. Raises ValueError where there are several."""
    if len(views) != 1:
        raise ValueError(f"the batch has {len(views)} views: pass one of every image")
    return views[0]


@torch.no_grad()
def two_view_metrics(z1: Tensor, z2: Tensor, features: Tensor) -> dict[str, Tensor]:
    """How often a row of z1 picks the row of z2 of its image among this process's, and the two collapse alarms.

    Args:
        z1, z2: `b d`, what the loss compares, by angle. features: `b d`, what is kept.
    """
    z1, z2 = normalize(z1), normalize(z2)
    return {
        "accuracy": contrast_accuracy(z1, z2, torch.arange(len(z1), device=z1.device)),
        "feature_std": feature_std(features),
        **spread_metrics(z1),
    }


def encoder_dim(encoder: nn.Module) -> int:
    """The int attribute `dim` that every encoder and head has."""
    return encoder.dim  # type: ignore[return-value]  # nn.Module types every attribute as Tensor | Module
