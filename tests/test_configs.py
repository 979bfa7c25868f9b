"""Every YAML composes and instantiates, experiments have their papers' numbers, the ladder's rungs are a step apart.

The experiments are run for a step in tests/test_recipes.py.
"""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from contrastive_core.data import Splits, batch_indices
from contrastive_core.optim import parameter_groups
from contrastive_core.randomness import Randomness
from cpc.configs import config_folder
from cpc.entry import build, check_complete, epochs
from cpc.foreign import READERS
from cpc.patches import grid_side
from cpc.prediction import check_offsets, first_disjoint_offset
from cpc.pretrain import main_of_any_method
from cpc.run import check_numbers
from cpc.run_folder import differing_keys
from cpc.unread_keys import unread_keys

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
REQUIRED |= {"webdataset": ["data.train=x"], "huggingface": ["data.path=x"]}
REQUIRED |= {name: ["data.root=x"] for name in ("imagenet", "cifar10", "stl10")}


def names(group):
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


METHODS = names("method")
EXPERIMENTS = [
    name for name in names("experiment") if not any(tool in name for tool in ("finetune", "distill", "detection"))
]  # of pretrain.yaml
PATCHES = [name for name in EXPERIMENTS if name.startswith("ladder") or "_cpc" in name]
IMAGES = [name for name in EXPERIMENTS if name not in PATCHES]


def with_data(name):
    return [f"data={name}", *REQUIRED.get(name, [])]


_composed = {}  # composing takes a quarter of a second, and the ladder's rungs are looked at several times


def experiment(compose, name, *overrides):
    """An experiment, with the place of its data."""
    key = (name, *overrides)
    if key not in _composed:
        place = "data.train=x" if name.startswith(("cifar10", "tinyimagenet")) else "data.root=x"
        _composed[key] = compose(f"experiment={name}", place, *overrides, name="pretrain")
    return copy.deepcopy(_composed[key])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_lacks_the_place_of_its_data_and_nothing_else(compose, name):
    cfg = experiment(compose, name)
    check_complete(cfg)
    (place,) = [key for key in ("root", "train") if cfg.data.get(key) == "x"]
    cfg.data[place] = "???"
    with pytest.raises(ValueError, match=rf"not given: data\.{place}; pass"):
        check_complete(cfg)


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


@pytest.mark.parametrize("name", PATCHES)
def test_every_experiment_on_patches_instantiates(compose, name):
    check_instantiates(experiment(compose, name))


def check_method_on_images(cfg):
    """Build everything but the data, with the weights on the meta device; returns the method and its optimizer."""
    check_complete(cfg)
    check_numbers(cfg)
    filled = {name: 100 for name in ("images", "classes") if name in cfg.method}
    with torch.device("meta"):
        encoder = build(cfg.encoder)
        method = build(cfg.method, encoder=encoder, **filled)
        features = encoder(torch.empty(2, 3, cfg.image_size, cfg.image_size))
        groups = parameter_groups(
            method, exclude=cfg.exclude, exclude_also=cfg.exclude_also, constant_rate=cfg.constant_rate
        )
        optimizer = build(cfg.optimizer, groups, _partial_=False)
    assert features.shape == (2, encoder.dim)
    assert 0 <= build(cfg.schedule)(0.5) <= 1
    black = torch.zeros(2, 3, cfg.load_size, cfg.load_size, dtype=torch.uint8)
    views = build(cfg.views)(black, Randomness(0, 0, torch.arange(2)))
    whole = (2, 3, cfg.image_size, cfg.image_size)
    assert views[0].shape == whole
    target = cfg.method._target_.split(".")[-1]
    assert len(views) == (1 if target == "Classifier" else 2)
    assert all(view.shape == whole or (target == "PIRL" and view.shape[:3] == (2, 9, 3)) for view in views)
    assert all(view.isfinite().all() for view in views)
    return method, optimizer


@pytest.mark.parametrize("name", IMAGES)
def test_every_experiment_on_images_instantiates(compose, name):
    cfg = experiment(compose, name)
    assert cfg.data.size == cfg.load_size
    check_method_on_images(cfg)


@pytest.mark.parametrize("data", ["mnist5k", "parquet"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "cpc"])
def test_every_method_goes_with_digits_and_with_photographs(compose, name, data):
    cfg = compose(f"method={name}", *with_data(data), name="pretrain")
    method, _ = check_method_on_images(cfg)
    assert cfg.norm == "batch"  # the papers' encoders; CPC's have LayerNorm
    assert any(isinstance(layer, torch.nn.BatchNorm2d) for layer in method.encoder.modules())
    assert data == "parquet" or (cfg.augmentation.flip, cfg.augmentation.solarise) == (0, 0)  # digits have a handedness
    assert (cfg.image_size, cfg.augmentation.strength) == ((28, 1.0) if data == "mnist5k" else (64, 0.5))


