"""The kernels of LayerNorm against torch's operations in float64, over a table of shapes.

Run by itself it goes through the table in Triton's interpreter, on a CPU, and prints what it found as JSON:
`TRITON_INTERPRET=1 python tests/layer_norm_in_interpreter.py`, a process of its own because the variable has to be set
before triton is loaded; on a machine with a GPU the tests call `differences` directly.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_core.layer_norm import LayerNorm, supported


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    relu: bool = True
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    spread: float = 1.0
    channels_last: bool = True
    poison: float | None = None


CASES = {
    "one value": Case((2, 1, 1, 1)),
    "one channel": Case((3, 1, 5, 4)),
    "one pixel": Case((3, 20, 1, 1)),
    "not a multiple of a tile": Case((2, 37, 5, 7)),
    "wider than a tile": Case((2, 1500, 3, 2)),
    "many pixels": Case((1, 16, 40, 41)),
    "norm alone": Case((2, 24, 5, 5), relu=False),
    "bfloat16": Case((2, 64, 5, 5), dtype=torch.bfloat16),
    "bfloat16, norm alone": Case((2, 64, 5, 5), relu=False, dtype=torch.bfloat16),
    "float16": Case((2, 64, 5, 5), dtype=torch.float16),
    "channels first": Case((2, 24, 5, 6), channels_last=False),
    "far from 0": Case((2, 24, 6, 6), mean=1000.0),
    "constant": Case((2, 24, 6, 6), mean=3.0, spread=0.0),
    "tiny": Case((2, 24, 6, 6), spread=1e-6),
    "NaN in one image": Case((3, 24, 5, 5), poison=float("nan")),
    "infinity in one image": Case((3, 24, 5, 5), poison=float("inf")),
}
# float64's numbers of the rounded input; what float32's moments and the result's own precision may be off by
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("result", "d_images", "d_weight", "d_bias")


def _inputs(case: Case, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    n, c, h, w = case.shape
    images = torch.randn(n, c, h, w, generator=generator) * case.spread + case.mean
    if case.poison is not None:
        images[1, 3, 2, 2] = case.poison
    weight, bias = torch.rand(2, c, generator=generator) - 0.3
    gradient = torch.randn(n, c, h, w, generator=generator)
    images, gradient = images.to(case.dtype), gradient.to(case.dtype)
    order = torch.channels_last if case.channels_last else torch.contiguous_format
    return [images.contiguous(memory_format=order).to(device), weight.to(device), bias.to(device), gradient.to(device)]


def _gradients(case: Case, norm: LayerNorm, images: Tensor, gradient: Tensor) -> list[Tensor]:
    images = images.detach().requires_grad_()
    result = norm.rectified(images) if case.relu else norm(images)
    return [result.detach(), *torch.autograd.grad(result, [images, norm.weight, norm.bias], gradient)]


def _norm(weight: Tensor, bias: Tensor) -> LayerNorm:
    norm = LayerNorm(len(weight)).to(weight)
    norm.load_state_dict({"weight": weight, "bias": bias})
    return norm


def _by_operations(case: Case, norm: LayerNorm, images: Tensor, gradient: Tensor) -> list[Tensor]:
    images = images.detach().requires_grad_()
    result = F.group_norm(images, 1, norm.weight, norm.bias, norm.eps)
    result = F.relu(result) if case.relu else result
    return [result.detach(), *torch.autograd.grad(result, [images, norm.weight, norm.bias], gradient)]


def differences(name: str, device: str = "cpu") -> list[str]:
    """What the kernels give that torch's operations in float64 do not; nothing, where all is well."""
    case = CASES[name]
    images, weight, bias, gradient = _inputs(case, device)
    assert supported(images), "the kernels do not run here"
    fused = _gradients(case, _norm(weight, bias), images, gradient)
    exact = _by_operations(case, _norm(weight.double(), bias.double()), images.double(), gradient.double())
    plain = _by_operations(case, _norm(weight, bias), images.float(), gradient.float())
    dtypes = (case.dtype, case.dtype, torch.float32, torch.float32)
    found = []
    for part, ours, theirs, usual, dtype in zip(NAMES, fused, exact, plain, dtypes, strict=True):
        if ours.dtype != dtype or ours.shape != theirs.shape:
            found.append(f"{part}: {ours.dtype} {tuple(ours.shape)}")
            continue
        if not torch.equal(ours.isfinite(), theirs.isfinite()):
            found.append(f"{part}: {ours.isfinite().sum()} finite numbers for {theirs.isfinite().sum()}")
            continue
        finite = theirs.isfinite()
        if not finite.any():
            continue
        error, float32 = ((one[finite].double() - theirs[finite]).abs().max().item() for one in (ours, usual))
        allowed = 4 * float32 + ALLOWED[case.dtype] * max(theirs[finite].abs().max().item(), 1e-2)
        if not error <= allowed:
            found.append(f"{part}: off by {error:.1e} where {allowed:.1e} is allowed")
    return found


def repeats(device: str = "cpu") -> bool:
    """Whether the same call gives the same bits, and an image's numbers do not depend on the others."""
    case = CASES["not a multiple of a tile"]
    images, weight, bias, gradient = _inputs(case, device)
    runs = [_gradients(case, _norm(weight, bias), images, gradient) for _ in range(2)]
    alone = _gradients(case, _norm(weight, bias), images[:1], gradient[:1])
    same = all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    return same and all(torch.equal(one[:1], own) for one, own in zip(runs[0][:2], alone[:2], strict=True))


def in_order(device: str = "cpu") -> bool:
    """Whether results are in channels_last, so that convolutions need no copies."""
    images, weight, bias, gradient = _inputs(CASES["channels first"], device)
    made = _gradients(CASES["channels first"], _norm(weight, bias), images, gradient)[:2]
    return all(one.is_contiguous(memory_format=torch.channels_last) for one in made)


if __name__ == "__main__":
    torch.set_num_threads(1)
    numpy.seterr(all="ignore")
    found = {name: differences(name) for name in CASES}
    json.dump({"differences": found, "repeats": repeats(), "in_order": in_order()}, sys.stdout)
