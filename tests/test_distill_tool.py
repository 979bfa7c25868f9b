"""Distillation, and SimCLRv2 whole, from their configurations and from the command line."""

import json
import shutil

import hydra
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_digits import small_digits

import cpc
import cpc.distill
import cpc.simclr_v2
from contrastive_core.data import mnist5k
from contrastive_core.run_log import read_metrics
from cpc.configs import config_folder
from cpc.distill import distill, distilled_images
from cpc.evaluate import evaluate
from cpc.features import load_classifier, read_classifier
from cpc.finetune import finetune
from cpc.pretrain import pretrain
from cpc.simclr_v2 import as_override, flattened, steps_of

pytestmark = pytest.mark.usefixtures("as_a_new_process")

TINY = ["batch_size=16", "log_every=1", "threads=1", "device=cpu", "probe_every=0"]


def composed(name, *overrides):
    given = {override.split("=")[0] for override in overrides}
    tiny = [option for option in TINY if option.split("=")[0] not in given]
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return hydra.compose(name, [*tiny, *overrides])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def simclr_run(runs):
    options = ["steps=2", "encoder.width=4", "method.head.layers=3"]
    return pretrain(composed("pretrain", "method=simclr", *options, f"run_dir={runs / 'simclr'}"))


@pytest.fixture(scope="module")
def teacher(runs, simclr_run):
    """A teacher that has learned something of its 40 labels, on the first layer of its head."""
    options = ["steps=120", "labels=40", "head_layer=1", "optimizer.lr=0.1", "batch_size=40"]
    return finetune(composed("finetune", f"run={simclr_run}", *options, f"run_dir={runs / 'teacher'}"))


@pytest.fixture
def start(teacher, tmp_path):
    """`start("steps=3", run_dir="name")`: the job in this process."""

    def run(*overrides, teacher=teacher, run_dir="run"):
        return distill(composed("distill", f"teacher={teacher}", f"run_dir={tmp_path / run_dir}", *overrides))

    return run


# ---- distillation ----


