"""Files from anyone: what is no plain description, or one of absurd size, is a line and takes no time or memory."""

import json
import time

import pytest
import torch
from torch import nn

from contrastive_core.checkpoint import export_encoder
from contrastive_core.heads import ProjectionHead
from contrastive_core.methods.classifier import Classifier
from contrastive_core.reading import DEEPEST, LARGEST, read_json, read_yaml
from cpc.context import ContextNetwork
from cpc.encoder_card import parts_of
from cpc.encoders import resnet_small
from cpc.features import load_classifier, load_contexts, load_encoder, load_head

BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]\n" for i in range(1, 40))

HOSTILE = [
    ("json", b"", "Expecting value"),
    ("json", b"{", "Expecting property name"),
    ("json", b"\xff\xfe{}", "'utf-8' codec can't decode"),
    ("json", b"\x00" * 100, "Expecting value"),
    ("json", b"[" * 100_000, "it is nested deeper than 32"),
    ("json", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "it is nested deeper than 32"),
    ("json", b"[" * 33 + b"]" * 33, "it is nested deeper than 32"),
    ("json", b"[" + b" " * LARGEST + b"]", "it has more than 1,048,576 bytes"),
    ("json", b"9" * 5000, "Exceeds the limit"),
    ("yaml", b"a: [", "while parsing a flow node"),
    ("yaml", b"\x00", "unacceptable character"),
    ("yaml", b"\xff\xfe\xfd", "'utf-8' codec can't decode"),
    ("yaml", b"- " * 3_000 + b"1", "it is nested deeper than 32"),
    ("yaml", b"[" * 100_000, "it is nested deeper than 32"),
    ("yaml", BOMB.encode(), "it repeats a part by reference"),
    ("yaml", b"&a [*a]", "it repeats a part by reference"),
    ("yaml", b"a: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
    ("yaml", b"a: !!python/name:os.system ''", "could not determine a constructor"),
    ("yaml", b"a: " + b"x" * LARGEST, "it has more than 1,048,576 bytes"),
]


@pytest.mark.parametrize(("kind", "content", "said"), HOSTILE, ids=[f"{k} {s[:30]}" for k, _, s in HOSTILE])
def test_a_hostile_file_is_a_line(tmp_path, kind, content, said):
    file = tmp_path / f"file.{kind}"
    file.write_bytes(content)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"file\.(json|yaml) cannot be read: ") as refused:
        (read_json if kind == "json" else read_yaml)(file)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert time.process_time() - began < 5
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_a_plain_one_is_read(tmp_path):
    file = tmp_path / "file"
    for text, value in (
        ("[[1]]", [[1]]),
        ('{"a": null}', {"a": None}),
        ('{"a": [1, {"b": "x"}]}', {"a": [1, {"b": "x"}]}),
    ):
        file.write_text(text)
        assert read_json(file) == read_yaml(file) == value
    file.write_text("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1))
    read_json(file)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")


ABSURD = [
    ({"width": 10**9}, r"encoder\.json says 1e\+09 where nothing has more than 100000"),
    ({"width": 100_000}, r"final_norm\.bias is \(16,\) in the file, \(400000,\) by the card"),
    ({"blocks": [[[10**7]]]}, r"encoder\.json says 1e\+07 where nothing"),
    ({"blocks": [600, 600]}, r"encoder\.json's blocks is beyond 1000"),
    ({"width": [1] * 2000}, r"encoder\.json's width is beyond 1000"),
    ({"width": -4}, r"resnet_small does not take what encoder\.json gives it: widths=.*pass at least 1"),
]


@pytest.mark.parametrize(("change", "said"), ABSURD, ids=[str(change) for change, _ in ABSURD])
def test_a_card_of_an_encoder_that_no_memory_holds_is_refused(tmp_path, change, said):
    arguments = {"width": 4, "blocks": [1, 1, 1]}
    card = {
        "architecture": {"name": "cpc.encoders.resnet_small", "arguments": arguments | change},
        "input": {"image_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]},
    }
    export_encoder(tmp_path, resnet_small(**arguments), card)
    with pytest.raises(ValueError, match=said):
        load_encoder(tmp_path)


def test_so_are_a_head_and_context_networks_that_no_memory_holds(tmp_path):
    head, networks = ProjectionHead(16, out=8), nn.ModuleDict({"down": ContextNetwork(16, width=4, layers=1)})
    card = {
        "architecture": {"name": "cpc.encoders.resnet_small", "arguments": {"width": 4}},
        "input": {"image_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "patch_size": 4, "stride": 2},
        "head": head.arguments,
        "context": {"networks": {"down": networks["down"].arguments}, "context_of": {"down": "down"}},
    }
    export_encoder(tmp_path, resnet_small(width=4), card, {"head": head, "context": networks})
    load_head(tmp_path)
    assert load_contexts(tmp_path).dim == 32
    card["head"] = head.arguments | {"hidden": 90_000}
    card["context"]["networks"]["down"] = networks["down"].arguments | {"width": 90_000}
    (tmp_path / "encoder.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"not those of the head that its card describes: .* by the card"):
        load_head(tmp_path)
    with pytest.raises(ValueError, match=r"not those of the context networks that its card describes: .* by the card"):
        load_contexts(tmp_path)
    card["head"]["layers"] = card["context"]["networks"]["down"]["layers"] = 10**4  # which take time, not memory
    (tmp_path / "encoder.json").write_text(json.dumps(card))
    for load in (load_head, load_contexts):
        with pytest.raises(ValueError, match=r"encoder\.json's layers is beyond 1000"):
            load(tmp_path)


CLASSIFIERS = [
    ({"head": {"dim": 16, "out": 90_000, "hidden": 90_000}}, r"not those of the classifier that its card describes: "),
    (5, r"has no classifier"),
    ({"class_names": 5}, r"encoder\.json describes a classifier that cannot be built: TypeError"),
    ({"head": {"dim": 16, "out": 8}, "head_layer": "x"}, r"encoder\.json describes a classifier that cannot be built"),
    ({"head": "x"}, r"the card's head is no ProjectionHead's"),
]


@pytest.mark.parametrize(("change", "said"), CLASSIFIERS, ids=[str(change) for change, _ in CLASSIFIERS])
def test_so_is_a_classifier(tmp_path, change, said):
    encoder = resnet_small(width=4)
    described = {"class_names": ["a", "b"], "head": None, "head_layer": 0}
    card = {
        "architecture": {"name": "cpc.encoders.resnet_small", "arguments": {"width": 4}},
        "input": {"image_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]},
        "classifier": described,
    }
    export_encoder(tmp_path, encoder, card, parts_of(Classifier(encoder, classes=2)))
    assert load_classifier(tmp_path)(torch.rand(1, 3, 8, 8)).shape == (1, 2)
    changed = change
    if isinstance(change, dict):
        changed = described | {"head_layer": 1 if "head" in change else 0} | change
    (tmp_path / "encoder.json").write_text(json.dumps(card | {"classifier": changed}))
    with pytest.raises(ValueError, match=said):
        load_classifier(tmp_path)


@pytest.mark.parametrize("mean", [10**400, 1e400, "0", None])
def test_a_mean_that_is_no_colours_is_refused(tmp_path, mean):
    card = {
        "architecture": {"name": "cpc.encoders.resnet_small", "arguments": {"width": 4}},
        "input": {"image_size": 8, "mean": [mean, 0, 0], "std": [1, 1, 1]},
    }
    export_encoder(tmp_path, resnet_small(width=4), card)
    with pytest.raises(ValueError, match=r"encoder\.json is not an encoder's card"):
        load_encoder(tmp_path)


def test_a_card_of_very_many_classes_is_read(tmp_path):
    names = [f"{'a long name of a species ' * 4}{number}" for number in range(12_000)]
    card = {
        "architecture": {"name": "cpc.encoders.resnet_small", "arguments": {"width": 4}},
        "input": {"image_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]},
        "classifier": {"class_names": names, "head": None, "head_layer": 0},
    }
    encoder = resnet_small(width=4)
    export_encoder(tmp_path, encoder, card, parts_of(Classifier(encoder, classes=len(names))))
    assert (tmp_path / "encoder.json").stat().st_size > 1 << 20
    assert load_classifier(tmp_path).class_names == tuple(names)


def test_weights_that_are_none_are_refused(tmp_path):
    card = {
        "architecture": {"name": "cpc.encoders.resnet_small", "arguments": {"width": 4}},
        "input": {"image_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]},
    }
    export_encoder(tmp_path, resnet_small(width=4), card)
    whole = (tmp_path / "encoder.safetensors").read_bytes()
    huge_header = (2**62).to_bytes(8, "little") + whole[8:]
    for content in (b"", whole[:-1], whole[:100], huge_header, b"PK\x03\x04" + whole, json.dumps(card).encode()):
        (tmp_path / "encoder.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"encoder\.safetensors cannot be read: "):
            load_encoder(tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(whole)
    assert load_encoder(tmp_path)(torch.rand(1, 3, 8, 8)).shape == (1, 16)
