"""CPC v2's fine-tuning of one run: two phases, what each leaves behind and goes on from, and mistakes."""

import json
import os
import shutil
import signal

import hydra
import pytest
import torch
import yaml
from processes import on_processes
from safetensors.torch import load_file
from small_digits import small_digits
from tiny_runs import tool_run
from torch import nn
from torch.optim import SGD, Adam

import cpc.distill  # registers its schema
from contrastive_core.checkpoint import export_encoder
from contrastive_core.data import parquet
from contrastive_core.method import Batch
from contrastive_core.run_log import RunLog, read_metrics
from cpc.configs import config_folder
from cpc.distill import settle_ as settle_distillation_
from cpc.encoder_card import build_encoder
from cpc.features import load_classifier, load_contexts, load_encoder, read_classifier
from cpc.finetune import finetune, main, settle_
from cpc.frozen_encoder import Latents
from cpc.grid_classifier import GridClassifier
from cpc.interruption import Stopped
from cpc.label_arms import grouped_runs
from cpc.latent_classifier import LatentClassifier
from cpc.pretrain import pretrain
from cpc.two_phases import FIRST_PHASE, both_optimizers, build_grid_classifier

pytestmark = pytest.mark.usefixtures("as_a_new_process")

FEW = ["labels=20", "protocol=cpc_v2", "steps=3", "grid.first_steps=2", "grid.classifier.width=8"]
FEW += ["grid.classifier.bottleneck=4", "batch_size=8", "log_every=1", "threads=1", "device=cpu", "trackers=[]"]


