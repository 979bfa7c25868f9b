"""The one loop, for every method: what they all share, and nothing else.

Averaging of weights, logging, probing and saving are ordinary code in the body of the caller's `for`.
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
from contrastive_core.metrics import watching
from contrastive_core.optim import set_learning_rate_
from contrastive_core.profiling import part
from contrastive_core.randomness import Randomness
from contrastive_core.sharding import whole
from contrastive_core.transfer import to_device

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
    with torch.no_grad(), part("views"):
        if loaded.views is None:
            made = views(to_device(loaded.images, device), randomness)
        else:
            made = tuple(to_device(view, device) for view in loaded.views)
    return Batch(made, to_device(loaded.indices, device), to_device(loaded.labels, device), randomness)


def accumulated_gradients(
    method: nn.Module, makers: Sequence[Callable[[], Batch]], accelerator: Accelerator
) -> dict[str, Tensor]:
    """Micro-batches add up their gradients; processes exchange them once, with the last. Returns mean metrics.

    Of weights that are split (`sharding`) they are exchanged with each, since nobody has room for the whole.
    """
    totals: dict[str, Tensor] = {}
    for i, make in enumerate(makers):
        batch = make()
        with nullcontext() if i + 1 == len(makers) else accelerator.no_sync(method):
            with part("forward"):
                loss, metrics = method(batch)
            with part("backward"):
                accelerator.backward(loss)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value / len(makers)
    return totals


def cached_gradients(
    method: nn.Module, makers: Sequence[Callable[[], Batch]], accelerator: Accelerator
) -> dict[str, Tensor]:
    """Micro-batches are contrasted as one batch; processes exchange their gradients once. Returns its metrics."""
    with accelerator.no_sync(method):
        passes = CachedStep(accelerator.unwrap_model(method), makers, accelerator)
        with part("forward"):
            loss, metrics = passes.forward()
        with part("backward"):
            passes.backward(loss)
    return {"loss": loss.detach(), **metrics}


def seed_torch_(seed: int, step: int, process: int) -> None:
    """Set torch's own generators, of which dropout draws, by the step and the process: there is nothing to save."""
    drawn = Randomness(seed, step, torch.tensor([process])).integers("torch's own generators", 1 << 62)
    torch.manual_seed(int(drawn))


def check_finite(loss: Tensor, norm: Tensor | None, step: int) -> None:
    """Raise FloatingPointError, with what to do about it, where the loss or the gradient's norm is not finite.

    It waits for the device, once.
    """
    numbers = [loss.double()] if norm is None else [loss.double(), norm.to(loss.device, torch.float64)]
    for name, value in zip(("loss", "gradient's norm"), torch.stack(numbers).tolist(), strict=False):
        if not math.isfinite(value):
            raise FloatingPointError(f"the {name} is {value} at step {step + 1}: {_REMEDY}")


Steps = Iterator[tuple[list[LoadedBatch], list[Callable[[], Batch]]]]


def makers_of(
    batches: Iterable[list[LoadedBatch]], views: nn.Module, *, seed: int, start: int, device: torch.device
) -> Steps:
    """For each step its micro-batches as they were loaded, and for each of them what moves and augments it."""
    for step, micro_batches in enumerate(_loaded(batches), start):
        yield (
            micro_batches,
            [
                partial(make_batch, loaded, views, Randomness(seed, step, loaded.places), device)
                for loaded in micro_batches
            ],
        )


def _loaded(batches: Iterable[list[LoadedBatch]]) -> Iterator[list[LoadedBatch]]:
    waiting = iter(batches)
    while True:
        with part("load"):
            loaded = next(waiting, None)
        if loaded is None:
            return
        yield loaded


def made_ahead(makers: list[Callable[[], Batch]]) -> list[Callable[[], Batch]]:
    """The same makers, of which the first has done its work."""
    batch = makers[0]()
    return [lambda: batch, *makers[1:]]


def starts_ahead(device: torch.device) -> bool:
    """Whether the host starts a step's views while the device computes the gradients of the one before."""
    return device.type != "cpu"


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
    grad_cache: bool = False,
    watched: Callable[[int], bool] = lambda step: True,
) -> Iterator[StepResult]:
    """Take optimizer steps `start` .. `steps` - 1 and yield after each; of batches beyond them one may be read.

    Args:
        method, optimizer: as `accelerator.prepare` gave them back.
        batches: for each step the list of this process's micro-batches (`contrastive_core.data.training_batches`).
        views: `views(images: uint8 b 3 h w, randomness) -> tuple of views`.
        seed, start, steps: the seed of augmentations and of torch's own generators, which are set anew for each step;
            the steps done before; the steps in all.
        schedule: `schedule(progress)` -> factor on the base learning rate.
        clip: largest norm of the whole gradient; None leaves it alone.
        grad_cache: contrast all micro-batches of a step with one another instead of each with itself: the gradient
            of the whole batch, for a second forward pass (`contrastive_core.grad_cache`).
        watched: `watched(step)` -> whether anyone looks at the metrics of this step, counted from 1: the same on all
            processes. Of the others those are left out that a GPU is waited for (`contrastive_core.metrics.watching`).

    Raises FloatingPointError before a loss or a gradient that is not finite reaches the weights, ValueError where
    `grad_cache` is asked of a method that does not come in two halves, or batches end before the last step.
    """
    bare: Method = accelerator.unwrap_model(method)
    if grad_cache:
        check_cacheable(bare)
    gradients = cached_gradients if grad_cache else accumulated_gradients
    ahead = starts_ahead(accelerator.device)
    coming = makers_of(batches, views, seed=seed, start=start, device=accelerator.device)
    following = next(coming, None)
    step, skipped = start, 0
    while following is not None and step < steps:
        micro_batches, makers = following
        # the learning rate is a function of the step alone: nothing to save, nothing to step twice; read at the middle
        # of the step, so that neither the first of a warm-up nor the last of a decay is a step of rate 0
        lr = set_learning_rate_(optimizer, schedule((step + 0.5) / steps))
        seed_torch_(seed, step, accelerator.process_index)

        with watching(watched(step + 1)):
            totals = gradients(method, makers, accelerator)
        with part("clip"):
            norm = whole(accelerator.clip_grad_norm_(method.parameters(), math.inf if clip is None else clip))
        if ahead and (following := next(coming, None)) is not None:
            following = following[0], made_ahead(following[1])
        # fp16's scaler skips a step by itself whose gradient is not finite
        check_finite(totals["loss"], norm if accelerator.scaler is None else None, step)

        # the step itself, then whatever the method does once a step
        totals["gradient_norm"] = norm
        with part("optimizer step"):
            optimizer.step()
        skipped = skipped + 1 if accelerator.optimizer_step_was_skipped else 0
        if skipped == SKIPS_IN_A_ROW:
            raise FloatingPointError(
                f"{skipped} steps up to {step + 1} were skipped for gradients not finite: {_REMEDY}"
            )
        optimizer.zero_grad()
        with part("after step"):
            bare.after_step(step / steps)  # as the papers count: a teacher's momentum starts at its base

        step += 1
        totals["lr"] = torch.tensor(lr, dtype=torch.float64)
        yield StepResult(step, totals, [fault for loaded in micro_batches for fault in loaded.faults])
        if not ahead:
            following = next(coming, None)
    if step < steps:
        raise ValueError(f"batches ended before step {step + 1} of {steps}: pass one for each")
