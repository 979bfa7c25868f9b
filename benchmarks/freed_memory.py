"""What keeping freed memory is worth (`cpc.freed_memory`): steps of training on a CPU with it and without.

    python benchmarks/freed_memory.py             # 5 minutes; writes benchmarks/results/freed_memory.json

Each measurement is a process of its own, of one thread, with random images; with and without take turns. Seconds are
the median of its steps, memory is its largest resident set.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from record import ROOT, python, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from contrastive_core.encoders import SmallCNN
from contrastive_core.losses import nt_xent
from cpc.encoders import resnet_small
from cpc.freed_memory import keep_freed_memory

ROUNDS = 7
STEPS = 12


def images(count: int, size: int) -> Tensor:
    """Any, in the layout that convolutions like."""
    return torch.rand(count, 3, size, size).to(memory_format=torch.channels_last)


def classify(size: int, widths: list[int], stem: str) -> Callable[[], Tensor]:
    """The loss of a label sweep's CNN from scratch, of 32 images."""
    network = nn.Sequential(SmallCNN(widths, stem=stem), nn.Linear(widths[-1], 10)).to(
        memory_format=torch.channels_last
    )
    given, labels = images(32, size), torch.randint(10, (32,))
    return lambda: cross_entropy(network(given), labels)


def contrast() -> Callable[[], Tensor]:
    """SimCLR's loss of two views of 256 images of 32 px."""
    encoder = resnet_small(width=64, norm="batch", stem_stride=2).to(memory_format=torch.channels_last)
    given = images(512, 32)
    return lambda: nt_xent(*encoder(given).chunk(2), temperature=0.5)


def patches() -> Callable[[], Tensor]:
    """A loss of the encoded patches of CPC's CIFAR-10 recipe: 32 images of 25."""
    encoder = resnet_small(width=64, blocks=[1, 1], stem_stride=2).to(memory_format=torch.channels_last)
    given = images(32 * 25, 12)
    return lambda: nt_xent(*encoder(given).chunk(2), temperature=0.5)


WORK: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "CNN, 32 images of 32 px": lambda: classify(32, [32, 64, 128, 128], "small"),
    "CNN, 32 images of 96 px": lambda: classify(96, [32, 64, 128, 256], "imagenet"),
    "SimCLR, 256 images of 32 px": contrast,
    "CPC's encoder, 32 images of 25 patches of 12 px": patches,
}


def measured(name: str, keep: bool) -> dict[str, float]:
    """In this process: the median seconds of a step forward and backward in bf16, and the largest resident set."""
    if keep and not keep_freed_memory():
        raise SystemExit("this libc is not glibc: there is nothing to measure")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loss, seconds = WORK[name](), []
    for _ in range(STEPS):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        value.backward()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(seconds[2:]), "peak_mib": peak}


def in_a_process(name: str, keep: bool) -> dict[str, float]:
    """The same in a process of its own."""
    command = python("benchmarks/freed_memory.py", "--work", name, *(["--keep"] if keep else []))
    found: dict[str, float] = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    return found


def compare(name: str) -> dict[str, Any]:
    """Medians with and without, and the ratios of the rounds: without over with."""
    rounds = [{keep: in_a_process(name, keep) for keep in ((True, False) if even else (False, True))}
              for even in (place % 2 == 0 for place in range(ROUNDS))]  # fmt: skip
    ratios = sorted(each[False]["seconds"] / each[True]["seconds"] for each in rounds)
    spread = {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
    found: dict[str, Any] = {"times_as_long_without": {key: round(ratio, 3) for key, ratio in spread.items()}}
    for keep, word in ((True, "with"), (False, "without")):
        found[f"ms_{word}"] = round(1000 * statistics.median(each[keep]["seconds"] for each in rounds), 1)
        found[f"peak_mib_{word}"] = round(statistics.median(each[keep]["peak_mib"] for each in rounds))
    print(name, found, flush=True)
    return found


def main() -> None:
    """Compare, and write the table; with --work, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORK, help="only this, in this process")
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    if asked.work:
        print(json.dumps(measured(asked.work, asked.keep)))
    else:
        write("freed_memory", "python benchmarks/freed_memory.py", {name: compare(name) for name in WORK})


if __name__ == "__main__":
    main()
