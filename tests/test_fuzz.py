"""Files that anything may have happened to: each is read as it was, or refused in words, and never anything else."""

from __future__ import annotations

import copy
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from contrastive_core.checkpoint import export_encoder, latest_checkpoint, load_checkpoint_, save_checkpoint
from contrastive_core.data import ImageDataset, webdataset
from cpc.encoders import PatchResNet
from cpc.features import load_encoder
from cpc.foreign import run_config, run_data

EXAMPLES = int(os.environ.get("FUZZ", "60"))  # FUZZ=5000 looks longer
CASES = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CARD = {
    "architecture": {
        "name": "cpc.encoders.PatchResNet",
        "arguments": {"blocks": [1, 1], "widths": [4, 8], "stem": "small", "stem_width": 4, "norm": "layer"},
    },
    "input": {
        "load_size": 28,
        "image_size": 24,
        "patch_size": 8,
        "stride": 4,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
    "dim": 8,
    "method": "CPC",
}
CONFIG = {
    "seed": 0,
    "data": {"_target_": "contrastive_core.data.parquet", "train": "train.parquet", "test": None, "size": 24},
    "method": {"_target_": "cpc.method.CPC", "offsets": [3, 4]},
}
numbers = st.integers() | st.integers(-4, 300) | st.floats()
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.just("cpc.encoders.resnet50"))
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value, path=()):
    """The paths of all values within a JSON value."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def changed(value, path, new):
    """A copy in which another value stands at `path`."""
    if not path:
        return new
    value = copy.deepcopy(value)
    within = value
    for key in path[:-1]:
        within = within[key]
    within[path[-1]] = new
    return value


def damaged(content: bytes, edits: list[tuple[int, int]], end: int | None) -> bytes:
    """Bytes of which some are others, and the rest may be missing."""
    written = bytearray(content)
    for place, byte in edits:
        written[place % len(written)] = byte
    return bytes(written[:end])


edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4)
ends = st.none() | st.integers(0, 1 << 14)


def refused_or(read):
    """What `read` returns, None where it refuses in one line."""
    try:
        return read()
    except (ValueError, OSError) as error:
        said = str(error)
        assert said
        assert "\n" not in said
        return None


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export_encoder(folder, PatchResNet(**CARD["architecture"]["arguments"]), CARD)
    assert load_encoder(folder)(torch.zeros(1, 3, 28, 28)).shape == (1, 8)
    return folder


@CASES
@given(st.sampled_from(list(places(CARD))), anything)
def test_cards(exported, path, value):
    (exported / "encoder.json").write_text(json.dumps(changed(CARD, path, value)))
    encoder = refused_or(lambda: load_encoder(exported))
    if encoder is not None:
        assert encoder(torch.zeros(1, 3, 28, 28)).shape == (1, 8)


@CASES
@given(edits, ends)
def test_cards_bytes(exported, edits, end):
    (exported / "encoder.json").write_bytes(damaged(json.dumps(CARD).encode(), edits, end))
    refused_or(lambda: load_encoder(exported))


@CASES
@given(edits, ends)
def test_weights(exported, edits, end):
    (exported / "encoder.json").write_text(json.dumps(CARD))
    weights = exported / "encoder.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(damaged(content, edits, end))
        refused_or(lambda: load_encoder(exported))
    finally:
        weights.write_bytes(content)


@CASES
@given(st.sampled_from(list(places(CONFIG))), anything)
def test_configurations(tmp_path, path, value):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed(CONFIG, path, value)))
    refused_or(lambda: run_config(tmp_path))
    refused_or(lambda: run_data(tmp_path))


@CASES
@given(st.sampled_from(["net.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]), edits, ends)
def test_checkpoints(tmp_path_factory, name, edits, end):
    """One that is not as it was written is never gone on from, but for a manifest that says the same in other bytes."""
    folder, net = tmp_path_factory.mktemp("checkpoints"), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    file = save_checkpoint(folder, 1, {"net": net}, optimizer, {}) / name
    content = file.read_bytes()
    file.write_bytes(damaged(content, edits, end))
    checkpoint = refused_or(lambda: latest_checkpoint(folder))
    assert checkpoint is None or name == "manifest.json" or file.read_bytes() == content
    if checkpoint is not None:
        assert load_checkpoint_(checkpoint, {"net": net}, optimizer)["step"] == 1


def picture(kind: str) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((20, 16), 50).save(content, kind)
    return content.getvalue()


PICTURES = {kind: picture(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")}


@CASES
@given(st.sampled_from(sorted(PICTURES)), edits, ends)
def test_images(kind, edits, end):
    """Pixels of the right size, or another image with the reason."""
    sample = ImageDataset([damaged(PICTURES[kind], edits, end), PICTURES["PNG"]], size=8)[0]
    assert sample.image.shape == (3, 8, 8)
    assert sample.image.dtype == torch.uint8
    assert (sample.index == 0) == (sample.fault == "")


def shard() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in (("a.png", PICTURES["PNG"]), ("a.cls", b"1"), ("b.jpg", PICTURES["JPEG"]), ("b.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


SHARD = shard()


@CASES
@given(edits, ends)
def test_shards(tmp_path_factory, edits, end):
    file: Path = tmp_path_factory.mktemp("shards") / "a.tar"
    file.write_bytes(damaged(SHARD, edits, end))
    splits = refused_or(lambda: webdataset(file, size=8, cache=False))
    for i in range(len(splits.train)) if splits is not None else ():
        sample = refused_or(lambda i=i: splits.train[i])
        assert sample is None or sample.image.shape == (3, 8, 8)
