"""How much a tool says: `verbosity=quiet|normal|verbose` on the command line of any of them.

It changes nothing that is computed, so it is no key of a configuration: a run that was started quietly is the same run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

LEVELS = ("quiet", "normal", "verbose")
_BAR = "contrastive_core.run_log"


def take_verbosity(arguments: list[str]) -> tuple[str, list[str]]:
    """The level that a command line asks for, the last one if it does so twice, and the arguments without it.

    Raises ValueError for another word. Example: `take_verbosity(["steps=2", "verbosity=quiet"])` is
    `("quiet", ["steps=2"])`.
    """
    asked = [argument.partition("=")[2] for argument in arguments if argument.startswith("verbosity=")]
    level = asked[-1] if asked else "normal"
    if level not in LEVELS:
        raise ValueError(f"verbosity={level}: pass quiet, normal or verbose")
    return level, [argument for argument in arguments if not argument.startswith("verbosity=")]


def is_main_process() -> bool:
    """Whether this is the process that prints, before accelerate has started."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def speaking(level: str) -> Iterator[None]:
    """Within: as much is said as `level` has it. Logging is to be set up before; it is as it was afterwards.

    quiet: nothing on stdout, no progress bar, and warnings on stderr.
    """
    with contextlib.ExitStack() as stack:
        if level == "quiet":
            nowhere = stack.enter_context(open(os.devnull, "w"))  # the stack closes it
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(_warnings_alone())
        yield


@contextlib.contextmanager
def _warnings_alone() -> Iterator[None]:
    """Warnings go to stderr, where hydra sends all to stdout; other lines and the progress bar go nowhere."""
    root, bar = logging.getLogger(), logging.getLogger(_BAR)
    handlers, levels = root.handlers[:], (root.level, bar.level)
    told: Any = logging.StreamHandler(sys.stderr)
    root.handlers[:] = [told]
    root.setLevel(logging.WARNING)
    bar.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        bar.setLevel(levels[1])


def versions() -> str:
    """The packages that decide what a run computes, in one line."""
    from importlib.metadata import version

    names = ("torch", "torchvision", "accelerate", "kornia", "hydra-core")
    return ", ".join([f"python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in names)])
