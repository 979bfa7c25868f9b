"""An encoder as its users want it, images in [0, 1] in, features out, read back from a run's folder.

Patch geometry and normalisation travel with the weights in `encoder.json` (`cpc.encoder_card`), so that nobody has to
remember them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from contrastive_core.heads import ProjectionHead
from contrastive_core.methods.classifier import Classifier
from cpc.context import ContextNetwork, Contexts
from cpc.encoder_card import LARGEST_DEPTH, MISFITS, build_encoder, check_bounds, parts_of, read_card
from cpc.frozen_encoder import FrozenEncoder, Latents
from cpc.grid_classifier import GridClassifier
from cpc.latent_classifier import LatentClassifier

Built = TypeVar("Built", bound=nn.Module)


def load_encoder(
    path: str | Path, *, readout: str = "mean", mode: str | None = None, encoder: nn.Module | None = None
) -> FrozenEncoder:
    """Read a run's encoder back, ready for use.

    Args:
        path: the run's folder, or its `encoder.safetensors`; `encoder.json` must stand beside it.
        readout: "mean" -> features `b d`; "grid" -> `b rows cols d`; "context" -> the grid with the n contexts of
            a CPC run, `b rows cols (1 + n) d`.
        mode: "patches" (the default where the encoder was trained on patches) or "image".
        encoder: the module to put the weights into, for an architecture that is not one of ours.

    Returns an `nn.Module` in eval mode: images `b 3 h w` in [0, 1] of any size -> features.

    Raises FileNotFoundError where a file is missing, ValueError where the card names an unknown encoder or the
    weights are another's.

    Example:
        encoder = cpc.load_encoder("runs/mnist5k-...")
        features = encoder(images)
    """
    encoder, card = read_encoder(path, encoder)
    context = load_contexts(path) if readout == "context" else None
    return _frozen(encoder, card, readout, mode, context)


def read_encoder(path: str | Path, encoder: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The bare encoder of a run with its weights, as trainable as it was built, and its card; `load_encoder`'s errors.

    It takes normalised images or patches; `FrozenEncoder(encoder, **card["input"])` feeds it.
    """
    weights, card = read_card(path)
    if encoder is None:
        encoder = _built_to_fit(lambda: build_encoder(card["architecture"]), weights, "encoder")
    _load_weights_(encoder, weights, "encoder")
    return encoder, card


def untrained_encoder(
    path: str | Path, *, seed: int = 0, readout: str = "mean", mode: str | None = None
) -> FrozenEncoder:
    """The same encoder at random initialisation: what `load_encoder(path)` has to beat with the same readout."""
    _, card = read_card(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(card["architecture"])
        context = build_contexts(card) if readout == "context" else None
    return _frozen(encoder, card, readout, mode, context)


def _load_weights_(module: nn.Module, weights: Path, kind: str) -> None:
    _check_there(weights)
    try:
        module.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights in {weights} are not those of the {kind} that its card describes: {error}"
        ) from None


def _check_there(weights: Path) -> None:
    if not weights.is_file():
        raise FileNotFoundError(f"no {weights.name} in {weights.parent}, though its card tells of one: copy it too")


def _built_to_fit(
    build: Callable[[], Built],
    weights: Path,
    kind: str,
    stored: Callable[[Built], nn.Module] = lambda built: built,
) -> Built:
    """What `build` builds, once it is seen without memory that the file's tensors are its: a card may say anything.

    stored: the part of it that is in the file.
    """
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in stored(build()).state_dict().items()}
    _check_there(weights)
    try:
        with safe_open(weights, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"the weights in {weights} cannot be read: {error}") from None
    wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if wrong:
        of_file, of_card = (shapes.get(wrong[0], "missing") for shapes in (found, wanted))
        raise ValueError(
            f"the weights in {weights} are not those of the {kind} that its card describes: {wrong[0]} is {of_file} in "
            f"the file, {of_card} by the card"
        )
    return build()


def _frozen(
    encoder: nn.Module, card: dict[str, Any], readout: str, mode: str | None, context: Contexts | None
) -> FrozenEncoder:
    channels_last = encoder.to(memory_format=torch.channels_last)
    frozen = FrozenEncoder(channels_last, **card["input"], mode=mode, readout=readout, context=context)
    return frozen.eval().requires_grad_(False)


# ---- what stands beside an encoder: the head that pre-training had, the classifier that fine-tuning left ----


def load_head(path: str | Path) -> ProjectionHead:
    """Read the projection head of a run's pre-training back, features `b d` -> projections `b out`, in train mode.

    Args: `path`: as `load_encoder`'s.

    Raises FileNotFoundError where a file is missing, ValueError where the run has no head or its card is another's.
    """
    weights, card = read_card(path)
    if not card.get("head"):
        raise ValueError(
            f"the run in {weights.parent} has no projection head ({card.get('method')}): pass head_layer=0"
        )
    weights = weights.with_name("head.safetensors")
    head = _built_to_fit(lambda: _build_head(card["head"]), weights, "head")
    _load_weights_(head, weights, "head")
    return head


