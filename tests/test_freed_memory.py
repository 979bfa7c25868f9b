"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest
from conftest import CHECKOUT

from cpc import entry
from cpc.freed_memory import keep_freed_memory

HELD = """
import os, torch
from pathlib import Path
from cpc.freed_memory import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

if {keep}:
    assert keep_freed_memory()
before = resident()
tensors = [torch.ones(2**22) for _ in range(8)]  # 16 MiB each
full = resident() - before
del tensors
print(full, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
@pytest.mark.parametrize("keep", [False, True])
def test_freed_tensors_stay_with_the_process_only_where_that_is_asked(keep):
    """Of 128 MiB: by default all go back to the system, which has to clear them again for the next step."""
    code = HELD.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    full, left = map(float, done.stdout.split())
    assert full > 120
    assert left > 120 if keep else left < 40


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert not keep_freed_memory()


@pytest.mark.usefixtures("as_a_new_process")
def test_every_command_on_a_cpu_asks_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(entry, "keep_freed_memory", lambda: asked.append(True))
    entry.start_accelerator(precision="no", device="cpu", threads=1)
    assert asked == [True]
