"""Accumulation that adds negatives: the gradient of a big batch in the memory of a small one.

Plain accumulation averages the losses of micro-batches, and an image meets only its own micro-batch's negatives. Here
(GradCache; Gao et al. 2021) a step passes over its micro-batches twice:

1. without a graph: the representations of every micro-batch, and from all of them together the loss, whose gradient
   with respect to the representations is kept;
2. with a graph: each micro-batch's representations again, and backwards from the kept gradient (the gradient of
   sum(z * g), undivided).

Differences from an ordinary step, all invisible: the random state of each micro-batch is replayed, so that
augmentations and dropout are those of the first pass; fp16's scaler scales the loss, once; and processes exchange
their gradients once, at the end and by hand, because a parameter of the loss itself (a learned temperature) gets its
gradient in the first part, where DistributedDataParallel does not see it.

BatchNorm is the exception: its statistics are those of a micro-batch, as in plain accumulation, so the gradient is not
the big batch's. The running statistics are updated once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist

from contrastive_core.gather import world
from contrastive_core.method import Batch, Method

logger = logging.getLogger(__name__)

RandomState = tuple[Tensor, Tensor | None]


class CachedStep:
    """The two passes of one optimizer step: `forward()`, then `backward(loss)`.

    Args:
        method: has `represent` and `contrast` (`contrastive_core.method.Method`), and is not wrapped.
        make_batches: each makes one micro-batch, the same one whenever the random state is the same; called twice.
        accelerator: for its autocast, scaler and device.

    Example: a method whose loss is -sum(z) gives every parameter the gradient of the whole batch.
    """

    def __init__(self, method: Method, make_batches: Sequence[Callable[[], Batch]], accelerator: Accelerator) -> None:
        self.method, self.make_batches, self.accelerator = method, make_batches, accelerator
        self.states: list[RandomState] = []
        self.sizes: list[int] = []
        self.leaves: dict[str, Tensor] = {}

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The first pass: the loss over all micro-batches of all processes, and its metrics."""
        parts = []
        with torch.no_grad(), self.accelerator.autocast(), _running_statistics_kept(self.method):
            for make_batch in self.make_batches:
                self.states.append(_random_state(self.accelerator.device))
                batch = make_batch()
                self.sizes.append(len(batch.indices))
                parts.append(self.method.represent(batch))
                for name, rows in parts[-1].items():
                    if len(rows) != self.sizes[-1]:
                        wrong = f"{name} has {len(rows)} rows for {self.sizes[-1]} images"
                        raise ValueError(f"{wrong}: represent must give one row an image")
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.leaves = {name: rows.requires_grad_(rows.is_floating_point()) for name, rows in joined.items()}
        with self.accelerator.autocast():
            loss, metrics = self.method.contrast(self.leaves)
        return loss, metrics

    def backward(self, loss: Tensor) -> None:
        """The second pass: add the gradient of `loss` to every parameter's, averaged over processes."""
        # not accelerator.backward, which divides by its number of accumulation steps: the loss is the step's already
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        start = 0
        for make_batch, state, size in zip(self.make_batches, self.states, self.sizes, strict=True):
            with _replayed(state, self.accelerator.device), self.accelerator.autocast():
                representations = self.method.represent(make_batch())
            roots, gradients = [], []
            for name, z in representations.items():
                gradient = self.leaves[name].grad
                if z.requires_grad and gradient is not None:
                    roots.append(z)
                    gradients.append(gradient[start : start + size])
            torch.autograd.backward(roots, gradients)
            start += size
        average_gradients_(self.method)


def average_gradients_(module: nn.Module) -> None:
    """Replace the gradients by their mean over processes: one exchange for each dtype.

    A parameter without a gradient here takes no part; it must be without one on every process.
    """
    size = world()[1]
    if size == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    for dtype in sorted({g.dtype for g in gradients}, key=str):
        same = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in same])
        dist.all_reduce(flat)
        flat /= size
        for gradient, mean in zip(same, flat.split([g.numel() for g in same]), strict=True):
            gradient.copy_(mean.view(gradient.shape))


def batch_norms(module: nn.Module) -> list[str]:
    """The names of the BatchNorm layers, which see a micro-batch at a time."""
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def check_cacheable(method: Method) -> None:
    """Raise ValueError where a method has no two halves; warn where BatchNorm makes the gradient another one."""
    kind = type(method)
    halves = kind.represent is not Method.represent and kind.contrast is not Method.contrast
    if not halves or kind.forward is not Method.forward:
        raise ValueError(
            f"grad_cache needs a method in two halves, represent and contrast; {kind.__name__} has a forward of its "
            f"own: leave grad_cache out (where images are not compared with one another, accumulation is exact)"
        )
    norms = batch_norms(method)
    if norms:
        logger.warning(
            "grad_cache: %d BatchNorm layers (%s, ...) see a micro-batch at a time, so the gradient is not the big "
            "batch's; LayerNorm or GroupNorm would make it so",
            len(norms),
            norms[0],
        )


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leave BatchNorm's running statistics as they are: the second pass updates them."""
    layers = [module.get_submodule(name) for name in batch_norms(module)]
    kept = {layer: [(buffer, buffer.clone()) for buffer in layer.buffers()] for layer in layers}
    try:
        yield
    finally:
        for buffers in kept.values():
            for buffer, value in buffers:
                buffer.copy_(value)


def _random_state(device: torch.device) -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(state: RandomState, device: torch.device) -> Iterator[None]:
    """Draw again what was drawn from `state` on; afterwards the generators go on where they were."""
    cpu, cuda = state
    with torch.random.fork_rng(devices=[] if cuda is None else [device]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield
