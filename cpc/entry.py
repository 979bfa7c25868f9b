"""What the command-line entry points share: hydra, and starting accelerate. Mistakes are told by `cpc.mistakes`.

Hydra stays here and in the entry points; everything below takes tensors, numbers and objects.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, cast, get_origin, get_type_hints

import hydra
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from contrastive_core.optim import linear_scaling, square_root_scaling
from cpc.command_help import groups_of, help_text, own_lines
from cpc.configs import config_folder
from cpc.fast_precision import fast_precision
from cpc.freed_memory import keep_freed_memory
from cpc.interruption import Stopped
from cpc.mistakes import UNFORESEEN, USER_ERRORS, hydra_raises, out_of_memory, told, wants_traceback, way_out
from cpc.prediction import first_disjoint_offset
from cpc.unread_keys import unread_keys
from cpc.verbosity import is_main_process, speaking, take_verbosity, versions

logger = logging.getLogger(__name__)


def epochs(count: float, batch_size: int, images: int) -> int:
    """Optimizer steps of `count` epochs over so many images, as `contrastive_core.data` counts them.

    An epoch has images // batch_size steps, here at least 1: what is wrong with a batch that is larger than the data
    set, or empty, is said where it is read.

    Example: `epochs(100, 4096, 1281167) == 31200`.
    """
    return round(count * max(1, images // max(1, batch_size)))


# what a YAML may compute: lr: ${linear_scaling:0.3,${batch_size}}, steps: ${epochs:100,${batch_size},1281167}
RESOLVERS: dict[str, Callable[..., Any]] = {
    "add": lambda *numbers: sum(numbers),
    "ceil_divide": first_disjoint_offset,
    "epochs": epochs,
    "fast_precision": fast_precision,
    "linear_scaling": linear_scaling,
    "square_root_scaling": square_root_scaling,
}


class Incomplete(Exception):
    """What a job raises where a part of its work failed and the rest is done and kept: a line, and exit code 1.

    Of jobs side by side (`--multirun`) the others go on: the launcher hears of it when all are done.
    """


def command(config_name: str, job: Callable[[DictConfig], Any], *, schema: type) -> Callable[[], None]:
    """A `main()` that composes configs/`config_name`.yaml with the command line and hands it to `job`.

    Args:
        config_name: the YAML file, whose defaults list begins with `SCHEMA_schema`, SCHEMA the part of config_name
            before the first underscore.
        job: gets the composed configuration.
        schema: a dataclass with the types of the top-level keys.

    A mistake of the user, in the configuration or in what it names, ends in one line on stderr and exit code 2; with
    HYDRA_FULL_ERROR=1, hydra's own switch, in the whole traceback. `--help` is ours (`cpc.command_help`), and
    `verbosity=` is read here (`cpc.verbosity`); with verbosity=quiet what `job` returns is all that is printed.
    """
    for name, resolver in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    ConfigStore.instance().store(f"{config_name.split('_')[0]}_schema", schema)

    composed, level = False, "normal"
    lists = list_keys(schema)

    def keys() -> list[str]:
        """What may stand before the "=" of an override; asked where something was wrong with one."""
        folder = Path(config_folder())
        return [*get_type_hints(schema), *groups_of(folder, own_lines(folder, config_name))]

    def run(cfg: DictConfig) -> None:
        nonlocal composed
        composed = True
        with _mistakes_told(keys):
            if level == "verbose" and is_main_process():
                print(f"{versions()}\n\n{OmegaConf.to_yaml(cfg)}", flush=True)
            with speaking(level):
                result = job(cfg)
            if level == "quiet" and is_main_process() and result is not None:
                print(result)

    entry = hydra.main(version_base="1.3", config_path=config_folder(), config_name=config_name)(run)

    def main() -> None:
        nonlocal composed, level
        composed = False
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(Path(config_folder()), config_name, own_folders(sys.argv[1:])), end="")
            return
        with hydra_raises(), _arguments_as_they_were():
            try:
                level, sys.argv[1:] = take_verbosity(overrides_first(sys.argv[1:]))
                sys.argv[1:] = [bracketed(argument, lists) for argument in sys.argv[1:]]
                entry()
                _leave_group()  # here, since the next job of --multirun is in the same one
            except Incomplete as error:
                sys.exit(_said(error))
            except Exception as error:
                # whatever hydra raises before the job begins is about the command line: its parser asserts, too
                if composed or wants_traceback():
                    raise
                sys.exit(told(error, keys()))

    return main


@contextmanager
def _mistakes_told(keys: Callable[[], Collection[str]]) -> Iterator[None]:
    """End the process with one line and an exit code where a job within ends with what its user can mend."""
    try:
        yield
    except KeyboardInterrupt:  # before a run has begun to listen, or twice
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Incomplete as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # an exit would take the other jobs along
            raise
        sys.exit(_said(error))
    except Stopped:  # which all processes are at once; after an error the others may never answer
        _leave_group()
        raise
    except (*USER_ERRORS, HydraException) as error:
        if wants_traceback():
            raise
        sys.exit(told(error, keys()))
    except (MemoryError, RuntimeError) as error:
        remedy = way_out(error)
        if wants_traceback() or not remedy:
            raise
        first = str(error).partition("\n")[0] or type(error).__name__
        sys.exit(told(RuntimeError(f"{remedy} ({first[:200]})")))


def _said(error: Incomplete) -> int:
    print(error, file=sys.stderr)
    return 1


def overrides_first(arguments: Sequence[str]) -> list[str]:
    """KEY=VALUE in front of options: Hydra's parser does not know the rest again where an option stands among them.

    Example: `overrides_first(["seed=0,1", "-m", "steps=2", "-cd", "mine"])` is `["seed=0,1", "steps=2", "-m", "-cd",
    "mine"]`.
    """
    overrides = [each for each in arguments if not each.startswith("-") and ("=" in each or each.startswith("~"))]
    return overrides + [each for each in arguments if each not in overrides]


def list_keys(schema: type) -> list[str]:
    """The keys of a schema whose values are lists."""
    return [name for name, kind in get_type_hints(schema).items() if get_origin(kind) is list]


def bracketed(argument: str, lists: Collection[str]) -> str:
    """A command-line argument whose list has its brackets, which a shell may read itself.

    Example: `bracketed("labels=20,40", ["labels"])` is "labels=[20,40]", and `bracketed("labels=", ["labels"])` is
    "labels=[]", with --multirun too: a job for each of two label counts, where each wants a list, cannot be meant.
    """
    key, equals, value = argument.partition("=")
    # a list, an interpolation, nothing, a sweep over several lists
    written = re.match(r"\s*['\"]?(\[|\$|null$|\w+\()", value)
    return f"{key}=[{value.rstrip(',')}]" if equals and key in lists and not written else argument


def _leave_group() -> None:
    """End the group of processes, whose threads have to be done before the interpreter is.

    One that still lets go of a tensor then is ended by Python in a place where C++ allows no such thing, and the whole
    process is aborted: "terminate called without an active exception".
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def own_folders(arguments: Sequence[str]) -> list[Path]:
    """The folders that `--config-dir` names. Example: `own_folders(["--config-dir=a", "-cd", "b"])` names a and b."""
    following = [after for before, after in itertools.pairwise(arguments) if before in ("--config-dir", "-cd")]
    joined = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config-dir=")]
    return [Path(folder) for folder in (*joined, *following)]


