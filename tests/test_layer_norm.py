"""LayerNorm and ReLU in one kernel: in Triton's interpreter, compiled for GPUs that are not there, and on one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command
from layer_norm_in_interpreter import CASES, differences, in_order, repeats
from test_kernels import needs_gpu, needs_triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from contrastive_core import layer_norm
from contrastive_core.layer_norm import LayerNorm, rectified, supported
from cpc.encoders import resnet_small


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict:
    """All cases in one process, in which triton was told to interpret before it was loaded."""
    script = str(Path(__file__).with_name("layer_norm_in_interpreter.py"))
    run = run_command([sys.executable, script], tmp_path_factory.mktemp("run"), env={"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_same_as_torchs_operations(interpreted, name):
    assert interpreted["differences"][name] == []


@needs_triton
def test_results_repeat_and_stay_in_channels_last(interpreted):
    assert interpreted["repeats"]
    assert interpreted["in_order"]


@needs_triton
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiles_for(capability, dtype, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from contrastive_core import triton_layer_norm

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    maps = dict.fromkeys(("images", "out", "gradient", "d_images"), f"*{dtype}")
    types = maps | {"pixels": "i32", "channels": "i32", "eps": "fp32"}
    for kernel in (triton_layer_norm._forward_kernel, triton_layer_norm._backward_kernel):
        shape = triton_layer_norm._shape(25, 4096)
        constants = {"RELU": True, "ROWS": shape["ROWS"], "COLS": shape["COLS"]}
        signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
        source, target = ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32)
        triton.compile(source, target=target, options={"num_warps": shape["num_warps"]})


@pytest.mark.parametrize(
    "images",
    [
        torch.ones(2, 3, 4, 4),
        torch.ones(2, 3, 4, 4, device="meta"),
        torch.ones(2, 3, 4, 4, dtype=torch.float64),
        torch.ones(0, 3, 4, 4),
        torch.ones(2, 3),
    ],
    ids=["cpu", "meta", "float64", "empty", "no map"],
)
def test_elsewhere_it_is_torchs(images, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not supported(images)
    norm = LayerNorm(3).to(images)
    torch_norm = nn.GroupNorm(1, 3).to(images)
    ours, theirs = norm.rectified(images), torch_norm(images).relu()
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    if images.device.type == "cpu":
        assert torch.equal(ours, theirs)
        assert torch.equal(norm(images), torch_norm(images))


def test_supported_needs_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(layer_norm, "has_triton", lambda: False)
    assert not supported(torch.ones(2, 3, 4, 4))


def test_its_state_is_group_norms():
    norm = nn.GroupNorm(1, 5)
    nn.init.normal_(norm.weight)
    ours = LayerNorm(5)
    ours.load_state_dict(norm.state_dict())
    assert torch.equal(ours(torch.arange(30.0).view(1, 5, 2, 3)), norm(torch.arange(30.0).view(1, 5, 2, 3)))


def test_an_example():
    norm = LayerNorm(2)
    nn.init.constant_(norm.bias, -0.5)
    # the variance of sevens is a rounding error, beside an epsilon of 1e-5
    torch.testing.assert_close(norm(torch.full((1, 2, 3, 3), 7.0)), torch.full((1, 2, 3, 3), -0.5), rtol=0, atol=1e-2)
    assert torch.equal(norm.rectified(torch.full((1, 2, 3, 3), 7.0)), torch.zeros(1, 2, 3, 3))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(3), LayerNorm(3)], ids=["none", "batch", "layer"])
def test_rectified_is_relu_of_the_norm(norm):
    images = torch.randn(4, 3, 5, 5)
    assert torch.equal(rectified(norm, images), norm(images).relu())


@needs_triton
def test_a_plan_sees_a_gpus_maps_in_their_own_precision():
    """Where nothing is computed the operation has its result's shape, dtype and order."""
    with FakeTensorMode(), torch.device("cuda"):
        images = torch.empty(2, 8, 5, 5, dtype=torch.bfloat16)
        result = LayerNorm(8).rectified(images)
    assert (result.shape, result.dtype) == (images.shape, torch.bfloat16)
    assert result.is_contiguous(memory_format=torch.channels_last)


@needs_gpu
@needs_triton
def test_same_as_torchs_operations_on_a_gpu():
    assert {name: found for name in CASES if (found := differences(name, "cuda"))} == {}
    assert repeats("cuda")
    assert in_order("cuda")


@needs_gpu
@needs_triton
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what compiling imports
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_encoder_on_a_gpu_is_the_cpus(compiled):
    torch.manual_seed(0)
    encoder = resnet_small(width=16)
    patches = torch.randn(6, 3, 16, 16)
    expected = encoder(patches)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in encoder.parameters()]
    on_gpu = encoder.cuda()
    on_gpu.zero_grad()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        features = (torch.compile(on_gpu) if compiled else on_gpu)(patches.cuda())
        features.square().sum().backward()
    torch.testing.assert_close(features.cpu(), expected, rtol=1e-3, atol=1e-3)
    for parameter, gradient in zip(on_gpu.parameters(), gradients, strict=True):
        largest = gradient.abs().max()
        torch.testing.assert_close(parameter.grad.cpu() / largest, gradient / largest, rtol=1e-2, atol=1e-2)
