"""The one loop, for every method: what they all share, and nothing else.

Logging, probing and saving are ordinary code in the body of the caller's `for`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from contrastive_core.data import LoadedBatch
from contrastive_core.grad_cache import CachedStep, check_cacheable
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
    """Move uint8 images to the device and augment them there; or only move what the loader's workers have augmented."""
    with torch.no_grad():
        if loaded.views is None:
            made = views(loaded.images.to(device, non_blocking=True), randomness)
        else:
            made = tuple(view.to(device, non_blocking=True) for view in loaded.views)
    return Batch(made, loaded.indices.to(device), loaded.labels.to(device))


def accumulated_gradients(
    method: nn.Module, makers: Sequence[Callable[[], Batch]], accelerator: Accelerator, step: int
) -> dict[str, Tensor]:
    """Micro-batches add up their gradients; processes exchange them once, with the last. Returns mean metrics."""
    totals: dict[str, Tensor] = {}
    for i, make in enumerate(makers):
        batch = make()
        with nullcontext() if i + 1 == len(makers) else accelerator.no_sync(method):
            loss, metrics = method(batch)
            check_loss(loss, step)
            accelerator.backward(loss)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value / len(makers)
    return totals


def cached_gradients(
    method: nn.Module, makers: Sequence[Callable[[], Batch]], accelerator: Accelerator, step: int
) -> dict[str, Tensor]:
    """Micro-batches are contrasted as one batch; processes exchange their gradients once. Returns its metrics."""
    with accelerator.no_sync(method):
        passes = CachedStep(accelerator.unwrap_model(method), makers, accelerator)
        loss, metrics = passes.forward()
        check_loss(loss, step)
        passes.backward(loss)
    return {"loss": loss.detach(), **metrics}


def seed_torch_(seed: int, step: int, process: int) -> None:
    """Set torch's own generators, of which dropout draws, by the step and the process: there is nothing to save."""
    drawn = Randomness(seed, step, torch.tensor([process])).integers("torch's own generators", 1 << 62)
    torch.manual_seed(int(drawn))


def check_loss(loss: Tensor, step: int) -> None:
    """Raise FloatingPointError, with what to do about it, where the loss is not finite."""
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}: {_REMEDY}")


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
    grad_cache: bool = False,
) -> Iterator[StepResult]:
    """Take optimizer steps `start` .. `steps` - 1 and yield after each.

    Args:
        method, optimizer: as `accelerator.prepare` gave them back.
        batches: for each step the list of this process's micro-batches (`contrastive_core.data.training_batches`).
        views: `views(images: uint8 b 3 h w, randomness) -> tuple of views`.
        seed, start, steps: the seed of augmentations and of torch's own generators, which are set anew for each step;
            the steps done before; the steps in all.
        schedule: `schedule(progress)` -> factor on the base learning rate.
        clip: largest norm of the whole gradient; None leaves it alone.
        averaged: a copy of the bare method that follows it as a Polyak average.
        grad_cache: contrast all micro-batches of a step with one another instead of each with itself: the gradient
            of the whole batch, for a second forward pass (`contrastive_core.grad_cache`).

    Raises FloatingPointError before a loss or a gradient that is not finite reaches the weights, ValueError where
    `grad_cache` is asked of a method that does not come in two halves.
    """
    bare: Method = accelerator.unwrap_model(method)
    if grad_cache:
        check_cacheable(bare)
    skipped = 0
    for step, micro_batches in enumerate(batches, start):
        # the learning rate is a function of the step alone: nothing to save, nothing to step twice; read at the middle
        # of the step, so that neither the first of a warm-up nor the last of a decay is a step of rate 0
        lr = set_learning_rate_(optimizer, schedule((step + 0.5) / steps))
        seed_torch_(seed, step, accelerator.process_index)

        makers = [
            partial(make_batch, loaded, views, Randomness(seed, step, loaded.places), accelerator.device)
            for loaded in micro_batches
        ]
        gradients = cached_gradients if grad_cache else accumulated_gradients
        totals = gradients(method, makers, accelerator, step)

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
