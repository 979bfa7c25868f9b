"""Each tracker's own files, read back: the rows and the configuration that were sent; no network."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import cpc.pretrain
from contrastive_core import trackers
from contrastive_core.run_log import RunLog, read_metrics
from contrastive_core.trackers import check_trackers, dotted
from cpc.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("as_a_new_process")

CONFIG = {
    "seed": 3,
    "method": {"context": {"width": 8, "deep": {}}, "offsets": [1, 2]},
    "clip": None,
    "precision": "no",
}
ROWS = [{"step": 1, "loss": 2.5, "accuracy/down_2": 0.25}, {"step": 2, "loss": 2.25}, {"step": 2, "knn": 0.5}]

TINY = ["method.context.width=8", "method.context.layers=1", "batch_size=8", "encoder.width=4",
        "threads=1", "probe_every=0", "log_every=1", "save_every=2"]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_online(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def nested(flat):
    """The inverse of `dotted`, of keys that have no dot of their own."""
    found = {}
    for key, value in flat.items():
        *outer, last = key.split(".")
        inside = found
        for name in outer:
            inside = inside.setdefault(name, {})
        inside[last] = value
    return found


def records_of(file):
    """The records of a wandb file: blocks of 32 KiB, of checksum, length, kind (whole, first, middle, last), bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, started, found = file.read_bytes(), 7, b"", []
    assert data[:4] in (b":W&B", b"")
    while at + 7 <= len(data):
        if (1 << 15) - at % (1 << 15) < 7:
            at += (1 << 15) - at % (1 << 15)
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):
            break  # still being written
        started += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(started))
            started = b""
    return found


def ended_records_of(file):
    """Once the run has ended: wandb's own process may write the last of the file after `finish` has returned."""
    until = time.monotonic() + 20
    records = records_of(file)
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() < until, f"{file} does not end"
        time.sleep(0.05)
        records = records_of(file)
    return records


