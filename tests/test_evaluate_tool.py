"""Evaluation from its configuration, and the demo: what they write, and what is not a run."""

import io
import json
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from small_digits import small_digits

import cpc.demo
from contrastive_core.data import ImageDataset, Splits
from contrastive_core.evaluate.report import LabelledFeatures, few_label_row, probe_rows
from contrastive_core.run_log import read_metrics
from cpc.demo import demo
from cpc.evaluate import evaluate, extract_readouts, labelled
from cpc.features import load_encoder, untrained_encoder
from cpc.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("as_a_new_process")

TINY = [
    "steps=2",
    "batch_size=8",
    "encoder.width=4",
    "method.context.width=8",
    "method.context.layers=1",
    "probe_every=0",
    "threads=1",
]


def write_parquet(path, count, labelled=True):
    """`count` 28 px images, black with a white dot whose place is the label."""
    rows = {"image": [], "label": []}
    for i in range(count):
        image = Image.new("RGB", (28, 28))
        image.paste("white", ((i % 4) * 7, 8, (i % 4) * 7 + 7, 16))
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        rows["image"].append(encoded.getvalue())
        rows["label"].append(i % 4)
    pq.write_table(pa.table(rows if labelled else {"image": rows["image"]}), path)
    return path


@pytest.fixture
def run_dir(compose, tmp_path):
    train = write_parquet(tmp_path / "train.parquet", 40)
    geometry = ["image_size=28", "patch.size=8", "patch.stride=4"]
    pretrain(compose(*TINY, "data=parquet", f"data.train={train}", f"run_dir={tmp_path / 'run'}", *geometry))
    return tmp_path / "run"


def asked(compose, run_dir, *overrides):
    return compose(f"run={run_dir}", "threads=1", *overrides, name="evaluate")


def test_the_table_and_its_json(compose, run_dir, tmp_path, capsys):
    test = write_parquet(tmp_path / "test.parquet", 20)
    data = ["data=parquet", f"data.train={tmp_path / 'train.parquet'}", f"data.test={test}"]
    options = ["labels_per_class=[2]", "draws=2", "untrained=true", "paper_epochs=2"]
    written = evaluate(asked(compose, run_dir, *data, *options))
    assert written == run_dir / "evaluation.json"
    rows = json.loads(written.read_text())["rows"]
    kinds = [(row["encoder"], row["mode"], row["readout"], row["probe"], row["labels"]) for row in rows]
    assert len(set(kinds)) == len(kinds) == 2 * 2 * (2 * 3 + 1)
    assert ("trained", "patches", "2x2", "linear", 8) in kinds
    assert ("untrained", "image", "grid", "paper", 40) in kinds
    accuracies = {kind: row["accuracy"] for kind, row in zip(kinds, rows, strict=True)}
    assert accuracies["trained", "patches", "2x2", "linear", 40] == 1.0  # the dot's place is easy to read
    assert "evaluation.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "there are no test images: pass data.test=FILE"),
        (["data=parquet"], "not given: data.train"),
        (["data=parquet", "data.train=none.parquet", "data.test=none.parquet"], "none.parquet"),
    ],
)
def test_data_that_will_not_do_is_named(compose, run_dir, overrides, words):
    with pytest.raises((ValueError, OSError), match=words):
        evaluate(asked(compose, run_dir, *overrides))
    assert not (run_dir / "evaluation.json").exists()


def test_unlabelled_data_is_named(compose, run_dir, tmp_path):
    files = [write_parquet(tmp_path / f"{name}.parquet", 8, labelled=False) for name in ("a", "b")]
    with pytest.raises(ValueError, match="no labels to evaluate with"):
        evaluate(asked(compose, run_dir, "data=parquet", f"data.train={files[0]}", f"data.test={files[1]}"))


def test_too_many_labels_a_class_are_told_before_anything_is_encoded(compose, run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("cpc.evaluate.extract", lambda *_, **__: pytest.fail("encoded first"))
    test = write_parquet(tmp_path / "test.parquet", 20)
    data = ["data=parquet", f"data.train={tmp_path / 'train.parquet'}", f"data.test={test}"]
    with pytest.raises(ValueError, match="50 labels a class, the rarest of 4 classes has 10: pass 1 to 10"):
        evaluate(asked(compose, run_dir, *data, "labels_per_class=[2,50]"))


def test_a_folder_that_is_no_run_is_named(compose, tmp_path):
    with pytest.raises(FileNotFoundError, match="pass the folder of a finished run"):
        evaluate(asked(compose, tmp_path))
    with pytest.raises(ValueError, match="not given: run"):
        evaluate(compose(name="evaluate"))


def test_a_runs_config_calls_no_code_but_our_readers(compose, run_dir):
    config = run_dir / "config.yaml"
    text = config.read_text()
    assert "contrastive_core.data.parquet" in text
    config.write_text(text.replace("contrastive_core.data.parquet", "os.system"))
    with pytest.raises(ValueError, match=r"reads its data through os\.system, which is not ours"):
        evaluate(asked(compose, run_dir))


def test_the_untrained_encoder_is_another_and_always_the_same(run_dir):
    images = torch.rand(2, 3, 28, 28)
    trained, untrained = load_encoder(run_dir), untrained_encoder(run_dir)
    torch.testing.assert_close(untrained(images), untrained_encoder(run_dir)(images), rtol=0, atol=0)
    assert not torch.allclose(trained(images), untrained(images))
    assert not torch.allclose(untrained(images), untrained_encoder(run_dir, seed=1)(images))


def test_few_label_rows_say_how_many_labels_and_how_sure():
    features = torch.eye(3).repeat(10, 1)
    labels = torch.arange(3).repeat(10)
    row = few_label_row(LabelledFeatures(features, labels, features, labels), per_class=2, draws=3)
    assert row == {"labels": 6, "accuracy": 1.0, "spread": 0.0, "draws": [1.0, 1.0, 1.0]}


def test_unlabelled_images_are_left_out():
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8).numpy()
    some, all_of_them = (
        ImageDataset(images, size=8, labels=[0, -1, 1, -1]),
        ImageDataset(images, size=8, labels=[0] * 4),
    )
    splits = labelled(Splits(some, all_of_them))
    assert splits.train.labels.tolist() == [0, 1]
    assert splits.test is all_of_them


