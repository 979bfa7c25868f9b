"""The protocols of a label sweep by name: what each begins with and is tried with, what its result depends on.

A new one is one more `Recipe` and the function that builds it; the command, its checks, the cells' files and the plan
of their costs follow. What is learned, and how, is in `cpc.label_protocols`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from contrastive_core.evaluate.selection import LabelProtocol, Rows, choose_setting
from contrastive_core.methods.classifier import Classifier
from cpc.encoder_card import build_encoder, read_card
from cpc.features import FrozenClassifier, build_contexts, load_head, read_encoder
from cpc.frozen_encoder import FrozenEncoder
from cpc.label_bench import Arm, Bench, Cell
from cpc.label_protocols import (
    FinetuneProtocol,
    LatentProtocol,
    NetworkProtocol,
    Probe,
    ProbeProtocol,
    Setting,
    adamw,
    linear,
    logistic,
    nearest,
    sgd,
    svm,
)
from cpc.latent_classifier import LatentClassifier

Settings = Sequence[Setting]
Build = Callable[[Bench, Arm, Tensor, Settings], LabelProtocol[Any]]
"""(what cells share, the arm, the images whose labels may be used, settings to choose from) -> the protocol."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A protocol.

    starts: the keys of the command that may name it: "protocols" of runs, "random" of a run's encoder untrained,
        "scratch".
    build: makes it for one arm and one choice of labels.
    settings: whose list of settings it is tried with; "" = it sets itself.
    in_a_setting: what each of them says.
    phases: what it trains through, names of `Plan.lengths`; none of what has no optimizer.
    reads: what else its result depends on, names of `DEPENDS`.
    version: of what it computes; one more where its results change, so that older cells are refused.
    """

    starts: tuple[str, ...]
    build: Build
    settings: str = ""
    in_a_setting: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    version: int = 1

    @property
    def takes_steps(self) -> bool:
        """Whether it has an optimizer."""
        return bool(self.phases)


DEPENDS: Mapping[str, Callable[[Bench, Arm], Any]] = {
    "encoder": lambda bench, arm: bench.first_weights(arm),
    "mode": lambda bench, arm: bench.mode_for(arm.run),
    "readout": lambda bench, arm: bench.readout_for(arm.run),
    "classifier": lambda bench, arm: dict(bench.plan.classifier),
    "dropout": lambda bench, arm: bench.plan.classifier["dropout"],
    "encodings": lambda bench, arm: bench.plan.encodings,
    "head_layer": lambda bench, arm: bench.plan.head_layer,
    "normalisation": lambda bench, arm: normalisation_of(arm.run),
    "cnn": lambda bench, arm: bench.plan.described["cnn"],
}
"""What a result may depend on, of the plan and of an arm. What all cells share is in `Bench.shared`, what all that are
trained share in `Bench.making`."""


# ---- how they are built ----


def on_latents(probe: Probe, bench: Bench, arm: Arm, chosen: Tensor, settings: Settings) -> LabelProtocol[Any]:
    """A probe on the latents of a frozen encoder."""
    return ProbeProtocol(bench.table(arm), bench.labels, probe, settings)


def on_pixels(probe: Probe, bench: Bench, arm: Arm, chosen: Tensor, settings: Settings) -> LabelProtocol[Any]:
    """A probe on pixels."""
    return ProbeProtocol(bench.pixels, bench.labels, probe, settings)


def latent_classifier(bench: Bench, arm: Arm, chosen: Tensor, settings: Settings) -> LatentProtocol:
    """A network on the latents of a frozen encoder."""
    encoder = bench.encoder(arm)
    return LatentProtocol(
        bench.training("classifier"),
        chosen,
        bench.table(arm),
        encoder,
        partial(bench.classifier, encoder.grid_dim),
        bench.plan.encodings,
        settings,
    )


def both_phases(bench: Bench, arm: Arm, chosen: Tensor, settings: Settings) -> LabelProtocol[Any]:
    """The same, then encoder and classifier together."""
    return FinetuneProtocol(latent_classifier(bench, arm, chosen, settings), bench.training("finetune"), settings)


def through_the_head(bench: Bench, arm: Arm, chosen: Tensor, settings: Settings) -> LabelProtocol[Any]:
    """SimCLRv2's fine-tuning, from a layer of the projection head."""
    return NetworkProtocol(bench.training("head"), partial(with_head, bench, arm), sgd, settings)


