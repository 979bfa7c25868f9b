"""The configurations for accelerate that ship with the recipes: each is read, and what can be run here is."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import CHECKOUT, free_port, run_command

from contrastive_core.run_log import read_metrics
from cpc.entry import start_accelerator

FOLDER = CHECKOUT / "configs/accelerate"
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file"]
TINY = ["steps=2", "batch_size=8", "encoder.width=4", "method.context.width=8", "method.context.layers=1"]
TINY += ["probe_every=0", "log_every=1", "threads=1", "device=cpu"]


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [("one_gpu", "NO", 1, 1), ("eight_gpus", "MULTI_GPU", 1, 8), ("two_nodes", "MULTI_GPU", 2, 16)],
)
def test_accelerate_reads_them(name, kind, machines, processes):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == DistributedType[kind]
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (machines, processes, "no")


def test_there_is_no_other():
    names = sorted(file.name for file in FOLDER.iterdir())
    assert names == ["eight_gpus.yaml", "one_gpu.yaml", "slurm.sh", "two_nodes.yaml"]
    page = (CHECKOUT / "docs/clusters.md").read_text()
    assert all(f"(../configs/accelerate/{name})" in page for name in names)


def test_the_slurm_script_is_one():
    subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=True)


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED"])
def test_accelerate_s_own_sharding_is_refused(plugin, monkeypatch):
    """On a CPU accelerate falls back to DDP in silence; `shard=true` is the one way, tests/test_sharding.py."""
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(ValueError, match=f"accelerate's {plugin} is not used here: leave it out .* pass shard=true"):
        start_accelerator(precision="no", device="cpu", threads=None)


def launched(config: str, folder: Path, *options: str) -> list[str]:
    tool = str(CHECKOUT / "tools/pretrain_cpc.py")
    return [sys.executable, *LAUNCH, str(FOLDER / f"{config}.yaml"), *options, tool, *TINY, f"run_dir={folder}"]


@pytest.mark.slow
def test_eight_gpus_are_two_processes_here(tmp_path):
    """With the negatives of each process alone: 4 images of 36 patches."""
    command = launched("eight_gpus", tmp_path / "run", "--num_processes", "2")
    done = run_command([*command, "method.gather=false"], tmp_path)
    assert done.returncode == 0, done.stderr
    for row in read_metrics(tmp_path / "run"):
        assert (row["ranks"], row["negatives"]) == (1, 4 * 36 - 1)  # its own process's
        assert row["chance_loss"] == pytest.approx(math.log(4 * 36))


@pytest.mark.slow
def test_one_gpu_is_one_process_here(tmp_path):
    done = run_command(launched("one_gpu", tmp_path / "run"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["ranks"] for row in read_metrics(tmp_path / "run")] == [1, 1]


@pytest.mark.slow
def test_two_machines_are_two_launchers_here(tmp_path, run_tool):
    port = str(free_port())
    common = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    commands = [launched("two_nodes", tmp_path / "run", *common, "--machine_rank", rank) for rank in ("0", "1")]
    environment = {"PYTHONPATH": str(CHECKOUT), "PATH": "/usr/bin:/bin", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(commands[1], cwd=tmp_path, env=environment, start_new_session=True) as other:
        done = run_command(commands[0], tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        assert other.wait(60) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["ranks"] for row in rows] == [2, 2]

    alone = run_tool("tools/pretrain_cpc.py", *TINY, f"run_dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("run", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert json.loads((tmp_path / "run/encoder.json").read_text())["dim"] == 16
