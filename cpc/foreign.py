"""What a run's folder says, read as data. The folder may come from anyone: nothing in it names code that is called.

`hydra.utils.instantiate` calls whatever a `_target_` names, at any depth, and resolves every reference. So what a run
wrote down goes into a configuration only where it is plain: numbers, words, and lists of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive_core.reading import read_yaml

READERS = tuple(
    f"contrastive_core.data.{name}"
    for name in ("mnist5k", "parquet", "imagefolder", "torchvision_dataset", "webdataset", "huggingface")
)
"""The readers of data that a run's config.yaml may name, letter by letter: a prefix would let our imports through."""


AUGMENTATIONS = tuple(f"cpc.patch_augment.patch_augment_{name}" for name in ("v1", "v2", "digits"))
"""The augmentations of patches that a run's config.yaml may name, letter by letter."""


def is_plain(value: Any) -> bool:
    """Whether hydra would take a value as it is: a number, a word without a reference, None, or a list of these.

    Example: [1, "a"] is; {"_target_": "f"} and "${oc.env:HOME}" are not.
    """
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and "${" not in value)


def check_plain(arguments: Mapping[str, Any], source: Path | str) -> None:
    """Raise ValueError that names the first argument that is not plain, or whose name hydra would act upon."""
    for name, value in arguments.items():
        if not isinstance(name, str) or name.startswith("_") or not is_plain(value):
            raise ValueError(f"{source} says {name}={value!r}: only numbers, words and lists of these are read from it")


def run_config(run: str | Path) -> tuple[Path, dict[str, Any]]:
    """The path of a run's config.yaml, and what it says: {} where there is none. `run`: as `cpc.load_encoder`'s path.

    Raises ValueError for a file that is no configuration.
    """
    written = Path(run) / "config.yaml" if Path(run).is_dir() else Path(run).with_name("config.yaml")
    if not written.is_file():
        return written, {}
    config = read_yaml(written)
    if not isinstance(config, dict):
        raise ValueError(f"{written} is not a run's configuration: it holds no keys")
    return written, config


def run_data(run: str | Path) -> dict[str, Any]:
    """The data that a run was trained on, as a configuration writes it: one of `READERS` with plain arguments.

    Raises FileNotFoundError where no config.yaml says it, ValueError where another reader, or no plain value, is named.
    """
    written, config = run_config(run)
    data = config.get("data")
    if not isinstance(data, dict):
        raise FileNotFoundError(f"no {written} that says on which data the run was trained: pass data=NAME")
    reader = data.get("_target_")
    if reader not in READERS:
        raise ValueError(f"{written} reads its data through {reader}, which is not ours: pass data=NAME")
    arguments = {name: value for name, value in data.items() if name != "_target_"}
    check_plain(arguments, written)
    return {"_target_": reader, **arguments}


def run_augmentation(run: str | Path) -> dict[str, Any]:
    """The augmentation of patches that a run was trained with, as a configuration writes it: one of `AUGMENTATIONS`.

    {} where it has none. Raises ValueError where another one, or no plain value, is named.
    """
    written, config = run_config(run)
    views = config.get("views")
    node = views.get("patch_augment") if isinstance(views, dict) else None
    if node is None:
        return {}
    name = node.get("_target_") if isinstance(node, dict) else node
    if name not in AUGMENTATIONS:
        raise ValueError(f"{written} augments patches by {name}, which is not ours")
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    check_plain(arguments, written)
    return {"_target_": name, **arguments}
