"""What the cells of a label sweep share: images, choices of labels, how long to train, features encoded once.

What each protocol makes of it is in `cpc.label_recipes`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from contrastive_core.data import ImageDataset, LabelAmount, LabelList, Splits, sample_ids, split_digest
from cpc.encoder_card import read_card
from cpc.features import load_encoder, untrained_encoder
from cpc.frozen_encoder import FrozenEncoder
from cpc.label_choices import Choices, used_by
from cpc.label_curves import SCRATCH
from cpc.label_protocols import Both, FeatureTable, Length, Training
from cpc.latent_classifier import LatentClassifier

LARGEST_PIXELS = 32
"""Pixels a side that probes of pixels see at most: larger images are averaged down."""


class Arm(NamedTuple):
    """First weights and what is done with them.

    method: the run's, "random" or "scratch". run: a folder, "" where the network starts from nothing. repeat: of the
    same method's runs, this one's place.
    """

    method: str
    protocol: str
    run: str
    repeat: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.protocol}" + (f", run {self.repeat}" if self.repeat else "")


class Cell(NamedTuple):
    """One arm with one choice of labels."""

    arm: Arm
    amount: LabelAmount | LabelList
    seed: int

    @property
    def file(self) -> str:
        """Its path below `out/cells`. Example: "CPC-0/linear/labels=40-seed0.json"."""
        return f"{self.arm.method}-{self.arm.repeat}/{self.arm.protocol}/{self.amount}-seed{self.seed}.json"

    def __str__(self) -> str:
        return f"{self.arm}: {self.amount}, seed {self.seed}"


# ---- what the cells share ----


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How every cell learns.

    views: one augmented view of uint8 images, in [0, 1] and not normalised.
    cnn: makes the ordinary network's encoder.
    classifier: arguments of `LatentClassifier`.
    lengths, settings: by protocol; "scratch" for all networks from random weights.
    batch_size: images a step. encodings: as `LatentProtocol`'s. head_layer: of "head".
    mode: how encoders of patches are run; None = as they were trained. readout: what is read off those of patches,
        "grid" or "context".
    seed: of the untrained encoder. workers: processes that decode images.
    precision: of every forward pass. described: the configurations of views and cnn, by name.
    """

    views: nn.Module
    cnn: Callable[[], nn.Module]
    classifier: Mapping[str, Any]
    lengths: Mapping[str, Length | Both]
    settings: Mapping[str, Sequence[Mapping[str, float]]]
    batch_size: int
    encodings: int
    head_layer: int
    mode: str | None
    readout: str
    seed: int
    workers: int
    precision: str
    described: Mapping[str, Any]


