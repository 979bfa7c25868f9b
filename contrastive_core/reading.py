"""JSON and YAML that may come from anyone: read as data, within bounds.

A parser of a short file can be made to take all memory (a YAML of aliases to aliases) or to fall over its own depth.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

LARGEST = 1 << 20
"""Bytes of a file that describes something; ours have a few thousand."""

DEEPEST = 32
"""Lists and mappings within one another; ours are ten deep at most."""


class _WithoutAliases(yaml.SafeLoader):
    """PyYAML's safe loader, which builds numbers, words, lists and mappings only, without repeats by reference."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it repeats a part by reference (*), which no file of ours does")
        return super().compose_node(parent, index)


def read_json(path: Path, *, largest: int = LARGEST) -> Any:
    """What a JSON file says.

    Raises ValueError, in one line that names the file, for one that is no JSON or text, larger than `largest` bytes or
    nested deeper than `DEEPEST`; OSError where it cannot be read.

    Example: a file of `[[1]]` gives [[1]]; one of 100,000 times `[` is a ValueError.
    """
    try:
        return _bounded(json.loads(_text(path, largest)))
    except (ValueError, RecursionError) as error:
        raise _refused(path, error) from None


def parse_json(text: bytes, where: str) -> Any:
    """What a piece of JSON says; ValueError as `read_json`'s, with `where` in place of a file's name.

    Example: `parse_json(b"[1]", "line 1")` is [1].
    """
    try:
        return _bounded(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise _refused(where, error) from None


def read_yaml(path: Path, *, largest: int = LARGEST) -> Any:
    """The same of YAML, of numbers, words, lists and mappings; tags and repeats by reference are refused too."""
    try:
        return _bounded(yaml.load(_text(path, largest), _WithoutAliases))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _refused(path, error) from None


def _text(path: Path, largest: int) -> str:
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return content.decode()


def _bounded(value: Any) -> Any:
    layer = [value]
    for _ in range(DEEPEST):
        inner = [each for each in layer if isinstance(each, list | dict)]
        if not inner:
            return value
        layer = [item for each in inner for item in (each.values() if isinstance(each, dict) else each)]
    raise ValueError(f"it is nested deeper than {DEEPEST}")


def _refused(path: Path | str, error: Exception) -> ValueError:
    said = f"it is nested deeper than {DEEPEST}" if isinstance(error, RecursionError) else " ".join(str(error).split())
    return ValueError(f"{path} cannot be read: {said}")
