"""The family side by side: every method on 10,000 CIFAR-10 images, one trunk, one loop, one evaluation.

    python benchmarks/family.py --train cifar10-train.parquet --test cifar10-test.parquet --out runs/family

The parquet files hold a column `image` of encoded bytes and a column `label`. Two tables come out:

1. equal CPU seconds: each method is given 480 seconds of one thread;
2. equal images: SimCLR, MoCo v2, BYOL and CPC see as many images as CPC does in 480 seconds;

and variants that test why some methods gain little.

How it goes: `rates` measures, alternating and alone on the machine, how many images a second of processor time each
method takes; from that follows the number of steps of each cell, so that what a cell computes does not depend on what
else the machine does. `settings` tries three learning rates for every method, a tenth of the budget each, and takes
the best linear probe on 5,000 other training images. `cells` trains: three seeds for SimCLR and CPC, one for the rest.
`variants` have half the budget, and are judged on those 5,000 images. Test labels are used once, for the cells. Each
result is written as it ends, to results/family_book.json, and a finished one is skipped: run the same command again to
go on. `--side-by-side 2` trains two cells at once, a thread each.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import hydra
import pyarrow.parquet
import torch
from record import RESULTS, ROOT, Cost, python, run_costed, write

from contrastive_core.data import ImageDataset, parquet, training_batches
from contrastive_core.data.fractions import labels_per_class
from contrastive_core.optim import parameter_groups
from contrastive_core.plots import BLUE, INK, MUTED, RUST, format_table, new_figure, save_figure, tidy_axes
from contrastive_core.run_log import read_metrics
from contrastive_core.training import train_steps
from cpc.configs import config_folder
from cpc.entry import build, start_accelerator
from cpc.pretrain import build_method

BUDGET = 480.0
"""Processor seconds of one cell of the first table."""

TRUNK = ["encoder=resnet_small", "encoder.width=32", "encoder.blocks=[1,1,1]", "encoder.stem_stride=2"]
CIFAR = ["mean=[0.491,0.482,0.447]", "std=[0.247,0.243,0.262]", "load_size=32", "image_size=32", "precision=no"]
DATA = ["data=parquet", "data.train=FILE"]
QUIET = ["threads=1", "probe_every=0", "save_every=1000000", "log_every=50", "keep_checkpoints=1"]

# whole images: both views as CIFAR-10 has them in the papers, SGD, a batch of 256
IMAGES = ["batch_size=256", "augmentation.strength=0.5", "augmentation.blur=0", "optimizer.weight_decay=5e-4"]
IMAGES += [
    "memory.queue=4096",
    "memory.bank=4096",
    "momentum.moco=0.99",
    "momentum.byol=0.97",
    "temperature.cosine=0.2",
]
SGD_RATES = ["0.01", "0.03", "0.1"]
# patches of 12 px at stride 5, as experiment=cifar10_cpc
PATCHES = ["batch_size=32", "patch.size=12", "patch.stride=5", "method.offsets=[2,3]", "method.context.width=64"]
PATCHES += ["method.context.layers=3", "temperature.dot=1.0", "views.patch_augment.magnitude=0.5"]
PATCHES += ["views.patch_augment.channel_drop=0.5"]
ADAM_RATES = ["5e-4", "1e-3", "2e-3"]

_TWO_VIEWS = (
    "simclr",
    "simclr_v2",
    "moco_v1",
    "moco_v2",
    "moco_v3",
    "pirl",
    "byol",
    "simsiam",
    "raft",
    "byol_prime",
    "margin",
)
METHODS: dict[str, list[str]] = {name: [f"method={name}", *IMAGES] for name in _TWO_VIEWS}
# its NCE form diverges here: the bank is full of real rows after 39 steps, long before images are apart
METHODS["pirl"].append("method.form=info_nce")
METHODS["cpc"] = ["method=cpc", *PATCHES]
METHODS["simclr_layer_norm"] = ["method=simclr", "norm=layer", *IMAGES]
METHODS["supervised"] = ["method=supervised", *IMAGES]

SEEDS = {"simclr": (0, 1, 2), "cpc": (0, 1, 2)}

# why some gain little over the untrained trunk: a method, its rate, and what is done otherwise
VARIANTS: dict[str, tuple[str, str, list[str]]] = {
    "SimCLRv2": ("simclr_v2", "0.03", []),
    "SimCLRv2 without its memory": ("simclr_v2", "0.03", ["memory.queue=0"]),
    "SimCLRv2, the memory from the network itself": ("simclr_v2", "0.03", ["momentum.moco=0.0"]),
    "PIRL": ("pirl", "0.01", []),
    "PIRL at a rate of 0.003": ("pirl", "0.003", []),
    "PIRL at a temperature of 0.2": ("pirl", "0.01", ["method.temperature=0.2"]),
    "PIRL at a temperature of 0.2 and a rate of 0.03": ("pirl", "0.03", ["method.temperature=0.2"]),
    "PIRL without tiles: images against the bank": ("pirl", "0.01", ["+method.weight=0.0"]),
    "PIRL without tiles at a rate of 0.03": ("pirl", "0.03", ["+method.weight=0.0"]),
    "BYOL": ("byol", "0.1", []),
    "BYOL, momentum 0.9": ("byol", "0.1", ["momentum.byol=0.9"]),
    "BYOL, momentum 0.99": ("byol", "0.1", ["momentum.byol=0.99"]),
    "BYOL, BatchNorm behind the head": ("byol", "0.1", ["+method.head.output_norm=plain"]),
    "RAFT": ("raft", "0.1", []),
    "RAFT, BatchNorm behind the head": ("raft", "0.1", ["+method.head.output_norm=plain"]),
}
SHOWN_PROBES = ("kNN", "linear", "linear, 2x2")
"""Of mean-pooled features, and of the means of four quarters side by side."""
TABLE = ("method", "seed", "rate", "images", "cpu_seconds", "peak_mib", *SHOWN_PROBES, "kNN, untrained")
TABLE += ("linear, untrained", "linear, 2x2, untrained")
EQUAL_IMAGES = ("simclr", "moco_v2", "byol", "cpc")


class Book:
    """The results so far, by name; every change is on disk before the next cell begins."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()
        self.pages: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """The result called `name`, made now if it is not there."""
        if name not in self.pages:
            made = make()
            with self.lock:
                self.pages[name] = made
                partial = self.path.with_suffix(".partial")
                partial.write_text(json.dumps(self.pages, indent=1))
                partial.rename(self.path)
            print(f"{name}: {json.dumps(made)}", flush=True)
        return self.pages[name]


