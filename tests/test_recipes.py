"""Whole recipes at work: every experiment takes a step, made small, and the family runs from the command line."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import on_processes
from safetensors.torch import load_file
from tiny_runs import tool_run

import cpc
from contrastive_core.run_log import read_metrics
from cpc.configs import config_folder
from cpc.entry import build
from cpc.pretrain import main_of_any_method, pretrain

pytestmark = pytest.mark.usefixtures("as_a_new_process")

CONFIGS = Path(config_folder())
DOCS = Path(__file__).resolve().parents[1] / "docs"
METHODS = sorted(file.stem for file in (CONFIGS / "method").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
OTHER_TOOLS = ("finetune", "distill", "detection")
EXPERIMENTS = [name for name in EXPERIMENTS if not any(tool in name for tool in OTHER_TOOLS)]  # of pretrain.yaml
SIDE, BATCH = 28, 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 32 random pictures of 28 px in two classes."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(32):
        (folder / str(i % 2)).mkdir(exist_ok=True)
        pixels = generator.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(i % 2) / f"{i:02}.png")
    return folder


def small_encoder(encoder):
    """The transformer, or for the residual networks ours with their norm, with a few thousand weights."""
    name = encoder["_target_"].split(".")[-1]
    if name == "MoCoViT":
        return {**encoder, "patch_size": 7, "dim": 16, "depth": 1, "heads": 2}
    norm = encoder.get("norm", "batch") if name.startswith("resnet") else "batch"
    options = {"width": 4, "blocks": [1, 1], "stem_stride": 2, "norm": norm}
    return {"_target_": "cpc.encoders.resnet_small", **options}


# what a configuration has of these is set to them; all else, BatchNorm and precision included, stays as it is
SMALL = {
    "load_size": SIDE,
    "image_size": SIDE,
    "batch_size": BATCH,
    "steps": 1,
    "patch": {"size": 8, "stride": 4},
    "memory": {"queue": 24, "bank": 8},
    "method": {
        "context": {"width": 8, "layers": 1},
        "head": {"hidden": 8, "out": 8},
        "predictor": {"hidden": 8, "out": 8},
        "target_dim": 8,
    },
    "device": "cpu",
    "threads": 1,
    "workers": 0,
    "probe_every": 0,
}


def set_where_present_(cfg, values):
    for key, value in values.items():
        if key not in cfg or (cfg[key] is None and key == "patch"):
            continue
        if isinstance(value, dict):
            set_where_present_(cfg[key], value)
        else:
            cfg[key] = value


def shrunk(cfg, photos, run_dir):
    """The configuration on a laptop's scale: the 32 pictures, a tiny network, one step."""
    set_where_present_(cfg, SMALL)
    cfg.encoder = small_encoder(cfg.encoder)
    cfg.data = {"_target_": "contrastive_core.data.imagefolder", "root": str(photos), "size": cfg.load_size}
    cfg.run_dir = str(run_dir)
    return cfg


@pytest.fixture
def one_step(compose, photos, tmp_path):
    """`one_step("method=simclr", ...)`: run it, made small, and return its row of metrics and its folder."""
    numbers = itertools.count()

    def run(*overrides):
        cfg = shrunk(compose(*overrides, name="pretrain"), photos, tmp_path / f"run{next(numbers)}")
        torch.manual_seed(cfg.seed)
        before = build(cfg.encoder).state_dict()
        folder = pretrain(cfg)
        (row,) = read_metrics(folder)
        assert row["step"] == 1
        assert row["lr"] > 0
        assert all(math.isfinite(value) for value in row.values())
        after = load_file(folder / "encoder.safetensors")
        moved = [name for name, weight in after.items() if not torch.equal(weight, before[name])]
        assert {name.split(".")[-1] for name in moved} & {"weight"}
        return row, folder

    return run


def saved(folder):
    return folder / "checkpoints/step_00000001/method.safetensors"


def check_loads(folder):
    features = cpc.load_encoder(folder)(torch.rand(3, 3, 40, 40))
    assert features.shape == (3, json.loads((folder / "encoder.json").read_text())["dim"])
    assert features.isfinite().all()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_takes_a_step_and_leaves_an_encoder(one_step, name):
    if "vit" in name:
        pytest.importorskip("timm")
    place = "data.train=x" if name.startswith(("cifar10", "tinyimagenet")) else "data.root=x"
    row, folder = one_step(f"experiment={name}", place)
    check_loads(folder)
    if "simclr" in name:
        assert row["negatives"] == 2 * BATCH - 2 + (24 if "v2" in name else 0)


