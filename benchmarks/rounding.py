"""Why batch norm's first float32 gradient differs between one process and two by more than 1e-6: what was tried.

    python benchmarks/rounding.py --train cifar10-train.parquet        # 4 minutes; writes reliability/rounding.json

As benchmarks/processes.py, the first step alone: as it is; with the joint batch's norm on one process too, so that no
two ways of computing it are compared; with photographs in place of digits; with 64 images in place of 16; after 200
steps of training. Beside it, how far one process's own float32 is from its float64.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from processes import METHODS, RESULTS, As, apart, configured, free_port
from record import write
from torch import Tensor, distributed, multiprocessing

from contrastive_core.batch_norm import globalize_batch_norm
from contrastive_core.data import ImageDataset, training_batches
from contrastive_core.method import Method
from contrastive_core.optim import constant
from contrastive_core.training import train_steps
from cpc.entry import build, start_accelerator
from cpc.pretrain import build_method

NAMES = ("SimCLR", "BYOL")
TRIES: dict[str, dict[str, Any]] = {
    "as it is": {"joint": False},
    "the joint batch's norm on one process too": {},
    "photographs": {"options": ["data=parquet", "load_size=32", "image_size=32"]},
    "64 images": {"batch": 64},
    "after 200 steps": {"steps": 200},
}


def stepped(method: Method, views: Any, dataset: ImageDataset, steps: int, batch: int, seed: int) -> dict[str, Tensor]:
    """Take steps; returns the gradients of the first."""
    accelerator = start_accelerator(precision="no", device="cpu", threads=1)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.03, momentum=0.9)
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        if not gradients:
            gradients.update({n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    batches = training_batches(
        dataset, batch_size=batch, seed=seed, start=0, steps=steps, rank=accelerator.process_index,
        world=accelerator.num_processes, accumulate=1,
    )  # fmt: skip
    prepared, prepared_optimizer = accelerator.prepare(method, optimizer)
    for _ in train_steps(
        prepared, prepared_optimizer, accelerator, batches, views, seed=seed, start=0, steps=steps, schedule=constant
    ):
        pass
    accelerator.free_memory()
    return gradients


def process(rank: int, count: int, port: int, folder: str, name: str, tried: dict[str, Any]) -> None:
    """The gradients in both precisions, as one of `count` processes; the first trains where that is tried."""
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    cfg = configured([*METHODS[name], *tried.get("options", [])])
    dataset: ImageDataset = build(cfg.data).train
    trained = Path(folder) / "trained.pt"
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        method, views = build_method(cfg, dataset)
        if tried.get("steps") and not trained.is_file():
            stepped(method, views, dataset, tried["steps"], 64, seed=1)
            torch.save(method.state_dict(), trained)
        if trained.is_file():
            method.load_state_dict(torch.load(trained))
        method.to(dtype)
        if count > 1 or tried.get("joint", True):
            method = cast(Method, globalize_batch_norm(method))
        found = stepped(method, As(views, dtype), dataset, 1, tried.get("batch", 16), seed=0)
        if rank == 0:
            torch.save(found, Path(folder) / f"{count} {dtype}.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()


def compared(name: str, tried: dict[str, Any]) -> dict[str, float]:
    """One process against two, and against itself."""
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            arguments = (count, free_port(), folder, name, tried)
            multiprocessing.spawn(process, args=arguments, nprocs=count)
        one, two, exact = (
            torch.load(Path(folder) / file)
            for file in ("1 torch.float32.pt", "2 torch.float32.pt", "1 torch.float64.pt")
        )
    return {"two processes": apart(one, two), "its own float64": apart(exact, one)}


def main() -> None:
    """Run all, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="a parquet file of photographs of 32 px")
    train = parser.parse_args().train
    TRIES["photographs"]["options"].append(f"data.train={train.resolve()}")
    table = {}
    for name in NAMES:
        for what, tried in TRIES.items():
            table[f"{name}, {what}"] = compared(name, tried)
            print(name, what, table[f"{name}, {what}"], flush=True)
    write(
        "rounding", f"python benchmarks/rounding.py --train {train.name}", {"from_one_process": table}, folder=RESULTS
    )


if __name__ == "__main__":
    main()
