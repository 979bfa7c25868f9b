"""The table of runs: their states as they are, sorted and filtered, and what cannot be read named."""

import csv
import fcntl
import json
import math
import shutil

import pytest

from contrastive_core.run_log import read_metrics
from cpc.pretrain import pretrain
from cpc.runs import main, sorted_by, table_of

TINY = ["batch_size=8", "encoder.width=4", "steps=2", "threads=1", "probe_every=2", "probe_images=50", "log_every=1"]
CPC = ["method.context.width=8", "method.context.layers=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of CPC and one of SimCLR."""
    import hydra

    from cpc.configs import config_folder

    folder = tmp_path_factory.mktemp("all")
    for name, options in {"cpc": ["method=cpc", *CPC], "simclr": ["method=simclr"]}.items():
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            pretrain(hydra.compose("pretrain", [*options, *TINY, f"run_dir={folder / 'deep' / name}"]))
    return folder


@pytest.fixture
def runs(made, tmp_path):
    """Those two, a killed one, one that is at work, and one of which nothing can be read."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for name in ("killed", "running", "broken", "huge", "deepest"):
        shutil.copytree(made / "deep/cpc", tmp_path / name)
        (tmp_path / name / "encoder.json").unlink()
    (tmp_path / "killed/metrics.jsonl").write_text('{"step": 1, "loss": 0.25}\n')
    (tmp_path / "broken/config.yaml").write_text("- 1")
    (tmp_path / "huge/metrics.jsonl").write_text('{"step": 1, "loss": 1' + "0" * 400 + "}\n")
    (tmp_path / "deepest/metrics.jsonl").write_text("[" * 100_000 + "\n")
    (tmp_path / "no run").mkdir()
    (tmp_path / "no run/config.yaml").write_text("steps: 3")
    with (tmp_path / "running/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


pytestmark = pytest.mark.usefixtures("as_a_new_process")


def test_every_run_is_what_its_folder_says(runs):
    rows, unread = table_of(runs)
    found = {row.name: row for row in rows}
    assert {name: row.state for name, row in found.items()} == {
        "deep/cpc": "done",
        "deep/simclr": "done",
        "killed": "killed",
        "running": "running",
    }
    reason = f"{runs / 'broken/config.yaml'} is not a run's configuration: it has no steps"
    assert unread[0] == f"broken cannot be read: {reason}"
    assert [line.partition(" cannot be read: ")[0] for line in unread] == ["broken", "deepest", "huge"]
    cpc, metrics = found["deep/cpc"], read_metrics(runs / "deep/cpc")
    assert (cpc.method, cpc.data, cpc.step, cpc.steps) == ("CPC", "mnist5k", 2, 2)
    losses = [row for row in metrics if "loss" in row]
    assert (cpc.loss, cpc.chance) == (losses[-1]["loss"], losses[-1]["chance_loss"])
    assert cpc.knn == metrics[-1]["knn"]
    assert found["deep/simclr"].method == "SimCLR"
    killed = found["killed"]
    assert (killed.step, killed.loss) == (1, 0.25)
    assert math.isnan(killed.knn)
    assert math.isnan(killed.saving)


def test_a_sweep_s_saving_is_its_runs(runs):
    best = {"method": "CPC", "against": "best from scratch"}
    savings = [
        {**best, "labels": 40, "saving": "2.0"},
        {**best, "labels": 100, "saving": "> 2.7"},
        {**best, "labels": 20, "saving": "9.0", "against": "the same network"},
        {**best, "labels": 40, "saving": "9.0", "method": "other"},
    ]
    sweep = runs / "sweep"
    sweep.mkdir()
    (sweep / "summary.json").write_text(json.dumps({"runs": {"CPC": [str(runs / "deep/cpc")]}, "savings": savings}))
    (runs / "deep/summary.json").write_text("[]")  # another program's
    rows = {row.name: row for row in table_of(runs)[0]}
    assert (rows["deep/cpc"].saving, rows["deep/cpc"].labels) == (2.7, 100)
    assert math.isnan(rows["killed"].saving)


def test_a_sweep_that_is_also_worse_than_the_curve_keeps_its_savings(runs):
    rows = [("CPC", 40, "2.0"), ("CPC", 1000, "< 0.16"), ("random", 20, "< 1.0"), ("SimCLR", 20, "< 1.0")]
    savings = [
        {"method": method, "labels": labels, "saving": saving, "against": "best from scratch"}
        for method, labels, saving in rows
    ]
    known = {"CPC": [str(runs / "deep/cpc")], "SimCLR": [str(runs / "deep/simclr")]}
    (runs / "summary.json").write_text(json.dumps({"runs": known, "savings": savings}))
    found = {row.name: row for row in table_of(runs)[0]}
    assert (found["deep/cpc"].saving, found["deep/cpc"].labels) == (2.0, 40)
    assert math.isnan(found["deep/simclr"].saving)


def test_a_folder_of_several_runs_is_none_itself(runs):
    before = table_of(runs)[1]
    (runs / "deep/.lock").touch()
    (runs / "deep/config.yaml").write_text("fraction: 0.01\npretrain: {}\nfinetune: {}\ndistill: {}\n")  # simclr_v2's
    rows, unread = table_of(runs)
    assert unread == before
    assert {"deep/cpc", "deep/simclr"} <= {row.name for row in rows}
    (runs / "killed/encoder.json").write_text("[]")
    assert len(table_of(runs)[1]) == len(before) + 1


def test_sorting(runs):
    rows, _ = table_of(runs)
    assert next(iter(sorted_by(rows, "loss"))).name == "killed"
    by_knn = [row.knn for row in sorted_by(rows, "knn")]
    assert math.isnan(by_knn[-1])
    assert by_knn[:-1] == sorted(by_knn[:-1], reverse=True)
    assert [row.name for row in sorted_by(rows, "name")] == ["deep/cpc", "deep/simclr", "killed", "running"]


def test_the_tool_filters_writes_and_names_what_it_left_out(runs, call_tool, capsys, tmp_path):
    call_tool(main, str(runs), "--method", "CPC", "--state", "done", "--csv", str(tmp_path / "runs.csv"))
    told = capsys.readouterr()
    head, line = told.out.splitlines()
    assert head.split() == ["run", "state", "method", "data", "steps", "loss", "chance", "knn", "label", "saving"]
    assert line.split()[:5] == ["deep/cpc", "done", "CPC", "mnist5k", "2/2"]
    assert told.err.startswith("broken cannot be read")
    (row,) = csv.DictReader((tmp_path / "runs.csv").read_text().splitlines())
    assert (row["name"], row["step"], row["saving"]) == ("deep/cpc", "2", "")
    assert float(row["knn"]) == read_metrics(runs / "deep/cpc")[-1]["knn"]


def test_no_folder_is_one_line(call_tool, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        call_tool(main, str(tmp_path / "none"))
    assert ended.value.code == 2
    told = f"error: {tmp_path / 'none'} is no folder: pass the one that holds the runs, such as runs\n"
    assert capsys.readouterr().err == told
