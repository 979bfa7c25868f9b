"""The doctor says what a machine lacks, on machines that lack it: each import blocked in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT, run_command

from cpc import doctor
from cpc.doctor import Finding

BLOCK = """import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r} or name in {names!r}:
            raise ImportError(f"blocked {{name}}")

sys.meta_path.insert(0, Blocked())
"""


def examined(tmp_path: Path, *blocked: str, env: dict[str, str] | None = None) -> tuple[int, dict[str, list[Finding]]]:
    """Exit code and findings, by name, of a process in which these modules cannot be imported."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCK.format(names=set(blocked)))
    paths = {"PYTHONPATH": f"{site}{os.pathsep}{CHECKOUT}"}
    done = run_command([sys.executable, "-m", "cpc.doctor", "--json"], tmp_path, env={**paths, **(env or {})})
    assert "Traceback" not in done.stderr
    read = json.loads(done.stdout)
    assert read["possible"] == (done.returncode == 0)
    found: dict[str, list[Finding]] = {}
    for row in read["findings"]:
        found.setdefault(row["name"], []).append(Finding(**row))
    return done.returncode, found


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


# ---- without a piece ----


def test_without_torch_everything_else_is_still_told(tmp_path):
    code, found = examined(tmp_path, "torch", "mlxtend", "hydra")
    assert code == 1
    assert only(found["import torch"]).state == "problem"
    assert "blocked torch" in only(found["import torch"]).text
    assert 'pip install "torch>=2.9"' in only(found["torch"]).text
    assert only(found["hydra-core"]).state == "problem"
    assert only(found["extra demo"]).state == "note"
    assert 'pip install "cpc-images[demo]"' in only(found["extra demo"]).text
    assert {"python", "gpu", "cores", "memory", "disk", "open files", "shared memory"} <= set(found)


REQUIRED = (
    "torchvision einops kornia accelerate hydra numpy PIL safetensors pyarrow tqdm tensorboard sklearn matplotlib"
)


@pytest.mark.slow
@pytest.mark.parametrize("module", [*REQUIRED.split(), "matplotlib"])
def test_without_what_every_run_imports(module, tmp_path):
    code, found = examined(tmp_path, module)
    names = {"hydra": "hydra-core", "PIL": "pillow", "sklearn": "scikit-learn"}
    assert code == 1
    assert only(found[names.get(module, module)]).state == "problem"
    assert f"blocked {module}" in only(found[names.get(module, module)]).text


@pytest.mark.slow
@pytest.mark.parametrize(("module", "line"), [
    ("mlxtend", "extra demo"), ("timm", "extra vit"), ("datasets", "extra data"), ("wandb", "extra trackers"),
    ("hydra_plugins.hydra_joblib_launcher", "extra sweep"),
])  # fmt: skip
def test_without_an_optional_piece_runs_are_possible(module, line, tmp_path):
    code, found = examined(tmp_path, module)
    assert code == 0
    assert only(found[line]).state == "note"
    assert f"cpc-images[{line.removeprefix('extra ')}]" in only(found[line]).text


def test_a_module_that_breaks_while_it_loads_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "torchvision_broken.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    module, wrong = doctor.imported("torchvision_broken")
    assert module is None
    assert wrong == "RuntimeError: operator torchvision::nms does not exist"


def test_the_ranges_are_the_projects_own():
    wanted = {requirement.distribution: requirement for requirement in doctor.requirements()}
    assert wanted["torch"] == ("torch", "2.9", "")
    assert wanted["timm"] == ("timm", "1.0", "vit")
    assert "cpc-images" not in wanted


@pytest.mark.parametrize(("version", "least", "expected"), [
    ("2.14.1", "2.9", False), ("2.8.0", "2.9", True), ("2.9", "2.9", False), ("2.9.1+cpu", "2.9.2", True),
    ("1.10", "1.9", False), ("3.0rc1", "3.0", False),
])  # fmt: skip
def test_versions_are_compared_number_by_number(version, least, expected):
    assert doctor.older(version, least) is expected


def test_an_older_version_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.1")
    version, wrong = doctor.package(doctor.Requirement("einops", "0.8", ""))
    assert (version, wrong) == ("", "einops 0.1 is older than 0.8")


# ---- accelerate's configuration, read by accelerate itself ----

CONFIG = """compute_environment: LOCAL_MACHINE
distributed_type: {kind}
num_processes: {processes}
num_machines: {machines}
mixed_precision: 'no'
use_cpu: {cpu}
"""


def config(tmp_path, monkeypatch, text: str, gpus: int = 0) -> Finding:
    folder = tmp_path / "accelerate"
    folder.mkdir()
    (folder / "default_config.yaml").write_text(text)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return only(list(doctor.accelerate_config(gpus)))


