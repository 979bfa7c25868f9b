"""A label sweep from its configuration and from the command line: what each cell sees, and that none is done twice."""

from __future__ import annotations

import csv
import json
import re
import shutil
from types import SimpleNamespace

import hydra
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from small_digits import small_digits

import cpc.label_cells
import cpc.label_costs
import cpc.sweep_labels
from contrastive_core.data import (
    BadImages,
    ImageDataset,
    LabelAmount,
    LabelList,
    Splits,
    TooManyBadImages,
    labels_per_class,
    mnist5k,
    parquet,
    sample_ids,
    split_digest,
)
from contrastive_core.evaluate.selection import Rows, choose_setting
from cpc import label_protocols, label_recipes
from cpc.configs import config_folder
from cpc.encoder_card import read_card
from cpc.entry import Incomplete
from cpc.label_arms import arms_of, grouped_runs, other_networks
from cpc.label_bench import Arm, Cell, run_fingerprint
from cpc.label_choices import check_classes, decodable_choices, drawn_choices, listed_choices
from cpc.label_costs import duration, planned_seconds
from cpc.label_protocols import Length, linear, nearest
from cpc.label_recipes import DEPENDS, RECIPES, asked_of, networks_from_scratch, protocol_of, protocols_of
from cpc.pretrain import pretrain
from cpc.sweep_labels import (
    bench_of,
    cells_of,
    choices_of,
    lengths_of,
    share_of,
    sized_cnn,
    sweep,
    take_over_,
)
from cpc.sweep_schema import check_asked

pytestmark = pytest.mark.usefixtures("as_a_new_process")

SMALL = ["threads=1", "device=cpu", "cnn.widths=[4,4]", "classifier.width=4", "encodings=40", "batch_size=10"]
STEPS = ["steps.classifier={least:2,passes:0,most:2}", "steps.finetune={least:1,passes:0,most:1}", "scratch_times=1"]
"""Of few steps: what these networks learn is nobody's business here."""


def composed(name, *overrides):
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return hydra.compose(name, list(overrides))


def pretrained(folder, name, *overrides):
    tiny = ["batch_size=8", "threads=1", "device=cpu", "probe_every=0", "encoder.width=4", f"run_dir={folder}"]
    return pretrain(composed(name, *tiny, *overrides))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two CPC runs that differ in the seed, and a SimCLR run with a head; one step each, 1,000 digits, 100 to test."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["steps=1", *small_digits(folder, train=100, test=10)]
    small = ["method.context.width=8", "method.context.layers=1"]
    cpc_runs = [pretrained(folder / f"cpc{seed}", "pretrain_cpc", *common, *small, f"seed={seed}") for seed in (0, 1)]
    return [*cpc_runs, pretrained(folder / "simclr", "pretrain", *common, "method=simclr", "probe_every=5")]


@pytest.fixture
def configured(runs, tmp_path):
    """`configured("labels=[20]")`: the configuration of a small sweep, the first run's data read."""

    def cfg(*overrides, use=slice(0, 1), out="out"):
        folders = ",".join(map(str, runs[use]))
        cfg = composed("sweep_labels", f"runs=[{folders}]", f"out={tmp_path / out}", *SMALL, *STEPS, *overrides)
        return cfg

    return cfg


@pytest.fixture
def bench(configured):
    """`bench("labels=[20]")`: what its cells share."""

    def made(*overrides, **options):
        cfg = configured(*overrides, **options)
        check_asked(cfg)
        take_over_(cfg)
        return bench_of(cfg)

    return made


def files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted((folder / "cells").rglob("*.json"))}


# ---- the whole ----


@pytest.fixture(scope="module")
def swept(runs, tmp_path_factory):
    """A sweep with every protocol and every kind of first weights, in its folder."""
    out = tmp_path_factory.mktemp("sweep")
    few = ["labels=[20]", "fractions=[0.01]", "draws=2", "random=[knn]"]
    protocols = "protocols=[linear,knn,classifier,finetune,head]"
    cfg = composed("sweep_labels", f"runs=[{','.join(map(str, runs))}]", f"out={out}", *SMALL, *STEPS, *few, protocols)
    return sweep(cfg)


def test_every_arm_has_a_cell_for_every_choice_of_labels(swept, runs):
    with (swept / "label_efficiency.csv").open() as file:
        rows = list(csv.DictReader(file))
    arms = {(row["method"], row["protocol"], row["repeat"]) for row in rows}
    assert {protocol for method, protocol, _ in arms if method == "scratch"} == {
        "logistic", "svm", "cnn", "image", "patches"
    }  # fmt: skip
    assert {(protocol, repeat) for method, protocol, repeat in arms if method == "CPC"} == {
        (protocol, repeat) for protocol in ("linear", "knn", "classifier", "finetune") for repeat in "01"
    }
    assert {protocol for method, protocol, _ in arms if method == "SimCLR"} == {
        "linear", "knn", "classifier", "finetune", "head"
    }  # fmt: skip
    assert ("random", "knn", "0") in arms
    assert len(rows) == len(arms) * 4
    assert {(row["amount"], row["labels"], row["seed"]) for row in rows} == {
        (amount, labels, seed) for amount, labels in (("labels=20", "20"), ("fraction=0.01", "10")) for seed in "01"
    }
    assert list(rows[0])[:8] == ["method", "protocol", "repeat", "amount", "labels", "fraction", "seed", "split"]


def test_the_same_labels_for_every_arm_and_their_digest_beside_them(swept, runs):
    with (swept / "label_efficiency.csv").open() as file:
        rows = list(csv.DictReader(file))
    splits = {}
    for row in rows:
        splits.setdefault((row["amount"], row["seed"]), set()).add(row["split"])
    assert all(len(digests) == 1 for digests in splits.values())
    digits = parquet(runs[0].parent / "train.parquet", size=28).train
    chosen = labels_per_class(digits.labels, 2, ids=sample_ids(digits))  # as tools/finetune.py chooses them
    assert splits["labels=20", "0"] == {split_digest(sample_ids(digits), digits.labels, chosen)}
    assert all(digest in (swept / "report.md").read_text() for digests in splits.values() for digest in digests)


def test_the_summary_says_what_is_saved_and_what_is_not_known(swept, runs):
    summary = json.loads((swept / "summary.json").read_text())
    saved = {(row["method"], row["protocol"], row["labels"], row["against"]) for row in summary["savings"]}
    assert ("CPC", "finetune", 20, "best from scratch") in saved
    assert ("CPC", "linear", 10, "same network from scratch") in saved
    assert {row["method"] for row in summary["savings"] if row["against"] == "same network from scratch"} == {
        "CPC", "random"
    }, "SimCLR's is another"  # fmt: skip
    said = "SimCLR: another network than the one from scratch, so no row against the same network"
    assert said in summary["notes"]
    assert {row["runs"] for row in summary["savings"] if row["method"] == "CPC"} == {2}
    report = (swept / "report.md").read_text()
    assert "one pre-training run of SimCLR" in report
    assert "one pre-training run of CPC" not in report
    assert f"a kNN probe with labels of training images watched pre-training, for its log alone: {runs[2]}" in report
    assert summary["features"]["encoded"] > 0
    assert (swept / "label_efficiency.png").stat().st_size > 1000


def test_a_second_time_nothing_is_done_again(swept, runs, capsys):
    before = files(swept)
    few = ["labels=[20]", "fractions=[0.01]", "draws=2", "random=[knn]"]
    protocols = "protocols=[linear,knn,classifier,finetune,head]"
    folders = ",".join(map(str, runs))
    sweep(composed("sweep_labels", f"runs=[{folders}]", f"out={swept}", *SMALL, *STEPS, *few, protocols))
    assert files(swept) == before
    assert f"{len(before)} cells, {len(before)} are there already" in capsys.readouterr().out


# ---- going on ----