def test_a_student_comes_to_agree_with_its_teacher(start, teacher):
    folder = start("steps=80", "batch_size=64", "optimizer.lr=0.1")
    rows = read_metrics(folder)
    first, last = (sum(row["loss"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    agreement = [sum(row["agreement"] for row in part) / 10 for part in (rows[:10], rows[-10:])]
    # at least what the teacher is unsure of itself, and nearer to that than at the start
    with torch.no_grad():
        logits = load_classifier(teacher)(mnist5k().train.pixels[::20].float() / 255)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean().item()
    assert entropy < last < first - 0.3
    assert agreement[1] > agreement[0] + 0.15

    record = json.loads((folder / "test.json").read_text())
    tested = {row["encoder"]: row["accuracy"] for row in record["rows"]}
    taught = json.loads((teacher / "test.json").read_text())["rows"][0]["accuracy"]
    assert tested["teacher"] == taught > 0.3
    assert 0.15 < tested["student"] <= taught + 0.1
    assert record["labels"] == 0
    assert cpc.load_encoder(folder)(torch.rand(2, 3, 28, 28)).shape == (2, 16)
    card = json.loads((folder / "encoder.json").read_text())
    assert (card["method"], card["classifier"]["head"]) == ("Distill", None)
    assert load_classifier(folder)(torch.rand(2, 3, 28, 28)).shape == (2, 10)
    config, before = (yaml.safe_load((run / "config.yaml").read_text()) for run in (folder, teacher))
    assert config["augmentation"] == before["augmentation"]


def test_a_student_starts_where_its_run_left_off(start, teacher, simclr_run):
    """A fine-tuned one with its classifier and the layers of the head it keeps, another with its encoder."""
    still = ["steps=1", "optimizer.lr=0", "optimizer.weight_decay=0"]
    folder = start(*still, f"student={teacher}", run_dir="tuned")
    for file in ("encoder.safetensors", "classifier.safetensors"):
        own, theirs = (load_file(run / file) for run in (folder, teacher))
        names = [name for name in theirs if "running" not in name and "tracked" not in name]
        assert all(torch.equal(own[name], theirs[name]) for name in names)
    (row,) = read_metrics(folder)
    assert 0.3 < row["agreement"] <= 1  # but for BatchNorm, which the student takes from the batch
    card = json.loads((folder / "encoder.json").read_text())
    assert card["classifier"] == json.loads((teacher / "encoder.json").read_text())["classifier"]
    assert card["classifier"]["head_layer"] == 1

    folder = start(*still, f"student={simclr_run}", run_dir="pretrained")
    own, theirs = (load_file(run / "encoder.safetensors") for run in (folder, simclr_run))
    assert torch.equal(own["stem.weight"], theirs["stem.weight"])
    assert load_file(folder / "classifier.safetensors")["classifier.weight"].abs().sum() == 0


def test_a_smaller_student_and_a_student_of_a_student(start):
    smaller = start("steps=1", "encoder=resnet_small", "encoder.width=2", run_dir="smaller")
    assert json.loads((smaller / "encoder.json").read_text())["dim"] == 8
    again = start("steps=1", teacher=smaller, run_dir="again")
    assert json.loads((again / "encoder.json").read_text())["dim"] == 8


def test_labels_are_seen_only_where_asked_for():
    train = mnist5k().train
    images, split = distilled_images(composed("distill", "teacher=x"), train)
    assert (len(images), str(split), int(images.labels.max())) == (4000, "0 labels", -1)
    images, split = distilled_images(composed("distill", "teacher=x", "weight=0.5", "labels=20"), train)
    seen = (images.labels >= 0).nonzero().flatten()
    assert len(images) == 4000
    assert seen.tolist() == split.indices.tolist()
    assert len(seen) == 20
    assert torch.equal(images.labels[seen], train.labels[seen])


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(start, teacher, interrupted_at):
    options = ["steps=4", "save_every=2", "weight=0.5", "fraction=0.5", "averaging=0.5"]
    before = (teacher / "classifier.safetensors").read_bytes()
    whole = start(*options, run_dir="whole")

    with interrupted_at(2):
        start(*options, run_dir="parts")
    start(*options, "resume=auto", run_dir="parts")
    for name in ("encoder.safetensors", "classifier.safetensors", "encoder.json"):
        assert (whole.parent / "parts" / name).read_bytes() == (whole / name).read_bytes(), name
    assert (teacher / "classifier.safetensors").read_bytes() == before


def test_a_students_classes_are_the_teachers(start, teacher, tmp_path):
    named = edited(teacher, tmp_path / "named", lambda card: card["classifier"].update(class_names=list("abcdefghij")))
    student = start("steps=1", teacher=named)
    assert load_classifier(student).class_names == tuple("abcdefghij")


def edited(run, target, change):
    shutil.copytree(run, target)
    card = json.loads((target / "encoder.json").read_text())
    change(card)
    (target / "encoder.json").write_text(json.dumps(card))
    return target


def test_what_does_not_fit_the_teacher_is_named(start, teacher, simclr_run, tmp_path):
    larger = edited(simclr_run, tmp_path / "larger", lambda card: card["input"].update(image_size=32))
    with pytest.raises(ValueError, match=r"was fed images of image_size 32, the teacher of 28, and both see the same"):
        start("steps=1", f"student={larger}")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    weights = load_file(other / "classifier.safetensors")
    weights |= {name: weights[name][:4].contiguous() for name in ("classifier.weight", "classifier.bias")}
    save_file(weights, other / "classifier.safetensors")
    card = json.loads((other / "encoder.json").read_text())
    card["classifier"]["class_names"] = list("abcd")
    (other / "encoder.json").write_text(json.dumps(card))
    assert read_classifier(other)[0].classifier.out_features == 4
    with pytest.raises(ValueError, match="a student of 4 and a teacher of 10 classes"):
        start("steps=1", f"student={other}")
    with pytest.raises(ValueError, match="the data has 10 classes, the teacher knows 4: pass its own data"):
        start("steps=1", teacher=other)
    assert not (tmp_path / "run").exists()


MISTAKES = [
    ("", "error: not given: teacher; pass teacher=DIR, the folder of a run of tools/finetune.py"),
    ("teacher={simclr}", "has no classifier (SimCLR): pass a fine-tuned one's folder"),
    ("teacher=none", "in .: pass the folder of a finished run, or its encoder.safetensors"),
    ("teacher={teacher} weight=0.5", "error: no labels asked for: pass one of fraction, labels, labels_per_class"),
    ("teacher={teacher} weight=0.5 labels=20 fraction=0.1", "error: fraction=0.1 and labels=20 asked for: pass one of"),
    ("teacher={teacher} labels=20", "error: weight=1.0 looks at no label: leave fraction, labels, labels_per_class"),
    ("teacher={teacher} weight=-1 labels=20", "weight=-1.0: pass as many, and 0 to 1"),
    ("teacher={teacher} weight=2", "weight=2.0: pass as many, and 0 to 1"),
    ("teacher={teacher} temperature=0", "error: temperature=0: pass a number above 0"),
    ("teacher={teacher} temperature=cold", "error: temperature=cold: pass a number above 0"),
    ("teacher={teacher} student={simclr} encoder=resnet_small", "error: student=DIR has an encoder: leave"),
    ("teacher={teacher} image_size=32", "error: image_size=32: images are fed as to"),
    ("teacher={teacher} steps=0", "error: steps=0: pass at least 1"),
    ("teacher={teacher} weihgt=0.5", "Could not override 'weihgt'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_gets_one_clear_line_and_leaves_nothing_behind(
    arguments, message, simclr_run, teacher, call_tool, tmp_path, monkeypatch, capsys
):
    arguments = arguments.format(simclr=simclr_run, teacher=teacher).split()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        call_tool(cpc.distill.main, f"run_dir={tmp_path / 'run'}", "threads=1", *arguments)
    printed = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


# ---- the three steps in one command ----


def test_values_reach_hydra_as_they_are():
    assert dict(flattened({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "a.c": {}, "d": [1]}
    values = {
        "run_dir": "/a b/it's=1",
        "resume": "auto",
        "seed": 3,
        "averaging": None,
        "exclude": True,
        "mean": [1, 2, 3],
    }
    assert as_override("a", [{"b": "null", "c": [True]}]) == "a=[{b:'null',c:[true]}]"
    cfg = composed("pretrain", "method=simclr", *[as_override(name, value) for name, value in values.items()])
    assert {name: cfg[name] for name in values} == values


ALL_STEPS = [
    *("labels=20", "threads=1", "device=cpu", "encoder.width=4", "pretrain.steps=2", "pretrain.batch_size=16"),
    *("pretrain.memory.queue=32", "finetune.steps=2", "distill.steps=2", "distill.batch_size=16"),
]


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    return small_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def all_steps(call_tool, few_digits, monkeypatch, tmp_path):
    """`all_steps("out=DIR")`: tools/simclr_v2.py in this process, with 400 digits and 100 to test."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        given = {argument.split("=")[0] for argument in arguments}
        tiny = [option for option in ALL_STEPS if option.split("=")[0] not in given]
        tiny += few_digits if "data" not in given else []
        call_tool(cpc.simclr_v2.main, *tiny, *arguments)

    return run


def written(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("*/*") if path.is_file()}


def test_three_steps_in_one_command(all_steps, tmp_path, capsys):
    out = tmp_path / "all"
    all_steps("out=all", "supervised=true")
    summary = json.loads((out / "summary.json").read_text())
    accuracies = ["pretrained, linear probe", "fine-tuned", "distilled", "from scratch"]
    assert [name for name in summary if name in accuracies] == accuracies
    assert all(0 <= summary[name] <= 1 for name in accuracies)
    assert (summary["labels"], summary["train_labels"], summary["test_images"]) == (20, 20, 100)
    configs = {name: yaml.safe_load((out / name / "config.yaml").read_text()) for name in
               ("pretrain", "finetune", "distill", "supervised")}  # fmt: skip
    assert configs["pretrain"]["method"]["_target_"] == "contrastive_core.methods.simclr_v2.SimCLRv2"
    assert (configs["finetune"]["head_layer"], configs["distill"]["temperature"]) == (1, 0.1)
    assert configs["supervised"]["run"] is None
    for key in ("encoder", "image_size", "mean", "augmentation", "steps"):
        assert configs["supervised"][key] == configs["finetune"][key], key
    assert configs["pretrain"]["encoder"] == configs["distill"]["encoder"]
    tuned = json.loads((out / "finetune" / "test.json").read_text())["rows"][0]
    assert tuned["accuracy"] == summary["fine-tuned"]

    # again: nothing that has finished is done again, what is missing is, other settings are refused
    before = written(out)
    all_steps("out=all", "supervised=true")
    assert written(out) == before
    shutil.rmtree(out / "distill")
    (out / "finetune" / "test.json").unlink()
    all_steps("out=all", "supervised=true")
    after = written(out)
    assert after.keys() == before.keys()
    changed = {name.split("/")[0] for name in before if before[name] != after[name]}
    assert changed == {"finetune", "distill"}
    assert json.loads((out / "summary.json").read_text()) == summary
    capsys.readouterr()
    with pytest.raises(SystemExit):
        all_steps("out=all", "supervised=true", "labels=30", "pretrain.steps=3")
    assert "error: all was run with other settings of labels, pretrain.steps" in capsys.readouterr().err
    shutil.rmtree(out / "finetune")  # of which distillation has learned
    with pytest.raises(SystemExit):
        all_steps("out=all", "supervised=true", "finetune.steps=1")
    assert "error: all was run with other settings of finetune.steps" in capsys.readouterr().err
    shutil.rmtree(out / "distill")
    all_steps("out=all", "supervised=true", "distill.steps=1")
    assert yaml.safe_load((out / "config.yaml").read_text())["distill"]["steps"] == 1
    assert yaml.safe_load((out / "distill" / "config.yaml").read_text())["steps"] == 1


def test_a_command_is_corrected_in_the_folder_where_it_failed(all_steps, tmp_path, capsys, monkeypatch):
    """What fails in fine-tuning leaves pre-training as it was, and the keys of later steps, and the labels, open."""
    out = tmp_path / "all"
    with monkeypatch.context() as patch:
        patch.setattr(cpc.simclr_v2, "fitting_batch", lambda *_: 1)  # which tells of this before the first step
        with pytest.raises(SystemExit):
            all_steps("out=all", "finetune.accumulate=30")
    assert "error: 20 labelled images for 30 processes and micro-batches" in capsys.readouterr().err
    assert not (out / "finetune").exists()
    before = written(out / "pretrain")
    all_steps("out=all", "labels=40")
    assert written(out / "pretrain") == before
    assert json.loads((out / "summary.json").read_text())["train_labels"] == 40
    with pytest.raises(SystemExit):
        all_steps("out=all", "labels=20")
    assert "error: all was run with other settings of labels" in capsys.readouterr().err


def test_an_evaluation_of_a_step_does_not_take_the_place_of_its_test(all_steps, compose, tmp_path):
    all_steps("out=all")
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    evaluate(compose("run=all/finetune", "labels_per_class=[1]", "device=cpu", "threads=1", name="evaluate"))
    (tmp_path / "all" / "summary.json").unlink()
    all_steps(f"out={tmp_path / 'all'}", "pretrain.save_every=7")  # the folder by another name, and what may change
    assert json.loads((tmp_path / "all" / "summary.json").read_text()) == summary


def test_a_step_may_have_data_of_its_own(tmp_path):
    """A folder without labels to pre-train on, another with labels: each step reads its own."""
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        overrides = ["out=x", "labels=20", "data=parquet", "data.train=labelled", "data.test=test"]
        overrides += ["pretrain.data.train=unlabelled", "distill.data.train=more", "supervised=true"]
        cfg = hydra.compose("simclr_v2", overrides)
        steps = steps_of(cfg, {"data": "parquet", "encoder": "resnet_small"})
    trained = {step.name: (step.cfg.data.train, step.cfg.data.test) for step in steps}
    assert trained == {
        "pretrain": ("unlabelled", "test"),
        "finetune": ("labelled", "test"),
        "distill": ("more", "test"),
        "supervised": ("labelled", "test"),
    }


def test_from_scratch_images_are_cropped_and_mirrored_as_in_fine_tuning():
    """Which takes it from pre-training; what is said of fine-tuning itself goes before."""
    overrides = ["out=x", "labels=20", "data=parquet", "data.train=a", "data.test=b", "supervised=true"]
    overrides += ["pretrain.augmentation.flip=0", "pretrain.augmentation.crop=[0.5,1.0]"]
    for more, crop in (([], [0.5, 1.0]), (["finetune.augmentation.crop=[0.2,1.0]"], [0.2, 1.0])):
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            cfg = hydra.compose("simclr_v2", [*overrides, *more])
            steps = steps_of(cfg, {"data": "parquet", "encoder": "resnet_small"})
        scratch = next(step.cfg for step in steps if step.name == "supervised")
        assert (list(scratch.augmentation.crop), scratch.augmentation.flip) == (crop, 0)


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (["distill.weight=0.5"], (0.1, None, 3)),
        (["distill.weight=0.5", "distill.labels=20"], (None, 20, 3)),
        (["distill.weight=0.5", "distill.label_seed=4"], (0.1, None, 4)),
        ([], (None, None, 3)),
    ],
)
def test_a_student_sees_the_labels_of_fine_tuning_unless_others_are_given(given, seen):
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        cfg = hydra.compose("simclr_v2", ["out=x", "fraction=0.1", "label_seed=3", *given])
        steps = {step.name: step.cfg for step in steps_of(cfg, {"data": "mnist5k", "encoder": "resnet_small"})}
    assert tuple(steps["distill"][name] for name in ("fraction", "labels", "label_seed")) == seen
    assert (steps["finetune"].fraction, steps["finetune"].label_seed) == (0.1, 3)


def test_steps_that_are_other_methods(all_steps, tmp_path):
    small = ["encoder.width=4", "pretrain.method=cpc", "pretrain.method.context.width=8"]
    with pytest.raises(SystemExit):  # a name and keys of what it names, at once
        all_steps("out=both", *small)
    all_steps("out=all", "pretrain.method=simclr", "finetune.head_layer=-1", "distill.encoder=resnet_small")
    configs = [
        yaml.safe_load((tmp_path / "all" / name / "config.yaml").read_text()) for name in ("pretrain", "distill")
    ]
    assert configs[0]["method"]["_target_"] == "contrastive_core.methods.simclr.SimCLR"
    assert configs[1]["encoder"]["width"] == 32
    assert configs[1]["temperature"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=all", "labels=null"], "error: no labels asked for"),
        (["labels=20"], "error: not given: out; pass out=DIR"),
        (
            ["out=all", "labels=null", "fraction=0.001"],
            "error: fraction 0.001 of 400 labelled images is less than one",
        ),
        (["out=all", "pretrain.stpes=3"], "Could not override 'stpes'"),
        (["out=all", "finetune.stpes=3"], "Could not override 'stpes'"),
        (["out=all", "pretrain.steps=0"], "error: steps=0: pass at least 1"),
        (["out=all", "data=parquet"], "error: not given: data.train"),
        (["out=all", "labells=20"], "Could not override 'labells'"),
        (["out=all", "finetune.precision=bf16"], "error: finetune.precision is one for all steps: pass precision=bf16"),
        (["out=all", "pretrain.timeout=3"], "error: pretrain.timeout is one for all steps: pass timeout=3"),
        (
            ["out=all", "pretrain.experiment=cifar10_simclr"],
            "error: pretrain.experiment is a whole recipe: run tools/pretrain.py experiment=NAME by itself",
        ),
        (["out=all", "finetune.protocol=cpc_v2"], "error: finetune.protocol is none of SimCLRv2's: run tools/finetune"),
        (["out=all", "finetune.clip=-1"], "error: clip=-1.0: pass"),
        (["out=all", "distill.temperature=0"], "error: temperature=0: pass a number above 0"),
        (["out=all", "distill.labels=30"], "error: weight=1.0 looks at no label: leave fraction, labels"),
        (["out=all", "finetune.accumulate=30"], "error: 20 labelled images for 30 processes and micro-batches"),
    ],
)
def test_a_mistake_is_told_before_the_first_step(all_steps, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        all_steps(*arguments)
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_three_steps_on_two_processes(launch_tool, tmp_path):
    run = launch_tool("tools/simclr_v2.py", *ALL_STEPS, "out=all", processes=2)
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert {"pretrained, linear probe", "fine-tuned", "distilled"} <= summary.keys()
    assert run.stdout.count("written to all/summary.json") == 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_few_labels_are_worth_more_after_pre_training(call_tool, tmp_path, monkeypatch):
    """40 labels of 4,000 digits, four a class: fine-tuning beats the same from scratch, and distilling keeps it."""
    shorter = ["pretrain.steps=300", "distill.steps=200"]
    monkeypatch.chdir(tmp_path)
    call_tool(cpc.simclr_v2.main, "out=all", "fraction=0.01", "supervised=true", *shorter)
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert summary["fine-tuned"] > summary["from scratch"] + 0.02
    assert summary["distilled"] > summary["from scratch"]