def from_random_weights(
    network: Callable[[Bench, Arm], nn.Module], bench: Bench, arm: Arm, chosen: Tensor, settings: Settings
) -> LabelProtocol[Any]:
    """A network that starts from nothing."""
    return NetworkProtocol(bench.training("scratch"), partial(network, bench, arm), adamw, settings)


def with_head(bench: Bench, arm: Arm) -> nn.Module:
    """A run's encoder with the first layers of its head and a linear layer: images in [0, 1] -> logits."""
    encoder, card = read_encoder(arm.run)
    head = load_head(arm.run).upto(bench.plan.head_layer)
    network = Classifier(encoder, classes=bench.classes, head=head)
    return FrozenClassifier(network, card["input"], bench.splits.train.class_names)


def ordinary(bench: Bench, arm: Arm) -> nn.Module:
    """The plan's CNN; it ends in a mean and a linear layer, as usual."""
    reads = FrozenEncoder(bench.plan.cnn(), **normalisation_of(arm.run), readout="grid")
    dropout = bench.plan.classifier["dropout"]
    return nn.Sequential(reads, LatentClassifier(reads.dim, bench.classes, blocks=0, dropout=dropout))


def normalisation_of(run: str) -> dict[str, Any]:
    """What the CNN takes from a run: how large images are, and their mean and deviation."""
    fed = read_card(run)[1]["input"]
    return {name: fed.get(name) for name in ("image_size", "load_size", "mean", "std")}


def on_whole_images(bench: Bench, arm: Arm) -> nn.Module:
    """A run's architecture from random weights, with a classifier on its map of the whole image."""
    _, card = read_card(arm.run)
    reads = FrozenEncoder(build_encoder(card["architecture"]), **card["input"], mode="image", readout="grid")
    return nn.Sequential(reads, bench.classifier(reads.grid_dim))


def on_patches(bench: Bench, arm: Arm) -> nn.Module:
    """The same patch by patch, and with context networks where runs are read with theirs."""
    _, card = read_card(arm.run)
    readout = bench.readout_for(arm.run)
    contexts = build_contexts(card) if readout == "context" else None
    encoder = build_encoder(card["architecture"])
    reads = FrozenEncoder(encoder, **card["input"], mode="patches", readout=readout, context=contexts)
    return nn.Sequential(reads, bench.classifier(reads.grid_dim))


# ---- by name ----

LATENTS = ("encoder", "mode", "readout")
STEPS = ("lr", "weight_decay")

RECIPES: Mapping[str, Recipe] = {
    "linear": Recipe(
        starts=("protocols", "random"),
        build=partial(on_latents, linear),
        settings="linear",
        in_a_setting=("cells",),
        reads=LATENTS,
    ),
    "knn": Recipe(
        starts=("protocols", "random"),
        build=partial(on_latents, nearest),
        settings="knn",
        in_a_setting=("neighbours", "cells"),
        reads=LATENTS,
    ),
    "classifier": Recipe(
        starts=("protocols", "random"),
        build=latent_classifier,
        settings="classifier",
        in_a_setting=STEPS,
        phases=("classifier",),
        reads=(*LATENTS, "classifier", "encodings"),
    ),
    "finetune": Recipe(
        starts=("protocols",),
        build=both_phases,
        settings="finetune",
        in_a_setting=(*STEPS, "encoder_lr"),
        phases=("classifier", "finetune"),
        reads=(*LATENTS, "classifier", "encodings"),
    ),
    "head": Recipe(
        starts=("protocols",),
        build=through_the_head,
        settings="head",
        in_a_setting=("lr",),
        phases=("head",),
        reads=("encoder", "head_layer"),
    ),
    "logistic": Recipe(starts=("scratch",), build=partial(on_pixels, logistic)),
    # version 2: its kernel is chosen by the rule of one standard error
    "svm": Recipe(starts=("scratch",), build=partial(on_pixels, svm), version=2),
    "cnn": Recipe(
        starts=("scratch",),
        build=partial(from_random_weights, ordinary),
        settings="scratch",
        in_a_setting=STEPS,
        phases=("scratch",),
        reads=("cnn", "normalisation", "dropout"),
    ),
    "image": Recipe(
        starts=("scratch",),
        build=partial(from_random_weights, on_whole_images),
        settings="scratch",
        in_a_setting=STEPS,
        phases=("scratch",),
        reads=("encoder", "classifier"),
    ),
    "patches": Recipe(
        starts=("scratch",),
        build=partial(from_random_weights, on_patches),
        settings="scratch",
        in_a_setting=STEPS,
        phases=("scratch",),
        reads=(*LATENTS, "classifier"),
    ),
}