@pytest.mark.parametrize("name", [name for name in names("data") if name != "mnist5k"])
def test_photographs_select_the_recipe_for_photographs_whatever_their_data_set(compose, name):
    cfg = resolved(compose("method=simclr", *with_data(name), name="pretrain"))
    same = resolved(compose("method=simclr", "data=parquet", "data.train=x", name="pretrain"))
    assert {key.split(".")[0] for key in differing_keys(same, cfg)} <= {"data"}


def test_pretrain_cpc_is_pretrain_with_method_cpc(compose):
    assert resolved(compose()) == resolved(compose("method=cpc", name="pretrain"))


SGD, LARS = "torch.optim.SGD", "contrastive_core.optim.LARS"
# as the papers and published codes have them, written out a second time: a wrong digit must be wrong twice
NUMBERS = {
    "imagenet_simclr": {"steps": 31200, "batch_size": 4096, "optimizer._target_": LARS, "optimizer.lr": 4.8,
                        "optimizer.weight_decay": 1e-6, "optimizer.convention": "simclr", "optimizer.trust": 1e-3,
                        "exclude": True, "global_batch_norm": True, "method.loss.temperature": 0.1,
                        "schedule.warmup": 0.1, "method.head.layers": 2, "method.head.out": 128},
    "imagenet_simclr_v2": {"steps": 249600, "batch_size": 4096, "optimizer._target_": LARS, "optimizer.lr": 6.4,
                           "optimizer.weight_decay": 5e-5, "exclude": True, "method.temperature": 0.1,
                           "method.head.layers": 3, "method.memory": 65536, "method.momentum": 0.999,
                           "encoder.depth": 50, "encoder.width": 1, "encoder.sk": False},
    "imagenet_simclr_v2_152_3x_sk": {"steps": 249600, "encoder.depth": 152, "encoder.width": 3, "encoder.sk": True},
    "imagenet_moco_v1": {"steps": 1000800, "batch_size": 256, "optimizer._target_": SGD, "optimizer.lr": 0.03,
                         "optimizer.weight_decay": 1e-4, "optimizer.momentum": 0.9, "exclude": False,
                         "global_batch_norm": False, "method.temperature": 0.07, "method.head.layers": 1,
                         "method.queue_size": 65536, "method.momentum": 0.999, "method.bn_groups": 8,
                         "schedule.at": [0.6, 0.8]},
    "imagenet_moco_v2": {"steps": 1000800, "batch_size": 256, "optimizer.lr": 0.03, "optimizer.weight_decay": 1e-4,
                         "exclude": False, "global_batch_norm": False, "method.temperature": 0.2,
                         "method.head.layers": 2, "method.head.norm": False, "method.queue_size": 65536,
                         "method.momentum": 0.999},
    "imagenet_moco_v3": {"steps": 31200, "batch_size": 4096, "optimizer._target_": LARS, "optimizer.lr": 9.6,
                         "optimizer.weight_decay": 1e-6, "optimizer.convention": "moco_v3", "exclude": True,
                         "method.temperature": 1.0, "method.momentum": 0.99, "method.head.output_norm": "plain",
                         "method.head.layers": 2, "schedule.warmup": 0.1},
    "imagenet_moco_v3_vit": {"steps": 93600, "batch_size": 4096, "optimizer._target_": "torch.optim.AdamW",
                             "optimizer.lr": 2.4e-3, "optimizer.weight_decay": 0.1, "exclude": False,
                             "method.temperature": 0.2, "method.head.layers": 3,
                             "method.predictor.output_norm": "plain", "encoder.image_size": 224,
                             "augmentation.crop": [0.08, 1.0]},
    "imagenet_pirl": {"steps": 1000800, "batch_size": 1024, "optimizer.lr": 0.12, "optimizer.weight_decay": 1e-4,
                      "exclude": True, "method.temperature": 0.07, "method.negatives": 32000,
                      "method.momentum": 0.5, "method.form": "nce"},
    "imagenet_byol": {"steps": 312000, "batch_size": 4096, "optimizer._target_": LARS, "optimizer.lr": 3.2,
                      "optimizer.weight_decay": 1.5e-6, "exclude": True, "global_batch_norm": True,
                      "method.momentum": 0.996, "schedule.warmup": 0.01, "method.head.hidden": 4096,
                      "method.head.out": 256},
    "imagenet_simsiam": {"steps": 250200, "batch_size": 512, "optimizer._target_": SGD, "optimizer.lr": 0.1,
                         "optimizer.weight_decay": 1e-4, "exclude": False, "global_batch_norm": True,
                         "constant_rate": ["predictor"], "method.head.layers": 3, "method.predictor.hidden": 512},
    "imagenet_supervised": {"steps": 450360, "batch_size": 256, "optimizer.lr": 0.1, "optimizer.weight_decay": 1e-4},
    "imagenet100_simclr": {"steps": 197600, "batch_size": 256, "optimizer.lr": 1.2, "method.loss.temperature": 0.2},
    "imagenet100_moco_v2": {"steps": 197600, "optimizer.lr": 0.3, "method.queue_size": 65536, "method.momentum": 0.99},
    "imagenet100_byol": {"steps": 197600, "optimizer.lr": 0.45, "method.momentum": 0.99,
                         "method.predictor.hidden": 8192, "method.head.hidden": 4096},
    "cifar10_simclr": {"steps": 97000, "batch_size": 512, "optimizer._target_": LARS, "optimizer.lr": 2.0,
                       "optimizer.weight_decay": 5e-5, "exclude": True, "method.loss.temperature": 0.5,
                       "augmentation.strength": 0.5, "augmentation.blur": 0.0, "encoder.small_stem": True},
    "cifar10_moco_v2": {"steps": 19400, "batch_size": 512, "optimizer.lr": 0.06, "optimizer.weight_decay": 5e-4,
                        "exclude": False, "method.temperature": 0.1, "method.queue_size": 4096,
                        "method.momentum": 0.99, "method.bn_groups": 8, "method.head.layers": 1,
                        "augmentation.crop": [0.08, 1.0], "augmentation.strength": None},
    "cifar10_byol": {"steps": 77600, "batch_size": 512, "optimizer.lr": 0.24, "optimizer.weight_decay": 5e-4,
                     "exclude": False, "method.momentum": 0.99},
    "cifar10_raft": {"steps": 77600, "method.momentum": 0.996, "method.align": 1.0, "method.cross": -1.0},
    "cifar10_byol_prime": {"steps": 77600, "method.momentum": 0.996, "method.align": 1.0, "method.cross": 1.0},
    "cifar10_simsiam": {"steps": 77600, "batch_size": 512, "optimizer.lr": 0.06, "optimizer.weight_decay": 5e-4,
                        "exclude": False, "constant_rate": ["predictor"], "method.head.layers": 2,
                        "augmentation.blur": 0.0},
    "cifar10_moco_v3": {"steps": 97000, "method.temperature": 0.2, "method.head.hidden": 4096},
    "cifar10_pirl": {"steps": 19400, "method.negatives": 4096, "method.temperature": 0.07},
    "cifar10_margin": {"steps": 19400, "method.loss.margin": 1.0},
    "cifar10_supervised": {"steps": 78000, "batch_size": 128, "optimizer.lr": 0.1, "optimizer.weight_decay": 5e-4},
    "tinyimagenet_simclr": {"steps": 39000, "image_size": 64, "load_size": 64, "method.loss.temperature": 0.5},
    "tinyimagenet_byol": {"steps": 39000, "image_size": 64, "load_size": 64},
    "tinyimagenet_moco_v2": {"steps": 39000, "image_size": 64, "load_size": 64, "method.queue_size": 4096},
    "stl10_simclr": {"steps": 41000, "image_size": 96, "load_size": 96, "encoder.name": "resnet18"},
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_an_experiment_has_its_papers_numbers(compose, name):
    cfg = experiment(compose, name)
    for key, value in NUMBERS[name].items():
        found = OmegaConf.select(cfg, key)
        assert found == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), key


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith(("cifar10", "tiny", "stl10"))])
def test_images_of_another_size_are_loaded_as_large(compose, name):
    """Small images are as large as they are seen: 48 px of them are not an enlarged 32, nor a corner of 64."""
    cfg = experiment(compose, name, "image_size=48")
    assert (cfg.load_size, cfg.data.size) == (48, 48)


