"""What `--help` says: a tool's configuration file, read for people.

The head of configs/TOOL.yaml says what the tool does and gives examples, and every key has its line there; so the help
is those lines, and cannot grow stale beside them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

WIDTH = 110
HIDDEN = {"hydra", "recipe"}
"""Groups that are not chosen by hand."""

EVERYWHERE = """everywhere:
  verbosity=quiet|normal|verbose   quiet: warnings on stderr, and the path of the result on stdout;
                                   verbose: versions and the whole configuration first
  --cfg job                        print the configuration that would run, and do nothing
  --config-dir DIR                 a folder with pieces of your own: DIR/encoder/mine.yaml is encoder=mine
  --multirun, -m                   one run for each value: seed=0,1,2
  --help, --hydra-help             this; hydra's own options

exit codes: 0 done; 1 something failed that is no mistake of the command line; 2 a mistake, told in one line (its
traceback with HYDRA_FULL_ERROR=1); 130 after Ctrl-C and 143 after SIGTERM, saved where there is something to save.
accelerate launch itself exits with 1 whatever the tool's code.
"""

_KEY = re.compile(r"^(  )?([\w.]+): *((?:[^#'\"]|'[^']*'|\"[^\"]*\"|(?<! )#)*?)(?: +# *(.*))?$")


def head(lines: Sequence[str]) -> list[str]:
    """The comment that a file begins with, without its `#`."""
    found = []
    for line in lines:
        if not line.startswith("#"):
            break
        found.append(line[2:].rstrip())
    return found


def defaults(lines: Sequence[str]) -> list[str]:
    """The entries of a file's defaults list. Example: ["- override /views: simclr  # the paper's"] gives ["views"]."""
    entries = [re.match(r"^ *- (?:optional )?(?:override )?/?([\w@/]+)", line) for line in lines]
    return [found[1].partition("@")[0] for found in entries if found]


def own_lines(folder: Path, name: str) -> list[str]:
    """The lines of configs/NAME.yaml and of those that it is built on, its own first."""
    lines = (folder / f"{name}.yaml").read_text().splitlines()
    built_on = [base for base in defaults(lines) if (folder / f"{base}.yaml").is_file()]
    return [*lines, *(line for base in built_on for line in own_lines(folder, base))]


def keys(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`key=value` and its comment, line by line; ("", "") where the file leaves a line free."""
    parent = ""
    for line in lines:
        found = _KEY.match(line)
        if not line.strip():
            yield "", ""
        elif found and not (found[1] and not parent) and found[2] not in ("defaults", "_target_", "_partial_"):
            inner, key, value, comment = found[1], found[2], found[3].strip(), found[4] or ""
            parent = parent if inner else ("" if value else key)
            if parent != "hydra" and (value or comment):
                yield f"{f'{parent}.' if inner else ''}{key}={value}", comment
        elif not line.startswith("  "):
            parent = ""


def groups_of(folder: Path, lines: Sequence[str]) -> list[str]:
    """The groups that a tool's files choose from, and those that a method brings along."""
    found = [name for name in defaults(lines) if (folder / name).is_dir()]
    for file in sorted((folder / "method").glob("*.yaml")) if "method" in found else ():
        found += [other for other in defaults(file.read_text().splitlines()) if (folder / other).is_dir()]
    return [name for name in dict.fromkeys(found) if name.partition("/")[0] not in HIDDEN and "/" not in name]


def _wrapped(label: str, text: str, indent: int) -> str:
    first = f"  {label:{indent - 3}} "
    if len(first) > indent:
        return f"  {label}\n" + textwrap.fill(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False)


def _keys_text(lines: Sequence[str]) -> str:
    rows = list(keys(lines))
    told: list[str] = []
    for key, comment in rows:
        if not key:
            told += [""] if told and told[-1] else []
        else:
            told.append(_wrapped(key, comment, 34) if comment else f"  {key}")
    return "\n".join(told).strip("\n")


def help_text(folder: Path, name: str, more: Sequence[Path] = ()) -> str:
    """The help of the tool that reads configs/NAME.yaml in `folder`; `more` are the user's own folders of pieces."""
    lines = own_lines(folder, name)
    chosen = []
    for group in groups_of(folder, lines):
        options = sorted({file.stem for part in (folder, *more) for file in (part / group).glob("*.yaml")})
        chosen.append(_wrapped(f"{group}=", ", ".join(options), 17))
    parts = [
        "\n".join(head(lines)),
        *(["groups, chosen by name:\n" + "\n".join(chosen)] if chosen else []),
        "keys, with their defaults (KEY=VALUE):\n" + _keys_text(lines),
        EVERYWHERE,
    ]
    return "\n\n".join(parts)
