"""CPC v2's steps on a GPU: images a second, memory, share of the card's matrix rate, and where the time goes.

    PYTHONPATH=. python benchmarks/cpc_gpu.py --out F.json

The recipes as they stand, on made-up images: the paper's ResNet-161 and ResNet-50, CIFAR-10's small and large encoder;
some of them also with torch's own group norm in place of our kernels, and with every residual block compiled.
Operations are counted on the meta device (convolutions and matrix products of the forward pass, three times for a
step); the rate they are held against is that of a product of bf16 squares on the same card. The trace sums the GPU's
own time of three steps by kind of kernel; `waits` are the lines at which the host waited for the GPU within one step.
Every part is a process of its own, is written as it ends, and one that is there is skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from contrastive_core import layer_norm
from contrastive_core.data import LoadedBatch
from contrastive_core.method import Batch
from contrastive_core.optim import parameter_groups
from contrastive_core.randomness import Randomness
from contrastive_core.training import StepResult, train_steps
from cpc.encoders import ResidualBlock
from cpc.entry import build, config_search, start_accelerator
from cpc.pretrain import build_method

RECIPES = {
    "resnet161": ["experiment=imagenet_cpc_v2", "data.root=nowhere"],
    "resnet50": ["experiment=imagenet_cpc_v2_resnet50", "data.root=nowhere"],
    "cifar10": ["experiment=cifar10_cpc", "data.train=nowhere"],
    "cifar10_large": ["experiment=cifar10_cpc_large", "data.train=nowhere"],
}
# recipe, images, what is done otherwise
PARTS = [
    ("resnet161", 16, ""),
    ("resnet161", 16, "torch's norm"),
    ("resnet161", 64, ""),
    ("cifar10_large", 256, ""),
    ("cifar10_large", 256, "torch's norm"),
    ("cifar10_large", 512, ""),
    ("resnet50", 64, ""),
    ("resnet50", 64, "torch's norm"),
    ("cifar10", 256, ""),
    ("resnet161", 16, "compiled"),
    ("cifar10_large", 256, "compiled"),
]
KINDS = {  # of kernels, by what their names hold; the first that fits
    "norms": (
        "_forward_kernel",
        "_backward_kernel",
        "GroupNorm",
        "RowwiseMoments",
        "ComputeInternalGradients",
        "ComputeBackwardFusedParams",
        "GammaBeta",
    ),
    "optimizer and norms of gradients": ("multi_tensor", "lpnorm", "LpNorm"),
    "compiled": ("triton",),
    "matrix products and convolutions": (
        "gemm",
        "conv",
        "cutlass",
        "xmma",
        "nvjet",
        "wgrad",
        "dgrad",
        "fprop",
        "cudnn",
    ),
    "copies and layouts": ("copy", "Memcpy", "nchw", "nhwc", "CatArray", "Memset"),
    "element by element": ("elementwise", "threshold"),
    "reductions": ("reduce",),
}


def composed(name: str, images: int) -> DictConfig:
    """A recipe as the command line would read it."""
    with config_search():
        return hydra.compose("pretrain_cpc", [*RECIPES[name], f"batch_size={images}"])


def made_up(size: int, pixels: int) -> Iterator[list[LoadedBatch]]:
    """The same random images at every step."""
    images = torch.randint(0, 256, (size, 3, pixels, pixels), dtype=torch.uint8)
    every = torch.arange(size)
    while True:
        yield [LoadedBatch(images, torch.zeros(size, dtype=torch.int64), every, every, [])]


def operations(cfg: DictConfig) -> float:
    """Floating-point operations of a step for one image: convolutions and matrix products."""
    method, views = build_method(cfg)
    black = torch.zeros(1, 3, cfg.load_size, cfg.load_size, dtype=torch.uint8)
    seen = tuple(view.to("meta") for view in views(black, Randomness(0, 0, torch.arange(1))))
    nothing = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        method.to("meta").represent(Batch(seen, nothing, nothing))
    return 3.0 * counter.get_total_flops()


def trainer(cfg: DictConfig, way: str) -> tuple[nn.Module, Iterator[StepResult], Any]:
    """Views, endless steps as `cpc.run` takes them, and the accelerator."""
    accelerator = start_accelerator(precision=cfg.precision, device=None, threads=None)
    torch.manual_seed(0)
    method, views = build_method(cfg)
    method.to(memory_format=torch.channels_last)
    if way == "torch's norm":
        layer_norm.supported = lambda images: False
    if way == "compiled":
        for module in method.encoder.modules():
            if isinstance(module, ResidualBlock):
                module.compile()
    optimizer = build(cfg.optimizer, parameter_groups(method, exclude=cfg.exclude), _partial_=False)
    method, optimizer = accelerator.prepare(method, optimizer)
    batches = made_up(cfg.batch_size, cfg.load_size)
    results = train_steps(
        method, optimizer, accelerator, batches, views, seed=0, start=0, steps=10**6, schedule=float, clip=cfg.clip
    )
    return views, results, accelerator


def wait() -> None:
    """For what the device still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_each(run: Iterator[Any], times: int) -> list[float]:
    """Wall seconds of each of so many."""
    took = []
    for _ in range(times):
        wait()
        began = time.perf_counter()
        next(run)
        wait()
        took.append(time.perf_counter() - began)
    return took


