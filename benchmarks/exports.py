"""How far an encoder's features are from ours once it has left: torchvision, timm, ONNX, torch.export, scikit-learn.

    PYTHONPATH=. python benchmarks/exports.py

Each encoder is pre-trained for a few steps by the tools on the bundled digits (its weights and BatchNorm's statistics
are away from where they began), exported by `cpc.export.export_run`, and read back by the program that it is for. The
difference is the largest of any feature by the largest feature of ours, on random images of its size, five and one at
a time, float32, on a CPU. Writes benchmarks/results/exports.json.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import ROOT, python, takes_no_arguments, write

from cpc.export import export_run
from cpc.features import load_encoder
from cpc.sklearn_features import CPCFeatures

COMMAND = "PYTHONPATH=. python benchmarks/exports.py"
SIMCLR = ["tools/pretrain.py", "method=simclr"]
CPC = ["tools/pretrain_cpc.py"]
RUNS: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "cpc, resnet_small": (CPC, {"onnx": ["mean", "context"], "torch_export": ["mean", "context"]}),
    "simclr, timm resnet18": ([*SIMCLR, "encoder=timm"], {"timm": [""], "torchvision": [""]}),
    "simclr, torchvision resnet18": (
        [*SIMCLR, "encoder=torchvision"],
        {"torchvision": [""], "timm": [""], "onnx": ["mean"], "torch_export": ["mean"]},
    ),
    "simclr, resnet50_torchvision": ([*SIMCLR, "encoder=resnet50_torchvision"], {"torchvision": [""], "timm": [""]}),
}


def pretrained(command: list[str], folder: Path) -> Path:
    """A run of a few steps."""
    options = [f"run_dir={folder}", "steps=3", "batch_size=8", "probe_every=0", "device=cpu", "threads=2"]
    subprocess.run(python(*command, *options), cwd=ROOT, check=True, capture_output=True)
    return folder


def scikit_learns(run: Path) -> float:
    """The same of the transformer, of uint8 images."""
    encoder = load_encoder(run)
    side = encoder.image_size
    images = np.random.default_rng(0).integers(256, size=(6, side, side, 3), dtype=np.uint8)
    ours = encoder(torch.from_numpy(images).movedim(3, 1).float() / 255)
    found = torch.from_numpy(CPCFeatures(run, batch_size=4).transform(images))
    return float((found - ours).abs().max() / ours.abs().max())


def rows_of(name: str, run: Path, formats: dict[str, list[str]], scratch: Path) -> list[dict[str, Any]]:
    """A row a format and readout."""
    rows = []
    for kind, readouts in (formats | {"hub": [""]}).items():
        for readout in readouts:
            out, began = scratch / f"{kind}-{readout}", time.perf_counter()
            found = export_run(run, kind, out, readout=readout or "mean")
            seconds = round(time.perf_counter() - began, 1)
            size = round(sum(file.stat().st_size for file in out.iterdir()) / 2**20, 2)
            named = {"run": name, "format": kind, **({"readout": readout} if readout else {})}
            rows.append({**named, "difference": found, "seconds": seconds, "mib": size})
    rows.append({"run": name, "format": "scikit-learn", "difference": scikit_learns(run)})
    return rows


def main() -> None:
    """Pre-train, export, compare; write benchmarks/results/exports.json."""
    takes_no_arguments(__doc__)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for place, (name, (command, formats)) in enumerate(RUNS.items()):
            scratch = Path(folder) / str(place)
            run = pretrained(command, scratch / "run")
            rows += rows_of(name, run, formats, scratch)
            print(*(row for row in rows if row["run"] == name), sep="\n", flush=True)
    kinds = sorted({row["format"] for row in rows})
    largest = {kind: max(row["difference"] for row in rows if row["format"] == kind) for kind in kinds}
    packages = ("timm", "onnx", "onnxruntime", "onnxscript", "huggingface_hub")
    write(
        "exports", COMMAND, {"largest": largest, "exporters": {name: version(name) for name in packages}, "rows": rows}
    )


if __name__ == "__main__":
    main()
