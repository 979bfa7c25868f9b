"""Where the YAML files are: in the installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path


def config_folder() -> str:
    """The absolute path of `configs/`: `cpc/configs` in an install, else the checkout's top level.

    Raises FileNotFoundError where neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return str(folder)
    raise FileNotFoundError(f"no configs folder in {package} or beside it: install the package again")