def test_the_report_says_what_encoding_once_saves(configured, tmp_path):
    """Two encoders; 5 choices of 20 and of 100 labels, 100 test images, and as many images in use as they hold."""
    sweep(configured("labels=[20,100]", "protocols=[linear]", "random=[linear]", "scratch=[svm]", "draws_above=5"))
    (said,) = (line for line in (tmp_path / "out/report.md").read_text().splitlines() if "encoded once" in line)
    once, cells, again = (int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", said)[:3])
    assert (cells, again) == (20, 2 * 5 * (20 + 100 + 100 + 100))
    assert 2 * (100 + 100) < once < 2 * (500 + 100)
    assert said.endswith(f"{again / once:.1f} times as many")
    assert "mirrored" not in (tmp_path / "out/report.md").read_text(), "no network learns"


def test_another_command_s_runs_stay_known(configured, runs, tmp_path):
    few = ["labels=[20]", "draws=1", "random=[]", "protocols=[knn]", "scratch=[logistic]"]
    for use in (slice(0, 2), slice(2, 3), slice(0, 1)):  # the last names one of two repeats
        sweep(configured(*few, use=use))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["runs"] == {"CPC": [str(run) for run in runs[:2]], "SimCLR": [str(runs[2])]}
    assert {row["method"] for row in summary["accuracies"]} == {"CPC", "SimCLR", "scratch"}
    assert summary["seen"] == dict.fromkeys(["", *map(str, runs)], 0)


def test_what_another_command_s_run_has_seen_stays_in_the_report(configured, runs, tmp_path):
    """Its row is in the table still: a run that was pre-trained on the test images, then one that was not."""
    leaky = shutil.copytree(runs[2], tmp_path / "leaky")
    written = OmegaConf.load(leaky / "config.yaml")
    written.data.train = written.data.test
    OmegaConf.save(written, leaky / "config.yaml")
    few = ["labels=[20]", "draws=1", "random=[]", "protocols=[knn]", "scratch=[logistic]"]
    data = OmegaConf.load(runs[0] / "config.yaml").data
    sweep(configured(*few, f"runs=[{leaky}]", "data=parquet", f"data.train={data.train}", f"data.test={data.test}"))
    sweep(configured(*few))
    report = (tmp_path / "out/report.md").read_text()
    assert f"- 100 of 100 test images are among those that {leaky} was pre-trained on" in report
    assert f"- 0 of 100 test images are among those that {runs[0]} was pre-trained on" in report
    assert f"watched pre-training, for its log alone: {leaky}" in report
    assert "no test image was found" not in report


def test_the_same_network_is_that_of_the_cells_whichever_command_made_them(configured, runs, tmp_path):
    """SimCLR has another: its command trains nothing from scratch, and comes last or first."""
    few = ["labels=[20]", "draws=1", "random=[]", "protocols=[knn]"]
    commands = {"scratch=[image]": slice(0, 1), "scratch=[]": slice(2, 3)}
    for out, order in (("a", list(commands)), ("b", list(commands)[::-1])):
        for scratch in order:
            sweep(configured(*few, scratch, use=commands[scratch], out=out))
        savings = json.loads((tmp_path / out / "summary.json").read_text())["savings"]
        assert {row["method"] for row in savings if row["against"] == "same network from scratch"} == {"CPC"}
        assert {row["method"] for row in savings if row["against"] == "best from scratch"} == {"CPC", "SimCLR"}


def test_every_command_that_made_a_folder_stands_in_its_report(configured, tmp_path, monkeypatch):
    few = ["draws=1", "random=[]", "protocols=[]", "scratch=[svm]"]
    for labels in ("labels=[20]", "labels=[40]", "labels=[20]"):
        monkeypatch.setattr("sys.argv", ["tools/sweep_labels.py", labels])
        sweep(configured(*few, labels))
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    commands = [f"    python tools/sweep_labels.py 'labels=[{count}]'" for count in (20, 40)]
    assert [line for line in lines if line.startswith("    python")] == commands
    assert json.loads((tmp_path / "out/summary.json").read_text())["commands"] == [one.strip() for one in commands]


@pytest.mark.parametrize(("tool", "shown"), [
    ("sweep_labels", "python tools/sweep_labels.py --config-dir=mine 'runs=[a b]'"),  # whatever a launcher started
    ("pretrain_cpc", "python tools/demo.py"),  # which configures a run, then sweeps
])  # fmt: skip
def test_the_command_in_the_report_is_the_user_s_own(monkeypatch, tool, shown):
    sources = [SimpleNamespace(provider="main", path="configs"), SimpleNamespace(provider="command-line", path="mine")]
    config = SimpleNamespace(
        job=SimpleNamespace(config_name=tool),
        overrides=SimpleNamespace(task=["runs=[a b]", "shard=1", "shards=2"]),
        runtime=SimpleNamespace(config_sources=sources),
    )
    monkeypatch.setattr(cpc.sweep_labels.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(cpc.sweep_labels.HydraConfig, "get", lambda: config)
    monkeypatch.setattr("sys.argv", ["tools/demo.py"])
    assert cpc.sweep_labels.shown_command() == shown


def test_two_runs_do_not_become_one_curve(configured, tmp_path):
    """Neither with other labels, nor with another protocol, where no cell is asked for that is there."""
    few = ["draws=1", "random=[]", "scratch=[]"]
    sweep(configured(*few, "labels=[20]", "protocols=[knn]"))
    before = files(tmp_path / "out")
    for labels, protocol in ((40, "knn"), (20, "linear")):
        with pytest.raises(ValueError, match="was made with another encoder: pass another out, or remove it"):
            sweep(configured(*few, f"labels=[{labels}]", f"protocols=[{protocol}]", use=slice(1, 2)))
    assert files(tmp_path / "out") == before
    sweep(configured(*few, "labels=[40]", "protocols=[knn]", use=slice(0, 2)))  # a second run beside the first
    assert len(files(tmp_path / "out")) == 3


def test_another_choice_of_as_many_labels_is_refused(configured, tmp_path):
    """Of classes of unequal size 40 labels are one choice by the number in all, another by the number a class."""
    arms = ["draws=1", "random=[]", "scratch=[]", "protocols=[knn]"]
    sweep(configured(*arms, "labels_per_class=[4]"))
    cell = next((tmp_path / "out/cells").rglob("*.json"))
    cell.write_text(json.dumps(json.loads(cell.read_text()) | {"split": "0" * 12}))
    with pytest.raises(ValueError, match="was made with another choice of 40 labels: pass another out"):
        sweep(configured(*arms, "labels=[40]"))


def test_a_network_that_has_no_patches_is_not_trained_on_them(configured, tmp_path):
    sweep(configured("labels=[20]", "draws=1", "random=[]", "scratch=[patches]", "protocols=[knn]", use=slice(2, 3)))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert {row["method"] for row in summary["accuracies"]} == {"SimCLR"}
    assert any(note.startswith("no network on patches from scratch: the first run") for note in summary["notes"])


QUICK = ["labels=[20,40]", "draws=2", "scratch=[svm]", "random=[]", "protocols=[knn]"]


def test_a_killed_sweep_does_only_what_is_missing(configured, tmp_path, monkeypatch):
    sweep(configured(*QUICK, out="whole"))
    done = []

    def stopped(bench, cell):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(cell)
        return label_recipes.run_cell(bench, cell)

    with monkeypatch.context() as patch:
        patch.setattr(cpc.sweep_labels, "run_cell", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweep(configured(*QUICK))
    before = files(tmp_path / "out")
    assert len(before) == 3
    sweep(configured(*QUICK))
    after = files(tmp_path / "out")
    assert {path: after[path] for path in before} == before
    assert len(after) == 8

    def told(folder):
        cells = [json.loads(path.read_text()) for path in files(tmp_path / folder)]
        return [{name: value for name, value in cell.items() if name != "seconds"} for cell in cells]

    assert told("out") == told("whole")


def test_a_cell_that_breaks_is_told_and_does_not_stop_the_rest(configured, tmp_path, monkeypatch, capsys):
    def broken(bench, cell):
        if cell.arm.protocol == "knn" and cell.seed == 1:
            raise RuntimeError("out of\nluck")
        return label_recipes.run_cell(bench, cell)

    with monkeypatch.context() as patch:
        patch.setattr(cpc.sweep_labels, "run_cell", broken)
        with pytest.raises(Incomplete, match="2 of 8 cells failed: the same command tries them again"):
            sweep(configured(*QUICK))
    told = capsys.readouterr()
    said = r"CPC knn: labels=40, seed 1, [0-9a-f]{12}: failed: RuntimeError: out of luck; 0 cells left"
    assert re.search(said, told.out)
    report = tmp_path / "out/report.md"
    assert "failed: CPC knn: labels=20, seed 1: RuntimeError: out of luck" in report.read_text()
    assert len(files(tmp_path / "out")) == 6
    sweep(configured(*QUICK, "labels=[100]"))  # another process draws the report: what failed stands there still
    assert report.read_text().count("failed: CPC knn") == 2
    sweep(configured(*QUICK))
    assert len(files(tmp_path / "out")) == 8 + 4
    assert "failed" not in report.read_text()


@pytest.fixture
def without_neighbours(monkeypatch):
    """Every cell of kNN breaks, whatever it is asked."""

    def broken(*features, **options):
        raise RuntimeError("no neighbours")

    monkeypatch.setattr("cpc.label_protocols.knn_predictions", broken)


def test_where_every_cell_breaks_the_report_says_so(configured, tmp_path, without_neighbours):
    with pytest.raises(Incomplete, match="4 of 4 cells failed"):
        sweep(configured(*QUICK, "scratch=[]"))
    report = (tmp_path / "out/report.md").read_text()
    assert "No cell is done." in report
    assert report.count("- CPC knn: labels=") == 4


@pytest.mark.parametrize("whole_tracebacks", ["0", "1"])
def test_an_arm_that_cannot_even_be_timed_does_not_stop_the_rest(
    configured, tmp_path, without_neighbours, monkeypatch, capsys, whole_tracebacks
):
    monkeypatch.setenv("HYDRA_FULL_ERROR", whole_tracebacks)
    with pytest.raises(Incomplete):
        sweep(configured(*QUICK))
    assert len(files(tmp_path / "out")) == 4
    assert "RuntimeError: no neighbours" in (tmp_path / "out/report.md").read_text()
    assert ("Traceback" in capsys.readouterr().err) == (whole_tracebacks == "1")


def test_a_cell_that_is_no_whole_file_is_named(configured, tmp_path):
    few = ["labels=[20]", "draws=1", "scratch=[]", "random=[]", "protocols=[knn]"]
    sweep(configured(*few))
    (written,) = files(tmp_path / "out")
    written.write_text(written.read_text()[:100])
    with pytest.raises(ValueError, match=rf"{written}"):
        sweep(configured(*few))


def test_a_summary_that_is_no_whole_file_costs_nothing(configured, tmp_path):
    few = ["labels=[20]", "draws=1", "scratch=[]", "random=[]", "protocols=[knn]"]
    sweep(configured(*few))
    (tmp_path / "out/summary.json").write_text("")
    sweep(configured(*few))
    assert list(json.loads((tmp_path / "out/summary.json").read_text())["runs"]) == ["CPC"]


DIVERGES = "{lr:1e30,weight_decay:0.0}"
WORKS = "{lr:2e-3,weight_decay:0.0}"


def test_a_setting_that_diverges_is_not_chosen(configured, tmp_path):
    """It is tried first, and with one label a class it would be taken."""
    cnn = ["labels=[20]", "draws=1", "scratch=[cnn]", "random=[]", "protocols=[]"]
    sweep(configured(*cnn, f"settings.scratch=[{DIVERGES},{WORKS}]", "scratch_times=2"))
    (cell,) = files(tmp_path / "out")
    assert json.loads(cell.read_text())["setting"] == {"lr": 2e-3, "weight_decay": 0.0}


@pytest.mark.parametrize(("size", "cnn"), [
    (28, {"widths": [32, 64, 128, 128]}),
    (64, {"widths": [32, 64, 128, 128, 128]}),
    (96, {"widths": [32, 64, 128, 256], "stem": "imagenet"}),
])  # fmt: skip
def test_the_ordinary_network_suits_the_images(size, cnn):
    name = "contrastive_core.encoders.SmallCNN"
    assert sized_cnn({"_target_": name, "widths": None}, size) == {"_target_": name, **cnn}
    assert sized_cnn({"_target_": name, "widths": [4]}, size) == {"_target_": name, "widths": [4]}
    assert sized_cnn({"_target_": name, "widths": None, "stem": "small"}, size)["stem"] == "small"
    another = {"_target_": "contrastive_core.encoders.TorchvisionTrunk", "name": "resnet50"}
    assert sized_cnn({**another, "widths": None}, size) == another


def test_the_ordinary_network_is_sized_by_the_largest_images(runs):
    cfg = composed("sweep_labels", f"runs=[{runs[0]}]", "out=x", "labels=[20]")
    take_over_(cfg)
    assert cfg.cnn.widths == [32, 64, 128, 128]


def test_a_cell_of_settings_that_all_diverge_says_what_to_pass(configured, capsys):
    cnn = ["labels=[20]", "draws=1", "scratch=[cnn]", "random=[]", "protocols=[]"]
    with pytest.raises(Incomplete, match="1 of 1 cells failed: the same command tries them again"):
        sweep(configured(*cnn, f"settings.scratch=[{DIVERGES}]", "scratch_times=2"))
    said = r"scratch cnn: labels=20, seed 0, \w+: failed: FloatingPointError: the .* at step \d+: pass settings with a"
    assert re.search(said, capsys.readouterr().out)


def test_a_failed_cell_leaves_the_other_shards_alone(runs, tmp_path, call_tool, capsys):
    """Shard 0 has the cells of 20 labels, whose CNN diverges; shard 1 comes after it."""
    cells = ["labels=[20,40]", "draws=1", "scratch=[cnn,svm]", "random=[]", "protocols=[]"]
    diverges = [f"settings.scratch=[{DIVERGES}]", "scratch_times=2"]
    shards = ["-m", "shard=0,1", "shards=2"]
    out = f"out={tmp_path / 'out'}"
    with pytest.raises(SystemExit) as ended:
        call_tool(cpc.sweep_labels.main, f"runs={runs[0]}", *SMALL, *STEPS[:2], *cells, *diverges, *shards, out)
    assert ended.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == "1 of 2 cells failed: the same command tries them again"
    assert {path.parent.name for path in files(tmp_path / "out")} == {"svm"}
    assert len(files(tmp_path / "out")) == 2


def test_the_report_says_how_long_networks_from_scratch_were_trained(configured, tmp_path):
    sweep(configured("labels=[20,40]", "draws=1", "scratch=[cnn]", "random=[]", "protocols=[]"))
    sweep(configured("labels=[20]", "draws=1", "scratch=[svm]", "random=[]", "protocols=[]"))
    said = "networks from scratch are trained for 3 steps with 20 labels, 2 passes over them and 3 steps with 40 labels"
    report = (tmp_path / "out/report.md").read_text()
    assert said in report
    assert "may be too low" not in report
    assert "- networks learn from images that are mirrored with a probability of 0\n" in report


def test_the_report_says_where_steps_were_cut_short(configured, tmp_path):
    """Of batches of 10 five passes over 40 labels are 20 steps, over 20 labels 10."""
    cfg = configured("labels=[20,40]", "draws=1", "scratch=[cnn]", "random=[]", "protocols=[]")
    cfg.steps.finetune.passes, cfg.steps.finetune.most = 5, 10
    sweep(cfg)
    said = "from 40 labels on the curve may be too low, and what is saved too large: steps.*.most cuts networks from"
    assert said in (tmp_path / "out/report.md").read_text()


def test_images_are_as_large_as_any_runs(runs, tmp_path):
    """Of a run on 28 px and one on 96, in either order: no run is held against a network that sees less than it."""
    larger = tmp_path / "larger"
    shutil.copytree(runs[0], larger)
    card = json.loads((larger / "encoder.json").read_text())
    card["input"] |= {"load_size": 96, "image_size": 96}
    (larger / "encoder.json").write_text(json.dumps(card))
    config = yaml.safe_load((larger / "config.yaml").read_text()) | {"load_size": 96, "image_size": 96}
    (larger / "config.yaml").write_text(yaml.safe_dump(config))
    for both in ([str(runs[0]), str(larger)], [str(larger), str(runs[0])]):
        cfg = composed(
            "sweep_labels", f"runs=[{','.join(both)}]", "out=x", "labels=[20]", "scratch=[cnn,image,patches]"
        )
        take_over_(cfg)
        assert (cfg.load_size, cfg.cnn.stem) == (96, "imagenet")
        arms = arms_of(both, protocols=["linear"], scratch=list(cfg.scratch))
        networks = {arm.protocol: arm.run for arm in arms if arm.method == "scratch"}
        assert networks == {"cnn": str(larger), "image": both[0], "patches": both[0]}
        ours, theirs = (read_card(run)[1] for run in both)
        assert other_networks({"one": [both[0]], "other": [both[1]]}, ours) == ["other"]
        assert other_networks({"one": [both[0]], "other": [both[1]]}, theirs) == ["one"]


def test_an_encoder_of_one_cell_is_read_whole():
    """Settings begin with 2 x 2 cells, which the trunks of whole images at 32 px do not have."""
    x = torch.randn(20, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2).repeat(10)
    x[:, 0, 0, 0] += 10 * labels
    assert torch.equal(linear(x, labels, x, {"cells": 2}), labels)
    assert torch.equal(nearest(x, labels, x, {"neighbours": 1, "cells": 2}), labels)


def test_cells_of_another_making_are_refused(configured, tmp_path):
    """Those that are asked for again, and those with other numbers of labels, which would stand in one line."""
    sweep(configured(*QUICK))
    before = files(tmp_path / "out")
    for labels in ("labels=[20,40]", "labels=[100]"):
        with pytest.raises(ValueError, match="was made with another settings: pass another out, or remove it"):
            sweep(configured(*QUICK, labels, "settings.knn=[{neighbours:5,cells:1}]"))
        with pytest.raises(ValueError, match="was made with another mode: pass another out"):
            sweep(configured(*QUICK, labels, "mode=image"))
        with pytest.raises(ValueError, match="was made with another encoder"):
            sweep(configured(*QUICK, labels, use=slice(1, 2)))
    assert files(tmp_path / "out") == before
    sweep(configured(*QUICK, "classifier.width=8", "draws=3"))  # nothing that these cells depend on
    assert len(files(tmp_path / "out")) == 12


def test_networks_of_other_steps_are_refused_and_probes_take_none(configured, tmp_path):
    """Those from scratch would else be compared with what was fine-tuned for longer than they allow for."""
    few = ["labels=[20]", "draws=1", "random=[]", "steps.classifier={least: 2, passes: 1, most: 2}"]
    sweep(configured(*few, "scratch=[logistic]", "protocols=[linear]", use=slice(1)))
    longer = "steps.finetune={least: 3, passes: 1, most: 3}"
    sweep(configured(*few, longer, "scratch=[cnn]", "protocols=[]", use=slice(1)))
    before = files(tmp_path / "out")
    tuned = [*few, "scratch=[]", "protocols=[classifier]"]
    for other, named in (("steps.finetune={least: 4, passes: 1, most: 4}", "steps"), ("batch_size=8", "batch_size")):
        with pytest.raises(ValueError, match=rf"cnn/.* was made with another {named}"):
            sweep(configured(*tuned, other, use=slice(1)))
    assert files(tmp_path / "out") == before
    sweep(configured(*tuned, longer, use=slice(1)))
    assert len(files(tmp_path / "out")) == 4


def test_networks_from_scratch_choose_from_as_many_settings_whichever_command_trains_them(configured, tmp_path):
    few = ["labels=[10]", "draws=1", "random=[]"]
    sweep(configured(*few, "scratch=[cnn]", "protocols=[]", "settings.scratch=[{lr:1e-3,weight_decay:0.0}]"))
    before = files(tmp_path / "out")
    tuned = [*few, "scratch=[]", "protocols=[classifier]"]
    with pytest.raises(
        ValueError, match=r"scratch cnn has 1 of settings\.scratch to choose from, CPC classifier has 2"
    ):
        sweep(configured(*tuned))
    assert files(tmp_path / "out") == before
    sweep(configured(*tuned, "settings.classifier=[{lr:0.1,weight_decay:0.0}]"))
    assert len(files(tmp_path / "out")) == 2


def test_cells_of_an_older_version_are_refused(configured, tmp_path):
    """The SVM's choice of a kernel has changed since its first."""
    few = ["labels=[20]", "draws=1", "scratch=[svm]", "random=[]", "protocols=[]"]
    sweep(configured(*few))
    (written,) = files(tmp_path / "out")
    cell = json.loads(written.read_text())
    assert cell["asked"].pop("version") == 2
    written.write_text(json.dumps(cell))
    with pytest.raises(ValueError, match="was made with another version: pass another out, or remove it"):
        sweep(configured(*few))


def test_the_same_labels_by_another_name_are_asked_for_by_theirs(configured, tmp_path):
    sweep(configured(*QUICK, "labels=[20]"))
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match="has the labels of labels_per_class=2: pass labels=20, or another out"):
        sweep(configured(*QUICK, "labels=[]", "labels_per_class=[2]"))
    assert files(tmp_path / "out") == before


def test_an_ordinary_network_is_the_same_whichever_run_comes_first(configured, tmp_path):
    """Of a run it takes how images are normalised; of the classifier its dropout."""
    few = ["labels=[20]", "draws=1", "scratch=[cnn]", "random=[]", "protocols=[]"]
    sweep(configured(*few))
    before = files(tmp_path / "out")
    sweep(configured(*few, "classifier.width=8", "augmentation.flip=0", use=slice(2, 3)))
    assert files(tmp_path / "out") == before
    with pytest.raises(ValueError, match="was made with another dropout"):
        sweep(configured(*few, "classifier.dropout=0.5"))


def test_what_depends_on_what_is_named_once():
    """Every protocol of the configuration has its recipe, with settings of its own keys; nothing is named in vain."""
    cfg = composed("sweep_labels", "runs=[a]", "out=b")
    for key in ("protocols", "random", "scratch"):
        assert set(cfg[key]) <= set(protocols_of(key))
    assert {recipe.settings for recipe in RECIPES.values()} == {*cfg.settings, ""}
    for recipe in RECIPES.values():
        assert all(set(setting) == set(recipe.in_a_setting) for setting in cfg.settings.get(recipe.settings, []))
    assert set().union(*(recipe.reads for recipe in RECIPES.values())) == set(DEPENDS)
    assert networks_from_scratch() == ["cnn", "image", "patches"]


def test_a_cell_knows_all_that_it_depends_on(bench, runs, tmp_path):
    """Of what may change between two commands in a folder, each arm is asked about what it reads and nothing else."""
    made = bench("labels=[20]", "draws=1")
    assert set(made.shared) == {"precision", "train", "test", "pixels"}
    trained, read = {"steps", "batch_size", "views"}, {"encoder", "mode", "readout", "settings"}
    assert set(asked_of(made, Arm("CPC", "linear", str(runs[0])))) == read
    for protocol, phases in (("classifier", ["classifier"]), ("finetune", ["classifier", "finetune"])):
        asked = asked_of(made, Arm("CPC", protocol, str(runs[0])))
        assert set(asked) == {*read, *trained, "classifier", "encodings"}
        assert list(asked["steps"]) == phases
    network = asked_of(made, Arm("scratch", "cnn", str(runs[0])))
    assert set(network) == {*trained, "settings", "cnn", "normalisation", "dropout"}
    before, copied = run_fingerprint(str(runs[0])), tmp_path / "copied"
    for name in ("encoder.json", "encoder.safetensors", "context.safetensors"):
        shutil.copytree(runs[0], copied)
        assert run_fingerprint.__wrapped__(str(copied)) == before
        (copied / name).write_bytes((copied / name).read_bytes() + b" ")
        assert run_fingerprint.__wrapped__(str(copied)) != before
        shutil.rmtree(copied)


def test_contexts_are_read_out_of_cpc_alone(bench, runs):
    made = bench("labels=[20]", "draws=1", "readout=context", use=slice(0, 3))
    assert (
        made.encoder(Arm("CPC", "linear", str(runs[0]))).grid_dim
        == 5 * made.encoder(Arm("SimCLR", "linear", str(runs[2]))).grid_dim
    )
    for method, protocol in (("CPC", "finetune"), ("scratch", "patches"), ("random", "linear")):
        cell = Cell(Arm(method, protocol, str(runs[0])), LabelAmount("labels", 20), 0)
        assert asked_of(made, cell.arm)["readout"] == "context"
        assert len(label_recipes.run_cell(made, cell)["predictions"]) == 100


def test_shards_share_the_cells_and_either_draws_the_curve(configured, tmp_path):
    sweep(configured(*QUICK, "shards=2", "shard=1"))
    first = files(tmp_path / "out")
    assert len(first) == 4
    assert len({path.parent for path in first}) == 2, "of every arm half"
    sweep(configured(*QUICK, "shards=2", "shard=0"))
    assert len(files(tmp_path / "out")) == 8
    assert json.loads((tmp_path / "out/summary.json").read_text())["savings"]


@pytest.mark.parametrize(("choices", "shards"), [(11, 11), (4, 2), (3, 2), (6, 4), (1, 3)])
def test_no_shard_has_the_dearest_choice_of_every_arm(choices, shards):
    """Each cell is one shard's, and the last choice, of most labels, goes round."""
    arms = [Arm("CPC", str(arm), "run") for arm in range(2 * shards)]
    cells = [Cell(arm, LabelAmount("labels", 10 + place), 0) for arm in arms for place in range(choices)]
    shares = [share_of(cells, choices, shard, shards) for shard in range(shards)]
    assert sorted(str(cell) for share in shares for cell in share) == sorted(map(str, cells))
    dearest = [sum(cell.amount.value == 9 + choices for cell in share) for share in shares]
    assert dearest == [2] * shards
    assert {len(share) for share in shares} == {2 * choices}


def test_shards_as_the_page_has_them_with_hydra_itself(runs, tmp_path, call_tool):
    """Lists without brackets, as everywhere on the page."""
    quick = [re.sub(r"=\[(.+)\]$", r"=\1", option) for option in QUICK]
    assert any("," in option for option in quick)
    call_tool(cpc.sweep_labels.main, f"runs={runs[0]}", f"out={tmp_path / 'out'}", *SMALL, *STEPS, *quick,
              "-m", "shard=0,1", "shards=2")  # fmt: skip
    assert len(files(tmp_path / "out")) == 8


def test_a_cell_that_comes_while_the_curve_is_drawn_is_in_it(configured, tmp_path, monkeypatch):
    """Two shards come to their ends together, and the one that knows less writes last."""
    few = ["labels=[20]", "draws=2", "scratch=[svm]", "random=[]", "protocols=[]"]
    sweep(configured(*few))
    (late,) = (tmp_path / "out/cells").rglob("*-seed1.json")
    aside = late.rename(tmp_path / late.name)
    write, drawn = cpc.sweep_labels.write_report, []

    def while_another_ends(out, results, truth, about):
        drawn.append(len(results))
        if aside.exists():
            aside.rename(late)
        write(out, results, truth, about)

    monkeypatch.setattr(cpc.sweep_labels, "write_report", while_another_ends)
    sweep(configured(*few, "shards=2", "shard=0"))
    assert drawn == [1, 2]
    assert "\n2 of 2 cells; " in (tmp_path / "out/report.md").read_text()


def test_another_command_that_began_at_the_same_time_is_noticed_before_anything_is_drawn(
    configured, tmp_path, monkeypatch
):
    """Neither found a cell when it began: the other's network from scratch has 3 steps, where this one's has 41."""
    few = ["labels=[20]", "draws=1", "random=[]"]
    sweep(configured(*few, "scratch=[cnn]", "protocols=[]", out="other"))

    def while_another_keeps_a_cell(bench, cell):
        shutil.copytree(tmp_path / "other/cells", tmp_path / "out/cells", dirs_exist_ok=True)
        return label_recipes.run_cell(bench, cell)

    monkeypatch.setattr(cpc.sweep_labels, "run_cell", while_another_keeps_a_cell)
    with pytest.raises(
        ValueError, match=r"cnn/.* was made with another steps\.scratch: pass another out, or remove it"
    ):
        sweep(configured(*few, "scratch=[]", "protocols=[classifier]", "steps.classifier={least:40,passes:0,most:40}"))
    assert not (tmp_path / "out/report.md").exists()
    assert len(files(tmp_path / "out")) == 2  # nothing that was learned is lost


def test_a_curve_that_cannot_be_drawn_for_a_while_costs_no_cell(configured, tmp_path, monkeypatch, caplog):
    write, read, failures = cpc.sweep_labels.write_report, cpc.label_cells.read_cell, []

    def while_it_lasts(does):
        def done(*asked):
            if failures and failures[-1][0] is does:
                raise OSError(failures.pop()[1])
            return does(*asked)

        return done

    monkeypatch.setattr(cpc.sweep_labels, "REPORT_EVERY", -1)
    monkeypatch.setattr(cpc.sweep_labels, "write_report", while_it_lasts(write))
    monkeypatch.setattr(cpc.label_cells, "read_cell", while_it_lasts(read))
    failures += [(write, "no space left on device"), (read, "stale file handle")]
    sweep(configured(*QUICK))
    for what in ("no space left on device", "stale file handle"):
        assert caplog.text.count(f"the curve could not be drawn, which is tried again: {what}") == 1
    assert "8 of 8 cells" in (tmp_path / "out/report.md").read_text()
    failures.append((write, "no space left on device"))
    with pytest.raises(OSError, match="no space left"):
        sweep(configured(*QUICK))


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        ({}, "is no cell of a label sweep, for want of method: remove it, and it is made again"),
        ([], "is no cell of a label sweep, for want of method"),
        (3, "is no cell of a label sweep, for want of method"),
        ({"labels": "20"}, "is no cell of a label sweep, for want of labels"),
        ({"shared": 3}, "is no cell of a label sweep, for want of shared"),
        ({"draws": None}, "is no cell of a label sweep, for want of draws"),
        ({"predictions": None}, "is no cell of a label sweep, for want of predictions"),
        ({"predictions": [2**70]}, "is no cell of a label sweep, for want of predictions"),
        ({"asked": {"settings": 3}}, "is no cell of a label sweep, for want of asked"),
        ({"predictions": [1.5]}, "is no cell of a label sweep, for want of predictions"),
        ({"predictions": [1]}, "was made with another number of test images: pass another out, or remove it"),
    ],
)
def test_a_file_that_is_no_whole_cell_is_named(configured, tmp_path, damaged, words):
    few = ["labels=[20]", "draws=1", "scratch=[svm]", "random=[]", "protocols=[]"]
    sweep(configured(*few))
    (file,) = files(tmp_path / "out")
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | damaged if isinstance(damaged, dict) and damaged else damaged))
    with pytest.raises(ValueError, match=rf"seed0\.json {words}"):
        sweep(configured(*few))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm", "ray"])