WHOLE = [name for name in METHODS if name != "cpc"]


@pytest.mark.parametrize("name", WHOLE)
def test_channels_are_dropped_and_pictures_deformed_in_any_method_by_configuration(one_step, name):
    added = ["views.channel_drop=0.5", "views.elastic=0.2"]
    options = [f"method={name}", "data=imagefolder", "data.root=x"]
    row, folder = one_step(*options, *added)
    check_loads(folder)
    if name in ("simclr", "pirl"):  # the two kinds of views
        plain, _ = one_step(*options)
        assert row["loss"] != plain["loss"]


LOSSES = ["info_nce", "dcl", "sigmoid", "nt_xent"]


@pytest.mark.parametrize(("method", "loss"), list(itertools.product(["cpc", "simclr"], LOSSES)))
def test_a_loss_plugs_into_both_methods_by_its_name_alone(one_step, method, loss):
    row, folder = one_step(f"method={method}", f"loss={loss}", "data=imagefolder", "data.root=x")
    check_loads(folder)
    candidates = 36 * BATCH if method == "cpc" else 2 * BATCH - 1
    if loss == "sigmoid":
        assert any(name.startswith("loss") for name in load_file(saved(folder)))  # temperature and bias are learned
    else:
        in_the_sum = candidates - 1 if loss == "dcl" else candidates  # decoupled: without the positive
        assert row["chance_loss"] == pytest.approx(math.log(in_the_sum), rel=1e-5)


def test_without_a_method_the_methods_are_named(call_tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        call_tool(main_of_any_method, "steps=1")
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "You must specify 'method', e.g, method=<OPTION>" in printed
    assert printed.strip().partition("Available options: ")[2].split() == METHODS
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_method_of_your_own_needs_no_fork(photos, call_tool, tmp_path, monkeypatch):
    """What docs/methods.md says to write, written as it says."""
    text = (DOCS / "methods.md").read_text()
    (code,) = re.findall(r"```python\n(# my_methods.py\n.*?)```", text, re.DOTALL)
    (config,) = re.findall(r"```yaml\n(# @package _global_\n# my_configs/method/mine.yaml\n.*?)```", text, re.DOTALL)
    (tmp_path / "my_methods.py").write_text(code)
    (tmp_path / "my_configs/method").mkdir(parents=True)
    (tmp_path / "my_configs/method/mine.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sizes = [f"{name}={SIDE}" for name in ("load_size", "image_size")] + ["encoder.width=4", "probe_every=0"]
    data = ["data=imagefolder", f"data.root={photos}", f"batch_size={BATCH}", "steps=2", "log_every=1"]
    options = ["accumulate=2", "grad_cache=true", "device=cpu", "threads=1", f"run_dir={tmp_path / 'run'}"]
    command = ["--config-dir", "my_configs", "method=mine", *sizes, *data, *options]
    call_tool(main_of_any_method, *command)
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(rows[0]["align"] + rows[0]["uniform"], rel=1e-5)
    check_loads(tmp_path / "run")


def test_one_process_from_the_command_line_and_two(run_tool, tmp_path):
    """BatchNorm over all processes, and negatives of all: two processes do what one does."""
    options = ["method=simclr", "steps=2", "batch_size=16", "encoder.width=4", "probe_every=0", "log_every=1"]
    options += ["device=cpu", "threads=1"]
    one = run_tool("tools/pretrain.py", *options)
    assert one.returncode == 0, one.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("simclr-mnist5k-")
    check_loads(folder)
    on_processes(2, tool_run, "pretrain", *options, f"run_dir={tmp_path / 'two'}")
    alone, together = read_metrics(folder), read_metrics(tmp_path / "two")
    assert [row["step"] for row in together] == [1, 2]
    for a, b in zip(together, alone, strict=True):
        assert (a["ranks"], b["ranks"]) == (2, 1)
        assert a["lr"] == b["lr"]
        assert a["negatives"] == b["negatives"] == 30
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-2)
    weights = [load_file(path / "encoder.safetensors") for path in (folder, tmp_path / "two")]
    for name, weight in weights[0].items():
        # dividing by the deviation of so few images magnifies the rounding of sums taken in another order
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-2, atol=1e-3)
