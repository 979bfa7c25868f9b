"""A training run, whatever it trains: claim a folder, take the steps, log, probe, save, export.

The entry points (`cpc.pretrain`, `cpc.finetune`, `cpc.distill`) say what is trained and on which data; this module
knows how a run goes, and reads the keys that all of them have.
"""

from __future__ import annotations

import copy
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from contrastive_core.batch_norm import globalize_batch_norm
from contrastive_core.checkpoint import export_encoder, load_checkpoint_, read_state, save_checkpoint, take_part
from contrastive_core.data import ImageDataset, check_shares, dataset_digest, training_batches
from contrastive_core.grad_cache import check_cacheable
from contrastive_core.method import Method
from contrastive_core.momentum import ema_update_, polyak_decay
from contrastive_core.optim import parameter_groups
from contrastive_core.profiling import profiled
from contrastive_core.run_log import RunLog, read_metrics
from contrastive_core.sharding import copy_whole_, shard_
from contrastive_core.trackers import check_trackers
from contrastive_core.training import StepResult, train_steps
from cpc.encoder_card import parts_card, parts_of
from cpc.entry import build, build_schedule, check_complete, run_name, start_accelerator
from cpc.foreign import run_data
from cpc.frozen_encoder import FrozenEncoder
from cpc.interruption import Stopped, StopRequest
from cpc.run_folder import check_folder, checkpoint_to_resume, choose_run_dir, claimed, saved_checkpoints
from cpc.run_watch import OnlineProbe, RunWatch, has_row

logger = logging.getLogger(__name__)


class Pieces(NamedTuple):
    """What a run trains: the method, the views it sees, the images, and what its encoder's card says.

    optimizer: of the method's parameters as they are when it is called; None = one for all, the recipe's.
    """

    method: Method
    views: nn.Module
    dataset: ImageDataset
    card: dict[str, Any]
    optimizer: Callable[[Method], Optimizer] | None = None


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as dicts, lists and numbers, with all references resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def take_data_of_(cfg: DictConfig, run: str) -> None:
    """The data that a run was trained on, where `cfg.data` is null.

    Raises ValueError for keys of data without a reader, and as `run_data` where the run says none that can be read.
    """
    if cfg.data is None:
        cfg.data = {**run_data(run), "size": "${load_size}"}
    elif "_target_" not in cfg.data:
        given = ", ".join(f"data.{name}" for name in cfg.data)
        raise ValueError(f"{given} of no data set: pass data=NAME beside it, as data=imagefolder")


def as_written(cfg: DictConfig) -> dict[str, Any]:
    """The same with references as they are, which may be to keys that nobody has filled in yet."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))


# the least that a number may be; whatever is wrong with a run is best said before anything is read or written
_AT_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "workers": 0,
    "save_every": 1,
    "keep_checkpoints": 1,
    "log_every": 1,
    "probe_every": 0,
    "probe_images": 5,
    "load_size": 1,
}


def check_numbers(cfg: DictConfig) -> None:
    """Raise ValueError that names the first top-level key whose value cannot be meant, and says what to pass.

    ImportError where a tracker's package is missing.
    """
    for name, least in _AT_LEAST.items():
        if cfg[name] < least:
            raise ValueError(f"{name}={cfg[name]}: pass at least {least}")
    if len(cfg.mean) != 3 or len(cfg.std) != 3 or min(cfg.std) <= 0:
        raise ValueError(f"mean={list(cfg.mean)} std={list(cfg.std)}: pass three numbers each, std above 0")
    if not -(2**63) <= cfg.seed < 2**63:
        raise ValueError(f"seed={cfg.seed}: pass a number of 64 bits, below 2**63")
    if cfg.clip is not None and not cfg.clip > 0:
        raise ValueError(f"clip={cfg.clip}: pass the largest gradient norm, above 0, or null")
    if cfg.averaging is not None and not 0 <= cfg.averaging < 1:
        raise ValueError(f"averaging={cfg.averaging}: pass a decay from 0 to below 1, or null")
    if not 0 <= cfg.bad_images <= 1:
        raise ValueError(f"bad_images={cfg.bad_images}: pass a share from 0 to 1")
    temperatures = cfg.temperature if isinstance(cfg.get("temperature"), DictConfig) else {}
    for name, temperature in temperatures.items():
        if not temperature > 0:
            raise ValueError(f"temperature.{name}={temperature}: pass a number above 0")
    if cfg.shard and (cfg.grad_cache or cfg.precision == "fp16"):
        other = "grad_cache=true" if cfg.grad_cache else "precision=fp16"
        raise ValueError(f"shard=true does not go with {other}: leave one of them out (bf16 goes with it)")
    if cfg.resume not in (None, "auto"):
        raise ValueError(f"resume={cfg.resume}: pass resume=auto with the run's run_dir, or leave it out")
    if cfg.resume == "auto" and cfg.run_dir is None:
        raise ValueError("resume=auto without run_dir: pass the folder of the run that is to go on")
    check_trackers(cfg.trackers)


def check_recipe(cfg: DictConfig) -> None:
    """Raise for what is wrong with a run's keys, its optimizer, its schedule or its folder; no data is read for it.

    ValueError, FileExistsError for a folder that holds a run, ImportError where a tracker's package is missing.
    """
    check_complete(cfg)
    check_numbers(cfg)
    if cfg.run_dir is not None and cfg.resume is None:
        check_folder(Path(cfg.run_dir), {}, resume=False)
    build(cfg.optimizer, [nn.Parameter(torch.zeros(1, 1))], _partial_=False)
    build_schedule(cfg.schedule)


def recompute_(encoder: nn.Module) -> None:
    """Have an encoder's blocks computed again for the backward pass. Raises ValueError for one that cannot."""
    if not hasattr(encoder, "recompute"):
        kind = type(encoder).__name__
        raise ValueError(f"recompute=true: {kind} cannot; pass recompute=false, or an encoder of patches")
    if any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules()):
        raise ValueError("recompute=true: batch norm would count every batch twice; pass recompute=false or norm=layer")
    cast(Any, encoder).recompute = True