def composed(name, *overrides):
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return hydra.compose(name, list(overrides))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of CPC, one of SimCLR, and the test images of both."""
    folder = tmp_path_factory.mktemp("runs")
    data = small_digits(folder)
    options = [*data, "encoder.width=4", "batch_size=8", "steps=1", "threads=1", "probe_every=0", "trackers=[]"]
    context = ["method.context.width=8", "method.context.layers=1"]
    pretrain(composed("pretrain_cpc", *options, *context, f"run_dir={folder / 'cpc'}"))
    pretrain(composed("pretrain", "method=simclr", *options, f"run_dir={folder / 'simclr'}"))
    transformer = {"name": "contrastive_core.encoders.TimmTrunk", "arguments": {"name": "vit_tiny_patch16_224"}}
    encoder, fed = build_encoder(transformer), {"image_size": 224, "mean": [0, 0, 0], "std": [1, 1, 1]}
    (folder / "vit").mkdir()
    export_encoder(folder / "vit", encoder, {"architecture": transformer, "input": fed})
    (folder / "vit" / "config.yaml").write_text((folder / "simclr" / "config.yaml").read_text())
    return folder


@pytest.fixture
def start(runs, tmp_path):
    """`start("steps=5", run="cpc", run_dir="name")`: the job in this process."""

    def run(*overrides, run="cpc", run_dir="run"):
        return finetune(composed("finetune", f"run={runs / run}", f"run_dir={tmp_path / run_dir}", *FEW, *overrides))

    return run


def composed_again(cfg, **changed):
    other = cfg.copy()
    for name, value in changed.items():
        other[name] = value
    return other


def images_of(runs):
    test = parquet(runs / "train.parquet", runs / "test.parquet", size=28).test
    return torch.stack([test[i].image for i in range(len(test))]).float() / 255, test.labels


def weights_of(folder, name="encoder"):
    return load_file(folder / f"{name}.safetensors")


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


# ---- what is left behind ----


@pytest.mark.parametrize(
    ("run", "options", "mode", "readout"),
    [
        ("cpc", [], "patches", "grid"),
        ("cpc", ["grid.readout=context", "averaging=0.5"], "patches", "context"),
        ("cpc", ["grid.mode=image"], "image", "grid"),
        ("simclr", ["label_smoothing=0.1"], "image", "grid"),
    ],
)
def test_both_phases_are_runs_whose_classifiers_load_back(start, runs, run, options, mode, readout):
    folder = start(*options, run=run)
    first = folder / FIRST_PHASE
    kept = {"encoder.safetensors", "encoder.json", "classifier.safetensors", "config.yaml", "metrics.jsonl"}
    kept |= {"context.safetensors"} if readout == "context" else set()
    for phase in (first, folder):
        assert kept <= {file.name for file in phase.iterdir()}
        assert ("context.safetensors" in kept) == (phase / "context.safetensors").exists()

    # the encoder is as it was after the first phase, and another after the second; so are its context networks
    before = runs / run
    for part in ("encoder", *(["context"] if readout == "context" else [])):
        assert same(weights_of(first, part), weights_of(before, part))
        assert not any(torch.equal(a, b) for a, b in zip(
            weights_of(folder, part).values(), weights_of(before, part).values(), strict=True
        ) if a.ndim > 1)  # fmt: skip

    # what was tested is what loads back, fed with images as they are
    images, labels = images_of(runs)
    record = json.loads((folder / "test.json").read_text())
    assert [row["encoder"] for row in record["rows"]] == ["fine-tuned", "first phase, encoder frozen"]
    for phase, row in zip((folder, first), record["rows"], strict=True):
        with torch.no_grad():
            predicted = load_classifier(phase)(images).argmax(1)
        assert row["accuracy"] == pytest.approx((predicted == labels).float().mean().item(), abs=0.011)
        assert (row["mode"], row["readout"]) == (mode, readout)
    assert sum(map(sum, record["confusion"])) == 100

    # encoder and classifier by themselves make the same of images
    encoder = load_encoder(folder, readout=readout)
    assert encoder.mode == mode
    bare, _ = read_classifier(folder)
    classifier = bare.classifier.eval()
    assert isinstance(classifier, LatentClassifier)
    torch.testing.assert_close(classifier(encoder(images[:5])), load_classifier(folder)(images[:5]))


def test_the_second_phase_begins_where_the_first_ended_with_its_own_optimizers_and_images(start, runs):
    folder = start("steps=2", "label_smoothing=0.1")
    first, second = (read_metrics(path) for path in (folder / FIRST_PHASE, folder))
    assert first[0]["loss"] == pytest.approx(first[0]["chance_loss"], abs=1e-5)  # the last layer starts at zero
    assert [row["step"] for row in first] == [row["step"] for row in second] == [1, 2]
    assert [row["lr"] for row in second] == pytest.approx([0.1 * row["lr"] for row in first])
    for phase, names in (
        (FIRST_PHASE, {"momentum_buffer"}),
        (".", {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}),
    ):
        state = load_file(folder / phase / "checkpoints/step_00000002/optimizer.safetensors")
        assert {name.partition(".")[2] for name in state} == names
    seeds = [yaml.safe_load((folder / phase / "config.yaml").read_text())["seed"] for phase in (FIRST_PHASE, ".")]
    assert seeds[1] == 0 != seeds[0]
    cfg = composed("finetune", f"run={runs / 'cpc'}", *FEW)
    settle_(cfg)
    method = build_grid_classifier(cfg, 10, folder / FIRST_PHASE)
    assert build_grid_classifier(composed_again(cfg, label_smoothing=0.2), 10).label_smoothing == 0.2
    assert same(method.classifier.state_dict(), weights_of(folder / FIRST_PHASE, "classifier"))
    assert not method.frozen
    assert second[0]["loss"] != first[0]["loss"]


def test_each_part_has_its_own_optimizer_and_the_classifier_a_tenth_of_its_rate(runs):
    cfg = composed("finetune", f"run={runs / 'cpc'}", *FEW, "grid.readout=context", "grid.classifier_rate=0.2")
    settle_(cfg)
    method = build_grid_classifier(cfg, 10)
    sgd, adam = both_optimizers(cfg, method).optimizers
    assert (type(sgd), type(adam)) == (SGD, Adam)
    assert {group["lr"] for group in sgd.param_groups} == {0.1 * 0.2}
    assert {group["lr"] for group in adam.param_groups} == {5e-4}
    assert [group["weight_decay"] for group in sgd.param_groups] == [1e-3, 0]
    stepped = [p for each in (sgd, adam) for group in each.param_groups for p in group["params"]]
    assert {id(p) for p in stepped} == {id(p) for p in method.parameters()}
    assert {id(p) for group in adam.param_groups for p in group["params"]} == {
        id(p) for p in method.latents.parameters()
    }
    contexts = load_contexts(runs / "cpc").networks.state_dict()
    assert same(method.latents.context.networks.state_dict(), contexts)


def test_frozen_is_the_first_phase_alone(start, runs):
    first = start(run_dir="both") / FIRST_PHASE
    seed = yaml.safe_load((first / "config.yaml").read_text())["seed"]
    folder = start("frozen=true", "steps=2", f"seed={seed}")
    assert not (folder / FIRST_PHASE).exists()
    assert same(weights_of(folder), weights_of(runs / "cpc"))
    assert len(read_metrics(folder)) == 2
    assert same(weights_of(folder, "classifier"), weights_of(first, "classifier"))


def test_a_few_steps_learn(start):
    options = ["grid.classifier.width=32", "grid.classifier.dropout=0", "grid.encoder_optimizer.lr=0.01"]
    folder = start("grid.first_steps=60", "steps=60", "batch_size=20", *options, "optimizer.lr=0.5")
    first, second = (read_metrics(path) for path in (folder / FIRST_PHASE, folder))
    assert first[-1]["loss"] < 0.9 * first[0]["loss"]
    ends = [sum(row["loss"] for row in rows[-10:]) for rows in (first, second)]
    assert ends[1] < 0.95 * ends[0]


# ---- interrupted, on several processes ----


@pytest.mark.parametrize("phase", [FIRST_PHASE, ""])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(start, interrupted_at, phase):
    options = ["steps=4", "grid.first_steps=4", "save_every=2", "averaging=0.5"]
    whole = start(*options, run_dir="whole")
    if not phase:  # the first has come to its end
        shutil.copytree(whole / FIRST_PHASE, whole.parent / "parts" / FIRST_PHASE)
        options.append("resume=auto")
    with interrupted_at(2):
        start(*options, run_dir="parts")
    parts = whole.parent / "parts"
    assert (parts / "config.yaml").exists() == (not phase)
    assert not (parts / "test.json").exists()
    if phase:
        with pytest.raises(FileExistsError, match=rf"{FIRST_PHASE} holds a run: pass resume=auto"):
            start(*options, run_dir="parts")
        options.append("resume=auto")
    changed = r"was run with other settings of grid\.classifier\.width: use its own"
    with pytest.raises(ValueError, match=changed):
        start(*options, "grid.classifier.width=4", run_dir="parts")
    begun = (parts / FIRST_PHASE / "encoder.json").stat().st_mtime_ns if not phase else 0
    start(*options, run_dir="parts")
    assert phase or (parts / FIRST_PHASE / "encoder.json").stat().st_mtime_ns == begun  # not run again
    for name in ("encoder.safetensors", "classifier.safetensors", "encoder.json"):
        for folder in (".", FIRST_PHASE):
            assert (parts / folder / name).read_bytes() == (whole / folder / name).read_bytes(), (folder, name)
    rows, others = (json.loads((path / "test.json").read_text())["rows"] for path in (parts, whole))
    assert rows == others


@pytest.mark.parametrize("step", [2, 4])
def test_who_is_stopped_in_the_first_phase_is_told_how_to_go_on(start, monkeypatch, tmp_path, capsys, step):
    """By a signal, also in the first phase's last step: the second does not begin."""
    advance = RunLog.advance

    def advance_and_stop(log):
        advance(log)
        if log._bar.n == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "advance", advance_and_stop)
    options = ["steps=4", "grid.first_steps=4", "save_every=9"]
    with pytest.raises(Stopped):
        start(*options)
    said = capsys.readouterr()
    assert f"go on with resume=auto run_dir={tmp_path / 'run'}\n" in said.err + said.out
    assert (tmp_path / "run" / FIRST_PHASE / "encoder.json").exists() == (step == 4)
    assert not (tmp_path / "run" / "config.yaml").exists()
    monkeypatch.undo()
    stopped, whole = start(*options, "resume=auto"), start(*options, run_dir="whole")
    assert same(weights_of(stopped, "classifier"), weights_of(whole, "classifier"))


