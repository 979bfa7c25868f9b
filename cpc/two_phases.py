"""CPC v2's fine-tuning from its configuration: `tools/finetune.py protocol=cpc_v2 run=DIR labels=N`.

Henaff et al. 2020, A.4: a residual network on the grid of latents is trained on the frozen encoder, then both are, the
network by SGD and the encoder by Adam. Each phase is a run, with checkpoints and exports; the first lies in a folder
within the second's. Learning rates and lengths are ours (configs/protocol/cpc_v2.yaml), as the paper's are not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from contrastive_core.data import ImageDataset
from contrastive_core.method import Method
from contrastive_core.optim import Together, parameter_groups
from contrastive_core.randomness import Randomness
from cpc.encoder_card import read_card
from cpc.entry import build, run_name
from cpc.features import load_contexts, read_classifier, read_encoder
from cpc.frozen_encoder import MODES, READOUTS, Latents
from cpc.grid_classifier import GridClassifier
from cpc.pretrain import encoder_card
from cpc.run import Pieces, accelerator_of, plain, train_run
from cpc.run_folder import check_folder, choose_run_dir

FIRST_PHASE = "first_phase"
"""The folder of the first of two phases, within the second's."""


@dataclass
class GridSchema:
    """Types of the keys below `grid` in configs/protocol/cpc_v2.yaml."""

    mode: str | None
    readout: str
    first_steps: int
    classifier_rate: float
    encoder_optimizer: Any
    classifier: dict[str, Any]


def settle_grid_(cfg: DictConfig) -> None:
    """Fill in the patches that the run was trained on, and check what needs no data; ValueError for what cannot be."""
    typed = OmegaConf.create({"grid": OmegaConf.structured(GridSchema)})
    cfg.grid = OmegaConf.merge(typed, {"grid": cfg.grid}).grid
    _check_grid(cfg)
    grid, fed = cfg.grid, read_card(cfg.run)[1]["input"]
    if fed.get("patch_size") and grid.mode != "image":
        cfg.patch = {"size": fed["patch_size"], "stride": fed["stride"]}
    elif grid.readout == "context" and fed.get("patch_size"):
        raise ValueError("grid.readout=context reads patches: leave grid.mode=image out, or pass grid.readout=grid")
    elif grid.mode == "patches":
        raise ValueError(f"grid.mode=patches: {cfg.run} was trained on whole images, leave grid.mode out")
    method = build_grid_classifier(cfg, 2).eval()
    try:
        with torch.no_grad():
            method.logits(torch.zeros(1, 3, cfg.image_size, cfg.image_size))
    except (RuntimeError, ValueError) as error:  # a transformer has none
        raise ValueError(
            f"{cfg.run} gives no grid of latents ({error}): pass a run of another encoder, or leave protocol=cpc_v2 out"
        ) from error


def _check_grid(cfg: DictConfig) -> None:
    grid = cfg.grid
    if cfg.head_layer != 0:
        raise ValueError(f"head_layer={cfg.head_layer}: protocol=cpc_v2 reads the grid of latents, pass head_layer=0")
    if grid.mode not in (None, *MODES) or grid.readout not in READOUTS[1:]:
        raise ValueError(
            f"grid.mode={grid.mode} grid.readout={grid.readout}: pass one of {MODES} and one of {READOUTS[1:]}"
        )
    if grid.first_steps < 1 or not 0 < grid.classifier_rate <= 1:
        raise ValueError(
            f"grid.first_steps={grid.first_steps} grid.classifier_rate={grid.classifier_rate}: pass at least 1 step, "
            f"and a part above 0 and up to 1"
        )
    if cfg.exclude_also or cfg.constant_rate:
        raise ValueError("exclude_also and constant_rate have no meaning with protocol=cpc_v2: leave them out")
    if not isinstance(build(grid.encoder_optimizer, [nn.Parameter(torch.zeros(1, 1))], _partial_=False), Optimizer):
        raise ValueError(
            f"grid.encoder_optimizer={grid.encoder_optimizer} is no optimizer: leave it out, or set its lr"
        )


