"""Time and memory of the contrastive losses, beside the plain dense version and beside other libraries.

    python benchmarks/losses.py                   # all figures, 8 minutes on two cores
    python benchmarks/losses.py --only 1,3        # some of them
    python benchmarks/losses.py --plot            # docs/losses.png from what was recorded

Figures: 1 NT-Xent beside lightly and plain cross-entropy; 2 NT-Xent of 65,536 rows; 3 the share of the machine's
matrix rate; 4 CPC's shape; 5 gradients on several processes; 6 a GPU (benchmarks/losses_gpu.py); 7 small shapes of
InfoNCE; 8 the rest of the picture's points. Each cell is written to benchmarks/results/losses.json as it ends; a
restart goes on after the last.

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
import json
import math
import multiprocessing
import operator
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_core import losses
from contrastive_core.check import check_here
from contrastive_core.sweep import full_precision

ROOT = Path(__file__).resolve().parent.parent
T_CPC, T_MOCO, T_SIMCLR = 10.0, 0.2, 0.1

Numbers = dict[str, Any]
Loss = Callable[..., Tensor]
Shape = tuple[int, ...]


# ---- what is compared ----


def plain_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    """Cross-entropy over the whole matrix, as few passes over it as torch allows.

    The temperature divides the vectors, not the matrix, and -inf goes in behind autograd's back: the softmax is 0
    there, so the gradient is too.
    """
    views = F.normalize(torch.cat([z1, z2]), dim=1)
    scores = views @ (views / T_SIMCLR).T
    scores.detach().fill_diagonal_(-torch.inf)
    return F.cross_entropy(full_precision(scores), torch.arange(len(views), device=views.device).roll(len(z1)))


def plain_info_nce(queries: Tensor, keys: Tensor, positive: Tensor) -> Tensor:
    """The one line that everyone writes."""
    return F.cross_entropy(full_precision(queries @ keys.T / T_CPC), positive)


def our_moco(queries: Tensor, own: Tensor, queue: Tensor) -> Tensor:
    """`info_nce` with each query's own key, and a queue that is shared."""
    return losses.info_nce(queries, None, own, shared_keys=queue, temperature=T_MOCO)


def plain_moco(queries: Tensor, own: Tensor, queue: Tensor) -> Tensor:
    """As in moco/builder.py: the own key's score in front of the queue's."""
    scores = torch.cat([(queries * own).sum(1, keepdim=True), queries @ queue.T], dim=1) / T_MOCO
    return F.cross_entropy(scores, torch.zeros(len(queries), dtype=torch.int64))


@cache
def _lightly() -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=T_SIMCLR)


@cache
def _pytorch_metric_learning() -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=T_SIMCLR))


LOSSES: dict[str, dict[str, Loss]] = {
    "nt_xent": {
        "ours": partial(losses.nt_xent, temperature=T_SIMCLR),
        "plain": plain_nt_xent,
        "lightly": lambda z1, z2: _lightly()(z1, z2),  # imported when it is first called
        "pytorch-metric-learning": lambda z1, z2: _pytorch_metric_learning()(z1, z2),
    },
    "info_nce": {"ours": partial(losses.info_nce, temperature=T_CPC), "plain": plain_info_nce},
    "moco": {"ours": our_moco, "plain": plain_moco},
}


def inputs(kind: str, shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
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
            raise AssertionError(f"{kind}: {name} is off by {off:.1e}, its gradients by {turned:.1e}; none was timed")


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


# ---- time ----


def digits(value: float, count: int = 4) -> float:
    """So many significant digits of a number."""
    return float(f"{value:.{count}g}")


def spread(values: Sequence[float]) -> Numbers:
    """Median and quartiles."""
    low, middle, high = map(digits, statistics.quantiles(values, n=4, method="inclusive"))
    return {"median": middle, "quartiles": [low, high]}


def spreads(values: dict[str, list[float]]) -> Numbers:
    """Median and quartiles of each."""
    return {name: spread(some) for name, some in values.items()}


def calls_to_fill(fill: float, seconds: float) -> int:
    """How many calls of so many seconds a turn takes: 1 to 200."""
    return max(1, min(200, math.ceil(fill / seconds)))


def seconds_a_call(run: Callable[[], Any], calls: int = 1) -> float:
    """The mean over a loop of calls."""
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) / calls


