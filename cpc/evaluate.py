"""Evaluation from the command line: `python tools/evaluate.py run=DIR [data=...]` writes `DIR/evaluation.json`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from contrastive_core.checkpoint import replacing
from contrastive_core.data import BadImages, Splits, decodable, labels_per_class, sample_ids
from contrastive_core.evaluate.features import extract_features, pool_grid
from contrastive_core.evaluate.linear import paper_linear_probe
from contrastive_core.evaluate.report import LabelledFeatures, probe_rows
from contrastive_core.plots import format_table
from cpc.encoder_card import read_card
from cpc.entry import build, check_complete, command, start_accelerator
from cpc.features import load_encoder, untrained_encoder
from cpc.foreign import run_data
from cpc.frozen_encoder import MODES, FrozenEncoder


@dataclass
class EvaluateSchema:
    """Types of the top-level keys of configs/evaluate.yaml."""

    run: str
    modes: list[str]
    cells: list[int]
    labels_per_class: list[int]
    draws: int
    all_labels: bool
    paper_epochs: int
    untrained: bool
    bad_images: float
    load_size: int | None
    workers: int
    precision: str
    device: str | None
    threads: int | None
    data: Any = None


def labelled(splits: Splits) -> Splits:
    """Only the images that have a label, of training and test; ValueError where there are none."""
    if splits.test is None:
        raise ValueError("there are no test images: pass data.test=FILE, or a folder with train/ and test/")
    parts = []
    for part in (splits.train, splits.test):
        chosen = (part.labels >= 0).nonzero().flatten()
        if not len(chosen):
            raise ValueError("there are no labels to evaluate with: the data needs a `label` column or class folders")
        parts.append(part if len(chosen) == len(part) else part.subset(chosen))
    return Splits(*parts)


def extract(
    encode: Callable[[Tensor], Tensor], splits: Splits, accelerator: Accelerator, **options: Any
) -> LabelledFeatures:
    """Features of training and test images, under the precision that was asked for."""
    assert splits.test is not None
    with accelerator.autocast():
        parts = [
            extract_features(encode, part, device=accelerator.device, **options) for part in (splits.train, splits.test)
        ]
    return LabelledFeatures(*parts[0], *parts[1])


def extract_readouts(
    encoder: FrozenEncoder, splits: Splits, cells: Sequence[int], accelerator: Accelerator, **options: Any
) -> dict[str, LabelledFeatures]:
    """The latent grids, pooled into each number of cells as soon as they are there: whole grids would fill the memory.

    Example: `cells=[1, 2]` gives {"mean": `n d`, "2x2": `n 4 d`}.
    """

    def pooled(images: Tensor) -> Tensor:
        grid = encoder(images)
        return torch.cat([pool_grid(grid, count) for count in cells], dim=1)

    together = extract(pooled, splits, accelerator, **options)
    widths = [count**2 * encoder.dim for count in cells]
    names = ["mean" if count == 1 else f"{count}x{count}" for count in cells]
    columns = zip(together.train.split(widths, 1), together.test.split(widths, 1), strict=True)
    return {name: together._replace(train=train, test=test) for name, (train, test) in zip(names, columns, strict=True)}


def load_splits(cfg: DictConfig, load_size: int) -> Splits:
    """The data named on the command line, or else the run's own."""
    cfg.load_size = load_size if cfg.load_size is None else cfg.load_size
    if cfg.data is not None:
        check_complete(cfg)
        splits: Splits = build(cfg.data)
        return splits
    splits = build(OmegaConf.create({**run_data(cfg.run), "size": cfg.load_size}))
    return splits


def check_numbers(cfg: DictConfig) -> None:
    """Raise ValueError that names the first key whose value cannot be meant."""
    if OmegaConf.is_missing(cfg, "run"):
        raise ValueError("not given: run; pass run=DIR, the folder of a run that has finished")
    for name, least in {"draws": 1, "paper_epochs": 0, "workers": 0}.items():
        if cfg[name] < least:
            raise ValueError(f"{name}={cfg[name]}: pass at least {least}")
    for name in ("cells", "labels_per_class"):
        if any(number < 1 for number in cfg[name]):
            raise ValueError(f"{name}={list(cfg[name])}: pass numbers of at least 1")
    if not cfg.cells or not cfg.modes or not set(cfg.modes) <= set(MODES):
        raise ValueError(f"modes={list(cfg.modes)} cells={list(cfg.cells)}: pass modes among {MODES}, and cells")


def evaluate_encoder(
    encoder: FrozenEncoder, splits: Splits, cfg: DictConfig, accelerator: Accelerator, ids: Tensor | None = None
) -> list[dict[str, Any]]:
    """The rows of one encoder, in every mode that it has; `ids`: of the training images, for few labels."""
    encoder.to(accelerator.device).readout = "grid"
    rows: list[dict[str, Any]] = []
    for mode in cfg.modes:
        if mode == "patches" and not encoder.patch_size:
            continue
        encoder.mode = mode
        options = {"batch_size": encoder.batch_size, "workers": cfg.workers, "bad_images": BadImages(cfg.bad_images)}
        readouts = extract_readouts(encoder, splits, cfg.cells, accelerator, **options)
        few = {"per_class": cfg.labels_per_class, "draws": cfg.draws, "ids": ids}
        probes = probe_rows(readouts, **few, all_labels=cfg.all_labels)
        rows += [{"mode": mode, **row} for row in probes]
        if cfg.paper_epochs:
            grids = extract(encoder, splits, accelerator, **options)
            accuracy = paper_linear_probe(*grids, epochs=cfg.paper_epochs, device=accelerator.device).accuracy
            labels = len(grids.train_labels)
            rows.append({"mode": mode, "readout": "grid", "probe": "paper", "labels": labels, "accuracy": accuracy})
    return rows


def evaluate(cfg: DictConfig) -> Path:
    """Evaluate one run; prints a table, returns the path of the JSON file."""
    check_numbers(cfg)
    began = time.perf_counter()
    trained = load_encoder(cfg.run)
    accelerator = start_accelerator(precision=cfg.precision, device=cfg.device, threads=cfg.threads)
    if accelerator.num_processes > 1:
        raise ValueError("evaluation runs in one process: python tools/evaluate.py, without accelerate launch")
    splits = labelled(load_splits(cfg, trained.load_size))
    ids = None
    if cfg.labels_per_class:  # few labels are drawn by who the images are: so none may be missing
        splits = splits._replace(train=decodable(splits.train, BadImages(cfg.bad_images), cfg.workers))
        ids = sample_ids(splits.train)
        for count in cfg.labels_per_class:  # said now, not after everything was encoded
            labels_per_class(splits.train.labels, count, ids=ids)
    encoders = {"trained": trained} | ({"untrained": untrained_encoder(cfg.run)} if cfg.untrained else {})
    rows = [
        {"encoder": name, **row}
        for name, encoder in encoders.items()
        for row in evaluate_encoder(encoder, splits, cfg, accelerator, ids)
    ]
    print(format_table([{key: value for key, value in row.items() if key != "draws"} for row in rows]))
    written = Path(cfg.run) / "evaluation.json"
    collapsed = read_card(cfg.run)[1].get("collapsed", "")
    if collapsed:
        print(f"this run has {collapsed}")
    record = {
        "run": str(cfg.run),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
        "train_images": len(splits.train),
        "test_images": len(splits.test or ()),
        **({"collapsed": collapsed} if collapsed else {}),
        "rows": rows,
    }
    with replacing(written) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {written}")
    return written


main = command("evaluate", evaluate, schema=EvaluateSchema)

if __name__ == "__main__":
    main()
