"""The main job from its configuration and from the command line: what it leaves behind, resuming, and mistakes."""

import fcntl
import json
import logging
import math
import re
import shutil

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from processes import on_processes
from safetensors.torch import load_file
from tiny_runs import refused_run, tool_run

import cpc
import cpc.run
from contrastive_core.data import ImageDataset, TooManyBadImages, mnist5k
from contrastive_core.run_log import RunLog, read_metrics
from cpc.features import load_encoder
from cpc.prediction import PredictionHeads
from cpc.pretrain import main, pretrain
from cpc.run_folder import default_run_dir, differing_keys
from cpc.run_watch import probe_sets

pytestmark = pytest.mark.usefixtures("as_a_new_process")

TINY = [
    "batch_size=8",
    "encoder.width=4",
    "method.context.width=8",
    "method.context.layers=1",
    "probe_every=0",
    "log_every=1",
    "save_every=3",
    "threads=1",
]


def tiny(*overrides):
    """TINY with overrides in the place of its own: hydra accepts a key once."""
    given = {override.split("=")[0] for override in overrides}
    return [option for option in TINY if option.split("=")[0] not in given] + list(overrides)


def without_times(rows):
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


@pytest.fixture
def start(compose, tmp_path):
    """`start("steps=3", run_dir="name")`: the job in this process."""

    def run(*overrides, run_dir="run"):
        return pretrain(compose(*tiny(*overrides, f"run_dir={tmp_path / run_dir}")))

    return run


def test_what_a_run_leaves_behind(start, capsys):
    folder = start("steps=3", "averaging=0.9", "clip=1.0", "accumulate=2", "probe_every=2", "probe_images=50")
    assert "read it with: cpc.load_encoder(" in capsys.readouterr().out
    assert {"config.yaml", "metrics.jsonl", "encoder.safetensors", "encoder.json", "checkpoints", "tensorboard"} <= {
        file.name for file in folder.iterdir()
    }

    rows = read_metrics(folder)
    training, probes = ([row for row in rows if ("knn" in row) is probed] for probed in (False, True))
    assert [row["step"] for row in training] == [1, 2, 3]
    assert [row["step"] for row in probes] == [2, 3]
    assert all(0 <= row["knn"] <= 1 for row in probes)
    first = training[0]
    assert {"loss", "chance_loss", "accuracy", "lr", "images_per_second", "gradient_norm", "feature_std"} <= set(first)
    assert first["chance_loss"] == pytest.approx(math.log(4 * 36), rel=1e-6)  # a micro-batch has its own candidates
    assert first["loss"] == pytest.approx(first["chance_loss"], rel=0.25)

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["steps"], config["precision"], config["patch"]) == (3, "no", {"size": 8, "stride": 4})

    # the averaged weights are the ones that are exported
    averaged = load_file(folder / "checkpoints/step_00000003/averaged.safetensors")
    weights = load_file(folder / "encoder.safetensors")
    assert all(torch.equal(weights[name], averaged[f"encoder.{name}"]) for name in weights)
    trained = load_file(folder / "checkpoints/step_00000003/method.safetensors")
    assert not torch.equal(weights["stem.weight"], trained["encoder.stem.weight"])
    images = mnist5k().test.pixels[:5].float() / 255
    features = cpc.load_encoder(folder)(images)
    assert features.shape == (5, 16)
    assert load_encoder(folder, readout="grid")(images).shape == (5, 6, 6, 16)


def test_the_average_follows_the_weights_step_by_step(start):
    folder = start("steps=4", "averaging=0.3", "save_every=1", "keep_checkpoints=4") / "checkpoints"
    averaged = load_file(folder / "step_00000001/averaged.safetensors")
    for step, decay in ((2, 2 / 11), (3, 3 / 12), (4, 0.3)):  # (1 + t) / (10 + t) of the t steps before, 0.3 at most
        method, after = (load_file(folder / f"step_{step:08}/{name}.safetensors") for name in ("method", "averaged"))
        for name, value in averaged.items():
            torch.testing.assert_close(after[name], decay * value + (1 - decay) * method[name], msg=f"{name}, {step}")
        averaged = after