def rates_of(method: str) -> list[str]:
    """The learning rates that are tried."""
    return ADAM_RATES if method == "cpc" else SGD_RATES


def batch_size(method: str) -> int:
    """Images a step."""
    return next(int(option.split("=")[1]) for option in METHODS[method] if option.startswith("batch_size="))


class Family:
    """The benchmark: where its files are, and its stages."""

    def __init__(self, train: Path, test: Path, out: Path, side_by_side: int) -> None:
        self.out, self.test, self.side_by_side = out, test, side_by_side
        out.mkdir(parents=True, exist_ok=True)
        self.train, self.validation = out / "train.parquet", out / "validation.parquet"
        if not self.validation.is_file():
            split(train, self.train, self.validation)
        self.book = Book(RESULTS / "family_book.json")

    def pretrain(self, folder: Path, method: str, steps: int, seed: int, rate: str, *more: str) -> Cost:
        """One pre-training run."""
        options = [*METHODS[method], *TRUNK, *CIFAR, *QUIET, "data=parquet", f"data.train={self.train}", f"seed={seed}"]
        options += [f"optimizer.lr={rate}", *more]
        resume = ["resume=auto"] if (folder / "config.yaml").is_file() else []
        command = python("tools/pretrain.py", *options, f"steps={steps}", f"run_dir={folder}", *resume)
        return run_costed(command, log=self.out / f"{folder.name}.log")

    def evaluate(self, folder: Path, test: Path, *options: str) -> list[dict[str, Any]]:
        """kNN and linear probes of a run's encoder on all 10,000 labels."""
        data = ["data=parquet", f"data.train={self.train}", f"data.test={test}", "threads=1"]
        run_costed(python("tools/evaluate.py", f"run={folder}", *data, *options), log=self.out / f"{folder.name}.log")
        rows: list[dict[str, Any]] = json.loads((folder / "evaluation.json").read_text())["rows"]
        return rows

    def steps(self, method: str, dataset: ImageDataset) -> Iterator[int]:
        """The optimizer steps that tools/pretrain.py would take, in this process and without its logs."""
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            cfg = hydra.compose("pretrain", [*METHODS[method], *TRUNK, *CIFAR, *DATA, "steps=1000"])
        accelerator = start_accelerator(precision=cfg.precision, device="cpu", threads=1)
        made, views = build_method(cfg, dataset)
        groups = parameter_groups(made, exclude=cfg.exclude, constant_rate=cfg.constant_rate)
        optimizer = build(cfg.optimizer, groups, _partial_=False)
        prepared = accelerator.prepare(made.to(memory_format=torch.channels_last), optimizer)
        batches = training_batches(dataset, batch_size=cfg.batch_size, seed=0, start=0, steps=1000)
        options = {"seed": 0, "start": 0, "steps": 1000, "schedule": build(cfg.schedule)}
        return (result.step for result in train_steps(*prepared, accelerator, batches, views, **options))

    def images_per_second(self, method: str, dataset: ImageDataset) -> float:
        """Images a second of processor time, over 12 steps after 3."""
        steps = self.steps(method, dataset)
        for _ in range(3):
            next(steps)
        began = time.process_time()
        for _ in range(12):
            next(steps)
        return 12 * batch_size(method) / (time.process_time() - began)

    def rates(self) -> dict[str, float]:
        """Every method's rate, the median of three rounds over all methods."""
        dataset = parquet(self.train, size=32).train
        rounds = [
            {
                method: self.book.keep(f"rate/{method}/{repeat}", lambda m=method: self.images_per_second(m, dataset))
                for method in METHODS
            }
            for repeat in range(3)
        ]
        return {method: statistics.median(rates[method] for rates in rounds) for method in METHODS}

    def trial(self, method: str, rate: str, steps: int) -> dict[str, Any]:
        """A short run at one learning rate, judged on validation images."""
        folder = self.out / f"trial-{method}-{rate}"
        self.pretrain(folder, method, steps, 0, rate)
        rows = self.evaluate(folder, self.validation, "cells=[1]", f"modes=[{mode(method)}]")
        return {row["probe"]: row["accuracy"] for row in rows}

    def settings(self, rates: dict[str, float]) -> dict[str, str]:
        """The best of three learning rates for every method, by the linear probe."""
        steps = {method: round(BUDGET / 10 * rates[method] / batch_size(method)) for method in METHODS}
        names = [(method, rate) for method in METHODS for rate in rates_of(method)]

        def work(cell: tuple[str, str]) -> Any:
            method, rate = cell
            return self.book.keep(f"trial/{method}/{rate}", lambda: self.trial(method, rate, steps[method]))

        results = dict(zip(names, self._side_by_side(work, names), strict=True))
        return {method: max(rates_of(method), key=lambda r: results[method, r]["linear"]) for method in METHODS}

    def cell(self, method: str, rate: str, steps: int, seed: int, name: str) -> dict[str, Any]:
        """One run of a table, on the test images."""
        folder = self.out / name
        cost = self.pretrain(folder, method, steps, seed, rate)
        rows = self.evaluate(folder, self.test, "untrained=true", "cells=[1,2]", f"modes=[{mode(method)}]")
        images = steps * batch_size(method)
        return {
            "rate": rate,
            "steps": steps,
            "images": images,
            **cost._asdict(),
            "rows": rows,
            "course": course(folder),
        }

    def cells(self, rates: dict[str, float], chosen: dict[str, str]) -> None:
        """Both tables' runs: those of the first in the order of METHODS, first seeds first."""
        equal = BUDGET * rates["cpc"]
        plan = [("seconds", m, s) for s in (0, 1, 2) for m in METHODS if s in SEEDS.get(m, (0,))]
        plan += [("images", m, s) for s in (0, 1, 2) for m in EQUAL_IMAGES if s in SEEDS.get(m, (0,)) and m != "cpc"]

        def work(job: tuple[str, str, int]) -> Any:
            table, method, seed = job
            images = BUDGET * rates[method] if table == "seconds" else equal
            steps = round(images / batch_size(method))
            name = f"{table}-{method}-{seed}"
            return self.book.keep(
                f"{table}/{method}/{seed}", lambda: self.cell(method, chosen[method], steps, seed, name)
            )

        self._side_by_side(work, plan)

    def variant(self, name: str, steps: int) -> dict[str, Any]:
        """One of VARIANTS, on validation images, beside the same trunk untrained."""
        method, rate, options = VARIANTS[name]
        folder = self.out / f"variant-{re.sub(r'[^a-zA-Z0-9.]+', '-', name)}"
        self.pretrain(folder, method, steps, 0, rate, *options)
        rows = self.evaluate(folder, self.validation, "untrained=true", "cells=[1]", f"modes=[{mode(method)}]")
        accuracies = {
            encoder: {row["probe"]: row["accuracy"] for row in rows if row["encoder"] == encoder}
            for encoder in ("trained", "untrained")
        }
        return {"rate": rate, "steps": steps, "options": options, **accuracies, "course": course(folder)}

    def variants(self, rates: dict[str, float]) -> None:
        """Half the budget each."""

        def work(name: str) -> Any:
            method = VARIANTS[name][0]
            steps = round(BUDGET / 2 * rates[method] / batch_size(method))
            return self.book.keep(f"variant/{name}", lambda: self.variant(name, steps))

        self._side_by_side(work, list(VARIANTS))

    def _side_by_side(self, work: Callable[[Any], Any], jobs: list[Any]) -> list[Any]:
        with ThreadPoolExecutor(self.side_by_side) as pool:
            return list(pool.map(work, jobs))