def alternate(runs: dict[str, Callable[[], Any]], rounds: int, fill: float) -> tuple[dict[str, list[float]], Numbers]:
    """Seconds a call of each variant, a value a round, and how many calls a turn had. They should have run before."""
    calls = {name: calls_to_fill(fill, seconds_a_call(run)) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_a_call(run, calls[name]))
    return seconds, calls


def quotients(a: Sequence[float], b: Sequence[float]) -> Numbers:
    """Of a over b, round by round."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def time_cell(kind: str, shape: Shape, names: Sequence[str], rounds: int, fill: float) -> Numbers:
    """Times of some variants of a loss that take turns, ours the first."""
    arguments = inputs(kind, shape)
    if len(names) > 1:
        check_agreement(kind, names, arguments)
    seconds, calls = alternate({name: partial(step, LOSSES[kind][name], arguments) for name in names}, rounds, fill)
    return {
        "seconds": spreads(seconds),
        "ours_over": {name: quotients(seconds["ours"], seconds[name]) for name in names[1:]},
        "rounds": rounds,
        "calls_a_turn": calls,
    }


def large_cell(shape: Shape, rounds: int) -> Numbers:
    """Time of an NT-Xent for which there is no dense version to compare with; some rows of it are checked."""
    cell = time_cell("nt_xent", shape, ["ours"], rounds, 0)
    check_rows(*shape)
    return cell


def rate_cell(n: int, d: int, side: int, rounds: int, fill: float) -> Numbers:
    """NT-Xent's three products' worth of operations a second over those of a product of square matrices."""
    arguments = inputs("nt_xent", (n, d))
    check_agreement("nt_xent", ["ours", "plain"], arguments)
    a, b, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    torch.mm(a, b, out=out)
    runs = {"ours": partial(step, LOSSES["nt_xent"]["ours"], arguments), "matrix": partial(torch.mm, a, b, out=out)}
    seconds, _ = alternate(runs, rounds, fill)
    operations = {"ours": 3 * 2 * (2 * n) ** 2 * d, "matrix": 2 * side**3}
    gflops = {name: [operations[name] / s / 1e9 for s in values] for name, values in seconds.items()}
    best = max(gflops["matrix"])
    return {
        "seconds": spreads(seconds),
        "gflops": spreads(gflops),
        "best_matrix_gflops": digits(best),
        "share": quotients(gflops["ours"], gflops["matrix"]),
        "share_of_best": digits(statistics.median(gflops["ours"]) / best),
        "matrix_side": side,
        "rounds": rounds,
    }


# ---- memory, and errors across processes ----


def resident(what: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what + ":"))


def memory_here(kind: str, variant: str, shape: Shape, threads: int) -> Numbers:
    """In a fresh process: the peak of one forward and backward, less what was resident before."""
    torch.set_num_threads(threads)
    loss = LOSSES[kind][variant]
    step(loss, inputs(kind, (16, 16, 16)))
    arguments = inputs(kind, shape)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = resident("VmRSS")
    held = step(loss, arguments)
    extra = resident("VmHWM") - before
    del held
    return {"extra_mib": round(extra, 1)}


def memory_cell(kind: str, variant: str, shape: Shape) -> Numbers:
    """`memory_here` in a process of its own; raises BrokenProcessPool where memory runs out."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(memory_here, kind, variant, shape, torch.get_num_threads()).result()


def processes_cell(processes: int, dtype: str) -> Numbers:
    """The relative error of each loss's gradient on several gloo processes against one."""
    errors: dict[str, float] = {}
    for row in check_here(processes, dtype):
        errors[row.loss] = max(errors.get(row.loss, 0.0), digits(row.error, 3))
    return {"worst": max(errors.values()), "errors": errors}


# ---- the cells ----


