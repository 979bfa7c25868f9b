"""Time, memory and error of the contrastive losses on a GPU, by their Triton kernels and by torch's operations.

    python benchmarks/losses_gpu.py                                    # figure 6 of benchmarks/losses.py
    PYTHONPATH=. python benchmarks/losses_gpu.py --out gpu.json        # from the bare checkout: torch is all it needs

Variants, forward and backward each: "ours" is what a user gets, by the Triton kernels where they take the inputs;
"ours in torch" the same without kernels; "plain" the dense version; "inf_cl" Inf-CL's kernel, where that is installed
(pip install inf-cl). In fp32 (products in full), tf32 and bf16 (the inputs; ours goes on in float32 as ever).

They take turns as in benchmarks/losses.py; time is the GPU's own, memory the peak of what torch's allocator gave out
during a call, less what it had given before. The matrix rates, to compare with, are those of torch.mm of squares. Cells
go to benchmarks/results/losses_gpu.json as they end; a restart goes on after the last.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import losses as bench
import torch
from losses import Cell, Numbers, Shape
from torch import Tensor

from contrastive_core import kernels, losses

PRECISIONS = {"fp32": ("highest", torch.float32), "tf32": ("high", torch.float32), "bf16": ("highest", torch.bfloat16)}
"""torch.set_float32_matmul_precision, and the dtype of the inputs."""


# ---- what is compared ----


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Within: torch's float32 products in full or as TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISIONS[name][0])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within: no Triton kernel is taken, the sweeps are torch's own operations."""

    def never(*_: Any) -> bool:
        return False

    # a name each: `nt_xent` asks its own, the sweep of rows asks that of kernels at every call
    with patch.object(kernels, "supported", never), patch.object(losses, "supported", never):
        yield


@dataclass(frozen=True)
class Variant:
    """What is timed, and the setting it runs in, which is entered once a turn rather than at each call."""

    run: Callable[[], Any]
    precision: str
    in_torch: bool = False

    def __call__(self, calls: int = 1) -> Any:
        """The last call's result; no other is held meanwhile."""
        with matmul_precision(self.precision), without_kernels() if self.in_torch else nullcontext():
            for _ in range(calls - 1):
                self.run()
            return self.run()


def inf_cl_info_nce(queries: Tensor, keys: Tensor, positive: Tensor) -> Tensor:
    """Inf-CL's Triton kernel; the temperature is applied here, since its `scale` needs torch.distributed."""
    from inf_cl import cal_inf_loss

    return cal_inf_loss(queries.float() / bench.T_CPC, keys.float(), labels=positive, head_dim=queries.shape[1])


def variants(kind: str, shape: Shape) -> dict[str, Variant]:
    """All of them by name, such as "ours in torch tf32"; they share a precision's inputs."""
    ours, plain = bench.LOSSES[kind]["ours"], bench.LOSSES[kind]["plain"]
    made = {}
    for precision, (_, dtype) in PRECISIONS.items():
        arguments = bench.inputs(kind, shape, "cuda", dtype)
        made[f"ours {precision}"] = Variant(partial(bench.step, ours, arguments), precision)
        made[f"ours in torch {precision}"] = Variant(partial(bench.step, ours, arguments), precision, in_torch=True)
        made[f"plain {precision}"] = Variant(partial(bench.step, plain, arguments), precision)
        if kind == "info_nce" and precision == "tf32":  # its products are TF32 whatever torch says
            made["inf_cl tf32"] = Variant(partial(bench.step, inf_cl_info_nce, arguments), precision)
    return made


def tolerated(name: str, error: Exception) -> str:
    """Why a variant has no numbers; raises what should not happen.

    Another library may be missing, or not know this GPU or this Triton; ours must.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if name.startswith("inf_cl"):
        return f"{type(error).__name__}: {str(error)[:200]}"
    raise error


# ---- how it is measured ----


def gpu_seconds(variant: Variant, calls: int) -> float:
    """Seconds a call, by the GPU's clock."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    variant(calls)
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000 / calls


def gpu_extra_mib(variant: Variant) -> float:
    """Peak of one call above what was allocated; raises OutOfMemoryError. The first call warms up."""
    variant()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def rates_cell(side: int, rounds: int) -> Numbers:
    """Tera operations a second of torch.mm of square matrices in each precision, the median of several."""
    found = {}
    for precision, (_, dtype) in PRECISIONS.items():
        a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
        product = Variant(partial(torch.mm, a, b), precision)
        product(3)
        seconds = statistics.median(gpu_seconds(product, 5) for _ in range(rounds))
        found[precision] = bench.digits(2 * side**3 / seconds / 1e12)
    return {"tflops": found}


