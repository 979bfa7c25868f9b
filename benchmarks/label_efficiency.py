"""How many labels pre-training saves, and what encoding once for all cells saves of a sweep.

    python benchmarks/label_efficiency.py digits            # make label-curve: 3 runs of CPC and the whole grid, hours
    python benchmarks/label_efficiency.py cifar10 --train cifar10-train.parquet --test cifar10-test.parquet
    python benchmarks/label_efficiency.py caltech101 --train caltech101-train.parquet --test caltech101-test.parquet
    python benchmarks/label_efficiency.py cache --train cifar10-train.parquet --test cifar10-test.parquet

Runs and cells are kept in --out (runs/label-NAME), and the same command goes on there; --parts does the first so many
parts of a grid only. Writes benchmarks/label_efficiency/NAME.json, of a sweep also NAME.csv and NAME.png, part by part,
and NAME-cells.json.xz: every cell, with the test images that it gets right. --recorded begins with those from scratch
that are there, hours of work that no run has a part in. --scratch begins with all of them and does nothing but what is
left of those from scratch, without pre-training anything.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import ROOT, python, run_costed, write

from contrastive_core.data import label_fraction, mnist5k, parquet, sample_ids
from contrastive_core.evaluate.features import extract_features
from contrastive_core.evaluate.linear import linear_probe
from contrastive_core.evaluate.selection import Rows
from cpc.entry import start_accelerator
from cpc.features import load_encoder
from cpc.label_curves import BEST, SCRATCH, curves_of, read_results, savings_of
from cpc.label_protocols import FeatureTable
from cpc.label_report import saving_row

RESULTS = ROOT / "benchmarks" / "label_efficiency"
SIDE_BY_SIDE = 2
"""Processes of one thread each."""


@dataclass(frozen=True)
class Study:
    """Runs to pre-train, a folder and a command each, what the parts of the sweep share, and its parts in turn."""

    runs: dict[str, list[str]]
    sweep: list[str]
    parts: list[list[str]]


ONE_THREAD = ["threads=1", "probe_every=0", "save_every=5000", "resume=auto"]
CPC_RUN = ["tools/pretrain_cpc.py", *ONE_THREAD]
SIMCLR_RUN = ["tools/pretrain.py", "method=simclr", *ONE_THREAD]
CALTECH = ["data=parquet", "image_size=96"]
CIFAR10_CPC = [*CPC_RUN, "experiment=cifar10_cpc", "steps=16000"]
SMALL_TRUNK = ["encoder=resnet_small", "encoder.width=64", "encoder.stem_stride=2", "batch_size=256", "precision=bf16"]
CALTECH_CPC = [*CPC_RUN, *CALTECH, "patch={size: 24, stride: 12}", "precision=bf16", "steps=6400"]
CALTECH_SIMCLR = [*SIMCLR_RUN, *SMALL_TRUNK, *CALTECH, "steps=490"]
CIFAR10_SIMCLR = [*SIMCLR_RUN, *SMALL_TRUNK, "data=parquet", "load_size=32", "image_size=32", "steps=3800"]

ONE_SETTING = [
    *["settings.linear=[{cells: 2}]", "settings.classifier=[{lr: 0.1, weight_decay: 1.0e-3}]"],
    "settings.finetune=[{lr: 0.1, weight_decay: 1.0e-3, encoder_lr: 5.0e-4}]",
]
"""Fixed before, the same for every number of labels: seven times as fast as choosing among two in every cell."""

# Parts: what the claim stands on comes first, then what takes the longest. What is trained from scratch wants many more
# steps than both phases of fine-tuning together, ten times as many by default: benchmarks/notes.md.
STUDIES = {
    "digits": Study(
        runs={f"cpc-{seed}": [*CPC_RUN, "steps=20000", "optimizer.lr=1e-3", f"seed={seed}"] for seed in range(3)},
        # Both sides gain from many steps, 40 labels, held-out training images: the CNN 0.865, 0.897 and 0.911 in 400,
        # 1,600 and 4,000, and 0.917 at this learning rate; CPC 0.961 in 300 and 100 of both phases, 0.966 in these.
        sweep=[
            *["readout=context", "precision=bf16", *ONE_SETTING],
            *["steps.classifier.least=1000", "steps.finetune={least: 1000, passes: 5, most: 1000}", "scratch_times=2"],
            *["settings.scratch=[{lr: 5.0e-3, weight_decay: 0.05}]", "encodings=4096"],
        ],
        parts=[
            ["labels=[20,40,100,200,400]", "scratch=[logistic,svm,cnn]", "protocols=[]", "random=[]"],
            ["labels=[20,40,100,200]", "scratch=[]", "protocols=[linear,classifier]", "random=[]"],
            ["labels=[40]", "scratch=[]", "protocols=[finetune]", "random=[linear]"],
            ["labels=[20,40,100,400]", "scratch=[patches]", "protocols=[]", "random=[]"],
            ["labels=[20,100]", "scratch=[]", "protocols=[finetune]", "random=[linear]"],
            ["labels=[20,40,100,400]", "scratch=[image]", "protocols=[knn]", "random=[classifier]"],
        ],
    ),
    "cifar10": Study(
        runs={
            "cpc": CIFAR10_CPC,
            "simclr": CIFAR10_SIMCLR,
            "cpc-1": [*CIFAR10_CPC, "seed=1"],
            "simclr-1": [*CIFAR10_SIMCLR, "seed=1"],
        },
        # at least three augmented copies of every label for the classifier, with 5,000 of them
        sweep=["readout=context", "precision=bf16", "steps.finetune.most=2000", "scratch_times=10", "encodings=16384"],
        parts=[
            ["fractions=[0.01]", "scratch=[logistic,svm,cnn]", "protocols=[linear,classifier]", "random=[linear]"],
            ["fractions=[0.02]", "scratch=[cnn]", "protocols=[linear,classifier]", "random=[linear]"],
            ["fractions=[0.05,0.1]", "scratch=[]", "protocols=[linear,classifier]", "random=[]"],
            ["fractions=[0.05]", "scratch=[cnn]", "protocols=[]", "random=[]"],
            ["fractions=[0.01]", "scratch=[image]", "protocols=[finetune]", "random=[]"],
            ["fractions=[0.1]", "scratch=[cnn]", "protocols=[]", "random=[]"],
            ["fractions=[0.01]", "scratch=[patches]", "protocols=[]", "random=[]"],
            ["fractions=[0.2,0.5,1]", "scratch=[cnn]", "protocols=[linear,classifier]", "random=[]"],
            ["fractions=[0.1,1]", "scratch=[]", "protocols=[finetune]", "random=[]"],
        ],
    ),
    # A thread sees 43 and 26 images a second: forty minutes of two cores each. Everyone has one setting, fixed before:
    # the pre-trained arms' on digits and CIFAR-10, the CNN's, with its stem and its steps, on held-out training images
    # of Caltech-101 itself (5 labels a class: 7 % of them right, class by class, in both phases' steps without a stem,
    # 17 % in four times as many, 21 % with a stem besides, 23 % in eight times as many).
    "caltech101": Study(
        runs={
            "cpc": CALTECH_CPC,
            "simclr": CALTECH_SIMCLR,
            "cpc-1": [*CALTECH_CPC, "seed=1"],
            "simclr-1": [*CALTECH_SIMCLR, "seed=1"],
        },
        sweep=[
            *["readout=context", "precision=bf16", "cnn.widths=[32,64,128,256]", "+cnn.stem=imagenet"],
            *["scratch_times=8", "settings.scratch=[{lr: 2.0e-3, weight_decay: 0.05}]", *ONE_SETTING],
            *["encodings=4096", "few=0.2"],  # five choices of ten labels a class, too
        ],
        parts=[
            ["labels_per_class=[2,5,1]", "scratch=[logistic,cnn]", "protocols=[linear]", "random=[linear]"],
            ["labels_per_class=[10,20]", "scratch=[logistic]", "protocols=[linear]", "random=[]"],
            ["labels_per_class=[2,5,10]", "scratch=[]", "protocols=[classifier]", "random=[]"],
            ["labels_per_class=[10,20]", "scratch=[cnn]", "protocols=[linear]", "random=[]"],
            ["labels_per_class=[1,2,5,10,20]", "scratch=[svm]", "protocols=[]", "random=[]"],
            ["labels_per_class=[2,5]", "scratch=[image,patches]", "protocols=[finetune]", "random=[]"],
        ],
    ),
}
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DRAWS = 5


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


def study(name: str, out: Path, files: Sequence[str], shown: str, asked: argparse.Namespace) -> None:
    """Pre-train what is missing, then the sweep, part by part; `files` are the data's keys, `shown` the command."""
    out.mkdir(parents=True, exist_ok=True)
    of_study = STUDIES[name]
    truth = test_labels(name, asked)
    goes_on = asked.recorded or asked.scratch
    if goes_on:
        unpack_cells(name, out / "sweep" / "cells", truth, only="" if asked.scratch else f"{SCRATCH}-")
    costs = out / "costs.json"
    took: dict[str, float] = json.loads(costs.read_text()) if costs.is_file() else {}

    def timed(what: str, commands: list[list[str]]) -> None:
        began = time.perf_counter()
        side_by_side(commands, out / what.replace(" ", "-"))
        took[what] = round(took.get(what, 0.0) + time.perf_counter() - began, 1)
        costs.write_text(json.dumps(took))

    wanted = of_study.runs
    if asked.scratch:  # what is from scratch asks the first run for its card alone
        first = next(iter(wanted))
        wanted = {f"card/{first}": [*wanted[first], "steps=1"]}
    missing = {run: command for run, command in wanted.items() if not (out / run / "encoder.json").is_file()}
    timed("pretraining", [python(*command, *files, f"run_dir={out / run}") for run, command in missing.items()])
    runs = ",".join(str(out / run) for run in wanted)
    for place, part in enumerate(of_study.parts[: asked.parts]):
        mine = from_scratch(part) if asked.scratch else part
        if not mine:
            continue
        options = [f"runs=[{runs}]", f"out={out / 'sweep'}", "threads=1", *of_study.sweep, *mine]
        shards = [[f"shards={SIDE_BY_SIDE}", f"shard={shard}"] for shard in range(SIDE_BY_SIDE)]
        timed(f"sweep {place}", [python("tools/sweep_labels.py", *options, *shard) for shard in shards])
        record(name, shown, out / "sweep", took, goes_on, truth)
        pack_cells(name, out / "sweep" / "cells", truth)


