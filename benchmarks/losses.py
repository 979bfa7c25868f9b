"""Time and memory of the contrastive losses, beside the plain dense version and beside other libraries.

    python benchmarks/losses.py                   # all that this machine can run, about ten minutes on two cores
    python benchmarks/losses.py --only 1,3        # some of the figures
    python benchmarks/losses.py --plot            # docs/losses.png from what was recorded
    PYTHONPATH=. python benchmarks/losses.py --only 6 --out gpu.json      # a GPU machine, from the bare checkout

Figures: 1 NT-Xent beside lightly and plain cross-entropy; 2 NT-Xent of 65,536 rows; 3 the share of the machine's
matrix rate; 4 CPC's shape; 5 gradients on several processes; 6 a GPU; 7 small shapes of InfoNCE; 8 the rest of the
picture's points. Each cell is written to benchmarks/results/losses.json as it ends; a restart goes on after the last.

A time is that of forward and backward. The variants take turns (A B C, A B C, ...), each turn a loop of calls that
fills 0.1 s, and what is reported of two variants is the median over rounds of their ratio within a round, with
quartiles: a machine that slows down for a while slows both.

Memory is the peak of the resident set during one forward and backward, less what was resident before with the inputs
built; the gradients of the inputs are in it. Each variant runs in a process of its own, after a call of a tiny size,
so that what libraries set up once (thread pools, oneDNN's primitives) is counted for none.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import operator
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_core import losses, sweep
from contrastive_core.sweep import Pairs, full_precision

ROOT = Path(__file__).resolve().parent.parent
T_CPC, T_MOCO, T_SIMCLR = 10.0, 0.2, 0.1

Numbers = dict[str, Any]
Loss = Callable[..., Tensor]


# ---- what is compared ----


def plain_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    """Cross-entropy over the whole matrix, as few passes over it as torch allows.

    The temperature divides the vectors, not the matrix, and -inf goes in behind autograd's back: the softmax is 0
    there, so the gradient is too.
    """
    views = F.normalize(torch.cat([z1, z2]), dim=1)
    scores = views @ (views / T_SIMCLR).T
    scores.detach().fill_diagonal_(-torch.inf)
    return F.cross_entropy(scores.float(), torch.arange(len(views), device=views.device).roll(len(z1)))


@cache
def _lightly() -> torch.nn.Module:
    return importlib.import_module("lightly.loss").NTXentLoss(temperature=T_SIMCLR)


@cache
def _pytorch_metric_learning() -> torch.nn.Module:
    package = importlib.import_module("pytorch_metric_learning.losses")
    return package.SelfSupervisedLoss(package.NTXentLoss(temperature=T_SIMCLR))


def plain_info_nce(queries: Tensor, keys: Tensor, positive: Tensor) -> Tensor:
    """The one line that everyone writes."""
    return F.cross_entropy((queries @ keys.T / T_CPC).float(), positive)


def plain_moco(queries: Tensor, own: Tensor, queue: Tensor) -> Tensor:
    """As in moco/builder.py: the own key's score in front of the queue's."""
    scores = torch.cat([(queries * own).sum(1, keepdim=True), queries @ queue.T], dim=1) / T_MOCO
    return F.cross_entropy(scores, torch.zeros(len(queries), dtype=torch.int64))


def inf_cl_info_nce(queries: Tensor, keys: Tensor, positive: Tensor) -> Tensor:
    """Inf-CL's Triton kernel; the temperature is applied here, since its `scale` needs torch.distributed."""
    cal_inf_loss = importlib.import_module("inf_cl").cal_inf_loss
    return cal_inf_loss(queries.float() / T_CPC, keys.float(), labels=positive, head_dim=queries.shape[1])


LOSSES: dict[str, dict[str, Loss]] = {
    "nt_xent": {
        "ours": lambda z1, z2: losses.nt_xent(z1, z2, temperature=T_SIMCLR),
        "plain": plain_nt_xent,
        "lightly": lambda z1, z2: _lightly()(z1, z2),
        "pytorch-metric-learning": lambda z1, z2: _pytorch_metric_learning()(z1, z2),
    },
    "info_nce": {
        "ours": lambda queries, keys, positive: losses.info_nce(queries, keys, positive, temperature=T_CPC),
        "plain": plain_info_nce,
    },
    "moco": {
        "ours": lambda queries, own, queue: losses.info_nce(queries, None, own, shared_keys=queue, temperature=T_MOCO),
        "plain": plain_moco,
    },
}


