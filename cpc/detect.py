"""Detection transfer from the command line: `python tools/detect.py run=DIR boxes=NAME` trains a detector and tests it.

What is built and trained: `cpc.detection`. The encoder is that of a run, frozen or learning, or its untrained twin.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchvision.models.detection import FasterRCNN

from contrastive_core.checkpoint import replacing
from contrastive_core.data.boxes import BoxDataset, BoxSplits
from contrastive_core.detection_plots import plot_found
from contrastive_core.optim import parameter_groups
from contrastive_core.reading import read_yaml
from contrastive_core.run_log import RunLog
from cpc.detection import detector, evaluate, find, fit
from cpc.encoder_card import read_card
from cpc.entry import build, build_schedule, check_complete, command, start_accelerator
from cpc.features import read_encoder, untrained_encoder
from cpc.run_folder import check_no_file, default_run_dir

SHOWN = 8
"""Test images in the picture."""


@dataclass
class DetectSchema:
    """Types of the top-level keys of configs/detect.yaml."""

    run: str
    untrained: bool
    trainable: bool
    seed: int
    steps: int
    batch_size: int
    sides: list[int]
    anchors: list[int]
    head_width: int
    proposals: int
    regions: int
    flip: bool
    clip: float | None
    out: str | None
    log_every: int
    device: str | None
    threads: int | None
    boxes: Any = None
    optimizer: Any = None
    schedule: Any = None


def check_asked(cfg: DictConfig) -> None:
    """Raise ValueError that names the first key that cannot be meant, ModuleNotFoundError for a missing package."""
    for name in ("torchmetrics", "faster_coco_eval"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f'{name} is not installed: pip install "cpc-images[detection]"', name=name)
    if OmegaConf.is_missing(cfg, "run"):
        raise ValueError("not given: run; pass run=DIR, the folder of a run that has finished")
    check_complete(cfg)
    for name in ("steps", "batch_size", "head_width", "proposals", "regions", "log_every"):
        if cfg[name] < 1:
            raise ValueError(f"{name}={cfg[name]}: pass at least 1")
    if len(cfg.sides) != 2 or not 1 <= cfg.sides[0] <= cfg.sides[1]:
        raise ValueError(f"sides={list(cfg.sides)}: pass the short side and the most of the long one, as [600,1000]")
    if not cfg.anchors or min(cfg.anchors) < 1:
        raise ValueError(f"anchors={list(cfg.anchors)}: pass at least one side, in pixels")
    if cfg.clip is not None and not cfg.clip > 0:
        raise ValueError(f"clip={cfg.clip}: pass the largest gradient norm, above 0, or null")


def built(cfg: DictConfig, classes: int) -> FasterRCNN:
    """The detector that is asked for, at its first weights, which are the seed's."""
    twin = untrained_encoder(cfg.run, seed=cfg.seed) if cfg.untrained else None
    encoder: nn.Module = read_encoder(cfg.run)[0] if twin is None else twin.encoder
    fed = read_card(cfg.run)[1]["input"]
    torch.manual_seed(cfg.seed)
    return detector(
        encoder,
        classes,
        mean=fed["mean"],
        std=fed["std"],
        trainable=cfg.trainable,
        sides=tuple(cfg.sides),
        anchors=list(cfg.anchors),
        head_width=cfg.head_width,
        proposals=cfg.proposals,
        regions=cfg.regions,
    )


def trained_(
    cfg: DictConfig, model: FasterRCNN, dataset: BoxDataset, schedule: Callable[[float], float], out: Path
) -> None:
    """Train a detector, with rows in `out`/metrics.jsonl."""
    optimizer = build(cfg.optimizer, parameter_groups(model, exclude=False), _partial_=False)
    with RunLog(out, start=0, steps=cfg.steps, trackers=()) as log:

        def told(step: int, losses: dict[str, float]) -> None:
            log.advance()
            if step % cfg.log_every == 0 or step == cfg.steps:
                log.write({"step": step, **losses})

        fit(
            model,
            optimizer,
            dataset,
            steps=cfg.steps,
            batch_size=cfg.batch_size,
            schedule=schedule,
            flip=cfg.flip,
            seed=cfg.seed,
            clip=cfg.clip,
            told=told,
        )


def detect(cfg: DictConfig) -> Path:
    """Train and test one detector; prints its precision, returns the path of the JSON file."""
    check_asked(cfg)
    out = Path(cfg.out or default_run_dir(f"detect-{cfg.boxes._target_.rpartition('.')[2]}"))
    check_no_file(out, "out")
    if (out / "detection.json").is_file():
        raise FileExistsError(f"{out} holds a detection: pass another out")
    written = out / "config.yaml"
    if written.is_file() and "boxes" not in (read_yaml(written) or {}):
        raise FileExistsError(f"{out} holds a run of another tool: pass another out")
    accelerator = start_accelerator(precision="no", device=cfg.device, threads=cfg.threads)
    if accelerator.num_processes > 1:
        raise ValueError("detection runs in one process: python tools/detect.py, without accelerate launch")
    splits: BoxSplits = build(cfg.boxes)
    for split in splits:
        split.check()
    if cfg.batch_size > len(splits.train):
        raise ValueError(f"batch_size={cfg.batch_size} of {len(splits.train)} training images: pass at most as many")
    model = built(cfg, len(splits.train.class_names)).to(accelerator.device)
    schedule = build_schedule(cfg.schedule)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(OmegaConf.to_container(cfg, resolve=True), sort_keys=False))
    began = time.perf_counter()
    trained_(cfg, model, splits.train, schedule, out)
    seconds = time.perf_counter() - began
    found = evaluate(model, splits.test, cfg.batch_size)
    per_class = dict(zip(splits.train.class_names, found.pop("per_class"), strict=True))
    record = {
        "run": str(cfg.run),
        "encoder": "untrained" if cfg.untrained else "trained",
        "torch": torch.__version__,
        "training_seconds": round(seconds, 1),
        "train_images": len(splits.train),
        "test_images": len(splits.test),
        **found,
        "per_class": per_class,
    }
    images = [splits.test[i] for i in range(min(SHOWN, len(splits.test)))]
    seen = find(model, [image for image, _ in images])
    plot_found(images, seen, splits.test.class_names, out / "detections.png")
    with replacing(out / "detection.json") as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
    print(f"map {found['map']:.4f}  map_50 {found['map_50']:.4f}  map_75 {found['map_75']:.4f}")
    print(f"written to {out / 'detection.json'}")
    return out / "detection.json"


main = command("detect", detect, schema=DetectSchema)

if __name__ == "__main__":
    main()
