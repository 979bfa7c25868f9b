"""The GPU kernels: in Triton's interpreter where there is no GPU, compiled for GPUs that are not there, and on one."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT, run_command
from kernels_in_interpreter import CASES, differences, refusals

from contrastive_core import kernels, sweep
from contrastive_core.sweep import Pairs

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton has no wheel for this platform")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="no NVIDIA GPU of the Ampere generation or newer",
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict:
    """All cases in one process, in which triton was told to interpret before it was loaded."""
    script = str(Path(__file__).with_name("kernels_in_interpreter.py"))
    run = run_command([sys.executable, script], tmp_path_factory.mktemp("run"), env={"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_same_as_the_plain_sweep(interpreted, name):
    assert interpreted["differences"][name] == []


@needs_triton
def test_supported_in_the_interpreter(interpreted):
    refused = {"mask": False, "float64": False, "mixed": False, "wide": False, "meta": False}
    assert interpreted["supported"] == {"plain": True, **refused}


def test_not_supported_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not any(refusals("cpu").values())


def test_not_supported_without_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert not any(refusals("cpu").values())


def test_triton_is_loaded_when_it_is_needed():
    code = """
import sys, torch
from contrastive_core import kernels, sweep
assert not kernels.supported(torch.ones(2, 4), torch.ones(8, 4), sweep.Pairs())
assert "triton" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


GPUS = [
    (80, "tf32", 163),  # A100
    (86, "tf32x3", 99),  # RTX 3090, with the tiles of a small shared memory
    (90, "tf32x3", 227),  # H100
    pytest.param(90, "tf32", 227, marks=pytest.mark.slow),
    pytest.param(100, "tf32", 227, marks=pytest.mark.slow),  # B200
]


@needs_triton
@pytest.mark.parametrize(("capability", "precision", "shared_kib"), GPUS)
def test_compiles_for(capability, precision, shared_kib, tmp_path, monkeypatch):
    """The widest tile of each table, by the compiler that triton brings along, within that GPU's shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from contrastive_core import triton_sweep

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = triton_sweep.TILES[precision, shared_kib * 1024 >= triton_sweep.LARGE_SHARED_MEMORY]
    width, tile = max(tiles.items())
    for kernel, rows, cols in (
        (triton_sweep._rows_kernel, tile.own, tile.visiting),
        (triton_sweep._columns_kernel, tile.visiting, tile.own),
    ):
        constants = {"ROWS": rows, "COLS": cols, "WIDTH": width, "PRECISION": precision}
        types = {"positive": "*i64", "itself": "*i64", **dict.fromkeys(("n", "m", "d", "share"), "i32")}
        signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
        compiled = triton.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )
        assert compiled.metadata.shared <= shared_kib * 1024


@needs_gpu
@needs_triton
def test_same_as_the_plain_sweep_on_a_gpu():
    assert {name: found for name in CASES if (found := differences(name, "cuda"))} == {}


@needs_gpu
@needs_triton
def test_supported_on_a_gpu():
    refused = {"mask": False, "float64": False, "mixed": False, "wide": False, "meta": False}
    assert refusals("cuda") == {"plain": True, **refused}


@needs_gpu
@needs_triton
def test_no_scores_are_kept_on_a_gpu():
    """65,536 queries and keys: their scores would fill 16 GiB; a second run gives the same bits."""
    n, d = 65536, 64
    generator = torch.Generator("cuda").manual_seed(0)
    queries, keys = (torch.randn(n, d, device="cuda", generator=generator) / 4 for _ in range(2))
    pairs = Pairs(torch.randperm(n, device="cuda", generator=generator))
    weights = torch.ones(n, device="cuda")
    options = {"pairs": pairs, "weights": weights, "needs": (True, True, False)}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses, gradients = kernels.row_sweep(queries, keys, None, **options)
    assert torch.cuda.max_memory_allocated() - before < 16 * n * d * 4
    again, gradients_again = kernels.row_sweep(queries, keys, None, **options)
    assert torch.equal(losses, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients[:2], gradients_again[:2], strict=True))
    expected, expected_gradients = sweep.row_sweep(queries, keys, None, **options)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients[:2], expected_gradients[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
