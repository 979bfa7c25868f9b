"""Views made by torchvision on the CPU: the papers' probabilities, and the same numbers wherever they are made."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision.transforms import v2

from contrastive_core.augment import ChannelDrop, ElasticDeformation
from contrastive_core.augment.blur import tenth_of
from contrastive_core.augment.views import normalise, to_float
from contrastive_core.data import ImageDataset, batch_indices, training_batches
from contrastive_core.data import worker_views as pipelines
from contrastive_core.data.worker_views import FromGenerator, SeparableBlur, WorkerViews
from contrastive_core.randomness import Randomness
from cpc.configs import config_folder
from cpc.entry import build

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}
PAPERS = {
    "simclr": pipelines.simclr,
    "moco_v2": pipelines.moco_v2,
    "byol 1": lambda size, **knobs: pipelines.byol(size, view=1, **knobs),
    "byol 2": lambda size, **knobs: pipelines.byol(size, view=2, **knobs),
    "supervised": pipelines.supervised,
}


def pictures(count=2, size=12):
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def numbers(count, step=0, seed=0):
    return Randomness(seed, step, torch.arange(count))


def add_noise(image):
    """Shows every number that torch's generator gave."""
    return (image + torch.randint(0, 99, image.shape)).to(torch.uint8)


def noisy(**options):
    """Two views that differ by their random numbers only."""
    return WorkerViews([add_noise, add_noise], **{"mean": MEAN, "std": STD, "image_size": 12, **options})


def two_views(size=12, **options):
    transforms = [pipelines.byol(size, view=1), pipelines.byol(size, view=2)]
    return WorkerViews(transforms, **{"mean": MEAN, "std": STD, "image_size": size, **options})


def assert_equal(some, others):
    assert len(some) == len(others)
    assert all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


# ---- what a view is ----


def test_without_augmentation_it_normalises():
    (view,) = WorkerViews([nn.Identity()], mean=MEAN, std=STD, image_size=12)(pictures(), numbers(2))
    assert torch.equal(view, normalise(to_float(pictures()), MEAN, STD))
    (white,) = WorkerViews([nn.Identity()], image_size=8, **PLAIN)(
        torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), numbers(1)
    )
    assert white.unique().tolist() == [1.0]
    assert white.dtype == torch.float32


def test_no_image_depends_on_another_nor_a_view_on_another():
    views, images = noisy(), pictures(4)
    together = views(images, numbers(4))
    alone = [views(images[i : i + 1], Randomness(0, 0, torch.tensor([i]))) for i in range(4)]
    assert_equal(together, [torch.cat(view) for view in zip(*alone, strict=True)])
    lazy = WorkerViews([nn.Identity(), *views.transforms[1:]], mean=MEAN, std=STD, image_size=12)
    assert torch.equal(lazy(images, numbers(4))[1], together[1])


def test_places_steps_seeds_and_views_all_have_numbers_of_their_own():
    views, image = noisy(), torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    addresses = [(seed, step, place) for seed in (0, 1) for step in (0, 1) for place in (0, 1)]
    made = [
        view for seed, step, place in addresses for view in views(image, Randomness(seed, step, torch.tensor([place])))
    ]
    assert len(torch.cat(made).flatten(1).unique(dim=0)) == 16


def test_one_is_what_forward_makes_of_its_seeds():
    views, images = two_views(), pictures(3)
    seeds = views.seeds(numbers(3))
    assert seeds.shape == (3, 2)
    made = [views.one(image, its) for image, its in zip(images, seeds.tolist(), strict=True)]
    assert_equal(views(images, numbers(3)), [torch.stack(view) for view in zip(*made, strict=True)])
    assert_equal(views.one(images[0], [5, 6]), views.one(images[0], [5, 6]))


