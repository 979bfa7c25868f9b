"""Test images that were trained on are found, whatever their files are called, and others are not taken for them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cpc.seen_images
from contrastive_core.data import ImageDataset, Splits, content_ids, imagefolder, webdataset
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


def encoded(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((path / "cat").iterdir())]


@pytest.mark.parametrize("kind", ["files of other names", "bytes", "a shard", "pixels"])
@pytest.mark.parametrize("turned", [False, True], ids=["", "the other way round"])
def test_copies_are_found_whatever_they_are_called(tmp_path, kind, turned):
    """Two of four test images in a flat folder of unlabelled files, in a table, a shard, or an array of pixels."""
    pictures = noise(8, seed=0)
    test = imagefolder(folder(tmp_path / "test", pictures[:4]), size=8).train
    copies = folder(tmp_path / "copies", pictures[2:])
    if kind == "files of other names":
        (tmp_path / "all").mkdir()
        for number, content in enumerate(encoded(copies)):
            (tmp_path / "all" / f"photo{number + 10}.png").write_bytes(content)
        others = imagefolder(tmp_path / "all", size=8).train
    elif kind == "a shard":
        with tarfile.open(tmp_path / "0.tar", "w") as shard:
            for number, content in enumerate(encoded(copies)):
                member = tarfile.TarInfo(f"{number + 10}.png")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
        others = webdataset(tmp_path / "0.tar", size=8).train
    else:
        others = ImageDataset(encoded(copies) if kind == "bytes" else pictures[2:], size=8)
    assert count_seen(*((others, test) if turned else (test, others))) == 2


def test_of_very_many_images_the_names_count(tmp_path, monkeypatch):
    """A copy under another name, beside three others and beside two; and one under its own name."""
    monkeypatch.setattr(cpc.seen_images, "LOOKED_INTO", 3)
    pictures = noise(4, seed=0)
    test = imagefolder(folder(tmp_path / "test", pictures[:1]), size=8).train
    others = folder(tmp_path / "all", pictures) / "cat"
    files = [others / f"{number}.png" for number in range(4)]
    assert count_seen(test, ImageDataset(files, size=8)) == 1
    files[0] = files[0].rename(files[0].with_name("9.png"))
    assert count_seen(test, ImageDataset(files, size=8)) == 0
    assert count_seen(test, ImageDataset(files[:3], size=8)) == 1


def test_files_that_begin_alike_are_not_one(tmp_path):
    """Uncompressed, of one length, with another last pixel."""
    pictures = np.zeros((3, 64, 64, 3), dtype=np.uint8)
    pictures[1, 0, 0] = pictures[2, 0, 0] = 255  # a bitmap's last bytes are its first row
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(tmp_path / f"{number}.bmp")
    one, other, copy = (ImageDataset([tmp_path / f"{number}.bmp"], size=64) for number in range(3))
    assert content_ids(one) == content_ids(other)
    assert (count_seen(one, other), count_seen(copy, other)) == (0, 1)
    both = ImageDataset([tmp_path / "0.bmp", tmp_path / "1.bmp", tmp_path / "0.bmp"], size=64)
    assert count_seen(copy, both) == 1, "whichever of those that begin alike it is"


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
        if data["train"] not in [*sets, "installed"]:
            raise FileNotFoundError(f"no {data['train']}")
        if data["train"] == "installed":
            raise ImportError("wants a package")
        return Splits(ImageDataset(sets[data["train"]], size=8), None)

    training = {"_target_": "contrastive_core.data.parquet", "train": "labelled", "size": 8}
    clean, leaky, gone = (run(name, name) for name in ("clean", "leaky", "gone"))
    same = run("same", "labelled")
    seen = seen_among(test, training, [clean, same], read)
    assert list(seen.values()) == [0, 0, 0]
    assert seen_notes(seen, 3) == [
        "no test image was found among those that were trained on, by the end of its path, or by its bytes "
        "(of up to 200,000 images, none of them in shards on a server)"
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
    (wants,) = seen_notes(seen_among(test, training, [run("wants", "installed")], read), 3)[:1]
    assert wants.endswith("is not known: wants a package"), "what is only asked about does not end a sweep"
    unread = seen_notes(seen_among(test, training | {"train": "nowhere"}, [gone], read), 3)
    assert len(unread) == 2
    assert all("is not known" in note for note in unread), "nothing was looked at, so nothing is said to be clean"