def test_shards_of_other_launchers_are_one_curve(runs, tmp_path, run_tool, launcher):
    """Ray on a cluster of its own here; Slurm on one that is there, with a partition that jobs go to by default."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher", reason='the extra "sweep"')
    if launcher == "submitit_slurm" and not shutil.which("sbatch"):
        pytest.skip("no Slurm here: submitit_local runs the other half of the same launcher")
    asked = [f"runs={runs[0]}", *SMALL, *STEPS, *QUICK]
    assert run_tool("tools/sweep_labels.py", *asked, "out=alone").returncode == 0
    shards = ["-m", "shard=0,1", "shards=2", f"hydra/launcher={launcher}"]
    done = run_tool("tools/sweep_labels.py", *asked, "out=together", *shards, env={"RAY_worker_niceness": "0"})
    assert done.returncode == 0, done.stderr
    alone, together = (
        [
            {**row, "seconds": ""}
            for row in csv.DictReader((tmp_path / out / "label_efficiency.csv").read_text().splitlines())
        ]
        for out in ("alone", "together")
    )
    assert together == alone
    commands = {
        out: json.loads((tmp_path / out / "summary.json").read_text())["commands"] for out in ("alone", "together")
    }
    assert commands["together"] == [each.replace("out=alone", "out=together") for each in commands["alone"]]
    assert commands["alone"][0].startswith(f"python tools/sweep_labels.py 'runs=[{runs[0]}]' ")


# ---- what a cell sees ----


class Watched:
    """A protocol that notes what it is asked."""

    def __init__(self, protocol):
        self.protocol, self.settings, self.asked = protocol, protocol.settings, []

    def predict(self, fit, at, setting, share, seed):
        self.asked.append((fit, at, share))
        return self.protocol.predict(fit, at, setting, share, seed)


FROZEN_FIRST = ("linear", "classifier", "finetune")
ALL = [
    ("scratch", "logistic"), ("scratch", "cnn"), ("scratch", "image"), ("scratch", "patches"), ("CPC", "linear"),
    ("CPC", "knn"), ("CPC", "classifier"), ("CPC", "finetune"), ("scratch", "svm"), ("random", "linear"),
    ("SimCLR", "head"),
]  # fmt: skip


def run_of(runs, method):
    return str(runs[2] if method == "SimCLR" else runs[0])


@pytest.mark.parametrize(("method", "protocol"), ALL)
def test_test_images_are_looked_at_once_at_the_end(bench, runs, monkeypatch, method, protocol):
    two = "settings.scratch=[{lr:1e-3,weight_decay:0.0},{lr:2e-3,weight_decay:0.0}]"
    made = bench("labels=[20]", "draws=1", two)
    cell = Cell(Arm(method, protocol, run_of(runs, method)), LabelAmount("labels", 20), 0)
    chosen = set(made.choices[cell.amount, 0].indices.tolist())
    watched = Watched(protocol_of(made, cell.arm, made.choices[cell.amount, 0].indices))
    monkeypatch.setattr(label_recipes, "protocol_of", lambda bench, arm, indices: watched)
    label_recipes.run_cell(made, cell)
    assert all(set(fit.tolist()) <= chosen for fit, _, _ in watched.asked)
    *trials, last = watched.asked
    assert last[1].part == "test"
    assert set(last[0].tolist()) == chosen, "and what was held out counts as labels"
    for fit, at, _ in trials:
        assert at.part == "train"
        assert set(at.indices.tolist()) <= chosen - set(fit.tolist())
    assert bool(trials) == (len(watched.settings) > 1)


@pytest.mark.parametrize(("method", "protocol"), ALL)
def test_no_other_label_has_a_say(bench, runs, method, protocol):
    made = bench("labels=[20]", "draws=1")
    cell = Cell(Arm(method, protocol, run_of(runs, method)), LabelAmount("labels", 20), 0)
    before = label_recipes.run_cell(made, cell)["predictions"]
    chosen = made.choices[cell.amount, 0].indices
    others = torch.ones(len(made.labels), dtype=torch.bool)
    others[chosen] = False
    made.splits.train.labels[others] = made.labels[others].flip(0)
    try:
        assert label_recipes.run_cell(made, cell)["predictions"] == before
    finally:
        made.splits.train.labels[others] = made.labels[others].flip(0)


@pytest.mark.parametrize(
    ("method", "protocol"),
    [*[(method, protocol) for method in ("CPC", "SimCLR") for protocol in FROZEN_FIRST], ("SimCLR", "head")],
)
def test_a_cell_leaves_the_encoder_as_it_was(bench, runs, method, protocol):
    """Weights, the statistics of SimCLR's BatchNorm, and the files."""
    run = run_of(runs, method)
    made = bench("labels=[20]", "draws=1", use=slice(0, 3))
    arm = Arm(method, protocol, run)
    encoder, before = made.encoder(arm).encoder, run_fingerprint.__wrapped__(run)
    assert any("running_mean" in name for name in encoder.state_dict()) == (method == "SimCLR")
    label_recipes.run_cell(made, Cell(arm, LabelAmount("labels", 20), 0))
    weights = load_file(f"{run}/encoder.safetensors")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert run_fingerprint.__wrapped__(run) == before