def test_generators_are_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator is the model's"))
    before = torch.get_rng_state()
    two_views()(pictures(), numbers(2))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="image_size is 11"):
        two_views(image_size=11)(pictures(), numbers(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_change_nothing():
    size = 224  # from 182 px on torch splits a mean over threads
    views = WorkerViews([pipelines.simclr(size)], mean=MEAN, std=STD, image_size=size)
    expected = views(pictures(3, size), numbers(3))
    torch.set_num_threads(3)
    try:
        assert_equal(views(pictures(3, size), numbers(3)), expected)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_elastic_deformation_comes_before_channel_drop_and_both_before_normalisation():
    images = pictures(200)
    (view,) = WorkerViews([nn.Identity()], image_size=12, channel_drop=1.0, elastic=1.0, **PLAIN)(images, numbers(200))
    channels = view.flatten(2).amax(2) > 0
    assert channels.sum(1).tolist() == [1] * 200
    assert (channels.sum(0) > 40).all()
    kept = channels.int().argmax(1)
    whole = to_float(images)[torch.arange(200), kept]
    assert not torch.isclose(view[torch.arange(200), kept], whole).flatten(1).all(1).any()
    (both,) = WorkerViews([nn.Identity()], image_size=12, channel_drop=0.5, elastic=0.2, **PLAIN)(images, numbers(200))
    dropped = (both.flatten(2).amax(2) == 0).any(1)
    assert 100 - 29 < int(dropped.sum()) < 100 + 29  # four standard deviations
    moved = (both != to_float(images)).flatten(2).any(2)[~dropped].all(1)
    assert 0.2 - 0.16 < float(moved.float().mean()) < 0.2 + 0.16


def test_switching_elastic_off_leaves_the_dropped_channels_as_they_were():
    made = [
        WorkerViews([nn.Identity()], image_size=12, channel_drop=1.0, elastic=elastic, **PLAIN)(pictures(9), numbers(9))
        for elastic in (0.0, 1.0)
    ]
    one, other = (view.flatten(2).amax(2) > 0 for (view,) in made)
    assert torch.equal(one, other)


def test_one_of_our_augmentations_as_a_transform():
    torch.manual_seed(3)
    key = int(torch.randint(1 << 62, ()))
    image, augment = to_float(pictures(1)), ElasticDeformation(1.0)
    expected = augment(image, Randomness(key, 0, torch.tensor([0])))
    torch.manual_seed(3)
    assert torch.equal(FromGenerator(augment)(image[0]), expected[0])
    assert torch.equal(v2.Compose([FromGenerator(ChannelDrop(0.0))])(image[0]), image[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WorkerViews([], image_size=12, **PLAIN), "no transforms"),
        (lambda: noisy(channel_drop=1.5), "1.5"),
        (lambda: noisy(image_size=10), r"view 1 of an image of 12 px is \(3, 12, 12\), image_size is 10: end its"),
        (lambda: noisy(), "the randomness is for 3 images, got 2"),
        (lambda: pipelines.byol(12, view=3), "view is 1 or 2, got 3"),
        (lambda: pipelines.simclr(12, strength=3), "strength 3: pass 0 to 2.5"),
        (lambda: pipelines.moco_v2(12, strength=-1), "strength -1: pass 0 to 5"),
        (lambda: pipelines.simclr(12, blur=2), "blur is between 0 and 1, got 2"),
        (lambda: pipelines.simclr(12, flip=-0.5), "flip is between"),
        (lambda: pipelines.byol(12, view=2, solarise=7), "solarise is between"),
        (lambda: pipelines.supervised(12, crop=[0.5, 0.2]), r"crop 0.5 .. 0.2: pass a range"),
        (lambda: pipelines.supervised(12, crop=[0, 1]), r"crop 0 .. 1"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()(pictures(), numbers(3 if "got 2" in message else 2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 12, 12), torch.zeros(1, 1, 12, 12, dtype=torch.uint8)])
def test_images_are_bytes_of_three_channels(images):
    with pytest.raises(ValueError, match=r"an image is .*pass uint8 `3 s s`"):
        noisy()(images, numbers(1))


# ---- the papers' pipelines ----


def share(pipeline, image, changed, draws=500):
    """How often a pipeline did something, seen by what it made of an image."""
    views = WorkerViews([pipeline], image_size=image.shape[-1], **PLAIN)
    (made,) = views(image.expand(draws, *image.shape), numbers(draws))
    return sum(bool(changed(view)) for view in made) / draws


def within(found, expected, draws=500):
    """Four standard deviations, and exactly 0 or 1."""
    return abs(found - expected) <= 4 * (expected * (1 - expected) / draws) ** 0.5


OFF = {"strength": 0, "blur": 0, "flip": 0, "crop": (1, 1)}
COLOURED = torch.stack([torch.arange(16, dtype=torch.uint8).expand(16, 16) * 16 + shift for shift in (0, 5, 15)])
NOISE = torch.randint(256, (1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).expand(3, 16, 16)
LEVEL = torch.full((3, 16, 16), 102, dtype=torch.uint8)
BLUR = {"simclr": 0.5, "moco_v2": 0.5, "byol 1": 1.0, "byol 2": 0.1}
CONTRASTIVE = sorted(BLUR)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_grey_in_one_of_five(name):
    options = OFF | ({"solarise": 0} if "byol" in name else {})
    found = share(PAPERS[name](16, **options), COLOURED, lambda view: torch.equal(view[0], view[2]))
    assert within(found, 0.2)
    identity = share(PAPERS[name](16, **options), COLOURED, lambda view: torch.allclose(view, to_float(COLOURED)))
    assert identity == pytest.approx(1 - found)


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_flipped_in_half_of_the_cases(name):
    options = {"crop": (1, 1)} if name == "supervised" else {**OFF, "flip": None}
    if "byol" in name:
        options["solarise"] = 0
    found = share(PAPERS[name](16, **options), COLOURED, lambda view: view[0, 0, 0] > view[0, 0, -1])
    assert within(found, 0.5)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_blurred_as_often_as_the_paper_says(name):
    options = {**OFF, "blur": None} | ({"solarise": 0} if "byol" in name else {})
    # a sigma of 0.1 px moves nothing by more than rounding; grey of three equal channels does not either
    found = share(PAPERS[name](16, **options), NOISE, lambda view: not torch.allclose(view, to_float(NOISE), atol=1e-3))
    visible = (2.0 - 0.27) / (2.0 - 0.1)  # exp(-1 / (2 sigma^2)) is 0.001 at 0.27
    assert within(found, BLUR[name] * visible)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_jittered_in_four_of_five(name):
    options = {**OFF, "strength": None} | ({"solarise": 0} if "byol" in name else {})
    found = share(PAPERS[name](16, **options), LEVEL, lambda view: (view - 0.4).abs().max() > 1e-4)
    assert within(found, 0.8)


def test_only_byols_second_view_is_solarised():
    for name, expected in {"simclr": 0, "moco_v2": 0, "byol 1": 0, "byol 2": 0.2}.items():
        found = share(PAPERS[name](16, **OFF), torch.full_like(LEVEL, 255), lambda view: view.max() < 0.01)
        assert within(found, expected)
    always = pipelines.byol(16, view=2, **OFF, solarise=1)
    half = torch.tensor([127, 128, 0], dtype=torch.uint8)[:, None, None].expand(3, 16, 16)
    (made,) = WorkerViews([always], image_size=16, **PLAIN)(half[None], Randomness(0, 0, torch.tensor([1])))
    assert made[0, :, 0, 0].tolist() == pytest.approx([127 / 255, 127 / 255, 0])


JITTER = {
    "simclr": ((0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2)),
    "moco_v2": ((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1)),
    "byol 1": ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)),
    "byol 2": ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)),
}