def build_contexts(card: dict[str, Any]) -> Contexts:
    """The context networks that a card describes, at random weights; ValueError where it describes none, or badly."""
    described = card.get("context")
    if not described:
        raise ValueError(f'this run has no context networks ({card.get("method")}): pass readout="grid"')
    try:
        if len(described["networks"]) > LARGEST_DEPTH:
            raise ValueError(f"{len(described['networks'])} networks")
        for arguments in described["networks"].values():
            check_bounds(arguments)
        networks = {name: ContextNetwork(**arguments) for name, arguments in described["networks"].items()}
        return Contexts(nn.ModuleDict(networks), {d: str(described["context_of"][d]) for d in described["context_of"]})
    except MISFITS as error:
        raise ValueError(f"encoder.json describes context networks that cannot be built: {error!r}") from error


def load_contexts(path: str | Path) -> Contexts:
    """Read the context networks of a CPC run back, latents `b rows cols d` -> `b rows cols (1 + n) d`.

    Args: `path`: as `load_encoder`'s. Raises as `load_head`.
    """
    weights, card = read_card(path)
    weights = weights.with_name("context.safetensors")
    networks = _built_to_fit(lambda: build_contexts(card).networks, weights, "context networks")
    _load_weights_(networks, weights, "context networks")
    return Contexts(networks, card["context"]["context_of"])


def read_classifier(path: str | Path) -> tuple[Classifier | GridClassifier, dict[str, Any]]:
    """The bare classifier of a fine-tuned or distilled run, as trainable as it was built, and the run's card.

    It takes normalised images. Raises ValueError for a run that has none, else as `load_encoder`.
    """
    weights, card = read_card(path)
    described = card.get("classifier")
    if not isinstance(described, dict):
        raise ValueError(
            f"the run in {weights.parent} has no classifier ({card.get('method')}): pass a fine-tuned one's folder"
        )
    encoder, card = read_encoder(path)
    contexts = load_contexts(path) if "grid" in described and card.get("context") else None
    weights = weights.with_name("classifier.safetensors")

    def stored(classifier: nn.Module) -> nn.Module:
        return parts_of(classifier)["classifier"]

    def built() -> Classifier | GridClassifier:
        if "grid" in described:
            geometry = {name: card["input"].get(name) for name in ("patch_size", "stride")}
            return _build_grid_classifier(encoder, contexts, geometry, described)
        return _build_classifier(encoder, described)

    classifier = _built_to_fit(built, weights, "classifier", stored)
    _load_weights_(stored(classifier), weights, "classifier")
    return classifier, card


def _build_classifier(encoder: nn.Module, described: dict[str, Any]) -> Classifier:
    try:
        kept = _build_head(described["head"]).upto(described["head_layer"]) if described["head"] else None
        return Classifier(encoder, classes=len(described["class_names"]), head=kept)
    except MISFITS as error:
        raise ValueError(f"encoder.json describes a classifier that cannot be built: {error!r}") from error


def _build_grid_classifier(
    encoder: nn.Module, contexts: Contexts | None, geometry: dict[str, Any], described: dict[str, Any]
) -> GridClassifier:
    try:
        grid = described["grid"]
        check_bounds(grid["arguments"])
        if grid["arguments"]["classes"] != len(described["class_names"]):
            raise ValueError(f"{grid['arguments']['classes']} classes with {len(described['class_names'])} names")
        latents = Latents(encoder, **geometry, readout=grid["readout"], context=contexts)
        return GridClassifier(latents, LatentClassifier(**grid["arguments"]))
    except MISFITS as error:
        raise ValueError(f"encoder.json describes a classifier that cannot be built: {error!r}") from error


def load_classifier(path: str | Path) -> FrozenClassifier:
    """Read a fine-tuned or distilled run back, ready for use: images `b 3 h w` in [0, 1] -> logits `b classes`.

    Args: `path`: as `load_encoder`'s. Raises as `read_classifier`.

    Example:
        classes = load_classifier("runs/finetuned")(images).argmax(1)
    """
    classifier, card = read_classifier(path)
    classifier.to(memory_format=torch.channels_last)
    frozen = FrozenClassifier(classifier, card["input"], card["classifier"]["class_names"])
    return frozen.eval().requires_grad_(False)


class FrozenClassifier(nn.Module):
    """Logits of images `b 3 h w` in [0, 1]; another size is resized and cropped as `FrozenEncoder` does.

    Args:
        classifier: of normalised images.
        fed: what a card calls `input`: image_size, mean, std and perhaps load_size, patch_size and stride.
        class_names: a name a class.
    """

    def __init__(
        self, classifier: Classifier | GridClassifier, fed: dict[str, Any], class_names: Sequence[str]
    ) -> None:
        super().__init__()
        self.head: nn.Module = nn.Identity()
        if isinstance(classifier, GridClassifier):
            latents = classifier.latents
            self.encoder = FrozenEncoder(latents.encoder, **fed, readout=latents.readout, context=latents.context)
        else:
            self.encoder, self.head = FrozenEncoder(classifier.encoder, **fed, mode="image"), classifier.head
        self.classifier = classifier.classifier
        self.class_names = tuple(class_names)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.head(self.encoder(images)))
        return logits


def _build_head(arguments: dict[str, Any]) -> ProjectionHead:
    try:
        check_bounds(arguments)
        return ProjectionHead(**arguments)
    except MISFITS as error:
        raise ValueError(f"the card's head is no ProjectionHead's: {error}") from None
