"""Encoders written down and read back: the same features, and one clear line where something is wrong."""

import json
from functools import partial

import pytest
import torch
from torch import nn

import cpc
from contrastive_core.checkpoint import export_encoder
from contrastive_core.encoders import MoCoViT, TorchvisionTrunk
from cpc.context import ContextNetwork
from cpc.encoder_card import build_encoder, constructors, parts_card, parts_of
from cpc.encoders import resnet_small
from cpc.features import load_encoder, untrained_encoder
from cpc.frozen_encoder import FrozenEncoder
from cpc.method import CPC
from cpc.patches import extract_patches
from cpc.views import normalise

INPUT = {
    "image_size": 16,
    "patch_size": 8,
    "stride": 4,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.5],
}
CARD = {
    "architecture": {"name": "cpc.encoders.resnet_small", "arguments": {"width": 4, "blocks": [1, 1]}},
    "input": INPUT,
    "dim": 8,
    "method": "CPC",
}


def trained(norm="layer"):
    torch.manual_seed(0)
    encoder = resnet_small(4, blocks=(1, 1), norm=norm).to(memory_format=torch.channels_last)
    for parameter in encoder.parameters():  # away from any initialisation
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder


def images(size=16, count=3):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run(tmp_path):
    export_encoder(tmp_path, trained(), CARD)
    return tmp_path


def by_hand(encoder, pixels):
    """Features of a patch grid, a patch at a time."""
    patches = extract_patches(normalise(pixels, INPUT["mean"], INPUT["std"]), 8, 4)
    b, rows, cols = patches.shape[:3]
    grid = [encoder(patches[i, r, c][None])[0] for i in range(b) for r in range(rows) for c in range(cols)]
    return torch.stack(grid).view(b, rows, cols, -1)


def test_what_was_trained_is_what_is_read(run):
    expected = by_hand(trained(), images()).detach()
    assert expected.shape == (3, 3, 3, 8)
    for path in (run, str(run), run / "encoder.safetensors"):
        torch.testing.assert_close(load_encoder(path, readout="grid")(images()), expected, rtol=1e-4, atol=1e-5)
    encoder = cpc.load_encoder(run)
    torch.testing.assert_close(encoder(images()), expected.mean((1, 2)), rtol=1e-4, atol=1e-5)
    assert encoder.dim == 8


def test_it_is_frozen(run):
    encoder = load_encoder(run)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(images()).requires_grad
    assert isinstance(encoder, nn.Module)


def test_thawed_it_learns_what_its_architecture_lets_learn(run, tmp_path):
    """MoCo's ViT keeps its patch projection as it was built, fine-tuned too."""
    frozen = load_encoder(run)
    assert all(weight.requires_grad for weight in frozen.thawed().parameters())
    assert not any(weight.requires_grad for weight in frozen.parameters())

    arguments = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "heads": 3}
    card = {"architecture": {"name": "contrastive_core.encoders.MoCoViT", "arguments": arguments}, "dim": 24}
    inputs = {"image_size": 16, "patch_size": None, "stride": None, "mean": INPUT["mean"], "std": INPUT["std"]}
    export_encoder(tmp_path, MoCoViT(**arguments), card | {"input": inputs})
    thawed = load_encoder(tmp_path).thawed()
    kept = [name for name, weight in thawed.named_parameters() if not weight.requires_grad]
    assert kept == ["encoder.trunk.patch_embed.proj.weight", "encoder.trunk.patch_embed.proj.bias"]


@pytest.mark.parametrize("mode", ["patches", "image"])
def test_the_mean_of_the_grid_is_the_mean_readout(run, mode):
    encoder = load_encoder(run, mode=mode)
    mean = encoder(images())
    encoder.readout = "grid"
    grid = encoder(images())
    assert grid.shape == (3, 3, 3, 8) if mode == "patches" else (3, 8, 8, 8)
    torch.testing.assert_close(grid.mean((1, 2)), mean)


def test_an_image_of_one_patch_is_the_same_in_both_modes():
    inputs = INPUT | {"image_size": 8}
    patch, whole = (FrozenEncoder(trained(), **inputs, mode=mode) for mode in ("patches", "image"))
    torch.testing.assert_close(patch(images(8)), whole(images(8)))