def test_fine_tuning_moves_the_encoder_and_its_rate_of_zero_does_not(bench, runs, monkeypatch):
    """The second phase is more than the first: with a rate of 0 for the encoder only the classifier goes on."""
    arm, amount = Arm("CPC", "finetune", str(runs[0])), LabelAmount("labels", 20)
    made = bench("labels=[20]", "draws=1", "steps.classifier={least:40,passes:0,most:40}")
    protocol = protocol_of(made, arm, made.choices[amount, 0].indices)
    train, trained = label_protocols.Training.on_images_, []

    def noted(training, network, *arguments):
        trained.append(network)
        return train(training, network, *arguments)

    monkeypatch.setattr(label_protocols.Training, "on_images_", noted)
    at = Rows("test", torch.arange(100))
    for rate in (1.0, 0.0):
        setting = {"lr": 0.1, "weight_decay": 0.0, "encoder_lr": rate}
        predictions = protocol.predict(made.choices[amount, 0].indices, at, setting, 1.0, 0)
    assert len(predictions.unique()) > 2
    frozen = made.encoder(arm).state_dict()
    moved, unmoved = (network[0].state_dict() for network in trained)
    assert all(torch.equal(unmoved[name], weights) for name, weights in frozen.items())
    assert not all(torch.equal(moved[name], weights) for name, weights in frozen.items())


