"""Mistakes of a user, told in one line on stderr: which errors are such, what hydra's mean, and the way out of them.

With HYDRA_FULL_ERROR=1, hydra's own switch, they come with their whole traceback.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from contrastive_core.data import TooManyBadImages, UndecodableImage
from cpc.configs import config_folder

# what a user can mend: told in one line, without a traceback
USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    TooManyBadImages,
    UndecodableImage,
    OmegaConfBaseException,
)

# what constructors raise for numbers that nobody has thought of; USER_ERRORS go through as they are
UNFORESEEN = (TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError)

_TRACEBACK = "CPC_TRACEBACK"


@contextmanager
def hydra_raises() -> Iterator[None]:
    """Have hydra raise what is wrong with a configuration: by itself it prints several lines and exits with code 1.

    Its switch for that is the one by which people ask for a traceback; whether they did is handed on, also to the
    processes that a launcher starts.
    """
    before = {name: os.environ.get(name) for name in (_TRACEBACK, "HYDRA_FULL_ERROR")}
    os.environ.setdefault(_TRACEBACK, before["HYDRA_FULL_ERROR"] or "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def wants_traceback() -> bool:
    """Whether HYDRA_FULL_ERROR=1 was given: a mistake is to be told with its whole traceback."""
    return os.environ.get(_TRACEBACK, os.environ.get("HYDRA_FULL_ERROR")) == "1"


def out_of_memory(error: Exception) -> bool:
    """Whether it was memory that was lacking, on a GPU or a CPU, where torch raises a RuntimeError like any other."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def way_out(error: Exception) -> str:
    """What to do about an error that torch raises for want of memory or of another process; "" = it is none of them."""
    if out_of_memory(error):
        return "out of memory: pass a smaller batch_size, accumulate=N, recompute=true or precision=bf16"
    if "DataLoader worker (pid" in str(error):
        return "a process that decodes images was ended from outside, as for want of memory: pass fewer workers"
    # gloo names its source file in what it says, but to those who wait for something else where one wait has timed out
    if isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "pair closure" in str(error):
        return "another process failed or did not answer: its own output says why; resume=auto goes on"
    return ""


def told(error: BaseException, keys: Collection[str] = ()) -> int:
    """Print a mistake in one line on stderr; returns the exit code, 2. `keys`: those of the tool's configuration."""
    text = str(error)
    if "in DataLoader worker process" in text:  # torch puts the worker's whole traceback before what it said
        text = text.strip().rpartition("\n")[2].partition(": ")[2]
    text = " ".join(text.split())
    if isinstance(error, HydraException):
        text = _in_one_line(text, error.__cause__, keys)
    for said, meaning in _HYDRA_SAYS.items():
        if found := re.fullmatch(said, text):
            text = found.expand(meaning)
    print(f"error: {text or type(error).__name__}", file=sys.stderr)
    return 2


_HYDRA_SAYS = {
    r"Error parsing override '(.*?)' missing EQUAL .*": r"'\1' has no value: pass \1=VALUE",
    r"Config group override must be a string or a list\..*": "a group is chosen by a name: pass KEY=NAME",
    r"Interpolation key '(.*?)' not found full_key: (\S+) .*": r"\2 is taken from \1, which is not there: pass it",
    r"Key '(\w+)' not in '\w+Schema' full_key: .*": r"~\1: this key cannot be left out, pass \1=VALUE",
    r"Cannot instantiate config of type (\w+)\..*": r"a \1 where something is to be built: pass its keys",
    r"Error merging override (\S+): .* is not a ListConfig, list or tuple\..*": r"\1: pass a list, [A,B]",
    r"Error merging override (\S+): .* could not be converted to Integer.*": r"\1: pass a whole number",
    r"Error merging override (\S+): .* could not be converted to Float.*": r"\1: pass a number",
    r"Error merging override (\S+): .* is not a valid bool.*": r"\1: pass true or false",
    r"Error merging override (\S+): Cannot convert '.*?' to string.*": r"\1: pass a word",
    r"Error merging override (\S+): field '[\w.]+' is not Optional": r"\1: pass a value",
    r"Error merging override (\S+): Invalid type assigned: .* is not a subclass of \w+Schema.*": r"\1: pass its keys",
    r"Error merging override ~(\S+): \w+Schema .* does not support deletion": r"~\1: this key cannot be left out",
    # of keys that are typed after they were merged, those of a protocol
    r"Value '(.*)' of type '\w+' could not be converted to Integer full_key: (\S+) .*": r"\2=\1: pass a whole number",
    r"Value '(.*)' of type '\w+' could not be converted to Float full_key: (\S+) .*": r"\2=\1: pass a number",
    r"Cannot convert '\w+' to string: '(.*)' full_key: (\S+) .*": r"\2=\1: pass a word",
    r"Incompatible value 'None' for field of type '\w+' full_key: (\S+) .*": r"\1=null: pass a value",
}
"""What hydra and omegaconf say in words of their own code, and what it means to somebody at a command line."""


def _in_one_line(text: str, cause: BaseException | None, keys: Collection[str]) -> str:
    """What hydra says of a configuration, without its folders, and with the key that was probably meant."""
    if unknown := re.match("Could not override '([^']+)'", text):
        nested = "." in unknown[1] or not keys
        name = unknown[1].rpartition(".")[2]
        known = _known_keys() if nested else set(keys)
        meant = difflib.get_close_matches(name, known - {name}, n=1, cutoff=0.7)
        adding = f"; +{unknown[1]}=VALUE adds an argument to what is built there" if "." in unknown[1] else ""
        return f"{unknown[0]}: there is no such key" + (f"; did you mean {meant[0]!r}?" if meant else "") + adding
    text = text.partition(" Config search path:")[0]
    if choice := re.search(r"Could not find '[\w/]*?(\w+)' Available options in '[\w/]+': (.*)$", text):
        close = difflib.get_close_matches(choice[1], choice[2].split(), n=1)
        text += f"; did you mean {close[0]!r}?" if close else ""
    reason = "" if cause is None else str(cause).partition("\n")[0].strip()
    return text if reason in text else f"{text}: {reason}"


def _known_keys() -> set[str]:
    """Every key that some recipe names."""
    files = Path(config_folder()).rglob("*.yaml")
    return {key for file in files for key in re.findall(r"^ *(\w+):", file.read_text(), flags=re.MULTILINE)}