def inputs(kind: str, shape: Sequence[int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random arguments of a loss: nt_xent (n, d), info_nce (n, m, d), moco (n, k, d); gradients where it has them."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.randn(count, shape[-1], generator=generator)

    if kind == "nt_xent":
        z1 = rows(shape[0])
        made = [z1, z1 + rows(shape[0])]  # two views of one image resemble each other
    elif kind == "info_nce":
        made = [rows(shape[0]), rows(shape[1])]
    else:
        made = [F.normalize(rows(count), dim=1) for count in (shape[0], shape[0], shape[1])]
    with_gradient = 1 if kind == "moco" else 2
    tensors = [t.to(device, dtype).requires_grad_(i < with_gradient) for i, t in enumerate(made)]
    if kind == "info_nce":
        tensors.append(torch.randint(shape[1], (shape[0],), generator=generator).to(device))
    return tensors


def step(loss: Loss, arguments: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward and backward; returns the value and the gradients."""
    value = loss(*arguments)
    return value.detach(), torch.autograd.grad(value, [t for t in arguments if t.requires_grad])


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """|a - b| / |b| of several tensors taken as one vector."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return math.sqrt(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def check_agreement(kind: str, names: Sequence[str], arguments: Sequence[Tensor]) -> None:
    """Raise unless all variants give the same loss (to 1e-5) and gradients (to 1e-4); it warms them up, too."""
    value, gradients = step(LOSSES[kind][names[0]], arguments)
    for name in names[1:]:
        other, other_gradients = step(LOSSES[kind][name], arguments)
        off, turned = abs(float(value / other) - 1), distance(gradients, other_gradients)
        if not (off < 1e-5 and turned < 1e-4):
            raise AssertionError(
                f"{kind}: {names[0]} gives {value:.8f}, {name} {other:.8f} (relative difference {off:.1e}, "
                f"of the gradients {turned:.1e}): nothing was timed"
            )


def check_rows(n: int, d: int) -> None:
    """Raise unless 64 rows of an NT-Xent too large for a dense version agree with those rows in float64."""
    z1, z2 = (t.detach() for t in inputs("nt_xent", (n, d)))
    rows = losses.nt_xent(z1, z2, temperature=T_SIMCLR, reduction="none")
    chosen = torch.randperm(2 * n, generator=torch.Generator().manual_seed(1))[:64]
    views = F.normalize(torch.cat([z1, z2]).double(), dim=1)
    scores = (views[chosen] / T_SIMCLR) @ views.T
    scores[torch.arange(len(chosen)), chosen] = -torch.inf
    expected = F.cross_entropy(scores, (chosen + n) % (2 * n), reduction="none")
    torch.testing.assert_close(rows[chosen].double(), expected, rtol=1e-5, atol=1e-6)


# ---- how it is measured ----


def spread(values: Sequence[float]) -> Numbers:
    """Median and quartiles, to four digits."""
    low, middle, high = (float(f"{q:.4g}") for q in statistics.quantiles(values, n=4, method="inclusive"))
    return {"median": middle, "quartiles": [low, high]}


def alternate(runs: dict[str, Callable[[], Any]], rounds: int, fill: float) -> tuple[dict[str, list[float]], Numbers]:
    """Seconds a call of each, a value a round, and how many calls a turn had; `fill` seconds a turn, 200 calls at most.

    One call finds that number. Variants that are compared should have run before.
    """
    calls, seconds = {}, {name: [] for name in runs}
    for name, run in runs.items():
        began = time.perf_counter()
        run()
        calls[name] = max(1, min(200, math.ceil(fill / (time.perf_counter() - began))))
    gc.collect()
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            for _ in range(calls[name]):
                run()
            seconds[name].append((time.perf_counter() - began) / calls[name])
    return seconds, calls


def ratios(seconds: dict[str, list[float]], to: str) -> Numbers:
    """`to`'s time over every other's, round by round."""
    others = [name for name in seconds if name != to]
    return {name: spread([a / b for a, b in zip(seconds[to], seconds[name], strict=True)]) for name in others}


def time_cell(kind: str, shape: Sequence[int], names: Sequence[str], rounds: int, fill: float) -> Numbers:
    """Times of some variants of a loss that take turns."""
    arguments = inputs(kind, shape)
    if len(names) > 1:
        check_agreement(kind, names, arguments)
    runs = {name: partial(step, LOSSES[kind][name], arguments) for name in names}
    seconds, calls = alternate(runs, rounds, fill)
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ours_over": ratios(seconds, "ours"),
        "rounds": rounds,
        "calls_a_turn": calls,
    }


def large_cell(n: int, d: int, rounds: int) -> Numbers:
    """Time of an NT-Xent for which there is no dense version to compare with."""
    cell = time_cell("nt_xent", (n, d), ["ours"], rounds, 0)
    check_rows(n, d)
    return cell


def rate_cell(n: int, d: int, side: int, rounds: int, fill: float) -> Numbers:
    """NT-Xent's three products' worth of operations a second over those of a product of square matrices."""
    arguments = inputs("nt_xent", (n, d))
    check_agreement("nt_xent", ["ours", "plain"], arguments)
    a, b, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    torch.mm(a, b, out=out)
    runs = {"ours": partial(step, LOSSES["nt_xent"]["ours"], arguments), "matrix": partial(torch.mm, a, b, out=out)}
    seconds, _ = alternate(runs, rounds, fill)
    counted, done = 3 * 2 * (2 * n) ** 2 * d, 2 * side**3
    gflops = {
        "ours": [counted / s / 1e9 for s in seconds["ours"]],
        "matrix": [done / s / 1e9 for s in seconds["matrix"]],
    }
    pairs = zip(gflops["ours"], gflops["matrix"], strict=True)
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "gflops": {name: spread(values) for name, values in gflops.items()},
        "best_matrix_gflops": float(f"{max(gflops['matrix']):.4g}"),
        "share": spread([ours / matrix for ours, matrix in pairs]),
        "share_of_best": float(f"{statistics.median(gflops['ours']) / max(gflops['matrix']):.4g}"),
        "matrix_side": side,
        "rounds": rounds,
    }


WARM_UP = {"nt_xent": (16, 16), "info_nce": (32, 48, 16), "moco": (32, 48, 16)}


def resident(what: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what + ":"))


