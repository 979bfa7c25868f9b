"""How a measurement is written down: what was run, on what, and how much memory the whole process tree took."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """Processor, what it can do in bf16, cores, memory."""
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    flags = next((value for key, value in info.items() if key.strip() == "flags"), "").split()
    names = [value.strip() for key, value in info.items() if key.strip() == "model name"]
    return {
        "processor": names[0] if names else platform.machine(),
        "bf16_flags": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def takes_no_arguments(about: str | None) -> None:
    """Of a benchmark that has none: --help says what it does, and anything else is refused, before anything starts."""
    argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


def write(name: str, command: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write NAME.json into benchmarks/results, or another folder; returns its path."""
    folder.mkdir(exist_ok=True)
    packages = ("torch", "torchvision", "kornia", "accelerate", "scikit-learn")
    record = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        **results,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return path


def tree_pss(process: psutil.Process) -> int:
    """Proportional set size of a process and its descendants in bytes: shared pages count once among them."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            rollup = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended meanwhile
            continue
        total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def run_measured(command: list[str], every: float = 0.1) -> tuple[float, float]:
    """Run a command from the top level; returns its seconds and the peak of its tree's PSS in GiB.

    The memory is read `every` so many seconds; at 0.1 that takes a sixth of a core from the command.

    Raises CalledProcessError where it fails.
    """
    began, peak = time.perf_counter(), 0
    process = psutil.Popen(command, cwd=ROOT)
    while process.poll() is None:
        peak = max(peak, tree_pss(process))
        time.sleep(every)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - began, peak / 2**30


class Cost(NamedTuple):
    """What one command took: processor seconds of all its processes, seconds of the clock, largest process in MiB."""

    cpu_seconds: float
    seconds: float
    peak_mib: float


def run_costed(command: list[str], *, log: Path, threads: int = 1) -> Cost:
    """Run a command from the top level, its output to `log`; CalledProcessError where it fails.

    The processor's seconds depend less than the clock's on what else runs; beside other work they rose by a third.
    """
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command, f"see {log}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - began, usage.ru_maxrss / 1024)


def python(*arguments: str) -> list[str]:
    """This interpreter with arguments."""
    return [sys.executable, *arguments]


def launch(*arguments: str) -> list[str]:
    """`accelerate launch` of this environment with arguments."""
    return python("-m", "accelerate.commands.launch", *arguments)