def test_both_ways_to_fine_tune_lower_the_classifiers_rate_alike():
    cfg = composed("finetune", "run=a", "labels=20", "protocol=cpc_v2")
    assert cfg.grid.classifier_rate == label_protocols.SECOND_PHASE_RATE


def test_features_are_encoded_once_for_all_cells(bench, runs):
    made = bench("labels=[20,100]", "draws=2", "protocols=[linear,knn]")
    for protocol in ("linear", "knn"):
        for amount, seed in made.choices:
            label_recipes.run_cell(made, Cell(Arm("CPC", protocol, str(runs[0])), amount, seed))
    (table,) = made.tables.values()
    used = set().union(*(set(choice.indices.tolist()) for choice in made.choices.values()))
    assert table.encoded == len(used) + 100
    unused = torch.tensor([index for index in range(4000) if index not in used][:1])
    with pytest.raises(ValueError, match="that no choice of labels holds"):
        table.at(Rows("train", unused))


def test_the_same_cell_twice_is_the_same_and_another_seed_is_not(bench, runs):
    made = bench("labels=[20]", "draws=2", "steps.classifier={least:8,passes:0,most:8}")
    for protocol in ("cnn", "patches", "classifier", "finetune"):
        arm = Arm("scratch" if protocol in ("cnn", "patches") else "CPC", protocol, str(runs[0]))
        first, again, other = (
            label_recipes.run_cell(made, Cell(arm, LabelAmount("labels", 20), seed))["predictions"]
            for seed in (0, 0, 1)
        )
        assert first == again, protocol
        assert first != other, protocol


