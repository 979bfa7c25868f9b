"""The one loop, for every method: what they all share, and nothing else.

Logging, probing and saving are ordinary code in the body of the caller's `for`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from contrastive_core.data import LoadedBatch
from contrastive_core.method import Batch, Method
from contrastive_core.momentum import ema_update_, polyak_decay
from contrastive_core.optim import set_learning_rate_
from contrastive_core.randomness import Randomness

SKIPS_IN_A_ROW = 50
"""fp16 steps that the gradient scaler may skip one after the other; it needs about 20 to find its scale."""

_REMEDY = "lower optimizer.lr or set clip, or pass precision=no if it is not already"


class StepResult(NamedTuple):
    """What one optimizer step leaves behind.

    step: optimizer steps done, from 1. metrics: this process's scalars, means over the micro-batches, with `loss`.
    faults: names of the images that could not be decoded.
    """

    step: int
    metrics: dict[str, Tensor]
    faults: list[str]


def make_batch(loaded: LoadedBatch, views: nn.Module, randomness: Randomness, device: torch.device) -> Batch:
    """Move uint8 images to the device and augment them there."""
    with torch.no_grad():
        images = loaded.images.to(device, non_blocking=True)
        return Batch(views(images, randomness), loaded.indices.to(device), loaded.labels.to(device))


def train_steps(
    method: nn.Module,
    optimizer: Optimizer,
    accelerator: Accelerator,
    batches: Iterable[list[LoadedBatch]],
    views: nn.Module,
    *,
    seed: int,
    start: int,
    steps: int,
    schedule: Callable[[float], float],
    clip: float | None = None,
    averaged: nn.Module | None = None,
    averaging_decay: float = 0.9999,
) -> Iterator[StepResult]:
    """Take optimizer steps `start` .. `steps` - 1 and yield after each.

    Args:
        method, optimizer: as `accelerator.prepare` gave them back.
        batches: for each step the list of this process's micro-batches (`contrastive_core.data.training_batches`).
        views: `views(images: uint8 b 3 h w, randomness) -> tuple of views`.
        seed, start, steps: the augmentations' seed, the steps done before, the steps in all.
        schedule: `schedule(progress)` -> factor on the base learning rate.
        clip: largest norm of the whole gradient; None leaves it alone.
        averaged: a copy of the bare method that follows it as a Polyak average.

    Raises FloatingPointError before a loss or a gradient that is not finite reaches the weights.
    """
    bare: Method = accelerator.unwrap_model(method)
    skipped = 0
    for step, micro_batches in enumerate(batches, start):
        # the learning rate is a function of the step alone: nothing to save, nothing to step twice; read at the middle
        # of the step, so that neither the first of a warm-up nor the last of a decay is a step of rate 0
        lr = set_learning_rate_(optimizer, schedule((step + 0.5) / steps))

        # micro-batches add up their gradients; processes exchange them once, with the last
        totals: dict[str, Tensor] = {}
        for i, loaded in enumerate(micro_batches):
            batch = make_batch(loaded, views, Randomness(seed, step, loaded.places), accelerator.device)
            last = i + 1 == len(micro_batches)
            with nullcontext() if last else accelerator.no_sync(method):
                loss, metrics = method(batch)
                if not loss.isfinite():
                    raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}: {_REMEDY}")
                accelerator.backward(loss)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value / len(micro_batches)

        # the step itself, then whatever the method and the averaged copy do once a step
        norm = accelerator.clip_grad_norm_(method.parameters(), math.inf if clip is None else clip)
        if accelerator.scaler is None and not norm.isfinite():  # fp16's scaler skips such a step by itself
            raise FloatingPointError(f"the gradient's norm is {norm.item()} at step {step + 1}: {_REMEDY}")
        totals["gradient_norm"] = norm
        optimizer.step()
        skipped = skipped + 1 if accelerator.optimizer_step_was_skipped else 0
        if skipped == SKIPS_IN_A_ROW:
            raise FloatingPointError(
                f"{skipped} steps up to {step + 1} were skipped for gradients not finite: {_REMEDY}"
            )
        optimizer.zero_grad()
        bare.after_step((step + 1) / steps)
        if averaged is not None:
            ema_update_(averaged, bare, polyak_decay(step, averaging_decay))

        totals["lr"] = torch.tensor(lr, dtype=torch.float64)
        yield StepResult(step + 1, totals, [fault for loaded in micro_batches for fault in loaded.faults])