def test_another_size_is_resized_on_its_short_side_and_cropped_at_the_centre(run):
    encoder = load_encoder(run)
    wide = torch.zeros(2, 3, 16, 30)
    wide[..., 7:23] = images(16, 2)  # the short side fits already: nothing but a crop
    assert torch.equal(encoder(wide), encoder(images(16, 2)))
    large = images(16, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert encoder(large).shape == (2, 8)
    flat = torch.full((1, 3, 40, 64), 0.25)
    torch.testing.assert_close(encoder(flat), encoder(torch.full((1, 3, 16, 16), 0.25)))
    assert encoder(images(5, 1)).shape == (1, 8)  # smaller than a patch: enlarged


def test_it_takes_the_images_of_any_float_type(run):
    encoder = load_encoder(run)
    expected = encoder(images())
    torch.testing.assert_close(encoder(images().double()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(images().bfloat16()).float(), expected, rtol=0.1, atol=0.05)
    assert encoder.double()(images()).dtype == torch.float64


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        torch.zeros(3, 16, 16),
        torch.zeros(2, 1, 16, 16),
        torch.zeros(2, 16, 16, 3),
        torch.zeros(2, 3, 16, 16, dtype=torch.int64),
    ],
    ids=lambda wrong: f"{wrong.dtype} {tuple(wrong.shape)}",
)
def test_wrong_images_are_named(run, wrong):
    with pytest.raises(ValueError, match=r"images have shape .* and dtype .*: pass floats b 3 h w in \[0, 1\]"):
        load_encoder(run)(wrong)


def test_wrong_modes_and_readouts_are_named(run):
    for wrong in ({"mode": "pixels"}, {"readout": "max"}):
        with pytest.raises(ValueError, match="pass one of"):
            load_encoder(run, **wrong)(images())
    inputs = INPUT | {"patch_size": None, "stride": None}
    assert FrozenEncoder(trained(), **inputs).mode == "image"
    with pytest.raises(ValueError, match='has no patch grid: pass mode="image"'):
        FrozenEncoder(trained(), **inputs, mode="patches")(images())


def rewrite_card(run, **changes):
    (run / "encoder.json").write_text(json.dumps(CARD | changes))


@pytest.mark.parametrize("name", ["os.system", "cpc.encoders.ResidualBlock", "cpc.encoders.ENCODERS", "torch.load"])
def test_a_card_calls_no_other_code(run, name):
    rewrite_card(run, architecture={"name": name, "arguments": {}})
    with pytest.raises(ValueError, match=rf"encoder '{name}' is not one of .*cpc\.encoders\.resnet161"):
        load_encoder(run)


