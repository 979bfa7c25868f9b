"""The house rules that a reader can rely on, read off the source itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("contrastive_core", "cpc")

# Only these may know hydra: each turns a command line into objects, and hands those down.
ENTRY_POINTS = {
    "cpc/ablate.py",
    "cpc/demo.py",
    "cpc/detect.py",
    "cpc/distill.py",
    "cpc/entry.py",
    "cpc/evaluate.py",
    "cpc/export.py",
    "cpc/finetune.py",
    "cpc/mistakes.py",
    "cpc/plan.py",
    "cpc/pretrain.py",
    "cpc/report.py",
    "cpc/run.py",
    "cpc/shortcuts.py",
    "cpc/simclr_v2.py",
    "cpc/sweep_labels.py",
    "cpc/sweep_schema.py",
    "cpc/two_phases.py",
}


def _name(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


MODULES = [path for package in PACKAGES for path in sorted((CHECKOUT / package).rglob("*.py"))]
each_module = pytest.mark.parametrize("path", MODULES, ids=_name)


def _imported(path: Path) -> set[str]:
    """The packages a module imports anywhere in it, also inside functions; a relative import counts as its own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = _name(path).partition("/")[0]
            found.add(package if node.level else (node.module or "").partition(".")[0])
    return found


@each_module
def test_imports_point_down(path: Path) -> None:
    below = {"contrastive_core": {"cpc", "tools", "tests"}, "cpc": {"tools", "tests"}}
    assert not _imported(path) & below[_name(path).partition("/")[0]]


@each_module
def test_hydra_stays_at_the_entry_points(path: Path) -> None:
    if _name(path) in ENTRY_POINTS:
        return
    assert not _imported(path) & {"hydra", "omegaconf"}
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    parameters = {arg.arg for function in functions for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}
    assert "cfg" not in parameters, "a function takes tensors, numbers and objects, never a cfg"


@each_module
def test_names(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "misc"}, "name a module after what it knows"
    classes = [n.name for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ClassDef)]
    assert not [name for name in classes if re.match(r"_*Base([A-Z]|$)", name) or name.endswith(("Manager", "Helper"))]


@each_module
def test_everything_public_has_a_docstring(path: Path) -> None:
    module = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(module), "the module's docstring: the idea in a paragraph, and the paper"
    definitions = [n for n in module.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    bare = [n.name for n in definitions if not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not bare


@pytest.mark.parametrize("path", sorted((CHECKOUT / "tools").glob("*.py")), ids=_name)
def test_tools_are_a_few_lines(path: Path) -> None:
    # Each main is in a package: tools/ is not in the wheel.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= 8


def _loaded_by(statement: str) -> set[str]:
    """The top-level packages in sys.modules after the statement, in a process of its own."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


HEAVY = {"accelerate", "hydra", "kornia", "matplotlib", "omegaconf", "pyarrow", "sklearn", "tensorboard", "timm"}


def test_the_losses_load_torch_and_einops_only() -> None:
    beside_torch = _loaded_by("import contrastive_core.losses") - _loaded_by("import torch, einops")
    assert not beside_torch - set(sys.stdlib_module_names) - {"contrastive_core"}


def test_importing_cpc_is_cheap() -> None:
    assert not _loaded_by("import cpc") & HEAVY


def test_commands_start_without_what_few_of_them_need() -> None:
    # Detection is torchvision's, and imports it. sympy stands for torch's compiler, which FSDP and torchvision load.
    commands = sorted(path.stem for path in (CHECKOUT / "tools").glob("*.py") if path.stem not in {"detect", "demo"})
    modules = [name for name in commands if (CHECKOUT / "cpc" / f"{name}.py").is_file()]
    assert {"pretrain", "evaluate", "finetune", "sweep_labels", "plan"} <= set(modules)
    loaded = _loaded_by(f"import {', '.join(f'cpc.{name}' for name in modules)}")
    assert not loaded & (HEAVY - {"accelerate", "hydra", "omegaconf"} | {"torchvision", "sympy"})
