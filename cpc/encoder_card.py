"""What `encoder.json` says: how to build an encoder, what to feed it, and what stands beside it.

A card may come from anyone, so it names constructors of ours alone, with plain arguments within bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import contrastive_core.encoders
import contrastive_core.simclr_resnet
import cpc.encoders
from contrastive_core.heads import ProjectionHead
from contrastive_core.methods.classifier import Classifier
from contrastive_core.reading import read_json
from cpc.context import ContextNetwork
from cpc.foreign import check_plain
from cpc.grid_classifier import GridClassifier

LARGEST_ARGUMENT = 100_000
"""Of widths and sizes that a file may ask of a module, which is built before it is held to its weights."""

LARGEST_DEPTH = 1000
"""Of blocks and layers in all, and the longest list: building takes time even where it takes no memory."""

LARGEST_CARD = 1 << 24
"""Bytes of an encoder.json: it may name 100,000 classes."""

MISFITS = (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError, AttributeError, AssertionError)
"""What constructors raise for arguments that they do not take, ours and other libraries'."""

# where a trunk's first weights came from: the file's own take their place, so nothing is fetched
_FIRST_WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")


def constructors() -> dict[str, Callable[..., nn.Module]]:
    """The encoders that an `encoder.json` may name: no other code is ever called on a file's say-so."""
    modules = (cpc.encoders, contrastive_core.encoders, contrastive_core.simclr_resnet)
    return {f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in module.ENCODERS}


def known_architecture(architecture: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of one of our constructors and plain arguments for it, from a card; ValueError for anything else."""
    name, known = architecture["name"], constructors()
    if name not in known:
        raise ValueError(
            f"encoder {name!r} is not one of {', '.join(sorted(known))}: "
            f"pass load_encoder(path, encoder=MODULE) with a module of that architecture"
        )
    arguments = {key: value for key, value in architecture["arguments"].items() if key not in _FIRST_WEIGHTS}
    check_bounds(arguments)
    if ":" in str(arguments.get("name", "")):  # to timm "hf-hub:USER/NAME" and "local-dir:PATH" are places to read from
        raise ValueError(f"encoder.json names the trunk {arguments['name']!r}: pass one of its library's own names")
    return name, arguments


def check_bounds(arguments: dict[str, Any]) -> None:
    """Raise ValueError for arguments of a card that are not plain, or such that nothing real is built of them."""
    check_plain(arguments, "encoder.json")
    for name, value in arguments.items():
        numbers = [abs(number) for number in _flat([value]) if isinstance(number, int | float)]
        if max(numbers, default=0) > LARGEST_ARGUMENT:
            raise ValueError(f"encoder.json says {max(numbers):.3g} where nothing has more than {LARGEST_ARGUMENT}")
        deep = name in ("blocks", "layers", "depth", "depths") and sum(numbers) > LARGEST_DEPTH
        if deep or len(numbers) > LARGEST_DEPTH:
            raise ValueError(f"encoder.json's {name} is beyond {LARGEST_DEPTH}, which nothing has in all")


def build_encoder(architecture: dict[str, Any]) -> nn.Module:
    """The encoder of a card's `architecture`: {"name": "cpc.encoders.resnet_small", "arguments": {"width": 32}}.

    Raises ValueError for a constructor that is not ours or arguments that are not its.
    """
    name, arguments = known_architecture(architecture)
    try:
        return constructors()[name](**arguments)
    except MISFITS as error:
        raise ValueError(f"{name} does not take what encoder.json gives it: {error}") from error


def read_card(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The path of the weights and the parsed card, of a run's folder or of its `encoder.safetensors`.

    Raises FileNotFoundError where one is missing, ValueError for a card that cannot be read or is none.
    """
    weights = Path(path) / "encoder.safetensors" if Path(path).is_dir() else Path(path)
    card = weights.with_suffix(".json")
    for file in (weights, card):
        if not file.is_file() or weights.suffix != ".safetensors":
            raise FileNotFoundError(
                f"no {file.name} in {file.parent}: pass the folder of a finished run, or its encoder.safetensors"
            )
    parsed: dict[str, Any] = read_json(card, largest=LARGEST_CARD)
    try:
        described = isinstance(parsed["architecture"]["name"], str)
        described &= isinstance(parsed["architecture"]["arguments"], dict)
        described &= _is_input(**parsed["input"])
    except (LookupError, TypeError, AttributeError, OverflowError):
        described = False
    if not described:
        raise ValueError(
            f"{card} is not an encoder's card: it holds no architecture {{name, arguments}} and input "
            f"{{image_size, mean, std}}"
        )
    return weights, parsed


def _is_input(
    image_size: Any, mean: Any, std: Any, load_size: Any = None, patch_size: Any = None, stride: Any = None
) -> bool:
    """Whether these are pixels and colours; TypeError for names that are none of an input's."""
    if not patch_size:  # null: an encoder of whole images
        patch_size = stride = image_size
    pixels = all(type(size) is int for size in (image_size, load_size or image_size, patch_size, stride))
    colours = all(isinstance(each, list) and len(each) == 3 for each in (mean, std))
    return (
        pixels
        and colours
        and all(isinstance(number, int | float) and math.isfinite(number) for number in (*mean, *std))
        and 0 < patch_size <= image_size <= LARGEST_ARGUMENT
        and 0 < stride <= image_size
        and 0 < (load_size or image_size) <= LARGEST_ARGUMENT
        and min(std) > 0
    )


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, list) else [value]


