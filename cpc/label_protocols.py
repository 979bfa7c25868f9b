"""What may be done with few labels: the protocols of a label sweep, each a `contrastive_core` `LabelProtocol`.

    linear, knn   frozen encoder, pooled latents and a probe
    classifier    frozen encoder, a residual network on the grid of latents (CPC v2's "ResNet-33", or a smaller one)
    finetune      the same, then encoder and classifier together: CPC v2's two phases (Henaff et al. 2020, A.4)
    head          SimCLRv2's: encoder and the first layers of the projection head together
    scratch       a network that starts from random weights, all of it together
    logistic, svm pixels and a probe

A protocol is built for one choice of labels and learns from nothing else. Features without augmentation are encoded
once for all cells (`FeatureTable`); a frozen encoder's augmented latents once for all trials of a cell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from contrastive_core.data import ImageDataset, Splits
from contrastive_core.evaluate.baselines import logistic_probe, svm_probe
from contrastive_core.evaluate.features import extract_features, pool_grid
from contrastive_core.evaluate.knn import knn_predictions
from contrastive_core.evaluate.linear import linear_probe
from contrastive_core.evaluate.selection import Rows
from contrastive_core.optim import Together, parameter_groups
from cpc.frozen_encoder import FrozenEncoder
from cpc.label_networks import (
    AsTheyAre,
    classes_of,
    encoded_copies,
    image_batches,
    latent_batches,
    latent_classes,
    train_,
)

SECOND_PHASE_RATE = 0.1
"""Of the first phase's learning rate, for the classifier: as configs/protocol/cpc_v2.yaml [ours]."""

Setting = Mapping[str, float]
Probe = Callable[[Tensor, Tensor, Tensor, Setting], Tensor]
"""(features of the labelled rows, their labels, features of the rows asked for, setting) -> their classes."""


def rows_of(splits: Splits, rows: Rows) -> ImageDataset:
    """The images that some rows stand for."""
    part = splits.train if rows.part == "train" else splits.test
    assert part is not None
    return part.subset(rows.indices)


class FeatureTable:
    """Features of images, each encoded at most once: of those of the training part that some cell uses, and the test's.

    Args:
        encode: images `b 3 h w` in [0, 1] -> `b ...`.
        splits: every image of which can be decoded.
        used: `m` int64, sorted: the training images whose features may be asked for.

    Attributes: `encoded`, how many images have been encoded, and `seconds` that it took.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        splits: Splits,
        used: Tensor,
        accelerator: Accelerator,
        *,
        batch_size: int = 256,
        workers: int = 0,
    ) -> None:
        self.encode, self.splits, self.used, self.accelerator = encode, splits, used, accelerator
        self.batch_size, self.workers = batch_size, workers
        self.encoded, self.seconds = 0, 0.0
        self._parts: dict[str, Tensor] = {}

    def at(self, rows: Rows) -> Tensor:
        """Features `n ...` float32 of these rows; ValueError for a training image that is not among those in use."""
        if rows.part == "test":
            return self._part("test")[rows.indices]
        places = torch.searchsorted(self.used, rows.indices).clamp(max=len(self.used) - 1)
        if not torch.equal(self.used[places], rows.indices):
            raise ValueError("features of a training image were asked for that no choice of labels holds")
        return self._part("train")[places]

    def of_others(self, used: Tensor) -> FeatureTable:
        """The same of other training images, `m` int64, sorted; nothing of it is encoded yet."""
        options = {"batch_size": self.batch_size, "workers": self.workers}
        return FeatureTable(self.encode, self.splits, used, self.accelerator, **options)

    def _part(self, part: str) -> Tensor:
        if part not in self._parts:
            began = time.perf_counter()
            indices = self.used if part == "train" else torch.arange(len(self.splits.test or ()))
            with self.accelerator.autocast():
                self._parts[part], _ = extract_features(
                    self.encode,
                    rows_of(self.splits, Rows(part, indices)),
                    batch_size=self.batch_size,
                    device=self.accelerator.device,
                    workers=self.workers,
                )
            self.encoded += len(indices)
            self.seconds += time.perf_counter() - began
        return self._parts[part]


# ---- probes of features that do not change ----


@dataclass
class ProbeProtocol:
    """A probe on a table of features; `share` has no meaning here."""

    table: FeatureTable
    labels: Tensor
    probe: Probe
    settings: Sequence[Setting]

    def cost(self, labels: int) -> float:
        """As `LabelProtocol.cost`."""
        return labels

    def predict(self, fit: Tensor, at: Rows, setting: Setting, share: float, seed: int) -> Tensor:
        """As `LabelProtocol.predict`."""
        return self.probe(self.table.at(Rows("train", fit)), self.labels[fit], self.table.at(at), setting)


def linear(train_x: Tensor, train_y: Tensor, x: Tensor, setting: Setting) -> Tensor:
    """`linear_probe` on latents `n rows cols d` pooled into `setting["cells"]` x cells, or as many as there are."""
    pooled = [_pooled(latents, setting) for latents in (train_x, x)]
    return linear_probe(pooled[0], train_y, pooled[1], _unknown(x)).predictions


def nearest(train_x: Tensor, train_y: Tensor, x: Tensor, setting: Setting) -> Tensor:
    """The vote of the `setting["neighbours"]` nearest, on pooled latents as `linear`."""
    pooled = [_pooled(latents, setting) for latents in (train_x, x)]
    centre = pooled[0].mean(0)  # latents behind a ReLU all point one way
    return knn_predictions(pooled[0] - centre, train_y, pooled[1] - centre, neighbours=int(setting["neighbours"]))


def _pooled(latents: Tensor, setting: Setting) -> Tensor:
    """A trunk that ends in one cell has no two: settings are for encoders of every kind."""
    return pool_grid(latents, min(int(setting["cells"]), *latents.shape[1:3]))


def logistic(train_x: Tensor, train_y: Tensor, x: Tensor, setting: Setting) -> Tensor:
    """`logistic_probe`, which sets its penalty itself."""
    return logistic_probe(train_x, train_y, x, _unknown(x)).predictions


def svm(train_x: Tensor, train_y: Tensor, x: Tensor, setting: Setting) -> Tensor:
    """`svm_probe`, which sets its cost and width itself."""
    return svm_probe(train_x, train_y, x, _unknown(x)).predictions


def _unknown(x: Tensor) -> Tensor:
    """Labels for probes that score themselves: the protocol's business is the predictions."""
    return torch.zeros(len(x), dtype=torch.int64)


