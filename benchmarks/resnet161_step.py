"""Optimizer steps of the full paper recipe on a CPU: ResNet-161, 260 px, 36 patches of 80 px, bf16.

    python benchmarks/resnet161_step.py

Runs `experiment=imagenet_cpc_v2` itself, at a batch of 2 on made-up photographs (the arithmetic does not depend on
what they show), and writes benchmarks/results/resnet161_step.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from record import launch, run_measured, takes_no_arguments, write

STEPS = 3


def make_photographs(folder: Path, count: int) -> None:
    """`count` smooth random images of 300 px."""
    random = np.random.default_rng(0)
    for i in range(count):
        coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((300, 300), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


def main() -> None:
    """Run a few steps, record the last."""
    takes_no_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder), 8)
        run_dir = Path(folder) / "run"
        overrides = [
            "experiment=imagenet_cpc_v2",
            "data=imagefolder",
            f"data.root={folder}",
            f"run_dir={run_dir}",
            f"steps={STEPS}",
            "batch_size=2",
            "log_every=1",
            "probe_every=0",
            "workers=0",
            "save_every=1000000",
            "device=cpu",
        ]
        seconds, peak = run_measured(launch("tools/pretrain_cpc.py", *overrides))
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    results = {
        "seconds_in_all": round(seconds, 1),
        "seconds_per_step": [round(2 / row["images_per_second"], 1) for row in rows],
        "peak_pss_gib": round(peak, 2),
        "loss": [round(row["loss"], 4) for row in rows],
        "chance_loss": round(rows[0]["chance_loss"], 4),
    }
    print(results)
    write("resnet161_step", "python benchmarks/resnet161_step.py", results)


if __name__ == "__main__":
    main()