def course(folder: Path) -> dict[str, list[float]]:
    """Loss and effective rank of the projections over the steps, as the run has logged them."""
    rows = [row for row in read_metrics(folder) if row.get("loss") is not None]
    return {name: [round(row[name], 3) for row in rows if name in row] for name in ("step", "loss", "effective_rank")}


def mode(method: str) -> str:
    """How an encoder is fed for its evaluation: as in its training."""
    return "patches" if method == "cpc" else "image"


def split(source: Path, train: Path, validation: Path) -> None:
    """10,000 images to train on and 5,000 others to choose settings by, as many of every class, as two files."""
    table = pyarrow.parquet.read_table(source)
    labels = torch.tensor(table.column("label").to_pylist())
    first, more = labels_per_class(labels, 1000), labels_per_class(labels, 1500)
    pyarrow.parquet.write_table(table.take(first.tolist()), train)
    rest = more[~torch.isin(more, first)]
    pyarrow.parquet.write_table(table.take(rest.tolist()), validation)


def accuracy(cell: dict[str, Any], probe: str, *, readout: str, encoder: str = "trained") -> float:
    """One number of a cell, in percent."""
    (value,) = (
        row["accuracy"]
        for row in cell["rows"]
        if (row["probe"], row["readout"], row["encoder"]) == (probe, readout, encoder)
    )
    return 100 * value


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t, for 2 to 5 paired differences."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(differences)]
    return statistics.mean(differences), t * statistics.stdev(differences) / math.sqrt(len(differences))