@dataclass(frozen=True)
class Sizes:
    """What is measured; `TINY` shows in seconds that all of it runs."""

    nt_xent: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    slow: int = 2  # beside pytorch-metric-learning, whose memory grows with N^3, are only the first two
    d: int = 128
    largest: int = 32768
    rate: tuple[int, int, int] = (8192, 512, 4096)  # N, d, side of the square matrices
    cpc: tuple[int, int, int] = (9216, 18432, 64)
    small: tuple[tuple[int, int, int], ...] = ((64, 64, 128), (256, 256, 128), (576, 1152, 64))
    moco: tuple[int, int, int] = (256, 65536, 128)
    processes: tuple[int, ...] = (2, 4)
    picture: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    dense_limit: int = 8192  # the picture's largest N for which a whole matrix is held
    fill: float = 0.1


TINY = Sizes(
    nt_xent=(16, 32),
    slow=1,
    d=8,
    largest=128,
    rate=(64, 16, 64),
    cpc=(48, 96, 8),
    small=((8, 8, 8), (16, 32, 8)),
    moco=(8, 128, 8),
    processes=(2,),
    picture=(16, 32, 64, 96),
    dense_limit=64,
    fill=0.002,
)

PLAIN, DENSE = ("ours", "plain"), ("ours", "plain", "lightly")


class Cell(NamedTuple):
    """A measurement of a figure, under the name it has in the file."""

    figure: int
    name: str
    measure: Callable[[], Numbers]


def name_of(kind: str, shape: Sequence[int], what: str) -> str:
    """A cell's name, such as "nt_xent 4096x128 time"."""
    return f"{kind} {'x'.join(map(str, shape))} {what}"


