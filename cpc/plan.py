"""What a recipe costs on machines that are not here: operations, memory, bytes between devices, hours, money.

    python tools/plan.py experiment=imagenet_cpc_v2 data.root=DIR --devices 8 --images-per-second 199.6

Nothing is trained: the method is built of tensors that have a shape, a dtype and a device but no numbers, on a GPU that
need not be there (torch's FakeTensorMode), and taken through a forward pass as the recipe's precision has it.

    operations of a step   3 x the forward pass's products and convolutions, 4 x where blocks are computed twice
    memory of a device     weights, their average, gradients, optimizer, and what the forward pass keeps for the
                           backward pass; not what convolutions borrow, nor the allocator's gaps. With shard=true an
                           n-th of the first four, and the weights that are whole at a time
    bytes of a step        2 (n - 1) / n of the gradients (a ring; with shard=true half of that, and twice the weights,
                           before they are used forward and backward), and 2 (n - 1) of the rows that the loss gathers:
                           they go out, and the gradients of the others' come back (`contrastive_core.gather`)
    seconds of a step      images / rate of one device, and the bytes over the link: at least the longer of the two, at
                           most both

Example: for the paper's ResNet-161 with 64 images a device it is within 1 % of the 65.0 GiB that an H200 measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import cpc.pretrain  # noqa: F401  # registers what configs/pretrain.yaml is made of
from contrastive_core.method import Batch, Method
from contrastive_core.optim import parameter_groups
from contrastive_core.randomness import Randomness
from contrastive_core.sharding import blocks_of
from cpc.entry import build, check_complete, config_search
from cpc.mistakes import USER_ERRORS, told
from cpc.run import recompute_

GIB = 2**30
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


GATHERED = ("targets", "z1", "z2")
"""What CPC's and SimCLR's losses want of every process, by its name in `represent`."""


@dataclass(frozen=True)
class Need:
    """What one device needs, in operations and bytes.

    operations: of a step, for one image. parameters: those that learn. fixed: bytes whatever the batch. kept: bytes of
    an image from the forward to the backward pass. gathered: bytes of an image that the loss sends to all processes.
    at_once: bytes of weights that are whole at a time where they are split over the devices, 0 = they are not.
    """

    operations: float
    parameters: int
    fixed: int
    kept: float
    gathered: int
    at_once: int
    turns: int

    def bytes_of(self, images: int, devices: int = 1) -> float:
        """Memory of a device with so many images."""
        split = bool(self.at_once) and devices > 1
        return (self.fixed / devices + self.at_once if split else self.fixed) + self.kept * images

    def wire(self, images: int, devices: int) -> float:
        """Bytes that a device sends in a step, of so many images of its own."""
        times = 3 * self.turns if self.at_once else 2  # split weights come and gradients go with each micro-batch
        return (devices - 1) * (times * 4 * self.parameters / devices + 2 * self.gathered * images)


@contextmanager
def as_on_cuda(dtype: torch.dtype) -> Iterator[None]:
    """Within: CUDA's autocast, where there is no CUDA (torch.autocast switches itself off there)."""
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def shapes_of_views(cfg: DictConfig) -> list[torch.Size]:
    """Of one image's views, without the batch."""
    views: nn.Module = build(cfg.views)
    black = torch.zeros(2, 3, cfg.load_size, cfg.load_size, dtype=torch.uint8)
    return [view.shape[1:] for view in views(black, Randomness(0, 0, torch.arange(2)))]