class Bench:
    """What the cells share: images, choices of labels, and features that are encoded once.

    Args: `splits`: all labelled; those of the test images, and of the training images in `choices`, can be decoded.
    """

    def __init__(self, plan: Plan, splits: Splits, choices: Choices, accelerator: Accelerator) -> None:
        self.plan, self.splits, self.choices, self.accelerator = plan, splits, choices, accelerator
        self.labels, self.ids = splits.train.labels, sample_ids(splits.train)
        self.used = used_by(choices)
        self.tables: dict[tuple[str, bool], FeatureTable] = {}
        self._encoders: dict[tuple[str, bool], FrozenEncoder] = {}

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.labels.max()) + 1

    def encoder(self, arm: Arm) -> FrozenEncoder:
        """An arm's frozen encoder, which gives grids."""
        key = arm.run, arm.method == "random"
        if key not in self._encoders:
            read = partial(untrained_encoder, seed=self.plan.seed) if key[1] else load_encoder
            encoder = read(arm.run, readout=self.readout_for(arm.run), mode=self.mode_for(arm.run))
            self._encoders[key] = encoder.to(self.accelerator.device)
        return self._encoders[key]

    def mode_for(self, run: str) -> str | None:
        """`plan.mode`, but an encoder of whole images has one only."""
        return self.plan.mode if read_card(run)[1]["input"].get("patch_size") else None

    def readout_for(self, run: str) -> str:
        """`plan.readout`, but what is run on whole images, or has no context networks, has its grid only."""
        _, card = read_card(run)
        by_patch = card["input"].get("patch_size") and self.plan.mode != "image"
        return self.plan.readout if by_patch and card.get("context") else "grid"

    def table(self, arm: Arm) -> FeatureTable:
        """Grids of latents of an arm's frozen encoder."""
        key = arm.run, arm.method == "random"
        if key not in self.tables:
            encoder = self.encoder(arm)
            self.tables[key] = FeatureTable(
                encoder,
                self.splits,
                self.used,
                self.accelerator,
                batch_size=encoder.batch_size,
                workers=self.plan.workers,
            )
        return self.tables[key]

    @cached_property
    def pixels(self) -> FeatureTable:
        """Pixels as features, one channel of three where the training images have no colour."""
        some = torch.linspace(0, len(self.labels) - 1, 256).long().unique()  # whichever labels are in use
        sample = torch.stack([self.splits.train[int(i)].image for i in some])
        grey = bool((sample[:, :1] == sample).all())

        def flat(images: Tensor) -> Tensor:
            images = images[:, :1] if grey else images
            return (
                adaptive_avg_pool2d(images, LARGEST_PIXELS) if images.shape[-1] > LARGEST_PIXELS else images
            ).flatten(1)

        return FeatureTable(flat, self.splits, self.used, self.accelerator, workers=self.plan.workers)

    def training(self, name: str) -> Training:
        """How long a protocol trains, on what."""
        return Training(
            self.splits,
            self.plan.views,
            self.accelerator,
            self.plan.lengths[name],
            self.plan.batch_size,
            self.plan.workers,
        )

    def classifier(self, dim: int) -> nn.Module:
        """A classifier on a grid of latents."""
        return LatentClassifier(dim, self.classes, **self.plan.classifier)

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What the results of all cells in a folder have in common, whichever command has made them."""
        everyone = torch.arange(len(self.labels))
        return {
            "train": split_digest(self.ids, self.labels, everyone),
            "test": split_digest(sample_ids(self.test), self.test.labels, torch.arange(len(self.test))),
            "pixels": self.test.size,
            "precision": self.plan.precision,
        }

    @property
    def making(self) -> dict[str, Any]:
        """How networks are trained, the same for all in a folder: else those from scratch might be trained less."""
        steps = {phase: json.dumps(length) for phase, length in self.plan.lengths.items()}
        return {"steps": steps, "batch_size": self.plan.batch_size, "views": self.plan.described["views"]}

    @property
    def test(self) -> ImageDataset:
        """The test images."""
        assert self.splits.test is not None
        return self.splits.test

    def first_weights(self, arm: Arm) -> Any:
        """Stands for the weights that an arm begins with: a run's digest, or how they are made where there is none."""
        if arm.method not in (SCRATCH, "random"):
            return run_fingerprint(arm.run)
        _, card = read_card(arm.run)
        parts = ["architecture", "input", *(["context"] if self.readout_for(arm.run) == "context" else [])]
        seed = {"seed": self.plan.seed} if arm.method == "random" else {}
        return {part: card[part] for part in parts} | seed


@functools.lru_cache(maxsize=64)
def run_fingerprint(run: str) -> str:
    """Stands for a run's encoder, its card, and what it keeps beside them: twelve hexadecimal digits."""
    weights, _ = read_card(run)
    digest = hashlib.sha256()
    for name in ("encoder.json", "encoder.safetensors", "context.safetensors", "head.safetensors"):
        file = weights.with_suffix(".json") if name == "encoder.json" else weights.with_name(name)
        digest.update(name.encode() + (file.read_bytes() if file.is_file() else b""))
    return digest.hexdigest()[:12]