def summarised(pages: dict[str, Any]) -> dict[str, Any]:
    """What goes into the record: the tables' rows, the paired differences, and all that was tried."""
    tables: dict[str, list[dict[str, Any]]] = {"seconds": [], "images": []}
    for name, cell in pages.items():
        table, _, rest = name.partition("/")
        if table not in tables:
            continue
        method, seed = rest.split("/")
        row = {"method": method, "seed": int(seed)}
        row |= {key: cell[key] for key in ("rate", "steps", "images", "cpu_seconds", "seconds", "peak_mib")}
        for shown in SHOWN_PROBES:
            probe, readout = shown.split(", ") if ", " in shown else (shown, "mean")
            row[shown] = accuracy(cell, probe, readout=readout)
            row[f"{shown}, untrained"] = accuracy(cell, probe, readout=readout, encoder="untrained")
        tables[table].append(row)
    # CPC's cells are the same in both tables: its images are the measure
    tables["images"] += [row for row in tables["seconds"] if row["method"] == "cpc"]
    paired = {}
    for table, rows in tables.items():
        by_seed = {(row["method"], row["seed"]): row for row in rows}
        for probe in SHOWN_PROBES:
            seeds = [s for s in (0, 1, 2) if {("simclr", s), ("cpc", s)} <= by_seed.keys()]
            differences = [by_seed["simclr", s][probe] - by_seed["cpc", s][probe] for s in seeds]
            if len(differences) > 1:
                mean, half = interval(differences)
                paired[f"{table}: SimCLR - CPC, {probe}"] = {
                    "differences": differences,
                    "mean": mean,
                    "half_width": half,
                }
    other = {name: page for name, page in pages.items() if name.split("/")[0] in ("rate", "trial")}
    variants = {name.partition("/")[2]: page for name, page in pages.items() if name.startswith("variant/")}
    about = {"variants": variants, "rates_and_trials": other}
    return {"budget_cpu_seconds": BUDGET, "tables": tables, "paired": paired, **about}


