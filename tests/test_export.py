"""Exports are read by the program that they are for, and give the same features there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from export_runs import OURS, images, write_cpc_run, write_run
from safetensors.torch import load_file
from torch import nn

import contrastive_core.layer_norm
import cpc
import cpc.export
from cpc.encoders import resnet_small
from cpc.export import difference, export_run
from cpc.frozen_encoder import FrozenEncoder
from cpc.graphs import check_plain_graph, exported_program, load_onnx, load_program
from cpc.views import normalise

CHECKOUT = Path(__file__).resolve().parents[1]


def relative(found, expected):
    return float((found.detach() - expected).abs().max() / expected.abs().max())


def ours_and_normalised(run, size=32):
    ours = cpc.load_encoder(run, mode="image")
    return ours(images(size=size)), normalise(images(size=size), ours.mean, ours.std)


def run_page(folder, more=""):
    """Execute the code of an export's README.md where it lies, in this process."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names = {}
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(code + more, names)
    finally:
        os.chdir(before)
    return names


@pytest.fixture(scope="module")
def resnet18_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("resnet18"), f"{OURS}TorchvisionTrunk", {"name": "resnet18"})


@pytest.fixture(scope="module")
def cpc_run(tmp_path_factory):
    return write_cpc_run(tmp_path_factory.mktemp("cpc") / "run")


def test_torchvisions_own_model_loads_it(resnet18_run, tmp_path):
    out = tmp_path / "out"
    assert export_run(resnet18_run, "torchvision", out) < 1e-5
    state = load_file(out / "model.safetensors")
    model = torchvision.models.resnet18()
    keys = model.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"]
    assert keys.unexpected_keys == []
    model.fc = nn.Identity()
    expected, pixels = ours_and_normalised(resnet18_run)
    assert relative(model.eval()(pixels), expected) < 1e-5
    page = run_page(out)
    assert relative(page["model"].eval()((images() - page["mean"]) / page["std"]), expected) < 1e-5
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "export.json", "model.safetensors"]
    assert json.loads((out / "export.json").read_text())["mean"] == [0.5, 0.4, 0.3]