def wandb_run(run_dir):
    """Of the only run of wandb in a folder, over all times that it went on: its ids, configuration and rows."""
    ids, config, rows = set(), {}, []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in ended_records_of(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                items = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    (only,) = ids
    return only, {key: value for key, value in config.items() if key != "_wandb"}, rows


def tensorboard_run(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    texts = [event.tensor_proto.string_val[0].decode() for tag in tags["tensors"] for event in events.Tensors(tag)]
    return scalars, texts


def written(run_dir, *names, start=0):
    with RunLog(run_dir, start=start, steps=4, trackers=names, config=CONFIG) as log:
        for row in ROWS:
            log.write({**row, "step": row["step"] + start})


def test_tensorboard_has_the_rows_and_the_configuration(tmp_path):
    written(tmp_path, "tensorboard")
    scalars, (text,) = tensorboard_run(tmp_path / "tensorboard")
    assert scalars == {"loss": [(1, 2.5), (2, 2.25)], "accuracy/down_2": [(1, 0.25)], "knn": [(2, 0.5)]}
    lines = [line.strip().partition(": ") for line in text.split("\n")]
    assert nested({key: json.loads(value) for key, _, value in lines}) == CONFIG
    assert "method.context.width" in [key for key, _, _ in lines]


def test_wandb_has_the_rows_and_the_configuration(tmp_path):
    written(tmp_path, "wandb")
    first, config, rows = wandb_run(tmp_path)
    assert config == CONFIG
    assert rows == ROWS
    time.sleep(1)  # the folders of a run that goes on are told apart by the second
    written(tmp_path, "wandb", start=2)
    again, _, rows = wandb_run(tmp_path)
    assert again == first == json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.slow  # most of it trackio's import
def test_trackio_has_the_rows_and_the_configuration(tmp_path):
    """In processes of its own, of a run that goes on: the package looks for its folder when it is imported."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_trackers as t; "
        "t.written(Path(sys.argv[2]), 'trackio', start=int(sys.argv[3]))"
    )
    read = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; (name,) = S.get_runs('cpc-images'); "
        "print(json.dumps([name, S.get_run_config('cpc-images', name), S.get_logs('cpc-images', name)]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "run").mkdir()
    printed = ""
    for command in (
        [code, str(Path(__file__).parent), str(tmp_path / "run"), "0"],
        [f"{code}; {read}", str(Path(__file__).parent), str(tmp_path / "run"), "2"],
    ):
        ended = subprocess.run(
            [sys.executable, "-c", *command], env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        printed += ended.stdout
    assert printed.count("Run finished") == 2  # not once more at exit, where a quiet tool prints its folder alone
    assert "left out" not in printed
    name, config, logs = json.loads(ended.stdout.splitlines()[-1])
    assert name == json.loads((tmp_path / "run/trackers.json").read_text())["trackio"]
    assert name.startswith("run-")
    assert {key: value for key, value in config.items() if not key.startswith("_")} == CONFIG
    later = [{**row, "step": row["step"] + 2} for row in ROWS]
    assert [{k: v for k, v in row.items() if k != "timestamp"} for row in logs] == [*ROWS, *later]


def test_a_run_goes_on_in_the_same_one_and_learns_the_same(compose, interrupted_at, tmp_path):
    def run(name, *options):
        pretrain(compose(*TINY, "steps=4", f"run_dir={tmp_path / name}", *options))

    both = "trackers=[tensorboard,wandb]"
    with interrupted_at(2):
        run("tracked", both)
    time.sleep(1)
    run("tracked", both, "resume=auto")
    run("plain", "trackers=[]")
    scalars, _ = tensorboard_run(tmp_path / "tracked/tensorboard")
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4]  # what came after the checkpoint is purged
    _, config, rows = wandb_run(tmp_path / "tracked")
    assert config["method"]["context"]["width"] == 8
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4]  # step 3 was taken again after the checkpoint of step 2
    kept = [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(tmp_path / "tracked")]
    assert kept == [
        {k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(tmp_path / "plain")
    ]
    weights, same = (load_file(tmp_path / name / "encoder.safetensors") for name in ("tracked", "plain"))
    assert all(weights[name].equal(same[name]) for name in same)
    assert not {"tensorboard", "wandb", "trackers.json"} & {file.name for file in (tmp_path / "plain").iterdir()}


@pytest.mark.slow
def test_of_several_processes_one_sends(launch_tool, tmp_path):
    options = [*TINY, "steps=2", "device=cpu", "trackers=[wandb]", f"run_dir={tmp_path / 'two'}"]
    ended = launch_tool("tools/pretrain_cpc.py", *options, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert len(list((tmp_path / "two").glob("wandb/offline-run-*"))) == 1
    assert [row["step"] for row in wandb_run(tmp_path / "two")[2]] == [1, 2]


def test_quietly_it_says_nothing(call_tool, monkeypatch, capfd, tmp_path):
    monkeypatch.delenv("WANDB_SILENT")
    options = [*TINY, "steps=1", "trackers=[wandb]", "verbosity=quiet"]
    call_tool(cpc.pretrain.main, *options, f"run_dir={tmp_path / 'quiet'}")
    assert capfd.readouterr() == (f"{tmp_path / 'quiet'}\n", "")
    assert [row["step"] for row in wandb_run(tmp_path / "quiet")[2]] == [1]


def test_one_that_fails_is_left_out_with_one_warning(tmp_path, capsys):
    with RunLog(tmp_path, start=0, steps=4, trackers=["tensorboard", "wandb"], config=CONFIG) as log:
        log.write({"step": 1, "loss": 2.5})
        log._trackers._open["tensorboard"].writer.close()
        (tmp_path / "tensorboard").rename(tmp_path / "gone")  # a disk that is no longer there
        (tmp_path / "tensorboard").write_text("")
        log.write({"step": 2, "loss": 2.25})
        log.write({"step": 3, "loss": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert [row["step"] for row in wandb_run(tmp_path)[2]] == [1, 2, 3]
    told = capsys.readouterr()
    assert (told.out + told.err).count("tensorboard failed and is left out from here on") == 1


def test_one_that_does_not_start_is_left_out(tmp_path, capsys):
    (tmp_path / "trackers.json").write_text("{")
    written(tmp_path, "wandb")
    assert len(read_metrics(tmp_path)) == 3
    assert "wandb failed and is left out from here on (" in capsys.readouterr().out


def test_what_cannot_be_is_told_before_data_is_read(compose, monkeypatch, tmp_path):
    def run(names):
        out = f"run_dir={tmp_path / 'out'}"
        pretrain(compose(*TINY, "steps=1", "data=parquet", "data.train=none", f"trackers={names}", out))

    with pytest.raises(ValueError, match=r"trackers=\[mlflow\]: pass any of tensorboard, wandb, trackio, each once"):
        run("[mlflow]")
    with pytest.raises(ValueError, match=r"trackers=\[wandb,wandb\]: pass any of"):
        run("[wandb,wandb]")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r'trackers=\[wandb\]: wandb is not installed: pip install "cpc-images\[trackers\]"'
    ):
        run("[wandb]")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_that_name_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "emptytracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(trackers, "TRACKERS", ("emptytracker",))
    with pytest.raises(ImportError, match="emptytracker is not installed"):
        check_trackers(["emptytracker"])


def test_dotted_keys():
    assert dotted(CONFIG) == {
        "seed": 3, "method.context.width": 8, "method.context.deep": {}, "method.offsets": [1, 2], "clip": None,
        "precision": "no",
    }  # fmt: skip
    assert nested(dotted(CONFIG)) == CONFIG
