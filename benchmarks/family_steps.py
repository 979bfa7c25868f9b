"""Steps a second of SimCLR and MoCo against lightly's own building blocks: data, views, encoder, loss and optimizer.

    python benchmarks/family_steps.py --train cifar10-train.parquet

The same torchvision ResNet-18, 10,000 images of 32 px in memory, a batch of 256, two threads. lightly's side is
written as its examples for CIFAR-10 are: its transforms on PIL images in a DataLoader (0, 1 and 2 workers are tried in
the first round, the fastest goes on), its heads, its loss, its memory bank and its momentum update; once as it stands,
and once in channels_last, which its examples do not use. Ours is `train_steps` as `tools/pretrain.py` calls it. The
sides take turns; each turn warms up for two steps and times five. Writes benchmarks/results/family_steps.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform, SimCLRTransform
from PIL import Image
from record import write
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18

from contrastive_core.augment.views import Views, moco_v2, simclr
from contrastive_core.data import ImageDataset, parquet, training_batches
from contrastive_core.encoders import TorchvisionTrunk
from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import nt_xent
from contrastive_core.method import Method
from contrastive_core.methods.moco import MoCo
from contrastive_core.methods.simclr import SimCLR
from contrastive_core.optim import constant
from contrastive_core.training import train_steps

BATCH, SIZE, QUEUE, WARM_UP, TIMED = 256, 32, 4096, 2, 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE = {"lr": 0.06, "momentum": 0.9, "weight_decay": 5e-4}


class Pictures(Dataset[Any]):
    """Images as torchvision's CIFAR10 holds them, an array each, through a transform of PIL images."""

    def __init__(self, dataset: ImageDataset, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        assert dataset.pixels is not None
        self.arrays = dataset.pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.arrays[index]))


def lightly_batches(dataset: ImageDataset, transform: Any, workers: int) -> Iterator[list[Tensor]]:
    """lightly's views of 256 images at a time, epoch after epoch."""
    loader = DataLoader(Pictures(dataset, transform), BATCH, shuffle=True, drop_last=True, num_workers=workers)
    while True:
        yield from loader


def lightly_simclr(dataset: ImageDataset, workers: int, layout: torch.memory_format) -> Iterator[None]:
    """As lightly's SimCLR example."""
    backbone = nn.Sequential(*list(resnet18().children())[:-1])
    head = SimCLRProjectionHead(512, 512, 128)
    model = nn.ModuleList([backbone, head]).to(memory_format=layout)
    criterion = NTXentLoss(temperature=0.5)
    optimizer = torch.optim.SGD(model.parameters(), **RATE)
    transform = SimCLRTransform(input_size=SIZE, cj_strength=0.5, gaussian_blur=0.0)
    for x0, x1 in lightly_batches(dataset, transform, workers):
        z0, z1 = (head(backbone(x.to(memory_format=layout)).flatten(start_dim=1)) for x in (x0, x1))
        loss = criterion(z0, z1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def lightly_moco(dataset: ImageDataset, workers: int, layout: torch.memory_format) -> Iterator[None]:
    """As lightly's MoCo example."""
    backbone = nn.Sequential(*list(resnet18().children())[:-1]).to(memory_format=layout)
    head = MoCoProjectionHead(512, 512, 128)
    backbone_momentum, head_momentum = copy.deepcopy(backbone), copy.deepcopy(head)
    deactivate_requires_grad(backbone_momentum)
    deactivate_requires_grad(head_momentum)
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(QUEUE, 128))
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], **RATE)
    transform = MoCoV2Transform(input_size=SIZE, gaussian_blur=0.0)
    for x_query, x_key in lightly_batches(dataset, transform, workers):
        update_momentum(backbone, backbone_momentum, m=0.99)
        update_momentum(head, head_momentum, m=0.99)
        query = head(backbone(x_query.to(memory_format=layout)).flatten(start_dim=1))
        with torch.no_grad():
            x_key, shuffle = batch_shuffle(x_key.to(memory_format=layout))
            key = head_momentum(backbone_momentum(x_key).flatten(start_dim=1))
            key = batch_unshuffle(key, shuffle)
        loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def ours(dataset: ImageDataset, make: Callable[[nn.Module], Method], pipeline: Callable[..., Any]) -> Iterator[None]:
    """`train_steps` with the same encoder, batch and optimizer."""
    accelerator = Accelerator(cpu=True)
    method = make(TorchvisionTrunk("resnet18")).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], **RATE)
    prepared, prepared_optimizer = accelerator.prepare(method, optimizer)
    steps = 1_000_000
    views = Views([pipeline(SIZE, blur=0.0)] * 2, mean=MEAN, std=STD, image_size=SIZE)
    batches = training_batches(dataset, batch_size=BATCH, seed=0, start=0, steps=steps)
    for _ in train_steps(
        prepared, prepared_optimizer, accelerator, batches, views, seed=0, start=0, steps=steps, schedule=constant
    ):
        yield


