"""Tiny runs in processes of their own, which can be killed (see test_reliability), or are several of one run.

A server forks them that has imported everything and computed nothing. Forked from the tests' own process they would all
fail at their first gradient once a test before has started autograd's threads (torch.export does), and a run that has
failed looks much like one that was killed.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from conftest import CHECKOUT, free_port

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


@functools.cache
def _server() -> ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11 hands sys.path over and does not look at it
        patch.setenv("PYTHONPATH", os.pathsep.join([str(CHECKOUT / "tests"), str(CHECKOUT)]))
        forkserver.ensure_running()
    return server


@contextmanager
def in_a_child(job: Callable[..., Any], *arguments: object) -> Iterator[BaseProcess]:
    """`job(*arguments)` in a process of its own, which has ended afterwards: by itself, or killed within."""
    child = _server().Process(target=job, args=arguments)
    child.start()
    try:
        yield child
    finally:
        child.join()
    assert child.exitcode in (0, -signal.SIGKILL), f"it failed with exit code {child.exitcode}: its output says why"


def on_processes(count: int, job: Callable[..., Any], *arguments: object) -> None:
    """`job(*arguments)` in so many processes of one run, as a launcher starts them, in a third of its time."""
    port = free_port()
    children = [_server().Process(target=_as_one_of, args=(count, port, rank, job, arguments)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * count, "their output says why"


def _as_one_of(count: int, port: int, rank: int, job: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in named.items()})
    job(*arguments)
    torch.distributed.destroy_process_group()


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