def protocols_of(start: str) -> list[str]:
    """The protocols that a key of the command may name. Example: of "random" linear, knn and classifier."""
    return [name for name, recipe in RECIPES.items() if start in recipe.starts]


def networks_from_scratch() -> list[str]:
    """The protocols from scratch that take optimizer steps."""
    return [name for name in protocols_of("scratch") if RECIPES[name].takes_steps]


def protocol_of(bench: Bench, arm: Arm, chosen: Tensor) -> LabelProtocol[Any]:
    """What an arm does with the labels of the chosen images."""
    return RECIPES[arm.protocol].build(bench, arm, chosen, _settings_of(bench, arm))


def asked_of(bench: Bench, arm: Arm) -> dict[str, Any]:
    """What an arm's results depend on, to tell whether one that is there is the one that is asked for."""
    recipe = RECIPES[arm.protocol]
    own: dict[str, Any] = {"settings": [dict(setting) for setting in _settings_of(bench, arm)]}
    own |= {"version": recipe.version} if recipe.version > 1 else {}  # older cells say none
    return own | making_of(bench, recipe.phases) | {name: DEPENDS[name](bench, arm) for name in recipe.reads}


def making_of(bench: Bench, phases: Collection[str]) -> dict[str, Any]:
    """The part of `Bench.making` that a network depends on which trains for these phases; none for no phase."""
    making = bench.making
    return making | {"steps": {phase: making["steps"][phase] for phase in phases}} if phases else {}


def _settings_of(bench: Bench, arm: Arm) -> Settings:
    recipe = RECIPES[arm.protocol]
    return bench.plan.settings[recipe.settings] if recipe.settings else [{}]


def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Choose settings, learn from all labels of the cell, and look at the test images once."""
    began = time.perf_counter()
    choice = bench.choices[cell.amount, cell.seed]
    protocol = protocol_of(bench, cell.arm, choice.indices)
    setting = choose_setting(protocol, choice.indices, bench.labels, seed=cell.seed, ids=bench.ids)
    everything = Rows("test", torch.arange(len(bench.test)))
    predictions = protocol.predict(choice.indices, everything, setting, 1.0, cell.seed)
    right = predictions == bench.test.labels
    per_class = [right[bench.test.labels == label].double().mean().item() for label in bench.test.labels.unique()]
    return {
        "method": cell.arm.method,
        "protocol": cell.arm.protocol,
        "repeat": cell.arm.repeat,
        "amount": str(cell.amount),
        "labels": len(choice.indices),
        "fraction": len(choice.indices) / len(bench.labels),
        "seed": cell.seed,
        "split": choice.digest,
        "accuracy": right.double().mean().item(),
        "class_accuracy": sum(per_class) / len(per_class),
        "setting": dict(setting),
        "seconds": round(time.perf_counter() - began, 2),
        "draws": sum(len(other.indices) == len(choice.indices) for other in bench.choices.values()),
        "shared": bench.shared,
        "asked": asked_of(bench, cell.arm),
        "predictions": predictions.tolist(),
    }
