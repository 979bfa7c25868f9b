"""Tar shards against the webdataset package's own reading, broken and hostile ones, and Hugging Face data sets."""

from __future__ import annotations

import errno
import io
import itertools
import logging
import os
import pickle
import re
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import webdataset as wds
from test_data import png

from contrastive_core.data import (
    UndecodableImage,
    batch_indices,
    dataset_digest,
    huggingface,
    imagefolder,
    label_fraction,
    sample_ids,
    sample_order,
    shard_files,
    training_batches,
    webdataset,
)
from contrastive_core.data import shards as shards_module
from contrastive_core.data.images import class_numbers
from contrastive_core.data.loading import Shards


def write_shard(path: Path, first: int, count: int, labelled: bool = True) -> None:
    """Image i is grey of value i; by the webdataset package."""
    with wds.TarWriter(str(path)) as writer:
        for i in range(first, first + count):
            label = {"cls": i % 3} if labelled else {}
            writer.write({"__key__": f"{i % 3}/{i:04d}", "png": png(i), **label})


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four shards of five images each."""
    for shard in range(4):
        write_shard(tmp_path / f"train-{shard:03d}.tar", 5 * shard, 5)
    return tmp_path


def members(path: Path, files: dict[str, bytes]) -> str:
    """A tar of these files, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def values(dataset) -> list[int]:
    return [int(dataset[i].image[0, 0, 0]) for i in range(len(dataset))]


# --- what is read -------------------------------------------------------------------------------------------------


def test_the_same_samples_as_webdataset_reads(folder):
    theirs = []
    for file in sorted(folder.glob("*.tar")):
        with file.open("rb") as stream:  # `wds.WebDataset` itself leaves files open
            files = wds.tariterators.tar_file_expander([{"url": str(file), "stream": stream}])
            theirs += list(wds.tariterators.group_by_keys(files))
    ours = webdataset(folder, size=8, cache=False).train
    assert [ours.source[i] for i in range(20)] == [sample["png"] for sample in theirs]
    assert ours.labels.tolist() == [int(sample["cls"]) for sample in theirs]
    assert [str(key) for key in ours.source.keys] == [sample["__key__"] for sample in theirs]
    assert values(ours) == list(range(20))
    assert ours.classes == 3


@pytest.mark.parametrize("cache", [False, True])
def test_splits_cache_and_subset(folder, cache):
    write_shard(folder / "test.tar", 100, 3)
    train, test = webdataset(str(folder / "train-*.tar"), folder / "test.tar", size=8, cache=cache)
    assert test is not None
    assert (len(train), len(test)) == (20, 3)
    assert (train.pixels is not None) == cache
    part = train.subset([7, 2])
    assert (values(part), part.labels.tolist()) == ([7, 2], [1, 2])
    assert part.name(0) == f"{folder}/train-001.tar 1/0007"


def test_samples_as_people_write_them(tmp_path):
    """More than one file a sample, dots and folders in names, no label, no image, capital suffixes."""
    files = {
        "a/one.seg.png": png(1), "a/one.cls": b"2", "a/one.json": b"{}", "two.PNG": png(2), "two.left.png": png(9),
        "three.cls": b"1", "./four.jpg": png(4), "four.cls": b" 0\n",
    }  # fmt: skip
    dataset = webdataset(members(tmp_path / "x.tar", files), size=8).train
    assert dataset.labels.tolist() == [2, -1, -1]  # "./four" and "four" are two names
    assert [str(key) for key in dataset.source.keys] == ["a/one", "two", "./four"]
    assert values(dataset) == [1, 2, 4]


def test_unlabelled(tmp_path):
    write_shard(tmp_path / "x.tar", 0, 4, labelled=False)
    dataset = webdataset(tmp_path, size=8).train
    assert (dataset.labels.tolist(), dataset.classes) == ([-1] * 4, 0)