def seconds_a_step(start: Callable[[], Iterator[None]]) -> float:
    """One turn: a fresh start, a warm-up, and the mean of five steps."""
    steps = start()
    for _ in range(WARM_UP):
        next(steps)
    began = time.perf_counter()
    for _ in range(TIMED):
        next(steps)
    took = (time.perf_counter() - began) / TIMED
    del steps  # and the loader's workers with it
    return took


def sides(dataset: ImageDataset) -> dict[str, dict[str, Callable[[], Iterator[None]]]]:
    """What is timed, by comparison and name."""
    head = partial(ProjectionHead, output_norm="norm")
    make_simclr = partial(SimCLR, head=head, loss=partial(nt_xent, temperature=0.5))
    make_moco = partial(MoCo, queue_size=QUEUE, momentum=0.99)
    layouts = {"": torch.contiguous_format, ", channels_last": torch.channels_last}
    compared: dict[str, dict[str, Callable[[], Iterator[None]]]] = {
        "SimCLR": {"ours": partial(ours, dataset, make_simclr, partial(simclr, strength=0.5))},
        "MoCo": {
            "ours": partial(ours, dataset, partial(make_moco, bn_groups=1), moco_v2),
            "ours, 8 BatchNorm groups": partial(ours, dataset, partial(make_moco, bn_groups=8), moco_v2),
        },
    }
    for name, theirs in (("SimCLR", lightly_simclr), ("MoCo", lightly_moco)):
        for said, layout in layouts.items():
            for workers in (0, 1, 2):
                compared[name][f"lightly, {workers} workers{said}"] = partial(theirs, dataset, workers, layout)
    return compared


def fastest_of_lightly(times: dict[str, list[float]]) -> dict[str, str]:
    """The variant whose first turn was the fastest, in either memory layout."""
    first = {name: values[0] for name, values in times.items() if name.startswith("lightly")}
    plain, last = ([n for n in first if n.endswith("channels_last") == layout] for layout in (False, True))
    return {"as its examples are": min(plain, key=first.get), "in channels_last": min(last, key=first.get)}  # type: ignore[arg-type]


def take_turns(starts: dict[str, Callable[[], Iterator[None]]], rounds: int, said: str) -> dict[str, list[float]]:
    """Seconds a step of every turn: all variants in the first round, then ours and the fastest two of lightly's."""
    times: dict[str, list[float]] = {name: [] for name in starts}
    for turn in range(rounds):
        kept = fastest_of_lightly(times).values() if turn else ()
        for name in [name for name in starts if not turn or name in kept or not name.startswith("lightly")]:
            times[name].append(seconds_a_step(starts[name]))
            print(f"{said}, {name}: {times[name][-1]:.3f} s a step", flush=True)
    return times


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, all turns, and ours against lightly's fastest as it stands and in channels_last, round by round."""
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = {}
    for said, name in fastest_of_lightly(times).items():
        rounds = [theirs / mine for theirs, mine in zip(times[name], times["ours"], strict=True)]
        ratios[f"ours against lightly {said}"] = {"median": statistics.median(rounds), "rounds": rounds}
    rows = {
        name: {"seconds_a_step": values, "median": median[name], "steps_per_second": 1 / median[name]}
        for name, values in times.items()
    }
    return {"rows": rows, "fastest_of_lightly": fastest_of_lightly(times), "ratios": ratios}


def main() -> None:
    """Take turns, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    dataset = parquet(arguments.train, size=SIZE).train.subset(torch.arange(10_000))
    results = {}
    for comparison, starts in sides(dataset).items():
        results[comparison] = summary(take_turns(starts, arguments.rounds, comparison))
        print(results[comparison]["ratios"])
    write("family_steps", "python benchmarks/family_steps.py --train cifar10-train.parquet", {"comparisons": results})


if __name__ == "__main__":
    main()
