"""Whether bfloat16 is worth it on this machine: on many a CPU it is slower than float32, not faster."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cpc.doctor import BF16_CAPABILITY, fast_bf16


def fast_precision(device: str | None = None, *, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What a recipe asks by `precision: ${fast_precision:${device}}`: bf16 where it is the faster, else no.

    Args:
        device: "cpu", "cuda" or None, as a run is given it: None takes a GPU where there is one.
        cpuinfo: where Linux says what the CPU can; where it does not, the answer is "no".

    A run's config.yaml holds the answer, not the question, so that a resumed run goes on as it began.
    """
    if device != "cpu" and torch.cuda.is_available():
        # of its own GPU, and without a context on it
        capability = torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", 0)))
        return "bf16" if capability >= BF16_CAPABILITY else "no"
    return "bf16" if cpuinfo.is_file() and fast_bf16(cpuinfo.read_text()) else "no"
