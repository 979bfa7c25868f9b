"""How many labels pre-training saves, and what encoding once for all cells saves of a sweep.

    python benchmarks/label_efficiency.py digits       # make label-curve: 3 runs of CPC and the whole grid, hours
    python benchmarks/label_efficiency.py cache --train cifar10-train.parquet --test cifar10-test.parquet

Runs and cells are kept in --out (runs/label-NAME), and the same command goes on there. Writes
benchmarks/label_efficiency/NAME.json, and for a sweep NAME.csv and NAME.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from record import ROOT, python, run_costed, write

from contrastive_core.data import label_fraction, parquet, sample_ids
from contrastive_core.evaluate.features import extract_features
from contrastive_core.evaluate.linear import linear_probe
from contrastive_core.evaluate.selection import Rows
from cpc.entry import start_accelerator
from cpc.features import load_encoder
from cpc.label_protocols import FeatureTable

RESULTS = ROOT / "benchmarks" / "label_efficiency"
SIDE_BY_SIDE = 2
"""Processes of one thread each."""

DIGITS_RUN = ["steps=10000", "save_every=10000", "probe_every=0", "threads=1"]
DIGITS = [
    # what the claim stands on first, then the same network from random weights, which takes the longest
    ["labels=[20,40,100,200,400,1000]", "scratch=[logistic,svm,cnn]", "protocols=[linear,classifier,finetune]"],
    ["labels=[20,40,100,200,400]", "scratch=[image]", "protocols=[knn]", "random=[linear,classifier]"],
    ["labels=[40,100,400]", "scratch=[patches]", "protocols=[]", "random=[]"],
]
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SEEDS = 5


def side_by_side(commands: Sequence[list[str]], log: Path) -> None:
    """Run commands, SIDE_BY_SIDE at a time, each with an output file of its own; SystemExit where one fails."""
    left = list(enumerate(commands))
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    while left or running:
        while left and len(running) < SIDE_BY_SIDE:
            place, command = left.pop(0)
            output = log.with_name(f"{log.name}-{place}.log")
            with output.open("ab") as file:
                running.append((subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT), output))
        time.sleep(1)
        for process, output in [each for each in running if each[0].poll() is not None]:
            running.remove((process, output))
            if process.returncode:
                raise SystemExit(f"a command failed, see {output}; the same command goes on")


def digits(out: Path) -> None:
    """Figure 1: the bundled digits."""
    out.mkdir(parents=True, exist_ok=True)
    runs = [out / f"cpc-{seed}" for seed in range(3)]
    costs = out / "costs.json"
    took: dict[str, float] = json.loads(costs.read_text()) if costs.is_file() else {}
    began = time.perf_counter()
    missing = [run for run in runs if not (run / "encoder.json").is_file()]
    side_by_side(
        [
            python("tools/pretrain_cpc.py", *DIGITS_RUN, f"seed={run.name[-1]}", f"run_dir={run}", "resume=auto")
            for run in missing
        ],
        out / "pretraining",
    )
    took["pretraining"] = took.get("pretraining", 0.0) + time.perf_counter() - began
    for place, part in enumerate(DIGITS):
        began = time.perf_counter()
        common = [f"runs=[{','.join(map(str, runs))}]", f"out={out / 'sweep'}", "readout=context", "threads=1"]
        shards = [
            python("tools/sweep_labels.py", *common, *part, f"shards={SIDE_BY_SIDE}", f"shard={shard}")
            for shard in range(SIDE_BY_SIDE)
        ]
        side_by_side(shards, out / f"sweep-{place}")
        took[f"sweep {place}"] = took.get(f"sweep {place}", 0.0) + time.perf_counter() - began
        costs.write_text(json.dumps({name: round(seconds, 1) for name, seconds in took.items()}))
        record("digits", "python benchmarks/label_efficiency.py digits", out / "sweep", json.loads(costs.read_text()))


def record(name: str, command: str, sweep: Path, seconds: dict[str, float]) -> None:
    """Keep what a sweep has come to, without the paths of runs."""
    RESULTS.mkdir(exist_ok=True)
    summary = json.loads((sweep / "summary.json").read_text())
    runs = {method: [Path(run).name for run in folders] for method, folders in summary["runs"].items()}
    kept = ("train_images", "test_images", "classes", "notes", "accuracies", "savings", "savings_per_class", "scratch")
    results = {"runs": runs, "seconds": seconds} | {part: summary[part] for part in kept if part in summary}
    write(name, command, results | {"splits": summary["splits"]}, folder=RESULTS)
    for suffix in ("csv", "png"):
        shutil.copyfile(sweep / f"label_efficiency.{suffix}", RESULTS / f"{name}.{suffix}")


def cache(out: Path, train: Path, test: Path) -> None:
    """Figure 3: a linear sweep of 7 fractions x 5 seeds, features encoded once and again for every cell."""
    out.mkdir(parents=True, exist_ok=True)
    run = out / "cpc"
    if not (run / "encoder.json").is_file():
        data = ["experiment=cifar10_cpc", "data=parquet", f"data.train={train}", "steps=1", "probe_every=0"]
        run_costed(python("tools/pretrain_cpc.py", *data, f"run_dir={run}"), log=out / "pretraining.log", threads=2)
    accelerator = start_accelerator(precision="no", device="cpu", threads=None)
    splits = parquet(train, test, size=32)
    assert splits.test is not None
    labels, ids = splits.train.labels, sample_ids(splits.train)
    cells = [label_fraction(labels, share, seed=seed, ids=ids) for share in FRACTIONS for seed in range(SEEDS)]
    used = torch.cat(cells).unique()
    everything = Rows("test", torch.arange(len(splits.test)))

    def read_off() -> FeatureTable:
        encoder = load_encoder(run)
        return FeatureTable(encoder, splits, used, accelerator, batch_size=encoder.batch_size)

    began = time.perf_counter()
    table = read_off()
    features = [(table.at(Rows("train", rows)), table.at(everything)) for rows in cells]
    once = time.perf_counter() - began

    encoder = load_encoder(run)
    began = time.perf_counter()
    images = 0
    for rows in cells:
        for part in (splits.train.subset(rows), splits.test):
            extract_features(encoder, part, batch_size=encoder.batch_size)
            images += len(part)
    again = time.perf_counter() - began

    solving = []
    for rows, (train_x, test_x) in zip(cells, features, strict=True):
        began = time.perf_counter()
        linear_probe(train_x, labels[rows], test_x, splits.test.labels, folds=2)
        solving.append(time.perf_counter() - began)
    ceiling = images / (len(used) + len(splits.test))
    results = {
        "fractions": FRACTIONS, "seeds": SEEDS, "images_encoded_again": images, "images_encoded_once": table.encoded,
        "seconds_once": round(once, 2), "seconds_again": round(again, 2), "factor": round(again / once, 3),
        "ceiling": round(ceiling, 3), "of_the_ceiling": round(again / once / ceiling, 4),
        "solving_seconds": round(sum(solving), 1), "solving_seconds_a_cell": [round(each, 2) for each in solving],
    }  # fmt: skip
    shown = "python benchmarks/label_efficiency.py cache --train cifar10-train.parquet --test cifar10-test.parquet"
    write("cache", shown, results, folder=RESULTS)


def main() -> None:
    """Run one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["digits", "cache"])
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = (arguments.out or Path(f"runs/label-{arguments.study}")).resolve()
    if arguments.study == "digits":
        digits(out)
    elif arguments.train is None or arguments.test is None:
        parser.error("cache wants --train FILE and --test FILE")
    else:
        cache(out, arguments.train.resolve(), arguments.test.resolve())


if __name__ == "__main__":
    main()