def from_scratch(part: list[str]) -> list[str]:
    """The same part of a grid without what wants a run; empty where that leaves nothing."""
    if "scratch=[]" in part:
        return []
    return [*(key for key in part if not key.startswith(("protocols=", "random="))), "protocols=[]", "random=[]"]


def test_labels(name: str, asked: argparse.Namespace) -> torch.Tensor:
    """The classes of a study's test images, `m` int64."""
    splits = mnist5k() if name == "digits" else parquet(asked.train, asked.test, size=32)
    assert splits.test is not None
    return splits.test.labels


def record(name: str, command: str, sweep: Path, seconds: dict[str, float], goes_on: bool, truth: torch.Tensor) -> None:
    """Keep what a sweep has come to, without the paths of runs.

    goes_on: with cells that were recorded: which runs there were, what they took and how stays in the record.
    """
    RESULTS.mkdir(exist_ok=True)
    written = RESULTS / f"{name}.json"
    before = json.loads(written.read_text()) if goes_on and written.is_file() else {}
    summary = json.loads((sweep / "summary.json").read_text())
    runs = {method: [Path(run).name for run in folders] for method, folders in summary["runs"].items()}
    kept = ("train_images", "test_images", "classes", "notes", "accuracies", "savings", "scratch")
    kept += ("savings_per_class", "scratch_per_class")
    results = {"how": before["how"]} if "how" in before else {}
    for method, names in before.get("runs", {}).items():  # --scratch knows the first run alone
        runs[method] = list(dict.fromkeys([*names, *runs.get(method, [])]))
    results |= {"runs": runs, "seconds": before.get("seconds", {}) | seconds}
    results |= {part: summary[part] for part in kept if part in summary} | {"splits": summary["splits"]}
    results |= {"savings_of_first_runs": savings_of_first_runs(sweep / "cells", truth)}
    results |= {"notes": before["notes"]} if "notes" in before else {}  # the same of images, and knows all runs
    write(name, command, results, folder=RESULTS)
    for suffix in ("csv", "png"):
        shutil.copyfile(sweep / f"label_efficiency.{suffix}", RESULTS / f"{name}.{suffix}")


