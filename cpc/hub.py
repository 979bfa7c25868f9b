"""A run's encoder with huggingface_hub's `save_pretrained`, `from_pretrained` and `push_to_hub`.

    PretrainedEncoder.from_run("runs/mnist5k-...").push_to_hub("USER/NAME", model_card_kwargs={"licence": "mit"})
    encoder = PretrainedEncoder.from_pretrained("USER/NAME")  # a frozen nn.Module, as cpc.load_encoder gives it

What is published is what a run's folder has: `encoder.safetensors` and `encoder.json`, CPC's `context.safetensors`,
and a generated README.md. So `cpc.load_encoder` reads a folder of it too, with the same bounds: weights are
safetensors, the card is short JSON, and it names one of our own constructors with plain arguments or it is refused.
The mixin's own config.json is neither written nor read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn

from contrastive_core.checkpoint import export_encoder
from cpc.context import Contexts
from cpc.encoder_card import read_card
from cpc.features import load_contexts, read_encoder
from cpc.frozen_encoder import FrozenEncoder
from cpc.model_card import about_run, model_card

FILES = ("encoder.json", "encoder.safetensors", "context.safetensors")
"""All that is fetched of a repository."""

CODE = """
from cpc.hub import PretrainedEncoder  # pip install "cpc-images[export]"

encoder = PretrainedEncoder.from_pretrained(".")  # this folder, or the repository's USER/NAME
# features = encoder(images): images b 3 h w in [0, 1], any size -> features b d; encoder.readout = "grid" for the grid
"""


class PretrainedEncoder(FrozenEncoder, ModelHubMixin):
    """A `FrozenEncoder` that can be saved, published and fetched. `from_run` and `from_pretrained` build it.

    Args:
        encoder: with its weights.
        card: of the encoder, as `encoder.json` says it.
        context: the context networks of a CPC run.
        mode, readout: as `FrozenEncoder`'s; both may be changed at any time.
    """

    def __init__(
        self,
        encoder: nn.Module,
        card: dict[str, Any],
        *,
        context: Contexts | None = None,
        mode: str | None = None,
        readout: str = "mean",
    ) -> None:
        super().__init__(encoder, **card["input"], context=context, mode=mode, readout=readout)
        self.card = card
        self._hub_mixin_config = None  # the mixin would write what it saw of our arguments as config.json
        self.eval().requires_grad_(False)

    @classmethod
    def from_run(cls, path: str | Path, *, mode: str | None = None, readout: str = "mean") -> Self:
        """The encoder of a run's folder, or of one that `save_pretrained` wrote; `cpc.load_encoder`'s errors."""
        encoder, card = read_encoder(path)
        # of the files beside it only these go along: head and classifier are for this project's own fine-tuning
        published = {name: value for name, value in card.items() if name not in ("head", "classifier")}
        published["about"] = about_run(path)
        context = load_contexts(path) if card.get("context") else None
        encoder.to(memory_format=torch.channels_last)  # as cpc.load_encoder: the same last bits
        return cls(encoder, published, context=context, mode=mode, readout=readout)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        mode: str | None = None,
        readout: str = "mean",
        **where: Any,
    ) -> Self:
        """Read a local folder, or fetch a repository `USER/NAME` first, of it only `FILES`.

        `where`: as `huggingface_hub.snapshot_download` takes it: revision, token, cache_dir, force_download,
        local_files_only.

        Raises FileNotFoundError for a folder that is not there, ValueError where a card names code that is not ours,
        or weights are another's, and what huggingface_hub raises where it cannot fetch.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(str(folder), allow_patterns=list(FILES), **where))
            except HFValidationError:
                raise FileNotFoundError(
                    f"no folder {folder}, and no repository is called that: pass a folder, or USER/NAME"
                ) from None
        read_card(folder)
        return cls.from_run(folder, mode=mode, readout=readout)

    def _save_pretrained(self, save_directory: Path) -> None:
        beside = {} if self.context is None else {"context": self.context.networks}
        export_encoder(save_directory, self.encoder, self.card, beside)

    def generate_model_card(self, *, licence: str | None = None, **unknown: Any) -> ModelCard:
        """The page that `save_pretrained` writes, unless there is one; `model_card_kwargs={"licence": "mit"}`."""
        if unknown:
            raise ValueError(f"model_card_kwargs={unknown}: pass licence only")
        return ModelCard(
            model_card(self.card, self.card["about"], CODE, library="cpc-images", licence=licence),
            ignore_metadata_errors=True,
        )