def errors_cell(kind: str, shape: Shape) -> Numbers:
    """Each variant's relative error of the loss and of the gradients, against the plain version in float64.

    For bf16 inputs the reference is given the same rounded inputs. Raises where a variant is wrong, not just imprecise.
    """
    exact = {}
    for dtype in (torch.float32, torch.bfloat16):
        rounded = bench.inputs(kind, shape, "cuda", dtype)
        doubled = [t.detach().double().requires_grad_() if t.requires_grad else t for t in rounded]
        exact[dtype] = bench.step(bench.LOSSES[kind]["plain"], doubled)
    errors: Numbers = {}
    for name, variant in variants(kind, shape).items():
        try:
            got, got_gradients = variant()
        except Exception as error:
            errors[name] = {"failed": tolerated(name, error)}
            continue
        value, gradients = exact[PRECISIONS[variant.precision][1]]
        off = {"loss": abs(float(got.double() / value) - 1), "gradients": bench.distance(got_gradients, gradients)}
        # scores of a few units, of which bf16 keeps 8 bits: its gradients are right to some per cent
        if not (off["loss"] < 0.01 and off["gradients"] < (0.2 if variant.precision == "bf16" else 0.05)):
            if not name.startswith("inf_cl"):
                raise AssertionError(f"{kind} {name} on the GPU is off: {off}; nothing was timed")
            errors[name] = {"failed": f"wrong: {off}"}
            continue
        errors[name] = {key: bench.digits(error, 2) for key, error in off.items()}
    return errors


def time_and_memory_cell(kind: str, shape: Shape, rounds: int, fill: float) -> Numbers:
    """Time, memory and operations a second (three products counted) of all variants, taking turns."""
    running, memory, calls, failed = {}, {}, {}, {}
    for name, variant in variants(kind, shape).items():
        try:
            memory[name] = gpu_extra_mib(variant)
            calls[name] = bench.calls_to_fill(fill, gpu_seconds(variant, 2))
            running[name] = variant
        except Exception as error:
            failed[name] = tolerated(name, error)
        torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, variant in running.items():
            seconds[name].append(gpu_seconds(variant, calls[name]))
    n, m, d = (2 * shape[0], 2 * shape[0], shape[1]) if kind == "nt_xent" else shape
    tflops = {name: 3 * 2 * n * m * d / statistics.median(values) / 1e12 for name, values in seconds.items()}
    return {
        "seconds": bench.spreads(seconds),
        "extra_mib": memory,
        "failed": failed,
        "tflops": {name: bench.digits(value) for name, value in tflops.items()},
        "rounds": rounds,
    }


# ---- the command ----


def cells(tiny: bool, rounds: int) -> list[Cell]:
    """Errors at the smallest size, then time and memory; NT-Xent's N is half, so that its rows are as many."""
    sizes, d, side = ((64, 128), 8, 64) if tiny else ((4096, 8192, 16384, 32768, 65536), 128, 8192)
    fill = 0.002 if tiny else 0.1
    listed = [Cell(6, "gpu matrix rates", partial(rates_cell, side, rounds))]
    for kind in ("info_nce", "nt_xent"):
        shapes = [(n, n, d) if kind == "info_nce" else (n // 2, d) for n in sizes]
        listed += [Cell(6, bench.name_of(f"gpu {kind}", shapes[0], "errors"), partial(errors_cell, kind, shapes[0]))]
        for shape in shapes:
            run = partial(time_and_memory_cell, kind, shape, rounds, fill)
            listed += [Cell(6, bench.name_of(f"gpu {kind}", shape, "time and memory"), run)]
    return listed


def described(cell: Numbers) -> str:
    """A line a variant, or the numbers as they are."""
    if "seconds" not in cell:
        return json.dumps({key: value for key, value in cell.items() if key not in ("commit", "date", "load")})
    lines = [""]
    for name, seconds in cell["seconds"].items():
        memory, tflops = cell["extra_mib"][name], cell["tflops"][name]
        lines.append(f"    {name:26}{seconds['median'] * 1000:12.3f} ms{memory:12.1f} MiB {tflops:8.1f} TFLOP/s")
    lines += [f"    {name:26}{why}" for name, why in cell["failed"].items()]
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/losses_gpu.json)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that all runs; not into results/")
    parser.add_argument("--rounds", type=int, default=20, help="in which the variants take turns")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA here, nothing was measured")
        return
    machine, commit = bench.where()
    setting = {
        "command": "python benchmarks/losses_gpu.py",
        "machine": machine | {"gpu": torch.cuda.get_device_name()},
        "versions": bench.versions("torch", "triton", "inf-cl"),
    }
    path = options.out or bench.path_of("losses_gpu", options.tiny)
    bench.fill_in(path, setting, commit, cells(options.tiny, options.rounds), describe=described)


if __name__ == "__main__":
    main()