def build_grid_classifier(cfg: DictConfig, classes: int, first: Path | None = None) -> GridClassifier:
    """What is trained in a phase; `first`: the folder of the phase before, whose classifier it goes on with.

    Raises ValueError where the run has no such latents, or the classifier cannot be built.
    """
    encoder, _ = read_encoder(cfg.run)
    contexts = load_contexts(cfg.run) if cfg.grid.readout == "context" else None
    geometry = {} if cfg.patch is None else {"patch_size": cfg.patch.size, "stride": cfg.patch.stride}
    latents = Latents(encoder, **geometry, readout=cfg.grid.readout, context=contexts)
    if first is None:
        sizes = {"dim": latents.grid_dim, "classes": classes}
        node = {"_target_": "cpc.latent_classifier.LatentClassifier", **plain(cfg.grid.classifier), **sizes}
        classifier = build(node)
    else:
        classifier = read_classifier(first)[0].classifier
    return GridClassifier(latents, classifier, frozen=cfg.frozen, label_smoothing=cfg.label_smoothing)


def both_optimizers(cfg: DictConfig, method: Method) -> Optimizer:
    """Of the second phase: the classifier's, at a part of its first rate, and the encoder's own."""
    assert isinstance(method, GridClassifier)
    rate = cfg.grid.classifier_rate * cfg.optimizer.lr
    classifier, latents = (parameter_groups(part, exclude=cfg.exclude) for part in (method.classifier, method.latents))
    return Together([
        build(cfg.optimizer, classifier, lr=rate, _partial_=False),
        build(cfg.grid.encoder_optimizer, latents, _partial_=False),
    ])  # fmt: skip


def two_phases(cfg: DictConfig, few: ImageDataset) -> dict[str, Path]:
    """CPC v2's: the classifier on the frozen encoder, then both; with frozen=true the first alone. Returns the folders.

    Each phase is a run; a first one that has come to its end is not run again.
    """
    if cfg.frozen:
        return {"fine-tuned": train_run(cfg, partial(phase_of, cfg, few))}

    accelerator = accelerator_of(cfg)
    run_dir = choose_run_dir(cfg.run_dir, run_name(), accelerator)
    cfg.run_dir, before = str(run_dir), run_dir / FIRST_PHASE
    first = first_of_two(cfg, before)
    check_folder(run_dir, plain(cfg), resume=cfg.resume == "auto")
    if (before / "encoder.json").is_file():  # what a run writes last
        check_folder(before, plain(first), resume=cfg.resume == "auto")
    else:
        train_run(first, partial(phase_of, first, few), phase_of=run_dir)
    return {
        "fine-tuned": train_run(cfg, partial(phase_of, cfg, few, before)),
        "first phase, encoder frozen": before,
    }


def first_of_two(cfg: DictConfig, folder: Path) -> DictConfig:
    """The first phase's configuration, without what it does not read, and with a seed of its own.

    With the second's it would see the very images, in the same order, that the second will see again.
    """
    first = cfg.copy()
    first.frozen, first.steps, first.run_dir = True, cfg.grid.first_steps, str(folder)
    first.seed = int(Randomness(cfg.seed, 0, torch.zeros(1, dtype=torch.int64)).integers("first phase", 1 << 62))
    first.grid.encoder_optimizer, first.grid.classifier_rate = None, 1.0
    return first


def phase_of(cfg: DictConfig, few: ImageDataset, first: Path | None = None) -> Pieces:
    """A phase of two; `first`: as `build_grid_classifier`."""
    method = build_grid_classifier(cfg, few.classes, first)
    optimizer = None if cfg.frozen else partial(both_optimizers, cfg)
    return Pieces(method, build(cfg.views), few, encoder_card(cfg, method), optimizer)