SHOWN = {
    "simclr": "SimCLR",
    "simclr_v2": "SimCLRv2",
    "moco_v1": "MoCo v1",
    "moco_v2": "MoCo v2",
    "moco_v3": "MoCo v3",
    "pirl": "PIRL",
    "byol": "BYOL",
    "simsiam": "SimSiam",
    "raft": "RAFT",
    "byol_prime": "BYOL'",
    "margin": "margin",
    "cpc": "CPC v2",
    "simclr_layer_norm": "SimCLR, CPC's trunk",
    "supervised": "supervised, all labels",
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The first table as a picture: a line a method, kNN and linear accuracy, and what the untrained trunk gives."""
    names = sorted({row["method"] for row in rows}, key=lambda m: max(r["linear"] for r in rows if r["method"] == m))
    figure, grid = new_figure(1, 1, (7.6, 0.8 + 0.32 * len(names)))
    axes = grid[0, 0]
    places = {name: place for place, name in enumerate(names)}
    for probe, colour, marker in zip(SHOWN_PROBES, (MUTED, BLUE, RUST), ("s", "o", "D"), strict=True):
        x, y = [row[probe] for row in rows], [places[row["method"]] for row in rows]
        axes.scatter(x, y, s=34, color=colour, marker=marker, label=probe, alpha=0.85, linewidths=0)
        untrained = [row[f"{probe}, untrained"] for row in rows]
        axes.scatter(untrained, y, s=60, color=colour, marker="|", label=f"{probe}, untrained")
    axes.set_yticks(range(len(names)), [SHOWN[name] for name in names])
    tidy_axes(axes, f"accuracy on 10,000 test images (%), about {BUDGET:.0f} CPU seconds each", "")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=INK, fontsize="small")
    save_figure(figure, path)


def main() -> None:
    """Measure what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/family"))
    parser.add_argument("--side-by-side", type=int, default=1, help="cells trained at once, a thread each")
    parser.add_argument(
        "--stage", choices=["rates", "settings", "cells", "variants", "write"], default="variants", help="the last one"
    )
    arguments = parser.parse_args()
    family = Family(*(p.resolve() for p in (arguments.train, arguments.test, arguments.out)), arguments.side_by_side)
    if arguments.stage != "write":
        rates = family.rates()
        if arguments.stage != "rates":
            chosen = family.settings(rates)
            if arguments.stage != "settings":
                family.cells(rates, chosen)
            if arguments.stage == "variants":
                family.variants(rates)
    shown = "python benchmarks/family.py --train cifar10-train.parquet --test cifar10-test.parquet"
    results = summarised(family.book.pages)
    write("family", shown, results)
    if results["tables"]["seconds"]:
        draw(results["tables"]["seconds"], ROOT / "docs" / "family.png")
        print(format_table([{key: row[key] for key in TABLE} for row in results["tables"]["seconds"]]))


if __name__ == "__main__":
    main()
