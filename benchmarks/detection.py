"""Detection transfer on pasted digits: a pre-trained encoder against the same one at random weights, seed by seed.

    python benchmarks/detection.py             # half an hour on two cores after the demo's pre-training; goes on
    python benchmarks/detection.py --seeds 2   # less of it

CPC is pre-trained on the 4,000 training digits, without canvases, boxes or labels (tools/pretrain_cpc.py, the demo's
job). Then tools/detect.py trains Faster R-CNN on 200 canvases, for as many steps in every cell, with the encoder frozen
and learning, and is tested on 200 canvases of test digits. A seed decides the training canvases, the detector's first
weights, their order, and the random encoder; both arms of a pair have them in common. Writes results/detection.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import ROOT, write
from scipy.stats import t as student

MODES = {"frozen": "trainable=false", "fine-tuned": "trainable=true"}
ENCODERS = {"pre-trained": "untrained=false", "random": "untrained=true"}


def tool(*arguments: str) -> None:
    """One of our tools, quietly; its output comes with an error."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()[-2000:]}")


def cell(folder: Path, mode: str, encoder: str, seed: int) -> dict[str, Any]:
    """What tools/detect.py wrote of one cell, after running it where it has not been."""
    out = folder / f"{mode}-{encoder}-{seed}"
    if not (out / "detection.json").is_file():
        given = [f"run={folder / 'run'}", f"out={out}", f"seed={seed}", MODES[mode], ENCODERS[encoder]]
        tool("tools/detect.py", *given, "threads=1", "verbosity=quiet")
    found = json.loads((out / "detection.json").read_text())
    print(f"{mode}, {encoder}, seed {seed}: map {found['map']:.4f}, map_50 {found['map_50']:.4f}", flush=True)
    kept = {name: found[name] for name in ("map", "map_50", "training_seconds")}
    return {"mode": mode, "encoder": encoder, "seed": seed, **kept}


def paired(cells: Sequence[dict[str, Any]], mode: str, measure: str) -> dict[str, Any]:
    """Pre-trained less random, seed by seed: the mean and its 95 % interval by Student's t."""
    of = {(each["encoder"], each["seed"]): each[measure] for each in cells if each["mode"] == mode}
    seeds = sorted({seed for _, seed in of})
    differences = [of["pre-trained", seed] - of["random", seed] for seed in seeds]
    mean = statistics.mean(differences)
    half = float(student.ppf(0.975, len(seeds) - 1)) * statistics.stdev(differences) / len(seeds) ** 0.5
    means = {name: round(statistics.mean(of[name, seed] for seed in seeds), 4) for name in ENCODERS}
    return {**means, "difference": round(mean, 4), "interval": [round(mean - half, 4), round(mean + half, 4)]}


def main() -> None:
    """Run the cells that are missing, two at a time, and write what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "detection", help="where runs are kept")
    asked = parser.parse_args()
    if asked.seeds < 2:
        parser.error("--seeds: pass at least 2, an interval needs two pairs")
    folder = asked.folder.absolute()
    if not (folder / "run" / "encoder.safetensors").is_file():
        as_recorded = ["steps=2000", "optimizer.lr=1e-3"]  # the demo's recipe as it was then
        tool("tools/pretrain_cpc.py", *as_recorded, f"run_dir={folder / 'run'}", "resume=auto", "verbosity=quiet")
    wanted = [(mode, encoder, seed) for seed in range(asked.seeds) for mode in MODES for encoder in ENCODERS]
    with ThreadPoolExecutor(2) as pool:
        cells = list(pool.map(lambda each: cell(folder, *each), wanted))
    table = {mode: {measure: paired(cells, mode, measure) for measure in ("map", "map_50")} for mode in MODES}
    print(json.dumps(table, indent=1))
    write("detection", "python benchmarks/detection.py", {"pre_trained_less_random": table, "cells": cells})


if __name__ == "__main__":
    main()
