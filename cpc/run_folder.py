"""A run's folder: choosing it once for all processes, and refusing to write over another run."""

from __future__ import annotations

import random
import string
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from contrastive_core.checkpoint import latest_checkpoint

MAY_CHANGE = ("save_every", "keep_checkpoints", "log_every", "probe_every", "probe_images", "workers", "device",
              "threads", "run_dir", "resume")  # fmt: skip
"""Keys that may differ when a run is resumed: they change what is written or how fast, not what is learned."""


def default_run_dir() -> str:
    """runs/<experiment or data>-<time>-<4 letters>; the letters keep apart two runs of one second."""
    choices = HydraConfig.get().runtime.choices
    name = choices.get("experiment") or choices.get("data") or "run"
    letters = "".join(random.SystemRandom().choices(string.ascii_lowercase, k=4))
    return f"runs/{Path(name).name}-{time.strftime('%Y%m%d-%H%M%S')}-{letters}"


def choose_run_dir(cfg: DictConfig, accelerator: Accelerator) -> Path:
    """`run_dir`, or a new name chosen by the main process for all."""
    chosen = [cfg.run_dir or (default_run_dir() if accelerator.is_main_process else None)]
    if accelerator.num_processes > 1:
        chosen = broadcast_object_list(chosen)
    return Path(chosen[0])


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the keys whose values differ. Example: ({"a": {"b": 1}}, {"a": {"b": 2}}) gives ["a.b"]."""
    names: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            names += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            names.append(f"{prefix}{key}")
    return names


def claim_run_dir(run_dir: Path, cfg: DictConfig, accelerator: Accelerator) -> Path | None:
    """Write `config.yaml` into a fresh folder, or find the checkpoint to resume from.

    Raises FileExistsError for a folder that holds a run unless resume=auto, ValueError when the configuration
    differs from the run's in a key that may not change.
    """
    if cfg.resume not in (None, "auto"):
        raise ValueError(f"resume={cfg.resume}: pass resume=auto with the run's run_dir, or leave it out")
    written = run_dir / "config.yaml"
    held = written.is_file()
    accelerator.wait_for_everyone()  # all have looked before the main process writes
    config = OmegaConf.to_container(cfg, resolve=True)
    if held:
        if cfg.resume is None:
            raise FileExistsError(f"{run_dir} holds a run: pass resume=auto to go on with it, or another run_dir")
        before = OmegaConf.to_container(OmegaConf.load(written))
        assert isinstance(before, dict) and isinstance(config, dict)
        changed = [key for key in differing_keys(before, config) if key.split(".")[0] not in MAY_CHANGE]  # type: ignore[arg-type]
        if changed:
            raise ValueError(f"{run_dir} was run with other settings of {', '.join(changed)}: use its own, or a new run_dir")
        return latest_checkpoint(run_dir / "checkpoints")
    if accelerator.is_main_process:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(config), written)
    accelerator.wait_for_everyone()
    return None