def forward(method: Method, shapes: list[torch.Size], images: int) -> tuple[float, int, int]:
    """Operations of a forward pass, bytes kept for the backward pass but the weights, and bytes of gathered rows."""
    every = torch.arange(images)
    with torch.device("cpu"):  # where numbers are drawn
        randomness = Randomness(0, 0, torch.arange(images))
    batch = Batch(tuple(torch.rand(images, *shape) for shape in shapes), every, every, randomness)
    weights = {id(parameter.untyped_storage()) for parameter in method.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        rows = method.represent(batch)
    held = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    gathered = [rows[name].nbytes for name in GATHERED if name in rows and getattr(method, "gather", True)]
    return float(counter.get_total_flops()), held, sum(gathered)


def optimizer_bytes(cfg: DictConfig, method: Method) -> int:
    """Of the optimizer's state, by having it take a step."""
    optimizer = build(cfg.optimizer, parameter_groups(method, exclude=cfg.exclude), _partial_=False)
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = optimizer.state.values()
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


def whole_at_once(method: Method) -> int:
    """Bytes of weights that `shard_` leaves whole at a time: those in no block, and two blocks."""
    blocks = sorted(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks_of(method))
    return sum(parameter.nbytes for parameter in method.parameters()) - sum(blocks[:-2])


def need(cfg: DictConfig) -> Need:
    """What a recipe needs of a device. Raises ValueError for a method that does not come in two halves."""
    kind: type[Any] = hydra.utils.get_class(cfg.method._target_)
    if kind.represent is Method.represent:
        raise ValueError(f"{kind.__name__} does not come in two halves: plan CPC or SimCLR")
    shapes = shapes_of_views(cfg)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        method: Method = build(cfg.method, encoder=build(cfg.encoder))
        if cfg.recompute:
            recompute_(method.encoder)
        with as_on_cuda(DTYPES[cfg.precision]):
            two, three = (forward(method, shapes, images) for images in (2, 3))
        learning = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
        weights = sum(tensor.nbytes for tensor in method.state_dict().values())
        fixed = weights * (1 if cfg.averaging is None else 2) + 4 * learning + optimizer_bytes(cfg, method)
    kept = three[1] - two[1]
    return Need(
        operations=(3 + cfg.recompute + cfg.grad_cache) * (three[0] - two[0]),  # of which a backward pass has two
        parameters=learning,
        fixed=fixed + two[1] - 2 * kept,  # the rest are weights in the precision of the products
        kept=kept,
        gathered=three[2] - two[2],
        at_once=whole_at_once(method) if cfg.shard else 0,
        turns=cfg.accumulate,
    )


@dataclass(frozen=True)
class Machine:
    """Devices alike: how many; of each the GiB of memory, GB/s to the others, images a second, price of an hour."""

    devices: int
    memory: float
    link: float
    rate: float
    price: float


def described(cfg: DictConfig, needed: Need, machine: Machine) -> list[tuple[str, str]]:
    """The plan, line by line."""
    images, left_over = divmod(cfg.batch_size, machine.devices * cfg.accumulate)
    if left_over or not images:
        raise ValueError(
            f"batch_size={cfg.batch_size} does not split evenly over {machine.devices} devices x {cfg.accumulate} "
            f"micro-batches: pass a multiple of {machine.devices * cfg.accumulate}"
        )
    memory, fixed = (needed.bytes_of(count, machine.devices) for count in (images, 0))
    most = max(0, int((machine.memory * GIB - fixed) // needed.kept))
    computing = images * cfg.accumulate / machine.rate
    wire = needed.wire(images * cfg.accumulate, machine.devices)
    sending = wire / (machine.link * 1e9)
    least, at_most = (seconds * cfg.steps / 3600 for seconds in (max(computing, sending), computing + sending))
    plan = [
        ("parameters that learn", f"{needed.parameters / 1e6:.1f} M"),
        (
            "operations of a step",
            f"{needed.operations * cfg.batch_size / 1e12:.4g} T, {needed.operations / 1e9:.4g} G an image",
        ),
        ("images of a device at a time", f"{images}; {most} fit {machine.memory:g} GiB"),
        ("memory of a device", f"{memory / GIB:.1f} GiB, {fixed / GIB:.2f} whatever the batch"),
        ("bytes that a device sends in a step", f"{wire / 1e6:.1f} MB, {sending * 1e3:.1f} ms"),
        ("seconds of a step", f"{max(computing, sending):.3g} to {computing + sending:.3g}"),
        (
            "rate of all devices",
            f"{needed.operations * machine.rate * machine.devices / 1e12:.4g} TFLOP/s while computing",
        ),
        ("hours", f"{least:.1f} to {at_most:.1f} for {cfg.steps} steps of {cfg.batch_size} images"),
    ]
    if machine.price:
        cost = [hours * machine.devices * machine.price for hours in (least, at_most)]
        plan.append(("price", f"{cost[0]:.0f} to {cost[1]:.0f}"))
    if memory > machine.memory * GIB:
        plan.append(("does not fit", "pass accumulate=N, recompute=true, shard=true, fewer images or more devices"))
    return plan


EPILOG = """Everything else is the recipe, as tools/pretrain.py takes it (its --help tells the keys).

examples:
  python tools/plan.py experiment=imagenet_cpc_v2 data.root=DIR --devices 8 --images-per-second 199.6
  python tools/plan.py experiment=imagenet_cpc_v2 accumulate=4 data.root=DIR --devices 2 --images-per-second 150
  python tools/plan.py method=simclr --images-per-second 2000 --price 2.5

exit codes: 0 done, 2 a mistake"""


def main() -> None:
    """Read the command line, print the plan; a mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--images-per-second", type=float, required=True, help="of one device, measured")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of a device")
    parser.add_argument("--link", type=float, default=25.0, help="GB/s of a device to the others")
    parser.add_argument("--price", type=float, default=0.0, help="of a device for an hour, in whatever currency")
    asked = parser.parse_intermixed_args()
    try:
        if min(asked.devices, asked.images_per_second, asked.memory, asked.link) <= 0:
            raise ValueError("--devices, --images-per-second, --memory and --link must be above 0")
        with config_search():
            cfg = hydra.compose("pretrain", asked.overrides)
        if "fast_precision" in str(OmegaConf.to_container(cfg).get("precision")):  # type: ignore[union-attr]
            cfg.precision = "bf16"  # of the GPU that is planned for, not of this machine
        check_complete(cfg)
        machine = Machine(asked.devices, asked.memory, asked.link, asked.images_per_second, asked.price)
        lines = described(cfg, need(cfg), machine)
    except (*USER_ERRORS, hydra.errors.HydraException) as error:
        sys.exit(told(error))
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:{width}}  {value}" for name, value in lines))


if __name__ == "__main__":
    main()