def test_probing_and_logging_change_nothing(start):
    one = start("steps=3", run_dir="one")
    other = start("steps=3", "probe_every=1", "probe_images=50", "log_every=2", "save_every=1", run_dir="other")
    weights = [load_file(folder / "encoder.safetensors") for folder in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [row["step"] for row in read_metrics(other) if "loss" in row] == [1, 2, 3]  # the first, every 2nd, the last
    assert len(list((other / "checkpoints").iterdir())) == 2  # keep_checkpoints


def test_what_the_device_is_waited_for_is_computed_for_rows_alone(start, monkeypatch):
    solved, solve = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: (solved.append(1), solve(matrix))[1])
    some = read_metrics(start("steps=5", "log_every=3", "probe_every=0", run_dir="some"))
    assert [row["step"] for row in some] == [1, 3, 5]
    assert len(solved) == 3
    every = read_metrics(start("steps=5", "log_every=1", "probe_every=0", run_dir="every"))
    ranks = {row["step"]: row["effective_rank"] for row in every}
    assert [row["effective_rank"] for row in some] == [ranks[row["step"]] for row in some]


def test_grad_cache_contrasts_all_of_a_steps_images(start):
    """As one batch: chance is that of the whole, and the losses agree until rounding has grown."""
    whole = read_metrics(start("steps=3", run_dir="whole"))
    cached = read_metrics(start("steps=3", "accumulate=2", "grad_cache=true", run_dir="cached"))
    apart = read_metrics(start("steps=3", "accumulate=2", run_dir="apart"))
    assert [row["chance_loss"] for row in cached] == [row["chance_loss"] for row in whole]
    assert apart[0]["negatives"] < cached[0]["negatives"] == whole[0]["negatives"]
    assert cached[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    assert cached[0]["gradient_norm"] == pytest.approx(whole[0]["gradient_norm"], rel=1e-3)


def test_recomputing_blocks_changes_nothing(start):
    plain, twice = start("steps=3", run_dir="plain"), start("steps=3", "recompute=true", run_dir="twice")
    assert without_times(read_metrics(twice)) == without_times(read_metrics(plain))
    assert (twice / "encoder.safetensors").read_bytes() == (plain / "encoder.safetensors").read_bytes()
    assert (twice / "encoder.json").read_text() == (plain / "encoder.json").read_text()


OPTIONS = ["steps=6", "averaging=0.9", "accumulate=2", "clip=1.0"]


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(start, interrupted_at):
    whole = start(*OPTIONS, run_dir="whole")

    with interrupted_at(4):  # after the row of step 5, two steps after the checkpoint
        start(*OPTIONS, run_dir="parts")
    parts = whole.parent / "parts"
    assert [row["step"] for row in read_metrics(parts)] == [1, 2, 3, 4, 5]
    assert not (parts / "encoder.safetensors").exists()

    with pytest.raises(FileExistsError, match="parts holds a run: pass resume=auto to go on with it, or another run_d"):
        start(*OPTIONS, run_dir="parts")
    with pytest.raises(ValueError, match=r"was run with other settings of optimizer.lr, seed: use its own, or a new"):
        start(*OPTIONS, "resume=auto", "seed=1", "optimizer.lr=0.5", run_dir="parts")

    start(*OPTIONS, "resume=auto", "save_every=100", run_dir="parts")
    assert without_times(read_metrics(parts)) == without_times(read_metrics(whole))
    files = [file.relative_to(whole) for file in whole.glob("checkpoints/step_00000006/*")]
    assert len(files) == 5
    for file in [*files, "encoder.safetensors", "encoder.json"]:
        assert (parts / file).read_bytes() == (whole / file).read_bytes(), file

    # a finished run has nothing left to do, and says again where its encoder is
    (parts / "encoder.safetensors").unlink()
    start(*OPTIONS, "resume=auto", run_dir="parts")
    assert (parts / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()
    assert without_times(read_metrics(parts)) == without_times(read_metrics(whole))


def test_resuming_where_there_is_nothing_starts_anew(start, tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    folder = start("steps=1", "resume=auto", run_dir="empty")
    (folder / "checkpoints/step_00000001").rename(tmp_path / "elsewhere")  # killed before its first checkpoint
    start("steps=1", "resume=auto", run_dir="empty")
    assert [row["step"] for row in read_metrics(folder)] == [1]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with caplog.at_level(logging.WARNING, logger="cpc.run"):
        start("steps=1", "resume=auto", "threads=2", run_dir="empty")
    assert "the numbers will differ in their last bits" in caplog.text


def test_two_runs_in_one_folder_are_one_too_many(start):
    folder = start("steps=1")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another run is at work in"):
            start("steps=1", "resume=auto")


def test_unlabelled_images_are_not_probed(start, tmp_path):
    from PIL import Image

    for i in range(8):
        Image.new("L", (28, 28), 30 * i).save(tmp_path / f"{i}.png")
    folder = start("steps=1", "data=imagefolder", f"data.root={tmp_path}", "recipe=cpc/mnist5k", "probe_every=1")
    assert all("knn" not in row for row in read_metrics(folder))


def test_differing_keys():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert differing_keys(old, {"a": {"b": 1, "c": [1, 2]}, "d": 3}) == []
    assert differing_keys(old, {"a": {"b": 2, "c": [2, 1]}, "e": 3}) == ["a.b", "a.c", "d", "e"]
    assert differing_keys({"a": None}, {"a": {"b": 1}}) == ["a"]
    assert differing_keys({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": None}], "d": None}) == []  # null is as good as none
    assert differing_keys({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 0}]}) == ["a"]
    assert differing_keys({"a": [1, None]}, {"a": [1]}) == ["a"]


def test_default_run_dirs_tell_what_and_when():
    name = default_run_dir("mnist5k")
    assert re.fullmatch(r"runs/mnist5k-\d{8}-\d{6}-[a-z]{4}", name)
    assert default_run_dir("mnist5k") != name


MISTAKES = [
    ("experiment=typo", "Could not find 'experiment/typo'"),
    ("steps=abc", "steps=abc: pass a whole number"),
    ("patch.size=abc", "patch.size=abc: pass a whole number"),
    ("steps=null", "steps=null: pass a value"),
    ("precision=[1]", "precision=[1]: pass a word"),
    ("stpes=3", "Could not override 'stpes'"),
    ("patch.sise=3", "Could not override 'patch.sise'"),
    ("steps=0", "error: steps=0: pass at least 1"),
    ("steps=-3", "error: steps=-3: pass at least 1"),
    ("batch_size=0", "error: batch_size=0: pass at least 1"),
    ("batch_size=5000", "error: batch_size 5000 for 4000 images: pass 1 to 4000"),
    (
        "accumulate=3",
        "error: batch_size 8 does not split evenly over 1 processes x 3 micro-batches: pass a multiple of",
    ),
    ("accumulate=0", "error: accumulate=0: pass at least 1"),
    ("log_every=0", "error: log_every=0: pass at least 1"),
    ("save_every=0", "error: save_every=0: pass at least 1"),
    ("keep_checkpoints=0", "error: keep_checkpoints=0: pass at least 1"),
    ("workers=-1", "error: workers=-1: pass at least 0"),
    ("threads=0", "error: threads=0: pass at least 1"),
    ("threads=-2", "error: threads=-2: pass at least 1"),
    ("precision=fp16 device=cpu", "error: precision=fp16 needs CUDA: pass precision=bf16 or precision=no"),
    ("precision=float8", "error: precision=float8: pass no, bf16 or fp16"),
    ("device=tpu", "error: device=tpu: pass cpu or cuda"),
    ("resume=yes", "error: resume=yes: pass resume=auto"),
    ("clip=0", "error: clip=0.0: pass the largest gradient norm"),
    ("averaging=1", "error: averaging=1.0: pass a decay from 0 to below 1"),
    ("bad_images=2", "error: bad_images=2.0: pass a share from 0 to 1"),
    ("mean=[0.5]", "pass three numbers each, std above 0"),
    ("std=[0,1,1]", "pass three numbers each, std above 0"),
    ("data=parquet", "error: not given: data.train; pass them as data.train=VALUE"),
    ("data=parquet data.train=missing.parquet", "missing.parquet"),
    ("data=imagefolder data.root=missing", "missing"),
    ("patch.size=50", "error: an image of 28 px is smaller than one patch of 50 px: pass 50 px or more"),
    ("patch.stride=3", "error: 28 px leave 2 px unused with patches of 8 px at stride 3: pass images of 26 px"),
    ("load_size=20", "error: images are 20x20 px before cutting, image_size is 28: end image_augment with a crop"),
    ("method.offsets=[9]", "error: offset 9 needs at least 10 rows and columns, the grid has 6x6"),
    ("method.offsets=[]", "error: offsets is empty"),
    ("method.directions=[north]", "error: directions=['north']: pass one or more of down, up, right, left"),
    ("method.directions=[]", "error: directions=[]: pass one or more of down, up, right, left"),
    ("encoder.width=abc", "error: cpc.encoders.resnet_small does not take what it was given"),
    ("encoder=resnet50 +encoder.widht=3", "error: cpc.encoders.resnet50 does not take what it was given: "),
    ("encoder.norm=no", "error: norm='no' is not one of layer, channel, batch, none"),
    ("optimizer.lr=abc", "error: torch.optim.Adam does not take what it was given"),
    (
        "recompute=true norm=batch",
        "error: recompute=true: batch norm would count every batch twice; pass recompute=fal",
    ),
    (
        "recompute=true encoder=resnet18_small",
        "error: recompute=true: TorchvisionTrunk cannot; pass recompute=false, or",
    ),
    ("encoder._target_=nope.encoder", "error: Error loading 'nope.encoder'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_gets_one_clear_line_and_leaves_nothing_behind(
    arguments, message, call_tool, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    options = tiny(
        *(["steps=2"] if "steps=" not in arguments else []), *arguments.split(), f"run_dir={tmp_path / 'run'}"
    )
    if re.search(r"(^| )encoder=", arguments):
        options = [option for option in options if not option.startswith("encoder.width=")]
    with pytest.raises(SystemExit) as stopped:
        call_tool(main, *options)
    printed = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    assert message in printed
    assert "Traceback" not in printed
    if message.startswith("error:"):
        assert len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_batch_of_one_image_has_its_own_patches_for_candidates(start):
    (row,) = read_metrics(start("steps=1", "batch_size=1"))
    assert row["chance_loss"] == pytest.approx(math.log(36), rel=1e-6)
    assert all(math.isfinite(value) for value in row.values())


def test_bfloat16_is_near_float32(start):
    (half,) = read_metrics(start("steps=1", "precision=bf16"))
    AcceleratorState._reset_state(reset_partial_state=True)  # it knows one precision a process
    (full,) = read_metrics(start("steps=1", run_dir="full"))
    assert half["loss"] == pytest.approx(full["loss"], rel=2e-3)
    assert half["loss"] != full["loss"]


def test_the_log_is_cut_where_a_run_goes_on(tmp_path):
    with RunLog(tmp_path, start=0, steps=4) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    with RunLog(tmp_path, start=2, steps=4) as log:
        log.write({"step": 3, "loss": 0.5})
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1, 2, 0.5]
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}
    with pytest.raises(FileNotFoundError, match=r"no metrics.jsonl in .*: pass the folder of a run"):
        read_metrics(tmp_path / "none")


def test_rows_that_a_crash_has_spoilt_are_named_and_left_out_where_a_run_goes_on(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": 2.0}\n' + bytes(24) + b'\n{"step": 2, "loss": 1.5}\n'
    )
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl cannot be read: "):
        read_metrics(tmp_path)
    with RunLog(tmp_path, start=2, steps=4):
        pass
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert "line 2 of" in caplog.text
    (tmp_path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1 of .*metrics.jsonl is no row of metrics"):
        read_metrics(tmp_path)


def test_rows_are_on_the_disk_before_the_checkpoint_that_comes_after_them(start, monkeypatch):
    done = []
    monkeypatch.setattr(RunLog, "sync", lambda log: done.append("rows"))
    saves = cpc.run.save_checkpoint
    monkeypatch.setattr(cpc.run, "save_checkpoint", lambda *rest: (done.append("checkpoint"), saves(*rest)))
    start("steps=2", "save_every=1")
    assert done == ["rows", "checkpoint"] * 2


@pytest.mark.parametrize("kept", ["checkpoints", "metrics.jsonl", "encoder.safetensors"])
@pytest.mark.parametrize("resume", [[], ["resume=auto"]], ids=["anew", "resume"])
def test_what_is_left_of_a_run_is_not_written_over(start, kept, resume):
    folder = start("steps=2")
    for path in folder.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        FileExistsError, match=rf"run holds {kept} but no config.yaml: bring the run's own back, or use"
    ):
        start("steps=2", *resume)
    assert sorted(folder.rglob("*")) == before


def test_a_run_goes_on_with_its_own_images_alone(start, tmp_path):
    for i in range(9):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), 20 * i).save(tmp_path / f"data/{'ab'[i % 2]}/{i}.png")
    options = ["data=imagefolder", f"data.root={tmp_path / 'data'}", "recipe=cpc/mnist5k", "steps=2", "save_every=1"]
    folder = start(*options)
    shutil.rmtree(folder / "checkpoints/step_00000002")
    (tmp_path / "data/a/8.png").rename(tmp_path / "data/b/8.png")  # as many, one with another label
    with pytest.raises(
        ValueError, match=r"the run's images have changed \(9 at step 1, 9 now, by name and label\): bring"
    ):
        start(*options, "resume=auto")
    (tmp_path / "data/b/8.png").rename(tmp_path / "data/a/8.png")
    start(*options, "resume=auto")


BEFORE_DATA = [
    ("optimizer.lr=-1", "Invalid learning rate"),
    ("optimizer._target_=torch.optim.Adamm", "Error loading 'torch.optim.Adamm'"),
    ("schedule.warmup=3", "warmup"),
    ("accumulate=3", "does not split evenly"),
    ("seed=18446744073709551616", "seed=18446744073709551616: pass a number of 64 bits"),
]


@pytest.mark.parametrize(("option", "said"), BEFORE_DATA, ids=[option for option, _ in BEFORE_DATA])
def test_what_needs_no_data_is_told_before_any_is_read(start, option, said):
    with pytest.raises((ValueError, ImportError), match=said):
        start("steps=2", option, "data=imagefolder", "data.root=/nowhere", "recipe=cpc/mnist5k")


def test_two_processes_that_see_other_images_do_not_train(tmp_path):
    """As where each node has a copy of the data on a disk of its own, and one is not whole."""
    for process in range(2):
        for i in range(9 - process):
            (tmp_path / f"{process}").mkdir(exist_ok=True)
            Image.new("L", (28, 28), 20 * i).save(tmp_path / f"{process}/{i}.png")
    own = "data.root=" + str(tmp_path) + "/${oc.env:RANK}"
    options = tiny("steps=2", "device=cpu", "data=imagefolder", own, "recipe=cpc/mnist5k", f"run_dir={tmp_path}/run")
    on_processes(2, refused_run, r"do not see the same images \(9 on process 0, 8 on process 1\)", *options)
    assert not (tmp_path / "run").exists()


def test_from_the_command_line(launch_tool, call_tool, tmp_path, monkeypatch, capsys):
    """Two processes, launched as a user launches them, are one; what does not finish says why in one line."""
    options = tiny("steps=3", "device=cpu", "accumulate=2", "batch_size=16", "averaging=0.9")
    two = launch_tool("tools/pretrain_cpc.py", *options, processes=2)
    assert two.returncode == 0, two.stderr
    (folder,) = (tmp_path / "runs").iterdir()  # chosen once, for both
    assert folder.name.startswith("mnist5k-")
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert two.stdout.count("read it with") == 1
    assert "Warning" not in two.stderr

    monkeypatch.chdir(tmp_path)
    call_tool(main, *options, "run_dir=one")
    together, alone = read_metrics(folder), read_metrics(tmp_path / "one")
    assert [row["step"] for row in together] == [1, 2, 3]
    for a, b in zip(together, alone, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["lr"] == b["lr"]
        assert a["chance_loss"] == b["chance_loss"] == pytest.approx(math.log(8 * 36), rel=1e-6)
    weights = [load_file(path / "encoder.safetensors") for path in (folder, tmp_path / "one")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4)

    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call_tool(main, *options, "run_dir=one")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: one holds a run: pass resume=auto to go on with it, or another run_dir\n"


def test_the_probe_looks_at_training_images_only_and_asks_about_others_than_it_holds():
    train = mnist5k().train
    bank, queries = probe_sets(train, 500)
    assert (len(bank), len(queries)) == (400, 100)
    seen = [{image.numpy().tobytes() for image in part.pixels} for part in (bank, queries, mnist5k().test)]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]
    unlabelled = ImageDataset(train.pixels[:50].permute(0, 2, 3, 1).numpy(), size=28)
    assert probe_sets(unlabelled, 500) is None


def test_a_bad_image_is_named_and_counted_and_too_many_stop_the_run(start, tmp_path, caplog):
    for i in range(24):
        Image.new("RGB", (28, 28), (i * 10, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "07.png").write_bytes((tmp_path / "07.png").read_bytes()[:40])
    data = ["data=imagefolder", f"data.root={tmp_path}", "image_size=28", "patch.size=8", "patch.stride=4"]
    with caplog.at_level(logging.WARNING):
        folder = start("steps=6", "bad_images=0.1", *data)
    assert len(read_metrics(folder)) == 6
    assert [record.getMessage().count("07.png") for record in caplog.records if "bad image" in record.getMessage()] == [
        1
    ]
    with pytest.raises(TooManyBadImages, match=r"1 of \d+ images seen cannot be decoded"):
        start("steps=6", "bad_images=0", *data, run_dir="strict")


def test_grad_cache_on_two_processes_is_the_whole_batch_on_one(compose, tmp_path):
    options = tiny("steps=3", "device=cpu", "batch_size=16")
    on_processes(
        2, tool_run, "pretrain_cpc", *options, "accumulate=2", "grad_cache=true", f"run_dir={tmp_path / 'two'}"
    )
    pretrain(compose(*options, f"run_dir={tmp_path / 'one'}"))
    for a, b in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        assert (a["ranks"], b["ranks"]) == (2, 1)
        assert a["negatives"] == b["negatives"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-2)


class Constant(torch.nn.Module):
    """An encoder that gives every patch the same features, however it is trained."""

    def __init__(self):
        super().__init__()
        self.dim = 8
        self.feature = torch.nn.Parameter(torch.rand(8))

    def forward(self, images):
        return self.feature.expand(len(images), 8)


def test_a_collapsed_run_says_so_while_it_runs_and_in_what_it_leaves(compose, tmp_path, capsys, monkeypatch):
    from cpc import pretrain as module

    healthy = module.build_method

    def with_a_constant_encoder(cfg, dataset=None):
        method, views = healthy(cfg, dataset)
        method.encoder = Constant()
        method.contexts = torch.nn.ModuleDict({d: torch.nn.Identity() for d in method.directions})
        method.heads = torch.nn.ModuleDict({d: PredictionHeads(8, 64, method.offsets) for d in method.directions})
        method.target_projection = torch.nn.Linear(8, 64, bias=False)
        return method, views

    monkeypatch.setattr(module, "build_method", with_a_constant_encoder)
    folder = pretrain(compose(*tiny("steps=2", f"run_dir={tmp_path / 'run'}")))
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert said.count("collapsed: the projections' spread is") == 2  # when it is first seen, and at the end
    assert "collapsed: the projections' spread is" in json.loads((folder / "encoder.json").read_text())["collapsed"]
    assert read_metrics(folder)[-1]["effective_rank"] < 1.5
    card = (folder / "encoder.json").read_text()
    (folder / "encoder.json").unlink()
    pretrain(compose(*tiny("steps=2", f"run_dir={folder}", "resume=auto")))  # nothing is left to do, or to see
    assert (folder / "encoder.json").read_text() == card


def test_a_healthy_run_says_nothing_of_a_collapse(start, capsys):
    folder = start("steps=2")
    assert "collapsed" not in capsys.readouterr().out + (folder / "encoder.json").read_text()
    assert read_metrics(folder)[-1]["spread"] > 0.01


@pytest.mark.slow
def test_several_jobs_on_two_processes(launch_tool, tmp_path):
    """The second is in the group of processes that the first was in."""
    jobs = ["-m", "seed=0,1", "run_dir='run-${seed}'", "hydra.sweep.dir=jobs"]
    done = launch_tool("tools/pretrain_cpc.py", *tiny("steps=1", "device=cpu"), *jobs, processes=2)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"run-{seed}" / "encoder.safetensors").is_file() for seed in (0, 1))
