"""What reliability costs: checkpoints, and processes beside each other.

    python benchmarks/reliability.py checkpoints --train cifar10-train.parquet     # saving every 100 steps, 1 minute
    python benchmarks/reliability.py scaling --train cifar10-train.parquet         # 1 against 2 processes, 5 minutes

Both by the CIFAR-10 recipe. `checkpoints` counts the seconds that a run spends in saving. `scaling` gives each process
a thread and as many images, so that two processes take a batch of twice the size in, at best, the same time; they take
turns, and the ratios are of neighbours. That killed runs go on is up to `pytest -m slow tests/test_reliability.py`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
from record import ROOT, launch, run_costed, write

import cpc.run
from contrastive_core.checkpoint import save_checkpoint
from contrastive_core.run_log import read_metrics
from cpc.entry import config_search
from cpc.pretrain import pretrain

RESULTS = ROOT / "benchmarks" / "reliability"
RECIPE = ["experiment=cifar10_cpc", "data=parquet", "probe_every=0"]


def checkpoints(train: Path, steps: int) -> dict[str, Any]:
    """Seconds of a run, and of its saves."""
    saves: list[float] = []
    sizes: list[int] = []

    def timed(*arguments: Any) -> Path:
        began = time.perf_counter()
        written = save_checkpoint(*arguments)
        saves.append(time.perf_counter() - began)
        sizes.append(sum(file.stat().st_size for file in written.iterdir()))
        return written

    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder, patch.object(cpc.run, "save_checkpoint", timed):
        options = [f"steps={steps}", "save_every=100", "threads=2", f"data.train={train}", f"run_dir={folder}/run"]
        with config_search():
            cfg = hydra.compose("pretrain_cpc", [*RECIPE, *options])
        pretrain(cfg)
        rates = [row["images_per_second"] for row in read_metrics(Path(folder) / "run")[1:]]
    a_hundred = 100 * cfg.batch_size / statistics.median(rates)
    return {
        "steps": steps,
        "mebibytes": round(sizes[-1] / 2**20, 2),
        "seconds_a_save": [round(seconds, 3) for seconds in saves],
        "seconds_of_100_steps": round(a_hundred, 2),
        "share": round(statistics.median(saves) / (a_hundred + statistics.median(saves)), 5),
    }


def scaling(train: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Images a second of one process and of two, a thread each, in turns."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(rounds):
        for processes in (1, 2):
            with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder:
                options = [f"steps={steps}", f"batch_size={32 * processes}", "device=cpu", "threads=1"]
                options += [f"data.train={train}", f"run_dir={folder}/run", "log_every=20", "save_every=100000"]
                several = ["--multi_gpu"] if processes == 2 else []
                command = launch(*several, "--num_processes", str(processes), "tools/pretrain_cpc.py")
                run_costed([*command, *RECIPE, *options], log=Path(folder) / "log", threads=1)
                rows = read_metrics(Path(folder) / "run")[2:]
                rates[processes].append(statistics.median(row["images_per_second"] for row in rows))
                print(f"round {turn}, {processes} processes: {rates[processes][-1]:.0f} images/s", flush=True)
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {
        "images_per_second": {str(processes): values for processes, values in rates.items()},
        "ratio": {"median": round(statistics.median(ratios), 3), "least": min(ratios), "most": max(ratios)},
    }


def main() -> None:
    """Run one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["checkpoints", "scaling"])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    (ROOT / "runs").mkdir(exist_ok=True)
    train = asked.train.resolve()
    results = checkpoints(train, asked.steps) if asked.study == "checkpoints" else scaling(train, 100, asked.rounds)
    write(asked.study, f"python benchmarks/reliability.py {asked.study} --train {train.name}", results, folder=RESULTS)


if __name__ == "__main__":
    main()
