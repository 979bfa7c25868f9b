"""Detection with an encoder: what is trained, what is normalised, what is counted, and that it learns."""

from __future__ import annotations

import json

import pytest
import torch
from export_runs import write_cpc_run
from torch import nn
from voc_files import annotation, write_voc

from contrastive_core.data.boxes import Boxes, pasted_digits
from contrastive_core.optim import warmup_cosine
from contrastive_core.run_log import read_metrics
from cpc.detect import detect
from cpc.detect import main as detect_main
from cpc.detection import detector, evaluate, find, fit, mean_average_precision, to_learn_from
from cpc.encoders import resnet_small

pytestmark = pytest.mark.usefixtures("as_a_new_process")

SMALL = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.3), "sides": (48, 48), "anchors": (12, 20), "head_width": 32}


def small_detector(norm="layer", *, trainable=False, classes=10):
    torch.manual_seed(0)
    encoder = resnet_small(width=8, blocks=(1, 1), norm=norm)
    return detector(encoder, classes, trainable=trainable, proposals=50, regions=32, **SMALL)


def canvases(count):
    return pasted_digits(count, 1, size=48, digits=(1, 2), side=(12, 20)).train


def train_(model, dataset, steps):
    losses = []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-3)
    options = {"batch_size": len(dataset), "schedule": warmup_cosine, "flip": False, "seed": 0, "clip": 10.0}
    fit(model, optimizer, dataset, steps=steps, told=lambda step, row: losses.append(row["loss"]), **options)
    return losses


