"""What this machine can do, and what to mend: `python -m cpc.doctor`, a line each.

Nothing but the standard library is imported until it is asked about, so that a machine on which torch or anything else
is missing or broken is told so in words. Each line is ok, a note (runs go, with what is said) or a problem (they do
not); the exit code is 1 where there is a problem, else 0.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

DISTRIBUTION = "cpc-images"
MODULES = {"hydra-core": "hydra", "pillow": "PIL", "scikit-learn": "sklearn"}
"""Of distributions that are imported by another name than their own."""
BF16_CAPABILITY = (8, 0)
"""CUDA's compute capability from which a GPU does: Ampere's."""
LAUNCHERS = ("joblib", "submitit", "ray")
MIB, GIB = 2**20, 2**30


class Finding(NamedTuple):
    """One line: what was looked at; "ok", "note" or "problem"; what was found, and what to do about it."""

    name: str
    state: str
    text: str


class Requirement(NamedTuple):
    """A distribution, the least version that will do, and the extra that wants it ("" = every run)."""

    distribution: str
    least: str
    extra: str


# ---- what is installed ----


def parsed(requirement: str, extra: str = "") -> Requirement | None:
    """One line of a project's requirements; None for one without a `>=`, such as the project's own extras.

    Example: `parsed('timm>=1.0; extra == "vit"') == ("timm", "1.0", "vit")`.
    """
    found = re.match(r"([\w.-]+)(?:\[.*?\])?>=([\d.]+)", requirement)
    marked = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
    return found and Requirement(found[1], found[2], marked[1] if marked else extra)


def requirements() -> list[Requirement]:
    """The project's own ranges: of the installed distribution, or of the checkout's pyproject.toml."""
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if pyproject.is_file():
        import tomllib

        project = tomllib.loads(pyproject.read_text())["project"]
        lines = [(line, "") for line in project["dependencies"]]
        lines += [(line, extra) for extra, wanted in project["optional-dependencies"].items() for line in wanted]
    else:
        lines = [(line, "") for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    return [found for found in (parsed(line, extra) for line, extra in lines) if found]


def older(version: str, least: str) -> bool:
    """Whether a version comes before another, number by number. Example: `older("2.14.1", "2.9") == False`."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", re.split(r"[+a-z-]", text)[0])]

    return numbers(version) < numbers(least)


def missing(module: str) -> str:
    """Why a module cannot be found, "" where it can. It is not imported."""
    try:
        return "" if importlib.util.find_spec(module) else "not installed"
    except (ImportError, ValueError) as error:
        return " ".join(str(error).split()) or "cannot be imported"


def package(wanted: Requirement) -> tuple[str, str]:
    """Whether a requirement is met: (version, ""), or ("", what is wrong)."""
    try:
        version = importlib.metadata.version(wanted.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "", f"{wanted.distribution} is not installed"
    reason = missing(MODULES.get(wanted.distribution, wanted.distribution.replace("-", "_")))
    if reason:
        return "", f"{wanted.distribution} {version} is installed but cannot be imported ({reason})"
    if older(version, wanted.least):
        return "", f"{wanted.distribution} {version} is older than {wanted.least}"
    return version, ""


def python() -> Iterator[Finding]:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if good else "problem", version + ("" if good else ": 3.11 or newer is needed"))


def packages() -> Iterator[Finding]:
    """What every run imports, against the project's ranges."""
    wanted = [requirement for requirement in requirements() if not requirement.extra]
    if not wanted:
        yield Finding("packages", "note", f"cannot tell which are needed: {DISTRIBUTION} is not installed")
    found = {requirement: package(requirement) for requirement in wanted}
    for requirement, (_, wrong) in found.items():
        if wrong:
            text = f'{wrong}: pip install "{requirement.distribution}>={requirement.least}"'
            yield Finding(requirement.distribution, "problem", text)
    good = [f"{requirement.distribution} {version}" for requirement, (version, wrong) in found.items() if not wrong]
    if good:
        yield Finding("packages", "ok", ", ".join(good))


USES = {
    "demo": "the bundled digits (make demo, data=mnist5k)",
    "vit": "encoder=timm",
    "data": "data=huggingface",
    "trackers": "trackers=[wandb] or [trackio]",
    "sweep": "-m hydra/launcher=joblib, ray or submitit",
}


