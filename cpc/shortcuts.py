"""Is it cheating? From the command line: `python tools/shortcuts.py run=DIR [data=...]` writes `DIR/shortcuts.json`.

What each detector does, and what its numbers mean: `cpc.shortcut_detectors` and docs/shortcuts.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from contrastive_core.checkpoint import replacing
from contrastive_core.data import ImageDataset, Splits
from contrastive_core.method import Batch
from contrastive_core.plots import format_table
from contrastive_core.reading import read_json
from cpc.encoder_card import read_card
from cpc.entry import command, start_accelerator
from cpc.evaluate import load_splits
from cpc.foreign import run_config
from cpc.method import CPC
from cpc.report_pictures import some
from cpc.shortcut_detectors import Finding, batch_statistics, colour, overlap, patch_batches, whole_image
from cpc.trained_cpc import load_cpc
from cpc.views import PatchViews

FILE = "shortcuts.json"
NUMBERS = ("loss", "chance_loss", "accuracy", "chance", "image_mean_accuracy")
"""Of a row, in the order in which they are shown."""


@dataclass
class ShortcutsSchema:
    """Types of the top-level keys of configs/shortcuts.yaml."""

    run: str
    images: int
    split: str
    batch_size: int | None
    load_size: int | None
    device: str | None
    threads: int | None
    data: Any = None


def check_asked(cfg: DictConfig) -> None:
    """Raise ValueError that names the first key whose value cannot be meant."""
    if OmegaConf.is_missing(cfg, "run"):
        raise ValueError("not given: run; pass run=DIR, the folder of a CPC run that has finished")
    if cfg.split not in ("test", "train"):
        raise ValueError(f"split={cfg.split}: pass test or train")
    for name in ("images", "batch_size"):
        if cfg[name] is not None and cfg[name] < 2:
            raise ValueError(f"{name}={cfg[name]}: pass at least 2, an image has to have others beside it")


def chosen(splits: Splits, split: str) -> ImageDataset:
    """The images of a split; ValueError where there are fewer than 2."""
    if split == "test" and splits.test is None:
        raise ValueError(
            "there are no held-out images: pass data.test=FILE or a folder with train/ and test/ (data=...), or "
            "split=train for images that the run has seen"
        )
    dataset = splits.train if split == "train" or splits.test is None else splits.test
    if len(dataset) < 2:
        raise ValueError(f"the {split} split has {len(dataset)} images: pass data with at least 2")
    return dataset


def trained_batch(run: str) -> int:
    """Images that a run contrasted together on one process: its batch_size, or a micro-batch of it."""
    config = run_config(run)[1]
    size, parts = config.get("batch_size"), config.get("accumulate", 1)
    if not isinstance(size, int) or not isinstance(parts, int) or min(size, parts) < 1:
        raise ValueError(f"{run}/config.yaml says batch_size={size}, accumulate={parts}: pass batch_size=N")
    return max(2, size if config.get("grad_cache") else size // parts)


def find(method: CPC, images: Tensor, fed: dict[str, Any], batch_size: int, device: torch.device) -> list[Finding]:
    """All findings on images `n 3 s s` uint8, of which the centre is cut into patches as they are, unaugmented.

    Args: fed: a card's `input`: image_size, patch_size, stride, mean, std.
    """
    side = images.shape[-1]
    if side < fed["image_size"]:  # center_crop would put a black frame around them
        raise ValueError(
            f"images of {side} px, and the run's have {fed['image_size']}: pass load_size of at least that"
        )
    from torchvision.transforms.v2 import functional as vision  # not with `import cpc`: half a second

    images = vision.center_crop(images, [fed["image_size"]] * 2)
    keys = ("image_size", "patch_size", "stride", "mean", "std")

    def batches_of(images: Tensor, change: nn.Module | None) -> Sequence[Batch]:
        views = PatchViews(**{key: fed[key] for key in keys}, patch_augment=change)
        return patch_batches(images, batch_size, views, device)

    batches = batches_of(images, None)
    return [
        overlap(method, batches, fed["patch_size"], fed["stride"]),
        colour(method, images, batches_of),
        batch_statistics(method, batches),
        whole_image(method, batches),
    ]


def table(findings: Sequence[Finding]) -> str:
    """Rows of all detectors and, below, a plain line for each short-cut."""
    rows = [
        {"short-cut": finding.shortcut, **{key: row[key] for key in ("case", *NUMBERS) if key in row}}
        for finding in findings
        for row in finding.rows
    ]
    width = max(len(finding.shortcut) for finding in findings)
    verdicts = "\n".join(f"{finding.shortcut.ljust(width)}  {finding.verdict}" for finding in findings)
    return f"{format_table(rows)}\n\n{verdicts}"


def read_findings(run: Path) -> list[Finding]:
    """What the tool wrote in a run's folder, [] where it has not; ValueError for a file that is not its own."""
    file = run / FILE
    if not file.is_file():
        return []
    try:
        findings = [Finding(**each) for each in read_json(file)["shortcuts"]]
        words = [word for each in findings for word in (each.shortcut, each.verdict)]
        words += [row["case"] for each in findings for row in each.rows]
        numbers = [row[key] for each in findings for row in each.rows for key in set(row) - {"case"}]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not what tools/shortcuts.py writes: {error!r}") from None
    if not all(isinstance(word, str) for word in words) or not all(isinstance(n, int | float) for n in numbers):
        raise ValueError(f"{file} is not what tools/shortcuts.py writes: it has words for numbers")
    return findings


def shortcuts(cfg: DictConfig) -> Path:
    """Look at one run; prints a table and a line for each short-cut, returns the path of the JSON file."""
    check_asked(cfg)
    began = time.perf_counter()
    method = load_cpc(cfg.run)
    fed = read_card(cfg.run)[1]["input"]
    if not fed.get("patch_size"):
        raise ValueError(f"the card of {cfg.run} says no patch_size: pass the folder of a CPC run")
    accelerator = start_accelerator(precision="no", device=cfg.device, threads=cfg.threads)
    if accelerator.num_processes > 1:
        raise ValueError("this runs in one process: python tools/shortcuts.py, without accelerate launch")
    dataset = chosen(load_splits(cfg, max(fed.get("load_size") or 0, fed["image_size"])), cfg.split)
    images = some(dataset, cfg.images)
    batch_size = min(cfg.batch_size or trained_batch(cfg.run), len(images))
    findings = find(method.to(accelerator.device), images, fed, batch_size, accelerator.device)
    print(table(findings))
    written = Path(cfg.run) / FILE
    record = {
        "run": str(cfg.run),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
        "split": cfg.split,
        "images": len(images) // batch_size * batch_size,
        "batch_size": batch_size,
        "shortcuts": [asdict(finding) for finding in findings],
    }
    with replacing(written) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {written}")
    return written


main = command("shortcuts", shortcuts, schema=ShortcutsSchema)

if __name__ == "__main__":
    main()