def memory_here(kind: str, variant: str, shape: Sequence[int]) -> Numbers:
    """In a fresh process: the peak of one forward and backward, less what was resident before."""
    loss = LOSSES[kind][variant]
    step(loss, inputs(kind, WARM_UP[kind]))
    arguments = inputs(kind, shape)
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
        reset = True
    except OSError:
        reset = False
    before = resident("VmRSS")
    held = step(loss, arguments)
    extra = resident("VmHWM") - before
    del held
    return {"extra_mib": round(extra, 1), "peak_was_reset": reset}


def memory_cell(kind: str, variant: str, shape: Sequence[int]) -> Numbers:
    """`memory_here` in a process of its own."""
    what = json.dumps([kind, variant, list(shape), torch.get_num_threads()])
    command = [sys.executable, __file__, "--memory-of", what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} {variant} {shape}: its process ended with {done.returncode}; memory may have run out")
    return json.loads(done.stdout.splitlines()[-1])


def processes_cell(processes: int, dtype: str) -> Numbers:
    """The relative error of each loss's gradient on several gloo processes against one."""
    check_here = importlib.import_module("contrastive_core.check").check_here
    errors: dict[str, float] = {}
    for row in check_here(processes, dtype):
        errors[row.loss] = max(errors.get(row.loss, 0.0), float(f"{row.error:.3g}"))
    return {"worst": max(errors.values()), "errors": errors}


# ---- a GPU ----


PRECISIONS = {"fp32": ("highest", torch.float32), "tf32": ("high", torch.float32), "bf16": ("highest", torch.bfloat16)}
"""torch.set_float32_matmul_precision, and the dtype of the inputs."""


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Within: torch's float32 products in full or as TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def without_kernels(chosen: bool = True) -> Iterator[None]:
    """Within: no Triton kernel is taken, the sweeps are torch's own operations."""
    with ExitStack() as stack:
        for module in (_optional("contrastive_core.kernels"), sweep, losses):
            if chosen and hasattr(module, "supported"):
                stack.enter_context(patch.object(module, "supported", lambda *_, **__: False))
        yield


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def triton_info_nce(queries: Tensor, keys: Tensor, positive: Tensor) -> Tensor:
    """`info_nce` by the Triton kernels, whatever `info_nce` itself would choose."""
    return _by_kernels(full_precision(queries) / T_CPC, full_precision(keys), Pairs(positive))


