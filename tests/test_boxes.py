"""Images with boxes: VOC's and COCO's files, and pasted digits whose boxes are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from voc_files import annotation, write_voc

from contrastive_core.data import mnist5k
from contrastive_core.data.boxes import VOC_CLASSES, BoxDataset, Boxes, coco, pasted_digits, read_voc, voc


def test_vocs_boxes_count_from_zero_and_their_far_sides_are_exclusive(tmp_path):
    voc_folder = write_voc(tmp_path)
    splits = voc(voc_folder)
    image, boxes = splits.train[0]
    assert image.shape == (3, 10, 20)
    assert image.dtype == torch.uint8
    assert boxes.boxes.tolist() == [[0, 1, 20, 10], [2, 2, 5, 5]]
    assert [VOC_CLASSES[label] for label in boxes.labels] == ["dog", "person"]
    assert boxes.difficult.tolist() == [False, True]
    assert len(splits.train) == len(splits.test) == 1
    assert splits.test.class_names == VOC_CLASSES


@pytest.mark.parametrize(("content", "said"), [
    ("<annotation>", "no element found"),
    ("<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>&b;</annotation>", "defines entities"),
    (annotation(("unicorn", (1, 1, 2, 2), False)), "tuple.index"),
    (annotation(("dog", (1, 1, "x", 2), False)), "could not convert"),
    (annotation(("dog", (5, 1, 2, 2), False)), "a box has no area"),
    (annotation(("dog", ("nan", 1, 2, 2), False)), "a box has no area"),
    ("<annotation><object><name>dog</name></object></annotation>", "an object has no bndbox/xmin"),
    ("<annotation>" + " " * (1 << 20), "is over"),
])  # fmt: skip
def test_what_is_no_annotation_of_vocs(tmp_path, content, said):
    file = tmp_path / "a.xml"
    file.write_text(content)
    with pytest.raises(ValueError, match="is not an annotation of VOC's") as refused:
        read_voc(file)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_missing_of_a_voc_folder(tmp_path):
    voc_folder = write_voc(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ImageSets/Main/val\.txt"):
        voc(voc_folder, test="val")
    (voc_folder / "Annotations/000001.xml").unlink()
    with pytest.raises(FileNotFoundError, match="has no annotation"):
        voc(voc_folder).train[0]
    (voc_folder / "JPEGImages/000002.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"000002\.jpg cannot be read"):
        voc(voc_folder).test[0]
    (voc_folder / "ImageSets/Main/test.txt").write_text("../../secret\n")
    with pytest.raises(ValueError, match="a name without folders"):
        voc(voc_folder)
    (voc_folder / "ImageSets/Main/test.txt").write_text("\n")
    with pytest.raises(ValueError, match="no images with boxes"):
        voc(voc_folder)


def coco_file(path, **changed):
    """An image of 20x10 pixels with a cat, a crowd, and a box that has no width."""
    boxes = [
        {"image_id": 7, "category_id": 17, "bbox": [2.5, 1, 4, 8]},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 20.4, 10], "iscrowd": 1},
        {"image_id": 7, "category_id": 3, "bbox": [1, 1, 0, 5]},
    ]
    content = {
        "images": [{"id": 7, "file_name": "a.png"}],
        "annotations": boxes,
        "categories": [{"id": 17, "name": "cat"}, {"id": 3, "name": "car"}],
    }
    path.write_text(json.dumps(content | changed))
    return path


def test_cocos_boxes(tmp_path):
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    file = coco_file(tmp_path / "boxes.json")
    image, boxes = coco(tmp_path, file, tmp_path, file).train[0]
    assert image.shape == (3, 10, 20)
    assert boxes.boxes.tolist() == [[2.5, 1, 6.5, 9], [0, 0, 20, 10]]  # cut off at the image's side
    assert boxes.labels.tolist() == [1, 0]  # by their ids: car, cat
    assert boxes.difficult.tolist() == [False, True]


@pytest.mark.parametrize(("changed", "said"), [
    ({"images": None}, "not an annotation file"), ({"annotations": [{"image_id": 7}]}, "'category_id'"),
    ({"annotations": [{"image_id": 7, "category_id": 5, "bbox": [1, 1, 1, 1]}]}, "category 5"),
    ({"annotations": [{"image_id": 8, "category_id": 3, "bbox": [1, 1, 1, 1]}]}, "8"),
    ({"annotations": [{"image_id": 7, "category_id": 3, "bbox": [1, 1, 1]}]}, "unpack"),
    ({"images": [{"id": 7, "file_name": "../a.png"}]}, "within its folder"),
    ({"images": [{"id": 7, "file_name": "/a.png"}]}, "within its folder"),
])  # fmt: skip
def test_what_is_no_file_of_cocos(tmp_path, changed, said):
    file = coco_file(tmp_path / "boxes.json", **changed)
    with pytest.raises(ValueError, match=r"boxes\.json") as refused:
        coco(tmp_path, file, tmp_path, file)
    assert said in str(refused.value)


def test_coco_files_of_two_kinds(tmp_path):
    file = coco_file(tmp_path / "a.json")
    other = coco_file(tmp_path / "b.json", annotations=[], categories=[{"id": 17, "name": "dog"}])
    with pytest.raises(ValueError, match="other categories"):
        coco(tmp_path, file, tmp_path, other)


def test_a_box_outside_of_its_image():
    boxes = Boxes(torch.tensor([[30.0, 0, 40, 5]]), torch.tensor([0]), torch.tensor([False]))
    with pytest.raises(ValueError, match="20x10 pixels, and a box that lies outside"):
        BoxDataset([np.zeros((10, 20, 3), np.uint8)], [boxes], ["a"])[0]


def test_digits_lie_in_their_boxes_and_nowhere_else():
    splits = pasted_digits(30, 5, size=64, digits=(1, 3), side=(10, 20), seed=3)
    seen = []
    for image, boxes in (splits.train[i] for i in range(30)):
        outside = image[0].clone()
        for x1, y1, x2, y2 in boxes.boxes.int().tolist():
            ink = image[0, y1:y2, x1:x2] > 0
            assert ink.any(0)[[0, -1]].all()  # tight: ink in the outermost rows and columns
            assert ink.any(1)[[0, -1]].all()
            assert 10 <= max(x2 - x1, y2 - y1) <= 20
            outside[y1:y2, x1:x2] = 0
        assert not outside.any()
        seen.append(len(boxes.boxes))
    assert set(seen) == {1, 2, 3}


def test_digits_are_those_of_their_split_and_the_test_canvases_are_every_seeds():
    here, again, other = (pasted_digits(3, 3, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(here.train[i][0], again.train[i][0]) for i in range(3))
    assert not torch.equal(here.train[0][0], other.train[0][0])
    assert all(torch.equal(here.test[i][0], other.test[i][0]) for i in range(3))
    assert not torch.equal(here.train[0][0], here.test[0][0])


def test_a_pasted_digit_is_one_of_its_splits_with_its_label():
    """At its own size a digit is pasted as it is, so it can be looked up."""
    digits = mnist5k().test
    crops = {}
    for index in range(len(digits)):
        ink = digits.decode(index)[0]
        rows, cols = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
        crop = ink[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        if max(crop.shape) == 20:
            crops[crop.numpy().tobytes()] = int(digits.labels[index])
    splits = pasted_digits(1, 20, digits=(1, 1), side=(20, 20))
    looked_up = []
    for image, boxes in (splits.test[i] for i in range(20)):
        x1, y1, x2, y2 = boxes.boxes[0].int().tolist()
        looked_up.append((crops.get(image[0, y1:y2, x1:x2].contiguous().numpy().tobytes()), int(boxes.labels[0])))
    found = [pair for pair in looked_up if pair[0] is not None]  # None: it was resized
    assert found
    assert all(one == other for one, other in found)


@pytest.mark.parametrize(("changed", "said"), [
    ({"digits": (0, 2)}, "digits="), ({"digits": (3, 2)}, "digits="), ({"side": (10, 200)}, "side="),
    ({"train": 0}, "train=0"),
])  # fmt: skip
def test_canvases_that_cannot_be(changed, said):
    with pytest.raises(ValueError, match=said):
        pasted_digits(**{"train": 1, "test": 1, **changed})
