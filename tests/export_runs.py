"""Small runs to export: their folders, written as a training run writes them, and what their features have to be."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from contrastive_core.checkpoint import export_encoder
from cpc.context import ContextNetwork
from cpc.encoder_card import build_encoder, parts_card, parts_of
from cpc.method import CPC

NORMALISED = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5]}
PATCHES = {"image_size": 16, "patch_size": 8, "stride": 4, **NORMALISED}
OURS = "contrastive_core.encoders."


def write_run(folder: Path, name: str, arguments: dict[str, Any], image_size: int = 32) -> Path:
    """A run of whole images whose weights and BatchNorm's statistics are away from where they begin."""
    torch.manual_seed(0)
    encoder = build_encoder({"name": name, "arguments": arguments})
    with torch.no_grad():
        encoder.train()(torch.randn(8, 3, image_size, image_size))
    fed = {"image_size": image_size, **NORMALISED}
    folder.mkdir(parents=True, exist_ok=True)
    architecture = {"name": name, "arguments": arguments}
    export_encoder(
        folder, encoder, {"architecture": architecture, "input": fed, "dim": encoder.dim, "method": "SimCLR"}
    )
    return folder


def write_cpc_run(folder: Path) -> Path:
    """A CPC run, its contexts, its configuration, its log and its evaluation included."""
    torch.manual_seed(1)
    architecture = {"name": "cpc.encoders.resnet_small", "arguments": {"width": 4, "blocks": [1, 1]}}
    encoder = build_encoder(architecture)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    method = CPC(encoder, offsets=[1], context=partial(ContextNetwork, width=4, layers=1), target_dim=4)
    card = {"architecture": architecture, "input": PATCHES, "dim": 8, "method": "CPC"} | parts_card(method, [])
    folder.mkdir(parents=True, exist_ok=True)
    export_encoder(folder, encoder, card, parts_of(method))
    config = {
        "steps": 120,
        "batch_size": 64,
        "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.001},
        "data": {"_target_": "contrastive_core.data.parquet", "train": "/home/somebody/cats.parquet", "size": 16},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"encoder": "trained", "mode": "patches", "readout": "mean", "probe": "kNN", "labels": 40, "accuracy": 0.625}
    ]
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows}))
    (folder / "metrics.jsonl").write_text(
        '{"step": 110, "loss": 3.0}\n{"step": 120, "loss": 2.5, "chance_loss": 4.0}\n'
    )
    return folder


def images(count: int = 4, size: int = 32) -> torch.Tensor:
    """Pixels in [0, 1], always the same."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))
