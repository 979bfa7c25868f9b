"""Networks that are trained on few labels: an encoder that reads images in [0, 1], and a classifier on what it gives.

Fine-tuning, training from scratch and a classifier on frozen latents differ in the first weights, in what learns, and
in whether the encoder's outputs are computed once. All of them take their steps in `contrastive_core.training`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from contrastive_core.data import ImageDataset, evaluation_batches, training_batches
from contrastive_core.data.loading import LoadedBatch, batch_indices
from contrastive_core.evaluate.features import extract_features
from contrastive_core.method import Batch, Method
from contrastive_core.methods.classifier import accuracy, label_loss
from contrastive_core.methods.two_views import one
from contrastive_core.optim import warmup_cosine
from contrastive_core.randomness import Randomness
from contrastive_core.training import train_steps


class LabelLoss(Method):
    """Cross-entropy of a network's logits, from one view of every image.

    Args: `network`: a view `b ...` -> logits `b classes`. `accelerator`: whose precision it runs under.
    """

    def __init__(self, network: nn.Module, accelerator: Accelerator) -> None:
        super().__init__()
        self.network, self.accelerator = network, accelerator

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the images of all processes, and the accuracy of this one's."""
        # one network of thousands in a sweep: accelerate would keep each that it has prepared
        with self.accelerator.autocast():
            logits = self.network(one(batch.views))
        return label_loss(logits, batch.labels), {"accuracy": accuracy(logits, batch.labels)}


class AsTheyAre(nn.Module):
    """Views that are the images, or latents, as they come: `(images,)`."""

    def forward(self, images: Tensor, randomness: Randomness) -> tuple[Tensor]:
        """The same tensor."""
        return (images,)


def train_(
    network: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[list[LoadedBatch]],
    views: nn.Module,
    accelerator: Accelerator,
    *,
    steps: int,
    seed: int,
) -> nn.Module:
    """Train a network in place, the learning rate down half a cosine; returns it in eval mode.

    Args:
        network: a view -> logits `b classes`, on the accelerator's device; modules in eval mode with frozen
            parameters are to stay so, and say so in their `train`.
        batches: one list of micro-batches for each of the `steps`.
        views: of the images, one.

    Raises FloatingPointError where the loss is not finite.
    """
    network.train()
    taken = train_steps(
        LabelLoss(network, accelerator),
        optimizer,
        accelerator,
        batches,
        views,
        seed=seed,
        start=0,
        steps=steps,
        schedule=warmup_cosine,
    )
    try:
        for _ in taken:
            pass
    except FloatingPointError as error:
        what = str(error).partition(":")[0]
        raise FloatingPointError(f"{what}: pass settings with a lower learning rate") from None
    return network.eval()


def image_batches(
    images: ImageDataset, *, batch_size: int, steps: int, seed: int, workers: int = 0
) -> Iterator[list[LoadedBatch]]:
    """Batches of at most `batch_size` images, or of all where there are fewer."""
    size = min(batch_size, len(images))
    return training_batches(images, batch_size=size, seed=seed, start=0, steps=steps, workers=workers)


def latent_batches(
    copies: Tensor, places: Tensor, labels: Tensor, *, batch_size: int, steps: int, seed: int
) -> Iterator[list[LoadedBatch]]:
    """Batches of latents that were encoded before: of each image one of its augmented copies, drawn anew every time.

    Args:
        copies: `copies m ...`, latents of images augmented so many times.
        places, labels: `n` int64, which of the `m` are learned from, and their classes.
    """
    count = len(labels)
    for step in range(steps):
        rows = batch_indices(count, min(batch_size, count), seed, step)
        order = torch.arange(len(rows))
        drawn = Randomness(seed, step, order).integers("copy", len(copies))
        nothing = torch.empty(0)
        yield [LoadedBatch(nothing, labels[rows], rows, order, [], (copies[drawn, places[rows]],))]


@torch.no_grad()
def encoded_copies(
    encoder: Callable[[Tensor], Tensor],
    images: ImageDataset,
    views: nn.Module,
    accelerator: Accelerator,
    *,
    copies: int,
    seed: int,
    batch_size: int,
    workers: int = 0,
) -> Tensor:
    """Latents of images that were augmented so many times: `copies n ...` float32 on the CPU. All can be decoded."""
    passes = []
    for copy in range(copies):
        parts = []
        for batch in evaluation_batches(images, batch_size=batch_size, workers=workers):
            (view,) = views(batch.images.to(accelerator.device), Randomness(seed, copy, batch.indices))
            with accelerator.autocast():
                parts.append(encoder(view).float().cpu())
        passes.append(torch.cat(parts))
    return torch.stack(passes)


@torch.no_grad()
def classes_of(
    network: nn.Module, images: ImageDataset, accelerator: Accelerator, *, batch_size: int, workers: int = 0
) -> Tensor:
    """The class that scores highest for each image, `n` int64; the network is in eval mode."""
    with accelerator.autocast():
        logits, _ = extract_features(network, images, batch_size=batch_size, device=accelerator.device, workers=workers)
    return logits.argmax(1)


def latent_classes(classifier: nn.Module, latents: Tensor, accelerator: Accelerator, *, batch_size: int) -> Tensor:
    """The same, of latents `n ...` that were encoded before."""
    with torch.no_grad(), accelerator.autocast():
        parts = [classifier(part.to(accelerator.device)).float().cpu() for part in latents.split(batch_size)]
    return torch.cat(parts).argmax(1)