@pytest.mark.slow
def test_timms_resnet_loads_torchvisions(resnet18_run, tmp_path):
    assert export_run(resnet18_run, "timm", tmp_path / "out") < 1e-5
    model = timm.create_model("resnet18", num_classes=0).eval()
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    expected, pixels = ours_and_normalised(resnet18_run)
    assert relative(model(pixels), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("TimmTrunk", {"name": "test_resnet"}),
        ("MoCoViT", {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("name", ""),
)
def test_timms_own_model_loads_it(name, arguments, tmp_path):
    run = write_run(tmp_path / "run", OURS + name, arguments)
    assert export_run(run, "timm", tmp_path / "out") < 1e-5
    expected, pixels = ours_and_normalised(run)
    model = run_page(tmp_path / "out")["model"].eval()
    assert type(model).__module__.startswith("timm.")
    assert relative(model(pixels), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name", "arguments"),
    [
        ("torchvision", "TorchvisionTrunk", {"name": "resnet50", "zero_init_residual": True}),
        ("timm", "TorchvisionTrunk", {"name": "resnet50", "zero_init_residual": True}),
        ("torchvision", "TimmTrunk", {"name": "resnet18"}),
        ("torchvision", "TorchvisionTrunk", {"name": "resnet18", "small_stem": True}),
        ("timm", "TorchvisionTrunk", {"name": "resnet18", "small_stem": True}),
        ("torchvision", "TorchvisionTrunk", {"name": "convnext_tiny", "node": "features"}),
        ("torchvision", "TorchvisionTrunk", {"name": "mobilenet_v3_small", "node": "features"}),
        ("timm", "TimmTrunk", {"name": "resnet18"}),
        ("timm", "TimmTrunk", {"name": "convnext_atto", "drop_path_rate": 0.1}),
        ("timm", "TimmTrunk", {"name": "test_vit", "img_size": 64}),
    ],
)
def test_other_trunks(library, name, arguments, tmp_path):
    run = write_run(tmp_path / "run", OURS + name, arguments, 64)
    assert export_run(run, library, tmp_path / "out") < 1e-5
    expected, pixels = ours_and_normalised(run, 64)
    assert relative(run_page(tmp_path / "out")["model"].eval()(pixels), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "arguments", "said"),
    [
        ("torchvision", {"name": "resnet18", "node": "layer2"}, "the trunk ends at layer2, not before fc"),
        ("torchvision", {"name": "mobilenet_v3_small", "node": "features.3"}, "differ from this trunk's, features.10"),
        ("timm", {"name": "resnet18", "node": "layer1"}, "weights of timm's resnet18 differ from this trunk's, layer2"),
        ("torchvision", {"name": "squeezenet1_1", "node": "features"}, "its features have shape"),
        (
            "timm",
            {"name": "resnet18", "norm_layer": None},
            "the trunk was built with norm_layer, which are torchvision's",
        ),
        ("timm", {"name": "squeezenet1_1", "node": "features"}, "timm has no model 'squeezenet1_1'"),
    ],
)
def test_a_trunk_that_does_not_fit_is_named(library, arguments, said, tmp_path):
    run = write_run(tmp_path / "run", f"{OURS}TorchvisionTrunk", arguments, 64)
    with pytest.raises(ValueError, match=said) as raised:
        export_run(run, library, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_patches_trunks_are_nobody_elses(cpc_run, tmp_path):
    with pytest.raises(
        ValueError, match=r"PatchResNet, which timm does not have: pass format=hub, onnx or torch_export"
    ):
        export_run(cpc_run, "timm", tmp_path / "out")


def check_graph(run, kind, out, readout="mean", size=16):
    mode = "image" if size == 32 else "patches"
    ours = cpc.load_encoder(run, readout=readout, mode=mode)
    assert export_run(run, kind, out, readout=readout, mode=mode) < 1e-5
    theirs = load_onnx(out / "model.onnx") if kind == "onnx" else load_program(out / "model.pt2")
    for count in (1, 2, 7):
        assert relative(theirs(images(count, size)), ours(images(count, size))) < 1e-5


@pytest.mark.slow
def test_a_program_of_the_patches_and_their_contexts(cpc_run, tmp_path):
    check_graph(cpc_run, "torch_export", tmp_path / "out", "context")


@pytest.mark.slow
@pytest.mark.parametrize("readout", ["mean", "grid", "context"])
@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_a_graph_of_the_patch_encoder(kind, readout, cpc_run, tmp_path):
    check_graph(cpc_run, kind, tmp_path / "out", readout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("TorchvisionTrunk", {"name": "resnet18"}),
        ("TimmTrunk", {"name": "test_resnet"}),
        ("MoCoViT", {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4}),
        ("SmallCNN", {}),
    ],
)
def test_a_graph_of_whole_images(kind, name, arguments, tmp_path):
    run = write_run(tmp_path / "run", OURS + name, arguments)
    readouts = ("mean",) if name == "MoCoViT" else ("mean", "grid")
    for readout in readouts:
        check_graph(run, kind, tmp_path / readout, readout, 32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_the_pages_code_reads_a_graph(kind, cpc_run, tmp_path):
    export_run(cpc_run, kind, tmp_path / "out")
    page, pixels = run_page(tmp_path / "out"), images(3, 16)
    if kind == "onnx":
        import onnx

        graph = onnx.load(tmp_path / "out" / "model.onnx").graph
        assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
        found = torch.from_numpy(page["session"].run(None, {"images": pixels.numpy()})[0])
    else:
        found = page["encoder"](pixels)
    assert relative(found, cpc.load_encoder(cpc_run)(pixels)) < 1e-5


def test_no_operator_of_ours_is_left_in_a_graph(monkeypatch):
    """Also where the fused LayerNorm would be taken, as on a GPU."""
    monkeypatch.setattr(contrastive_core.layer_norm, "has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert contrastive_core.layer_norm.supported(torch.ones(1, 2, 3, 3))
    fed = {"image_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}
    encoder = FrozenEncoder(resnet_small(2, blocks=(1,)), **fed).eval().requires_grad_(False)
    program = torch.export.export(encoder, (torch.zeros(2, 3, 8, 8),))
    check_plain_graph(program)
    assert any("group_norm" in str(node.target) for node in program.graph.nodes)
    monkeypatch.undo()
    expected = encoder(images(3, 8))
    assert relative(exported_program(encoder).module()(images(3, 8)), expected) < 1e-5


@pytest.mark.slow
def test_an_operator_of_ours_is_found():
    class Fused(nn.Module):
        def forward(self, pixels):
            scale = torch.ones(3)
            return torch.ops.contrastive_core.layer_norm(pixels, scale, scale, 1e-5, False)[0]

    program = torch.export.export(Fused(), (torch.zeros(2, 3, 4, 4),))
    with pytest.raises(
        ValueError, match=r"the graph holds contrastive_core\.layer_norm\.default, which only this project"
    ):
        check_plain_graph(program)


def test_a_difference_is_no_export():
    def ours(pixels):
        return pixels.mean((2, 3))

    assert difference(ours, ours, 4) == 0
    assert difference(lambda pixels: ours(pixels) * (1 + 1e-5), ours, 4) == pytest.approx(1e-5, rel=0.02)
    for wrong in (1.01, float("nan")):
        with pytest.raises(ValueError, match="its features differ from ours by"):
            difference(lambda pixels, wrong=wrong: ours(pixels) * wrong, ours, 4)


def test_the_command(cpc_run, tmp_path, call_tool, capsys):
    out = tmp_path / "deep" / "out"
    call_tool(cpc.export.main, f"run={cpc_run}", "format=hub", f"out={out}", "licence=mit")
    assert f"written to {out}; features differ from ours by at most 0.0e+00" in capsys.readouterr().out
    page = (out / "README.md").read_text()
    assert "\nlicense: mit\n" in page
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["format=onx", "out=o"],
            "format=onx is not one of torchvision, timm, onnx, torch_export, hub; did you mean 'onnx'?",
        ),
        (["format=torch-export", "out=o"], "did you mean 'torch_export'?"),
        (["format=hub"], "not given: out; pass run=DIR format=torchvision|timm|onnx|torch_export|hub out=DIR"),
        (["format=torchvision", "out=o"], "the trunk of this run is PatchResNet, which torchvision does not have"),
        (["format=onnx", "out=full"], "out=full holds files: pass a new folder"),
        (["format=onnx", "out=full/file"], "out=full/file: full/file is a file, pass another folder"),
        (["format=hub", "out=o", "readout=grid"], "format=hub has no mode and readout of its own: leave"),
        (["format=onnx", "out=o", "readout=max"], "mode=None readout=max: pass one of"),
        (
            ["format=hub", "out=o", "licens=mit"],
            "Could not override 'licens': there is no such key; did you mean 'licence'?",
        ),
        (["format=hub", "out=o", "run=typo"], "no typo in .: pass the folder of a finished run"),
    ],
)
def test_a_mistake_is_one_line(given, said, cpc_run, tmp_path, call_tool, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    run = [] if "run=typo" in given else [f"run={cpc_run}"]
    with pytest.raises(SystemExit) as ended:
        call_tool(cpc.export.main, *run, *given)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_code_of_docs_export_runs(resnet18_run, cpc_run, tmp_path):
    """Every block of the page, in one process, beside the runs and exports that its commands make."""
    text = (CHECKOUT / "docs" / "export.md").read_text()
    shutil.copytree(cpc_run, tmp_path / "runs" / "cpc")
    shutil.copytree(resnet18_run, tmp_path / "runs" / "simclr")
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    commands = [line.split("  #")[0] for line in text.splitlines() if line.startswith("python tools/export.py")]
    assert len(commands) >= 5
    for command in commands:
        words = command.replace("tools/", f"{CHECKOUT}/tools/").split()
        subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, env=environment, check=True)
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) >= 6
    begin = "import numpy as np, torch\nimages = torch.rand(40, 3, 16, 16)\nlabels = np.arange(40) % 2\n"
    code = "\n".join([begin, *blocks])
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, check=True)