def test_no_configuration_is_fine(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert only(list(doctor.accelerate_config(0))).state == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["HF_HOME", "XDG_CACHE_HOME"])
def test_accelerate_looks_where_the_doctor_looks(variable, tmp_path, monkeypatch, run_tool):
    """In a process of its own: accelerate reads the variables once, at import."""
    code = (
        "from accelerate.commands.config.config_args import default_yaml_config_file as theirs\n"
        "from cpc.doctor import accelerate_config_file\n"
        "print(theirs); print(accelerate_config_file())"
    )
    monkeypatch.delenv("HF_HOME", raising=False)
    done = run_tool("-c", code, env={variable: str(tmp_path)})
    theirs, ours = done.stdout.split()
    assert theirs == ours
    assert ours.startswith(str(tmp_path))


@pytest.mark.parametrize("text", [
    "num_processes: [", "just words", "num_processes: 1\n",
    CONFIG.format(kind="'NO'", processes=1, machines=1, cpu=False) + "colour: red\n",
])  # fmt: skip
def test_a_broken_configuration_is_a_problem(text, tmp_path, monkeypatch):
    finding = config(tmp_path, monkeypatch, text)
    assert finding.state == "problem"
    assert "is broken" in finding.text
    assert "\n" not in finding.text


@pytest.mark.parametrize(("kind", "processes", "machines", "cpu", "gpus", "state"), [
    ("MULTI_GPU", 8, 1, False, 1, "problem"),
    ("MULTI_GPU", 8, 1, False, 8, "ok"),
    ("MULTI_GPU", 8, 2, False, 4, "ok"),
    ("MULTI_GPU", 8, 2, False, 2, "problem"),
    ("MULTI_GPU", 2, 1, False, 0, "note"),
    ("MULTI_CPU", 2, 1, True, 0, "ok"),
    ("'NO'", 1, 1, False, 0, "ok"),
])  # fmt: skip
def test_more_processes_than_devices(kind, processes, machines, cpu, gpus, state, tmp_path, monkeypatch):
    text = CONFIG.format(kind=kind, processes=processes, machines=machines, cpu=cpu)
    assert config(tmp_path, monkeypatch, text, gpus).state == state


@pytest.mark.slow
def test_a_broken_configuration_in_the_whole_command(tmp_path):
    folder = tmp_path / "home" / "accelerate"
    folder.mkdir(parents=True)
    (folder / "default_config.yaml").write_text("num_processes: [")
    code, found = examined(tmp_path, env={"HF_HOME": str(tmp_path / "home")})
    assert code == 1
    assert only(found["accelerate config"]).state == "problem"


# ---- the machine ----


def test_few_open_files_are_told(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))  # a child inherits it
    try:
        _, found = examined(tmp_path, "torch")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert only(found["open files"]).state == "note"
    assert "128 open files" in only(found["open files"]).text
    assert "ulimit -n 4096" in only(found["open files"]).text


@pytest.mark.parametrize(
    ("limit", "state"), [(32, "problem"), (256, "note"), (1024, "ok"), (resource.RLIM_INFINITY, "ok")]
)
def test_limits_of_open_files(limit, state):
    assert only(list(doctor.open_files(limit))).state == state


@pytest.mark.parametrize(("cpuinfo", "state", "said"), [
    ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512_bf16", "ok", "avx512_bf16"),
    ("vendor_id : GenuineIntel\nflags : amx_bf16 avx512_bf16 sse", "ok", "(amx_bf16)"),
    ("Features : asimd bf16", "ok", "(bf16)"), ("vendor_id : GenuineIntel\nflags : avx512_bf16", "note", "without AMX"),
    ("flags : avx2", "note", "no bf16"), ("", "note", "no bf16"),
])  # fmt: skip
def test_bf16_of_the_cpu(cpuinfo, state, said):
    finding = only(list(doctor.cpu(cpuinfo)))
    assert finding.state == state
    assert said in finding.text


@pytest.mark.parametrize(("capability", "state", "said"), [
    ((9, 0), "ok", "precision=bf16"), ((8, 0), "ok", "precision=bf16"), ((7, 5), "note", "precision=fp16"),
])  # fmt: skip
def test_bf16_of_a_gpu(capability, state, said):
    finding = only(list(doctor.gpus([("some GPU", 80 * 2**30, capability)])))
    assert finding.state == state
    assert "80 GiB" in finding.text
    assert said in finding.text


def test_without_a_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    finding = only(list(doctor.compiler(gpu=False)))
    assert finding.state == "note"
    assert "no C++ compiler" in finding.text


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", float("inf")), ("150000 100000", 1.5), ("max", float("inf"))]
)
def test_cores_that_a_container_allows(quota, expected):
    assert doctor.allowed_cores(quota) == expected


def test_a_folder_without_room_or_shared_memory(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 50 * 2**20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert only(list(doctor.disk(tmp_path))).state == "problem"
    assert only(list(doctor.shared_memory(tmp_path))).state == "note"
    assert "workers=0" in only(list(doctor.shared_memory(tmp_path / "none"))).text


def test_a_look_that_fails_is_a_note():
    (finding,) = doctor.looked_at("memory", lambda: [Finding("memory", "ok", str(1 / 0))])
    assert finding.state == "note"
    assert "ZeroDivisionError" in finding.text


def test_the_words_and_a_wrong_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "note") for line in lines[:-1])
    assert lines[-1].startswith("runs are possible")
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--dir", str(tmp_path / "none")])
    assert ended.value.code == 2