def extras() -> Iterator[Finding]:
    """What single features want; a missing one is no problem until it is asked for."""
    for extra, use in USES.items():
        wanted = [requirement for requirement in requirements() if requirement.extra == extra]
        if extra == "sweep":  # plug-ins of hydra's: their distributions are no modules
            absent = [name for name in LAUNCHERS if missing(f"hydra_plugins.hydra_{name}_launcher")]
            wrong = [f"the launcher for {name} is not there" for name in absent]
        else:
            wrong = [reason for _, reason in map(package, wanted) if reason]
        text = (
            f'{"; ".join(wrong)}, which {use} wants: pip install "{DISTRIBUTION}[{extra}]"' if wrong else f"for {use}"
        )
        yield Finding(f"extra {extra}", "note" if wrong else "ok", text)


def imported(name: str) -> tuple[ModuleType | None, str]:
    """A module, or None and why it does not load: a broken install may raise anything at all."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:200]


def torch_loads() -> Iterator[Finding]:
    """torch and torchvision, which fit each other only in pairs, truly imported."""
    for name in ("torch", "torchvision"):
        module, wrong = imported(name)
        if module is None:
            advice = "they fit only in pairs: pip install --force-reinstall torch torchvision"
            yield Finding(f"import {name}", "problem", f"{wrong}; {advice}")
            return
    yield Finding("import torch", "ok", "torch and torchvision load together")


# ---- what computes ----


def devices() -> list[tuple[str, int, tuple[int, int]]]:
    """Name, bytes and compute capability of each GPU that torch can use; none without torch."""
    torch: Any = imported("torch")[0]
    if torch is None or not torch.cuda.is_available():
        return []
    every = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [(each.name, each.total_memory, (each.major, each.minor)) for each in every]


def gpus(found: Sequence[tuple[str, int, tuple[int, int]]]) -> Iterator[Finding]:
    """A line for each GPU, with its memory and whether it multiplies bfloat16."""
    for index, (name, size, capability) in enumerate(found):
        bf16 = capability >= BF16_CAPABILITY
        text = f"{name}, {size / GIB:.0f} GiB, compute capability {capability[0]}.{capability[1]}: "
        text += "precision=bf16 in hardware" if bf16 else "no bf16 in hardware, pass precision=fp16"
        yield Finding(f"gpu {index}", "ok" if bf16 else "note", text)
    if found:
        return
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        text = "an NVIDIA driver is here but torch finds no CUDA: install a torch built for CUDA, or see nvidia-smi"
    else:
        text = "none: runs go on the CPU; the small recipes take minutes, the papers' are out of reach"
    yield Finding("gpu", "note", text)


def cpu_flags(cpuinfo: str) -> set[str]:
    """The instruction sets in /proc/cpuinfo. Example: `cpu_flags("flags : avx2 amx_bf16") == {"avx2", "amx_bf16"}`."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, flags=re.MULTILINE)
    return set(found[1].split()) if found else set()


def fast_bf16(cpuinfo: str) -> list[str]:
    """The instruction sets by which a CPU multiplies bfloat16 faster than float32, of its /proc/cpuinfo.

    AMX's, ARM's, and AMD's avx512_bf16. An Intel Xeon that has it without AMX does half of float32's operations a
    second by it, and CPC's encoder takes 1.2 times as long (benchmarks/results/speed.json).

    Example: `fast_bf16("flags : avx2 amx_bf16") == ["amx_bf16"]`.
    """
    flags = cpu_flags(cpuinfo)
    amd = re.search(r"^vendor_id\s*:\s*AuthenticAMD\b", cpuinfo, flags=re.MULTILINE)
    return sorted(flags & ({"amx_bf16", "bf16"} | ({"avx512_bf16"} if amd else set())))


def cpu(cpuinfo: str) -> Iterator[Finding]:
    """Whether the CPU multiplies bfloat16 faster than float32."""
    able = fast_bf16(cpuinfo)
    text = f"bf16 in hardware ({', '.join(able)}): precision=bf16 is faster"
    other = "no bf16 in hardware: leave precision=no on the CPU, bf16 would be emulated and slower"
    if not able and "avx512_bf16" in cpu_flags(cpuinfo):
        other = "avx512_bf16 without AMX, which is slower than float32 on this CPU: leave precision=no"
    yield Finding("cpu bf16", "ok" if able else "note", text if able else other)


