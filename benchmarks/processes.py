"""One process against two and four: the same samples, the same weights, for every method.

    python benchmarks/processes.py        # 5 minutes on two cores; writes reliability/processes.json

Every method as `tools/pretrain.py` builds it, with a small encoder, through the loop of a run, on the bundled digits:
global batches of 16, the seed's own order and augmentations, BatchNorm over the joint batch (MoCo: the same number of
groups). In float64 the weights after 20 steps, in float32 the first step's gradient, both as the norm of the difference
relative to the norm of the whole, and the losses of all steps. At a rate of 0.01: five times that, with momentum, lets
what rounding did in the first step grow a hundred thousand times in twenty.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from omegaconf import DictConfig
from record import ROOT, takes_no_arguments, write
from torch import Tensor, distributed, multiprocessing, nn

from contrastive_core.batch_norm import globalize_batch_norm
from contrastive_core.data import ImageDataset, training_batches
from contrastive_core.method import Method
from contrastive_core.optim import constant
from contrastive_core.training import train_steps
from cpc.entry import build, config_search, start_accelerator
from cpc.pretrain import build_method

RESULTS = ROOT / "benchmarks" / "reliability"
PROCESSES = (1, 2, 4)
STEPS, BATCH = 20, 16
SMALL = ["encoder.width=8", "encoder.blocks=[1,1]", f"batch_size={BATCH}", f"steps={STEPS}"]
GROUPS = ["method.bn_groups=4"]
METHODS = {
    "CPC v2": ["method=cpc"],
    "CPC v2, two micro-batches": ["method=cpc", "accumulate=2"],
    "CPC v2, two micro-batches as one": ["method=cpc", "accumulate=2", "grad_cache=true"],
    "SimCLR": ["method=simclr", "norm=batch"],
    "SimCLR, two micro-batches": ["method=simclr", "norm=layer", "accumulate=2"],
    "SimCLRv2": ["method=simclr_v2", "norm=batch", "memory.queue=64"],
    "MoCo v1": ["method=moco_v1", "norm=batch", "memory.queue=64", *GROUPS],
    "MoCo v2": ["method=moco_v2", "norm=batch", "memory.queue=64", *GROUPS],
    "MoCo v3": ["method=moco_v3", "norm=batch"],
    "PIRL": ["method=pirl", "norm=batch", "memory.bank=64"],
    "BYOL": ["method=byol", "norm=batch"],
    "BYOL'": ["method=byol_prime", "norm=batch"],
    "SimSiam": ["method=simsiam", "norm=batch"],
    "RAFT": ["method=raft", "norm=batch"],
    "margin": ["method=margin", "norm=batch"],
    "supervised": ["method=supervised", "norm=batch"],
}


class As(nn.Module):
    """Views in another precision."""

    def __init__(self, views: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.views, self.dtype = views, dtype

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        return tuple(view.to(self.dtype) for view in self.views(*given))


def trained(cfg: DictConfig, dataset: ImageDataset, dtype: torch.dtype) -> dict[str, Any]:
    """Joint losses of the steps, the first gradients, the weights in the end."""
    accelerator = start_accelerator(precision="no", device="cpu", threads=1, accumulate=cfg.accumulate)
    torch.manual_seed(0)
    method, views = build_method(cfg, dataset)
    method.to(dtype)
    if accelerator.num_processes > 1 and "bn_groups" not in cfg.method:  # MoCo's are fixed in number, whatever runs
        method = cast(Method, globalize_batch_norm(method))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        if not gradients:
            gradients.update({n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    batches = training_batches(
        dataset, batch_size=BATCH, seed=0, start=0, steps=STEPS, rank=accelerator.process_index,
        world=accelerator.num_processes, accumulate=cfg.accumulate,
    )  # fmt: skip
    prepared, prepared_optimizer = accelerator.prepare(method, optimizer)
    results = train_steps(
        prepared, prepared_optimizer, accelerator, batches, As(views, dtype), seed=0, start=0, steps=STEPS,
        schedule=constant, grad_cache=cfg.grad_cache,
    )  # fmt: skip
    losses = [float(accelerator.reduce(result.metrics["loss"].double(), reduction="mean")) for result in results]
    accelerator.free_memory()
    return {"losses": losses, "gradients": gradients, "weights": dict(method.named_parameters())}


def configured(options: list[str]) -> DictConfig:
    """A recipe as the command line would read it."""
    with config_search():
        return hydra.compose("pretrain", [*options, *SMALL])


def process(rank: int, count: int, port: int, folder: str) -> None:
    """All methods in both precisions, as one of `count` processes."""
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    for name, options in METHODS.items():
        cfg = configured(options)
        dataset: ImageDataset = build(cfg.data).train
        for dtype in (torch.float64, torch.float32):
            found = trained(cfg, dataset, dtype)
            if rank == 0:
                torch.save(found, Path(folder) / f"{count} {name} {dtype}.pt")
        if rank == 0:
            print(f"{count} processes: {name}", flush=True)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The norm of the difference of all tensors together, relative to the norm of `one`."""
    difference = sum(float((other[name] - value).detach().double().square().sum()) for name, value in one.items())
    return (difference / sum(float(value.detach().double().square().sum()) for value in one.values())) ** 0.5


def compared(folder: Path, name: str) -> Iterator[tuple[int, dict[str, float]]]:
    """Of each number of processes above one, how far it is from one."""
    for count in PROCESSES[1:]:
        exact, single = (
            [torch.load(folder / f"{processes} {name} {dtype}.pt") for processes in (1, count)]
            for dtype in (torch.float64, torch.float32)
        )
        yield (
            count,
            {
                "float64, weights after 20 steps": apart(exact[0]["weights"], exact[1]["weights"]),
                "float32, first gradient": apart(single[0]["gradients"], single[1]["gradients"]),
                "float32 of one process against its float64, first gradient": apart(
                    exact[0]["gradients"], single[0]["gradients"]
                ),
                "float32, losses": max(
                    abs(a - b) / abs(a) for a, b in zip(single[0]["losses"], single[1]["losses"], strict=True)
                ),
            },
        )


def main() -> None:
    """Run all, and write the table."""
    takes_no_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        for count in PROCESSES:
            multiprocessing.spawn(process, args=(count, free_port(), folder), nprocs=count)
        table = {name: {str(n): row for n, row in compared(Path(folder), name)} for name in METHODS}
    names = list(next(iter(table["CPC v2"].values())))
    worst = {column: max(row[column] for rows in table.values() for row in rows.values()) for column in names}
    write("processes", "python benchmarks/processes.py", {"worst": worst, "against_one": table}, folder=RESULTS)
    print(json.dumps(worst, indent=1))


if __name__ == "__main__":
    main()