@contextmanager
def _arguments_as_they_were() -> Iterator[None]:
    """What is taken out of the command line within is there again afterwards."""
    before = sys.argv[:]
    try:
        yield
    finally:
        sys.argv[:] = before


def config_search() -> AbstractContextManager[Any]:
    """For `hydra.compose`: the search path of the command that runs, with its --config-dir; else our own configs."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return hydra.initialize_config_dir(config_folder(), version_base="1.3")


def build(node: Any, *arguments: Any, **named: Any) -> Any:
    """`hydra.utils.instantiate`, with lists as lists, raising what the constructor raised.

    An argument of the wrong type, name or size is the configuration's mistake, not the constructor's: a ValueError too.
    """
    try:
        return hydra.utils.instantiate(node, *arguments, _convert_="all", **named)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UNFORESEEN) and not isinstance(cause, USER_ERRORS) and not out_of_memory(cause):
            raise ValueError(f"{node.get('_target_')} does not take what it was given: {cause}") from cause
        raise (cause if isinstance(cause, Exception) else ValueError(str(error))) from None


def build_schedule(node: Any) -> Callable[[float], float]:
    """The base learning rate's factor by the share of the run that is over.

    Raises ValueError for none at all, and for what its arguments cannot mean, as a warm-up of twice the run.
    """
    schedule: Callable[[float], float] | None = build(node)
    if schedule is None:
        raise ValueError("schedule=null: leave it out, or pass schedule._target_=contrastive_core.optim.constant")
    schedule(0.0)
    return schedule


def run_name() -> str:
    """What a run is called on the command line: its experiment, else its method (unless that is CPC) and its data."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    method = choices.get("method")
    parts = [choices.get("experiment")] if choices.get("experiment") else [method, choices.get("data")]
    return "-".join(str(part) for part in parts if part and part != "cpc") or "run"


