"""Does this machine, this cluster, compute the right gradient? Every loss on several processes against one.

    python -m contrastive_core.check --processes 4          # starts them here, over gloo (nccl with as many GPUs)
    torchrun --nproc-per-node 8 -m contrastive_core.check   # or under a launcher, on its processes

Each process encodes its share of a batch with the same linear map. The gradient of the map, averaged over processes
as DistributedDataParallel does, is compared with the gradient of one process on the joint batch. A library that
gathers without gradients shows here a gradient scale of 1/processes, or a cosine below 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

from contrastive_core import losses
from contrastive_core.loss_arguments import Gather
from contrastive_core.losses import normalize

TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
LOSS_TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


class Share(NamedTuple):
    """What a loss is given: two encoded views `n d`, each image's number in the joint batch and its process, and
    a number that depends on the map."""

    a: Tensor
    b: Tensor
    ids: Tensor
    owners: Tensor
    scale: Tensor


class Row(NamedTuple):
    """A line of the table: several processes over one. error: |gradient - joint gradient| / |joint gradient|."""

    loss: str
    counts: list[int]
    loss_ratio: float
    gradient_scale: float
    cosine: float
    error: float

    def right(self, dtype: str) -> bool:
        """Whether loss and gradient are those of the joint batch, to the precision's rounding."""
        return self.error < TOLERANCE[dtype] and abs(self.loss_ratio - 1) < LOSS_TOLERANCE[dtype]


def _cpc(share: Share, gather: Gather) -> Tensor:
    keys = torch.cat([share.b, share.a.flip(1)])  # more keys than queries
    return losses.info_nce(share.a, keys, torch.arange(len(share.a)).to(share.a.device), gather=gather)


def _moco(share: Share, gather: Gather) -> Tensor:
    queue = torch.randn(13, share.a.shape[1], generator=torch.Generator().manual_seed(3)).to(share.a)
    own = normalize(share.b)
    return losses.info_nce(normalize(share.a), None, own, shared_keys=queue, temperature=0.2, gather=gather)


def _mixed(share: Share, gather: Gather) -> Tensor:
    """Own keys, keys, shared keys that need a gradient, and a temperature that does: all depend on the map."""
    prototypes = share.a.new_ones(3, share.a.shape[1]) * torch.arange(1, 4, device=share.a.device)[:, None] / 4
    temperature = 0.5 + share.scale
    return losses.info_nce(
        share.a, share.a.flip(1), share.b, shared_keys=prototypes * share.scale, temperature=temperature, gather=gather
    )


def _masked(share: Share, gather: Gather) -> Tensor:
    row, col = share.ids[:, None], share.ids[None, :]
    mask = ((row + col) % 3 > 0) | (row == col) | (share.owners[:, None] != share.owners[None, :])
    queue = share.a.detach()[:0].new_ones(2, share.a.shape[1])
    return losses.info_nce(
        share.a, share.b, torch.arange(len(mask)).to(mask.device), shared_keys=queue, mask=mask, gather=gather
    )


def _sup_con(share: Share, gather: Gather) -> Tensor:
    return losses.sup_con(torch.cat([share.a, share.b]), (share.ids % 3).repeat(2), gather=gather)


def _siglip(share: Share, gather: Gather) -> Tensor:
    positive = torch.arange(len(share.a), device=share.a.device)
    return losses.siglip(share.a, share.b, positive, temperature=0.5, bias=-1.0, gather=gather)


CASES: dict[str, tuple[Callable[[Share, Gather], Tensor], Sequence[Gather]]] = {
    "info_nce (CPC)": (_cpc, (True, "ring")),
    "info_nce (MoCo)": (_moco, (True, "ring")),
    "info_nce, all at once": (_mixed, (True, "ring")),
    "info_nce, masked": (_masked, (True, "ring")),
    "nt_xent": (lambda share, gather: losses.nt_xent(share.a, share.b, gather=gather), (True, "ring")),
    "nt_xent, decoupled": (
        lambda share, gather: losses.nt_xent(share.a, share.b, decoupled=True, gather=gather),
        (True, "ring"),
    ),
    "sup_con": (_sup_con, (True,)),
    "symmetric_info_nce": (
        lambda share, gather: losses.symmetric_info_nce(share.a, share.b, gather=gather),
        (True, "ring"),
    ),
    "siglip": (_siglip, (True,)),
    "uniformity": (lambda share, gather: losses.uniformity(share.a, gather=gather), (True,)),
}
"""Every loss that compares images with one another, and its ways of gathering; the others know no neighbours."""


