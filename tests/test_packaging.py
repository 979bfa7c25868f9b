"""What is installed is the whole of it: every module, every recipe, and a command that runs away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the backend itself: no network, and no second environment to fill."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    run = subprocess.run(build, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_every_recipe(wheel: Path) -> None:
    modules = {
        path.relative_to(CHECKOUT).as_posix()
        for package in ("cpc", "contrastive_core")
        for path in [*(CHECKOUT / package).rglob("*.py"), CHECKOUT / package / "py.typed"]
    }
    recipes = {f"cpc/{path.relative_to(CHECKOUT).as_posix()}" for path in (CHECKOUT / "configs").rglob("*.yaml")}
    assert recipes

    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert modules | recipes <= held
    assert {name.partition("/")[0] for name in held} == {"cpc", "contrastive_core"}


def test_wheel_names_its_licence_and_its_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch>=2.9\n" in metadata


def test_launches_from_an_install_outside_the_checkout(
    wheel: Path, tmp_path: Path, launch_tool: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(installed), str(wheel)], check=True, stdin=subprocess.DEVNULL)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # PYTHONPATH comes before site-packages, so before a checkout that is installed in place.
    env = {**os.environ, "PYTHONPATH": str(installed)}
    where = [sys.executable, "-c", "import cpc, contrastive_core; print(cpc.__file__, contrastive_core.__file__)"]
    found = subprocess.run(where, cwd=elsewhere, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert all(Path(file).is_relative_to(installed) for file in found)

    run_dir = tmp_path / "run"
    overrides = [f"run_dir={run_dir}", "steps=2", "batch_size=8", "probe_every=0", "device=cpu"]
    run = launch_tool("-m", "cpc.pretrain", *overrides, cwd=elsewhere, env=env)
    assert run.returncode == 0, run.stderr

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines
    assert lines[-1]["step"] == 2
    assert (run_dir / "encoder.safetensors").is_file()
    assert not list(elsewhere.iterdir()), "a run writes into its own folder only"