# ---- networks ----


class Length(NamedTuple):
    """How long a trial trains: so many passes over its labels, but at `least` and at `most` so many optimizer steps.

    Example: `Length(300, 10, 2000)` with batches of 32 is 300 steps for 40 labels, 1,250 for 4,000 and 2,000 for more.
    """

    least: int
    passes: float
    most: int

    def steps(self, labels: int, batch_size: int) -> int:
        """Optimizer steps with so many labels in batches of at most this size."""
        return max(self.least, min(self.most, int(self.passes * labels / batch_size)))

    def cut_short(self, labels: int, batch_size: int) -> bool:
        """Whether `most` stands in the way of its passes."""
        return int(self.passes * labels / batch_size) > max(self.least, self.most)


class Both(NamedTuple):
    """As long as several phases together, or so many `times` as long: what training from scratch is given.

    Example: `Both((Length(300, 10, 2000), Length(100, 5, 1000)), 1.0)` is 400 steps for 40 labels.
    """

    phases: tuple[Length, ...]
    times: float

    def steps(self, labels: int, batch_size: int) -> int:
        """As `Length.steps`, never fewer than the phases' sum."""
        return round(self.times * sum(phase.steps(labels, batch_size) for phase in self.phases))

    def cut_short(self, labels: int, batch_size: int) -> bool:
        """As `Length.cut_short`, of any phase."""
        return any(phase.cut_short(labels, batch_size) for phase in self.phases)


@dataclass
class Training:
    """What all networks of a cell share: the images, how they are augmented, and how long to train.

    views: one augmented view of uint8 images, in [0, 1] and not normalised. batch_size: images a step, at most.
    workers: processes that decode images.
    """

    splits: Splits
    views: nn.Module
    accelerator: Accelerator
    length: Length | Both
    batch_size: int
    workers: int = 0

    def steps_for(self, labels: int, share: float = 1.0) -> int:
        """Of a trial with so many labels that has a share of its steps, at least 1."""
        return max(1, round(share * self.length.steps(labels, self.batch_size)))

    def on_images_(self, network: nn.Module, optimizer: Optimizer, fit: Tensor, share: float, seed: int) -> nn.Module:
        """Train a network on augmented images, in place; returns it in eval mode."""
        steps, few = self.steps_for(len(fit), share), self.splits.train.subset(fit)
        options = {"batch_size": self.batch_size, "workers": self.workers}
        batches = image_batches(few, steps=steps, seed=seed, **options)
        return train_(network, optimizer, batches, self.views, self.accelerator, steps=steps, seed=seed)

    def classes(self, network: nn.Module, at: Rows, *, batch_size: int) -> Tensor:
        """The class that a trained network gives to each image of these rows."""
        images = rows_of(self.splits, at)
        return classes_of(network, images, self.accelerator, batch_size=batch_size, workers=self.workers)

    def to_device(self, network: nn.Module) -> nn.Module:
        """Where the accelerator is, in the layout that convolutions like."""
        return network.to(self.accelerator.device).to(memory_format=torch.channels_last)


@contextmanager
def seeded(seed: int, accelerator: Accelerator) -> Iterator[None]:
    """torch's generators at a seed, the CPU's and the accelerator's, and as they were afterwards."""
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


@dataclass
class NetworkProtocol:
    """A network that is trained as a whole, from random weights or from a run's.

    build: makes the network with its first weights: images `b 3 h w` in [0, 1] -> logits.
    optimizer: of a network, for a setting: `adamw` from scratch, `sgd` for SimCLRv2's fine-tuning.
    """

    training: Training
    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module, Setting], Optimizer]
    settings: Sequence[Setting]

    def cost(self, labels: int) -> float:
        """As `LabelProtocol.cost`."""
        return self.training.steps_for(labels)

    def predict(self, fit: Tensor, at: Rows, setting: Setting, share: float, seed: int) -> Tensor:
        """As `LabelProtocol.predict`."""
        training = self.training
        with seeded(seed, training.accelerator):
            network = training.to_device(self.build())
            training.on_images_(network, self.optimizer(network, setting), fit, share, seed)
        return training.classes(network, at, batch_size=256)


