"""Evaluation from the command line: `python tools/evaluate.py run=DIR [data=...]` writes `DIR/evaluation.json`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf

from contrastive_core.data import Splits
from contrastive_core.evaluate.features import extract_features
from contrastive_core.evaluate.report import LabelledFeatures, frozen_rows
from contrastive_core.plots import format_table
from cpc.entry import build, check_complete, command, start_accelerator
from cpc.features import FrozenEncoder, load_encoder, untrained_encoder


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
    load_size: int | None
    precision: str
    device: str | None
    threads: int | None
    accumulate: int
    data: Any = None


def extract_grids(
    encoder: FrozenEncoder, splits: Splits, modes: list[str], accelerator: Accelerator
) -> dict[str, LabelledFeatures]:
    """Latent grids of training and test images, by mode; unlabelled images are left out."""
    if splits.test is None:
        raise ValueError("there are no test images: pass data.test=FILE, or a folder with train/ and test/")
    encoder.readout, grids = "grid", {}
    encoder.to(accelerator.device)
    for mode in modes:
        encoder.mode = mode
        with accelerator.autocast():
            parts = [extract_features(encoder, part, device=accelerator.device) for part in (splits.train, splits.test)]
        grids[mode] = LabelledFeatures(*parts[0], *parts[1]).labelled()
        if not len(grids[mode].train_labels) or not len(grids[mode].test_labels):
            raise ValueError("there are no labels to evaluate with: the data needs a `label` column or class folders")
    return grids


def load_splits(cfg: DictConfig, image_size: int) -> Splits:
    """The data named on the command line, or else the run's own."""
    cfg.load_size = cfg.load_size or image_size
    if cfg.data is not None:
        check_complete(cfg)
        splits: Splits = build(cfg.data)
        return splits
    written = Path(cfg.run) / "config.yaml"
    if not written.is_file():
        raise FileNotFoundError(f"no config.yaml in {cfg.run} that says on which data it was trained: pass data=NAME")
    data = OmegaConf.load(written).data
    # a run's folder may come from anyone: of what it names, only our own readers are called
    if not str(data._target_).startswith("contrastive_core.data."):
        raise ValueError(f"{written} reads its data through {data._target_}, which is not ours: pass data=NAME")
    data.size = cfg.load_size
    splits = build(data)
    return splits


def evaluate(cfg: DictConfig) -> Path:
    """Evaluate one run; prints a table, returns the path of the JSON file."""
    if OmegaConf.is_missing(cfg, "run"):
        raise ValueError("not given: run; pass run=DIR, the folder of a run that has finished")
    began = time.perf_counter()
    trained = load_encoder(cfg.run)
    accelerator = start_accelerator(cfg)
    splits = load_splits(cfg, trained.image_size)
    encoders = {"trained": trained} | ({"untrained": untrained_encoder(cfg.run)} if cfg.untrained else {})
    modes = [mode for mode in cfg.modes if mode != "patches" or trained.patch_size]
    rows: list[dict[str, Any]] = []
    for name, encoder in encoders.items():
        grids = extract_grids(encoder, splits, modes, accelerator)
        results = frozen_rows(
            grids,
            cells=cfg.cells,
            per_class=cfg.labels_per_class,
            draws=cfg.draws,
            all_labels=cfg.all_labels,
            paper_epochs=cfg.paper_epochs,
        )
        rows += [{"encoder": name, **row} for row in results]
    print(format_table([{key: value for key, value in row.items() if key != "draws"} for row in rows]))
    written = Path(cfg.run) / "evaluation.json"
    written.write_text(json.dumps({
        "run": str(cfg.run),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
        "test_images": len(splits.test) if splits.test is not None else 0,
        "rows": rows,
    }, indent=1) + "\n")  # fmt: skip
    print(f"written to {written}")
    return written


main = command("evaluate", evaluate, schema=EvaluateSchema)

if __name__ == "__main__":
    main()
