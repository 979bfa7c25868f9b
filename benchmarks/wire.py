"""What processes send one another in a step, against the plan and against the least there could be.

    python benchmarks/wire.py        # a minute on two cores; writes reliability/wire.json

The recipes as `tools/pretrain.py` has them on the bundled digits, 32 images a step whatever the number of processes,
over gloo. Linux counts the bytes that each TCP connection has sent; of all steps but the first they are divided by the
steps, and the largest of the processes' is taken.

The least, where each keeps all weights: n processes cannot add up gradients by sending less than 2 (n - 1) / n of them
each, and rows that all want reach n - 1 others, as do the gradients of theirs that come back. With weights split over
the processes the plan is NCCL's: gloo adds up gradients everywhere and throws most of the sums away.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
import warnings
from pathlib import Path
from typing import cast

import hydra
import torch
from omegaconf import DictConfig
from processes import free_port
from record import ROOT, takes_no_arguments, write
from torch import distributed, multiprocessing

from contrastive_core.batch_norm import globalize_batch_norm
from contrastive_core.data import ImageDataset, training_batches
from contrastive_core.method import Method
from contrastive_core.optim import constant
from contrastive_core.training import train_steps
from cpc.entry import build, config_search, start_accelerator
from cpc.plan import need
from cpc.pretrain import build_method
from cpc.run import made_ready

RESULTS = ROOT / "benchmarks" / "reliability"
PROCESSES = (1, 2, 4)
STEPS, BATCH = 6, 32
RECIPES = {
    "CPC v2": ["method=cpc"],
    "CPC v2, each process's own negatives": ["method=cpc", "method.gather=false"],
    "CPC v2, two micro-batches as one": ["method=cpc", "accumulate=2", "grad_cache=true"],
    "CPC v2, split over processes": ["method=cpc", "shard=true"],
    "SimCLR, layer norm": ["method=simclr", "norm=layer"],
    "SimCLR, batch norm over all": ["method=simclr", "norm=batch"],
}
SENT = 200
"""Where Linux's `struct tcp_info` holds tcpi_bytes_sent, an unsigned 64-bit number (Linux 4.19 or newer)."""


def bytes_sent() -> int:
    """By this process's open TCP connections, since they were opened."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            continue
        if not link.startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(name))) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                total += struct.unpack_from("Q", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), SENT)[0]
    return total


def a_step_sends(cfg: DictConfig) -> float:
    """Bytes that this process sends in a step."""
    accelerator = start_accelerator(precision="no", device="cpu", threads=1, accumulate=cfg.accumulate)
    dataset: ImageDataset = build(cfg.data).train
    torch.manual_seed(0)
    method, views = build_method(cfg, dataset)
    if accelerator.num_processes > 1 and cfg.global_batch_norm:
        method = cast(Method, globalize_batch_norm(method))
    batches = training_batches(
        dataset, batch_size=BATCH, seed=0, start=0, steps=STEPS, rank=accelerator.process_index,
        world=accelerator.num_processes, accumulate=cfg.accumulate,
    )  # fmt: skip
    trained = made_ready(cfg, method, accelerator)
    counted = [
        bytes_sent()
        for _ in train_steps(
            trained.prepared, trained.prepared_optimizer, accelerator, batches, views, seed=0, start=0, steps=STEPS,
            schedule=constant, grad_cache=cfg.grad_cache,
        )
    ]  # fmt: skip
    accelerator.free_memory()
    return (counted[-1] - counted[0]) / (STEPS - 1)


def configured(options: list[str]) -> DictConfig:
    """A recipe as the command line would read it."""
    with config_search():
        return hydra.compose("pretrain", [*options, f"batch_size={BATCH}", f"steps={STEPS}"])


def process(rank: int, count: int, port: int, folder: str) -> None:
    """All recipes, as one of `count` processes."""
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    sent = {name: a_step_sends(configured(options)) for name, options in RECIPES.items()}
    (Path(folder) / f"{count} {rank}.json").write_text(json.dumps(sent))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def main() -> None:
    """Run all, and write the table."""
    takes_no_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        for count in PROCESSES:
            multiprocessing.spawn(process, args=(count, free_port(), folder), nprocs=count)
        measured = {
            count: [json.loads((Path(folder) / f"{count} {rank}.json").read_text()) for rank in range(count)]
            for count in PROCESSES
        }
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, options in RECIPES.items():
        needed = need(configured(options))
        rows = table[name] = {}
        for count, processes in measured.items():
            sent, planned = max(one[name] for one in processes), needed.wire(BATCH // count, count)
            rows[str(count)] = {"sent": round(sent), "planned": round(planned)}
            if planned:
                rows[str(count)]["times the least"] = round(sent / planned, 4)
    write("wire", "python benchmarks/wire.py", {"images": BATCH, "bytes_a_step": table}, folder=RESULTS)
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