def test_readouts_are_pooled_as_they_come():
    class Corner(torch.nn.Module):
        dim = 3

        def forward(self, images):  # the four quarters' colours, as a grid of latents
            return torch.nn.functional.adaptive_avg_pool2d(images, 2).permute(0, 2, 3, 1)

    pixels = torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8)
    dataset = ImageDataset(pixels.numpy(), size=8, labels=[0, 1, 0, 1, 0])
    readouts = extract_readouts(Corner(), Splits(dataset, dataset), [2, 1], Accelerator(cpu=True))
    assert list(readouts) == ["2x2", "mean"]
    means = pixels.float().mean((1, 2)) / 255
    torch.testing.assert_close(readouts["mean"].train, means)
    assert readouts["2x2"].test.shape == (5, 12)
    torch.testing.assert_close(readouts["2x2"].test[:, 3:6], pixels[:, :4, 4:].float().mean((1, 2)) / 255)


def test_rows_of_a_readout():
    features = torch.eye(3).repeat(10, 1)
    labels = torch.arange(3).repeat(10)
    rows = probe_rows({"mean": LabelledFeatures(features, labels, features, labels)}, per_class=[1], draws=2)
    assert [(row["probe"], row["labels"], row["accuracy"]) for row in rows] == [
        ("linear", 3, 1.0),
        ("kNN", 30, 1.0),
        ("linear", 30, 1.0),
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["draws=0"], "draws=0: pass at least 1"),
        (["cells=[0]"], r"cells=\[0\]: pass numbers of at least 1"),
        (["labels_per_class=[-1]"], "pass numbers of at least 1"),
        (["paper_epochs=-1"], "paper_epochs=-1: pass at least 0"),
        (["modes=[whole]"], "pass modes among"),
    ],
)
def test_numbers_that_cannot_be_meant_are_named(compose, tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        evaluate(asked(compose, tmp_path, *overrides))


def test_the_demo_needs_labelled_test_images_before_it_starts(compose, tmp_path):
    train = write_parquet(tmp_path / "train.parquet", 20)
    with pytest.raises(ValueError, match=r"there are no test images: pass data\.test=FILE"):
        demo(compose(*TINY, "data=parquet", f"data.train={train}", f"run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_the_demo_ends_with_a_table_and_pictures(compose, tmp_path, capsys, monkeypatch):
    short = ["steps.classifier.least=2", "steps.finetune.least=2"]
    for part in ("FROZEN", "ONE_POINT"):
        monkeypatch.setattr(cpc.demo, part, [*getattr(cpc.demo, part), *short])
    monkeypatch.setattr(cpc.demo, "CURVE", (2, 4))
    monkeypatch.setattr(cpc.demo, "few_label_rows", partial(cpc.demo.few_label_rows, draws=2))
    digits = small_digits(tmp_path, train=40, test=30)
    folder = demo(compose(*TINY, *digits, f"run_dir={tmp_path / 'run'}"))
    printed = capsys.readouterr().out
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    assert [row["features"] for row in rows] == [
        "CPC, 2x2-pooled",
        "CPC, mean-pooled",
        "random encoder, 2x2-pooled",
        "random encoder, mean-pooled",
        "pixels",
        "pixels",
    ]
    assert all(row["labels"] == 100 and len(row["draws"]) == 2 for row in rows)
    pixels = [row["accuracy"] for row in rows if row["features"] == "pixels"]
    assert pixels == pytest.approx([0.77, 0.78], abs=0.06)  # what the baselines give with all of the test images
    for name in ("loss.png", "confusion.png", "retrieval.png"):
        assert (folder / name).stat().st_size > 2000
        assert str(folder / name) in printed
    assert read_metrics(folder)[-1]["step"] == 2
    summary = json.loads((folder / "labels/summary.json").read_text())
    points = {(row["method"], row["protocol"], row["labels"]): row["cells"] for row in summary["accuracies"]}
    assert all(points["CPC", "linear", labels] == 2 for labels in (20, 40))
    assert "40" in summary["scratch"]["best from scratch"]
    assert points["CPC", "finetune", 40] == points["scratch", "cnn", 40] == 1
    assert str(folder / "labels/label_efficiency.png") in printed
    assert "2 cells, 2 are there already" in printed  # the process beside has left nothing of its own to do
