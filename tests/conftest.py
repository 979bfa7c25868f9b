"""What all tests share: fixed thread counts, a plotting backend without a screen, and two ways to run a command.

The commands run in a process group of their own, which a time limit kills as a whole: `accelerate launch` does
not forward signals, so killing it alone would leave its workers running.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import omegaconf
import pytest
import torch
import yaml
from hypothesis import settings

CHECKOUT = Path(__file__).resolve().parents[1]

# Before anything imports pyplot, here and in the commands, which inherit it.
os.environ["MPLBACKEND"] = "Agg"

# A fixed count, since sums split over other thread counts differ in their last bits; one, since jobs this small
# spend two on waiting for each other.
torch.set_num_threads(1)

# Shared cores make single examples slow now and then: pytest's own limit watches over the whole test.
settings.register_profile("shared cores", deadline=None)
settings.load_profile("shared cores")

Completed = subprocess.CompletedProcess[str]


def run_command(command: list[str], cwd: Path, env: dict[str, str] | None = None, timeout: float = 240) -> Completed:
    """Run to the end and return what came out; on a time-out kill the whole group and fail with what was printed."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), **(env or {})}
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException as stopped:  # also pytest's own limit and Ctrl-C: nothing may be left running
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            stdout, stderr = process.communicate()
            pytest.fail(f"no end after {timeout} s: {' '.join(command)}\n{stdout}\n{stderr}")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@functools.cache
def _compiled_loader() -> type:
    """OmegaConf's reader of YAML, by libyaml: a composition takes three quarters of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "SafeLoader", yaml.CSafeLoader)
        loader: type = _LOADER()
    return loader


# For compositions in the tests' own process; commands read as they do for everybody.
_LOADER = omegaconf._utils.get_yaml_loader
if yaml.__with_libyaml__:
    omegaconf._utils.get_yaml_loader = omegaconf.basecontainer.get_yaml_loader = _compiled_loader


def pytest_collection_finish() -> None:
    """All that is imported by now stays: to look through it again and again for garbage takes a tenth of the time."""
    gc.collect()
    gc.freeze()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def launcher(processes: int) -> list[str]:
    """`accelerate launch` for so many processes, with all it would otherwise warn about, and a port of its own."""
    options = f"--num_processes {processes} --num_machines 1 --mixed_precision no --dynamo_backend no"
    # Without --multi_gpu the launcher starts one process on a machine without a GPU, whatever was asked for.
    several = f"--multi_gpu --main_process_port {free_port()}" if processes > 1 else ""
    return [sys.executable, "-m", "accelerate.commands.launch", *options.split(), *several.split()]


def _absolute(command: tuple[str, ...]) -> list[str]:
    return [str(CHECKOUT / part) if part.startswith("tools/") else part for part in command]


@pytest.fixture
def run_tool(tmp_path: Path) -> Callable[..., Completed]:
    """`run_tool("tools/evaluate.py", "run=DIR")`: in one plain process, in `tmp_path`, so that nothing is littered."""

    def run(*command: str, cwd: Path = tmp_path, **options: object) -> Completed:
        return run_command([sys.executable, *_absolute(command)], cwd, **options)

    return run


@pytest.fixture
def launch_tool(tmp_path: Path) -> Callable[..., Completed]:
    """`launch_tool("tools/pretrain_cpc.py", "steps=2", processes=2)`, or `launch_tool("-m", "cpc.pretrain", ...)`.

    Several processes on a CPU need `device=cpu` among the arguments, unless the machine has that many GPUs.
    """

    def launch(*command: str, processes: int = 1, cwd: Path = tmp_path, **options: object) -> Completed:
        return run_command([*launcher(processes), *_absolute(command)], cwd, **options)

    return launch


@pytest.fixture
def compose() -> Callable[..., Any]:
    """`compose("data=parquet", "steps=3")`: the configuration that a tool gets from these arguments.

    The tool is tools/pretrain_cpc.py unless `name` is another file of configs/.
    """
    import hydra

    import cpc.evaluate
    import cpc.pretrain  # noqa: F401  # registers the schemas and the resolver
    from cpc.configs import config_folder

    def composed(*overrides: str, name: str = "pretrain_cpc") -> Any:
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            return hydra.compose(name, list(overrides))

    return composed


@pytest.fixture
def as_a_new_process() -> Iterator[None]:
    """Accelerate's state is one a process: forget it, and the number of threads, after a test that starts it."""
    from accelerate.state import AcceleratorState, GradientState

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Hydra sets the process's logging up as if it were its own, to write to a stdout that is this test's.

    The levels are Python's own at the start, since a command may have run in a fixture before this one.
    """
    root = logging.getLogger()
    handlers = root.handlers[:]
    root.setLevel(logging.WARNING)
    logging.getLogger("contrastive_core.data").setLevel(logging.NOTSET)
    yield
    root.handlers[:] = handlers


@pytest.fixture
def call_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`call_tool(cpc.finetune.main, "run=DIR")`: through hydra as from the command line, but in this process.

    A start of `run_tool` takes seconds. What the command raises comes through, SystemExit with its exit code.
    """

    from hydra._internal.hydra import Hydra

    def call(main: Callable[[], object], *arguments: str) -> None:
        # hydra composes a configuration twice, first to ask for hydra.mode, which ours do not set: half of a start
        monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        monkeypatch.setattr(sys, "argv", ["tool.py", *arguments])
        main()

    return call


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """`with interrupted_at(4): ...`: a run inside is stopped as by Ctrl-C, after the fifth step and its row."""
    from contrastive_core.run_log import RunLog

    @contextmanager
    def interrupted(step: int) -> Iterator[None]:
        def advance(log: RunLog) -> None:
            if log._bar.n == step:
                raise KeyboardInterrupt
            log._bar.update()

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "advance", advance)
            with pytest.raises(KeyboardInterrupt):
                yield

    return interrupted