def triton_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    """`nt_xent` by the Triton kernels."""
    views = losses.normalize(torch.cat([z1, z2]))
    itself = torch.arange(len(views), device=views.device)
    return _by_kernels(views / T_SIMCLR, views, Pairs(itself.roll(len(z1)), itself))


def _by_kernels(queries: Tensor, keys: Tensor, pairs: Pairs) -> Tensor:
    row_sweep = importlib.import_module("contrastive_core.kernels").row_sweep
    return sweep.swept(partial(row_sweep, pairs=pairs), queries, keys, None, scale=1 / len(queries))


def gpu_runs(kind: str, shape: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """Forward and backward in three precisions, and Inf-CL's.

    "ours" is what a user gets, "ours in torch" the sweep by torch's operations, "ours in triton" by the kernels.
    """
    ours, triton = LOSSES[kind]["ours"], {"info_nce": triton_info_nce, "nt_xent": triton_nt_xent}[kind]
    kernels = getattr(_optional("contrastive_core.kernels"), "supported", None)

    def run(loss: Loss, precision: str, in_torch: bool, arguments: Sequence[Tensor]) -> Any:
        with matmul_precision(precision), without_kernels(in_torch):
            return step(loss, arguments)

    runs = {}
    for name, (precision, dtype) in PRECISIONS.items():
        arguments = inputs(kind, shape, "cuda", dtype)
        taken = {"ours": ours, "ours in torch": ours, "plain": LOSSES[kind]["plain"]}
        with matmul_precision(precision):
            if kernels and kernels(*(t.detach().float() for t in arguments[:2]), Pairs()):
                taken["ours in triton"] = triton
        if kind == "info_nce" and name == "tf32" and _optional("inf_cl"):  # its products are TF32 whatever torch says
            taken["inf_cl"] = inf_cl_info_nce
        for variant, loss in taken.items():
            runs[f"{variant} {name}"] = partial(run, loss, precision, variant == "ours in torch", arguments)
    return runs


def gpu_seconds(run: Callable[[], Any], calls: int) -> float:
    """Seconds a call, by the GPU's clock."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(calls):
        run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000 / calls


def gpu_extra_mib(run: Callable[[], Any]) -> float:
    """Peak of one call above what was allocated, in MiB; raises OutOfMemoryError. The first call warms up."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = run()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    del held
    return round(extra, 1)


def gpu_cell(kind: str, shape: Sequence[int], rates: dict[str, float], rounds: int, fill: float) -> Numbers:
    """Time, memory and share of the matrix rates (three products counted) of all variants, taking turns."""
    runs, memory, calls, failed = {}, {}, {}, {}
    for name, run in gpu_runs(kind, shape).items():
        try:
            memory[name] = gpu_extra_mib(run)
            calls[name] = max(1, min(200, math.ceil(fill / gpu_seconds(run, 2))))
            runs[name] = run
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
        except Exception as error:  # another library may not know this GPU or this Triton; ours must
            if not name.startswith("inf_cl"):
                raise
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
        torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(gpu_seconds(run, calls[name]))
    n, m, d = (2 * shape[0], 2 * shape[0], shape[1]) if kind == "nt_xent" else shape
    tflops = {name: 3 * 2 * n * m * d / statistics.median(values) / 1e12 for name, values in seconds.items()}
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "extra_mib": memory,
        "failed": failed,
        "tflops": {name: float(f"{value:.4g}") for name, value in tflops.items()},
        "share_of": {name: {p: float(f"{t / rate:.4g}") for p, rate in rates.items()} for name, t in tflops.items()},
        "rounds": rounds,
    }


def gpu_rates(side: int, rounds: int) -> dict[str, float]:
    """Tera operations a second of torch.mm of square matrices, the median of several."""
    rates = {}
    for name, (precision, dtype) in PRECISIONS.items():
        a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
        with matmul_precision(precision):
            gpu_seconds(partial(torch.mm, a, b), 3)
            seconds = statistics.median(gpu_seconds(partial(torch.mm, a, b), 5) for _ in range(rounds))
        rates[name] = float(f"{2 * side**3 / seconds / 1e12:.4g}")
    return rates