# ---- what stands beside an encoder ----


def parts_of(method: nn.Module) -> dict[str, nn.Module]:
    """What a run keeps beside its encoder, by the name of its file; perhaps nothing.

    "head" is a `ProjectionHead`; "context" the `ContextNetwork`s of CPC, or those that a `GridClassifier` reads;
    "classifier" what a `Classifier` or a `GridClassifier` has above its latents, of `Distill` the student's.
    """
    learner = getattr(method, "student", method)
    if isinstance(learner, GridClassifier):
        read = learner.latents.context
        return {"classifier": learner.classifier} | ({} if read is None else {"context": read.networks})
    if isinstance(learner, Classifier):
        return {"classifier": nn.ModuleDict({"head": learner.head, "classifier": learner.classifier})}
    head, contexts = getattr(learner, "head", None), getattr(learner, "contexts", None)
    if isinstance(contexts, nn.ModuleDict) and all(isinstance(each, ContextNetwork) for each in contexts.values()):
        return {"context": contexts}
    return {"head": head} if isinstance(head, ProjectionHead) else {}


def parts_card(method: nn.Module, class_names: Sequence[str]) -> dict[str, Any]:
    """What `encoder.json` says of `parts_of(method)`; a classifier that keeps layers of a head: `classifier_card`."""
    parts = parts_of(method)
    if isinstance(method, GridClassifier):
        read = method.latents.context
        context = {} if read is None else contexts_card(read.networks, read.context_of)
        return {"classifier": {"class_names": list(class_names), "grid": method.described}} | context
    if "classifier" in parts:
        return classifier_card(class_names) if isinstance(parts["classifier"].head, nn.Identity) else {}
    if "context" in parts:
        context_of: Any = method.context_of
        return contexts_card(parts["context"], context_of)
    return {name: head.arguments for name, head in parts.items()}


def contexts_card(networks: nn.Module, context_of: Mapping[str, str]) -> dict[str, Any]:
    """What `encoder.json` says of context networks."""
    described = {name: network.arguments for name, network in networks.named_children()}
    return {"context": {"networks": described, "context_of": dict(context_of)}}


def classifier_card(
    class_names: Sequence[str], head: dict[str, Any] | None = None, head_layer: int = 0
) -> dict[str, Any]:
    """What `encoder.json` says of a classifier on the first `head_layer` layers of a head with these arguments."""
    return {"classifier": {"class_names": list(class_names), "head": head, "head_layer": head_layer}}