def cells(s: Sizes, rounds: int) -> list[Cell]:
    """All there is to measure; a figure's memory first, while nothing else is resident."""
    few, listed = max(2, rounds // 7), []

    def add(figure: int, name: str, measure: Callable[..., Numbers], *arguments: Any) -> None:
        listed.append(Cell(figure, name, partial(measure, *arguments)))

    def memory(figure: int, kind: str, shape: Shape, *names: str) -> None:
        for name in names:
            add(figure, name_of(kind, shape, f"memory {name}"), memory_cell, kind, name, shape)

    def timed(figure: int, kind: str, shape: Shape, *names: str, rounds: int = rounds) -> None:
        add(figure, name_of(kind, shape, "time"), time_cell, kind, shape, names, rounds, s.fill)

    memory(1, "nt_xent", (s.nt_xent[-1], s.d), *DENSE)
    for n in s.nt_xent[: s.slow]:
        memory(1, "nt_xent", (n, s.d), "pytorch-metric-learning")
    for n in s.nt_xent:
        slow = ("pytorch-metric-learning",) if n in s.nt_xent[: s.slow] else ()
        timed(1, "nt_xent", (n, s.d), *DENSE, *slow)

    memory(2, "nt_xent", (s.largest, s.d), "ours")
    add(2, name_of("nt_xent", (s.largest, s.d), "time"), large_cell, (s.largest, s.d), few)

    add(3, name_of("nt_xent", s.rate[:2], "rate"), rate_cell, *s.rate, max(2, rounds // 3), s.fill)

    memory(4, "info_nce", s.cpc, *PLAIN)
    timed(4, "info_nce", s.cpc, *PLAIN)

    for count in s.processes:
        for dtype in ("float32", "float64"):
            add(5, f"{count} processes {dtype}", processes_cell, count, dtype)

    for shape in s.small:
        timed(7, "info_nce", shape, *PLAIN)
    timed(7, "moco", s.moco, *PLAIN)
    memory(7, "moco", s.moco, *PLAIN)

    for n in s.picture:
        names = DENSE if n <= s.dense_limit else ("ours",)
        if n != s.nt_xent[-1]:  # figure 1 has it
            memory(8, "nt_xent", (n, s.d), *names)
        if n not in s.nt_xent:
            timed(8, "nt_xent", (n, s.d), *names, rounds=few)
    return listed


# ---- the figures ----


def lookup(found: Numbers, *keys: str) -> float:
    """A number deep in the cells; NaN where it was not measured."""
    value: Any = found
    for key in keys:
        value = value.get(key, {})
    return value if value != {} else math.nan


def mib(found: Numbers, kind: str, shape: Shape, variant: str) -> float:
    """Extra memory of a variant."""
    return lookup(found, name_of(kind, shape, f"memory {variant}"), "extra_mib")


def figures(found: Numbers, s: Sizes) -> dict[str, Numbers]:
    """What was asked for, what came, and whether it is met; a figure whose cells are missing is left out."""

    def time_over(kind: str, shape: Shape, other: str) -> float:
        return lookup(found, name_of(kind, shape, "time"), "ours_over", other, "median")

    def memory_over(kind: str, shape: Shape, other: str) -> float:
        # with --tiny there may be too little to be seen
        return mib(found, kind, shape, "ours") / (mib(found, kind, shape, other) or math.nan)

    bounds = {"float32": "< 1e-6", "float64": "< 1e-12"}
    big, share = (s.nt_xent[-1], s.d), lookup(found, name_of("nt_xent", s.rate[:2], "rate"), "share", "median")
    asked = [
        ("1 time over lightly's", time_over("nt_xent", big, "lightly"), "<= 0.25"),
        ("1 memory over lightly's", memory_over("nt_xent", big, "lightly"), "<= 0.1"),
        *((f"1 time over plain, N = {n}", time_over("nt_xent", (n, s.d), "plain"), "<= 1.05") for n in s.nt_xent),
        (f"2 extra GiB, N = {s.largest}", mib(found, "nt_xent", (s.largest, s.d), "ours") / 1024, "<= 1"),
        ("3 share of the matrix rate", share, ">= 0.6"),
        ("4 memory over dense, CPC's shape", memory_over("info_nce", s.cpc, "plain"), "<= 0.1"),
        ("4 time over dense, CPC's shape", time_over("info_nce", s.cpc, "plain"), "<= 1"),
        *(
            (f"5 error, {count} processes, {dtype}", lookup(found, f"{count} processes {dtype}", "worst"), bound)
            for count in s.processes
            for dtype, bound in bounds.items()
        ),
        *((f"7 time over plain, {shape}", time_over("info_nce", shape, "plain"), "") for shape in s.small),
        (f"7 time over plain, MoCo {s.moco}", time_over("moco", s.moco, "plain"), ""),
        ("7 memory over plain, MoCo", memory_over("moco", s.moco, "plain"), ""),
    ]
    return {
        name: {"measured": digits(value), "target": target, "met": meets(value, target)}
        for name, value, target in asked
        if not math.isnan(value)
    }


def meets(value: float, target: str) -> bool | None:
    """Whether a number is within such as "<= 0.25"; None where there is no target."""
    if not target:
        return None
    compare, bound = target.split()
    return {"<=": operator.le, "<": operator.lt, ">=": operator.ge}[compare](value, float(bound))


def described(cell: Numbers) -> str:
    """A cell in a line or, where several variants took turns, a line a variant."""
    if "extra_mib" in cell:
        return f"{cell['extra_mib']:.1f} MiB extra"
    if "worst" in cell:
        return f"worst relative error {cell['worst']:.1e}"
    lines = [""]
    for name, seconds in cell["seconds"].items():
        line = f"    {name:26}{seconds['median'] * 1000:12.3f} ms"
        if name in cell.get("ours_over", {}):
            ratio = cell["ours_over"][name]
            line += f"   ours / it = {ratio['median']:.3f} ({ratio['quartiles'][0]:.3f} to {ratio['quartiles'][1]:.3f})"
        lines.append(line)
    return "\n".join(lines)


# ---- the record ----


def where() -> tuple[Numbers, str]:
    """The machine and the commit as in `record`, or less where psutil or git is missing, as on a borrowed machine."""
    try:
        import record

        return record.machine(), record.commit()
    except (ImportError, OSError):
        return {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))}, "unknown"


def versions(*packages: str) -> dict[str, str]:
    """Python's, and of these packages what is installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def load(path: Path, setting: Numbers, again: bool) -> Numbers:
    """The cells in the file; refuses to mix machines, versions or numbers of threads."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    other = [key for key, value in setting.items() if record.get(key) != value]
    if other and not again:
        raise SystemExit(f"{path} was measured with another {', '.join(other)}: pass another --out, or remove it")
    return {} if other else record["cells"]


def fill_in(
    path: Path,
    setting: Numbers,
    commit: str,
    chosen: Sequence[Cell],
    *,
    again: bool = False,
    describe: Callable[[Numbers], str] = described,
    summarise: Callable[[Numbers], Numbers] = lambda found: {},
) -> Numbers:
    """Measure the cells that the file lacks (`again`: all), print and write each as it ends; returns all cells."""
    found = load(path, setting, again)
    for figure, name, measure in chosen:
        if name in found and not again:
            print(f"{figure}  {name}: was measured")
            continue
        # the load tells later whether something else was running beside it
        about = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "load": round(os.getloadavg()[0], 2)}
        began = time.perf_counter()
        found[name] = measure() | about
        print(f"{figure}  {name} ({time.perf_counter() - began:.1f} s): {describe(found[name])}", flush=True)
        record = {**setting, "figures": summarise(found), "cells": found}
        draft = path.with_suffix(".part")  # the file is whole at any time
        draft.write_text(json.dumps(record, indent=1) + "\n")
        draft.replace(path)
    print(f"all in {path}")
    return found


