"""Pre-training from the command line: `accelerate launch tools/pretrain.py method=NAME [overrides]`.

This is an entry point: it reads the configuration and builds the pieces; `cpc.run` trains them. tools/pretrain_cpc.py
is the same with method=cpc, and `accelerate launch -m cpc.pretrain` is that from an install.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from contrastive_core.data import ImageDataset
from contrastive_core.method import Method
from contrastive_core.randomness import Randomness
from cpc.entry import build, command, warn_of_unread_keys
from cpc.method import CPC
from cpc.mistakes import out_of_memory
from cpc.negatives import count_negatives
from cpc.prediction import check_offsets
from cpc.run import Pieces, plain, train_run
from cpc.views import PatchViews


@dataclass
class PretrainSchema:
    """Types of the top-level keys of configs/pretrain.yaml, so that `steps=abc` is refused."""

    seed: int
    steps: int
    batch_size: int
    accumulate: int
    recompute: bool
    shard: bool
    grad_cache: bool
    precision: str
    device: str | None
    workers: int
    threads: int | None
    timeout: float
    run_dir: str | None
    resume: str | None
    save_every: int
    keep_checkpoints: int
    log_every: int
    trackers: list[str]
    probe_every: int
    probe_images: int
    profile: bool
    bad_images: float
    load_size: int
    image_size: int
    patch: dict[str, int] | None
    mean: list[float]
    std: list[float]
    augmentation: dict[str, Any]
    norm: str
    global_batch_norm: bool
    temperature: dict[str, float]
    memory: dict[str, int]
    momentum: dict[str, float]
    schedule: Any
    exclude: bool
    exclude_also: list[str]
    constant_rate: list[str]
    clip: float | None
    averaging: float | None
    data: Any
    encoder: Any
    method: Any
    views: Any
    optimizer: Any
    loss: Any = None
    ladder: Any = None


def encoder_input(cfg: DictConfig) -> dict[str, Any]:
    """What the encoder is fed, as `FrozenEncoder` takes it and `encoder.json` says it."""
    patch = {} if cfg.patch is None else {"patch_size": cfg.patch.size, "stride": cfg.patch.stride}
    sizes = {"load_size": cfg.load_size, "image_size": cfg.image_size}
    return {**sizes, **patch, "mean": list(cfg.mean), "std": list(cfg.std)}


def encoder_card(cfg: DictConfig, method: Method) -> dict[str, Any]:
    """What `encoder.json` says: how to build the encoder, what to feed it, and where it comes from."""
    arguments = plain(cfg.encoder)
    name = arguments.pop("_target_")
    return {
        "architecture": {"name": name, "arguments": arguments},
        "input": encoder_input(cfg),
        "dim": method.encoder.dim,
        "method": type(method).__name__,
    }


def build_method(cfg: DictConfig, dataset: ImageDataset | None = None) -> tuple[Method, nn.Module]:
    """The method and its views; whatever does not fit is an error here, before any data is read.

    What depends on the data set is filled in: `images` for a memory bank, `classes` for a classifier; without one, 2.
    """
    views: nn.Module = build(cfg.views)
    known = {"images": 2 if dataset is None else len(dataset), "classes": 2 if dataset is None else dataset.classes}
    filled = {name: value for name, value in known.items() if name in cfg.method and cfg.method[name] is None}
    method: Method = build(cfg.method, encoder=build(cfg.encoder), **filled)
    if isinstance(method, CPC) and isinstance(views, PatchViews):
        check_offsets(method.offsets, views.grid, views.grid, method.directions)
    black = torch.zeros(2, 3, cfg.load_size, cfg.load_size, dtype=torch.uint8)
    views(black, Randomness(cfg.seed, 0, torch.arange(2)))
    return method, views


def check_batch(cfg: DictConfig, method: Method, views: nn.Module) -> None:
    """Raise ValueError for a batch in which no image has a negative, or no patch as many as it is to have."""
    contrasted = cfg.batch_size if cfg.grad_cache else cfg.batch_size // cfg.accumulate
    if contrasted < method.least_images:
        raise ValueError(
            f"batch_size={cfg.batch_size} accumulate={cfg.accumulate}: {type(method).__name__} contrasts {contrasted} "
            f"image at a time, which has no negative: pass a batch_size of at least {2 * cfg.accumulate}"
        )
    if isinstance(method, CPC) and isinstance(views, PatchViews):
        count_negatives(method.negatives, method.negatives_k, contrasted, views.grid**2)


def check_reads(cfg: DictConfig, encoder: nn.Module) -> None:
    """Raise ValueError for an encoder that makes nothing of images, or patches, of the size that it will be given."""
    size = cfg.image_size if cfg.patch is None else cfg.patch.size
    training = encoder.training
    try:
        with torch.no_grad():
            encoder.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:  # torch's, and timm's for a size of its own
        if out_of_memory(error):
            raise
        key = "image_size" if cfg.patch is None else "patch.size"
        raise ValueError(
            f"{cfg.encoder._target_} does not read {size} px ({error}): pass another {key}, or another encoder"
        ) from error
    finally:
        encoder.train(training)


def pretrain(cfg: DictConfig) -> Path:
    """Run one configuration to its end; returns the run's folder."""

    def pieces() -> Pieces:
        method, views = build_method(cfg)
        check_reads(cfg, method.encoder)
        check_batch(cfg, method, views)
        dataset: ImageDataset = build(cfg.data).train
        if {"images", "classes"} & set(cfg.method):
            torch.manual_seed(cfg.seed)
            method, views = build_method(cfg, dataset)
        return Pieces(method, views, dataset, encoder_card(cfg, method))

    return train_run(cfg, pieces)


def _from_the_command_line(cfg: DictConfig) -> Path:
    warn_of_unread_keys(cfg)
    return pretrain(cfg)


main = command("pretrain_cpc", _from_the_command_line, schema=PretrainSchema)
main_of_any_method = command("pretrain", _from_the_command_line, schema=PretrainSchema)

if __name__ == "__main__":
    main()
