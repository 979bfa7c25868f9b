"""Which precision a recipe takes where it leaves that to the machine."""

from __future__ import annotations

import hydra
import pytest
import torch
from conftest import CHECKOUT
from omegaconf import OmegaConf

import cpc.pretrain  # noqa: F401  its command says what a recipe may ask
from cpc.entry import config_search
from cpc.fast_precision import fast_precision


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


AMD, INTEL = "vendor_id : AuthenticAMD\n", "vendor_id : GenuineIntel\n"


@pytest.mark.parametrize(("said", "expected"), [
    (f"{AMD}flags : avx2 avx512_bf16", "bf16"), (f"{INTEL}flags : amx_bf16 avx2", "bf16"),
    ("Features : asimd bf16", "bf16"), (f"{INTEL}flags : avx2 avx512_bf16", "no"),
    (f"{AMD}flags : avx2 avx512f avx512_vnni", "no"), ("processor : 0", "no"), ("", "no"),
])  # fmt: skip
def test_of_a_cpu(no_gpu, tmp_path, said, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\n{said}\n")
    assert fast_precision(cpuinfo=cpuinfo) == expected


def test_of_a_system_that_does_not_say(no_gpu, tmp_path):
    assert fast_precision(cpuinfo=tmp_path / "not there") == "no"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "no"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_of_the_process_own_gpu(monkeypatch, tmp_path, capability, expected):
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or capability)
    nothing = tmp_path / "cpuinfo"
    assert fast_precision(cpuinfo=nothing) == expected == fast_precision("cuda", cpuinfo=nothing)
    assert asked == [3, 3]
    assert fast_precision("cpu", cpuinfo=nothing) == "no"


def leaving_it_open():
    """Recipes that ask the machine."""
    files = (CHECKOUT / "configs" / "experiment").glob("*.yaml")
    return sorted(file.stem for file in files if "precision: ${fast_precision:" in file.read_text())


def test_the_small_recipes_leave_it_to_the_machine():
    assert leaving_it_open() == ["cifar10_cpc", "tinyimagenet_cpc"]


@pytest.mark.parametrize("experiment", leaving_it_open())
@pytest.mark.parametrize(("given", "expected"), [([], None), (["precision=no"], "no"), (["precision=bf16"], "bf16")])
def test_a_run_keeps_the_answer(no_gpu, experiment, given, expected):
    with config_search():
        cfg = hydra.compose("pretrain", [f"experiment={experiment}", "data.train=x.parquet", *given])
    settled = OmegaConf.to_container(cfg, resolve=True)["precision"]
    assert settled == (expected or fast_precision())
