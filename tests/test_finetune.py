"""Fine-tuning from its configuration and from the command line: what is trained, with which labels, and mistakes."""

import json

import hydra
import pytest
import torch
import yaml
from accelerate import Accelerator
from omegaconf import OmegaConf
from processes import on_processes
from safetensors.torch import load_file
from tiny_runs import tool_run

import cpc
import cpc.distill  # registers its schema
import cpc.finetune
from contrastive_core.data import ImageDataset, Splits, mnist5k
from contrastive_core.heads import ProjectionHead
from contrastive_core.run_log import read_metrics
from cpc.configs import config_folder
from cpc.encoder_card import build_encoder
from cpc.features import load_classifier, load_encoder, load_head, read_classifier, read_encoder
from cpc.finetune import (
    accuracy_of,
    build_classifier,
    chosen_labels,
    confusion,
    finetune,
    fitting_batch,
    labelled_test,
    let_classifier_decay_,
    settle_,
    take_over_,
)
from cpc.pretrain import pretrain
from cpc.run import check_numbers

pytestmark = pytest.mark.usefixtures("as_a_new_process")

MNIST_20 = "4992e15463e9"
"""The digest of two labels a class of the bundled digits, seed 0, on any machine."""

TINY = ["batch_size=16", "log_every=1", "threads=1", "device=cpu", "probe_every=0"]


def composed(name, *overrides):
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return hydra.compose(name, [*TINY, *overrides])


def tree(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def simclr_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "simclr"
    options = ["steps=3", "encoder.width=4", "method.head.layers=3", "averaging=0.5", f"run_dir={folder}"]
    return pretrain(composed("pretrain", "method=simclr", *options))


@pytest.fixture(scope="module")
def cpc_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "cpc"
    options = ["encoder.width=4", "method.context.width=8", "method.context.layers=1"]
    return pretrain(composed("pretrain_cpc", "steps=1", *options, f"run_dir={folder}"))


@pytest.fixture
def start(simclr_run, tmp_path):
    """`start("steps=3", run_dir="name")`: the job in this process, with 20 labels unless told otherwise."""

    def run(*overrides, run=simclr_run, run_dir="run"):
        given = {override.split("=")[0] for override in overrides}
        few = [] if given & set(cpc.finetune.WHICH_LABELS) else ["labels=20"]
        steps = [] if "steps" in given else ["steps=3"]
        return finetune(composed("finetune", f"run={run}", f"run_dir={tmp_path / run_dir}", *few, *steps, *overrides))

    return run


# ---- what pre-training leaves behind for it ----


def test_a_runs_head_is_exported_beside_its_encoder(simclr_run):
    card = json.loads((simclr_run / "encoder.json").read_text())
    assert card["head"] == ProjectionHead(16, layers=3, output_norm="norm").arguments
    head, weights = load_head(simclr_run), load_file(simclr_run / "head.safetensors")
    averaged = load_file(simclr_run / "checkpoints/step_00000003/averaged.safetensors")
    assert {f"head.{name}" for name in weights} == {name for name in averaged if name.startswith("head.")}
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, averaged[f"head.{name}"]), name
    assert load_head(simclr_run / "encoder.safetensors")(torch.rand(4, 16)).shape == (4, 128)


def test_an_old_run_without_a_head_stays_loadable(simclr_run, cpc_run, start, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    card = json.loads((simclr_run / "encoder.json").read_text())
    del card["head"]
    (old / "encoder.json").write_text(json.dumps(card))
    (old / "encoder.safetensors").write_bytes((simclr_run / "encoder.safetensors").read_bytes())
    assert load_encoder(old)(torch.rand(2, 3, 28, 28)).shape == (2, 16)
    for run in (old, cpc_run):
        with pytest.raises(ValueError, match=r"has no projection head \((SimCLR|CPC)\): pass head_layer=0"):
            load_head(run)
    with pytest.raises(FileNotFoundError, match=r"that says on which data the run was trained: pass data=NAME"):
        start(run=old)
    assert start("data=mnist5k", run=old).is_dir()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dim": 16, "_target_": "os.system"}, "the card's head is no ProjectionHead's"),
        ({"dim": 16, "layers": 2}, "head.safetensors are not those of the head that its card describes"),
    ],
)
def test_a_card_builds_nothing_but_a_projection_head(simclr_run, tmp_path, changed, words):
    card = json.loads((simclr_run / "encoder.json").read_text()) | {"head": changed}
    for name in ("encoder.safetensors", "head.safetensors"):
        (tmp_path / name).write_bytes((simclr_run / name).read_bytes())
    (tmp_path / "encoder.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=words):
        load_head(tmp_path)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"no head\.safetensors in|no ProjectionHead's"):
        load_head(tmp_path)