def gpu_errors(kind: str, shape: Sequence[int]) -> Numbers:
    """Each variant's relative error of the loss and of the gradients, against the plain version in float64.

    For bf16 inputs the reference is given the same rounded inputs. Raises where a variant is wrong, not just imprecise.
    """
    exact = {}
    for dtype in (torch.float32, torch.bfloat16):
        doubled = [
            t.detach().double().requires_grad_() if t.requires_grad else t for t in inputs(kind, shape, "cuda", dtype)
        ]
        plain = {"nt_xent": _exact_nt_xent, "info_nce": lambda q, k, p: F.cross_entropy(q @ k.T / T_CPC, p)}[kind]
        exact[dtype] = step(plain, doubled)
    errors: Numbers = {}
    for name, run in gpu_runs(kind, shape).items():
        precision = name.split()[-1]
        value, gradients = exact[PRECISIONS[precision][1]]
        try:
            got, got_gradients = run()
        except Exception as error:
            if not name.startswith("inf_cl"):
                raise
            errors[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        off = {"loss": abs(float(got.double() / value) - 1), "gradients": distance(got_gradients, gradients)}
        # scores of a few units, of which bf16 keeps 8 bits: its gradients are right to some per cent
        if not (off["loss"] < 0.01 and off["gradients"] < (0.2 if precision == "bf16" else 0.05)):
            raise AssertionError(f"{kind} {name} on the GPU is off: {off}; nothing was timed")
        errors[name] = {key: float(f"{error:.2g}") for key, error in off.items()}
    return errors


def _exact_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    """`plain_nt_xent` without its cast to float32."""
    views = F.normalize(torch.cat([z1, z2]), dim=1)
    scores = views @ views.T / T_SIMCLR
    scores.detach().fill_diagonal_(-torch.inf)
    return F.cross_entropy(scores, torch.arange(len(views), device=views.device).roll(len(z1)))


# ---- the cells ----


@dataclass(frozen=True)
class Sizes:
    """What is measured; `TINY` shows in seconds that all of it runs."""

    nt_xent: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    slow: tuple[int, ...] = (64, 128)  # pytorch-metric-learning's memory grows with N^3
    d: int = 128
    dense_limit: int = 8192
    beyond: tuple[int, ...] = (16384,)
    largest: int = 32768
    rate: tuple[int, int, int] = (8192, 512, 4096)  # N, d, side of the square matrices
    cpc: tuple[int, int, int] = (9216, 18432, 64)
    small: tuple[tuple[int, int, int], ...] = ((64, 64, 128), (256, 256, 128), (576, 1152, 64))
    moco: tuple[int, int, int] = (256, 65536, 128)
    picture: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    gpu: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    processes: tuple[int, ...] = (2, 4)
    fill: float = 0.1


TINY = Sizes(
    nt_xent=(16, 32),
    slow=(16,),
    d=8,
    dense_limit=64,
    beyond=(96,),
    largest=128,
    rate=(64, 16, 64),
    cpc=(48, 96, 8),
    small=((8, 8, 8), (16, 32, 8)),
    moco=(8, 128, 8),
    picture=(16, 32, 64),
    gpu=(64, 128),
    processes=(2,),
    fill=0.002,
)

DENSE = ("plain", "lightly")


def name_of(kind: str, shape: Sequence[int], what: str) -> str:
    """A cell's name, such as "nt_xent 4096x128 time"."""
    return f"{kind} {'x'.join(map(str, shape))} {what}"


Cell = tuple[int, str, Callable[[], Numbers]]


def cells(s: Sizes, rounds: int) -> list[Cell]:
    """(figure, name, what measures it) of everything but the GPU; memory first, while nothing else is resident."""
    few = max(2, rounds // 7)
    listed: list[Cell] = []

    def memory(figure: int, kind: str, variant: str, shape: Sequence[int]) -> None:
        listed.append((figure, name_of(kind, shape, f"memory {variant}"), partial(memory_cell, kind, variant, shape)))

    def timed(figure: int, kind: str, shape: Sequence[int], names: Sequence[str], rounds: int) -> None:
        run = partial(time_cell, kind, shape, names, rounds, s.fill)
        listed.append((figure, name_of(kind, shape, "time"), run))

    for variant in ("ours", *DENSE):
        memory(1, "nt_xent", variant, (s.nt_xent[-1], s.d))
    for n in s.slow:
        memory(1, "nt_xent", "pytorch-metric-learning", (n, s.d))
    for n in s.nt_xent:
        slow = ("pytorch-metric-learning",) if n in s.slow else ()
        timed(1, "nt_xent", (n, s.d), ("ours", *DENSE, *slow), rounds)

    memory(2, "nt_xent", "ours", (s.largest, s.d))
    large = (s.largest, s.d)
    listed.append((2, name_of("nt_xent", large, "time"), partial(large_cell, *large, few)))

    rate = partial(rate_cell, *s.rate, max(2, rounds // 3), s.fill)
    listed.append((3, name_of("nt_xent", s.rate[:2], "rate"), rate))

    for variant in ("ours", "plain"):
        memory(4, "info_nce", variant, s.cpc)
    timed(4, "info_nce", s.cpc, ("ours", "plain"), rounds)

    for count in s.processes:
        for dtype in ("float32", "float64"):
            listed.append((5, f"{count} processes {dtype}", partial(processes_cell, count, dtype)))

    for shape in s.small:
        timed(7, "info_nce", shape, ("ours", "plain"), rounds)
    timed(7, "moco", s.moco, ("ours", "plain"), rounds)
    for variant in ("ours", "plain"):
        memory(7, "moco", variant, s.moco)

    known = {name for _, name, _ in listed}
    for n in (*s.picture, *s.beyond):
        for variant in ("ours", *DENSE) if n <= s.dense_limit else ("ours",):
            if name_of("nt_xent", (n, s.d), f"memory {variant}") not in known:
                memory(8, "nt_xent", variant, (n, s.d))
        if name_of("nt_xent", (n, s.d), "time") not in known:
            timed(8, "nt_xent", (n, s.d), ("ours", *DENSE) if n <= s.dense_limit else ("ours",), few)
    return listed


def gpu_cells(s: Sizes, rounds: int) -> list[Cell]:
    """Figure 6, with a printed line in its place where there is no GPU; NT-Xent's N is half, its rows are as many."""
    if not torch.cuda.is_available():
        print("6: no CUDA here, the GPU's figures are left out")
        return []
    if _optional("inf_cl") is None:
        print("6: inf_cl does not import, it is left out (pip install inf-cl)")
    rates = cache(partial(gpu_rates, 8192 if s.gpu[0] >= 4096 else 64, rounds))
    listed: list[Cell] = [(6, "gpu matrix rates", lambda: {"tflops": rates()})]
    for kind in ("info_nce", "nt_xent"):
        shapes = [(n, n, s.d) if kind == "info_nce" else (n // 2, s.d) for n in s.gpu]
        listed.append((6, name_of(f"gpu {kind}", shapes[0], "errors"), partial(gpu_errors, kind, shapes[0])))
        for shape in shapes:

            def run(kind: str = kind, shape: Sequence[int] = shape) -> Numbers:
                return gpu_cell(kind, shape, rates(), rounds, s.fill)

            listed.append((6, name_of(f"gpu {kind}", shape, "time and memory"), run))
    return listed


# ---- the figures ----


def figures(found: Numbers, s: Sizes) -> dict[str, Numbers]:
    """What was asked for, what came, and whether it is met; a figure whose cells are missing is left out."""

    def cell(kind: str, shape: Sequence[int], what: str) -> Numbers:
        return found[name_of(kind, shape, what)]

    def memory(kind: str, shape: Sequence[int], variant: str) -> float:
        return cell(kind, shape, f"memory {variant}")["extra_mib"]

    def memory_ratio(kind: str, shape: Sequence[int], to: str) -> float:
        return memory(kind, shape, "ours") / memory(kind, shape, to)

    def ratio(kind: str, shape: Sequence[int], to: str) -> float:
        return cell(kind, shape, "time")["ours_over"][to]["median"]

    def worst(count: int, dtype: str) -> float:
        return found[f"{count} processes {dtype}"]["worst"]

    big, largest, (n, d, _) = (s.nt_xent[-1], s.d), (s.largest, s.d), s.rate
    asked: list[tuple[str, Callable[[], float], str]] = [
        ("1 time over lightly's", partial(ratio, "nt_xent", big, "lightly"), "<= 0.25"),
        ("1 memory over lightly's", partial(memory_ratio, "nt_xent", big, "lightly"), "<= 0.1"),
        *((f"1 time over plain, N = {n}", partial(ratio, "nt_xent", (n, s.d), "plain"), "<= 1.05") for n in s.nt_xent),
        (f"2 extra GiB, N = {s.largest}", lambda: memory("nt_xent", largest, "ours") / 1024, "<= 1"),
        ("3 share of the matrix rate", lambda: cell("nt_xent", (n, d), "rate")["share"]["median"], ">= 0.6"),
        ("4 memory over dense, CPC's shape", partial(memory_ratio, "info_nce", s.cpc, "plain"), "<= 0.1"),
        ("4 time over dense, CPC's shape", partial(ratio, "info_nce", s.cpc, "plain"), "<= 1"),
        *(
            (f"5 error, {count} processes, {dtype}", partial(worst, count, dtype), bound)
            for count in s.processes
            for dtype, bound in (("float32", "< 1e-6"), ("float64", "< 1e-12"))
        ),
        *((f"7 time over plain, {shape}", partial(ratio, "info_nce", shape, "plain"), "") for shape in s.small),
        (f"7 time over plain, MoCo {s.moco}", partial(ratio, "moco", s.moco, "plain"), ""),
        ("7 memory over plain, MoCo", partial(memory_ratio, "moco", s.moco, "plain"), ""),
    ]
    table = {}
    for name, measure, target in asked:
        try:
            value = measure()
        except (KeyError, ZeroDivisionError):  # not measured; or, with --tiny, too little memory to be seen
            continue
        table[name] = {"measured": float(f"{value:.4g}"), "target": target, "met": meets(value, target)}
    return table


def meets(value: float, target: str) -> bool | None:
    """Whether a number is within such as "<= 0.25"; None where there is no target."""
    if not target:
        return None
    compare, bound = target.split()
    return {"<=": operator.le, "<": operator.lt, ">=": operator.ge}[compare](value, float(bound))


def described(cell: Numbers) -> str:
    """A cell in a line or, where several variants took turns, a line a variant."""
    if "extra_mib" in cell and "seconds" not in cell:
        return f"{cell['extra_mib']:.1f} MiB extra"
    if "worst" in cell:
        return f"worst relative error {cell['worst']:.1e}"
    if "seconds" not in cell:
        return json.dumps({key: cell[key] for key in cell if key not in ("commit", "date", "load")})
    lines = []
    for name, seconds in cell["seconds"].items():
        line = f"\n    {name:26}{seconds['median'] * 1000:12.3f} ms"
        if name in cell.get("ours_over", {}):
            one = cell["ours_over"][name]
            line += f"   ours / it = {one['median']:.3f} ({one['quartiles'][0]:.3f} to {one['quartiles'][1]:.3f})"
        if "extra_mib" in cell:
            line += f"{cell['extra_mib'][name]:12.1f} MiB {cell['tflops'][name]:8.1f} TFLOP/s"
        lines.append(line)
    lines += [f"\n    {name:26}{why}" for name, why in cell.get("failed", {}).items()]
    if "share" in cell:
        lines.append(f"\n    {cell['share']['median']:.3f} of the matrix rate, {cell['share_of_best']:.3f} of its best")
    return "".join(lines)


# ---- the record ----


def machine() -> Numbers:
    """As in `record`, or less where psutil is missing; the GPU's name."""
    try:
        found = importlib.import_module("record").machine()
    except ImportError:
        found = {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def commit() -> str:
    """As in `record`; "unknown" on a machine without it or without git."""
    try:
        return importlib.import_module("record").commit()
    except (ImportError, OSError):
        return "unknown"


def versions() -> dict[str, str]:
    """Of what is compared, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "lightly", "pytorch-metric-learning", "triton", "inf-cl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def load(path: Path, setting: Numbers, again: bool) -> Numbers:
    """The cells in the file; refuses to mix machines, versions or numbers of threads."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    other = [key for key, value in setting.items() if record.get(key) != value]
    if other and not again:
        raise SystemExit(f"{path} was measured with another {', '.join(other)}: pass --again, or another --out")
    return {} if other else record["cells"]


def save(path: Path, setting: Numbers, found: Numbers, s: Sizes) -> None:
    """Write the file whole, or leave the old one."""
    record = {
        "command": "python benchmarks/losses.py",
        **setting,
        "figures": figures(found, s),
        "cells": found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(path)


# ---- the picture ----


COLOURS = {"ours": "#0b6e4f", "plain": "#777777", "lightly": "#c8553d"}
LABELS = {
    "ours": ("nt_xent", -2, (7, -13), "left"),
    "plain": ("plain", -1, (5, 2), "left"),
    "lightly": ("lightly", -1, (-7, 0), "right"),
}
"""A line's name, the point it stands beside, how many points away, and on which side: where no other line passes."""


def plot(record: Numbers, s: Sizes, path: Path) -> None:
    """Time and memory over N, both axes logarithmic, to a PNG."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    found, sizes = record["cells"], (*s.picture, *s.beyond, s.largest)
    figure, panels = pyplot.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained", facecolor="white")
    for panel, title, value in zip(
        panels, ("Seconds, forward and backward", "Extra memory, MiB"), (_seconds, _mib), strict=True
    ):
        for variant, colour in COLOURS.items():
            points = [(n, value(found, n, s.d, variant)) for n in sizes]
            drawn = [(n, y) for n, y in points if y is not None]
            if not drawn:
                continue
            panel.plot(*zip(*drawn, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.8)
            name, at, place, side = LABELS[variant]
            panel.annotate(
                name, drawn[at], place, textcoords="offset points", color=colour, fontsize=9.5, horizontalalignment=side
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, [f"{n // 1024}k" if n >= 1024 else str(n) for n in sizes], fontsize=9)
        panel.set_xlim(sizes[0] / 1.2, sizes[-1] * 2)  # room for a label
        panel.set_title(title, fontsize=10.5, loc="left")
        panel.set_xlabel(f"N (2N rows of d = {s.d})", fontsize=9.5)
        panel.tick_params(axis="y", labelsize=9)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot.close(figure)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def _seconds(found: Numbers, n: int, d: int, variant: str) -> float | None:
    return found.get(name_of("nt_xent", (n, d), "time"), {}).get("seconds", {}).get(variant, {}).get("median")


def _mib(found: Numbers, n: int, d: int, variant: str) -> float | None:
    return found.get(name_of("nt_xent", (n, d), f"memory {variant}"), {}).get("extra_mib")


# ---- the command ----


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="1,2,3,4,5,6,7,8", help="figures, such as 1,3 (default: all)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each variant; a third or less where slow")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that all runs; not into results/")
    parser.add_argument("--again", action="store_true", help="measure finished cells anew")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/losses.json)")
    parser.add_argument("--plot", action="store_true", help="only draw docs/losses.png (--tiny: beside --out)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.only = {int(figure) for figure in options.only.split(",")}
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: pass at least 2, quartiles need them")
    return options


def path_of(options: argparse.Namespace) -> Path:
    """Where the cells go; the GPU's alone go into a file of their own, since it is mostly another machine."""
    if options.out:
        return options.out
    if options.tiny:
        return Path(tempfile.gettempdir()) / "losses-tiny.json"
    return ROOT / "benchmarks" / "results" / ("losses_gpu.json" if options.only == {6} else "losses.json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print it, write it."""
    options = arguments_of(arguments)
    if options.memory_of:
        kind, variant, shape, threads = json.loads(options.memory_of)
        torch.set_num_threads(threads)
        print(json.dumps(memory_here(kind, variant, shape)))
        return
    sizes, path = TINY if options.tiny else Sizes(), path_of(options)
    if options.plot:
        picture = path.with_suffix(".png") if options.tiny else ROOT / "docs" / "losses.png"
        plot(json.loads(path.read_text()), sizes, picture)
        return

    torch.set_num_threads(options.threads)
    setting = {"machine": machine(), "versions": versions(), "threads": options.threads}
    found = load(path, setting, options.again)
    chosen = [cell for cell in cells(sizes, options.rounds) if cell[0] in options.only]
    chosen += gpu_cells(sizes, options.rounds) if 6 in options.only else []
    began_all = time.perf_counter()
    for figure, name, measure in chosen:
        if name in found and not options.again:
            print(f"{figure}  {name}: was measured")
            continue
        # the load tells later whether something else was running beside it
        about = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "load": round(os.getloadavg()[0], 2)}
        began = time.perf_counter()
        found[name] = measure() | about
        print(f"{figure}  {name} ({time.perf_counter() - began:.1f} s): {described(found[name])}", flush=True)
        save(path, setting, found, sizes)
    print(f"\n{time.perf_counter() - began_all:.0f} s in all")
    for name, row in figures(found, sizes).items():
        print(f"{name:44}{row['measured']:>12.4g}  {row['target']:10}{'  MISSED' if row['met'] is False else ''}")
    print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


if __name__ == "__main__":
    main()