def compiler(gpu: bool) -> Iterator[Finding]:
    """Whether `torch.compile` has what it wants: a C++ compiler with Python's headers, and Triton on a GPU."""
    lacks = []
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        lacks.append("no C++ compiler (install g++, or set CXX)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        lacks.append("no Python.h (install python3-dev)")
    if gpu and missing("triton"):
        lacks.append("no triton (pip install triton), which the losses' GPU kernels want too")
    text = f"{'; '.join(lacks)}: torch.compile will not work; no tool of ours needs it"
    yield Finding("torch.compile", "note" if lacks else "ok", text if lacks else f"{found} and Python.h are there")


def allowed_cores(quota: str) -> float:
    """Cores that a cgroup's `cpu.max` allows. Example: `allowed_cores("150000 100000") == 1.5`."""
    given, _, period = quota.strip().partition(" ")
    return float("inf") if given in ("", "max") else int(given) / int(period or 100000)


def cores() -> Iterator[Finding]:
    """Cores, threads and workers."""
    count = len(os.sched_getaffinity(0))
    file = Path("/sys/fs/cgroup/cpu.max")
    quota = allowed_cores(file.read_text() if file.is_file() else "max")
    usable = max(1, min(count, int(quota) if quota < count else count))
    text = f"{count} for this process: a run takes {count} threads / processes"
    if quota < count:
        yield Finding("cores", "note", f"{text}, but a quota allows {quota:g}: pass threads={usable}")
    else:
        advice = f"workers={min(8, count - 1)} helps where decoding is slow" if count > 2 else "leave workers=0"
        yield Finding("cores", "ok", f"{text}; {advice}")


def memory() -> Iterator[Finding]:
    """What is free in the machine, or below a container's limit."""
    free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    available = int(free[1]) * 1024 if free else 0
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    text = f"{available / GIB:.1f} GiB free"
    low = available < 2 * GIB
    yield Finding("memory", "note" if low else "ok", text + (": make demo takes 1.8 GiB" if low else ""))


# ---- what the system allows ----


def disk(folder: Path) -> Iterator[Finding]:
    """Room for runs, in the folder that they are written to."""
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free in {folder.resolve()}"
    if not os.access(folder, os.W_OK):
        yield Finding("disk", "problem", f"{folder.resolve()} cannot be written to: pass run_dir=DIR, or go elsewhere")
    elif free < 100 * MIB:
        yield Finding("disk", "problem", f"{text}: a small run takes 100 MB; pass run_dir=DIR on another disk")
    elif free < 5 * GIB:
        yield Finding("disk", "note", f"{text}: a checkpoint of the paper's ResNet-161 takes 5 GB")
    else:
        yield Finding("disk", "ok", text)


def accelerate_config_file() -> Path:
    """Where `accelerate launch` looks for its defaults."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))
    folder = Path(home).expanduser() / "accelerate"
    written = [folder / f"default_config.{ending}" for ending in ("yaml", "json")]
    return next((file for file in written if file.is_file()), written[0])


def accelerate_config(gpu_count: int) -> Iterator[Finding]:
    """The launcher's default configuration: found, readable, and asking for no more processes than there are GPUs."""
    file, name = accelerate_config_file(), "accelerate config"
    if not file.is_file():
        yield Finding(name, "ok", f"none ({file}): accelerate launch takes every GPU, or one process on a CPU")
        return
    mend = "write it anew with accelerate config, remove it, or pass --config_file"
    try:
        config_class: Any = importlib.import_module("accelerate.commands.config.config_args").ClusterConfig
        read = config_class.from_yaml_file if file.suffix == ".yaml" else config_class.from_json_file
        asked = read(str(file))
    except ImportError as error:
        yield Finding(name, "note", f"{file} is there, but not what reads it: {error}")
        return
    except Exception as error:
        yield Finding(name, "problem", f"{file} is broken: {' '.join(str(error).split())[:200]}; {mend}")
        return
    machines = max(1, int(asked.num_machines or 1))
    here = -(-int(asked.num_processes or 1) // machines)
    text = f"{file}: {asked.num_processes} processes on {machines} machine{'s' * (machines > 1)}"
    on_gpus = str(getattr(asked.distributed_type, "value", asked.distributed_type)) != "MULTI_CPU" and not asked.use_cpu
    if on_gpus and gpu_count and here > gpu_count:
        yield Finding(name, "problem", f"{text}, {here} on this one, which has {gpu_count} GPU: {mend}")
    elif on_gpus and here > 1 and not gpu_count:
        yield Finding(name, "note", f"{text}, but there is no GPU here: pass --num_processes 1, or device=cpu")
    else:
        yield Finding(name, "ok", text)


def open_files(limit: int) -> Iterator[Finding]:
    """How many files a process may hold open."""
    text = f"{'no limit' if limit == resource.RLIM_INFINITY else limit} open files"
    if limit != resource.RLIM_INFINITY and limit < 64:
        yield Finding("open files", "problem", f"{text}: not enough to load torch and data; ulimit -n 4096")
    elif limit != resource.RLIM_INFINITY and limit < 1024:
        yield Finding("open files", "note", f"{text}: few for workers and shards; ulimit -n 4096, or pass workers=0")
    else:
        yield Finding("open files", "ok", text)


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Where workers put their batches."""
    if not folder.is_dir():
        yield Finding("shared memory", "note", f"no {folder}: pass workers=0")
        return
    free = shutil.disk_usage(folder).free
    text = f"{free / MIB:,.0f} MiB free in {folder}"
    low = f"{text}: workers may die of a bus error; pass workers=0, or give the container more (--shm-size 2g)"
    yield Finding("shared memory", "note" if free < 512 * MIB else "ok", low if free < 512 * MIB else text)


# ---- the command ----


def looked_at(name: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a look finds; one that fails itself is a note, so that the others are still told."""
    try:
        return list(look())
    except Exception as error:
        return [Finding(name, "note", f"could not be told ({type(error).__name__}: {' '.join(str(error).split())})")]


def examine(folder: Path) -> list[Finding]:
    """Everything, of runs that are started in `folder`."""
    loads = looked_at("import torch", torch_loads)
    try:
        found = devices()
    except Exception:  # a driver may fail in ways of its own
        found = []
    cpuinfo = Path("/proc/cpuinfo")
    looks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("python", python),
        ("packages", packages),
        ("import torch", lambda: loads),
        ("extras", extras),
        ("gpu", lambda: gpus(found)),
        ("cpu bf16", lambda: cpu(cpuinfo.read_text())),
        ("torch.compile", lambda: compiler(bool(found))),
        ("cores", cores),
        ("memory", memory),
        ("disk", lambda: disk(folder)),
        ("accelerate config", lambda: accelerate_config(len(found))),
        ("open files", lambda: open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])),
        ("shared memory", shared_memory),
    ]
    return [finding for name, look in looks for finding in looked_at(name, look)]


EPILOG = """examples:
  python -m cpc.doctor                 what this machine can do
  python -m cpc.doctor --dir /scratch  whether runs can be written there
  python -m cpc.doctor --json          the same for a program

exit codes: 0 runs are possible, 1 a problem makes them impossible, 2 a mistake on the command line"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 where something makes runs impossible, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m cpc.doctor",
        description="What this machine can do, and what to mend, a line each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--dir", type=Path, default=Path("."), metavar="DIR", help="where runs are to be written")
    asked = parser.parse_args(arguments)
    if not asked.dir.is_dir():
        parser.error(f"--dir {asked.dir}: no such folder")
    findings = examine(asked.dir)
    problems = sum(finding.state == "problem" for finding in findings)
    if asked.json:
        print(json.dumps({"possible": not problems, "findings": [finding._asdict() for finding in findings]}, indent=1))
        return int(problems > 0)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.state:7}  {finding.name:{width}}  {finding.text}")
    notes = sum(finding.state == "note" for finding in findings)
    print("runs are possible" if not problems else f"{problems} to mend before anything can run", end="")
    print(f", {notes} {'note' if notes == 1 else 'notes'}")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