def test_images_are_normalised_once():
    model = small_detector().eval()
    seen = []
    model.backbone.encoder.stem.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    image = torch.randint(256, (3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    find(model, [image])
    mean, std = (torch.tensor(SMALL[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(seen[0][0, :, :48, :48], (image / 255 - mean) / std)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_frozen_encoder_stays_and_a_learning_one_does_not(norm, trainable):
    model = small_detector(norm, trainable=trainable)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_(model, canvases(2), 2)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("roi_heads") for name in changed)
    assert any(name.startswith("rpn") for name in changed)
    assert any(name.startswith("backbone") for name in changed) == trainable
    assert not any("running" in name or "num_batches" in name for name in changed)  # the statistics of pre-training


def test_it_learns_four_canvases_by_heart():
    model, four = small_detector(trainable=True), canvases(4)
    losses = train_(model, four, 150)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert evaluate(model, four, 2)["map_50"] > 0.8


def test_an_image_is_seen_alike_beside_one_of_another_size():
    model, image = small_detector(), canvases(1)[0][0]
    model.roi_heads.score_thresh, model.transform.max_size = 0.0, 96
    (alone,) = find(model, [image])
    _, beside, again = find(model, [torch.zeros(3, 48, 96, dtype=torch.uint8), image, image])
    for name, each in alone.items():
        torch.testing.assert_close(beside[name], each)
        torch.testing.assert_close(again[name], each)
    assert len(alone["boxes"])


def maps_of(model, images):
    """What the backbone hands on when the detector sees `images`."""
    seen = []
    with model.backbone.register_forward_hook(lambda _, given, maps: seen.append(maps)):
        targets = [{"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([1])} for _ in images]
        model(images, targets if model.training else None)
    return seen[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_features_are_those_of_the_image_by_itself(training, trainable):
    """Whatever stands beside it and whatever a batch pads it with, for LayerNorm over the whole map; gradients, too."""
    model = small_detector(trainable=trainable).train(training)
    model.transform.min_size, model.transform.max_size = (41,), 73
    drawn = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=drawn) for size in ((60, 41), (41, 73), (60, 41))]
    encoder, normalised = model.backbone.encoder, model.transform.normalize
    alone = [encoder.feature_map(normalised(image)[None])[0] for image in images]
    assert [each.shape[1:] for each in alone] == [(30, 21), (21, 37), (30, 21)]
    maps = maps_of(model, images)
    assert maps.shape[2:] == (64 // 2, 96 // 2)
    assert maps.requires_grad == trainable
    together = [one[:, : each.shape[1], : each.shape[2]] for one, each in zip(maps, alone, strict=True)]
    for image, one, expected in zip(images, together, alone, strict=True):
        torch.testing.assert_close(one, expected)
        torch.testing.assert_close(maps_of(model, [image])[0, :, : one.shape[1], : one.shape[2]], expected)
    assert torch.equal(maps[0, :, 30:, :21], together[0][:, -1:].expand(-1, 2, -1))  # the last cells again
    assert torch.equal(maps[1, :, :21, 37:], together[1][:, :, -1:].expand(-1, -1, 11))
    if trainable:
        gradients = (
            torch.autograd.grad(sum(each.square().sum() for each in some), list(encoder.parameters()))
            for some in (together, alone)
        )
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_images_that_no_batch_pads_are_encoded_at_once():
    model, images = small_detector().eval(), [torch.rand(3, 64, 64) for _ in range(2)]
    model.transform.min_size, model.transform.max_size = (64,), 64
    expected = model.backbone.encoder.feature_map(torch.stack([model.transform.normalize(each) for each in images]))
    assert torch.equal(maps_of(model, images), expected)


def test_the_last_pixels_are_seen_where_a_trunk_has_whole_cells_only():
    class Pooled(nn.Module):
        dim = 3

        def feature_map(self, images):
            return nn.functional.max_pool2d(images, 32)

    model = detector(Pooled(), 1, mean=(0, 0, 0), std=(1, 1, 1), sides=(20, 72), anchors=(8,), head_width=4).eval()
    images = [torch.zeros(3, 20, 40), torch.zeros(3, 72, 20)]
    images[0][:, 19, 39] = images[1][:, 71, 19] = 1
    maps = maps_of(model, images)
    assert maps[:, 0].tolist() == [[[0, 1], [0, 1], [0, 1]], [[0, 0], [0, 0], [1, 1]]]


@pytest.mark.parametrize("side", [20, 40, 45, 48, 64])
def test_regions_are_pooled_where_they_are(side):
    """On a map that is the image at half its size, a region's cells hold its own pixels, whatever it is padded to."""

    class Halved(nn.Module):
        dim = 3

        def feature_map(self, images):
            return nn.functional.avg_pool2d(images, 2)

    model = detector(Halved(), 1, mean=(0, 0, 0), std=(1, 1, 1), sides=(side, side), anchors=(8,), head_width=4).eval()
    image = torch.zeros(3, side, side)
    image[:, 8:16, 4:12] = 1
    padded, _ = model.transform([image])
    box = [torch.tensor([[4.0, 8, 12, 16]])]
    pooled = model.roi_heads.box_roi_pool({"0": model.backbone(padded.tensors)}, box, padded.image_sizes)
    torch.testing.assert_close(pooled[:, :, 1:5, 1:5], torch.ones(1, 3, 4, 4))  # the outer ones mix with what is beside


def boxes_of(*sides, labels=None, difficult=None):
    count = len(sides)
    return Boxes(
        torch.tensor(sides, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels or [0] * count),
        torch.tensor(difficult or [False] * count),
    )


def found_as(boxes, scores=None):
    return {"boxes": boxes.boxes, "labels": boxes.labels, "scores": torch.tensor(scores or [0.9] * len(boxes.labels))}


def test_precision_of_what_is_perfect_missed_and_halfway():
    truth = [boxes_of([0, 0, 10, 10], [20, 20, 30, 40], labels=[0, 2]), boxes_of([5, 5, 9, 9], labels=[2])]
    perfect = mean_average_precision([found_as(each) for each in truth], truth, 3)
    assert perfect["map"] == pytest.approx(1)
    assert perfect["per_class"] == [pytest.approx(1), None, pytest.approx(1)]
    none = mean_average_precision([found_as(boxes_of()), found_as(boxes_of())], truth, 3)
    assert none["map"] == none["map_50"] == 0
    # an overlap of 0.7 counts for 0.5, 0.55, ... 0.7: five of ten
    half = mean_average_precision([found_as(boxes_of([0, 0, 7, 10]))], [boxes_of([0, 0, 10, 10])], 1)
    assert half["map"] == pytest.approx(0.5)
    assert half["map_50"] == pytest.approx(1)
    assert half["map_75"] == 0


def test_a_false_find_costs_and_a_difficult_one_does_not():
    truth = [boxes_of([0, 0, 10, 10], [20, 20, 30, 30], difficult=[False, True])]
    both = found_as(boxes_of([0, 0, 10, 10], [20, 20, 30, 30]), [0.5, 0.9])
    assert mean_average_precision([both], truth, 1)["map"] == pytest.approx(1)
    truth = [boxes_of([0, 0, 10, 10])]
    assert mean_average_precision([both], truth, 1)["map"] == pytest.approx(0.5)


def test_a_part_of_a_crowd_is_no_mistake_and_one_of_a_difficult_box_is():
    truth = boxes_of([0, 0, 10, 10], [50, 50, 250, 250], difficult=[False, True])
    within = found_as(boxes_of([0, 0, 10, 10], [100, 100, 110, 110]), [0.5, 0.9])
    assert mean_average_precision([within], [truth], 1)["map"] == pytest.approx(0.5)
    assert mean_average_precision([within], [truth._replace(crowds=True)], 1)["map"] == pytest.approx(1)


def test_a_flip_takes_the_boxes_along_and_difficult_ones_are_not_learned():
    image = torch.zeros(3, 4, 10, dtype=torch.uint8)
    image[:, :, 0:2] = 255
    boxes = boxes_of([0, 0, 2, 4], [3, 0, 4, 4], labels=[4, 5], difficult=[False, True])
    flipped, target = to_learn_from(image, boxes, flipped=True)
    assert target["boxes"].tolist() == [[8, 0, 10, 4]]
    assert target["labels"].tolist() == [5]  # torchvision's 0 is the background
    assert bool((flipped[:, :, 8:] == 1).all())
    assert not flipped[:, :, :8].any()
    assert boxes.boxes[0].tolist() == [0, 0, 2, 4]  # the data set's own are as they were


def test_training_is_the_seeds():
    one, two = (train_(small_detector(), canvases(2), 2) for _ in range(2))
    assert one == two


def test_an_encoder_without_a_feature_map():
    with pytest.raises(ValueError, match="Linear has no feature map"):
        detector(nn.Linear(1, 1), 2, mean=(0, 0, 0), std=(1, 1, 1))


# ---- the tool ----

TINY = ["boxes.train=4", "boxes.test=3", "steps=2", "batch_size=2", "sides=[48,48]", "boxes.size=48", "head_width=16",
        "boxes.side=[10,20]", "proposals=20", "regions=16", "threads=1", "log_every=1"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of CPC, as small as it can be."""
    return write_cpc_run(tmp_path_factory.mktemp("run"))


def test_the_tool(run, compose, tmp_path, capsys):
    written = detect(compose(f"run={run}", f"out={tmp_path / 'out'}", *TINY, name="detect"))
    record = json.loads(written.read_text())
    assert set(record["per_class"]) == set("0123456789")
    assert 0 <= record["map"] <= record["map_50"] <= 1
    assert record["encoder"] == "trained"
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == [1, 2]
    assert (tmp_path / "out" / "detections.png").stat().st_size > 1000
    assert "map_50" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="holds a detection"):
        detect(compose(f"run={run}", f"out={tmp_path / 'out'}", *TINY, name="detect"))


def test_a_run_is_not_written_over(compose, tmp_path):
    run = write_cpc_run(tmp_path / "run")
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(FileExistsError, match="holds a run of another tool: pass another out"):
        detect(compose(f"run={run}", f"out={run}", *TINY, name="detect"))
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_a_detection_that_was_stopped_begins_again(run, compose, tmp_path):
    for _ in range(2):
        detect(compose(f"run={run}", f"out={tmp_path / 'out'}", *TINY, name="detect")).unlink()


@pytest.mark.parametrize(("missing", "said"), [
    ("Annotations/000002.xml", "has no annotation"), ("JPEGImages/000002.jpg", "an image with boxes is missing"),
])  # fmt: skip
def test_what_is_missing_is_told_before_training(run, compose, tmp_path, missing, said):
    folder = write_voc(tmp_path)
    (folder / missing).unlink()
    where = [f"run={run}", f"out={tmp_path / 'out'}", "boxes=voc", f"boxes.root={folder}", "steps=1", "batch_size=1"]
    with pytest.raises(FileNotFoundError, match=said):
        detect(compose(*where, "sides=[32,48]", "threads=1", name="detect"))
    assert not (tmp_path / "out").exists()


def test_nothing_to_find_is_told_before_training(run, compose, tmp_path):
    folder = write_voc(tmp_path)
    (folder / "Annotations/000002.xml").write_text(annotation(("dog", (1, 2, 20, 10), True)))
    where = [f"run={run}", f"out={tmp_path / 'out'}", "boxes=voc", f"boxes.root={folder}", "steps=1", "batch_size=1"]
    with pytest.raises(ValueError, match="1 images, and no box that counts"):
        detect(compose(*where, "sides=[32,48]", "threads=1", name="detect"))


def test_the_recipe_for_voc(run, compose, tmp_path):
    small = ["steps=1", "batch_size=1", "sides=[32,48]", "anchors=[8]", "head_width=16", "proposals=20", "regions=16"]
    where = [f"run={run}", f"out={tmp_path / 'out'}", f"boxes.root={write_voc(tmp_path)}", "threads=1"]
    record = json.loads(detect(compose("experiment=voc2007_detection", *where, *small, name="detect")).read_text())
    assert len(record["per_class"]) == 20
    assert record["per_class"]["dog"] is not None
    assert record["per_class"]["cat"] is None  # there is none in the test images


def test_a_missing_package_is_told_before_anything_is_read(compose, monkeypatch):
    monkeypatch.setattr("cpc.detect.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r'torchmetrics is not installed: pip install "cpc-images\[detection\]"'
    ):
        detect(compose("run=/nowhere", name="detect"))


@pytest.mark.parametrize(("overrides", "said"), [
    (["schedule=null"], "schedule=null: leave it out"),
    (["steps=0"], "steps=0: pass at least 1"), (["sides=[600,500]"], "sides=[600, 500]"),
    (["anchors=[]"], "anchors=[]"), (["batch_size=400"], "batch_size=400 of 4 training images"), (["clip=0"], "clip=0"),
    (["boxes=voc", "boxes.root=/nowhere"], "ImageSets/Main"), (["boxes=coco"], "not given: boxes.test_annotations"),
    (["run=null"], "run"), (["run=/nowhere"], "the folder of a finished run"), (["boxes=digits"], "pasted_digits"),
    (["optimizer.lr=1e12"], "pass a smaller optimizer.lr"),
])  # fmt: skip
def test_mistakes_are_one_line(run, tmp_path, call_tool, capsys, overrides, said):
    tiny = [] if any(each.startswith("boxes=") for each in overrides) else TINY
    with pytest.raises(SystemExit) as stopped:
        call_tool(detect_main, f"run={run}", f"out={tmp_path / 'out'}", *tiny, "steps=20", *overrides)
    assert stopped.value.code == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert said in line
