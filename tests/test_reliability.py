"""Runs that are killed, at any moment, and asked to stop: what is resumed is what would have been."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress

import psutil
import pytest
import torch
from conftest import CHECKOUT, launcher, run_command
from PIL import Image
from processes import in_a_child
from tiny_runs import TINY, run_killed_within_its_second_save, run_with_small_files, tiny_run
from torch import nn

import cpc.run
from contrastive_core import training
from contrastive_core.checkpoint import damage, latest_checkpoint
from contrastive_core.data import UndecodableImage
from contrastive_core.run_log import RunLog, read_metrics
from cpc import interruption
from cpc.entry import command
from cpc.interruption import Stopped, StopRequest
from cpc.mistakes import told, way_out
from cpc.pretrain import PretrainSchema

pytestmark = pytest.mark.usefixtures("as_a_new_process")


@pytest.fixture
def start(tmp_path):
    """`start("name")`: a tiny run in this process, from where it was."""
    return lambda name: tiny_run(tmp_path / name)


@pytest.fixture
def whole(start, tmp_path_factory):
    """The run that nothing happened to, made once."""
    return start(tmp_path_factory.getbasetemp() / "whole")


def assert_the_same(run, whole):
    """Rows but for times, and every byte of weights, optimizer and export."""
    rows, expected = (
        [{key: value for key, value in row.items() if key != "images_per_second"} for row in read_metrics(folder)]
        for folder in (run, whole)
    )
    assert rows == expected
    files = [file.relative_to(whole) for file in whole.glob("checkpoints/step_00000012/*")]
    assert len(files) == 5
    for file in [*files, "encoder.safetensors", "encoder.json", "context.safetensors"]:
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert not list(run.rglob("*.partial"))
    assert not list(run.rglob("*.removed"))


# ---- SIGKILL ----


def killed_and_resumed(folder, kills, seed):
    """Start a run again and again, killing it at random moments; returns how often it was killed at work."""
    draw = random.Random(seed)
    killed = 0
    for _ in range(kills):
        with in_a_child(tiny_run, folder) as child:
            time.sleep(draw.uniform(0.05, 1.5))
            child.kill()
        killed += child.exitcode != 0
    return killed


def test_killed_at_random_moments(start, whole, tmp_path):
    assert killed_and_resumed(tmp_path / "parts", kills=4, seed=0) > 0
    assert_the_same(start("parts"), whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_a_hundred_times(start, whole, tmp_path):
    killed, run = 0, 0
    while killed < 100:
        run += 1
        killed += killed_and_resumed(tmp_path / f"parts-{run}", kills=5, seed=run)
        assert_the_same(start(f"parts-{run}"), whole)


def killed_within_a_save(folder, at):
    """Kill a run in its second save, before the `at`-th thing that it does to files; False = it had ended."""
    with in_a_child(run_killed_within_its_second_save, folder, at) as child:
        pass
    return child.exitcode != 0


def test_killed_within_a_save(start, whole, tmp_path):
    assert killed_within_a_save(tmp_path / "parts", at=7)
    kept = {folder.name for folder in (tmp_path / "parts/checkpoints").glob("step_*")}
    assert kept in ({"step_00000003"}, {"step_00000003", "step_00000006"})
    assert_the_same(start("parts"), whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_every_point_of_a_save(start, whole, tmp_path):
    at = 0
    while killed_within_a_save(tmp_path / f"parts-{at}", at):
        assert_the_same(start(f"parts-{at}"), whole)
        at += 1
    assert at >= 20


def test_what_another_run_did_while_one_was_starting_is_not_undone(start, whole, tmp_path, monkeypatch, interrupted_at):
    """The other, which has read the same checkpoint, comes to its end before the first has written anything."""
    with interrupted_at(4):
        start("parts")

    usual = cpc.run.resume_

    def late(*arguments):
        step = usual(*arguments)
        with in_a_child(tiny_run, tmp_path / "parts"):
            pass
        return step

    with monkeypatch.context() as patch:
        patch.setattr(cpc.run, "resume_", late)
        with pytest.raises(FileExistsError, match=r"another run went on in .*parts meanwhile: start this one again"):
            start("parts")
    assert (tmp_path / "parts/checkpoints/step_00000012").is_dir()
    assert_the_same(start("parts"), whole)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(start, whole, caplog):
    parts = start("parts")
    (parts / "checkpoints/step_00000012/optimizer.safetensors").write_bytes(b"")
    (parts / "encoder.json").unlink()
    assert_the_same(start("parts"), whole)
    assert ["step_00000012 is damaged" in record.getMessage() for record in caplog.records] == [True]


# ---- SIGTERM and Ctrl-C ----


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_a_run_saves_and_leaves(start, whole, tmp_path, monkeypatch, capsys, number, code):
    advance = RunLog.advance

    def asking(log):
        advance(log)
        if log._bar.n == 5:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "advance", asking)
        with pytest.raises(Stopped) as stopped:
            start("parts")
    assert stopped.value.code == code
    assert (
        f"{number.name}: saved after step 6 of 12, go on with resume=auto run_dir={tmp_path / 'parts'}"
        in capsys.readouterr().out
    )
    parts = tmp_path / "parts"
    assert (parts / "checkpoints/step_00000006").is_dir()
    assert not (parts / "encoder.json").exists()
    assert signal.getsignal(number) is before
    assert_the_same(start("parts"), whole)


def test_what_comes_twice_at_once_is_one_request_and_later_ctrl_c_means_it(monkeypatch):
    here = torch.device("cpu")
    with StopRequest() as request:
        assert request.asked(here) == 0
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert request.asked(here) == signal.SIGTERM
        monkeypatch.setattr(interruption, "PATIENCE", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_runs_workers_outlive_the_signal_that_the_whole_group_gets(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(64):
        Image.new("RGB", (28, 28), (4 * index, 0, 0)).save(tmp_path / f"images/{index}.png")
    run = tmp_path / "run"
    data = ["data=imagefolder", f"data.root={tmp_path / 'images'}", "load_size=28", "image_size=28", "workers=2"]
    data += ["patch={size: 8, stride: 4}", "+data.cache=false"]
    options = [option for option in TINY if not option.startswith(("steps=", "probe_", "save_every="))]
    tool = [str(CHECKOUT / "tools/pretrain_cpc.py"), *options, *data, "steps=5000", "save_every=5000", "probe_every=0"]
    command = [sys.executable, *tool, f"run_dir={run}"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    errors = tmp_path / "errors"
    with (
        errors.open("w") as file,
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=file, start_new_session=True) as process,
    ):
        try:
            while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) < 3:
                assert process.poll() is None, errors.read_text()
                time.sleep(0.1)
            assert len(psutil.Process(process.pid).children()) >= 2
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(15) == 143, errors.read_text()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    last = read_metrics(run)[-1]["step"]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step_{last:08d}"]
    assert "Traceback" not in errors.read_text()


@contextmanager
def at_work_on_two_processes(tmp_path, *options):
    """A run of two processes after its third step: the launcher, the second process, what went to stderr."""
    run = tmp_path / "run"
    tiny = [option for option in TINY if not option.startswith(("steps=", "save_every="))]
    tool = [str(CHECKOUT / "tools/pretrain_cpc.py"), *tiny, "steps=5000", "device=cpu", f"run_dir={run}", *options]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    errors = tmp_path / "errors"
    with (
        errors.open("w") as file,
        subprocess.Popen(
            [*launcher(2), *tool], cwd=tmp_path, env=environment, stderr=file, start_new_session=True
        ) as process,
    ):
        try:
            while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) < 4:
                assert process.poll() is None, errors.read_text()
                time.sleep(0.1)
            (second,) = [
                child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"
            ]
            yield process, second, errors
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_on_two_processes_one_that_is_asked_is_enough(tmp_path):
    with at_work_on_two_processes(tmp_path, "save_every=5000") as (process, second, _):
        second.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert [folder.name for folder in (tmp_path / "run/checkpoints").iterdir()] == [f"step_{last:08d}"]


# ---- faults of one process ----


def test_a_process_that_dies_ends_all_within_seconds(tmp_path):
    with at_work_on_two_processes(tmp_path, "save_every=2") as (process, second, errors):
        second.kill()
        assert process.wait(30) == 1
        assert not psutil.pid_exists(second.pid)
    assert damage(latest_checkpoint(tmp_path / "run/checkpoints")) == ""
    told = errors.read_text()
    print(told)  # whole, where pytest cuts the line below short
    assert "error: another process failed or did not answer: its own output says why; res" in told


@pytest.mark.slow
def test_a_process_that_stands_still_ends_all_within_its_time(tmp_path):
    """Six seconds until the other gives up, thirty that torch's launcher gives the one that does not hear it."""
    with at_work_on_two_processes(tmp_path, "save_every=2", "timeout=0.1") as (process, second, errors):
        second.suspend()
        began = time.monotonic()
        assert process.wait(60) == 1
        assert time.monotonic() - began > 5
    assert damage(latest_checkpoint(tmp_path / "run/checkpoints")) == ""
    told = errors.read_text()
    print(told)  # whole, where pytest cuts the line below short
    assert "error: another process failed or did not answer: its own output says why; res" in told