def test_identities_are_those_of_the_unpacked_files(folder):
    ids = sample_ids(webdataset(folder, size=8, cache=False).train)
    assert len(set(ids.tolist())) == 20
    reversed_names = sample_ids(webdataset(sorted(folder.glob("*.tar"))[::-1], size=8, cache=False).train)
    assert sorted(ids.tolist()) == sorted(reversed_names.tolist())
    assert not torch.equal(ids, reversed_names)
    dataset = webdataset(folder, size=8, cache=False).train
    assert len(label_fraction(dataset.labels, 0.5, seed=0, ids=ids)) >= 9


# --- order --------------------------------------------------------------------------------------------------------


def test_shards_at_a_time_mixes_so_many(folder):
    dataset = webdataset(folder, size=8, cache=False, shards_at_a_time=2).train
    shards = Shards(dataset.shards, dataset.shards_at_a_time)
    pairs = set()
    for epoch in range(6):
        order = sample_order(20, 0, epoch, shards)
        assert sorted(order.tolist()) == list(range(20))
        first, second = (set((order[half] // 5).tolist()) for half in (slice(0, 10), slice(10, 20)))
        assert (len(first), len(second), first & second) == (2, 2, set())
        assert (order[:10] // 5).tolist() != sorted((order[:10] // 5).tolist())  # mixed, not one after the other
        pairs.add(frozenset(first))
    assert len(pairs) > 1  # other ones together in another epoch


def test_all_shards_at_a_time_is_another_name_for_all():
    of_image = torch.arange(20) // 5
    assert torch.equal(sample_order(20, 1, 2, Shards(of_image, 4)), sample_order(20, 1, 2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_batches_do_not_depend_on_processes_workers_or_interruption(folder, workers, world):
    """Two epochs of five steps: every image once an epoch, none on two processes; a resumed run goes on in a shard."""
    dataset = webdataset(folder, size=8, cache=False, shards_at_a_time=2).train
    options = {"batch_size": 4, "seed": 0, "world": world, "workers": workers}
    seen = [[], []]
    for rank in range(world):
        for start, stop in ((0, 3), (3, 10)):
            for step, (batch,) in enumerate(
                training_batches(dataset, start=start, steps=stop, rank=rank, **options), start
            ):
                assert batch.images[:, 0, 0, 0].tolist() == batch.indices.tolist()
                expected = batch_indices(20, 4, 0, step, Shards(dataset.shards, 2))
                assert batch.indices.tolist() == expected[batch.places].tolist()
                seen[step // 5] += batch.indices.tolist()
    assert [sorted(epoch) for epoch in seen] == [list(range(20))] * 2


def test_a_pickled_data_set_opens_its_shards_itself(folder):
    dataset = webdataset(folder, size=8, cache=False).train
    assert int(dataset[3].image[0, 0, 0]) == 3
    again = pickle.loads(pickle.dumps(dataset))
    assert again.source._reader._open == {}
    assert values(again) == list(range(20))


def test_few_shards_stay_open(folder, monkeypatch):
    monkeypatch.setattr(shard_files, "OPEN_FILES", 2)
    dataset = webdataset(folder, size=8, cache=False).train
    assert [int(dataset[i].image[0, 0, 0]) for i in (0, 5, 10, 15, 1)] == [0, 5, 10, 15, 1]
    assert len(dataset.source._reader._open) == 2


def test_threads_do_not_close_each_others_shards(folder, monkeypatch):
    monkeypatch.setattr(shard_files, "OPEN_FILES", 1)
    dataset = webdataset(folder, size=8, cache=False).train
    usual, calls = os.pread, itertools.count()

    def interrupted(descriptor, length, start):
        if next(calls) == 0:  # another thread asks for an image of another shard now
            other = threading.Thread(target=dataset.decode, args=(5,))
            other.start()
            other.join(1)
        return usual(descriptor, length, start)

    monkeypatch.setattr(shard_files.os, "pread", interrupted)
    assert int(dataset.decode(0)[0, 0, 0]) == 0


# --- behind a URL ------------------------------------------------------------------------------------------------


class RangeServer(SimpleHTTPRequestHandler):
    """Files of a folder, whole, a range at a time, or not at all."""

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append((self.path, asked))
        if self.server.refuses and asked:
            self.server.refuses -= 1
            self.send_error(503)
            return
        if asked is None or self.path.endswith("/"):
            super().do_GET()
            return
        content = (Path(self.directory) / self.path.lstrip("/").partition("?")[0]).read_bytes()
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder):
    """The folder at a URL of this machine; `asked` is what was, `refuses` how many ranges it refuses from now on."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeServer, directory=str(folder))) as serving:
        serving.asked, serving.refuses = [], 0
        serving.url = f"http://127.0.0.1:{serving.server_port}"
        threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
        yield serving
        serving.shutdown()


@pytest.mark.parametrize("where", ["", "/train-*.tar", "/train-{000..003}.tar"], ids=["folder", "pattern", "braces"])
def test_shards_behind_a_url(server, folder, where):
    there, here = webdataset(server.url + where, size=8, cache=False).train, webdataset(folder, size=8).train
    server.asked.clear()
    assert values(there) == values(here) == list(range(20))
    assert there.labels.tolist() == here.labels.tolist()
    places = zip(there.source.start, there.source.length, strict=True)
    ranges = [f"bytes={first}-{first + length - 1}" for first, length in places]
    assert [asked for _, asked in server.asked] == ranges  # an image at a time, and no more of it
    assert sample_ids(there).tolist() == sample_ids(here).tolist()


def test_workers_fetch_for_themselves(server):
    dataset = webdataset(server.url, size=8, cache=False).train
    assert values(dataset.subset([3])) == [3]  # a connection that they must not share
    options = {"batch_size": 4, "seed": 0, "start": 0, "steps": 5, "rank": 0, "world": 1, "accumulate": 1}
    batches = training_batches(dataset, **options, workers=2)
    loaded = torch.cat([batch.images[:, 0, 0, 0] for (batch,) in batches])
    assert sorted(loaded.tolist()) == list(range(20))


def test_a_server_that_refuses_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(shard_files, "WAIT", 0.01)
    dataset = webdataset(server.url, size=8, cache=False).train
    server.refuses = shard_files.TRIES - 1
    assert values(dataset.subset([7])) == [7]
    server.refuses = shard_files.TRIES
    assert re.search(r"train-001.tar 1/0007: .* did not answer 5 times: 503", dataset[7].fault)


def test_an_index_saves_reading_headers(server, folder, tmp_path):
    index = tmp_path / "index.npz"
    first = webdataset(server.url, size=8, cache=False, index=index).train
    server.asked.clear()
    again = webdataset(server.url, size=8, cache=False, index=index).train
    assert not [asked for _, asked in server.asked if asked]
    assert again.source.start.tolist() == first.source.start.tolist()
    write_shard(folder / "train-000.tar", 100, 4)
    assert len(webdataset(server.url, size=8, cache=False, index=index).train) == 19


def made_anew(path, old_labels, new_labels):
    """A shard of the same size with other labels, a minute later."""
    for labels, time in ((old_labels, 1_700_000_000), (new_labels, 1_700_000_060)):
        members(path, {f"{i}.{kind}": content for i, label in enumerate(labels)
                       for kind, content in (("png", png(i)), ("cls", str(label).encode()))})  # fmt: skip
        os.utime(path, (time, time))
        yield


@pytest.mark.parametrize("told", [True, False], ids=["Last-Modified", "nothing"])
def test_an_index_does_not_outlive_a_shard_of_the_same_size(server, tmp_path, monkeypatch, told):
    """A server that says neither a time nor a tag leaves nothing to go by: the headers are read each time."""
    if not told:
        send = RangeServer.send_header
        monkeypatch.setattr(
            RangeServer, "send_header", lambda self, *pair: pair[0] == "Last-Modified" or send(self, *pair)
        )
    where, index = f"{server.url}/same.tar", tmp_path / "kept" / "index.npz"
    labels = []
    for _ in made_anew(tmp_path / "same.tar", [0, 1, 2], [2, 0, 1]):
        labels += [webdataset(where, size=8, cache=False, index=index).train.labels.tolist() for _ in range(2)]
    assert labels == [[0, 1, 2], [0, 1, 2], [2, 0, 1], [2, 0, 1]]
    assert index.is_file() is told


def test_a_server_without_ranges_is_told_of_at_once(server, monkeypatch):
    monkeypatch.setattr(RangeServer, "do_GET", SimpleHTTPRequestHandler.do_GET)
    with pytest.raises(OSError, match=r"train-000.tar: the server sends 30,720 bytes where 512 were asked for"):
        webdataset(server.url, size=8)


def test_a_signed_url_is_no_pattern(server):
    assert len(webdataset(f"{server.url}/train-001.tar?X-Amz-Signature=1", size=8, cache=False).train) == 5


def test_what_is_not_there_is_said(server, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no shard http://.*/no.tar: set data.train to a folder of .tar files"):
        webdataset(f"{server.url}/no.tar", size=8)
    with pytest.raises(ValueError, match="Protocol not known: nowhere"):
        webdataset("nowhere://a/b.tar", size=8)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ImportError, match=r"s3://bucket/a.tar: Install s3fs"):
        webdataset("s3://bucket/a.tar", size=8)


@pytest.mark.parametrize("pattern", ["x-{0..99999999999}.tar", "{0..9999}-{0..9999}.tar"])
def test_a_pattern_of_more_shards_than_there_can_be_is_refused(pattern):
    with pytest.raises(ValueError, match="spells out more than 1,000,000 shards"):
        shard_files.spelled_out(pattern)


def test_braces_are_spelled_out():
    assert shard_files.spelled_out("{a,b}-{08..10}.tar") == [f"{x}-{n}.tar" for x in "ab" for n in ("08", "09", "10")]
    assert shard_files.spelled_out("plain.tar") == ["plain.tar"]


# --- broken and hostile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [600, 1024 + 40, 2600])
def test_a_truncated_shard_counts_up_to_the_break(folder, caplog, left):
    """Each sample takes 2,048 bytes or so: header and content of an image, and of a label."""
    whole = (folder / "train-001.tar").read_bytes()
    (folder / "train-001.tar").write_bytes(whole[:left])
    with caplog.at_level(logging.WARNING):
        dataset = webdataset(folder, size=8, cache=False).train
    assert "broken shard" in caplog.text
    assert "train-001.tar" in caplog.text
    assert 15 <= len(dataset) < 20
    assert set(values(dataset)) >= {0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19}


@pytest.mark.parametrize("damage", ["cut before it", "cut within it", "a byte changed", "zeros"])
def test_a_header_that_is_damaged_is_no_end(folder, tmp_path, caplog, damage):
    """Python's tarfile stops there without a word; and no index keeps what was left of the shard."""
    shard, index = folder / "train-001.tar", tmp_path / "kept/index.npz"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        at = tar.getmembers()[4].offset
    changed = bytes([whole[at] ^ 1])
    shard.write_bytes({
        "cut before it": whole[:at],
        "cut within it": whole[: at + 100],
        "a byte changed": whole[:at] + changed + whole[at + 1 :],
        "zeros": whole[:at] + bytes(512) + whole[at + 512 :],
    }[damage])  # fmt: skip
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            dataset = webdataset(folder, size=8, cache=False, index=index).train
        assert f"neither a header nor the end at byte {at:,}; the 2 images before that are used" in caplog.text
        assert len(dataset) == 17


def test_where_only_broken_shards_hold_images_no_index_is_kept(folder, tmp_path):
    index = tmp_path / "kept/index.npz"
    for shard in folder.glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:5200])
    members(folder / "train-004.tar", {"read.me": b"no image"})
    assert len(webdataset(folder, size=8, cache=False, index=index).train) == 4
    assert not index.exists()


def test_a_file_of_negative_size_ends_its_shard(tmp_path, caplog):
    """Of -512 bytes, so that the header behind it is its own: tarfile reads that for ever."""
    path = Path(members(tmp_path / "x.tar", {"a.png": png(1), "b.png": png(2)}))
    content = bytearray(path.read_bytes())
    header = content[1024:1536]
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[1024:1536] = header
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert values(webdataset(path, size=8).train) == [1]
    assert "a file of -512 bytes; the 1 images before that are used" in caplog.text


def test_a_disk_that_fails_once_makes_no_other_data_set(folder, tmp_path, monkeypatch):
    index = tmp_path / "kept/index.npz"
    with monkeypatch.context() as patch:

        def failing(file):
            raise OSError(errno.EIO, "Input/output error", file)

        patch.setattr(shards_module, "opened", failing)
        with pytest.raises(OSError, match="Input/output error"):
            webdataset(folder, size=8, cache=False, index=index)
    assert not index.exists()
    assert len(webdataset(folder, size=8, cache=False, index=index).train) == 20


def test_an_index_has_the_state_that_was_read(folder, tmp_path, monkeypatch):
    """A shard is written anew after its headers were read, and before the index is."""
    index = tmp_path / "kept/index.npz"
    with monkeypatch.context() as patch:
        usual = shards_module._write_index

        def after_a_change(*arguments):
            write_shard(folder / "train-001.tar", 5, 3)
            usual(*arguments)

        patch.setattr(shards_module, "_write_index", after_a_change)
        webdataset(folder, size=8, cache=False, index=index)
    assert len(webdataset(folder, size=8, cache=False, index=index).train) == 18


@pytest.mark.parametrize(
    "content", [b"", b"no tar at all" * 100, b"\x1f\x8b\x08" + bytes(600)], ids=["empty", "text", "gz"]
)
def test_what_is_no_tar_is_passed_over(folder, caplog, content):
    (folder / "train-002.tar").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert len(webdataset(folder, size=8, cache=False).train) == 15
    assert "broken shard" in caplog.text
    assert "train-002.tar" in caplog.text


def test_paths_and_links_in_a_shard_lead_nowhere(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(77))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        for name in ("../../outside.png", "/absolute.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png(5))
            tar.addfile(info, io.BytesIO(png(5)))
    before = sorted(tmp_path.rglob("*"))
    dataset = webdataset(tmp_path / "x.tar", size=8).train
    assert values(dataset) == [5, 5]
    assert sorted(tmp_path.rglob("*")) == before


def repeated(path, files):
    """A tar of these files, of which some may have one name."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def test_of_files_of_one_name_the_last_counts(tmp_path, caplog):
    """As where tar unpacks a shard that was appended to; a name ends at its first dot, which is told."""
    files = [("a.png", png(1)), ("a.cls", b"0"), ("a.png", png(2)), ("a.cls", b"1")]
    files += [(f"photo.{i}.png", png(10 + i)) for i in range(5)]
    files += [(f"{'long' * 200}.png", png(3))]
    dataset = webdataset(repeated(tmp_path / "a.tar", files), size=8).train
    assert (values(dataset), dataset.labels.tolist()) == ([2, 10], [1, -1])
    assert "a.tar: 6 images are passed over, whose names up to the first dot are those of others, or lo" in caplog.text


@pytest.mark.parametrize("label", [b"1700000000", b"99999999999999999999999", b"cat"])
def test_a_label_that_is_no_class_is_named_with_its_shard(tmp_path, label):
    shard = members(tmp_path / "a.tar", {"1.png": png(1), "1.cls": label})
    with pytest.raises(ValueError, match=r"a\.tar.*: number the classes from 0"):
        webdataset(shard, size=8)


def test_a_million_images_may_be_a_million_classes():
    assert shards_module._label(b"999999", "a.tar", "1") == 999_999
    assert len(class_numbers(999_999, 1_000_000, "a.tar")) == 1_000_000


def test_a_shard_named_twice_is_refused(folder):
    with pytest.raises(ValueError, match=r"data.train names .*train-001.tar twice: its images would count twice"):
        webdataset([folder / "train-001.tar", folder / "train-*.tar"], size=8)


def test_a_header_whose_numbers_are_none_breaks_its_shard(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i, headers in enumerate([{}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.size": "x"}]):
            info = tarfile.TarInfo(f"{i}.png")
            info.size, info.pax_headers = len(png(i)), headers
            tar.addfile(info, io.BytesIO(png(i)))
    assert values(webdataset(tmp_path / "a.tar", size=8).train) == [0]
    assert "broken shard" in caplog.text


def test_names_that_are_no_text_have_identities(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    of_shard = webdataset(repeated(tmp_path / "a.tar", [(name, png(1))]), size=8).train
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(png(1))
    of_folder = imagefolder(tmp_path / "images", size=8).train
    for dataset in (of_shard, of_folder):
        assert len(sample_ids(dataset)) == 1
        assert len(dataset_digest(dataset)) == 12


def test_an_image_that_claims_too_much_is_named(folder, monkeypatch):
    monkeypatch.setattr(shards_module, "LARGEST_IMAGE", 10)
    dataset = webdataset(folder, size=8, cache=False).train
    with pytest.raises(UndecodableImage, match=r"train-000.tar 0/0000: .* bytes are no image, the limit is 10"):
        dataset.decode(0)


def test_a_shard_that_shrank_since(folder):
    dataset = webdataset(folder, size=8, cache=False).train
    (folder / "train-003.tar").write_bytes(b"")
    with pytest.raises(UndecodableImage, match=r"train-003.tar 0/0015: its shard ends after 0 of its \d+ bytes"):
        dataset.decode(15)
    assert dataset[15].index == 0  # the next that can be decoded stands in
    assert "0/0015" in dataset[15].fault


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.png": png(1), "a.cls": b"cat"}, "the label of a is b'cat': number the classes from 0"),
        ({"a.txt": b"x"}, "1 shards from .* on hold no image: their files need an image's suffix"),
        ({"a.png": png(1), "a.cls": b"-3"}, "labels run from -3"),
    ],
)
def test_one_clear_line(tmp_path, files, said):
    with pytest.raises(ValueError, match=said):
        webdataset(members(tmp_path / "x.tar", files), size=8)


def test_no_shard(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no shard .*: set data.test to a folder of .tar files"):
        webdataset(members(tmp_path / "x.tar", {"a.png": png(1)}), tmp_path / "y-*.tar", size=8)


def test_no_shards_at_a_time(folder):
    with pytest.raises(ValueError, match="shards_at_a_time=0: pass 1 or more, or null"):
        webdataset(folder, size=8, shards_at_a_time=0)


# --- the index ----------------------------------------------------------------------------------------------------


def test_an_index_saves_reading_the_headers_again(folder, tmp_path, monkeypatch):
    index = tmp_path / "kept" / "index.npz"
    first = webdataset(folder, size=8, cache=False, index=index).train
    read = []
    usual = shards_module.read_shard
    monkeypatch.setattr(shards_module, "read_shard", lambda file: read.append(Path(file).name) or usual(file))
    again = webdataset(folder, size=8, cache=False, index=index).train
    assert read == []
    assert (values(again), again.labels.tolist()) == (values(first), first.labels.tolist())
    write_shard(folder / "train-001.tar", 5, 3)  # changed
    write_shard(folder / "train-004.tar", 20, 2)  # new
    changed = webdataset(folder, size=8, cache=False, index=index).train
    assert read == ["train-001.tar", "train-004.tar"]
    assert values(changed) == [0, 1, 2, 3, 4, 5, 6, 7, *range(10, 22)]
    read.clear()
    webdataset(folder, size=8, cache=False, index=index)
    assert read == []
    assert [path.name for path in index.parent.iterdir()] == ["index.npz"]


@pytest.mark.parametrize("content", [b"", b"nonsense", None, "cut"], ids=["empty", "nonsense", "pickle", "cut"])
def test_what_is_no_index(folder, tmp_path, content):
    index = tmp_path / "index.npz"
    if content == "cut":
        webdataset(folder, size=8, index=index)
        index.write_bytes(index.read_bytes()[:-30])
    elif content is None:
        np.savez(index, files=np.array([object()], dtype=object))
    else:
        index.write_bytes(content)
    with pytest.raises(ValueError, match=r"is no index of shards .*: pass another data.index, or remove it"):
        webdataset(folder, size=8, index=index)


# --- Hugging Face -------------------------------------------------------------------------------------------------


def rows(first: int, count: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "cow"])})
    cells = {"image": [{"bytes": png(i), "path": None} for i in range(first, first + count)]}
    cells["label"] = [i % 3 for i in range(first, first + count)]
    return datasets.Dataset.from_dict(cells, features=features)


@pytest.fixture(params=["parquet", "save_to_disk"])
def saved(request, tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    both = datasets.DatasetDict({"train": rows(0, 12), "test": rows(100, 4)})
    if request.param == "save_to_disk":
        both.save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        both["train"].select(range(7)).to_parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
        both["train"].select(range(7, 12)).to_parquet(tmp_path / "data" / "train-00001-of-00002.parquet")
        both["test"].to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    return str(tmp_path / "data")


def test_a_hugging_face_data_set(saved):
    train, test = huggingface(saved, size=8, cache=False)
    assert test is not None
    assert values(train) == list(range(12))
    assert values(test) == [100, 101, 102, 103]
    assert train.labels.tolist() == [i % 3 for i in range(12)]
    assert train.class_names == ("cat", "dog", "cow")
    assert train.name(3) == f"{saved} train row 3"
    part = train.subset([5, 1])
    assert (values(part), part.labels.tolist()) == ([5, 1], [2, 1])
    assert isinstance(part.source.rows, datasets.Dataset)  # still unread


def test_a_hugging_face_data_set_through_workers(saved):
    dataset = huggingface(saved, size=8, cache=False).train
    batches = training_batches(dataset, batch_size=4, seed=0, start=0, steps=3, workers=2)
    seen = [index for (batch,) in batches for index in batch.indices.tolist()]
    assert sorted(seen) == list(range(12))


def test_identities_of_hugging_face_rows_are_those_of_the_bytes(saved):
    from contrastive_core.data import ImageDataset

    ours = sample_ids(huggingface(saved, size=8, cache=False).train)
    assert torch.equal(ours, sample_ids(ImageDataset([png(i) for i in range(12)], size=8)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"test": "val"}, "has the splits .* and no 'val': set data.train and data.test"),
        ({"image": "img"}, "has the columns .* and no 'img': set data.image and data.label"),
        ({"label": "class"}, "has the columns .* and no 'class'"),
    ],
)
def test_what_a_hugging_face_data_set_has_not(saved, options, said):
    with pytest.raises(ValueError, match=said):
        huggingface(saved, size=8, **options)


def test_without_a_test_split(tmp_path):
    rows(0, 4).save_to_disk(tmp_path / "data")
    train, test = huggingface(str(tmp_path / "data"), size=8)
    assert (len(train), test) == (4, None)


def test_no_hugging_face_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"no data set .*nowhere: set data.path to a folder or a name"):
        huggingface(str(tmp_path / "nowhere"), size=8)


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_new_process")
def test_pretraining_from_shards_is_pretraining_from_a_folder(folder, tmp_path, call_tool):
    """The same images under the same names in the same order: the same run, to the bit."""
    from contrastive_core.run_log import read_metrics
    from cpc.pretrain import main

    unpacked = tmp_path / "unpacked"
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    target = unpacked / Path(file).stem / Path(member.name).name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())
    options = ["steps=3", "batch_size=4", "probe_every=0", "encoder.width=4", "log_every=1", "threads=1"]
    call_tool(main, "data=webdataset", f"data.train={folder}/train-*.tar", f"run_dir={tmp_path}/a", *options)
    call_tool(main, "data=imagefolder", f"data.root={unpacked}", f"run_dir={tmp_path}/b", *options)
    first, second = ([row["loss"] for row in read_metrics(tmp_path / run) if "loss" in row] for run in ("a", "b"))
    assert len(first) == 3
    assert first == second
