"""Processes of a test's own: one that can be killed, or several that are one run.

A server forks them that has imported everything and computed nothing, in a tenth of a second where a new interpreter
takes seconds. Forked from the tests' own process they would all fail at their first gradient once a test before has
started autograd's threads (torch.export does), and a run that has failed looks much like one that was killed.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
import torch._dynamo  # takes three seconds, and a distributed module or a first step of an optimizer asks for it
from conftest import CHECKOUT
from torch import distributed as dist

import cpc.finetune
import cpc.pretrain  # noqa: F401  # the server's children have these at once


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


def on_processes(count: int, job: Callable[..., Any], *arguments: object) -> list[Any]:
    """What `job(*arguments)` returns in each of so many processes, in their order: with what a launcher tells them."""
    # Held here, as torchrun's agent holds it: whoever looked for a free port first could find it taken a second later,
    # and the process that held it could leave before the others were done.
    meeting_place = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": meeting_place.port}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": True}
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, f"{rank}.pt") for rank in range(count)]
        children = []
        for rank, file in enumerate(files):
            told = {"RANK": rank, "LOCAL_RANK": rank, **common}
            environment = {name: str(value) for name, value in told.items()}
            children.append(_server().Process(target=_as_one_of, args=(environment, file, job, arguments)))
        for child in children:
            child.start()
        _join(children)
        return [torch.load(file, weights_only=False) for file in files]


def _join(children: list[BaseProcess]) -> None:
    """Wait for all; where one fails the others, which wait for it, are killed."""
    left = {child.sentinel: child for child in children}
    try:
        while left:
            for ended in connection.wait(list(left)):
                child = left.pop(ended)
                child.join()
                assert child.exitcode == 0, f"process {children.index(child)} failed: its output says why"
    finally:
        for child in left.values():
            child.kill()
            child.join()


def _as_one_of(environment: dict[str, str], file: str, job: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    os.environ.update(environment)
    torch.save(job(*arguments), file)
    if dist.is_initialized():
        dist.barrier()  # some may wait for others still
        dist.destroy_process_group()


def in_a_group(count: int, job: Callable[..., Any], *arguments: object) -> list[Any]:
    """What `job(rank, *arguments)` returns in each of so many processes of one thread, which can exchange tensors."""
    return on_processes(count, _in_its_group, job, *arguments)


def _in_its_group(job: Callable[..., Any], *arguments: object) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return job(dist.get_rank(), *arguments)
