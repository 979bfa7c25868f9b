"""Resumable state of a run, and the encoder that comes out of it.

Tensors go to safetensors, everything else to JSON: loading runs no code. A checkpoint is a folder written under a
temporary name beside its place and renamed, so that a reader sees a whole one or none.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors (which refuses channels_last, hence the copy)."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        same = tensor.shape == parameter.shape
        state.setdefault(int(index), {})[name] = torch.empty_like(parameter).copy_(tensor) if same else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    folder: Path, step: int, modules: dict[str, nn.Module], optimizer: Optimizer, extra: dict[str, Any], keep: int = 2
) -> Path:
    """Write `folder/step_00000123` and remove all but the last `keep` checkpoints.

    Args:
        folder: the run's `checkpoints`.
        step: optimizer steps done.
        modules: by name, e.g. the method and its averaged copy.
        optimizer: its state is stored too; its hyper-parameters come from the configuration.
        extra: whatever else is JSON.
    """
    target = folder / f"step_{step:08d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, module in modules.items():
        save_tensors(module.state_dict(), partial / f"{name}.safetensors")
    save_tensors(optimizer_tensors(optimizer), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, **extra}, indent=1))
    for file in partial.iterdir():
        _sync(file)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _sync(folder)
    for old in sorted(folder.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps under `folder`, or None."""
    return max(folder.glob("step_*"), default=None)


def load_checkpoint_(checkpoint: Path, modules: dict[str, nn.Module], optimizer: Optimizer) -> dict[str, Any]:
    """Restore modules and optimizer in place; returns the JSON that was stored, with `step`.

    Raises ValueError, before anything is changed, for a file that is missing or damaged.
    """
    try:
        tensors = {name: load_file(checkpoint / f"{name}.safetensors") for name in (*modules, "optimizer")}
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} is damaged ({error}): remove it to resume from the one before") from error
    for name, module in modules.items():
        module.load_state_dict(tensors[name])
    restore_optimizer_(optimizer, tensors["optimizer"])
    return state


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
        partial = folder / f"{name}.partial"
        save_tensors(module.state_dict(), partial)
        partial.rename(folder / f"{name}.safetensors")
    described = folder / "encoder.json.partial"
    described.write_text(json.dumps(card, indent=1) + "\n")
    described.rename(folder / "encoder.json")
    return folder / "encoder.safetensors"