def test_a_broken_card_is_named(run):
    for text in (
        "{",
        "[]",
        json.dumps({"input": INPUT}),
        json.dumps(CARD | {"architecture": {"name": "x"}}),
        json.dumps(CARD | {"architecture": {"name": ["x"], "arguments": {}}}),
        json.dumps(CARD | {"architecture": {"name": "x", "arguments": [1]}}),
    ):
        (run / "encoder.json").write_text(text)
        with pytest.raises(ValueError, match=r"encoder\.json (is not an encoder's card|cannot be read: Expecting)"):
            load_encoder(run)
    rewrite_card(run, architecture=CARD["architecture"] | {"arguments": {"width": 8, "blocks": [1, 1]}})
    with pytest.raises(ValueError, match=r"the weights in .*encoder\.safetensors are not those of the encoder that"):
        load_encoder(run)
    rewrite_card(run)
    (run / "encoder.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"the weights in .*encoder\.safetensors"):
        load_encoder(run)


def test_missing_files_are_named(run):
    with pytest.raises(FileNotFoundError, match=r"no typo in .*: pass the folder of a finished run"):
        load_encoder(run / "typo")
    with pytest.raises(FileNotFoundError, match=r"no other\.safetensors in"):  # not another file of the folder
        load_encoder(run / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"pass the folder of a finished run, or its encoder\.safet"):
        load_encoder(run / "encoder.json")
    (run / "encoder.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no encoder\.json in"):
        load_encoder(run)
    (run / "encoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no encoder\.safetensors in"):
        load_encoder(run)


def test_an_untrained_encoder_is_the_same_architecture_at_random(run):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    encoder = untrained_encoder(run, readout="grid")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(encoder(images()), untrained_encoder(run, readout="grid")(images()))
    assert not torch.isclose(encoder(images()), untrained_encoder(run, seed=1, readout="grid")(images())).all()
    assert encoder(images()).shape == load_encoder(run, readout="grid")(images()).shape


def test_every_constructor_can_be_named():
    assert {"cpc.encoders.resnet161", "cpc.encoders.resnet_small", "contrastive_core.encoders.TorchvisionTrunk"} <= set(
        constructors()
    )
    with torch.device("meta"):
        for name in ("resnet161", "resnet50", "resnet101_v1"):
            assert build_encoder({"name": f"cpc.encoders.{name}", "arguments": {"norm": "layer"}}).dim > 0


def test_batch_norms_statistics_travel_with_the_weights(tmp_path):
    encoder = trained(norm="batch")
    encoder(images() * 3)  # in training mode
    architecture = {"name": "cpc.encoders.resnet_small", "arguments": {"width": 4, "blocks": [1, 1], "norm": "batch"}}
    export_encoder(tmp_path, encoder, CARD | {"architecture": architecture})
    expected = by_hand(encoder.eval(), images()).mean((1, 2))
    torch.testing.assert_close(load_encoder(tmp_path)(images()), expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_torchvision_trunk_of_whole_images(tmp_path):
    torch.manual_seed(0)
    trunk = TorchvisionTrunk("resnet18", node="layer2")
    architecture = {
        "name": "contrastive_core.encoders.TorchvisionTrunk",
        "arguments": {"name": "resnet18", "node": "layer2"},
    }
    inputs = {"image_size": 32, "patch_size": None, "stride": None, "mean": INPUT["mean"], "std": INPUT["std"]}
    export_encoder(tmp_path, trunk, {"architecture": architecture, "input": inputs, "dim": trunk.dim})
    encoder = load_encoder(tmp_path)
    expected = trunk.eval()(normalise(images(32), INPUT["mean"], INPUT["std"])).detach()
    torch.testing.assert_close(encoder(images(32)), expected, rtol=1e-4, atol=1e-5)
    encoder.readout = "grid"
    assert encoder(images(32)).shape == (3, 4, 4, 128)
    assert encoder.mode == "image"


def test_reading_a_pretrained_trunk_fetches_nothing(monkeypatch):
    timm = pytest.importorskip("timm")
    asked = []

    def create_model(name, **arguments):
        asked.append((name, arguments))
        return nn.Module()

    monkeypatch.setattr(timm, "create_model", create_model)
    arguments = {"name": "resnet18", "pretrained": True, "checkpoint_path": "weights.pth", "in_chans": 3}
    with pytest.raises(ValueError, match="has no attribute 'num_features'"):  # a bare module is no trunk
        build_encoder({"name": "contrastive_core.encoders.TimmTrunk", "arguments": arguments})
    assert asked == [("resnet18", {"num_classes": 0, "in_chans": 3})]


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "raft_small", "none"])
def test_a_trunk_that_torchvision_would_fetch_weights_for_is_refused(monkeypatch, name):
    """A detector's builder loads its trunk's from the network, or from a cache, as a pickle."""

    def fetch(*arguments, **options):
        pytest.fail("it fetches")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", fetch)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(ValueError, match=rf"'{name}' is none of torchvision's classifiers: pass resnet18, say"):
        build_encoder({"name": "contrastive_core.encoders.TorchvisionTrunk", "arguments": {"name": name}})


@pytest.mark.parametrize(("name", "arguments"), [
    ("contrastive_core.encoders.TimmTrunk", {"name": "resnet18", "act_layer": "eval"}),
    ("contrastive_core.encoders.MoCoViT", {"patch_size": 0}),
    ("contrastive_core.encoders.MoCoViT", {"heads": 0}),
])  # fmt: skip
def test_whatever_a_constructor_raises_is_the_cards_fault(name, arguments):
    with pytest.raises(ValueError, match="does not take what encoder"):
        build_encoder({"name": name, "arguments": arguments})


def test_an_architecture_of_ones_own_is_handed_over(run):
    expected = load_encoder(run)(images())
    rewrite_card(run, architecture={"name": "my.Encoder", "arguments": {}})
    with pytest.raises(ValueError, match=r"pass load_encoder\(path, encoder=MODULE\)"):
        load_encoder(run)
    found = load_encoder(run, encoder=build_encoder(CARD["architecture"]))(images())
    torch.testing.assert_close(found, expected)


