"""What the command line of a label sweep may say: types of its keys, and mistakes in their values.

Told before anything is read, in a line that names the key and what to pass. What runs and images say against a command
is told by those who read them, `cpc.label_arms` and `cpc.label_choices`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from contrastive_core.data import LabelAmount, names_listed
from cpc.entry import build
from cpc.frozen_encoder import MODES
from cpc.label_cells import check_trials
from cpc.label_curves import SCRATCH
from cpc.label_recipes import RECIPES, protocols_of
from cpc.run import plain

LEAST = {"lr": 0, "weight_decay": 0, "encoder_lr": 0, "neighbours": 1, "cells": 1}
"""The least that a setting may say."""
WHOLE = ("neighbours", "cells")
"""Settings that count something."""


@dataclass
class LengthSchema:
    """Types of the keys below each of `steps`."""

    least: int
    passes: float
    most: int


@dataclass
class StepsSchema:
    """Types of the keys below `steps`."""

    classifier: LengthSchema
    finetune: LengthSchema


@dataclass
class SweepSchema:
    """Types of the top-level keys of configs/sweep_labels.yaml."""

    runs: list[str]
    out: str
    fractions: list[float]
    labels: list[int]
    labels_per_class: list[int]
    label_lists: list[str]
    draws: int
    few: float
    draws_above: int
    protocols: list[str]
    random: list[str]
    scratch: list[str]
    mode: str | None
    readout: str
    steps: StepsSchema
    scratch_times: float
    batch_size: int
    encodings: int
    head_layer: int
    classifier: dict[str, Any]
    cnn: Any
    settings: dict[str, Any]
    shard: int
    shards: int
    seed: int
    bad_images: float
    workers: int
    precision: str
    device: str | None
    threads: int | None
    load_size: int | None
    image_size: int | None
    mean: list[float]
    std: list[float]
    augmentation: dict[str, Any]
    data: Any = None
    views: Any = None


def check_asked(cfg: DictConfig) -> None:
    """Raise ValueError that names the first key whose value cannot be meant, before anything is read."""
    _check_arms(cfg)
    _check_numbers(cfg)
    _check_images(cfg)
    _check_choices(cfg)
    asked = [RECIPES[name] for name in (*cfg.protocols, *cfg.random, *cfg.scratch)]
    for name, keys in {recipe.settings: recipe.in_a_setting for recipe in asked if recipe.settings}.items():
        _check_settings(name, keys, cfg.settings.get(name))
    named = [(SCRATCH, name) for name in cfg.scratch] + [("pre-trained", name) for name in cfg.protocols]
    trained = [arm for arm in named if RECIPES[arm[1]].takes_steps]
    check_trials({arm: len(cfg.settings[RECIPES[arm[1]].settings]) for arm in trained})


def _check_arms(cfg: DictConfig) -> None:
    for name, hint in {"runs": "[DIR,...], folders of finished runs", "out": "DIR, where the results go"}.items():
        if OmegaConf.is_missing(cfg, name) or not cfg[name]:
            raise ValueError(f"not given: {name}; pass {name}={hint}")
    for name in ("protocols", "random", "scratch"):
        unknown = [protocol for protocol in cfg[name] if protocol not in protocols_of(name)]
        if unknown:
            raise ValueError(f"{name}={unknown}: pass some of {', '.join(protocols_of(name))}")
        if len(set(cfg[name])) < len(cfg[name]):
            raise ValueError(f"{name}={list(cfg[name])}: pass each once")
    if not (cfg.protocols or cfg.random or cfg.scratch):
        raise ValueError("no arm asked for: pass protocols=, random= or scratch=, or leave them as they are")
    if not amounts_of(cfg) and not cfg.label_lists:
        raise ValueError(
            "no labels asked for: pass fractions=[0.01,0.1], labels=[20,40], labels_per_class=[1,2] or "
            "label_lists=[FILE]"
        )
    if amounts_of(cfg) and cfg.label_lists:
        raise ValueError(
            "label_lists beside fractions=, labels= or labels_per_class=: lists and draws make no common curve, pass "
            "either, each with an out= of its own"
        )
    for file in cfg.label_lists:
        names_listed(file)


def _check_numbers(cfg: DictConfig) -> None:
    least = dict.fromkeys(("draws", "draws_above", "batch_size", "encodings", "shards"), 1)
    for name, number in (least | {"workers": 0, "head_layer": 0}).items():
        if cfg[name] < number:
            raise ValueError(f"{name}={cfg[name]}: pass at least {number}")
    for name in ("few", "bad_images"):
        if not 0 <= cfg[name] <= 1:
            raise ValueError(f"{name}={cfg[name]}: pass a share from 0 to 1")
    dropout = cfg.classifier.get("dropout")
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise ValueError(f"classifier.dropout={dropout}: pass a share from 0 to below 1")
    with torch.device("meta"):  # its sizes, whatever they are, without the memory
        build({"_target_": "cpc.latent_classifier.LatentClassifier", "dim": 1, "classes": 2, **plain(cfg.classifier)})
    if not 0 <= cfg.shard < cfg.shards:
        raise ValueError(f"shard={cfg.shard} of shards={cfg.shards}: pass 0 to {cfg.shards - 1}")
    for name, length in cfg.steps.items():
        if not (1 <= length.least <= length.most and 0 <= length.passes < math.inf):
            raise ValueError(f"steps.{name}={dict(length)}: pass 1 <= least <= most, and passes of at least 0")
    if not 1 <= cfg.scratch_times < math.inf:
        raise ValueError(f"scratch_times={cfg.scratch_times}: pass at least 1, as many steps as both phases together")
    if not 0 <= cfg.seed < 2**63:
        raise ValueError(f"seed={cfg.seed}: pass a whole number from 0 to {2**63 - 1}")
    if cfg.load_size is not None and cfg.load_size < 1:
        raise ValueError(f"load_size={cfg.load_size}: pass at least 1, or null for what the runs were trained on")


def _check_images(cfg: DictConfig) -> None:
    """Frozen encoders and networks from scratch are fed alike: whatever is done to images, they do it themselves."""
    if cfg.image_size != cfg.load_size:
        raise ValueError(f"image_size={cfg.image_size}: images are as large as load_size says, leave it out")
    for name, plain_value in {"mean": 0.0, "std": 1.0}.items():
        if list(cfg[name]) != [plain_value] * 3:
            raise ValueError(f"{name}={list(cfg[name])}: encoders normalise by themselves, leave it out")
    for name in ("image_size", "mean", "std"):
        if cfg.views.get(name, cfg[name]) != cfg[name]:
            raise ValueError(f"views.{name}={cfg.views[name]}: frozen encoders see no views, leave it out")


def _check_choices(cfg: DictConfig) -> None:
    if cfg.mode is not None and cfg.mode not in MODES:
        raise ValueError(f"mode={cfg.mode}: pass one of {', '.join(MODES)}, or null")
    if cfg.readout not in ("grid", "context"):
        raise ValueError(f"readout={cfg.readout}: pass grid, or context for CPC's latents with their contexts")
    if not (OmegaConf.is_dict(cfg.cnn) and cfg.cnn.get("_target_")):
        raise ValueError(f"cnn={cfg.cnn}: pass cnn._target_=NAME, or leave it out")
    if cfg.precision == "fp16":
        raise ValueError("precision=fp16: pass precision=bf16 or precision=no")


def _check_settings(name: str, keys: Sequence[str], settings: Any) -> None:
    shown = f"'settings.{name}=[{{{','.join(f'{key}:NUMBER' for key in keys)}}}]'"
    if not settings:
        raise ValueError(f"settings.{name} has none: pass {shown}, one setting or more")
    for setting in settings:
        if not (OmegaConf.is_dict(setting) and setting.keys() == set(keys)):  # a shell may have eaten braces and commas
            raise ValueError(f"settings.{name} has {setting!r}: pass {shown} in quotes, one setting or more")
        for key, value in setting.items():
            kind = int if key in WHOLE else int | float
            if not (isinstance(value, kind) and LEAST[key] <= value < math.inf):
                what = "whole number" if key in WHOLE else "number"
                raise ValueError(f"settings.{name} has {key}={value}: pass a {what} of at least {LEAST[key]}")


def amounts_of(cfg: DictConfig) -> list[LabelAmount]:
    """The label counts that are asked for, in the order given."""
    kinds = {"fraction": cfg.fractions, "labels": cfg.labels, "labels_per_class": cfg.labels_per_class}
    return [LabelAmount(kind, float(value)) for kind, values in kinds.items() for value in values]