@pytest.mark.parametrize("stopped", [0, signal.SIGTERM])
def test_a_command_leaves_its_group_where_it_has_one(call_tool, tmp_path, stopped):
    """Else the end of its process may be an abort: of children forked to end so, half were, an exchange under way."""

    def job(cfg):
        if cfg.seed:
            torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/1", rank=0, world_size=1)
        if stopped:
            raise Stopped(stopped)

    main = command("pretrain_cpc", job, schema=PretrainSchema)
    for seed in (1, 0):
        with pytest.raises(SystemExit, match=str(128 + stopped)) if stopped else nullcontext():
            call_tool(main, f"seed={seed}")
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("error", [
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4"),
    RuntimeError("Application timeout caused pair closure"),  # where another wait of the same process timed out
    torch.distributed.DistStoreError("wait timeout after 6000ms, keys: /ready"),
])  # fmt: skip
def test_whatever_the_other_processes_silence_is_called(error):
    assert way_out(error).startswith("another process failed or did not answer")
    assert way_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""


def test_what_a_process_that_decodes_ends_with_is_one_line(capsys):
    caught = """Caught UndecodableImage in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "loading.py", line 7, in fetch
contrastive_core.data.images.UndecodableImage: a.png: empty; nor can the 9 images after it be decoded
"""
    assert told(UndecodableImage(caught)) == 2
    assert capsys.readouterr().err == "error: a.png: empty; nor can the 9 images after it be decoded\n"
    killed = RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. ")
    assert way_out(killed).endswith("pass fewer workers")
    ours = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: a mistake of ours")
    assert way_out(ours) == ""


