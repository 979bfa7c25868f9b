"""Resumable state of a run, and the encoder that comes out of it.

Tensors go to safetensors, everything else to JSON: loading runs no code. A checkpoint is a folder written under a
temporary name beside its place, brought to the disk and renamed, so that a reader sees a whole one or none; whether the
disk gives back what it was given is told by its manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from contrastive_core.reading import read_json
from contrastive_core.sharding import split_like, whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def save_tensors(tensors: dict[str, Tensor], path: Path, *, finite: Collection[str] = ()) -> None:
    """Write tensors as safetensors (which refuses channels_last, hence the copy). Raises OSError where it cannot.

    finite: names of those that have to be; FloatingPointError, before anything is written, where one is not.
    """
    here = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    for name in finite:
        if not here[name].isfinite().all():
            raise FloatingPointError(f"{name} has become infinite or no number")
    path.touch()
    permissions = path.stat().st_mode  # as the user's files have them; those that safetensors writes nobody else reads
    try:
        save_file(here, path)
        path.chmod(permissions)
    except SafetensorError as error:  # what the file system says, in safetensors' words
        raise OSError(f"cannot write {path}: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within: a path to write to, which then takes the place of `path`, whole and on the disk, or, on an error, not."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        _sync(partial)
        partial.rename(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `PARAMETER_INDEX.NAME`, e.g. "0.exp_avg"."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def restore_optimizer_(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, in the memory layout of the parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if tensor.ndim == 0 and parameter.numel() == 1 and name != "step":  # of a learned number, once a scalar
            tensor = tensor.reshape(parameter.shape)
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter).copy_(split_like(tensor, parameter))
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def take_part(modules: dict[str, nn.Module], optimizer: Optimizer) -> None:
    """What every other process does while one saves: it gives its parts of tensors that are split (`sharding`)."""
    for tensors in (*(module.state_dict() for module in modules.values()), optimizer_tensors(optimizer)):
        for tensor in tensors.values():
            whole(tensor)


def save_checkpoint(
    folder: Path, step: int, modules: dict[str, nn.Module], optimizer: Optimizer, extra: dict[str, Any], keep: int = 2
) -> Path:
    """Write `folder/step_00000123` and remove all but the last `keep` checkpoints.

    Args:
        folder: the run's `checkpoints`.
        step: optimizer steps done.
        modules: by name, e.g. the method and its averaged copy. Where their parameters are split over processes, the
            others must `take_part`; what is written is whole.
        optimizer: its state is stored too; its hyper-parameters come from the configuration.
        extra: whatever else is JSON.

    Raises FloatingPointError where a parameter is not finite: the checkpoints before stay.
    """
    target = folder / f"step_{step:08d}"
    partial = folder / f".{target.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".step_*"):  # of a run that was killed here
        _delete(left_over)
    try:
        partial.mkdir()
        for name, module in modules.items():
            learned = [key for key, _ in module.named_parameters()]
            save_tensors(module.state_dict(), partial / f"{name}.safetensors", finite=learned)
        save_tensors(optimizer_tensors(optimizer), partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **extra}, indent=1))
        (partial / MANIFEST).write_text(json.dumps(_contents(partial), indent=1))
        for file in (*partial.iterdir(), partial):
            _sync(file)
    except FloatingPointError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise FloatingPointError(f"{error} by step {step}: lower optimizer.lr, or look at its other settings") from None
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise
    _remove(target)
    partial.rename(target)
    for path in (folder, folder.parent):
        _sync(path)
    for old in _superseded(folder, target, keep):
        _remove(old)
    return target


def _contents(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file but the manifest."""
    contents = {}
    for file in sorted(checkpoint.iterdir()):
        if file.name != MANIFEST:
            with file.open("rb") as read:
                digest = hashlib.file_digest(read, "sha256").hexdigest()
            contents[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
    return contents


def checkpoints_in(folder: Path) -> list[Path]:
    """Those under `folder`, damaged ones too, in the order of their steps; copies by other names are none."""
    return sorted(path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal())


def _superseded(folder: Path, latest: Path, keep: int) -> list[Path]:
    """All but the last `keep` up to the latest; those beyond it too, which were too damaged to go on from."""
    found = checkpoints_in(folder)
    until = [checkpoint for checkpoint in found if checkpoint <= latest]
    return [checkpoint for checkpoint in found if checkpoint not in until[-keep:]]


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there, so that at no moment half of one can be seen."""
    if checkpoint.exists():
        going = checkpoint.with_name(f".{checkpoint.name}.removed")
        checkpoint.rename(going)
        _delete(going)


def _delete(path: Path) -> None:
    """A folder, or a file that stands in a checkpoint's place."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, "" = nothing: all that its manifest lists are compared with it.

    Raises OSError where they are there and cannot be read: that says nothing about what they hold.
    """
    try:
        listed: Any = read_json(checkpoint / MANIFEST)
        found = _contents(checkpoint)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return str(error)
    if not isinstance(listed, dict):
        return f"{MANIFEST} is no manifest"
    differing = sorted(name for name in listed if listed[name] != found.get(name))
    return f"{', '.join(differing)} not as written" if differing else ""


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps under `folder` that is whole, or None where there is none at all.

    Damaged ones are skipped with a warning. Raises ValueError where all are: a run that starts anew would hide it;
    OSError where one cannot be read.
    """
    found = checkpoints_in(folder)
    for checkpoint in reversed(found):
        wrong = damage(checkpoint)
        if not wrong:
            return checkpoint
        logger.warning("%s is damaged (%s): going on from the one before", checkpoint, wrong)
    if found:
        raise ValueError(f"every checkpoint in {folder} is damaged: move the folder away to start anew")
    return None


def load_checkpoint_(checkpoint: Path, modules: dict[str, nn.Module], optimizer: Optimizer) -> dict[str, Any]:
    """Restore modules and optimizer in place; returns `read_state`.

    Raises ValueError, before anything is changed, for a file that is missing or cannot be read; and for other modules'
    tensors.
    """
    state = read_state(checkpoint)
    try:
        tensors = {name: load_file(checkpoint / f"{name}.safetensors") for name in (*modules, "optimizer")}
    except (SafetensorError, OSError) as error:
        raise _damaged(checkpoint, error) from error
    try:
        for name, module in modules.items():
            own = module.state_dict()
            split = {key: split_like(value, own.get(key, value)) for key, value in tensors[name].items()}
            module.load_state_dict(split)
        restore_optimizer_(optimizer, tensors["optimizer"])
    except (RuntimeError, LookupError, ValueError) as error:
        raise ValueError(f"{checkpoint} is of another run's making: {' '.join(str(error).split())[:300]}") from error
    return state


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON of a checkpoint, with the optimizer steps done as `step`. Raises ValueError where it cannot be read."""
    try:
        state = read_json(checkpoint / "state.json")
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint, error) from error
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise _damaged(checkpoint, "state.json tells no step")
    return cast(dict[str, Any], state)


def _damaged(checkpoint: Path, error: object) -> ValueError:
    return ValueError(f"{checkpoint} is damaged ({error}): move it away to resume from the one before")


def export_encoder(
    folder: Path, encoder: nn.Module, card: dict[str, Any], beside: Mapping[str, nn.Module] | None = None
) -> Path:
    """Write `encoder.safetensors` and, beside it, `encoder.json`: what it takes to build the encoder and feed it.

    Args:
        folder: the run's.
        encoder, card: the module, and whatever describes it in JSON.
        beside: modules that belong to it, by name: "head" is written to `head.safetensors`.

    All are renamed into place, the card last, so that a reader never sees half a file. Returns the path of the weights.
    """
    for name, module in {**(beside or {}), "encoder": encoder}.items():
        with replacing(folder / f"{name}.safetensors") as partial:
            save_tensors(module.state_dict(), partial)
    with replacing(folder / "encoder.json") as partial:
        partial.write_text(json.dumps(card, indent=1) + "\n")
    return folder / "encoder.safetensors"