# ---- what is trained ----


@pytest.mark.parametrize(("layer", "kept", "width"), [(0, 0, 16), (1, 1, 16), (2, 2, 16), (-1, 3, 128), (3, 3, 128)])
def test_it_starts_where_the_run_left_off_inside_its_head(simclr_run, layer, kept, width):
    cfg = composed("finetune", f"run={simclr_run}", "labels=20", f"head_layer={layer}")
    settle_(cfg)
    method, _ = build_classifier(cfg, 10)
    encoder, _ = read_encoder(simclr_run)
    images = torch.randn(5, 3, 28, 28)
    method.eval(), encoder.eval()
    head = load_head(simclr_run).eval()
    expected = encoder(images)
    for block in list(head.layers)[:kept]:
        expected = block(expected)
    torch.testing.assert_close(method.head(method.encoder(images)), expected, rtol=0, atol=0)
    assert (method.classifier.in_features, method.classifier.out_features) == (width, 10)
    assert all(parameter.requires_grad for parameter in method.parameters())


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_what_it_leaves_behind(start, simclr_run, layer):
    folder = start(f"head_layer={layer}", "averaging=0.5")
    names = {"config.yaml", "metrics.jsonl", "encoder.safetensors", "encoder.json", "classifier.safetensors"}
    assert names | {"checkpoints", "test.json"} <= {file.name for file in folder.iterdir()}
    assert "head" not in json.loads((folder / "encoder.json").read_text())
    averaged = load_file(folder / "checkpoints/step_00000003/averaged.safetensors")
    for name, tensor in load_file(folder / "classifier.safetensors").items():
        assert torch.equal(tensor, averaged[name]), name

    # the accuracy that is written is that of what was exported, fed with images as they are
    test, record = mnist5k().test, json.loads((folder / "test.json").read_text())
    classifier = load_classifier(folder)
    with torch.no_grad():
        predicted = classifier(test.pixels.float() / 255).argmax(1)
    (row,) = record["rows"]
    assert (row["encoder"], record["labels"], record["test_images"]) == ("fine-tuned", 20, 1000)
    assert record["label_split"] == MNIST_20
    assert row["accuracy"] == pytest.approx((predicted == test.labels).float().mean().item(), abs=0.003)
    table = torch.tensor(record["confusion"])
    assert table.sum(1).tolist() == test.labels.bincount().tolist()
    assert accuracy_of(table) == row["accuracy"]

    # and the encoder is one like any other
    features = cpc.load_encoder(folder)(test.pixels[:3].float() / 255)
    assert features.shape == (3, 16)
    own, before = (load_file(path / "encoder.safetensors") for path in (folder, simclr_run))
    assert not torch.equal(own["stem.weight"], before["stem.weight"])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    drawn = yaml.safe_load((simclr_run / "config.yaml").read_text())["augmentation"]
    assert (config["image_size"], config["patch"]) == (28, None)
    assert config["augmentation"] == {"crop": drawn["crop"], "flip": 0.0}


def test_frozen_leaves_the_encoder_and_the_head_as_they_were(start, simclr_run):
    folder = start("frozen=true", "head_layer=2", "averaging=0.9")
    own, before = (load_file(path / "encoder.safetensors") for path in (folder, simclr_run))
    assert own.keys() == before.keys()
    assert all(torch.equal(own[name], before[name]) for name in own)
    head, tuned = load_file(simclr_run / "head.safetensors"), load_file(folder / "classifier.safetensors")
    kept = [name for name in tuned if name.startswith("head.")]
    assert len(kept) == 2 * 6  # a weight without bias, and five of a BatchNorm
    assert all(torch.equal(tuned[name], head[name.replace("head.", "layers.", 1)]) for name in kept)
    assert tuned["classifier.weight"].abs().sum() > 0


