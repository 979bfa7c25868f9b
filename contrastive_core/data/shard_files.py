"""Where shards lie: on a disk, or behind a URL that fsspec knows (https, s3, gs, hf, ...), read a range at a time."""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from contrastive_core.data.sources import StrPath

OPEN_FILES = 64
"""Shards on a disk that a process keeps open."""

MOST_SHARDS = 1_000_000
"""That a pattern may spell out."""

TRIES, WAIT = 5, 0.5
"""How often a range is asked for that does not come, and the seconds before the second time, doubled each time."""

STAMPS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created")
"""What fsspec's file systems call what changes when a file does."""

BLOCK = 8 << 20
"""Bytes that are fetched at a time where a remote shard's headers are read."""


def is_remote(file: str) -> bool:
    """Whether this is a URL."""
    return "://" in file


_systems: dict[tuple[int, str], Any] = {}
"""fsspec's file systems by process and protocol. A connection must not be shared with the process that this was forked
from; that one's are kept here too, since to free one is to wait for a thread that a fork has not."""


def file_system(url: str) -> tuple[Any, str]:
    """A file system of fsspec's, this process's own, and the path that it knows the URL by.

    Raises ImportError that names what to install, ValueError for a protocol that nobody knows.
    """
    import fsspec

    key = os.getpid(), url.partition("://")[0]
    if key not in _systems:
        try:
            _systems[key] = fsspec.filesystem(key[1], skip_instance_cache=True)
        except ImportError as error:
            raise ImportError(f"{url}: {' '.join(str(error).split())}") from error
    return _systems[key], _systems[key]._strip_protocol(url)


def spelled_out(pattern: str) -> list[str]:
    """A pattern's braces, as shells and WebDataset write them, in order.

    Raises ValueError for a pattern of more than `MOST_SHARDS`.

    Example: "{a,b}-{08..10}.tar" is a-08.tar, a-09.tar, a-10.tar, b-08.tar, b-09.tar, b-10.tar.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if place % 2 == 0 else _choices(part) for place, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MOST_SHARDS:
        raise ValueError(f"{pattern} spells out more than {MOST_SHARDS:,} shards")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str) -> Sequence[str]:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if ends is None:
        return inside.split(",")
    last = min(int(ends[2]), int(ends[1]) + MOST_SHARDS)  # one too many is enough to be refused
    return [f"{number:0{len(ends[1])}d}" for number in range(int(ends[1]), last + 1)]


def find_shards(where: StrPath | Sequence[StrPath], argument: str) -> list[str]:
    """Paths or URLs of shards, sorted: of a folder, a pattern, a file, or several of these.

    Raises FileNotFoundError that names the argument where there is none, ValueError where a shard is named twice.
    """
    found: list[str] = []
    for each in [where] if isinstance(where, str | os.PathLike) else where:
        files = [file for one in spelled_out(str(each)) for file in (_remote if is_remote(one) else _local)(one)]
        if not files:
            raise FileNotFoundError(f"no shard {each}: set {argument} to a folder of .tar files, or to a pattern")
        if twice := {*files} & {*found}:
            raise ValueError(f"{argument} names {min(twice)} twice: its images would count twice")
        found += files
    return found


def _local(pattern: str) -> list[str]:
    path = Path(pattern)
    if path.is_file():
        return [str(path)]
    return sorted(map(str, path.glob("*.tar") if path.is_dir() else path.parent.glob(path.name)))


def _remote(pattern: str) -> list[str]:
    system, path = file_system(pattern)
    if pattern.startswith("http") and "?" in pattern:  # which begins a query there
        return [pattern] if system.exists(path) else []
    if path.endswith(".tar") and not glob.has_magic(path):
        return [pattern] if system.exists(path) else []
    within = path if glob.has_magic(path) else f"{path.rstrip('/')}/*.tar"
    return sorted(system.unstrip_protocol(file) for file in system.glob(within))


def state_of(file: str) -> tuple[int, int]:
    """What changes when a shard does: its size, and its time or what a server has in place of it; 0 = nothing."""
    if not is_remote(file):
        status = os.stat(file)
        return status.st_size, status.st_mtime_ns
    system, path = file_system(file)
    told = system.info(path)
    named = [str(told[name]) for name in STAMPS if told.get(name)]
    if not named:
        return int(told["size"]), 0
    return int(told["size"]), int.from_bytes(hashlib.sha256("".join(named).encode()).digest()[:7], "big")


def opened(file: str) -> BinaryIO:
    """A shard from its beginning, for its headers."""
    if not is_remote(file):
        return open(file, "rb")
    system, path = file_system(file)
    return cast(BinaryIO, system.open(path, "rb", block_size=BLOCK))


def fetched(url: str, start: int, length: int) -> bytes:
    """So many bytes from `start` of what a URL names, asked for again where they do not come. Raises OSError."""
    system, path = file_system(url)
    for again in range(TRIES):
        try:
            read = cast(bytes, system.cat_file(path, start=start, end=start + length))
            if len(read) <= length:
                return read
            break
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each protocol has errors of its own
            if again + 1 == TRIES:
                raise OSError(f"{url} did not answer {TRIES} times: {error}") from error
            time.sleep(WAIT * 2**again)
    raise OSError(f"{url}: the server sends {len(read):,} bytes where {length:,} were asked for: it must know ranges")


class RangeReader:
    """Reads ranges of files, of which it keeps those on a disk open; each process opens what it reads itself."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()  # threads decode side by side: one must not close what another reads from

    def read(self, file: str, start: int, length: int) -> bytes:
        """So many bytes from `start`; fewer where the file ends. Raises OSError where it cannot be read."""
        if is_remote(file):
            return fetched(file, start, length)
        with self._lock:
            if file not in self._open:
                while len(self._open) >= OPEN_FILES:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[file] = os.open(file, os.O_RDONLY)
            return os.pread(self._open[file], length, start)

    def __reduce__(self) -> tuple[type[RangeReader], tuple[()]]:
        return RangeReader, ()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)
