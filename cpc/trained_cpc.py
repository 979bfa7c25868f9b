"""The whole CPC method of a finished run: contexts, prediction heads and loss, beside the encoder that is exported.

An export holds what is of use for images. What the method itself can do, its loss on other images or with other
negatives, takes everything that was trained, which the run's last checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from contrastive_core.checkpoint import latest_checkpoint
from contrastive_core.losses import SigmoidLoss, cosine_info_nce, info_nce
from cpc.context import ContextNetwork
from cpc.features import load_contexts, read_encoder
from cpc.foreign import check_plain, run_config
from cpc.method import CPC

LOSSES: dict[str, Callable[..., Any]] = {
    "info_nce": info_nce,
    "cosine_info_nce": cosine_info_nce,
    "SigmoidLoss": SigmoidLoss,
}
"""The losses of `contrastive_core.losses` that a run's config.yaml may name."""

OWN = ("offsets", "directions", "share_context", "negatives", "negatives_k")
"""What is read of a run's `method`, beside its loss; an older run lacks some, and has their defaults."""


def load_cpc(run: str | Path) -> CPC:
    """Read a finished run's whole method back, the averaged weights where it has them, in eval mode and frozen.

    As everywhere, a run's folder may come from anyone: only our own pieces are built, with plain arguments.

    Raises FileNotFoundError for a folder without a finished run or without its checkpoint, ValueError for a run of
    another method, pieces that are not ours, and weights that are not theirs.
    """
    folder = Path(run)
    written, config = run_config(folder)
    if not folder.is_dir() or not config:
        raise FileNotFoundError(f"{folder} holds no run: pass run=DIR, the folder of a finished CPC run")
    of_method = config.get("method")
    kind = str(of_method.get("_target_", "")) if isinstance(of_method, dict) else ""
    if not isinstance(of_method, dict) or kind != "cpc.method.CPC":
        name = kind.rpartition(".")[2] or "none that is known"
        raise ValueError(f"{folder} is no CPC run, its method is {name}: pass a run of tools/pretrain_cpc.py")
    if not (folder / "encoder.json").is_file():
        raise FileNotFoundError(f"{folder} has not finished: resume=auto with its run_dir goes on, then try again")
    encoder, card = read_encoder(folder)
    load_contexts(folder)  # says what is wrong with them; the weights are the checkpoint's, as all others
    context = card["context"]["networks"].values()
    arguments = {name: of_method[name] for name in OWN if name in of_method}
    check_plain(arguments, written)
    kept = last_weights(folder)
    try:
        method = CPC(
            encoder,
            target_dim=len(kept["target_projection.weight"]),
            context=lambda dim: ContextNetwork(**next(iter(context))),
            loss=_loss(of_method.get("loss"), written),
            **arguments,
        )
        method.load_state_dict(kept)
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"the checkpoint in {folder} is not of the CPC that its config.yaml says: {error}") from None
    return method.eval().requires_grad_(False)


def last_weights(folder: Path) -> dict[str, Tensor]:
    """The method's weights of a run's last whole checkpoint, the averaged ones where it has them.

    Raises FileNotFoundError where there is no checkpoint, ValueError for weights that cannot be read.
    """
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise FileNotFoundError(f"no checkpoint in {folder / 'checkpoints'}, which holds the prediction heads")
    averaged = checkpoint / "averaged.safetensors"
    try:
        return load_file(averaged if averaged.is_file() else checkpoint / "method.safetensors")
    except SafetensorError as error:
        raise ValueError(f"the weights in {checkpoint} cannot be read: {error}") from None


def _loss(described: Any, written: Path) -> Any:
    """The loss that a configuration describes: a function with its arguments, or the module."""
    named = dict(described) if isinstance(described, dict) else {}
    module, _, name = str(named.pop("_target_", "")).rpartition(".")
    named.pop("_partial_", None)
    if module != "contrastive_core.losses" or name not in LOSSES:
        raise ValueError(f"{written} names a loss that is not ours: a run with one of {', '.join(LOSSES)} can be read")
    check_plain(named, written)
    return SigmoidLoss(**named) if name == "SigmoidLoss" else partial(LOSSES[name], **named)
