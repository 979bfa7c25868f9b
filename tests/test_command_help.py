"""What every command says of itself: its help, how much it says while it runs, and what was probably meant."""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
from pathlib import Path

import pytest

import contrastive_core.check
import cpc.ablate
import cpc.demo
import cpc.detect
import cpc.distill
import cpc.evaluate
import cpc.finetune
import cpc.plan
import cpc.pretrain
import cpc.report
import cpc.runs
import cpc.shortcuts
import cpc.show_patches
import cpc.simclr_v2
import cpc.sweep_labels
from cpc import doctor
from cpc.command_help import defaults, help_text, keys
from cpc.configs import config_folder
from cpc.entry import bracketed, overrides_first, own_folders
from cpc.verbosity import take_verbosity

HYDRA = {
    "pretrain_cpc": cpc.pretrain.main,
    "pretrain": cpc.pretrain.main_of_any_method,
    "detect": cpc.detect.main,
    "evaluate": cpc.evaluate.main,
    "finetune": cpc.finetune.main,
    "distill": cpc.distill.main,
    "sweep_labels": cpc.sweep_labels.main,
    "simclr_v2": cpc.simclr_v2.main,
    "ablate": cpc.ablate.main,
    "shortcuts": cpc.shortcuts.main,
}
ARGPARSE = {
    "plan": cpc.plan.main,
    "report": cpc.report.main,
    "runs": cpc.runs.main,
    "show_patches": cpc.show_patches.main,
    "check": contrastive_core.check.main,
    "doctor": doctor.main,
}
SMALL = ["steps=2", "batch_size=4", "probe_every=0", "encoder.width=4", "method.context.layers=1", "threads=1"]


# ---- help ----


@pytest.mark.parametrize("name", HYDRA)
def test_help_of_a_hydra_tool(name, call_tool, capsys):
    call_tool(HYDRA[name], "--help")
    said = capsys.readouterr().out
    examples = [
        line for line in said.splitlines() if line.startswith(("  accelerate launch tools/", "  python tools/"))
    ]
    assert 3 <= len(examples) <= 6
    assert all(f"tools/{name}.py" in line for line in examples)
    for part in ("groups, chosen by name:", "keys, with their defaults", "exit codes: 0", "verbosity=quiet"):
        assert part in said
    assert max(map(len, said.splitlines())) <= 140


@pytest.mark.parametrize("name", ARGPARSE)
def test_help_of_an_argparse_tool(name, call_tool, capsys):
    with pytest.raises(SystemExit) as ended:
        call_tool(ARGPARSE[name], "--help")
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "examples:" in said
    assert "exit codes: 0" in said


def test_every_tool_is_in_one_of_the_two_lists():
    tools = {path.stem for path in (Path(config_folder()).parent / "tools").glob("*.py")}
    assert tools >= set(HYDRA)
    for name in tools - set(HYDRA) - set(ARGPARSE) - {"demo"}:  # demo: the help of pretrain_cpc, whose keys it takes
        text = (Path(config_folder()).parent / "cpc" / f"{name}.py").read_text()
        assert "command(" in text or "epilog=" in text, f"{name}: --help gives examples"