# ---- what is asked for ----


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "no labels asked for: pass fractions="),
        (["labels=[25]"], "labels=25 for 10 classes: pass a multiple, 20 or 30"),
        (["fractions=[0.001]"], "less than one for each of 10 classes: pass at least 0.01, or labels_per_class=1"),
        (["fractions=[0]"], "fraction 0.0: pass a share"),
        (["fractions=[1.5]"], "fraction 1.5: pass a share"),
        (["labels_per_class=[500]"], "500 labels a class, the rarest of 10 classes has 100"),
        (["labels=[20]", "draws=0"], "draws=0: pass at least 1"),
        (["labels=[20]", "shard=2", "shards=2"], "shard=2 of shards=2: pass 0 to 1"),
        (["labels=[20]", "protocols=[linear,svm]"], r"protocols=\['svm'\]: pass some of linear, knn, classifier"),
        (["labels=[20]", "scratch=[resnet]"], r"scratch=\['resnet'\]: pass some of logistic, svm, cnn"),
        (["labels=[20]", "random=[finetune]"], r"random=\['finetune'\]: pass some of linear"),
        (["labels=[20]", "mode=patch"], "mode=patch: pass one of patches, image"),
        (["labels=[20]", "precision=fp16"], "precision=fp16: pass precision=bf16"),
        (["labels=[20]", "steps.finetune.least=0"], "steps.finetune=.*: pass 1 <= least <= most"),
        (["labels=[20]", "settings.linear=[]"], "settings.linear has none"),
        (
            ["labels=[20]", "settings.scratch=[lr:2e-3]"],
            r"settings.scratch has 'lr:2e-3': pass 'settings.scratch=\[{lr:NU",
        ),
        (
            ["labels=[20]", "settings.knn=[{cells:2}]"],
            r"settings.knn has {'cells': 2}: pass 'settings.knn=\[{neighbours:",
        ),
        (["labels=[20]", "settings.linear=null"], "settings.linear has none: pass"),
        (["labels=[20]", "scratch_times=0.5"], "scratch_times=0.5: pass at least 1"),
        (
            ["labels=[20]", "settings.scratch=[{lr:1e-3,weight_decay:0.0}]"],
            "scratch cnn has 1 of settings.scratch to choose from, pre-trained classifier has 2: pass as many",
        ),
        (["labels=[20]", "settings.knn=[{neighbours:5,cells:0}]"], "settings.knn has cells=0: pass a whole number of"),
        (["labels=[20]", "settings.linear=[{cells:1.5}]"], "settings.linear has cells=1.5: pass a whole number of at"),
        (["labels=[20]", "settings.scratch=[{lr:inf,weight_decay:0}]"], "settings.scratch has lr=inf: pass a number"),
        (["labels=[20]", "mean=[0.5,0.5,0.5]"], r"mean=\[0.5, 0.5, 0.5\]: encoders normalise by themselves, leave"),
        (["labels=[20]", "std=[1]"], r"std=\[1.0\]: encoders normalise by themselves, leave it out"),
        (["labels=[20]", "image_size=14"], "image_size=14: images are as large as load_size says, leave it out"),
        (["labels=[20]", "views.std=[0.2,0.2,0.2]"], r"views.std=\[0.2, 0.2, 0.2\]: frozen encoders see no views"),
        (["labels=[20]", "views.image_size=14"], "views.image_size=14: frozen encoders see no views, leave it out"),
        (["labels=[20]", "load_size=0"], "load_size=0: pass at least 1"),
        (["labels=[20]", "seed=-1"], "seed=-1: pass a whole number from 0"),
        (["labels=[20]", "cnn=null"], "cnn=None: pass cnn._target_=NAME, or leave it out"),
        (["labels=[20]", "protocols=[linear,linear]"], r"protocols=\['linear', 'linear'\]: pass each once"),
        (
            ["labels=[20]", "settings.scratch=[{lr:-1,weight_decay:0}]"],
            "settings.scratch has lr=-1: pass a number of a",
        ),
        (["labels=[20]", "settings.scratch=[{lr:a,weight_decay:0}]"], "settings.scratch has lr=a: pass a number of at"),
        (["labels=[20]", "classifier.dropout=4"], "classifier.dropout=4: pass a share from 0 to below 1"),
        (["labels=[20]", "classifier.dropout=null"], "classifier.dropout=None: pass a share from 0 to below 1"),
        (["labels=[20]", "scratch_times=nan"], "scratch_times=nan: pass at least 1"),
        (["labels=[20]", "scratch_times=inf"], "scratch_times=inf: pass at least 1"),
        (["labels=[20]", "few=-1"], "few=-1.0: pass a share from 0 to 1"),
        (["labels=[20]", "bad_images=7"], "bad_images=7.0: pass a share from 0 to 1"),
        (["labels=[20]", "head_layer=-7"], "head_layer=-7: pass at least 0"),
        (["labels=[20]", "protocols=[]", "random=[]", "scratch=[]"], "no arm asked for: pass protocols="),
        (["labels=[20]", "labels_per_class=[2]"], "labels_per_class=2 and labels=20 are 20 labels both"),
        (["labels=[20]", "protocols=[head]"], "none of the runs has a projection head: leave it out"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_leaves_nothing(configured, tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        sweep(configured(*overrides))
    assert not (tmp_path / "out").exists()


def test_what_is_not_given_is_asked_for():
    with pytest.raises(ValueError, match="not given: runs; pass runs="):
        sweep(composed("sweep_labels", "labels=[20]", "out=x"))


def test_runs_that_differ_in_more_than_the_seed_are_two_methods(runs, tmp_path):
    assert grouped_runs(list(map(str, runs))) == {"CPC": [str(run) for run in runs[:2]], "SimCLR": [str(runs[2])]}
    other = tmp_path / "other"
    other.mkdir()
    for name in ("encoder.json", "encoder.safetensors"):
        (other / name).write_bytes((runs[0] / name).read_bytes())
    config = yaml.safe_load((runs[0] / "config.yaml").read_text()) | {"steps": 9}
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    assert grouped_runs([str(runs[0]), str(other), str(runs[1])]) == {
        "CPC": [str(runs[0]), str(runs[1])], "CPC 2": [str(other)]
    }  # fmt: skip


def test_runs_that_have_learned_from_labels_or_stand_there_twice_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="are the same run: pass each once"):
        grouped_runs([str(runs[0]), str(runs[0])])
    copied = tmp_path / "copied"
    shutil.copytree(runs[0], copied)
    with pytest.raises(ValueError, match="are the same run: pass each once"):
        grouped_runs([str(runs[0]), str(copied)])
    card = json.loads((copied / "encoder.json").read_text())
    for learned in ({"method": "Classifier"}, {"method": "Distill"}, {"classifier": {"class_names": ["a"]}}):
        (copied / "encoder.json").write_text(json.dumps(card | learned))
        with pytest.raises(ValueError, match="has learned from labels"):
            grouped_runs([str(copied)])


@pytest.mark.parametrize("method", ["../../elsewhere", "scratch", "random", "", "a/b", ".hidden"])
def test_a_name_that_can_be_no_methods_is_refused(runs, tmp_path, method):
    """It comes from the run's card, whoever wrote that, and is the name of a folder and the role of its cells."""
    copied = tmp_path / "copied"
    shutil.copytree(runs[0], copied)
    card = json.loads((copied / "encoder.json").read_text())
    (copied / "encoder.json").write_text(json.dumps(card | {"method": method}))
    with pytest.raises(ValueError, match=r"says that its method is '.*': in its encoder\.json, pass a name of letters"):
        grouped_runs([str(copied)])


def test_two_runs_of_one_seed_are_no_repeats(runs, tmp_path):
    """Trained on other machines, say: they differ in their last digits."""
    copied = tmp_path / "copied"
    shutil.copytree(runs[0], copied)
    card = json.loads((copied / "encoder.json").read_text())
    (copied / "encoder.json").write_text(json.dumps(card | {"trained_on": "another machine"}))
    with pytest.raises(ValueError, match=r"copied and .*cpc0 are of one seed \(0\), which are no two runs: pass one"):
        grouped_runs([str(runs[1]), str(runs[0]), str(copied)])


def test_a_layer_that_the_head_does_not_have(configured, tmp_path):
    with pytest.raises(ValueError, match=r"head_layer=9: the head of .*simclr has 2 layers, pass 0 to 2"):
        sweep(configured("labels=[20]", "protocols=[head]", "head_layer=9", use=slice(2, 3)))
    assert not (tmp_path / "out").exists()


def test_nothing_is_flipped_that_a_run_did_not_flip(configured, runs):
    for use, overrides, flip in (
        (slice(0, 1), [], 0.0), (slice(2, 3), [], 0.0), (slice(2, 3), ["augmentation.flip=0.3"], 0.3)
    ):  # fmt: skip
        cfg = configured("labels=[20]", *overrides, use=use)
        take_over_(cfg)
        assert cfg.augmentation.flip == flip


@pytest.mark.parametrize(
    ("overrides", "flip", "told"),
    [
        (["data=imagefolder", "data.root=photos"], 0.0, "not mirrored: pass augmentation.flip=0.5 where they may be"),
        (["data=imagefolder", "data.root=photos", "augmentation.flip=0.5"], 0.5, ""),
        (["data=mnist5k"], 0.0, ""),
    ],
)
def test_what_no_run_can_know_of_other_images_is_told(configured, caplog, overrides, flip, told):
    """Of a run on digits: photographs may be mirrored, and their networks from scratch gain by it."""
    cfg = configured("labels=[20]", *overrides)
    take_over_(cfg)
    assert cfg.augmentation.flip == flip
    assert told in caplog.text if told else not caplog.text


def test_digits_are_not_mirrored_for_a_run_that_says_nothing(configured, runs, tmp_path, caplog):
    """An encoder from elsewhere, or one of photographs."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("encoder.json", "encoder.safetensors"):
        shutil.copy(runs[0] / name, elsewhere / name)
    for data, flip in (("data=mnist5k", 0.0), ("data=imagefolder", None)):
        cfg = configured("labels=[20]", data, *(["data.root=x"] if flip is None else []), f"runs=[{elsewhere}]")
        take_over_(cfg)
        assert cfg.augmentation.flip == flip
    assert "mirrored with a probability of 0.5: pass augmentation.flip=0 where left and right differ" in caplog.text


def test_fewer_draws_above_a_tenth_and_choices_that_are_nested():
    labels = torch.arange(10).repeat(40)
    ids = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    amounts = [LabelAmount("labels", 20), LabelAmount("fraction", 0.1), LabelAmount("fraction", 0.5)]
    choices = drawn_choices(amounts, labels, ids, draws=3, few=0.1, draws_above=1)
    assert [(str(amount), seed) for amount, seed in choices] == [
        ("labels=20", 0), ("labels=20", 1), ("labels=20", 2), ("fraction=0.1", 0), ("fraction=0.1", 1),
        ("fraction=0.1", 2), ("fraction=0.5", 0),
    ]  # fmt: skip
    sets = {key: set(choice.indices.tolist()) for key, choice in choices.items()}
    assert sets[amounts[0], 0] < sets[amounts[1], 0] < sets[amounts[2], 0]


def test_seeds_that_choose_the_same_images_are_one_choice():
    """Five copies of all labels would stand for five choices, and one lucky result for a certain saving."""
    labels, ids = torch.arange(10).repeat(40), torch.arange(400)
    amounts = [LabelAmount("fraction", 0.5), LabelAmount("labels_per_class", 40)]
    choices = drawn_choices(amounts, labels, ids, draws=5, few=1.0, draws_above=1)
    assert [(str(amount), seed) for amount, seed in choices] == [
        *[("fraction=0.5", seed) for seed in range(5)],
        ("labels_per_class=40", 0),
    ]


def listed(folder, made, places, name="few.txt"):
    """A file in a folder of its own with the names of these training images."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text("".join(f"somewhere/{made.splits.train.name(int(place))}\n" for place in places))
    return file


QUICK_LISTS = ["scratch=[logistic,cnn]", "protocols=[linear,classifier]", "random=[]"]


def test_lists_of_as_many_labels_are_several_choices_of_that_number(configured, bench, tmp_path):
    images = bench("labels=[20]")
    one, other, more = torch.arange(60), torch.arange(60) + 100, torch.arange(80)
    files_of = [
        listed(tmp_path / name, images, places, f"{name}.txt")
        for name, places in (("a", one.flip(0)), ("b", other), ("c", more))
    ]
    folder = sweep(configured(f"label_lists=[{','.join(map(str, files_of))}]", *QUICK_LISTS))
    with (folder / "label_efficiency.csv").open() as rows:
        cells = list(csv.DictReader(rows))
    assert {(row["amount"], row["labels"], row["seed"], row["split"]) for row in cells} == {
        (f"label_list={name}.txt", str(len(places)), seed, split_digest(images.ids, images.labels, places))
        for name, places, seed in (("a", one, "0"), ("b", other, "1"), ("c", more, "0"))
    }
    assert len(cells) == 12
    assert {json.loads(file.read_text())["draws"] for file in (folder / "cells").rglob("*seed1.json")} == {2}
    before = files(folder)
    sweep(configured(f"label_lists=[{files_of[0]}]", *QUICK_LISTS))
    assert files(folder) == before


def test_another_list_of_the_same_name_is_another_choice(configured, bench, tmp_path):
    images = bench("labels=[20]")
    asked = [f"label_lists=[{listed(tmp_path / 'a', images, range(60))}]", "scratch=[logistic]", *QUICK_LISTS[1:]]
    sweep(configured(*asked))
    for places in (range(100, 160), range(61), range(100, 170)):
        listed(tmp_path / "a", images, places)
        with pytest.raises(ValueError, match="made with another choice of 60 labels: pass another out"):
            sweep(configured(*asked))
    with pytest.raises(ValueError, match="lists of labels and draws make no common curve, pass another out"):
        sweep(configured("labels=[20]", *asked[1:]))


def test_lists_that_cannot_be_used(configured, bench, tmp_path):
    images = bench("labels=[20]")
    without_threes = listed(tmp_path / "a", images, (images.labels != 3).nonzero().flatten()[:60])
    of_all = listed(tmp_path / "b", images, range(60))
    empty = listed(tmp_path / "c", images, [], "empty.txt")
    with pytest.raises(ValueError, match=r"label_list=few\.txt has no image of class 3: pass lists that have all"):
        bench(f"label_lists=[{without_threes}]")
    with pytest.raises(ValueError, match=r"label_list=few\.txt twice: give each list a file name of its own"):
        bench(f"label_lists=[{of_all},{listed(tmp_path / 'd', images, range(70))}]")
    with pytest.raises(
        ValueError, match=r"label_list=same\.txt and label_list=few\.txt name the same images: pass each"
    ):
        bench(f"label_lists=[{of_all},{listed(tmp_path / 'e', images, range(60), 'same.txt')}]")
    for lists, words in (
        (["labels=[20]", f"label_lists=[{of_all}]"], "lists and draws make no common curve"),
        ([f"label_lists=[{empty}]"], r"empty\.txt: no name: pass a list of this data set's file names"),
        ([f"label_lists=[{tmp_path / 'none'}]"], "no file .*none: pass a list of image file names, one a line"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            check_asked(configured(*lists))


def test_a_class_without_a_training_image_is_named():
    images = torch.zeros(6, 8, 8, 3, dtype=torch.uint8).numpy()
    train = ImageDataset(images, size=8, labels=[0, 0, 2, 2, 0, 2])
    with pytest.raises(ValueError, match="no training image has a label of class 1"):
        check_classes(Splits(train, train))
    fewer = ImageDataset(images, size=8, labels=[0, 0, 1, 1, 0, 1])
    with pytest.raises(ValueError, match="test images have classes up to 2, there are 2 to learn"):
        check_classes(Splits(fewer, train))


def broken(*places, count=40):
    """So many images of two classes, those at these places no images."""
    images = [b"no" if i in places else torch.full((8, 8, 3), i, dtype=torch.uint8).numpy() for i in range(count)]
    return ImageDataset(images, size=8, labels=[i % 2 for i in range(count)])


@pytest.mark.parametrize("cached", [False, True])
def test_what_cannot_be_decoded_is_chosen_by_nobody(cached):
    train = broken(*range(4, 20))
    train, ids = train.cached() if cached else train, sample_ids(train)
    good = torch.tensor([*range(4), *range(20, 40)])

    def draw(labels, ids):
        amounts = [LabelAmount("labels", 6), LabelAmount("labels_per_class", 12)]
        return drawn_choices(amounts, labels, ids, draws=2, few=0.2, draws_above=1)

    choices = decodable_choices(lambda labels: draw(labels, ids), train, BadImages(1.0), 0)
    expected = draw(train.labels[good], ids[good])  # as if there had never been any others
    assert {key: choice.digest for key, choice in choices.items()} == {
        key: choice.digest for key, choice in expected.items()
    }
    with pytest.raises(TooManyBadImages):
        decodable_choices(lambda labels: draw(labels, ids), train, BadImages(0.1, grace=1), 0)


def test_a_broken_image_changes_no_choice_that_does_not_hold_it(configured):
    """A folder may grow: an amount chooses the same alone and beside one that holds the image."""

    def chosen(bad, *fractions):
        cfg = configured(f"fractions={[*fractions]}", "draws=1", "bad_images=1.0")
        train = broken(*bad)
        return choices_of(cfg, Splits(train, train))[LabelAmount("fraction", fractions[0]), 0].indices.tolist()

    at_an_edge = 9.501 / 20  # ten of a class of 20, nine of 19
    alone = chosen([], at_an_edge)
    assert len(alone) == 20
    outside = next(i for i in range(40) if i not in alone)
    assert chosen([outside], at_an_edge) == chosen([outside], at_an_edge, 1.0) == alone


def test_only_images_that_are_chosen_are_decoded(monkeypatch):
    train, looked_at = broken(), []
    ids = sample_ids(train)
    whole = ImageDataset.decode
    monkeypatch.setattr(ImageDataset, "decode", lambda self, i: looked_at.append(self.name(i)) or whole(self, i))

    def draw(labels):
        return drawn_choices([LabelAmount("labels", 4)], labels, ids, draws=1, few=1.0, draws_above=1)

    decodable_choices(draw, train, BadImages(0.0), 0)
    assert len(looked_at) == 4


def test_a_list_goes_without_what_cannot_be_decoded_and_a_class_cannot():
    train = broken(3)
    ids = sample_ids(train)
    named = {LabelList("a.txt"): torch.arange(10)}
    choices = decodable_choices(lambda labels: listed_choices(named, labels, ids), train, BadImages(1.0), 0)
    assert choices[LabelList("a.txt"), 0].indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    none_left = broken(*range(1, 40, 2))
    amounts = [LabelAmount("labels", 4)]
    with pytest.raises(ValueError, match="no training image of class 1 can be decoded: mend the data or leave it out"):
        decodable_choices(
            lambda labels: drawn_choices(amounts, labels, ids, draws=1, few=1.0, draws_above=1),
            none_left,
            BadImages(1.0),
            0,
        )


def test_a_plan_is_told_in_time_for_every_cell(configured):
    cfg = configured("labels=[20,40]", "draws=2")
    check_asked(cfg)
    take_over_(cfg)
    made = bench_of(cfg)
    cells = cells_of(cfg, made)
    planned = planned_seconds(made, cells)
    assert set(planned) == set(cells)
    assert all(seconds >= 0 for seconds in planned.values())  # differences of short times, which may come out as 0
    assert sum(planned.values()) > 0
    # 40 labels of 4 a class are judged in three folds, 20 in two
    few, more = (Cell(Arm("CPC", "finetune", str(cfg.runs[0])), LabelAmount("labels", n), 0) for n in (20, 40))
    assert planned[more] > planned[few]


def test_a_plan_encodes_few_images_and_counts_all(configured):
    cfg = configured("labels=[20]", "draws=2", "protocols=[linear]", "scratch=[]", "random=[]")
    check_asked(cfg)
    take_over_(cfg)
    made = bench_of(cfg)
    cells = cells_of(cfg, made)
    encoding, nothing = planned_seconds(made, cells).values()
    assert [table.encoded for table in made.tables.values()] == [0]
    assert encoding > nothing, "of as many labels; the first encodes 1,000 digits"
    label_recipes.run_cell(made, cells[0])
    encoding, nothing = planned_seconds(made, cells).values()
    assert encoding == nothing


def test_a_plan_counts_every_trial_in_every_fold_the_test_images_and_the_copies(bench, runs, monkeypatch):
    """Two settings: 20 labels, 2 a class, are 2 x 2 trials and the last fit, 40 in three folds 3 x 2 and it."""
    made = bench("labels=[20,40]", "draws=1")
    monkeypatch.setattr(cpc.label_costs, "timings", lambda protocol, chosen: (2.0, 0.01))
    monkeypatch.setattr(cpc.label_costs, "seconds_of_copies", lambda protocol: 3.0)
    arms = [Arm("scratch", "cnn", str(runs[0])), Arm("CPC", "linear", str(runs[0]))]
    cells = [Cell(arm, LabelAmount("labels", labels), 0) for arm in arms for labels in (20, 40)]
    # a network takes as many steps for either, a probe's cost rises with its labels; 100 test images
    seconds = [5 * 2 + 1 + 3, 7 * 2 + 1 + 3, 5 * 2 + 1 + 3, 7 * 2 * 2 + 1 + 3]
    assert planned_seconds(made, cells) == pytest.approx(dict(zip(cells, seconds, strict=True)))


def test_a_plan_waits_for_one_copy_of_an_image_and_counts_all(bench, runs, monkeypatch):
    """Of 20 labels and encodings=40 a cell encodes two of each."""
    made = bench("labels=[20]", "draws=1")
    encoded, clock = [], iter(range(1000))
    encode = label_protocols.encoded_copies

    def counted(*arguments, copies, **options):
        encoded.append(copies)
        return encode(*arguments, copies=copies, **options)

    monkeypatch.setattr(label_protocols, "encoded_copies", counted)
    monkeypatch.setattr(cpc.label_costs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    chosen = made.choices[LabelAmount("labels", 20), 0].indices
    for name in ("classifier", "finetune"):
        protocol = protocol_of(made, Arm("CPC", name, str(runs[0])), chosen)
        assert cpc.label_costs.seconds_of_copies(protocol) == 2  # a tick for one
        cpc.label_costs.timings(cpc.label_costs.with_little_to_encode(protocol, None), chosen)
    assert encoded == [1, 1, 1, 1]


def test_a_plan_fits_a_probe_once(bench, runs, monkeypatch):
    """A support vector machine of ten thousand rows takes minutes."""
    made, fitted = bench("labels=[20]", "draws=1"), []
    protocol = protocol_of(
        made, Arm("scratch", "svm", str(runs[0])), made.choices[LabelAmount("labels", 20), 0].indices
    )
    probe = protocol.probe
    monkeypatch.setattr(protocol, "probe", lambda *asked: fitted.append(1) or probe(*asked))
    cpc.label_costs.timings(protocol, made.choices[LabelAmount("labels", 20), 0].indices)
    assert fitted == [1]


@pytest.mark.parametrize(("seconds", "said"), [(3, "3 s"), (90, "90 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations_are_said_as_people_do(seconds, said):
    assert duration(seconds) == said


def test_one_label_a_class_takes_the_setting_that_was_fixed_beforehand(bench, runs):
    made = bench("labels_per_class=[1]", "draws=1")
    arm = Arm("CPC", "finetune", str(runs[0]))
    watched = Watched(protocol_of(made, arm, made.choices[LabelAmount("labels_per_class", 1), 0].indices))
    chosen = made.choices[LabelAmount("labels_per_class", 1), 0].indices
    assert choose_setting(watched, chosen, made.labels, seed=0, ids=made.ids) == watched.settings[0]
    assert not watched.asked


# ---- from the command line ----


def test_transfer_and_the_command_line(runs, tmp_path, run_tool, call_tool, capsys):
    """Another labelled data set than the run's: folders of larger images, a class each."""
    from PIL import Image

    digits = mnist5k()
    for part, dataset in (("train", digits.train), ("test", digits.test)):
        for label in (0, 1):
            folder = tmp_path / "photos" / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in (dataset.labels == label).nonzero().flatten()[:8].tolist():
                image = Image.fromarray(dataset[index].image.permute(1, 2, 0).numpy()).resize((40, 34))
                image.save(folder / f"{index}.png")
    few = ["labels_per_class=[1,4]", "draws=1", "draws_above=1", "protocols=[linear]", "scratch=[logistic]"]
    data = ["data=imagefolder", f"data.root={tmp_path / 'photos'}", "out=out"]
    done = run_tool("tools/sweep_labels.py", f"runs=[{runs[0]}]", *data, *few, *SMALL, *STEPS)
    assert done.returncode == 0, done.stderr
    assert "6 cells, 0 are there already" in done.stdout
    assert "planned" in done.stdout
    rows = json.loads((tmp_path / "out/summary.json").read_text())["accuracies"]
    assert {(row["method"], row["labels"]) for row in rows} == {
        (method, labels) for method in ("scratch", "random", "CPC") for labels in (2, 8)
    }
    with pytest.raises(SystemExit) as ended:
        call_tool(cpc.sweep_labels.main, f"runs=[{tmp_path}]", *data, *few)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: no encoder.safetensors")


# ---- how long ----


@pytest.mark.parametrize(
    ("labels", "steps"), [(10, 300), (40, 300), (960, 300), (992, 310), (4000, 1250), (6400, 2000), (50_000, 2000)]
)
def test_more_labels_train_longer_up_to_a_bound(labels, steps):
    assert Length(300, 10, 2000).steps(labels, 32) == steps


def test_from_scratch_is_trained_as_long_as_both_phases_at_any_number_of_labels():
    lengths = lengths_of(composed("sweep_labels", "runs=[a]", "out=b", "steps.finetune.passes=50", "scratch_times=1"))
    for labels in (10, 200, 640, 700, 800, 850, 993, 1000, 1011, 10_000, 100_000):
        phases = [lengths[name].steps(labels, 32) for name in ("classifier", "finetune")]
        assert lengths["scratch"].steps(labels, 32) == sum(phases)
    tenfold = lengths_of(composed("sweep_labels", "runs=[a]", "out=b"))
    assert tenfold["scratch"].steps(40, 32) == 4000
    assert tenfold["head"].steps(40, 32) == 400