def _joint_batch(counts: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two views of sum(counts) images, their owners, and the linear map: the same on every process."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(sum(counts), 12, generator=generator, dtype=torch.float64)
    views = torch.stack([images + 0.5 * torch.randn(images.shape, generator=generator) for _ in range(2)])
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    weight = torch.randn(8, 12, generator=generator, dtype=torch.float64) / 12**0.5
    return views[0].to(dtype), views[1].to(dtype), owners, weight.to(dtype)


def _loss_and_gradient(
    loss: Callable[[Share, Gather], Tensor], gather: Gather, counts: Sequence[int], dtype: torch.dtype, rank: int | None
) -> tuple[Tensor, Tensor]:
    """Of the share of one process, or of the joint batch (rank None)."""
    first, second, owners, weight = _joint_batch(counts, dtype)
    chosen = torch.arange(len(owners)) if rank is None else (owners == rank).nonzero().squeeze(1)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    weight = weight.to(device).requires_grad_()
    a, b = (view[chosen].to(device) @ weight.T for view in (first, second))
    scale = weight.square().mean()
    value = loss(Share(a, b, chosen.to(device), owners[chosen].to(device), scale), gather)
    (gradient,) = torch.autograd.grad(value, weight)
    return value.detach(), gradient


def check(counts: Sequence[int], dtype: torch.dtype) -> list[Row]:
    """Compare all losses with process r holding `counts[r]` images; every process must call it, and gets the table."""
    rows = []
    for name, (loss, ways) in CASES.items():
        joint, joint_gradient = (t.double() for t in _loss_and_gradient(loss, False, counts, dtype, None))
        for gather in ways:
            value, gradient = _loss_and_gradient(loss, gather, counts, dtype, dist.get_rank())
            for tensor in (value, gradient):  # as DDP does
                dist.all_reduce(tensor)
                tensor /= dist.get_world_size()
            gradient = gradient.double()
            length, joint_length = gradient.norm(), joint_gradient.norm()
            rows.append(
                Row(
                    name + (", ring" if gather == "ring" else ""),
                    list(counts),
                    float(value / joint),
                    float(length / joint_length),
                    float((gradient * joint_gradient).sum() / (length * joint_length)),
                    float((gradient - joint_gradient).norm() / joint_length),
                )
            )
    return rows


def table(rows: Sequence[Row], dtype: str) -> str:
    """The rows as text, one a line, with "off" where loss or gradient is not right."""
    lines = [f"{'loss':27}{'images a process':19}{'loss ratio':>12}{'gradient scale':>16}{'cosine':>12}{'error':>10}"]
    for row in rows:
        counts = " ".join(map(str, row.counts[:8])) + (" ..." if len(row.counts) > 8 else "")
        numbers = f"{row.loss_ratio:12.7f}{row.gradient_scale:16.7f}{row.cosine:12.7f}{row.error:10.1e}"
        lines.append(f"{row.loss:27}{counts:19}{numbers}{'' if row.right(dtype) else '  off'}")
    return "\n".join(lines)


def _work(rank: int, folder: str, size: int, dtype: str) -> None:
    """One process that `check_here` has started."""
    torch.set_num_threads(1)
    nccl = torch.cuda.is_available() and torch.cuda.device_count() >= size
    if nccl:
        torch.cuda.set_device(rank)
    backend = "nccl" if nccl else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    rows = _all_counts(getattr(torch, dtype))
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def _all_counts(dtype: torch.dtype) -> list[Row]:
    """Equal numbers of images, then unequal ones."""
    size = dist.get_world_size()
    return [row for counts in ([6] * size, [3 + 2 * (r % 3) for r in range(size)]) for row in check(counts, dtype)]


def check_here(processes: int, dtype: str) -> list[Row]:
    """Start so many processes on this machine, let them compare, return the table."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, args=(folder, processes, dtype), nprocs=processes)
        return [Row(*row) for row in json.loads(Path(folder, "rows.json").read_text())]


EPILOG = """examples:
  python -m contrastive_core.check --processes 4                 on this machine
  python -m contrastive_core.check --processes 2 --dtype float64
  torchrun --nproc-per-node 8 -m contrastive_core.check          under your launcher

exit codes: 0 every error is within the tolerance, 1 not, 2 a mistake"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0 where every error is within the tolerance, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m contrastive_core.check",
        description=__doc__.split("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, help="how many to start here; ignored under a launcher")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    options = parser.parse_args(arguments)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if launched:
        local = int(os.environ.get("LOCAL_RANK", 0))
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # a choice that all processes of a machine make alike
        nccl = torch.cuda.is_available() and beside <= torch.cuda.device_count()
        if nccl:
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if nccl else "gloo")
        rows = _all_counts(getattr(torch, options.dtype))
    elif options.processes < 2:
        parser.error(f"--processes {options.processes}: pass at least 2, or there is nothing to compare")
    else:
        rows = check_here(options.processes, options.dtype)
    wrong = sum(not row.right(options.dtype) for row in rows)
    if not launched or dist.get_rank() == 0:
        size, tolerance = len(rows[0].counts), TOLERANCE[options.dtype]
        print(table(rows, options.dtype))
        print(f"{len(rows) - wrong} of {len(rows)} within {tolerance:g} on {size} processes, {options.dtype}")
    if launched:
        dist.barrier()
        dist.destroy_process_group()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
