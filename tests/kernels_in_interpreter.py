"""The GPU kernels against the plain sweep, over a table of shapes and options.

Run by itself it goes through the table in Triton's interpreter, on a CPU, and prints what it found as JSON:
`TRITON_INTERPRET=1 python tests/kernels_in_interpreter.py`. The variable has to be set before triton is loaded, so
`test_kernels.py` starts this file as a process of its own; on a machine with a GPU it calls `differences` directly.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from dataclasses import dataclass

import numpy
import torch

from contrastive_core import kernels, sweep
from contrastive_core.sweep import Pairs

NAMES = ("losses", "d_queries", "d_keys", "d_own")


@dataclass(frozen=True)
class Case:
    n: int = 70
    m: int = 130
    d: int = 48
    score: str = "positive"  # where the positive's score comes from: positive, own, neither
    itself: bool = False
    decoupled: bool = False
    weights: bool = True
    needs: tuple[bool, bool, bool] = (True, True, True)
    size: float = 1.0  # of the scores, about
    alike: bool = False  # all scores are exactly `size`, a power of two, and keys differ where queries are 0; d = 17
    poison: tuple[str, int, float] | None = None  # (where, a row, what is put there)
    tf32: bool = False


CASES = {
    # shapes, not one a multiple of a tile
    "small": Case(5, 7, 3),
    "one of each": Case(1, 1, 1),
    "only itself": Case(1, 1, 16, score="neither", itself=True),
    "several tiles": Case(),
    "many keys, split": Case(33, 700, 64),
    "many queries, split": Case(500, 3, 20),
    "no keys": Case(3, 0, 4, score="own"),
    "no queries": Case(0, 5, 4),
    "nothing at all": Case(0, 0, 4, score="own"),
    "wide": Case(40, 70, 100, tf32=True),
    "widest": Case(70, 40, 256, tf32=True),
    # options
    "itself": Case(itself=True),
    "decoupled": Case(decoupled=True),
    "decoupled, itself": Case(itself=True, decoupled=True),
    "own": Case(score="own"),
    "own, itself, decoupled": Case(score="own", itself=True, decoupled=True),
    "log-sum": Case(score="neither", itself=True, decoupled=True),
    "against 0": Case(score="neither"),
    "losses only": Case(weights=False),
    "needs nothing": Case(needs=(False, False, False)),
    "needs queries": Case(needs=(True, False, False)),
    "needs keys": Case(needs=(False, True, False), itself=True),
    "needs own": Case(needs=(False, False, True), score="own"),
    # numbers
    "low temperature": Case(size=100.0),
    "low temperature, decoupled": Case(size=100.0, decoupled=True, itself=True),
    "very low temperature": Case(size=3000.0),
    "tiny scores": Case(size=1e-20),
    "large scores alike": Case(d=17, size=2.0**25, alike=True),
    "large scores alike, split": Case(33, 700, 17, size=2.0**22, alike=True),
    "large scores alike, own, decoupled": Case(33, 700, 17, score="own", decoupled=True, size=2.0**25, alike=True),
    "no negatives": Case(6, 1, 8),
    "no negatives but 0": Case(6, 1, 8, score="neither", itself=True),
    "no negatives, decoupled": Case(6, 1, 8, decoupled=True),
    **{
        f"{value} in {where}": Case(40, 70, 20, score="own" if where == "own" else "positive", poison=(where, 3, value))
        for where in ("queries", "keys", "own")
        for value in (math.nan, math.inf, -math.inf)
    },
    "NaN in queries, decoupled": Case(40, 70, 20, decoupled=True, itself=True, poison=("queries", 39, math.nan)),
    "a key at minus infinity": Case(40, 70, 20, "own", needs=(False, True, True), poison=("far key", 3, -math.inf)),
    "all NaN": Case(40, 70, 20, poison=("everything", 0, math.nan)),
}


def _inputs(case: Case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    root = (case.size / case.d**0.5) ** 0.5
    tensors = {
        "queries": torch.randn(case.n, case.d, generator=generator) * root,
        "keys": torch.randn(case.m, case.d, generator=generator) * root,
        "own": torch.randn(case.n, generator=generator) * case.size,
        "weights": torch.randn(case.n, generator=generator),
    }
    if case.alike:
        tensors["queries"][:, :-1], tensors["queries"][:, -1] = case.size / 16, 0
        tensors["keys"][:, :-1] = 1
        tensors["own"].fill_(case.size)
    if case.poison:
        where, row, value = case.poison
        if where == "everything":
            tensors["queries"].fill_(value)
            tensors["keys"].fill_(value)
        elif where == "own":
            tensors["own"][row] = value
        elif where == "far key":  # far from every query: no share in any sum, and a gradient of 0
            tensors["queries"][:, 0] = 1
            tensors["keys"][row, 0] = value
        else:
            tensors[where][row, 0] = value
    return tensors


def _indices(case: Case) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    draw = torch.randint(max(case.m, 1), (2, case.n), generator=generator)
    return {
        "positive": draw[0] if case.score == "positive" else None,
        "itself": draw[1] if case.itself else None,
    }


def _swept(sweep, case: Case, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    tensors = {name: tensor.to(device, dtype) for name, tensor in _inputs(case).items()}
    indices = {name: index if index is None else index.to(device) for name, index in _indices(case).items()}
    losses, gradients = sweep(
        tensors["queries"],
        tensors["keys"],
        tensors["own"] if case.score == "own" else None,
        pairs=Pairs(**indices, decoupled=case.decoupled),
        weights=tensors["weights"] if case.weights else None,
        needs=case.needs,
    )
    return dict(zip(NAMES, (losses, *gradients), strict=True))


def differences(name: str, device: str = "cpu") -> list[str]:
    """What the kernels give that the plain sweep does not; nothing, where all is well.

    Finite numbers are held against the plain sweep in float64, and may be off by a few times what the plain sweep in
    float32 is off by, or by what rounding does to scores of this size: one that is off by an absolute amount moves its
    weight by that share of itself, and how lucky the plain sweep is with that depends on the processor. What is not
    finite must be where it is in float32.
    """
    case = CASES[name]
    # two last places of the largest scores, unless these are exact
    rounding = 2e-6 + (0 if case.alike else 8 * case.size * torch.finfo(torch.float32).eps)
    exact = _swept(sweep.row_sweep, case, device, torch.float64)
    plain = _swept(sweep.row_sweep, case, device, torch.float32)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    try:
        fast = _swept(kernels.row_sweep, case, device, torch.float32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

    found = []
    for part in NAMES:
        ours, theirs, truth = fast[part], plain[part], exact[part]
        if ours is None or theirs is None:
            if ours is not theirs:
                found.append(f"{part}: {ours} for {theirs}")
            continue
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            found.append(f"{part}: {ours.dtype} {tuple(ours.shape)} for {theirs.dtype} {tuple(theirs.shape)}")
            continue
        finite = theirs.isfinite()
        if not torch.equal(ours.isfinite(), finite) or not torch.equal(ours.isnan(), theirs.isnan()):
            found.append(f"{part}: other numbers are NaN or infinite: {ours.isfinite().sum()} for {finite.sum()}")
            continue
        if not finite.any():
            continue
        error, usual = ((one[finite] - truth[finite]).abs().max().item() for one in (ours, theirs))
        largest = truth[finite].abs().max().item()
        # on a GPU TF32 keeps 11 bits; in the interpreter all products are float32's
        allowed = largest * 2e-2 * case.size if case.tf32 and device != "cpu" else 8 * usual + rounding * largest
        if not error <= allowed:
            found.append(f"{part}: off by {error:.1e} where {allowed:.1e} is allowed")
    return found


def refusals(device: str) -> dict[str, bool]:
    """What `supported` says to one case that the kernels take, and to the ones that they don't."""
    q, k, pairs = torch.ones(3, 8, device=device), torch.ones(5, 8, device=device), Pairs()
    wide = torch.ones(3, 257, device=device)
    masked = Pairs(mask=lambda rows, cols: torch.ones(3, 5, dtype=torch.bool), width=5)
    return {
        "plain": kernels.supported(q, k, pairs),
        "mask": kernels.supported(q, k, masked),
        "float64": kernels.supported(q.double(), k.double(), pairs),
        "mixed": kernels.supported(q, k.half(), pairs),
        "wide": kernels.supported(wide, wide, pairs),
        "meta": kernels.supported(q.to("meta"), k.to("meta"), pairs),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    numpy.seterr(all="ignore")  # the interpreter computes with numpy, which warns of log 0 and of NaN
    warnings.filterwarnings("ignore", "All-NaN slice")
    json.dump({"differences": {name: differences(name) for name in CASES}, "supported": refusals("cpu")}, sys.stdout)
