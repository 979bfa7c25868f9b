"""Every YAML composes and instantiates, and the ladder's rungs are one step apart."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from contrastive_core.data import Splits
from contrastive_core.randomness import Randomness
from cpc.configs import config_folder
from cpc.entry import build, check_complete
from cpc.patches import grid_side
from cpc.prediction import check_offsets, first_disjoint_offset
from cpc.pretrain import check_numbers
from cpc.run_folder import differing_keys

CONFIGS = Path(config_folder())
LADDER = [
    "ladder_0_v1",
    "ladder_1_capacity",
    "ladder_2_bottom_up",
    "ladder_3_layer_norm",
    "ladder_4_colour_dropping",
    "ladder_5_all_directions",
    "ladder_6_larger_patches",
    "ladder_7_patch_augmentation",
]
REQUIRED = {"parquet": ["data.train=x"], "imagefolder": ["data.root=x"]}
REQUIRED |= {name: ["data.root=x"] for name in ("imagenet", "cifar10", "stl10")}


def names(group):
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def with_data(name):
    return [f"data={name}", *REQUIRED.get(name, [])]


_composed = {}  # composing takes a quarter of a second, and the ladder's rungs are looked at several times


def experiment(compose, name, *overrides):
    """An experiment, with the place of its data."""
    key = (name, *overrides)
    if key not in _composed:
        place = "data.train=x" if name in ("cifar10_cpc", "tinyimagenet_cpc") else "data.root=x"
        _composed[key] = compose(f"experiment={name}", place, *overrides)
    return copy.deepcopy(_composed[key])


@pytest.mark.parametrize("name", names("experiment"))
def test_an_experiment_never_falls_back_on_the_digits(compose, name):
    with pytest.raises(ValueError, match=r"not given: data\.(root|train)"):
        check_complete(compose(f"experiment={name}"))


def resolved(cfg):
    return OmegaConf.to_container(cfg, resolve=True)


def check_instantiates(cfg):
    """Build everything but the data, with the weights on the meta device: nothing is allocated."""
    check_complete(cfg)
    check_numbers(cfg)
    side = grid_side(cfg.image_size, cfg.patch.size, cfg.patch.stride)
    with torch.device("meta"):
        encoder = build(cfg.encoder)
        method = build(cfg.method, encoder=encoder)
        optimizer = build(cfg.optimizer, method.parameters(), _partial_=False)
        features = encoder(torch.empty(2, 3, cfg.patch.size, cfg.patch.size))
    check_offsets(method.offsets, side, side)
    assert features.shape == (2, encoder.dim)
    assert optimizer.param_groups[0]["lr"] == cfg.optimizer.lr
    assert 0 <= build(cfg.schedule)(0.5) <= 1
    views = build(cfg.views)
    black = torch.zeros(2, 3, cfg.load_size, cfg.load_size, dtype=torch.uint8)
    (patches,) = views(black, Randomness(0, 0, torch.arange(2)))
    assert patches.shape == (2, side, side, 3, cfg.patch.size, cfg.patch.size)
    assert patches.isfinite().all()
    return method


@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_instantiates(compose, name):
    check_instantiates(experiment(compose, name))


@pytest.mark.parametrize("name", names("data"))
def test_every_data_set_brings_a_recipe_that_instantiates(compose, name):
    cfg = compose(*with_data(name))
    check_instantiates(cfg)
    assert cfg.data.size == cfg.load_size
    assert cfg.data._target_ in ("contrastive_core.data." + kind for kind in
                                 ("mnist5k", "parquet", "imagefolder", "torchvision_dataset"))  # fmt: skip


@pytest.mark.parametrize("name", [name for name in names("data") if name != "mnist5k"])
def test_photographs_select_the_recipe_for_photographs(compose, name):
    cfg, digits = compose(*with_data(name)), compose()
    assert (cfg.image_size, cfg.patch.size, cfg.patch.stride) == (64, 16, 8)
    assert cfg.views.patch_augment._target_ == "cpc.patch_augment.patch_augment_v2"
    assert digits.views.patch_augment._target_ == "cpc.patch_augment.patch_augment_digits"
    ignored = {"_target_", "train", "test", "root", "name", "download", "size"}
    same = resolved(compose("data=parquet", "data.train=x"))
    assert not [key for key in differing_keys(same, resolved(cfg)) if key.split(".")[-1] not in ignored]


def test_no_override_is_the_digits(compose):
    cfg = compose()
    assert cfg.data._target_ == "contrastive_core.data.mnist5k"
    assert resolved(cfg) == resolved(compose("data=mnist5k"))
    assert resolved(cfg) == resolved(compose("recipe=mnist5k"))
    augment = [step._target_ for step in cfg.views.image_augment] + [cfg.views.patch_augment._target_]
    assert not [name for name in augment if "Flip" in name or name.endswith("_v2")]


def test_a_recipe_for_other_data_and_an_experiment_in_its_place(compose):
    photos = compose("data=mnist5k", "recipe=photos")
    assert photos.image_size == 64
    check_instantiates(photos)
    cfg = experiment(compose, "imagenet_cpc_v2")
    assert "warmup" not in cfg.schedule  # nothing of the data set's own recipe is left
    assert cfg.encoder == {"_target_": "cpc.encoders.resnet161", "norm": "layer"}


@pytest.mark.parametrize("name", names("encoder"))
def test_every_encoder_goes_with_the_digits(compose, name):
    check_instantiates(compose(f"encoder={name}"))


def test_the_papers_recipe_is_the_papers(compose):
    cfg = experiment(compose, "imagenet_cpc_v2")
    assert grid_side(cfg.image_size, cfg.patch.size, cfg.patch.stride) == 6
    assert cfg.method.offsets == [3]
    assert (cfg.batch_size, cfg.optimizer.lr, list(cfg.optimizer.betas)) == (512, 4e-4, [0.8, 0.999])
    assert cfg.method.loss.temperature == 10
    method = check_instantiates(cfg)
    encoder = sum(parameter.numel() for parameter in method.encoder.parameters())
    assert encoder == pytest.approx(305e6, rel=0.01)


def test_offsets_share_no_pixel_unless_a_recipe_says_so(compose):
    for overrides in ([], ["patch.size=16", "image_size=64", "load_size=64", "patch.stride=6"]):
        cfg = compose("recipe=none", "steps=1", "batch_size=1", "load_size=28", "image_size=28", "patch.size=8",
                      "patch.stride=4", *overrides)  # fmt: skip
        assert list(cfg.method.offsets) == [first_disjoint_offset(cfg.patch.size, cfg.patch.stride)]


STEPS = {
    "ladder_1_capacity": {"encoder"},
    "ladder_2_bottom_up": {"method.directions"},
    "ladder_3_layer_norm": {"encoder.norm"},
    "ladder_4_colour_dropping": {"views.patch_augment.channel_drop"},
    "ladder_5_all_directions": {"method.directions"},
    "ladder_6_larger_patches": {"image_size", "patch", "views", "method.offsets"},
    "ladder_7_patch_augmentation": {"views.patch_augment"},
}


@pytest.mark.parametrize("scale", ["imagenet", "small"])
@pytest.mark.parametrize(("below", "rung"), list(itertools.pairwise(LADDER)))
def test_a_rung_of_the_ladder_is_one_step_from_the_one_below(compose, below, rung, scale):
    before, after = (resolved(experiment(compose, name, f"scale@ladder={scale}")) for name in (below, rung))
    changed = [key for key in differing_keys(before, after) if not key.startswith("ladder.")]
    assert changed
    allowed = STEPS[rung]
    assert not [key for key in changed if not any(f"{key}.".startswith(f"{start}.") for start in allowed)]


def test_the_side_rung_is_rung_0_without_a_norm(compose):
    before, after = (resolved(experiment(compose, name)) for name in ("ladder_0_v1", "ladder_0_no_norm"))
    changed = [key for key in differing_keys(before, after) if not key.startswith("ladder.")]
    assert changed == ["encoder.norm"]
    assert (before["encoder"]["norm"], after["encoder"]["norm"]) == ("batch", "none")


def test_the_last_rung_is_cpc_v2(compose):
    rung, paper = (experiment(compose, name) for name in ("ladder_7_patch_augmentation", "imagenet_cpc_v2"))
    differing = differing_keys(resolved(rung), resolved(paper))
    how_it_is_run = {"ladder", "views", "save_every", "log_every", "probe_every", "workers"}
    assert {key.split(".")[0] for key in differing} <= how_it_is_run
    one, other = (build(cfg.views) for cfg in (rung, paper))
    assert str(one) == str(other)
    described = [[{**vars(step), "_modules": None} for step in views.patch_augment.steps] for views in (one, other)]
    assert str(described[0]) == str(described[1])  # the same steps with the same numbers, however they are written
    images = torch.randint(256, (2, 3, 300, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    numbers = Randomness(0, 0, torch.arange(2))
    assert torch.equal(one(images, numbers)[0], other(images, numbers)[0])


@pytest.mark.parametrize("name", LADDER)
def test_the_small_ladder_instantiates(compose, name):
    check_instantiates(experiment(compose, name, "scale@ladder=small"))


def test_every_yaml_belongs_to_a_group_that_is_tested_here():
    groups = {file.parent.name for file in CONFIGS.rglob("*.yaml")} - {CONFIGS.name}
    assert groups <= {"data", "encoder", "experiment", "method", "optimizer", "recipe", "scale", "views"}


def test_splits_are_what_a_data_set_gives(compose):
    splits = build(compose("data.size=8").data)
    assert isinstance(splits, Splits)
    assert splits.train[0].image.shape == (3, 8, 8)


RUNG_VALUES = [
    ("ladder_0_v1", {"directions": ["down"], "offsets": [2], "encoder": "resnet101_v1", "norm": "batch"}),
    ("ladder_1_capacity", {"directions": ["down"], "offsets": [2], "encoder": "resnet161", "norm": "batch"}),
    ("ladder_2_bottom_up", {"directions": ["down", "up"], "norm": "batch"}),
    ("ladder_3_layer_norm", {"norm": "layer", "patch_augment": "patch_augment_v1"}),
    ("ladder_4_colour_dropping", {"channel_drop": 1.0, "directions": ["down", "up"]}),
    ("ladder_5_all_directions", {"directions": ["down", "up", "right", "left"], "offsets": [2]}),
    ("ladder_6_larger_patches", {"offsets": [3], "patch_augment": "patch_augment_v1"}),
    ("ladder_7_patch_augmentation", {"offsets": [3], "patch_augment": "patch_augment_v2", "channel_drop": 1.0}),
    ("ladder_0_no_norm", {"norm": "none", "directions": ["down"]}),
]


@pytest.mark.parametrize(("name", "values"), RUNG_VALUES)
def test_what_each_rung_is(compose, name, values):
    cfg = experiment(compose, name)
    augment = cfg.views.patch_augment
    found = {
        "directions": list(cfg.method.directions),
        "offsets": [int(offset) for offset in cfg.method.offsets],
        "encoder": cfg.encoder._target_.split(".")[-1],
        "norm": cfg.encoder.norm,
        "patch_augment": augment._target_.split(".")[-1],
        "channel_drop": augment.get("channel_drop"),
    }
    assert {key: found[key] for key in values} == values