def test_what_the_first_phase_does_not_read_may_change_after_it(start, tmp_path):
    whole = start(run_dir="whole")
    shutil.copytree(whole / FIRST_PHASE, tmp_path / "run" / FIRST_PHASE)
    again = start("grid.encoder_optimizer.lr=1e-9", "steps=2", "resume=auto")
    torch.testing.assert_close(weights_of(again), weights_of(again / FIRST_PHASE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_processes_are_one(runs, tmp_path, shard):
    options = [f"run={runs / 'cpc'}", *FEW, "grid.classifier.dropout=0"]
    two, one = tmp_path / "two", tmp_path / "one"
    on_processes(2, tool_run, "finetune", *options, f"shard={shard}", f"run_dir={two}")
    finetune(composed("finetune", *options, f"run_dir={one}"))
    for phase in (".", FIRST_PHASE):
        for a, b in zip(read_metrics(two / phase), read_metrics(one / phase), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        for part in ("encoder", "classifier"):
            ours, theirs = (weights_of(folder / phase, part) for folder in (two, one))
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


# ---- who else reads such a run ----


@pytest.fixture(scope="module")
def tuned(runs):
    return finetune(composed("finetune", f"run={runs / 'cpc'}", f"run_dir={runs / 'tuned'}", *FEW))


def test_it_teaches_and_is_no_student(tuned, tmp_path):
    cfg = composed("distill", f"teacher={tuned}", "steps=1", "batch_size=8", "threads=1", "device=cpu", "trackers=[]",
                   f"run_dir={tmp_path / 'student'}")  # fmt: skip
    student = cpc.distill.distill(cfg)
    rows = json.loads((student / "test.json").read_text())["rows"]
    own = json.loads((tuned / "test.json").read_text())["rows"][0]
    assert [(row["encoder"], row["readout"]) for row in rows] == [("student", "mean"), ("teacher", "grid")]
    assert rows[1]["accuracy"] == own["accuracy"]
    other = composed("distill", f"teacher={tuned}", f"student={tuned}", "threads=1")
    with pytest.raises(ValueError, match=r"classifies grids of latents: pass a run without protocol=cpc_v2"):
        settle_distillation_(other)


def test_a_sweep_does_not_take_it_for_one_without_labels(tuned):
    with pytest.raises(ValueError, match=r"has learned from labels \(GridClassifier\)"):
        grouped_runs([str(tuned)])


CARDS = [
    ({"classes": 11}, "11 classes with 10 names"),
    ({"width": 9}, "not those of the classifier that its card describes"),
    ({"blocks": 2000}, "beyond 1000, which nothing has in all"),
    ({"hook": "os.system"}, "cannot be built: TypeError"),
]


@pytest.mark.parametrize(("changed", "words"), CARDS, ids=[str(changed) for changed, _ in CARDS])
def test_a_card_builds_nothing_but_its_classifier(tuned, tmp_path, changed, words):
    folder = tmp_path
    for name in ("encoder.safetensors", "classifier.safetensors"):
        (folder / name).write_bytes((tuned / name).read_bytes())
    card = json.loads((tuned / "encoder.json").read_text())
    card["classifier"]["grid"]["arguments"] |= changed
    (folder / "encoder.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=words):
        load_classifier(folder)


# ---- the method by itself ----


def grid_classifier(**options):
    encoder = nn.Conv2d(3, 4, 1)
    encoder.dim, encoder.feature_map = 4, encoder.forward
    latents = Latents(encoder, readout=options.pop("readout", "grid"))
    return GridClassifier(latents, LatentClassifier(options.pop("dim", 4), 3, blocks=0), **options)


def test_its_loss_is_that_of_the_labels_there_are():
    method = grid_classifier()
    nn.init.normal_(method.classifier.linear.weight)
    views, labels = torch.rand(4, 3, 6, 6), torch.tensor([0, -1, 2, 1])
    loss, metrics = method(Batch((views,), torch.arange(4), labels))
    kept = labels >= 0
    logits = method.logits(views)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits[kept], labels[kept]).item())
    assert metrics["accuracy"].item() == pytest.approx((logits.argmax(1) == labels)[kept].float().mean().item())
    assert metrics["chance_loss"].item() == pytest.approx(1.0986123)
    assert method.encoder is method.latents.encoder


def test_what_is_frozen_stays_in_eval_mode_and_gets_no_gradient():
    method = grid_classifier(frozen=True).train()
    assert (method.latents.training, method.classifier.training) == (False, True)
    loss, _ = method(Batch((torch.rand(4, 3, 6, 6),), torch.arange(4), torch.tensor([0, 1, 2, 0])))
    loss.backward()
    assert all(p.grad is None for p in method.latents.parameters())
    assert all(p.grad is not None for p in method.classifier.parameters())


@pytest.mark.parametrize("options", [{"readout": "mean"}, {"dim": 5}])
def test_latents_without_a_grid_or_of_another_width_are_refused(options):
    with pytest.raises(ValueError, match=r'pass readout="grid" or "context", and dim=4'):
        grid_classifier(**options)


def test_the_papers_experiment_has_its_classifier(tmp_path):
    """The ResNet-33 of A.4 on the 4,096 channels of a ResNet-161: 196 million parameters below its linear layer."""
    cfg = composed("finetune", "experiment=imagenet_cpc_v2_finetune_1pct", "run=x", "data.root=x")
    assert (cfg.fraction, cfg.grid.mode, cfg.views.pipelines[0]._target_.rpartition(".")[2]) == (
        0.01,
        "image",
        "labelled",
    )
    assert cfg.steps == pytest.approx(60 * 12_811 / cfg.batch_size, abs=2)
    with torch.device("meta"):
        classifier = LatentClassifier(4096, 1000, **cfg.grid.classifier)
    below = sum(p.numel() for name, p in classifier.named_parameters() if not name.startswith("linear"))
    assert below == pytest.approx(196e6, rel=0.01)
    assert classifier.arguments["dropout"] == 0.3


# ---- mistakes ----

MISTAKES = [
    ("run=null labels=20 encoder=resnet_small data=mnist5k", "error: protocol=cpc_v2 goes on from a run: pass run=DIR"),
    ("run={cpc} labels=20 head_layer=1", "error: head_layer=1: protocol=cpc_v2 reads the grid of latents"),
    ("run={cpc} labels=20 grid.mode=whole", "error: grid.mode=whole grid.readout=grid: pass one of"),
    ("run={cpc} labels=20 grid.readout=mean", "error: grid.mode=None grid.readout=mean: pass one of"),
    ("run={simclr} labels=20 grid.mode=patches", "error: grid.mode=patches: "),
    ("run={simclr} labels=20 grid.readout=context", "has no context networks (SimCLR): pass readout="),
    ("run={cpc} labels=20 grid.readout=context grid.mode=image", "error: grid.readout=context reads patches"),
    ("run={cpc} labels=20 grid.first_steps=0", "error: grid.first_steps=0 grid.classifier_rate=0.1: pass at least 1"),
    ("run={cpc} labels=20 grid.classifier_rate=0", "error: grid.first_steps=1000 grid.classifier_rate=0"),
    ("run={cpc} labels=20 grid.classifier.blocks=-1", "error: 2 classes, blocks=-1: pass at least 2 classes"),
    ("run={cpc} labels=20 grid.classifier.norm=x", "norm"),
    ("run={cpc} labels=20 grid.classifier.width=0", "error: width=0 bottleneck=64: pass at least 1 channel"),
    ("run={cpc} labels=20 grid.classifier.bottleneck=0", "error: width=128 bottleneck=0: pass at least 1 channel"),
    ("run={cpc} labels=20 grid.first_steps=null", "error: grid.first_steps=null: pass a value"),
    ("run={cpc} labels=20 grid.first_steps=1.5", "error: grid.first_steps=1.5: pass a whole number"),
    ("run={cpc} labels=20 grid.classifier_rate=x", "error: grid.classifier_rate=x: pass a number"),
    ("run={cpc} labels=20 grid.readout=[1]", "error: grid.readout=[1]: pass a word"),
    ("run={cpc} labels=20 grid.encoder_optimizer=null", "error: grid.encoder_optimizer=None is no optimizer"),
    ("run={vit} labels=20", "gives no grid of latents (VisionTransformer has no feature map"),
    ("run={cpc} labels=20 grid.encoder_optimizer.lr=-1", "error: Invalid learning rate: -1"),
    ("run={cpc} labels=20 exclude_also=[classifier]", "error: exclude_also and constant_rate have no meaning"),
    ("run={cpc} labels=20 grid.classifier.depth=3", "error: Could not override 'grid.classifier.depth'"),
    ("run={cpc} labels=20 protocol=cpc", "did you mean 'cpc_v2'?"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_gets_one_clear_line_and_leaves_nothing_behind(
    arguments, message, runs, call_tool, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    given = arguments.format(cpc=runs / "cpc", simclr=runs / "simclr", vit=runs / "vit").split()
    given = given if "protocol=" in arguments else ["protocol=cpc_v2", *given]
    with pytest.raises(SystemExit) as stopped:
        call_tool(main, f"run_dir={tmp_path / 'run'}", "threads=1", *given)
    printed = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    assert message in printed
    assert "Traceback" not in printed
    assert len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_key_of_the_grid_without_the_protocol_is_no_key(runs, call_tool, capsys):
    with pytest.raises(SystemExit):
        call_tool(main, f"run={runs / 'cpc'}", "labels=20", "grid.first_steps=3")
    assert "error: Could not override 'grid.first_steps'" in capsys.readouterr().err