def rounding(accelerator: Accelerator) -> dict[str, int]:
    """What decides the last bits of every sum, and is stored in checkpoints: sums are split over threads."""
    return {"threads": torch.get_num_threads(), "processes": accelerator.num_processes}


def images_of(dataset: ImageDataset, accelerator: Accelerator) -> dict[str, Any]:
    """What a checkpoint says of the images: how many, and a digest of their names and labels.

    Raises ValueError on all processes where one of them sees others: they would share out different batches.
    """
    own = {"images": len(dataset), "images_digest": dataset_digest(dataset)}
    everyones = gather_object([own]) if accelerator.num_processes > 1 else [own]
    for process, other in enumerate(everyones):
        if other != everyones[0]:
            counts = f"{everyones[0]['images']:,} on process 0, {other['images']:,} on process {process}"
            raise ValueError(f"the processes do not see the same images ({counts}): give all of them the same data")
    return own


def run_state(accelerator: Accelerator, images: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds beside tensors and the step, `images_of` the data included: nothing else has a memory."""
    scaler = {} if accelerator.scaler is None else {"scaler": accelerator.scaler.state_dict()}
    return rounding(accelerator) | images | scaler


def resume_(
    checkpoint: Path | None,
    modules: dict[str, nn.Module],
    optimizer: Optimizer,
    accelerator: Accelerator,
    images: dict[str, Any],
) -> int:
    """Restore modules and optimizer in place; returns the optimizer steps they have done, 0 without a checkpoint.

    Raises ValueError where the images are not those that the run has seen so far.
    """
    if checkpoint is None:
        return 0
    state = read_state(checkpoint)
    if images != {name: state.get(name, value) for name, value in images.items()}:
        counts = f"{state['images']:,} at step {state['step']}, {images['images']:,} now"
        raise ValueError(f"the run's images have changed ({counts}, by name and label): bring them back, or start anew")
    load_checkpoint_(checkpoint, modules, optimizer)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    before, now = {name: state.get(name) for name in rounding(accelerator)}, rounding(accelerator)
    if before != now and accelerator.is_main_process:
        logger.warning("resumed with %s, saved with %s: the numbers will differ in their last bits", now, before)
    step: int = state["step"]
    return step


def made_optimizer(cfg: DictConfig, method: Method) -> Optimizer:
    """Of the recipe's groups of the method's parameters, as they are now."""
    groups = parameter_groups(
        method, exclude=cfg.exclude, exclude_also=cfg.exclude_also, constant_rate=cfg.constant_rate
    )
    optimizer: Optimizer = build(cfg.optimizer, groups, _partial_=False)
    return optimizer


class Trained(NamedTuple):
    """What a run trains, ready for its processes.

    modules: what checkpoints hold, the method and, with `averaging`, its averaged copy. optimizer: the method's.
    prepared, prepared_optimizer: as the loop wants them. shown: what is probed and exported, always whole. split:
    whether each process has only a part.
    """

    modules: dict[str, nn.Module]
    optimizer: Optimizer
    prepared: nn.Module
    prepared_optimizer: Optimizer
    shown: Method
    split: bool

    def average_(self, step: int, decay: float) -> None:
        """The averaged copy, where there is one, follows the method; once a step, after it."""
        if "averaged" in self.modules:
            ema_update_(self.modules["averaged"], self.modules["method"], polyak_decay(step - 1, decay))

    def show(self) -> None:
        """Bring parts together for who looks at `shown`. Every process has to call it."""
        if self.split:
            copy_whole_(self.shown, list(self.modules.values())[-1])

    def save(self, folder: Path, step: int, state: dict[str, Any], accelerator: Accelerator, keep: int) -> None:
        """The main process writes a checkpoint, with `run_state`. Every process has to call it."""
        if accelerator.is_main_process:
            save_checkpoint(folder, step, self.modules, self.optimizer, state, keep)
        elif self.split:
            take_part(self.modules, self.optimizer)


def made_ready(
    cfg: DictConfig, method: Method, accelerator: Accelerator, optimizer_of: Callable[[Method], Optimizer]
) -> Trained:
    """Make the optimizer, and have accelerate wrap both; with `shard=true` split them over the processes instead."""
    device = accelerator.device
    averaged = None if cfg.averaging is None else copy.deepcopy(method).requires_grad_(False).to(device)
    modules: dict[str, nn.Module] = {"method": method, **({} if averaged is None else {"averaged": averaged})}
    shown = method if averaged is None else averaged
    if not (cfg.shard and accelerator.num_processes > 1):
        optimizer = optimizer_of(method)
        prepared, prepared_optimizer = accelerator.prepare(method, optimizer)
        return Trained(modules, optimizer, prepared, prepared_optimizer, shown, split=False)
    shown = copy.deepcopy(shown).to(device if accelerator.is_main_process else "cpu")
    for module in modules.values():
        shard_(module.to(device), device)
    optimizer = optimizer_of(method)  # of the parts
    prepared = accelerator.prepare_model(method, evaluation_mode=True)  # precision alone, no DistributedDataParallel
    return Trained(modules, optimizer, prepared, accelerator.prepare_optimizer(optimizer), shown, split=True)


def worker_views(views: nn.Module) -> Any:
    """The views where the loader's workers can make them (`views=torchvision_...`), else None: the device does."""
    from contrastive_core.data.worker_views import WorkerViews  # loads torchvision's transforms: not with `import cpc`

    return views if isinstance(views, WorkerViews) else None


def fitted(cfg: DictConfig, method: Method, accelerator: Accelerator) -> Method:
    """The method as the recipe wants it on these processes, before anything of it has been learned."""
    if cfg.recompute:
        recompute_(method.encoder)
    method.to(memory_format=torch.channels_last)
    if cfg.global_batch_norm and accelerator.num_processes > 1:
        method = cast(Method, globalize_batch_norm(method))
    if cfg.grad_cache:
        check_cacheable(method)
    return method


def steps_of(
    cfg: DictConfig,
    pieces: Pieces,
    trained: Trained,
    accelerator: Accelerator,
    *,
    start: int,
    watched: Callable[[int], bool],
) -> Iterator[StepResult]:
    """The recipe's steps from `start` on, some of them `watched`; none is taken before it is asked for."""
    batches = training_batches(
        pieces.dataset,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        start=start,
        steps=cfg.steps,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        accumulate=cfg.accumulate,
        workers=cfg.workers,
        views=worker_views(pieces.views),
    )
    return train_steps(
        trained.prepared,
        trained.prepared_optimizer,
        accelerator,
        batches,
        pieces.views,
        seed=cfg.seed,
        start=start,
        steps=cfg.steps,
        schedule=build_schedule(cfg.schedule),
        clip=cfg.clip,
        grad_cache=cfg.grad_cache,
        watched=watched,
    )


def online_probe(cfg: DictConfig, pieces: Pieces, shown: Method, accelerator: Accelerator) -> OnlineProbe:
    """Of what is shown, among training images alone."""
    encoder = FrozenEncoder(shown.encoder, **pieces.card["input"])
    return OnlineProbe(encoder, pieces.dataset, accelerator, count=cfg.probe_images, bad_images=cfg.bad_images)


def export(run_dir: Path, pieces: Pieces, shown: Method, collapsed: str) -> None:
    """Write the encoder, its card and whatever of the method others may need; `collapsed` says so where it has."""
    card = parts_card(shown, pieces.dataset.class_names) | pieces.card  # what the entry point knows better stands
    export_encoder(run_dir, shown.encoder, card | ({"collapsed": collapsed} if collapsed else {}), parts_of(shown))


def accelerator_of(cfg: DictConfig) -> Accelerator:
    """As a run's keys want it; the same one, however often a process asks."""
    return start_accelerator(
        precision=cfg.precision,
        device=cfg.device,
        threads=cfg.threads,
        accumulate=cfg.accumulate,
        timeout=cfg.timeout,
    )


def train_run(cfg: DictConfig, pieces: Callable[[], Pieces], *, phase_of: Path | None = None) -> Path:
    """Run one configuration to its end; returns the run's folder.

    `pieces()` is called once the folder is known to be free, with the seed set, and may take its time. `phase_of`: the
    folder of the run that goes on after this one, which whoever stops this one has to name to go on.
    """
    check_recipe(cfg)
    accelerator = accelerator_of(cfg)
    config = plain(cfg)
    run_dir = choose_run_dir(cfg.run_dir, run_name(), accelerator)
    resume = cfg.resume == "auto"
    check_folder(run_dir, config, resume=resume)
    saved = saved_checkpoints(run_dir)
    checkpoint = checkpoint_to_resume(run_dir, accelerator)

    check_shares(cfg.batch_size, accelerator.num_processes, cfg.accumulate)
    torch.manual_seed(cfg.seed)
    parts = pieces()
    optimizer_of = parts.optimizer or partial(made_optimizer, cfg)
    trained = made_ready(cfg, fitted(cfg, parts.method, accelerator), accelerator, optimizer_of)
    images = images_of(parts.dataset, accelerator)
    start = resume_(checkpoint, trained.modules, trained.optimizer, accelerator, images)
    rows = partial(has_row, every=cfg.log_every, steps=cfg.steps)
    results = steps_of(cfg, parts, trained, accelerator, start=start, watched=rows)
    main_process = accelerator.is_main_process
    probe = online_probe(cfg, parts, trained.shown, accelerator) if cfg.probe_every and main_process else None

    # nothing has been written so far: a mistake leaves no folder behind
    with (
        StopRequest() as request,
        claimed(run_dir, config, accelerator, resume=resume, saved=saved),
        RunLog(run_dir, start=start, steps=cfg.steps, trackers=cfg.trackers, config=config)
        if main_process
        else nullcontext() as log,
        profiled(run_dir if cfg.profile and main_process else None, cfg.steps - start) as profile_step,
    ):
        watch = RunWatch(log, accelerator, rows=rows, images=cfg.batch_size, bad_images=cfg.bad_images)

        def stop(asked: int, step: int) -> NoReturn:
            where = f"saved after step {step} of {cfg.steps}, go on with resume=auto run_dir={phase_of or run_dir}"
            watch.say(f"{signal.Signals(asked).name}: {where}", warning=True)
            accelerator.wait_for_everyone()  # a launcher ends all processes with the first
            raise Stopped(asked)

        if start and main_process:  # of which the log has kept what can be read
            watch.remember(read_metrics(run_dir))
        for result in results:
            trained.average_(result.step, cfg.averaging)
            profile_step()
            last = result.step == cfg.steps
            asked = 0 if last else request.asked(accelerator.device)

            # every process takes part in means, and in what it takes to look and to save; the main one writes and tells
            watch.see(result, last=last)
            with watch.paused():
                if cfg.probe_every and (last or result.step % cfg.probe_every == 0):
                    trained.show()
                    watch.probe(result.step, probe)
                if last or asked or result.step % cfg.save_every == 0:
                    watch.sync()
                    state = run_state(accelerator, images)
                    trained.save(run_dir / "checkpoints", result.step, state, accelerator, cfg.keep_checkpoints)
            if asked:
                stop(asked, result.step)

        trained.show()
        if main_process:
            export(run_dir, parts, trained.shown, watch.collapsed)
        if phase_of is not None and (asked := request.asked_by_now(accelerator.device)):  # before the next phase
            stop(asked, cfg.steps)
    if main_process:
        print(f"encoder: {run_dir / 'encoder.safetensors'}\nread it with: cpc.load_encoder({str(run_dir)!r})")
    accelerator.wait_for_everyone()
    return run_dir
