"""Triton kernels for the softmax over all pairs: sums over negatives, tile by tile, on a GPU.

The idea is FlashAttention's (Dao et al. 2022): a tile of scores lives and dies in the registers of one program, so the
matrix of scores costs no memory and no traffic. Summing over negatives *is* attention, with the keys for values:

    X_i = log sum_j exp(S_ij)        c_i = sum_j exp(S_ij - X_i) k_j        over the negatives j of i

and c_i, the mean of the keys weighted by how hard they are, is all that the gradient of the queries needs. So one
kernel with a running maximum gives losses and the queries' gradient (two products of matrices), and a second, which
goes down the columns with X known, the keys' (two products). The maximum M and T = sum_j exp(S_ij - M) stay apart: in
X = M + log T a large M would round log T away.

Where one side is short, a queue of 65,536 keys against 256 queries, programs also split the long side between them;
their parts are put together in torch. No program adds to what another one writes, so results repeat to the bit.

This module imports triton; `contrastive_core.kernels` imports it where it is first needed.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""Where a running maximum starts: unlike -inf it can be subtracted from -inf."""


@triton.jit
def _load_rows(matrix, rows, count, d, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a matrix `count d`, zero beyond its edges; a row's place is counted in 64 bits."""
    features = tl.arange(0, WIDTH)
    places = rows.to(tl.int64)[:, None] * d + features[None, :]
    inside = (rows < count)[:, None] & (features < d)[None, :]
    # Cast as it is: the interpreter silently gets products of bfloat16 wrong.
    return tl.load(matrix + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n", "m", "share"])
def _rows_kernel(  # type: ignore[no-untyped-def]
    queries, keys, positive, itself,
    maxima, totals, positive_scores, centres,
    n, m, d, share,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M, T, the positive's score and c for a block of queries, over one share of the keys."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    first = part * share
    last = tl.minimum(first + share, m)
    query = _load_rows(queries, rows, n, d, WIDTH)
    # 32 bits for the comparisons, of which there are as many as scores
    if positive is not None:
        own = tl.load(positive + rows, mask=rows < n, other=-1)
        own_score = tl.where((own >= 0) & (own < m), 0.0, float("nan"))  # no such key: no plausible number either
        own = own.to(tl.int32)
    if itself is not None:
        left_out = tl.load(itself + rows, mask=rows < n, other=-1).to(tl.int32)

    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if centres is not None:
        centre = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first, last, COLS):
        cols = start + tl.arange(0, COLS)
        key = _load_rows(keys, cols, m, d, WIDTH)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        negative = (cols < m)[None, :]  # rows beyond the last are computed, and not stored
        if positive is not None:  # from the same product as the others, so that equal keys score equally
            is_own = cols[None, :] == own[:, None]
            own_score += tl.sum(tl.where(is_own, scores, 0.0), 1)
            negative = negative & ~is_own
        if itself is not None:
            negative = negative & (cols[None, :] != left_out[:, None])
        scores = tl.where(negative, scores, float("-inf"))

        # The maximum may drop NaN: the sum does not. An infinite one turns the sum into inf - inf.
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp(highest - new_highest)
        hardness = tl.exp(scores - new_highest[:, None])
        total = total * shrink + tl.sum(hardness, 1)
        if centres is not None:
            centre = tl.dot(hardness, key, centre * shrink[:, None], input_precision=PRECISION)
        highest = new_highest

    place = part.to(tl.int64) * n + rows
    tl.store(maxima + place, highest, mask=rows < n)
    tl.store(totals + place, total, mask=rows < n)
    if positive is not None:
        tl.store(positive_scores + place, own_score, mask=rows < n)
    if centres is not None:
        centre = centre / tl.where(total == 0, 1.0, total)[:, None]  # no negatives: 0
        features = tl.arange(0, WIDTH)
        inside = (rows < n)[:, None] & (features < d)[None, :]
        tl.store(centres + place[:, None] * d + features[None, :], centre, mask=inside)


@triton.jit(do_not_specialize=["n", "m", "share"])
def _columns_kernel(  # type: ignore[no-untyped-def]
    queries, keys, positive, itself, maxima, weights, sums,
    n, m, d, share,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_i weight_i exp(S_ij - M_i) q_i for a block of keys, over one share of the queries."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    part = tl.program_id(1)
    first = part * share
    last = tl.minimum(first + share, n)
    key = _load_rows(keys, cols, m, d, WIDTH)
    total = tl.zeros([COLS, WIDTH], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < n
        query = _load_rows(queries, rows, n, d, WIDTH)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # transposed: a key a row
        negative = inside[None, :]  # columns beyond the last are computed, and not stored
        if positive is not None:
            own = tl.load(positive + rows, mask=inside, other=-1).to(tl.int32)
            negative = negative & (cols[:, None] != own[None, :])
        if itself is not None:
            left_out = tl.load(itself + rows, mask=inside, other=-1).to(tl.int32)
            negative = negative & (cols[:, None] != left_out[None, :])
        scores = tl.where(negative, scores, float("-inf"))
        highest = tl.load(maxima + rows, mask=inside, other=0.0)
        weight = tl.load(weights + rows, mask=inside, other=0.0)
        hardness = tl.exp(scores - highest[None, :]) * weight[None, :]
        total = tl.dot(hardness, query, total, input_precision=PRECISION)

    features = tl.arange(0, WIDTH)
    places = (part.to(tl.int64) * m + cols)[:, None] * d + features[None, :]
    tl.store(sums + places, total, mask=(cols < m)[:, None] & (features < d)[None, :])


# ---- tiles: how large a piece one program works on ----


class Tile(NamedTuple):
    """The shape of a tile of scores, and how Triton is to run it.

    own: rows that a program keeps, and sums for. visiting: rows that it loads a step. warps, stages: Triton's.
    """

    own: int
    visiting: int
    warps: int
    stages: int = 2


Tiles = dict[tuple[str, bool], dict[int, Tile]]

TILES: Tiles = {
    ("tf32", True): {64: Tile(128, 64, 8), 128: Tile(128, 64, 8), 256: Tile(128, 32, 8)},
    ("tf32", False): {64: Tile(64, 64, 4), 128: Tile(64, 32, 4), 256: Tile(64, 16, 8, 1)},
    ("tf32x3", True): {32: Tile(128, 64, 8), 64: Tile(128, 32, 8), 128: Tile(128, 32, 8)},
    ("tf32x3", False): {64: Tile(64, 32, 4)},
}
"""(precision, whether shared memory is large) -> the largest d, rounded up to a power of two -> tile.

A program holds its own rows and their sum, `own d` each, in registers and shared memory; more of its own rows mean
that the others are read less often. These are the largest that compile for an H100 with fewer than 100 bytes of
registers spilled, within the shared memory of an H100 or B200 (227 KiB), or of the smallest GPU with TF32 (99 KiB).
Three products a product hold every tile twice, so d ends sooner.
"""

LARGE_SHARED_MEMORY = 227 * 1024


def precision() -> str:
    """How Triton is to multiply float32: "tf32" where torch's setting allows it, else "tf32x3".

    Not "ieee": without tensor cores a tile's operands would all have to be in registers, which spill by the kilobyte.
    """
    # The one way to ask that answers whichever of torch's two interfaces was used to set it.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def tile_for(rows: Tensor) -> Tile | None:
    """The tile for rows `n d`, or None where d is too large."""
    tiles = TILES[precision(), _shared_memory(rows.device) >= LARGE_SHARED_MEMORY]
    return next((tile for width, tile in sorted(tiles.items()) if rows.shape[1] <= width), None)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    size: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return size


@cache
def _programs(device: torch.device) -> int:
    """How many programs keep the device busy; a few in the interpreter, so that it splits work as a GPU does."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def runs_on(device: torch.device) -> bool:
    """Whether Triton can compile for this device and start what it compiled; a warning says why it can't."""
    if device.type == "cpu":
        return True
    if torch.cuda.get_device_capability(device) < (8, 0):  # no TF32
        return False
    out = torch.zeros(1, device=device)
    try:
        with torch.cuda.device_of(out):
            _one_kernel[(1,)](out)
    except Exception as error:  # a missing C compiler, a driver too old: Triton has no class in common for them
        warnings.warn(f"Triton fails on {device}, so losses take a slower path: {error}", RuntimeWarning, stacklevel=3)
        return False
    return bool(out == 1)


@triton.jit
def _one_kernel(out):  # type: ignore[no-untyped-def]
    tl.store(out, 1.0)


# ---- the two sums ----


class KeySums(NamedTuple):
    """What `sum_over_keys` gives of each query.

    highest, total: M, the lowest number where there are no negatives, and T, 0 there and else at least 1; `n`.
    scores: the positives', `n`; None where there is no positive. centres: c, `n d`; None where not wanted.
    """

    highest: Tensor
    total: Tensor
    scores: Tensor | None
    centres: Tensor | None


def sum_over_keys(
    queries: Tensor, keys: Tensor, positive: Tensor | None, itself: Tensor | None, *, centres: bool
) -> KeySums:
    """The sums over the negatives, with c where `centres` are wanted.

    Args:
        queries: `n d`. keys: `m d`. Float32.
        positive, itself: `n` int64, columns that are no negatives.
    """
    n, d = queries.shape
    tile = _tile(queries)
    parts, share = _split(n, len(keys), tile, queries.device)
    maxima, totals = queries.new_empty(parts, n), queries.new_empty(parts, n)
    scores = None if positive is None else queries.new_empty(parts, n)
    sums = queries.new_empty(parts, n, d) if centres else None
    if n:
        grid = (triton.cdiv(n, tile.own), parts)
        tensors = (queries, keys, positive, itself, maxima, totals, scores, sums)
        sizes = (n, len(keys), d, share)
        _launch(_rows_kernel, grid, tile, d, *tensors, *sizes, ROWS=tile.own, COLS=tile.visiting)
    highest, total = maxima[0], totals[0]
    if parts > 1:
        highest = maxima.amax(0)
        totals *= (maxima - highest).exp_()
        total = totals.sum(0)
        if sums is not None:
            sums *= (totals / total.clamp_min(1))[:, :, None]
    return KeySums(highest, total, None if scores is None else scores.sum(0), None if sums is None else _added(sums))


def sum_over_queries(
    queries: Tensor, keys: Tensor, positive: Tensor | None, itself: Tensor | None, highest: Tensor, weights: Tensor
) -> Tensor:
    """sum_i weight_i exp(S_ij - M_i) q_i, `m d`.

    Args:
        queries, keys, positive, itself: as in `sum_over_keys`, which gives M, `highest`.
        weights: `n`; w over T, for sum_i w_i N_ij q_i.
    """
    m, d = keys.shape
    tile = _tile(queries)
    parts, share = _split(m, len(queries), tile, queries.device)
    sums = keys.new_empty(parts, m, d)
    if m:
        grid = (triton.cdiv(m, tile.own), parts)
        tensors = (queries, keys, positive, itself, highest, weights, sums)
        sizes = (len(queries), m, d, share)
        _launch(_columns_kernel, grid, tile, d, *tensors, *sizes, ROWS=tile.visiting, COLS=tile.own)
    return _added(sums)


def _added(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _tile(queries: Tensor) -> Tile:
    tile = tile_for(queries)
    if tile is None:
        raise ValueError(f"d = {queries.shape[1]} is too large for the kernels: ask `kernels.supported` first")
    return tile


def _split(own: int, visiting: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """Into how many parts the visiting rows are split, and rows a part; several where own rows are few."""
    steps = max(triton.cdiv(visiting, tile.visiting), 1)
    parts = max(_programs(device) // max(triton.cdiv(own, tile.own), 1), 1)
    each = triton.cdiv(steps, min(parts, steps))
    return triton.cdiv(steps, each), each * tile.visiting


def _launch(
    kernel: Any, grid: tuple[int, int], tile: Tile, d: int, *arguments: Tensor | int | None, **shape: int
) -> None:
    """Start a kernel; what it writes to is contiguous, what it reads is made so."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](
            *(argument.contiguous() if isinstance(argument, Tensor) else argument for argument in arguments),
            WIDTH=max(triton.next_power_of_2(d), 16),  # the least that a product on tensor cores takes
            PRECISION=precision(),
            num_warps=tile.warps,
            num_stages=tile.stages,
            **shape,
        )
