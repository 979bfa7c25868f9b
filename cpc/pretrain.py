"""Pre-training from the command line: `accelerate launch tools/pretrain_cpc.py [overrides]`.

This is an entry point: it reads the configuration, builds the pieces, and writes down what `train_steps` yields.
From an install, `accelerate launch -m cpc.pretrain` does the same.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import nn

from contrastive_core.checkpoint import export_encoder, latest_checkpoint, load_checkpoint_, save_checkpoint
from contrastive_core.data import BadImages, ImageDataset, training_batches
from contrastive_core.evaluate.features import extract_features
from contrastive_core.evaluate.knn import knn_accuracy
from contrastive_core.method import Method
from contrastive_core.run_log import RunLog
from contrastive_core.training import StepResult, train_steps
from cpc.entry import build, check_complete, command, start_accelerator
from cpc.features import FrozenEncoder
from cpc.prediction import check_offsets
from cpc.run_folder import choose_run_dir, claim_run_dir
from cpc.views import PatchViews


@dataclass
class PretrainSchema:
    """Types of the top-level keys of configs/pretrain_cpc.yaml, so that `steps=abc` is refused."""

    seed: int
    steps: int
    batch_size: int
    accumulate: int
    precision: str
    device: str | None
    workers: int
    threads: int | None
    run_dir: str | None
    resume: str | None
    save_every: int
    keep_checkpoints: int
    log_every: int
    probe_every: int
    probe_images: int
    bad_images: float
    load_size: int
    image_size: int
    patch: dict[str, int]
    mean: list[float]
    std: list[float]
    schedule: Any
    clip: float | None
    averaging: float | None
    data: Any
    encoder: Any
    method: Any
    views: Any
    optimizer: Any


def encoder_card(cfg: DictConfig, method: Method) -> dict[str, Any]:
    """What `encoder.json` says: how to build the encoder, what to feed it, and where it comes from."""
    arguments = OmegaConf.to_container(cfg.encoder, resolve=True)
    assert isinstance(arguments, dict)
    name = arguments.pop("_target_")
    return {
        "architecture": {"name": name, "arguments": arguments},
        "input": {
            "image_size": cfg.image_size,
            "patch_size": cfg.patch.size,
            "stride": cfg.patch.stride,
            "mean": list(cfg.mean),
            "std": list(cfg.std),
        },
        "dim": method.encoder.dim,
        "method": type(method).__name__,
    }


def build_method(cfg: DictConfig) -> tuple[Method, PatchViews]:
    """The method and its views; whatever does not fit is an error here, before any data is read."""
    views: PatchViews = build(cfg.views)
    method: Method = build(cfg.method, encoder=build(cfg.encoder))
    check_offsets(method.offsets, views.grid, views.grid)  # type: ignore[arg-type]  # CPC's
    return method.to(memory_format=torch.channels_last), views  # type: ignore[call-overload]


def probe_sets(dataset: ImageDataset, count: int) -> tuple[ImageDataset, ImageDataset] | None:
    """A bank and queries for the online probe, four to one, all of them training images; None where unlabelled.

    Test images are never touched, so that watching the probe is not looking at the test set.
    """
    labelled = torch.nonzero(dataset.labels >= 0).flatten()
    if len(labelled) < 20:
        return None
    chosen = labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))[:count]]
    split = len(chosen) // 5
    return dataset.subset(chosen[split:]), dataset.subset(chosen[:split])


def probe(encoder: nn.Module, sets: tuple[ImageDataset, ImageDataset], cfg: DictConfig, device: torch.device) -> float:
    """kNN accuracy of the mean latents, as the encoder stands."""
    training = encoder.training
    inputs = {"image_size": cfg.image_size, "patch_size": cfg.patch.size, "stride": cfg.patch.stride}
    frozen = FrozenEncoder(encoder, **inputs, mean=cfg.mean, std=cfg.std).eval()
    bank, queries = (extract_features(frozen, dataset, device=device) for dataset in sets)
    encoder.train(training)
    return float(knn_accuracy(*bank, *queries))


class Throughput:
    """Images a second since the last time it was asked, probes and checkpoints left out by `skip`."""

    def __init__(self) -> None:
        self.images, self.since = 0, time.perf_counter()

    def rate(self) -> float:
        """The rate since the last call."""
        now = time.perf_counter()
        rate, self.images, self.since = self.images / max(now - self.since, 1e-9), 0, now
        return rate

    def skip(self, began: float) -> None:
        """Leave out the time since `began` (`time.perf_counter()`)."""
        self.since += time.perf_counter() - began


def metrics_row(result: StepResult, accelerator: Accelerator, rate: float) -> dict[str, float]:
    """A row of `metrics.jsonl`: means over the processes."""
    names = sorted(result.metrics)
    values = torch.stack([result.metrics[name].float().to(accelerator.device) for name in names])
    means = accelerator.reduce(values, reduction="mean").tolist()  # type: ignore[union-attr]
    return {"step": result.step, **dict(zip(names, means, strict=True)), "images_per_second": round(rate, 1)}


def pretrain(cfg: DictConfig) -> Path:
    """Run one configuration to its end; returns the run's folder."""
    check_complete(cfg)
    accelerator = start_accelerator(cfg)
    run_dir = choose_run_dir(cfg, accelerator)

    # the pieces, in the order in which a mistake is cheapest to find
    torch.manual_seed(cfg.seed)
    method, views = build_method(cfg)
    optimizer = build(cfg.optimizer)(method.parameters())
    schedule = build(cfg.schedule)
    dataset: ImageDataset = build(cfg.data).train

    averaged = None if cfg.averaging is None else copy.deepcopy(method).requires_grad_(False).to(accelerator.device)
    modules: dict[str, nn.Module] = {"method": method} | ({} if averaged is None else {"averaged": averaged})
    exported = method if averaged is None else averaged

    # a fresh folder, or the state that an earlier run left in it
    checkpoint = claim_run_dir(run_dir, cfg, accelerator)
    start = 0
    prepared, prepared_optimizer = accelerator.prepare(method, optimizer)
    if checkpoint is not None:
        start = load_checkpoint_(checkpoint, modules, optimizer)["step"]

    batches = training_batches(
        dataset,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        start=start,
        steps=cfg.steps,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        accumulate=cfg.accumulate,
        workers=cfg.workers,
    )
    sets = probe_sets(dataset, cfg.probe_images) if cfg.probe_every and accelerator.is_main_process else None
    bad_images, throughput = BadImages(cfg.bad_images), Throughput()
    log = RunLog(run_dir, start=start, steps=cfg.steps) if accelerator.is_main_process else None
    results = train_steps(
        prepared,
        prepared_optimizer,
        accelerator,
        batches,
        views,
        seed=cfg.seed,
        start=start,
        steps=cfg.steps,
        schedule=schedule,
        clip=cfg.clip,
        averaged=averaged,
        averaging_decay=cfg.averaging or 0.0,
    )
    try:
        for result in results:
            bad_images.count(result.faults, seen=cfg.batch_size // accelerator.num_processes)
            throughput.images += cfg.batch_size
            last = result.step == cfg.steps

            # every process takes part in the mean, the main one writes it down
            if result.step % cfg.log_every == 0 or last or result.step == 1:
                row = metrics_row(result, accelerator, throughput.rate())
                if log is not None:
                    log.write(row)
            if log is not None:
                log.advance()

            began = time.perf_counter()
            if log is not None and sets is not None and (result.step % cfg.probe_every == 0 or last):
                accuracy = probe(exported.encoder, sets, cfg, accelerator.device)
                log.write({"step": result.step, "knn": accuracy})
                log.say(f"step {result.step}: kNN on held-out training images {accuracy:.3f}")
            if accelerator.is_main_process and (result.step % cfg.save_every == 0 or last):
                extra = {"threads": torch.get_num_threads(), "processes": accelerator.num_processes}
                save_checkpoint(
                    run_dir / "checkpoints", result.step, modules, optimizer, extra, keep=cfg.keep_checkpoints
                )
            throughput.skip(began)
    finally:
        if log is not None:
            log.__exit__()

    if accelerator.is_main_process:
        export_encoder(run_dir, exported.encoder, encoder_card(cfg, exported))
        print(f"encoder: {run_dir / 'encoder.safetensors'}\nread it with: cpc.load_encoder({str(run_dir)!r})")
    accelerator.wait_for_everyone()
    return run_dir


main = command("pretrain_cpc", pretrain, schema=PretrainSchema)

if __name__ == "__main__":
    main()