def savings_of_first_runs(cells: Path, truth: torch.Tensor) -> list[dict[str, Any]]:
    """What the first run alone saves, of each method that has several, against the best from scratch.

    Choices of labels that a run lacks are filled in from its method's others; of one alone nothing is.
    """
    results = read_results(sorted(cells.glob("*/*/*.json")))
    several = {result.method for result in results if result.repeat > 0}
    savings = savings_of(curves_of([result for result in results if result.repeat == 0]), truth)
    return [saving_row(saving) for saving in savings if saving.method in several and saving.against == BEST]


def pack_cells(name: str, cells: Path, truth: torch.Tensor) -> None:
    """Write all cells, by their path, into NAME-cells.json.xz: a bit a test image, which is all that a saving wants."""
    kept = {}
    for file in sorted(cells.glob("*/*/*.json")):
        cell = json.loads(file.read_text())
        right = torch.tensor(cell.pop("predictions")) == truth
        kept[str(file.relative_to(cells))] = cell | {"right": np.packbits(right.numpy()).tobytes().hex()}
    (RESULTS / f"{name}-cells.json.xz").write_bytes(lzma.compress(json.dumps(kept).encode()))


def unpack_cells(name: str, cells: Path, truth: torch.Tensor, only: str) -> None:
    """Put what `pack_cells` wrote where a sweep finds it; it refuses cells that were made in another way than asked.

    only: the beginning of the paths of those that are wanted. A prediction that was wrong is -1 now.
    """
    packed = RESULTS / f"{name}-cells.json.xz"
    for place, cell in json.loads(lzma.decompress(packed.read_bytes())).items() if packed.is_file() else ():
        if place.startswith(only) and not (cells / place).is_file():
            bits = np.frombuffer(bytes.fromhex(cell.pop("right")), np.uint8)
            right = torch.from_numpy(np.unpackbits(bits, count=len(truth))).bool()
            (cells / place).parent.mkdir(parents=True, exist_ok=True)
            (cells / place).write_text(json.dumps(cell | {"predictions": truth.where(right, -1).tolist()}) + "\n")