# ---- the picture ----


LINES = {
    "ours": ("nt_xent", "#0b6e4f", -2, (7, -13), "left"),
    "plain": ("plain", "#777777", -1, (4, 6), "left"),
    "lightly": ("lightly", "#c8553d", -1, (-7, 0), "right"),
}
"""A line's name, colour, the point its name stands beside, how far away, on which side: where no other line passes."""


def plot(found: Numbers, s: Sizes, path: Path) -> None:
    """Time and memory over N, both axes logarithmic, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def seconds(shape: Shape, variant: str) -> float:
        return lookup(found, name_of("nt_xent", shape, "time"), "seconds", variant, "median")

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained", facecolor="white")
    draw(left, "Seconds, forward and backward", s, seconds)
    draw(right, "Extra memory, MiB", s, partial(mib, found, "nt_xent"))
    figure.savefig(path, dpi=130, facecolor="white")


def draw(panel: Any, title: str, s: Sizes, value: Callable[[Shape, str], float]) -> None:
    """A line a variant, each with its name beside it."""
    sizes = (*s.picture, s.largest)
    for variant, (name, colour, at, place, side) in LINES.items():
        points = [(n, y) for n in sizes if not math.isnan(y := value((n, s.d), variant))]
        if points:
            panel.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.8)
            panel.annotate(name, points[at], place, textcoords="offset points", color=colour, fontsize=9.5, ha=side)
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


# ---- the command ----


def parsed() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="1,2,3,4,5,7,8", help="figures, such as 1,3 (default: all)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each variant; a third or less where slow")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that all runs; not into results/")
    parser.add_argument("--again", action="store_true", help="measure finished cells anew")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/losses.json)")
    parser.add_argument("--plot", action="store_true", help="only draw docs/losses.png (--tiny: beside --out)")
    options = parser.parse_args()
    if not set(options.only.split(",")) <= set("1234578"):
        parser.error(f"--only {options.only}: pass such as 1,3; there are 1 to 8, and 6 is benchmarks/losses_gpu.py")
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: pass at least 2, quartiles need them")
    return options


def path_of(name: str, tiny: bool) -> Path:
    """Where the cells go unless --out says otherwise."""
    return Path(tempfile.gettempdir(), f"{name}-tiny.json") if tiny else ROOT / "benchmarks/results" / f"{name}.json"


def main() -> None:
    """Measure what is missing, print it, write it."""
    options = parsed()
    sizes, path = TINY if options.tiny else Sizes(), options.out or path_of("losses", options.tiny)
    if options.plot:
        picture = path.with_suffix(".png") if options.tiny else ROOT / "docs" / "losses.png"
        plot(json.loads(path.read_text())["cells"], sizes, picture)
        return

    torch.set_num_threads(options.threads)
    machine, commit = where()
    setting = {
        "command": "python benchmarks/losses.py",
        "machine": machine,
        "versions": versions("torch", "lightly", "pytorch-metric-learning", "triton"),
        "threads": options.threads,
    }
    chosen = [cell for cell in cells(sizes, options.rounds) if str(cell.figure) in options.only.split(",")]
    summarise = partial(figures, s=sizes)
    found = fill_in(path, setting, commit, chosen, again=options.again, summarise=summarise)
    for name, row in summarise(found).items():
        print(f"{name:44}{row['measured']:>12.4g}  {row['target']:10}{'  MISSED' if row['met'] is False else ''}")


if __name__ == "__main__":
    main()