@pytest.mark.parametrize("name", HYDRA)
def test_examples_compose(name, call_tool, capsys):
    head = (Path(config_folder()) / f"{name}.yaml").read_text().partition("defaults:")[0]
    commands = re.findall(r"^#   (.*)$", head.replace("\\\n#    ", ""), re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        _, arguments = re.split(rf"tools/{name}\.py", command)
        options = shlex.split(arguments, comments=True)
        if "-m" not in options:  # hydra shows no configuration of several jobs
            call_tool(HYDRA[name], *options, "--cfg", "job")
            assert capsys.readouterr().out, command


def test_help_names_every_group_and_its_options(call_tool, capsys):
    call_tool(cpc.pretrain.main_of_any_method, "--help")
    said = " ".join(capsys.readouterr().out.split())
    for group in ("encoder", "method", "data", "experiment", "views", "optimizer", "loss"):
        options = sorted(file.stem for file in (Path(config_folder()) / group).glob("*.yaml"))
        assert f"{group}= {', '.join(options)}" in said


def test_help_names_every_key(compose):
    said = help_text(Path(config_folder()), "pretrain_cpc")
    cfg = compose()
    inner = {"data", "encoder", "method", "views", "optimizer", "loss", "ladder", "schedule"}
    named = set(re.findall(r"^  (\w+)[=.]", said, flags=re.MULTILINE))
    assert set(map(str, cfg)) - inner <= named


def test_help_shows_pieces_of_ones_own(call_tool, capsys, tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "mine.yaml").write_text("_target_: my.Encoder\n")
    call_tool(cpc.pretrain.main, "--config-dir", str(tmp_path), "--help")
    assert re.search(r"encoder= +mine, resnet101_v1", capsys.readouterr().out)
    assert own_folders(["--config-dir=a", "-cd", "b", "steps=2"]) == [Path("a"), Path("b")]


def test_how_a_configuration_file_is_read():
    lines = ["a: 1  # one", "", 'b: "#"', "c:  # parts", "  d: [1, 2]  # two", "hydra:", "  run: x", "e: 2"]
    assert list(keys(lines)) == [
        ("a=1", "one"),
        ("", ""),
        ('b="#"', ""),
        ("c=", "parts"),
        ("c.d=[1, 2]", "two"),
        ("e=2", ""),
    ]
    assert defaults(["- override /views: simclr  # x", "  - data: null", "  - scale@ladder: small"]) == [
        "views",
        "data",
        "scale",
    ]


# ---- how much is said ----


def test_the_level_is_taken_out_of_the_arguments():
    assert take_verbosity(["a=1", "verbosity=verbose", "b=2"]) == ("verbose", ["a=1", "b=2"])
    assert take_verbosity([]) == ("normal", [])
    with pytest.raises(ValueError, match="verbosity=loud: pass quiet, normal or verbose"):
        take_verbosity(["verbosity=loud"])


@pytest.mark.usefixtures("as_a_new_process")
def test_quietly_a_run_prints_its_folder_and_nothing_else(call_tool, tmp_path, capfd):
    call_tool(cpc.pretrain.main, *SMALL, f"run_dir={tmp_path / 'quiet'}", "verbosity=quiet")
    printed = capfd.readouterr()
    assert printed.out == f"{tmp_path / 'quiet'}\n"
    assert printed.err == ""
    assert "verbosity" not in (tmp_path / "quiet" / "config.yaml").read_text()
    assert sys.argv[-1] == "verbosity=quiet"
    assert logging.getLogger("contrastive_core.run_log").level == logging.NOTSET


@pytest.mark.slow
@pytest.mark.usefixtures("as_a_new_process")
def test_quietly_an_evaluation_prints_its_file_and_nothing_else(call_tool, tmp_path, capfd):
    call_tool(cpc.pretrain.main, *SMALL, f"run_dir={tmp_path / 'quiet'}", "verbosity=quiet")
    capfd.readouterr()
    call_tool(cpc.evaluate.main, f"run={tmp_path / 'quiet'}", "verbosity=quiet", "modes=[image]", "threads=1")
    printed = capfd.readouterr()
    assert printed.out == f"{tmp_path / 'quiet' / 'evaluation.json'}\n"
    assert printed.err == ""


@pytest.mark.slow
@pytest.mark.usefixtures("as_a_new_process")
def test_quietly_a_warning_and_a_mistake_are_told(call_tool, tmp_path, capfd, monkeypatch):
    import cpc.run_watch

    monkeypatch.setattr(cpc.run_watch, "collapsed", lambda *numbers: "collapsed: as this test has it")
    call_tool(cpc.pretrain.main, *SMALL, f"run_dir={tmp_path / 'quiet'}", "verbosity=quiet")
    printed = capfd.readouterr()
    assert printed.out == f"{tmp_path / 'quiet'}\n"
    assert "collapsed: as this test has it" in printed.err

    with pytest.raises(SystemExit) as ended:
        call_tool(cpc.pretrain.main, *SMALL, f"run_dir={tmp_path / 'quiet'}", "verbosity=quiet")
    printed = capfd.readouterr()
    assert ended.value.code == 2
    assert printed.err.startswith("error: ")
    assert printed.out == ""


@pytest.mark.slow
@pytest.mark.usefixtures("as_a_new_process")
def test_a_run_may_go_on_with_another_verbosity(call_tool, tmp_path, capfd):
    options = [*SMALL, f"run_dir={tmp_path / 'run'}"]
    call_tool(cpc.pretrain.main, *options)
    capfd.readouterr()
    call_tool(cpc.pretrain.main, *options, "resume=auto", "verbosity=verbose")
    said = capfd.readouterr().out
    assert "torch 2" in said
    assert "batch_size: 4" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2


@pytest.mark.parametrize("main", [*HYDRA.values(), cpc.demo.main], ids=[*HYDRA, "demo"])
def test_another_level_is_one_line(main, call_tool, capsys):
    with pytest.raises(SystemExit) as ended:
        call_tool(main, "verbosity=loud")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: verbosity=loud: pass quiet, normal or verbose\n"


def test_ablate_keeps_the_level_from_its_cells():
    assert cpc.ablate.arguments(["verbosity=quiet", "steps=2"]) == ["verbosity=quiet", "overrides=['steps=2']"]


# ---- options among overrides ----


@pytest.mark.parametrize(("given", "read"), [
    (["a=1", "-m", "b=1,2"], ["a=1", "b=1,2", "-m"]),
    (["-m", "a=1"], ["a=1", "-m"]),
    (["--config-dir=x=y", "a=1", "-cd", "mine", "~b"], ["a=1", "~b", "--config-dir=x=y", "-cd", "mine"]),
    (["a=1", "-i", "defaults"], ["a=1", "-i", "defaults"]),
    ([], []),
])  # fmt: skip
def test_options_may_stand_anywhere(given, read):
    assert overrides_first(given) == read


# ---- lists without brackets ----


@pytest.mark.parametrize(("given", "read"), [
    ("runs=a/b", "runs=[a/b]"),
    ("labels=20,40", "labels=[20,40]"),
    ("labels=", "labels=[]"),
    ("labels=20,", "labels=[20]"),
    ("runs=[a,b]", "runs=[a,b]"),
    ("runs='[a]'", "runs='[a]'"),
    ("labels= [20]", "labels= [20]"),
    ("labels=null", "labels=null"),
    ("labels=${other}", "labels=${other}"),
    ("labels=choice([1],[2])", "labels=choice([1],[2])"),
    ("labels", "labels"),
    ("out=c", "out=c"),
    ("-m", "-m"),
    ("shard=0,1", "shard=0,1"),
])  # fmt: skip
def test_lists_need_no_brackets(given, read):
    assert bracketed(given, ["runs", "labels"]) == read


# ---- what was probably meant ----


OTHER_NAMES = [
    (cpc.pretrain.main, "encoder=resnet51", "did you mean 'resnet50'?"),
    (cpc.pretrain.main, "data=image_folder", "did you mean 'imagefolder'?"),
    (cpc.pretrain.main, "loss=infonce", "did you mean 'info_nce'?"),
    (cpc.ablate.main, "ablation=temperatur", "did you mean 'temperature'?"),
    (cpc.evaluate.main, "data=cifar", "did you mean 'cifar10'?"),
    (cpc.distill.main, "techer=x", "did you mean 'teacher'?"),
    (cpc.sweep_labels.main, "protocol=[knn]", "did you mean 'protocols'?"),
    (cpc.simclr_v2.main, "fractoin=0.1", "did you mean 'fraction'?"),
    (cpc.demo.main, "stepz=3", "did you mean 'steps'?"),
]  # fmt: skip
MEANT = [
    (cpc.pretrain.main_of_any_method, "method=simclrr", "did you mean 'simclr'?"),
    (cpc.pretrain.main, "experiment=imagenet_cpcv2", "did you mean 'imagenet_cpc_v2'?"),
    (cpc.finetune.main, "label=3", "did you mean 'labels'?"),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in OTHER_NAMES),
]  # fmt: skip


@pytest.mark.parametrize(("main", "given", "meant"), MEANT)
def test_did_you_mean(main, given, meant, call_tool, capsys):
    with pytest.raises(SystemExit) as ended:
        call_tool(main, given)
    assert ended.value.code == 2
    assert meant in capsys.readouterr().err


def test_did_you_mean_in_a_plan(call_tool, capsys):
    with pytest.raises(SystemExit) as ended:
        call_tool(cpc.plan.main, "method=simclrr", "--images-per-second", "1")
    assert ended.value.code == 2
    assert "did you mean 'simclr'?" in capsys.readouterr().err


# ---- nothing but our own lines at the start ----


@pytest.mark.slow
def test_a_run_starts_without_a_wall_of_warnings(run_tool, tmp_path):
    done = run_tool("tools/pretrain_cpc.py", *SMALL, "run_dir=run")
    assert done.returncode == 0
    said = re.sub(r"[^\r\n]*(step/s|s/step|it/s)[^\r\n]*", "", done.stderr)  # the progress bar
    assert not said.strip(), said