def steps(pipeline):
    for each in pipeline.transforms:
        yield each
        yield from each.transforms if isinstance(each, v2.RandomApply) else ()


def step(pipeline, kind):
    (found,) = [each for each in steps(pipeline) if type(each) is kind]
    return found


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_the_jitters_ranges(name):
    jitter = step(PAPERS[name](224), v2.ColorJitter)
    found = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    for some, others in zip(found, JITTER[name], strict=True):
        assert some == pytest.approx(others)
    half = step(PAPERS[name](224, strength=0.5), v2.ColorJitter)
    assert half.hue == pytest.approx([value / 2 for value in jitter.hue])
    assert half.brightness[0] == pytest.approx((1 + jitter.brightness[0]) / 2)


@pytest.mark.parametrize(
    ("name", "least", "interpolation"),
    [
        ("simclr", 0.08, "bicubic"),
        ("byol 1", 0.08, "bicubic"),
        ("byol 2", 0.08, "bicubic"),
        ("moco_v2", 0.2, "bilinear"),
        ("supervised", 0.08, "bilinear"),
    ],
)
def test_the_crops(name, least, interpolation):
    crop = step(PAPERS[name](32), v2.RandomResizedCrop)
    assert (tuple(crop.scale), crop.interpolation.value, crop.antialias) == ((least, 1.0), interpolation, True)
    assert tuple(crop.ratio) == pytest.approx((3 / 4, 4 / 3))
    assert tuple(step(PAPERS[name](32, crop=[0.5, 0.6]), v2.RandomResizedCrop).scale) == (0.5, 0.6)


