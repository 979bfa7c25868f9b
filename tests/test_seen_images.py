"""Test images that were trained on are found, whatever their files are called, and others are not taken for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contrastive_core.data import ImageDataset, Splits, imagefolder
from cpc.seen_images import count_seen, seen_among, seen_notes


def noise(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def folder(path: Path, pictures: np.ndarray) -> Path:
    (path / "cat").mkdir(parents=True)
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(path / "cat" / f"{number}.png")
    return path


def test_images_are_found_by_their_bytes():
    pictures = noise(6, seed=0)
    test, train = ImageDataset(pictures[:3], size=8), ImageDataset(pictures[2:], size=8)
    assert count_seen(test, train) == 1
    assert count_seen(test, test) == 3
    assert count_seen(test, ImageDataset(noise(3, seed=1), size=8)) == 0


def test_files_of_one_name_are_one_image_where_their_pixels_are(tmp_path):
    """`train/cat/0.png` and `test/cat/0.png`: a usual layout, and no leak; but for one that was copied."""
    pictures = noise(8, seed=0)
    pictures[6] = pictures[2]
    folder(tmp_path / "train", pictures[:4])
    folder(tmp_path / "test", pictures[4:])
    splits = imagefolder(tmp_path, size=8)
    assert count_seen(splits.test, splits.train) == 1


def test_what_cannot_be_decoded_was_not_seen(tmp_path):
    path = folder(tmp_path / "one", noise(1, seed=0)) / "cat" / "0.png"
    good, bad = ImageDataset([path], size=8), ImageDataset([tmp_path / "cat" / "0.png"], size=8)
    assert (count_seen(good, good), count_seen(good, bad)) == (1, 0)


@pytest.fixture
def run(tmp_path):
    """`run("a", {"train": "x"})`: a run's folder that says what it was trained on."""

    def made(name: str, data: str) -> str:
        (tmp_path / name).mkdir()
        config = f"data: {{_target_: contrastive_core.data.parquet, train: {data}, size: 32}}"
        (tmp_path / name / "config.yaml").write_text(config + "\n")
        return str(tmp_path / name)

    return made


def test_the_report_says_what_was_seen_by_whom_and_what_is_not_known(run, tmp_path):
    pictures = noise(9, seed=0)
    test = ImageDataset(pictures[:3], size=8)
    sets = {"labelled": pictures[3:6], "clean": pictures[6:], "leaky": pictures[2:]}
    asked = []

    def read(data):
        asked.append((data["train"], data["size"]))
        assert data["cache"] is False
        if data["train"] not in sets:
            raise FileNotFoundError(f"no {data['train']}")
        return Splits(ImageDataset(sets[data["train"]], size=8), None)

    training = {"_target_": "contrastive_core.data.parquet", "train": "labelled", "size": 8}
    clean, leaky, gone = (run(name, name) for name in ("clean", "leaky", "gone"))
    same = run("same", "labelled")
    seen = seen_among(test, training, [clean, same], read)
    assert list(seen.values()) == [0, 0, 0]
    assert seen_notes(seen, 3) == [
        "no test image was found among those that were trained on, by its bytes or the end of its path"
    ]
    assert asked == [("labelled", 8), ("clean", 8)], "each data set once"
    seen = seen_among(test, training, [leaky, gone, str(tmp_path)], read)
    assert seen_notes(seen, 3) == [
        f"whether test images are among those that {gone} was pre-trained on is not known: no gone",
        f"whether test images are among those that {tmp_path} was pre-trained on is not known: no "
        f"{tmp_path / 'config.yaml'} that says on which data the run was trained: pass data=NAME",
        "0 of 3 test images are among the training images",
        f"1 of 3 test images are among those that {leaky} was pre-trained on",
    ]
    unread = seen_notes(seen_among(test, training | {"train": "nowhere"}, [gone], read), 3)
    assert len(unread) == 2
    assert all("is not known" in note for note in unread), "nothing was looked at, so nothing is said to be clean"
