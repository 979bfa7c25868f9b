"""Which of the keys that recipes share nothing in a recipe reads.

`norm`, `temperature`, `momentum`, `memory` and `augmentation` stand at the top of a configuration, and encoders,
losses, methods and views refer to those that they have a use for: MoCo v1 has a temperature of its own, torchvision's
trunks their own normalisation. A key that nothing refers to changes nothing, and whoever gives it has to hear of that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SHARED = ("norm", "temperature", "momentum", "memory", "augmentation")
"""Keys, and groups of keys, that are there to be referred to."""

CHOSEN_FROM = ("loss", "ladder")
"""Groups that hold more than one recipe takes: what it refers to is read, the rest is not."""


def read_keys(configuration: Mapping[str, Any]) -> set[str]:
    """The dotted names that a configuration, its references unresolved, refers to from what is built, at any remove.

    Example: `read_keys({"encoder": {"norm": "${norm}"}, "loss": {"t": "${temperature.dot}"}, "norm": "layer"})` is
    {"norm"}.
    """
    found: set[str] = set()
    nodes = [node for name, node in configuration.items() if name not in (*SHARED, *CHOSEN_FROM)]
    while nodes:
        new = set(_references(nodes.pop())) - found
        found |= new
        nodes += [_at(configuration, name) for name in new]
    return found


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _references(item)
    elif isinstance(node, str):
        yield from re.findall(r"\$\{(\w[\w.]*)\}", node)


def _at(configuration: Any, name: str) -> Any:
    for part in name.split("."):
        configuration = configuration.get(part) if isinstance(configuration, Mapping) else None
    return configuration


def unread_keys(configuration: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """A line for each override of a shared key that changes nothing, with the key that does where there is one.

    Args:
        configuration: as composed, its references unresolved.
        overrides: of the command line, as hydra has them.

    Example: with `method=moco_v1 temperature.cosine=0.5` it is ["temperature.cosine=0.5 changes nothing in this recipe:
    pass method.temperature"].
    """
    read = read_keys(configuration)
    if not isinstance(configuration.get("temperature"), Mapping):  # distillation's own, a number, which it reads
        read.add("temperature")
    given = {override: override.lstrip("+~").partition("=")[0] for override in overrides}
    return [
        f"{override} changes nothing in this recipe: {_instead(configuration, key.partition('.')[0], read)}"
        for override, key in given.items()
        if key.partition(".")[0] in SHARED and not any(_within(name, key) or _within(key, name) for name in read)
    ]


def _within(name: str, group: str) -> bool:
    return f"{name}.".startswith(f"{group}.")


def _instead(configuration: Mapping[str, Any], group: str, read: set[str]) -> str:
    own = [key for key in (f"encoder.{group}", f"method.{group}") if _at(configuration, key) is not None]
    others = sorted(name for name in read if _within(name, group))
    return f"pass {own[0]}" if own else f"it reads {', '.join(others)}" if others else "leave it out"