def test_blur_in_two_passes_is_torchvisions():
    image = to_float(pictures(1, 40)[0])
    for kernel in (3, tenth_of(224)):
        torch.manual_seed(0)
        expected = v2.GaussianBlur(kernel, (0.1, 2.0))(image)
        torch.manual_seed(0)
        torch.testing.assert_close(SeparableBlur(kernel, (0.1, 2.0))(image), expected, rtol=0, atol=1e-6)
    blur = step(pipelines.simclr(224), SeparableBlur)
    assert (tuple(blur.kernel_size), tuple(blur.sigma)) == ((23, 23), (0.1, 2.0))


@pytest.mark.parametrize("name", sorted(PAPERS))
@pytest.mark.parametrize("size", [8, 28, 48])
def test_any_size_comes_out_as_asked_and_in_range(name, size):
    (made,) = WorkerViews([PAPERS[name](size)], image_size=size, **PLAIN)(pictures(8, 28), numbers(8))
    assert made.shape == (8, 3, size, size)
    assert 0 <= float(made.min()) <= float(made.max()) <= 1


# ---- in the loader ----


def dataset(bad=(), count=30):
    """Random pictures of 12 px, some of which cannot be decoded."""
    source = [image.permute(1, 2, 0).numpy() for image in pictures(count)]
    return ImageDataset([b"no image" if i in bad else image for i, image in enumerate(source)], size=12)


def collect(data, views, **arguments):
    return list(
        training_batches(data, **{"batch_size": 12, "seed": 3, "start": 0, "steps": 4, "views": views, **arguments})
    )


def assert_same(one, other):
    assert len(one) == len(other)
    for some, others in zip(one, other, strict=True):
        for a, b in zip(some, others, strict=True):
            assert_equal([*a[:4], *a.views], [*b[:4], *b.views])
            assert a.faults == b.faults


def test_the_loader_makes_what_forward_makes():
    views = two_views()
    for step, (batch,) in enumerate(collect(dataset(), views)):
        assert torch.equal(batch.indices, batch_indices(30, 12, 3, step))
        assert_equal(batch.views, views(batch.images, Randomness(3, step, batch.places)))
    assert collect(dataset(), None)[0][0].views is None


