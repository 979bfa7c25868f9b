"""What a run's folder says is data: whatever it names beside our readers is refused before anything is called."""

import json
import shutil

import pytest
import yaml

from cpc.distill import settle_ as settle_distillation
from cpc.encoder_card import build_encoder, read_card
from cpc.evaluate import evaluate
from cpc.finetune import settle_
from cpc.foreign import check_plain, is_plain, run_config, run_data
from cpc.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("as_a_new_process")


@pytest.mark.parametrize("value", [1, 0.5, True, None, "word", [], [1, "a", [None]], "a b=$c {d}"])
def test_plain(value):
    assert is_plain(value)
    check_plain({"name": value}, "file")


@pytest.mark.parametrize("value", [{}, {"_target_": "f"}, [{"_target_": "f"}], "${oc.env:HOME}", ["${seed}"], object()])
def test_not_plain(value):
    assert not is_plain(value)
    with pytest.raises(ValueError, match=r"file says name=.*: only numbers, words and lists of these are read from it"):
        check_plain({"name": value}, "file")


@pytest.mark.parametrize("name", ["_partial_", "_args_", 3])
def test_names_that_hydra_acts_upon_are_refused(name):
    with pytest.raises(ValueError, match="only numbers, words"):
        check_plain({name: 1}, "file")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import hydra

    from cpc.configs import config_folder

    folder = tmp_path_factory.mktemp("runs") / "simclr"
    tiny = ["method=simclr", "steps=1", "batch_size=16", "encoder.width=4", "threads=1", "device=cpu", "probe_every=0"]
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        cfg = hydra.compose("pretrain", [*tiny, f"run_dir={folder}"])
    return pretrain(cfg)


@pytest.fixture
def evil(run, tmp_path):
    """`evil(lambda config, card, call: ...)`: a copy of the run, changed, and the file that says that code ran.

    `call` is a node that writes the file when hydra instantiates it: torch is on nobody's list of the forbidden.
    """
    ran = tmp_path / "ran"
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "hubconf.py").write_text(f"import pathlib\ndef m(**_):\n    pathlib.Path({str(ran)!r}).touch()\n")
    call = {"repo_or_dir": str(repository), "model": "m", "source": "local"}

    def changed(change):
        folder = tmp_path / "evil"
        shutil.copytree(run, folder)
        config, card = (
            yaml.safe_load((folder / "config.yaml").read_text()),
            json.loads((folder / "encoder.json").read_text()),
        )
        change(config, card, call)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "encoder.json").write_text(json.dumps(card))
        return folder, ran

    return changed


def nested_in_the_data(config, card, call):
    config["data"]["size"] = {"_target_": "torch.hub.load", **call}


def behind_our_own_prefix(config, card, call):
    config["data"] = {"_target_": "contrastive_core.data.sources.torch.hub.load", **call}


def a_reference_in_the_data(config, card, call):
    config["data"]["size"] = "${oc.env:HOME}"


def in_the_augmentation(config, card, call):
    config["augmentation"]["crop"] = {"_target_": "torch.hub.load", **call}


def nested_in_the_architecture(config, card, call):
    card["architecture"]["arguments"]["width"] = {"_target_": "torch.hub.load", **call}


def in_place_of_first_weights(config, card, call):
    card["architecture"]["arguments"]["pretrained"] = {"_target_": "torch.hub.load", **call}


def as_a_size(config, card, call):
    card["input"]["image_size"] = {"_target_": "torch.hub.load", **call}


BY_CONFIG = [nested_in_the_data, behind_our_own_prefix, a_reference_in_the_data]
ALL = [*BY_CONFIG, in_the_augmentation, nested_in_the_architecture, as_a_size]


@pytest.mark.parametrize("change", ALL)
def test_finetuning_a_hostile_run_calls_nothing(evil, compose, change):
    folder, ran = evil(change)
    with pytest.raises(ValueError, match=r"only numbers, words|is not ours|is not an encoder's card"):
        settle_(compose(f"run={folder}", "labels=20", name="finetune"))
    assert not ran.exists()


@pytest.mark.parametrize("change", [*BY_CONFIG, nested_in_the_architecture, as_a_size])
def test_evaluating_a_hostile_run_calls_nothing(evil, compose, change):
    folder, ran = evil(change)
    with pytest.raises(ValueError, match=r"only numbers, words|is not ours|is not an encoder's card"):
        evaluate(compose(f"run={folder}", "device=cpu", "threads=1", name="evaluate"))
    assert not ran.exists()


def test_where_first_weights_came_from_is_left_out_unread(evil, compose):
    folder, ran = evil(in_place_of_first_weights)
    cfg = compose(f"run={folder}", "labels=20", "data=mnist5k", name="finetune")
    settle_(cfg)
    assert "pretrained" not in cfg.encoder
    card = read_card(folder)[1]
    card["classifier"] = {"class_names": ["a", "b"], "head": None, "head_layer": 0}
    (folder / "encoder.json").write_text(json.dumps(card))
    with pytest.raises(FileNotFoundError, match=r"no classifier\.safetensors"):  # as far as a student could be built
        settle_distillation(compose(f"teacher={folder}", name="distill"))
    assert not ran.exists()


def test_the_same_call_does_run_where_a_user_writes_it(evil):
    """The file appears if anything is called at all: the tests above can fail."""
    from cpc.entry import build

    folder, ran = evil(nested_in_the_data)
    call = yaml.safe_load((folder / "config.yaml").read_text())["data"]["size"]
    build(call)
    assert ran.exists()


def test_what_a_file_gets_wrong_is_one_line(run, tmp_path):
    assert run_data(run)["_target_"] == "contrastive_core.data.mnist5k"
    assert run_config(run / "encoder.safetensors")[0] == run / "config.yaml"
    assert run_config(tmp_path) == (tmp_path / "config.yaml", {})
    for text in ("a: [", "- 1", "\x00"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml (cannot be read|is not a run's configuration)"):
            run_config(tmp_path)
    with pytest.raises(ValueError, match=r"resnet_small does not take what encoder\.json gives it"):
        build_encoder({"name": "cpc.encoders.resnet_small", "arguments": {"depth": 3}})