def test_an_interrupt_before_a_run_listens_is_no_traceback(call_tool, capsys):
    def job(cfg):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        call_tool(command("pretrain_cpc", job, schema=PretrainSchema))
    assert capsys.readouterr().err == "interrupted\n"


# ---- disks ----


def test_where_files_may_not_grow_the_last_checkpoint_stays(start, whole, tmp_path, interrupted_at):
    """A quota, or FAT's four GiB: the same error as of a full disk, from the kernel and in the midst of a save."""
    with interrupted_at(4):
        start("parts")
    (saved,) = (tmp_path / "parts/checkpoints").iterdir()
    largest = max(file.stat().st_size for file in saved.iterdir())
    with in_a_child(run_with_small_files, tmp_path / "parts", largest - 1, tmp_path / "told"):
        pass
    assert "cannot write" in (tmp_path / "told").read_text()
    assert list((tmp_path / "parts/checkpoints").iterdir()) == [saved]
    assert damage(saved) == ""
    assert_the_same(start("parts"), whole)


OWN_NAMESPACE = ["unshare", "--map-root-user", "--mount"]


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*OWN_NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="no namespaces here to mount a small disk in; the test before it has the kernel refuse a write anywhere",
)
def test_on_a_full_disk_a_run_ends_in_one_line_and_goes_on_elsewhere(start, whole, tmp_path):
    """A file system of its own, in a namespace of its own: room for one checkpoint and half of another."""
    pages = sum(-(-file.stat().st_size // 4096) for file in (whole / "checkpoints/step_00000012").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    run = " ".join([sys.executable, str(CHECKOUT / "tools/pretrain_cpc.py"), *TINY, f"run_dir={disk / 'parts'}"])
    mount = f"mount -t tmpfs -o size={6 * pages + 64}k none {disk}"
    script = f"{mount} && {run}; code=$?; cp -r {disk}/parts {tmp_path}; exit $code"
    done = run_command([*OWN_NAMESPACE, "bash", "-c", script], tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "No space left on device" in done.stderr.splitlines()[-1]
    (saved,) = (tmp_path / "parts/checkpoints").iterdir()
    assert damage(saved) == ""
    rebased = (tmp_path / "parts/config.yaml").read_text().replace(str(disk), str(tmp_path))
    (tmp_path / "parts/config.yaml").write_text(rebased)
    assert_the_same(start("parts"), whole)


def test_after_an_error_nobody_waits_for_an_answer_that_may_never_come():
    class Never:
        def wait(self):
            pytest.fail("waited")

    def failing():
        with StopRequest() as request:
            request._answer = (torch.tensor(0), Never())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()


# ---- torch's own random numbers ----


def test_dropout_is_the_same_after_a_resume_and_differs_between_steps_and_processes():
    def masks(step, process):
        training.seed_torch_(3, step, process)
        return nn.Dropout()(torch.ones(64))

    assert torch.equal(masks(4, 0), masks(4, 0))
    assert not torch.equal(masks(4, 0), masks(5, 0))
    assert not torch.equal(masks(4, 0), masks(4, 1))