@pytest.mark.parametrize("cache", [False, True])
def test_workers_and_the_cache_change_no_view_and_a_bad_image_has_its_stand_in(cache):
    data, views = dataset(bad=(7, 8)), two_views(channel_drop=0.5, elastic=0.5)
    expected = collect(data, views, accumulate=2)
    faults = [fault for step in expected for batch in step for fault in batch.faults]
    assert {fault.split(":")[0] for fault in faults} == {"image 7", "image 8"}
    data = data.cached() if cache else data
    assert_same(expected, collect(data, views, accumulate=2))
    assert_same(expected, collect(data, views, accumulate=2, workers=2))
    if cache:
        assert data.name(3) == "image 3", "the data set keeps its own source"


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 3), (2, 3)])
def test_processes_and_micro_batches_share_out_the_same_views(world, accumulate):
    data, views = dataset().cached(), two_views()
    whole = collect(data, views)
    ranks = [collect(data, views, rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
    for step, (expected,) in enumerate(whole):
        parts = [ranks[rank][step][a] for a in range(accumulate) for rank in range(world)]
        assert_equal(expected.views, [torch.cat(view) for view in zip(*(part.views for part in parts), strict=True)])


def test_a_resumed_run_goes_on_with_the_same_views():
    data, views = dataset(), two_views()
    assert_same(collect(data, views, steps=5)[3:], collect(data, views, start=3, steps=5, workers=1))


def test_a_view_of_another_size_is_told_before_a_worker_starts():
    with pytest.raises(ValueError, match="view 1 of an image of 12 px") as error:
        training_batches(dataset(), batch_size=2, seed=0, start=0, steps=1, workers=2, views=two_views(image_size=8))
    assert "\n" not in str(error.value)


def test_the_loader_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(training_batches(dataset(), batch_size=2, seed=0, start=0, steps=1, workers=workers, views=two_views()))
    assert torch.equal(before, torch.get_rng_state())


class OwnMemory(nn.Module):
    """A picture of the megabytes that this process has for itself alone: their two bytes, in two channels."""

    def __init__(self):
        super().__init__()
        self.images, self.own = 0, 0

    def forward(self, image):
        if self.images % 256 == 0:
            self.own = self.measured()
        self.images += 1
        return torch.tensor([*divmod(self.own, 256), 0], dtype=torch.uint8)[:, None, None].expand_as(image)

    @staticmethod
    def measured():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) // 1024


def memory_of_a_worker(megabytes):
    """What a worker has for itself, after 6,144 images from a cache of this size.

    In small batches: one that the worker has made and nobody has fetched yet counts as its own, and how many of them
    there are is a matter of timing.
    """
    count = megabytes * 2**20 // (3 * 64 * 64)
    data = ImageDataset([pictures(1, 64)[0].permute(1, 2, 0).numpy()] * count, size=64).cached()
    views = WorkerViews([OwnMemory()], image_size=64, **PLAIN)
    for (batch,) in training_batches(data, batch_size=32, seed=0, start=0, steps=192, workers=1, views=views):
        high, low, _ = (batch.views[0][-1, :, 0, 0] * 255).round().int().tolist()
    return 256 * high + low


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and Linux forks")
def test_workers_do_not_copy_the_pixels():
    assert memory_of_a_worker(megabytes=150) - memory_of_a_worker(megabytes=10) < 30


def test_a_worker_that_is_not_forked_gets_no_encoded_images():
    from contrastive_core.data.loading import _Viewed

    data = dataset(count=30)
    viewed = _Viewed(data.cached(), two_views())
    assert len(viewed.dataset.source) == 0
    again = pickle.loads(pickle.dumps(viewed))
    assert_equal(again[4, [1, 2]][1], viewed[4, [1, 2]][1])
    assert _Viewed(data, two_views()).dataset.source is data.source


# ---- the files ----


YAMLS = sorted(Path(config_folder(), "views").glob("torchvision_*.yaml"))


def from_yaml(file, *overrides, **augmentation):
    names = ("strength", "blur", "solarise", "flip", "crop")
    above = {
        "image_size": 16,
        "mean": list(MEAN),
        "std": list(STD),
        "augmentation": dict.fromkeys(names) | augmentation,
        "views": OmegaConf.load(file),
    }
    return build(OmegaConf.merge(above, OmegaConf.from_dotlist(list(overrides))).views)


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.stem)
def test_a_yaml_is_the_papers_pipeline(file):
    views = from_yaml(file)
    name = file.stem.removeprefix("torchvision_")
    expected = ["byol 1", "byol 2"] if name == "byol" else [name] * (1 if name == "supervised" else 2)
    same = WorkerViews([PAPERS[one](16) for one in expected], mean=MEAN, std=STD, image_size=16)
    assert_equal(views(pictures(9, 20), numbers(9)), same(pictures(9, 20), numbers(9)))


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.stem)
def test_the_knobs_reach_every_view(file):
    knobs = {"strength": 0.5, "blur": 0.3, "flip": 0.1, "crop": [0.5, 0.9]}
    views = from_yaml(file, "views.channel_drop=1", "views.elastic=0.2", **knobs)
    for pipeline in views.transforms:
        assert step(pipeline, v2.RandomHorizontalFlip).p == 0.1
        assert list(step(pipeline, v2.RandomResizedCrop).scale) == [0.5, 0.9]
        if "supervised" in file.stem:
            continue
        assert [each.p for each in steps(pipeline) if type(each) is v2.RandomApply] == [0.8, 0.3]
        assert step(pipeline, v2.ColorJitter).hue[1] < 0.11
    elastic, drop = (added.augmentation for added in views.added)
    assert (elastic.probability, drop.probability) == (0.2, 1)
    for view in views(pictures(4, 16), numbers(4)):
        black = -torch.tensor(MEAN) / torch.tensor(STD)
        dropped = torch.isclose(view, black[:, None, None]).flatten(2).all(2).sum(1)
        assert (dropped >= 2).all()
