"""Tiny runs, for processes of their own (see processes.py): some are killed, some are one of several."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest

import cpc.run
from contrastive_core import checkpoint
from cpc.configs import config_folder
from cpc.finetune import finetune
from cpc.pretrain import pretrain

TINY = ["batch_size=8", "encoder.width=4", "method.context.width=8", "method.context.layers=1", "probe_every=7"]
TINY += ["log_every=1", "save_every=3", "threads=1", "steps=12", "averaging=0.9", "probe_images=50", "resume=auto"]


def tool_run(name: str, *overrides: str) -> Path:
    """What tools/NAME.py, pretrain, pretrain_cpc or finetune, does with these arguments."""
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        job = finetune if name == "finetune" else pretrain
        return job(hydra.compose(name, list(overrides)))


def tiny_run(folder: Path, *overrides: str) -> Path:
    """From where it was to its end."""
    return tool_run("pretrain_cpc", *TINY, f"run_dir={folder}", *overrides)


def refused_run(said: str, *overrides: str) -> None:
    """One that ends in a ValueError that says this."""
    with pytest.raises(ValueError, match=said):
        tool_run("pretrain_cpc", *overrides)


class Killer:
    """Kills this process at the so-manieth of the things that a save does to files."""

    def __init__(self, at: int) -> None:
        self.left = at

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            return function(*arguments, **options)

        return counted


def run_killed_within_its_second_save(folder: Path, at: int) -> None:
    """Before the `at`-th thing that it does to files, if there are so many; else to its end."""
    killer, saves = Killer(at), checkpoint.save_checkpoint

    def second(folder: Path, step: int, *arguments: Any) -> Any:
        if step == 6:
            for owner, function in ((checkpoint, "save_file"), (checkpoint, "_sync"), (checkpoint, "_remove"),
                                    (Path, "rename"), (Path, "write_text"), (Path, "mkdir")):  # fmt: skip
                setattr(owner, function, killer.before(getattr(owner, function)))
        return saves(folder, step, *arguments)

    cpc.run.save_checkpoint = second
    tiny_run(folder)


def run_with_small_files(folder: Path, most: int, told: Path) -> None:
    """A run whose files the kernel does not let grow beyond so many bytes; writes its error to a file, before that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    with pytest.raises(OSError, match="File too large") as error:
        tiny_run(folder)
    told.write_text(str(error.value))