def cache(out: Path, train: Path, test: Path) -> None:
    """A linear sweep of 7 fractions x 5 draws, features encoded once and again for every cell.

    Once is taken twice before and twice after, since the machine's speed drifts.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = out / "cpc"
    if not (run / "encoder.json").is_file():
        data = ["experiment=cifar10_cpc", "data=parquet", f"data.train={train}", "steps=1", "probe_every=0"]
        run_costed(python("tools/pretrain_cpc.py", *data, f"run_dir={run}"), log=out / "pretraining.log", threads=2)
    accelerator = start_accelerator(precision="no", device="cpu", threads=None)
    splits = parquet(train, test, size=32)
    assert splits.test is not None
    labels, ids = splits.train.labels, sample_ids(splits.train)
    cells = [label_fraction(labels, share, seed=seed, ids=ids) for share in FRACTIONS for seed in range(DRAWS)]
    used = torch.cat(cells).unique()
    everything = Rows("test", torch.arange(len(splits.test)))

    def read_off() -> FeatureTable:
        encoder = load_encoder(run)
        return FeatureTable(encoder, splits, used, accelerator, batch_size=encoder.batch_size)

    def once() -> tuple[float, FeatureTable, list[tuple[torch.Tensor, torch.Tensor]]]:
        began = time.perf_counter()
        table = read_off()
        features = [(table.at(Rows("train", rows)), table.at(everything)) for rows in cells]
        return time.perf_counter() - began, table, features

    took = [once()[0] for _ in range(2)]
    encoder = load_encoder(run)
    began = time.perf_counter()
    images = 0
    for rows in cells:
        for part in (splits.train.subset(rows), splits.test):
            extract_features(encoder, part, batch_size=encoder.batch_size)
            images += len(part)
    again = time.perf_counter() - began
    print(f"once {took}, again {again:.1f} s", flush=True)
    took.append(once()[0])
    last, table, features = once()
    took.append(last)

    solving = []
    for rows, (train_x, test_x) in zip(cells, features, strict=True):
        began = time.perf_counter()
        linear_probe(train_x, labels[rows], test_x, splits.test.labels, folds=2)
        solving.append(time.perf_counter() - began)
    ceiling = images / (len(used) + len(splits.test))
    results = {
        "fractions": FRACTIONS, "draws": DRAWS, "images_encoded_again": images, "images_encoded_once": table.encoded,
        "seconds_once": [round(seconds, 2) for seconds in took], "seconds_again": round(again, 2),
        "factor": round(again / statistics.median(took), 3), "ceiling": round(ceiling, 3),
        "of_the_ceiling": round(again / statistics.median(took) / ceiling, 4),
        "solving_seconds": round(sum(solving), 1), "solving_seconds_a_cell": [round(each, 2) for each in solving],
    }  # fmt: skip
    shown = "python benchmarks/label_efficiency.py cache --train cifar10-train.parquet --test cifar10-test.parquet"
    write("cache", shown, results, folder=RESULTS)


def main() -> None:
    """Run one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "cache"])
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", type=int, help="only the first so many parts of the grid")
    parser.add_argument("--recorded", action="store_true", help="begin with the cells from scratch that are recorded")
    parser.add_argument("--scratch", action="store_true", help="only cells from scratch, beside all that are recorded")
    asked = parser.parse_args()
    name = asked.study
    out = (asked.out or Path(f"runs/label-{name}")).resolve()
    command = f"python benchmarks/label_efficiency.py {name}"
    if name == "digits":
        study(name, out, [], command, asked)
        return
    if asked.train is None or asked.test is None:
        parser.error(f"{name} wants --train FILE and --test FILE")
    train, test = asked.train.resolve(), asked.test.resolve()
    if name == "cache":
        cache(out, train, test)
    else:
        files = [f"data.train={train}", f"data.test={test}"]
        study(name, out, files, f"{command} --train {train.name} --test {test.name}", asked)


if __name__ == "__main__":
    main()