def test_from_scratch_is_a_fresh_encoder_and_the_seed_says_which(start):
    options = ["data=mnist5k", "encoder=resnet_small", "encoder.width=4", "optimizer.lr=1e-9"]
    one, same, other = (
        start(*options, f"seed={seed}", run="null", run_dir=name) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    weights = [load_file(folder / "encoder.safetensors")["stem.weight"] for folder in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    torch.manual_seed(3)
    fresh = build_encoder(json.loads((one / "encoder.json").read_text())["architecture"])
    torch.testing.assert_close(weights[0], fresh.stem.weight.detach(), rtol=0, atol=1e-6)
    assert not torch.allclose(weights[0], weights[2])
    assert json.loads((one / "test.json").read_text())["rows"][0]["encoder"] == "from scratch"


def test_an_encoder_of_patches_is_tuned_on_whole_images_and_not_mirrored_where_patches_were_not(start, cpc_run):
    folder = start(run=cpc_run)
    card = json.loads((folder / "encoder.json").read_text())
    assert "patch_size" not in card["input"]
    assert load_encoder(folder).mode == "image"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["augmentation"]["flip"] == 0
    assert config["encoder"]["norm"] == "layer"  # the run's own


def test_a_few_steps_learn(start):
    folder = start("steps=60", "labels=20", "optimizer.lr=0.1", "augmentation.crop=[0.9,1.0]")
    rows = read_metrics(folder)
    assert rows[0]["loss"] == pytest.approx(rows[0]["chance_loss"], abs=1e-5)  # the classifier starts at zero
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def tuned_by_the_command(call_tool, run, folder, *options):
    """The classifier's weight and the settings of a frozen encoder's run, as the command line makes it."""
    few = ["labels=20", "steps=4", "optimizer.lr=0.1", "frozen=true", f"run_dir={folder}"]
    call_tool(cpc.finetune.main, f"run={run}", *TINY, *few, *options)
    weights = load_file(folder / "classifier.safetensors")
    return weights["classifier.weight"], yaml.safe_load((folder / "config.yaml").read_text())


def test_a_weight_decay_that_is_given_is_the_classifiers_too(call_tool, simclr_run, tmp_path):
    """Weights that start at zero and decay end up smaller; by default they do not decay."""
    usual, config = tuned_by_the_command(call_tool, simclr_run, tmp_path / "usual")
    assert (config["exclude_also"], config["optimizer"]["weight_decay"]) == (["classifier"], 1e-4)
    decayed, config = tuned_by_the_command(call_tool, simclr_run, tmp_path / "decayed", "optimizer.weight_decay=2")
    assert config["exclude_also"] == []
    assert decayed.norm() < 0.95 * usual.norm()
    left_out, config = tuned_by_the_command(
        call_tool, simclr_run, tmp_path / "left_out", "optimizer.weight_decay=2", "exclude_also=[classifier]"
    )
    assert torch.equal(left_out, usual)


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ([], ["classifier"]),
        (["optimizer.weight_decay=1"], []),
        (["optimizer=adamw"], ["classifier"]),
        (["optimizer=adamw", "optimizer.weight_decay=1"], []),
        (["optimizer=lars", "optimizer.weight_decay=1"], ["classifier"]),
        (["optimizer=adam", "+optimizer.weight_decay=1"], []),
        (["optimizer.weight_decay=1", "exclude_also=[encoder]"], ["encoder"]),
    ],
)
@pytest.mark.parametrize("tool", ["finetune", "distill"])
def test_who_is_left_out_of_weight_decay(tool, given, left_out):
    cfg = composed(tool, *given)
    let_classifier_decay_(cfg, [override.lstrip("+").partition("=")[0] for override in given])
    student = "student." if tool == "distill" else ""
    assert cfg.exclude_also == [f"{student}{name}" if name == "classifier" else name for name in left_out]


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world", "images", "fitting"),
    [(64, 1, 1, 100, 64), (64, 1, 1, 20, 20), (64, 1, 3, 20, 18), (64, 2, 3, 20, 18), (64, 4, 1, 20, 20)],
)
def test_few_labels_are_shared_evenly(batch_size, accumulate, world, images, fitting, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    cfg = OmegaConf.create({"batch_size": batch_size, "accumulate": accumulate})
    assert fitting_batch(cfg, images) == fitting
    with pytest.raises(ValueError, match=r"labelled images for .* processes and micro-batches: use fewer, or more"):
        fitting_batch(cfg, world * accumulate - 1)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(start, interrupted_at):
    options = ["steps=4", "save_every=2", "averaging=0.5", "head_layer=1"]
    whole = start(*options, run_dir="whole")

    with interrupted_at(2):
        start(*options, run_dir="parts")
    parts = whole.parent / "parts"
    assert not (parts / "test.json").exists()
    with pytest.raises(ValueError, match=r"was run with other settings of labels: use its own"):
        start(*options, "resume=auto", "labels=30", run_dir="parts")
    start(*options, "resume=auto", run_dir="parts")
    for name in ("encoder.safetensors", "classifier.safetensors", "encoder.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    rows, others = (json.loads((path / "test.json").read_text())["rows"] for path in (parts, whole))
    assert rows == others


# ---- which labels, which test images ----


def test_which_labels_are_used(tmp_path):
    labels = torch.arange(40) % 4
    labels[::10] = -1
    pixels = torch.arange(40, dtype=torch.uint8)[:, None, None].expand(40, 4, 4).numpy()
    train = ImageDataset(pixels, size=4, labels=labels)

    def chosen(*which):
        return chosen_labels(composed("finetune", "run=x", *which), train)

    few = chosen("labels=8")
    assert labels[few.indices].bincount().tolist() == [2, 2, 2, 2]
    again = chosen("labels_per_class=2")
    assert torch.equal(again.indices, few.indices)
    assert str(again) == str(few) == f"8 labels, split {few.digest}"
    assert set(few.indices.tolist()) < set(chosen("fraction=0.5").indices.tolist())
    other = chosen("labels=8", "label_seed=1")
    assert other.digest != few.digest
    assert not torch.equal(other.indices, few.indices)
    for count, words in ((10, "pass a multiple, 8 or 12"), (0, "pass a multiple, 4 or 8"), (2, "4 or 8")):
        with pytest.raises(ValueError, match=rf"labels={count} for 4 classes: .*{words}"):
            chosen(f"labels={count}")
    listed = tmp_path / "1percent.txt"
    listed.write_text("image 3\nimage 1\n")
    assert chosen(f"label_list={listed}").indices.tolist() == [1, 3]


def test_a_batch_is_no_larger_than_the_labels_and_splits_into_micro_batches(start):
    folder = start("labels=10", "accumulate=4")
    assert yaml.safe_load((folder / "config.yaml").read_text())["batch_size"] == 8


def splits(test_labels):
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8).numpy()
    train = ImageDataset(images, size=8, labels=[0, 1, 0, 1])
    return Splits(train, None if test_labels is None else ImageDataset(images, size=8, labels=test_labels))


def test_test_images_need_labels_of_the_classes_there_are():
    assert labelled_test(splits([0, -1, 1, -1]), 2).labels.tolist() == [0, 1]
    for labels, words in (
        (None, r"no test images: pass data\.test=FILE"),
        ([-1] * 4, "no test image has a label"),
        ([0, 2, 0, 0], "the test images have classes up to 2, there are 2"),
    ):
        with pytest.raises(ValueError, match=words):
            labelled_test(splits(labels), 2)


def test_every_process_has_a_test_image(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(labelled_test(splits([0, -1, 1, -1]), 2)) == 2
    with pytest.raises(ValueError, match="1 test images for 2 processes: pass one for each, or use fewer"):
        labelled_test(splits([0, -1, -1, -1]), 2)


def test_a_confusion_matrix_counts_every_image_once():
    class Brightest(torch.nn.Module):
        class_names = ("r", "g", "b")
        encoder = type("", (), {"batch_size": 2})

        def forward(self, images):
            return images.mean((2, 3))

    pixels = torch.zeros(5, 4, 4, 3, dtype=torch.uint8)
    for i, channel in enumerate([0, 1, 2, 2, 1]):
        pixels[i, ..., channel] = 255
    images = ImageDataset(pixels.numpy(), size=4, labels=[0, 1, 2, 1, 1])
    table = confusion(Brightest(), images, Accelerator(cpu=True), workers=0, bad_images=0.01)
    assert table.tolist() == [[1, 0, 0], [0, 2, 1], [0, 0, 1]]
    assert accuracy_of(table) == 0.8


# ---- mistakes, and the command line ----

MISTAKES = [
    ("", "error: not given: run; pass run=DIR, a finished run's folder, or run=null"),
    ("run={simclr}", "error: no labels asked for: pass one of fraction, labels, labels_per_class"),
    ("run={simclr} fraction=0.1 labels=20", "error: fraction=0.1 and labels=20 asked for: pass one of"),
    (
        "run={simclr} fraction=0.001",
        "error: fraction 0.001 of 4000 labelled images is less than one for each of 10 classes",
    ),
    ("run={simclr} fraction=0", "error: fraction 0.0: pass a share"),
    ("run={simclr} labels=25", "error: labels=25 for 10 classes: pass a multiple, 20 or 30"),
    ("run={simclr} labels_per_class=401", "error: 401 labels a class, the rarest of 10 classes has 400: pass 1 to 400"),
    ("run={simclr} labels=20 head_layer=4", "error: the head has 3 layers, got layer 4: pass -1 to 3"),
    ("run={simclr} labels=20 head_layer=-2", "error: the head has 3 layers, got layer -2: pass -1 to 3"),
    ("run={cpc} labels=20 head_layer=1", "has no projection head (CPC): pass head_layer=0"),
    ("run=none labels=20", "in .: pass the folder of a finished run, or its encoder.safetensors"),
    ("run=null labels=20", "error: run=null trains from scratch: pass encoder=NAME and data=NAME"),
    ("run=null labels=20 data=mnist5k", "error: run=null trains from scratch: pass encoder=NAME and data=NAME"),
    ("run=null labels=20 data=mnist5k encoder=resnet_small head_layer=1", "error: head_layer=1 with run=null"),
    ("run={simclr} labels=20 encoder=resnet_small", "error: the encoder is that of run=DIR: leave encoder=NAME out"),
    ("run={simclr} labels=20 image_size=32", "error: image_size=32: images are fed as to"),
    ("run={simclr} labels=20 data=typo", "Could not find 'data/typo'"),
    ("run={simclr} labels=20 data=parquet", "error: not given: data.train"),
    ("run={simclr} labels=20 steps=0", "error: steps=0: pass at least 1"),
    ("run={simclr} labels=abc", "labels=abc: pass a whole number"),
    ("run={simclr} labels=20 label_smothing=0.1", "Could not override 'label_smothing'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_gets_one_clear_line_and_leaves_nothing_behind(
    arguments, message, simclr_run, cpc_run, call_tool, tmp_path, monkeypatch, capsys
):
    arguments = arguments.format(simclr=simclr_run, cpc=cpc_run)
    monkeypatch.chdir(tmp_path)
    before = [tree(run) for run in (simclr_run, cpc_run)]
    with pytest.raises(SystemExit) as stopped:
        call_tool(cpc.finetune.main, f"run_dir={tmp_path / 'run'}", "threads=1", *arguments.split())
    printed = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    assert message in printed
    assert "Traceback" not in printed
    if message.startswith("error:"):
        assert len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert before == [tree(run) for run in (simclr_run, cpc_run)]


def test_a_runs_config_calls_no_code_but_our_readers(simclr_run, tmp_path):
    for name in ("encoder.safetensors", "encoder.json"):
        (tmp_path / name).write_bytes((simclr_run / name).read_bytes())
    config = (simclr_run / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("contrastive_core.data.mnist5k", "os.system"))
    with pytest.raises(ValueError, match=r"reads its data through os\.system, which is not ours"):
        settle_(composed("finetune", f"run={tmp_path}", "labels=20"))
    card = json.loads((simclr_run / "encoder.json").read_text())
    card["architecture"]["name"] = "os.system"
    (tmp_path / "encoder.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"encoder 'os\.system' is not one of"):
        settle_(composed("finetune", f"run={tmp_path}", "labels=20", "data=mnist5k"))


@pytest.mark.parametrize(
    ("overrides", "flip", "told"),
    [
        ([], 0.0, False),
        (["data=mnist5k"], 0.0, False),
        (["data=imagefolder", "data.root=photos"], 0.0, True),
        (["data=imagefolder", "data.root=photos", "augmentation.flip=0.5"], 0.5, False),
        (["data=imagefolder", "data.root=photos", "views=digits"], 0.0, False),
    ],
)
def test_what_a_run_cannot_know_of_other_images_is_told(simclr_run, caplog, overrides, flip, told):
    """Of a run on digits, which were not mirrored: photographs may be, and who learns from their labels gains by it."""
    cfg = composed("finetune", f"run={simclr_run}", "labels=20", *overrides)
    take_over_(cfg, str(simclr_run))
    assert cfg.augmentation.flip == flip
    warning = f"{simclr_run} does not say that it was trained on these images, which are not mirrored: pass"
    assert (warning in caplog.text) == told


def test_a_run_that_was_not_tuned_has_no_classifier(simclr_run):
    with pytest.raises(ValueError, match=r"has no classifier \(SimCLR\): pass a fine-tuned one's folder"):
        read_classifier(simclr_run)


@pytest.mark.parametrize(("percent", "steps"), [(1, 60 * 12_811 / 1024), (10, 30 * 128_117 / 1024)])
def test_imagenets_experiments_are_the_published_commands(percent, steps):
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        cfg = hydra.compose(
            "finetune", [f"experiment=imagenet_simclr_v2_finetune_{percent}pct", "run=x", "data.root=x"]
        )
    cfg.image_size, cfg.load_size, cfg.mean, cfg.std = 224, 256, [0, 0, 0], [1, 1, 1]
    check_numbers(cfg)
    assert cfg.steps == pytest.approx(steps, abs=1)
    assert (cfg.fraction, cfg.batch_size, cfg.head_layer) == (percent / 100, 1024, 1)
    assert (cfg.optimizer._target_, cfg.optimizer.lr) == ("contrastive_core.optim.LARS", 0.005 * 1024**0.5)
    assert (cfg.optimizer.weight_decay, cfg.schedule.warmup, cfg.global_batch_norm) == (0, 0, True)
    assert dict(cfg.augmentation) == {"crop": None, "flip": None}


def test_two_processes_are_one(compose, simclr_run, tmp_path):
    options = [f"run={simclr_run}", "labels=20", "steps=3", "head_layer=1", "device=cpu", "threads=1", "log_every=1"]
    on_processes(2, tool_run, "finetune", *options, f"run_dir={tmp_path / 'two'}")
    finetune(compose(*options, f"run_dir={tmp_path / 'one'}", name="finetune"))
    for a, b in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for file in ("encoder.safetensors", "classifier.safetensors"):
        weights = [load_file(tmp_path / name / file) for name in ("two", "one")]
        for name, weight in weights[0].items():
            torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4)
    records = [json.loads((tmp_path / name / "test.json").read_text()) for name in ("two", "one")]
    assert records[0]["rows"][0]["accuracy"] == pytest.approx(records[1]["rows"][0]["accuracy"], abs=0.003)
    assert sum(map(sum, records[0]["confusion"])) == 1000


@pytest.mark.slow
def test_of_two_processes_of_a_launcher_one_tells_the_result(launch_tool, simclr_run, tmp_path):
    options = [f"run={simclr_run}", "labels=20", "steps=1", "device=cpu", "run_dir=two"]
    two = launch_tool("tools/finetune.py", *options, processes=2)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("fine-tuned: test accuracy") == 1