def test_a_batch_of_another_size_takes_its_rate_and_its_steps_along(compose):
    cfg = experiment(compose, "imagenet_simclr", "batch_size=256")
    assert (cfg.steps, cfg.optimizer.lr) == (500400, 0.3)
    rule = 'optimizer.lr="${square_root_scaling:0.075,${batch_size}}"'  # as its YAML says it can be written
    root = experiment(compose, "imagenet_simclr", "batch_size=256", rule)
    assert root.optimizer.lr == pytest.approx(1.2)


@pytest.mark.parametrize(("count", "batch_size", "images"), [(3, 4, 11), (2.5, 4, 8), (1, 1, 1)])
def test_epochs_are_counted_as_the_loader_counts_them(count, batch_size, images):
    """After the steps of whole epochs, another begins: the next batch is the first of a new permutation."""
    steps = epochs(count, batch_size, images)
    assert steps == count * (images // batch_size)
    if count == int(count):
        firsts = [batch_indices(images, batch_size, 0, step) for step in range(steps)]
        seen = torch.bincount(torch.cat(firsts), minlength=images)
        assert seen.max() <= count
    assert epochs(count, images + 1, images) == round(count)  # the loader refuses such a batch, in words of its own


def test_excluded_parameters_neither_decay_nor_adapt(compose):
    """BYOL's and SimCLR's LARS leaves out biases and norms, SimSiam's SGD leaves out nothing but keeps a rate."""
    _, lars = check_method_on_images(experiment(compose, "imagenet_byol"))
    assert [(group["weight_decay"], group["adapt"]) for group in lars.param_groups] == [(1.5e-6, True), (0.0, False)]
    assert all(p.ndim <= 1 for p in lars.param_groups[1]["params"])
    method, sgd = check_method_on_images(experiment(compose, "imagenet_simsiam"))
    assert [group.get("constant_rate", False) for group in sgd.param_groups] == [False, True]
    assert {id(p) for p in sgd.param_groups[1]["params"]} == {id(p) for p in method.predictor.parameters()}


@pytest.mark.parametrize("name", names("data"))
def test_every_data_set_brings_a_recipe_that_instantiates(compose, name):
    cfg = compose(*with_data(name))
    check_instantiates(cfg)
    assert cfg.data.size == cfg.load_size
    assert cfg.data._target_ in READERS


@pytest.mark.parametrize("name", [name for name in names("data") if name != "mnist5k"])
def test_photographs_select_the_recipe_for_photographs(compose, name):
    cfg, digits = compose(*with_data(name)), compose()
    assert (cfg.image_size, cfg.patch.size, cfg.patch.stride) == (64, 16, 8)
    assert cfg.views.patch_augment._target_ == "cpc.patch_augment.patch_augment_v2"
    assert digits.views.patch_augment._target_ == "cpc.patch_augment.patch_augment_digits"
    same = resolved(compose("data=parquet", "data.train=x"))
    assert {key.split(".")[0] for key in differing_keys(same, resolved(cfg))} <= {"data"}
    assert cfg.data.size == same["data"]["size"]


def test_no_override_is_the_digits(compose):
    cfg = compose()
    assert cfg.data._target_ == "contrastive_core.data.mnist5k"
    assert resolved(cfg) == resolved(compose("data=mnist5k"))
    assert resolved(cfg) == resolved(compose("recipe=cpc/mnist5k"))
    augment = [step._target_ for step in cfg.views.image_augment] + [cfg.views.patch_augment._target_]
    assert not [name for name in augment if "Flip" in name or name.endswith("_v2")]


def test_a_recipe_for_other_data_and_an_experiment_in_its_place(compose):
    photos = compose("data=mnist5k", "recipe=cpc/photos")
    assert photos.image_size == 64
    check_instantiates(photos)
    cfg = experiment(compose, "imagenet_cpc_v2")
    assert "warmup" not in cfg.schedule  # nothing of the data set's own recipe is left
    assert cfg.encoder == {"_target_": "cpc.encoders.resnet161", "norm": "layer"}


@pytest.mark.parametrize("name", names("encoder"))
def test_every_encoder_goes_with_the_digits(compose, name):
    # a transformer's patches must divide what it sees, here a CPC patch of 8 px
    fitting = ["encoder.image_size=8", "encoder.patch_size=4"] if name == "vit_small_moco" else []
    check_instantiates(compose(f"encoder={name}", *fitting))


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
    "ladder_3_layer_norm": {"norm", "encoder.norm"},
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
    assert changed == ["encoder.norm", "norm"]
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


@pytest.mark.parametrize("name", names("encoder"))
@pytest.mark.parametrize("method", ["cpc", "simclr"])
def test_an_encoder_that_has_a_norm_has_the_one_that_is_asked_for(compose, name, method):
    cfg = compose(f"method={method}", f"encoder={name}", "norm=none", name="pretrain")
    assert cfg.encoder.get("norm", "none") == "none"
    as_it_comes = compose(f"method={method}", f"encoder={name}", name="pretrain")
    assert as_it_comes.encoder.get("norm", as_it_comes.norm) == as_it_comes.norm


@pytest.mark.parametrize("name", PATCHES)
def test_the_norm_of_a_recipe_on_patches_is_the_encoders(compose, name):
    cfg = experiment(compose, name)
    assert cfg.norm == cfg.encoder.norm
    changed = experiment(compose, name, "norm=channel")
    assert changed.encoder.norm == "channel"


KNOBS = [
    ("method=moco_v2 temperature.cosine=0.5", "method.temperature", 0.5),
    ("method=moco_v3 momentum.moco=0.5", "method.momentum", 0.5),
    ("method=cpc data=imagefolder data.root=x augmentation.flip=0", "views.image_augment.1.probability", 0.0),
    ("experiment=imagenet_cpc_v2 data.root=x augmentation.flip=0.2", "views.image_augment.1.probability", 0.2),
    ("experiment=cifar10_moco_v2 data.train=x temperature.cosine=0.5", "method.temperature", 0.5),
    ("experiment=imagenet_moco_v3_vit data.root=x momentum.moco=0.5", "method.momentum", 0.5),
]


@pytest.mark.parametrize(("given", "key", "value"), KNOBS)
def test_a_key_that_recipes_share_reaches_what_is_built(compose, given, key, value):
    cfg = compose(*given.split(), name="pretrain")
    assert OmegaConf.select(cfg, key) == value
    assert not unread(cfg, given)


def unread(cfg, given):
    return unread_keys(OmegaConf.to_container(cfg, resolve=False), given.split())


UNREAD = [
    ("method=moco_v1 temperature.cosine=0.5", "temperature.cosine=0.5", "pass method.temperature"),
    ("method=moco_v3 momentum.byol=0.5", "momentum.byol=0.5", "pass method.momentum"),
    ("method=simclr encoder=resnet18_small norm=layer", "norm=layer", "leave it out"),
    ("method=simclr temperature.dot=3", "temperature.dot=3", "it reads temperature.cosine"),
    ("method=cpc temperature.cosine=3", "temperature.cosine=3", "it reads temperature.dot"),
    ("method=cpc temperature.dot=3 loss=nt_xent", "temperature.dot=3", "it reads temperature.cosine"),
    ("method=byol memory.queue=64", "memory.queue=64", "leave it out"),
    ("method=cpc augmentation.crop=[0.5,1]", "augmentation.crop=[0.5,1]", "leave it out"),
    ("method=byol memory={queue:64}", "memory={queue:64}", "leave it out"),
]


@pytest.mark.parametrize(("given", "override", "instead"), UNREAD)
def test_a_key_that_nothing_reads_is_told_with_what_to_pass_instead(compose, given, override, instead):
    cfg = compose(*given.split(), name="pretrain")
    assert unread(cfg, given) == [f"{override} changes nothing in this recipe: {instead}"]


@pytest.mark.parametrize("given", [
    "method=simclr temperature.cosine=1 norm=layer augmentation.flip=0 augmentation.crop=[0.5,1]",
    "method=simclr temperature={cosine:1}",
    "method=simclr loss=info_nce temperature.dot=1",
    "method=cpc temperature.dot=1 norm=batch",
    "method=byol momentum.byol=0.9 augmentation.solarise=0.1",
    "method=pirl memory.bank=64",
    "experiment=ladder_3_layer_norm norm=batch data.root=x",
    "method=simclr steps=3 encoder.norm=layer method.head.out=5",
])  # fmt: skip
def test_keys_that_are_read_are_not_told(compose, given):
    assert unread(compose(*given.split(), name="pretrain"), given) == []


def test_distillation_reads_a_temperature_of_its_own(compose):
    import cpc.distill  # noqa: F401  # registers its schema

    given = "teacher=x temperature=2 norm=layer"
    lines = ["norm=layer changes nothing in this recipe: leave it out"]
    assert unread(compose(*given.split(), name="distill"), given) == lines


def test_what_the_command_line_gives_in_vain_is_said_at_once(call_tool, capfd):
    with pytest.raises(SystemExit):
        call_tool(main_of_any_method, "method=byol", "memory.queue=64", "steps=0")
    assert "memory.queue=64 changes nothing in this recipe: leave it out" in capfd.readouterr().out


def test_every_yaml_belongs_to_a_group_that_is_tested_here():
    groups = {file.parent.name for file in CONFIGS.rglob("*.yaml")} - {CONFIGS.name}
    assert groups <= {
        "accelerate",  # tests/test_clusters.py
        "boxes",  # tests/test_detection.py
        "data",
        "encoder",
        "experiment",
        "loss",
        "method",
        "optimizer",
        "protocol",  # tests/test_two_phases.py
        "recipe",
        "scale",
        "views",
        "cpc",
        "images",
        "base",
        "ablation",
    }


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