def seen(views: nn.Module, cfg: DictConfig, device: torch.device) -> Iterator[Any]:
    """The views alone, step after step, from images on the CPU."""
    for step, (batch,) in enumerate(made_up(cfg.batch_size, cfg.load_size)):
        with torch.no_grad():  # not around the yield: it would be in force for whoever asked
            made = views(batch.images.to(device), Randomness(0, step, batch.places))
        yield made


def kind(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((name for name, parts in KINDS.items() if any(part in kernel for part in parts)), "other")


def trace(steps: Iterator[StepResult]) -> dict[str, Any]:
    """The GPU's time of three steps in milliseconds a step: by kind of kernel, and the twenty longest kernels."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        for _ in islice(steps, 3):
            pass
        wait()
    kinds: dict[str, float] = defaultdict(float)
    kernels = []
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.key.startswith("Optimizer."):
            continue  # the latter is a range of several kernels
        spent = event.self_device_time_total / 3000
        kinds[kind(event.key)] += spent
        kernels.append((round(spent, 3), event.count // 3, event.key[:110]))
    return {
        "ms_by_kind": {name: round(spent, 2) for name, spent in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels_a_step": sum(count for _, count, _ in kernels),
        "longest_kernels": sorted(kernels, reverse=True)[:20],
    }


def waits(steps: Iterator[StepResult]) -> list[str]:
    """Where the host waited for the GPU within a step: file, line, and how often."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        next(steps)
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in seen)
    return [f"{place} x{times}" for place, times in places.most_common()]


def matrix_rate(side: int) -> dict[str, float]:
    """Tera operations a second of a product of two bf16 squares of random numbers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products() -> Iterator[Any]:
        while True:
            for _ in range(10):
                product = a @ b
            yield product

    run = products()
    seconds_each(run, 2)
    return {"tflops": round(10 * 2 * side**3 / statistics.median(seconds_each(run, 5)) / 1e12, 1)}


def measure(name: str, images: int, way: str, steps: int) -> dict[str, Any]:
    """A recipe's step."""
    cfg = composed(name, images)
    began = time.perf_counter()
    views, results, accelerator = trainer(cfg, way)
    seconds_each(results, 3)
    first = time.perf_counter() - began
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    took = seconds_each(results, steps)
    began = time.perf_counter()
    for _ in islice(results, steps):
        pass
    wait()
    in_a_row = (time.perf_counter() - began) / steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    alone = seen(views, cfg, accelerator.device)
    seconds_each(alone, 2)
    views_took = seconds_each(alone, steps)
    step = in_a_row
    return {
        "batch_size": cfg.batch_size,
        "seconds_until_the_fourth_step": round(first, 1),
        "seconds_a_step": step,
        "waited_for": {"median": statistics.median(took), "least": min(took), "most": max(took)},
        "images_a_second": round(cfg.batch_size / step, 1),
        "views_of_the_step": round(statistics.median(views_took) / step, 4),
        "peak_gib": round(peak, 2),
        "tflops": round(operations(cfg) * cfg.batch_size / step / 1e12, 1),
        "waits": waits(results) if torch.cuda.is_available() else [],
        "trace": trace(results) if torch.cuda.is_available() else {},
    }


def main() -> None:
    """Measure what is missing; every part is on disk before the next begins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=float, default=90, help="seconds after which a part is given up")
    parser.add_argument("--part", action="append", help="only these parts, such as 'resnet161 16 compiled'")
    parser.add_argument("--here", action="store_true", help="in this process, which is for one part")
    arguments = parser.parse_args()
    out: Path = arguments.out
    every = {f"{name} {images} {way}".strip(): (name, images, way) for name, images, way in PARTS}
    for part in arguments.part or ["matrix rate", *every]:
        done: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
        if part in done:
            continue
        if not arguments.here:
            options = ["--out", str(out), "--steps", str(arguments.steps), "--part", part, "--here"]
            try:
                subprocess.run([sys.executable, __file__, *options], check=False, timeout=arguments.limit)
            except subprocess.TimeoutExpired:
                print(f"{part}: given up after {arguments.limit} s", flush=True)
            continue
        done[part] = matrix_rate(8192) if part == "matrix rate" else measure(*every[part], arguments.steps)
        if "tflops" in done.get("matrix rate", {}) and part != "matrix rate":
            done[part]["of_the_matrix_rate"] = round(done[part]["tflops"] / done["matrix rate"]["tflops"], 4)
        done |= {"card": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"}
        done |= {"torch": torch.__version__}
        out.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{part}: {json.dumps(done[part])[:1500]}", flush=True)


if __name__ == "__main__":
    main()