def warn_of_unread_keys(cfg: DictConfig) -> None:
    """Log a warning for each key of the command line that all recipes share and this one makes nothing of.

    No error: a list of such keys may serve several methods, each of which takes what it has a use for.
    """
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() and is_main_process() else []
    for line in unread_keys(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False)), given):
        logger.warning("%s", line)


def check_complete(cfg: DictConfig) -> None:
    """Raise ValueError that names the keys still to be given."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"not given: {', '.join(missing)}; pass them as {missing[0]}=VALUE, or an experiment=NAME")


def start_accelerator(
    *, precision: str, device: str | None, threads: int | None, accumulate: int = 1, timeout: float = 30
) -> Accelerator:
    """Accelerate on CUDA where there is one and `device` does not say cpu, with `threads` CPU threads a process.

    Where one of several processes waits for another for more than `timeout` minutes, it fails, and with it all.

    Raises ValueError for fp16 without CUDA and for processes that did not find each other.
    """
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"precision={precision}: pass no, bf16 or fp16")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device={device}: pass cpu or cuda")
    cpu = device == "cpu" or not torch.cuda.is_available()
    if cpu and device == "cuda":
        raise ValueError("device=cuda, but torch finds no CUDA: pass device=cpu")
    if cpu and precision == "fp16":
        raise ValueError("precision=fp16 needs CUDA: pass precision=bf16 or precision=no")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: pass at least 1, or null for cores / processes")

    if not timeout > 0:
        raise ValueError(f"timeout={timeout}: pass the minutes that a process waits for another, above 0")
    for plugin in ("FSDP", "DEEPSPEED"):  # of which accelerate would make nothing on a CPU, and says so to nobody
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true":
            raise ValueError(
                f"accelerate's {plugin} is not used here: leave it out of its configuration and pass shard=true"
            )

    if cpu:
        keep_freed_memory()
    # buffers are each process's own, or equal by construction: DDP must not overwrite them from rank 0
    # (torch 2.14 is about to rename the argument, accelerate 1.15 does not know the new name)
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    distributed = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[distributed, InitProcessGroupKwargs(timeout=timedelta(minutes=timeout))],
    )
    # its launcher exports OMP_NUM_THREADS=1, which would leave all cores but one idle, and it may set its own count
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_processes))
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != expected:
        raise ValueError(
            f"{expected} processes were launched but {accelerator.num_processes} found each other: on a CPU use "
            f"accelerate launch --multi_gpu --num_processes {expected} ... device=cpu"
        )
    return accelerator