def test_things_are_as_large_as_in_training():
    """Trained on crops of 20 px from 24: an image of 48 px is resized to 24 and cropped, one of 20 px fed as it is."""
    mean = resnet_small(4)
    mean.forward = lambda pixels: pixels.mean((2, 3))
    encoder = FrozenEncoder(mean, image_size=20, load_size=24, mean=[0, 0, 0], std=[1, 1, 1])
    pixels = torch.zeros(1, 3, 48, 48)
    pixels[:, :, 4:44, 4:44] = 1  # the middle 40 of 48 px become the 20 of 24 that are kept
    torch.testing.assert_close(encoder(pixels), torch.ones(1, 3), rtol=0, atol=4e-2)  # the border is blurred
    assert encoder(torch.zeros(1, 3, 20, 20)).sum() == 0


@pytest.mark.parametrize("given", [(12, 12), (20, 36), (32, 32), (40, 30), (64, 64), (96, 70)])
@pytest.mark.parametrize(("image_size", "load_size"), [(64, 32), (20, 24), (32, 32), (64, None), (32, 16)])
def test_no_image_is_put_into_a_frame(image_size, load_size, given):
    """Trained on crops enlarged to 64 px from 32: what is fed to the encoder is all image, as it was in training."""
    seen = resnet_small(4)
    seen.forward = lambda pixels: pixels.flatten(1)
    encoder = FrozenEncoder(seen, image_size=image_size, load_size=load_size, mean=[0, 0, 0], std=[1, 1, 1])
    pixels = encoder(torch.ones(1, 3, *given)).view(1, 3, image_size, image_size)
    torch.testing.assert_close(pixels, torch.ones_like(pixels))


def test_an_image_of_the_load_size_is_enlarged_whole():
    """32 -> 64: all of it is seen, twice as large, as a crop of training that is all of the image."""
    seen = resnet_small(4)
    seen.forward = lambda pixels: pixels.flatten(1)
    encoder = FrozenEncoder(seen, image_size=64, load_size=32, mean=[0, 0, 0], std=[1, 1, 1])
    images_of_training = images(32)
    expected = nn.functional.interpolate(images_of_training, (64, 64), mode="bilinear")
    torch.testing.assert_close(encoder(images_of_training).view(3, 3, 64, 64), expected)


@pytest.fixture
def cpc_run(tmp_path):
    """A CPC run's exports, contexts included, and the method they are of."""
    torch.manual_seed(1)
    method = CPC(trained(), offsets=[1], context=partial(ContextNetwork, width=4, layers=1), target_dim=4)
    card = CARD | parts_card(method, [])
    export_encoder(tmp_path, method.encoder, card, parts_of(method))
    return tmp_path, method


def test_a_cpc_runs_contexts_are_read_back(cpc_run):
    folder, method = cpc_run
    encoder = load_encoder(folder, readout="context")
    grid, both = load_encoder(folder, readout="grid")(images()), encoder(images())
    assert encoder.grid_dim == 5 * encoder.dim == both.shape[-1] == 40
    assert torch.equal(both[..., :8], grid)
    assert torch.equal(both[..., 8:16], method.contexts["down"](grid))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.readout = "grid"
    assert encoder.grid_dim == 8
    untrained = untrained_encoder(folder, readout="context")
    assert torch.equal(untrained(images()), untrained_encoder(folder, readout="context")(images()))
    assert not torch.allclose(untrained(images()), both)


def test_contexts_that_there_are_not_are_named(cpc_run):
    folder, _ = cpc_run
    wanted = 'readout="context" wants the context networks of a CPC run and its patches'
    with pytest.raises(ValueError, match=wanted):
        load_encoder(folder, readout="context", mode="image")
    encoder = load_encoder(folder, mode="image")
    encoder.readout = "context"
    with pytest.raises(ValueError, match=wanted):
        encoder(images())
    for named in ({"readout": "patch"}, {"mode": "img"}):
        with pytest.raises(ValueError, match="pass one of"):
            load_encoder(folder, **named)
    (folder / "context.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no context\.safetensors"):
        load_encoder(folder, readout="context")
    export_encoder(folder, trained(), CARD)  # as of another method
    with pytest.raises(ValueError, match=r'has no context networks \(CPC\): pass readout="grid"'):
        load_encoder(folder, readout="context")


@pytest.mark.parametrize(
    "described", [{"networks": {}}, {"networks": {"a": {"dim": 8}}, "context_of": {"down": "b"}}, {"networks": 3}]
)
def test_a_card_of_contexts_that_cannot_be_is_named(cpc_run, described):
    folder, _ = cpc_run
    card = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps(card | {"context": described}))
    with pytest.raises(ValueError, match="context networks"):
        load_encoder(folder, readout="context")