def adamw(network: nn.Module, setting: Setting) -> Optimizer:
    """AdamW at `setting["lr"]` and `setting["weight_decay"]`; biases and norms do not decay."""
    return AdamW(parameter_groups(network), lr=setting["lr"], weight_decay=setting["weight_decay"])


def sgd(network: nn.Module, setting: Setting) -> Optimizer:
    """SGD with momentum at `setting["lr"]`, without decay."""
    return momentum_sgd(network, setting["lr"], 0.0)


@dataclass
class LatentProtocol:
    """A classifier on the latents of a frozen encoder: the first phase.

    Args:
        chosen: `m` int64, all training images that a trial may learn from.
        table: the encoder's grids of latents `n rows cols d` without augmentation.
        encoder: a `FrozenEncoder` with readout="grid"; its weights stay as they are.
        classifier: makes the classifier, latents `b rows cols d` -> logits.
        encodings: how many augmented images are encoded for the cell, in whole passes over those chosen.
        settings: "lr" and "weight_decay" of SGD.
    """

    training: Training
    chosen: Tensor
    table: FeatureTable
    encoder: FrozenEncoder
    classifier: Callable[[], nn.Module]
    encodings: int
    settings: Sequence[Setting]

    def cost(self, labels: int) -> float:
        """As `LabelProtocol.cost`."""
        return self.training.steps_for(labels)

    @property
    def copies_each(self) -> int:
        """How often each of the chosen images is augmented and encoded."""
        return min(64, max(1, self.encodings // len(self.chosen)))

    @cached_property
    def copies(self) -> Tensor:
        """Latents of the chosen images, augmented so many times: `copies m rows cols d`."""
        return encoded_copies(
            self.encoder,
            self.training.splits.train.subset(self.chosen),
            self.training.views,
            self.training.accelerator,
            copies=self.copies_each,
            seed=0,
            batch_size=self.encoder.batch_size,
            workers=self.training.workers,
        )

    def first_phase(self, fit: Tensor, setting: Setting, share: float, seed: int) -> nn.Module:
        """A classifier trained on the cached latents, in eval mode."""
        training, steps = self.training, self.training.steps_for(len(fit), share)
        classifier = training.to_device(self.classifier())
        batches = latent_batches(
            self.copies,
            torch.searchsorted(self.chosen, fit),
            training.splits.train.labels[fit],
            batch_size=training.batch_size,
            steps=steps,
            seed=seed,
        )
        optimizer = momentum_sgd(classifier, setting["lr"], setting["weight_decay"])
        return train_(classifier, optimizer, batches, AsTheyAre(), training.accelerator, steps=steps, seed=seed)

    def predict(self, fit: Tensor, at: Rows, setting: Setting, share: float, seed: int) -> Tensor:
        """As `LabelProtocol.predict`."""
        with seeded(seed, self.training.accelerator):
            classifier = self.first_phase(fit, setting, share, seed)
        return latent_classes(classifier, self.table.at(at), self.training.accelerator, batch_size=256)


@dataclass
class FinetuneProtocol:
    """CPC v2's two phases: a classifier on the frozen encoder, then both; Adam for the encoder, SGD for the classifier.

    Args:
        first: the first phase.
        training: of the second.
        settings: "lr" and "weight_decay" of the classifier, "encoder_lr" of the encoder.

    Of the second phase the classifier's learning rate is `SECOND_PHASE_RATE` of the first's.
    """

    first: LatentProtocol
    training: Training
    settings: Sequence[Setting]

    def cost(self, labels: int) -> float:
        """As `LabelProtocol.cost`; a step of the second phase, by far the dearer, counts as the first's."""
        return self.first.cost(labels) + self.training.steps_for(labels)

    def predict(self, fit: Tensor, at: Rows, setting: Setting, share: float, seed: int) -> Tensor:
        """As `LabelProtocol.predict`."""
        training = self.training
        with seeded(seed, self.training.accelerator):
            classifier = self.first.first_phase(fit, setting, share, seed)
            encoder = self.first.encoder.thawed()
            both = Together([
                momentum_sgd(classifier, SECOND_PHASE_RATE * setting["lr"], setting["weight_decay"]),
                Adam(encoder.parameters(), lr=setting["encoder_lr"]),
            ])  # fmt: skip
            network = training.to_device(nn.Sequential(encoder, classifier))
            training.on_images_(network, both, fit, share, seed)
        return training.classes(network, at, batch_size=encoder.batch_size)


def momentum_sgd(network: nn.Module, lr: float, weight_decay: float) -> SGD:
    """SGD with Nesterov momentum of 0.9; biases and norms do not decay."""
    return SGD(parameter_groups(network), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
