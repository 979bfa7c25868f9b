"""The papers' views against torchvision's operations: their statistics, and pixel by pixel at the numbers drawn."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import torchvision.transforms.v2 as tv
import torchvision.transforms.v2.functional as F
from hydra.core.global_hydra import GlobalHydra
from scipy import stats
from torch import Tensor, nn

from contrastive_core.augment import (
    CentreFit,
    ColourJitter,
    ElasticDeformation,
    GaussianBlur,
    GaussianNoise,
    JigsawViews,
    RandomAffine,
    RandomCrop,
    RandomFlip,
    RandomGrey,
    RandomPhotometric,
    RandomResizedCrop,
    RandomSolarize,
    Views,
    colour,
    views,
)
from contrastive_core.randomness import Randomness

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OWN = {"strength": None, "blur": None, "flip": None, "crop": None}  # the papers' own numbers
SIZE = 32

PIPELINES: dict[str, Callable[[int], list[nn.Module]]] = {
    "simclr": views.simclr,
    "simclr cifar": lambda size: views.simclr(size, strength=0.5, blur=0.0),
    "moco_v1": views.moco_v1,
    "moco_v2": views.moco_v2,
    "byol 1": lambda size: views.byol(size, view=1),
    "byol 2": lambda size: views.byol(size, view=2),
    "moco_v3 1": lambda size: views.moco_v3(size, view=1),
    "moco_v3 2": lambda size: views.moco_v3(size, view=2),
    "pirl": views.pirl,
    "supervised": views.supervised,
}
each_pipeline = pytest.mark.parametrize("name", PIPELINES)


def photograph(h: int = SIZE, w: int = SIZE, seed: int = 3) -> Tensor:
    """A coloured picture with edges and texture, brighter on the left, 3 h w in whole levels of 255."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, (h, w), mode="bilinear", align_corners=True)[0]
    texture = 0.15 * torch.randn(1, h, w, generator=generator)
    return ((smooth * torch.linspace(1.0, 0.5, w) + texture).clamp(0, 1) * 255).round() / 255


def randomness(n: int, step: int = 0) -> Randomness:
    return Randomness(0, step, torch.arange(n))


def run(pipeline: list[nn.Module], images: Tensor, step: int = 0) -> Tensor:
    numbers = randomness(len(images), step)
    for augment in pipeline:
        images = augment(images, numbers)
    return images


# --- the crop: torchvision's boxes

CASES = [
    ((64, 64), (0.08, 1.0), (3 / 4, 4 / 3)),
    ((40, 90), (0.2, 1.0), (3 / 4, 4 / 3)),  # many of the ten tries don't fit
    ((90, 40), (0.2, 1.0), (3 / 4, 4 / 3)),
    ((30, 200), (0.9, 1.0), (3 / 4, 4 / 3)),  # none fits: torchvision's central part, as wide as its ratio allows
    ((200, 30), (0.9, 1.0), (3 / 4, 4 / 3)),
    ((31, 33), (1.0, 1.0), (0.5, 2.0)),  # none fits: the whole image
    ((7, 9), (0.02, 0.3), (0.5, 2.0)),  # boxes of a pixel or two
]


@pytest.mark.parametrize(("image", "scale", "ratio"), CASES)
def test_boxes_are_torchvisions_rule_at_the_numbers_drawn(image: Any, scale: Any, ratio: Any) -> None:
    """One image and one try at a time, in Python's floats."""
    numbers, (h, w) = randomness(300), image
    ours = RandomResizedCrop(8, scale, ratio)._boxes(image, numbers).tolist()
    area = numbers.uniform("crop/area", 10, low=scale[0], high=scale[1]).tolist()
    log_ratio = numbers.uniform("crop/ratio", 10, low=math.log(ratio[0]), high=math.log(ratio[1])).tolist()
    corner = numbers.uniform("crop/corner", 2).tolist()
    for i in range(300):
        for share, power in zip(area[i], log_ratio[i], strict=True):
            width = round(math.sqrt(share * h * w * math.exp(power)))
            height = round(math.sqrt(share * h * w / math.exp(power)))
            if 0 < width <= w and 0 < height <= h:
                top, left = (int(u * (spare + 1)) for u, spare in zip(corner[i], (h - height, w - width), strict=True))
                break
        else:
            width, height = w, h
            if w / h < ratio[0]:
                height = round(w / ratio[0])
            elif w / h > ratio[1]:
                width = round(h * ratio[1])
            top, left = (h - height) // 2, (w - width) // 2
        assert ours[i] == [top, left, height, width]


@pytest.mark.parametrize(("image", "scale", "ratio"), CASES)
def test_boxes_are_distributed_as_torchvisions(image: Any, scale: Any, ratio: Any) -> None:
    ours = RandomResizedCrop(8, scale, ratio)._boxes(image, randomness(1500)).double()
    blank = torch.zeros(3, *image)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transform = tv.RandomResizedCrop(8, scale, ratio)
        drawn = [transform.make_params([blank]) for _ in range(1500)]
    theirs = torch.tensor([[box[key] for key in ("top", "left", "height", "width")] for box in drawn]).double()
    for box in (ours, theirs):
        assert (box[:, :2] >= 0).all()
        assert (box[:, :2] + box[:, 2:] <= torch.tensor(image)).all()
        assert (box[:, 2:] >= 1).all()
    for measure in (
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] / (image[0] - box[:, 2] + 1),
    ):
        assert stats.ks_2samp(measure(ours).numpy(), measure(theirs).numpy(), method="asymp").pvalue > 1e-3


def test_two_crops_of_a_size_of_their_own() -> None:
    """Images that are not square, to views that are not square."""
    images = photograph(40, 90).expand(5, 3, 40, 90)
    crops = RandomResizedCrop((20, 30))(images, randomness(5))
    boxes = RandomResizedCrop((20, 30))._boxes((40, 90), randomness(5)).tolist()
    for i, (top, left, height, width) in enumerate(boxes):
        expected = F.resized_crop(images[i], top, left, height, width, [20, 30], antialias=False)
        torch.testing.assert_close(crops[i], expected, atol=2e-5, rtol=0)


# --- the pipelines: which operations, in which order, how often, at which levels

CROP, FLIP, GREY, BLUR, SOLARIZE = RandomResizedCrop, RandomFlip, RandomGrey, GaussianBlur, RandomSolarize

TABLES: dict[str, list[tuple[type[nn.Module], float]]] = {  # operations in order, with their probabilities
    "simclr": [(CROP, 1), (FLIP, 0.5), (ColourJitter, 0.8), (GREY, 0.2), (BLUR, 0.5)],
    "simclr cifar": [(CROP, 1), (FLIP, 0.5), (ColourJitter, 0.8), (GREY, 0.2)],
    "moco_v1": [(CROP, 1), (GREY, 0.2), (ColourJitter, 1), (FLIP, 0.5)],
    "moco_v2": [(CROP, 1), (ColourJitter, 0.8), (GREY, 0.2), (BLUR, 0.5), (FLIP, 0.5)],
    "byol 1": [(CROP, 1), (FLIP, 0.5), (ColourJitter, 0.8), (GREY, 0.2), (BLUR, 1)],
    "byol 2": [(CROP, 1), (FLIP, 0.5), (ColourJitter, 0.8), (GREY, 0.2), (BLUR, 0.1), (SOLARIZE, 0.2)],
    "moco_v3 1": [(CROP, 1), (FLIP, 0.5), (ColourJitter, 0.8), (GREY, 0.2), (BLUR, 1)],
    "moco_v3 2": [(CROP, 1), (FLIP, 0.5), (ColourJitter, 0.8), (GREY, 0.2), (BLUR, 0.1), (SOLARIZE, 0.2)],
    "pirl": [(CROP, 1), (ColourJitter, 1), (RandomPhotometric, 0.66), (GREY, 0.2), (FLIP, 0.5)],
    "supervised": [(CROP, 1), (FLIP, 0.5)],
}
JITTER = {  # brightness, contrast, saturation, hue
    "simclr": (0.8, 0.8, 0.8, 0.2),
    "simclr cifar": (0.4, 0.4, 0.4, 0.1),
    "moco_v1": (0.4, 0.4, 0.4, 0.4),
    "moco_v2": (0.4, 0.4, 0.4, 0.1),
    "byol 1": (0.4, 0.4, 0.2, 0.1),
    "byol 2": (0.4, 0.4, 0.2, 0.1),
    "moco_v3 1": (0.4, 0.4, 0.2, 0.1),
    "moco_v3 2": (0.4, 0.4, 0.2, 0.1),
    "pirl": (0.4, 0.4, 0.4, 0.2),
}
SMALLEST = {"moco_v1": 0.2, "moco_v2": 0.2, "moco_v3 1": 0.2, "moco_v3 2": 0.2}  # share of the area; else 0.08


class Recorder(Randomness):
    """A randomness that keeps what was drawn, and of which stream how often."""

    def __init__(self, n: int) -> None:
        super().__init__(0, 0, torch.arange(n))
        self.drawn: dict[str, Tensor] = {}
        self.times: Counter[str] = Counter()

    def _bits(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        self.times[stream] += 1
        return super()._bits(stream, shape)

    def uniform(self, stream: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        self.drawn[stream] = super().uniform(stream, *shape, low=low, high=high)
        return self.drawn[stream]

    def bernoulli(self, stream: str, probability: float, *shape: int) -> Tensor:
        self.drawn[stream] = super().bernoulli(stream, probability, *shape)
        return self.drawn[stream]


@each_pipeline
def test_operations_their_order_and_probabilities(name: str) -> None:
    pipeline = PIPELINES[name](SIZE)
    assert [type(step) for step in pipeline] == [step for step, _ in TABLES[name]]
    images, recorder = photograph().expand(1500, 3, SIZE, SIZE), Recorder(1500)
    for step, (_, probability) in zip(pipeline[1:], TABLES[name][1:], strict=True):
        changed = (step(images, recorder) != images).flatten(1).any(1)
        chosen = recorder.drawn[f"{step.stream}/chosen"]
        assert not (changed & ~chosen).any()
        assert changed.sum() >= 0.93 * chosen.sum()  # a blur of a sigma below 0.18 px changes no float32
        assert stats.binomtest(int(chosen.sum()), 1500, probability).pvalue > 1e-3


@each_pipeline
def test_the_crops_are_the_papers(name: str) -> None:
    crop = PIPELINES[name](SIZE)[0]
    assert crop.scale == (SMALLEST.get(name, 0.08), 1.0)
    assert crop.ratio == (3 / 4, 4 / 3)
    assert crop.size == (SIZE, SIZE)


@pytest.mark.parametrize("name", [*JITTER, "wider than the factors go down"])
def test_jitter_levels_are_distributed_as_torchvisions(name: str) -> None:
    """The levels that ours hands its operations, seen from inside, against those torchvision draws."""
    wide = (1.5, 1.2, 1.2, 0.3)
    steps = PIPELINES[name](SIZE) if name in JITTER else [ColourJitter(0.8, *wide)]
    (jitter,) = (step for step in steps if isinstance(step, ColourJitter))
    ours: list[list[float]] = []
    for index, (_, centre, half_width) in enumerate(list(jitter._steps)):
        seen: list[float] = []
        ours.append(seen)
        jitter._steps[index] = (
            lambda images, level, seen=seen: (seen.extend(level.tolist()), images)[1],
            centre,
            half_width,
        )
    jitter(torch.zeros(2000, 3, 1, 1), randomness(2000))
    reference = tv.ColorJitter(*JITTER.get(name, wide))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [reference.make_params([]) for _ in range(2000)]
    for levels, key in zip(
        ours, ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor"), strict=True
    ):
        low, high = getattr(reference, key.removesuffix("_factor"))
        assert low <= min(levels) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(levels) <= high
        assert stats.ks_2samp(levels, [params[key] for params in drawn]).pvalue > 1e-3


@pytest.mark.parametrize("name", [name for name, table in TABLES.items() if BLUR in dict(table)])
def test_sigmas_are_uniform(name: str) -> None:
    (step,) = (step for step in PIPELINES[name](SIZE) if isinstance(step, GaussianBlur))
    recorder = Recorder(2000)
    step(photograph().expand(2000, 3, SIZE, SIZE), recorder)
    assert stats.kstest(recorder.drawn["blur/sigma"].numpy(), "uniform", args=(0.1, 1.9)).pvalue > 1e-3
    assert step.kernel is None


# --- whole pipelines against torchvision's, by what the pictures look like


def reference(name: str, size: int = SIZE) -> tv.Compose:
    """The paper's pipeline in torchvision's words, for one image: written from the papers, not from ours."""
    crop = tv.RandomResizedCrop(size, scale=(SMALLEST.get(name, 0.08), 1.0), antialias=False)
    flip, grey = tv.RandomHorizontalFlip(0.5), tv.RandomGrayscale(0.2)
    jitter = tv.ColorJitter(*JITTER[name]) if name in JITTER else tv.Identity()
    some = tv.RandomApply([jitter], 0.8)
    blur = tv.GaussianBlur(3, (0.1, 2.0))  # 3: a tenth of 32
    steps: dict[str, list[Any]] = {
        "simclr": [crop, flip, some, grey, tv.RandomApply([blur], 0.5)],
        "simclr cifar": [crop, flip, some, grey],
        "moco_v1": [crop, grey, jitter, flip],
        "moco_v2": [crop, some, grey, tv.RandomApply([blur], 0.5), flip],
        "byol 1": [crop, flip, some, grey, blur],
        "byol 2": [crop, flip, some, grey, tv.RandomApply([blur], 0.1), tv.RandomSolarize(0.5, 0.2)],
        "moco_v3 1": [crop, some, grey, blur, flip],
        "moco_v3 2": [crop, some, grey, tv.RandomApply([blur], 0.1), tv.RandomSolarize(0.5, 0.2), flip],
        "supervised": [crop, flip],
    }
    return tv.Compose(steps[name])


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {  # images n 3 h w -> n
    "red": lambda x: x[:, 0].mean((1, 2)),
    "green": lambda x: x[:, 1].mean((1, 2)),
    "blue": lambda x: x[:, 2].mean((1, 2)),
    "contrast": lambda x: x.std((1, 2, 3)),
    "saturation": lambda x: (x.amax(1) - x.amin(1)).mean((1, 2)),
    "sharpness": lambda x: x.diff(dim=3).abs().mean((1, 2, 3)) / (x.std((1, 2, 3)) + 0.01),
    "left minus right": lambda x: (x[..., : SIZE // 2] - x[..., SIZE // 2 :]).mean((1, 2, 3)),
    "top minus bottom": lambda x: (x[:, :, : SIZE // 2] - x[:, :, SIZE // 2 :]).mean((1, 2, 3)),
    "centre": lambda x: x[:, 1, SIZE // 2, SIZE // 2],
    "corner": lambda x: x[:, 0, 0, 0],
}


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "pirl"])
def test_pictures_are_distributed_as_torchvisions(name: str) -> None:
    n, picture = 600, photograph(48, 40)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transform = reference(name)
        theirs = torch.stack([transform(picture) for _ in range(n)])
    ours = run(PIPELINES[name](SIZE), picture.expand(n, 3, 48, 40))
    assert ours.min() >= 0
    assert ours.max() <= 1 + 1e-6
    for measure, of in MEASURES.items():
        pvalue = stats.ks_2samp(of(ours).numpy(), of(theirs).numpy()).pvalue
        assert pvalue > 1e-3, f"{measure}: {pvalue}"


@pytest.mark.parametrize(
    ("first", "second", "measure"),
    [
        ("simclr", "simclr cifar", "sharpness"),
        ("simclr", "moco_v2", "contrast"),
        ("byol 1", "byol 2", "sharpness"),
        ("byol 1", "byol 2", "red"),
        ("byol 2", "moco_v3 2", "sharpness"),
        ("moco_v1", "moco_v2", "blue"),
        ("simclr", "supervised", "saturation"),
    ],
)
def test_these_measures_tell_the_pipelines_apart(first: str, second: str, measure: str) -> None:
    picture = photograph(48, 40).expand(2000, 3, 48, 40)
    seen = [MEASURES[measure](run(PIPELINES[name](SIZE), picture, step)) for step, name in enumerate((first, second))]
    assert stats.ks_2samp(seen[0].numpy(), seen[1].numpy()).pvalue < 1e-6


# --- whole pipelines against torchvision's functions, pixel by pixel, at the numbers drawn


def at_the_numbers_drawn(pipeline: list[nn.Module], image: Tensor, place: int) -> Tensor:
    """One image, 3 h w, through torchvision's functions with the numbers of its place."""
    numbers = Randomness(0, 0, torch.tensor([place]))
    for step in pipeline:
        if isinstance(step, RandomResizedCrop):
            box = step._boxes((image.shape[1], image.shape[2]), numbers)[0].tolist()
            image = F.resized_crop(image, *box, list(step.size), antialias=False)
            continue
        if not numbers.bernoulli(f"{step.stream}/chosen", step.probability):
            continue
        if isinstance(step, RandomFlip):
            image = F.horizontal_flip(image)
        elif isinstance(step, RandomGrey):
            image = F.rgb_to_grayscale(image, 3)
        elif isinstance(step, GaussianBlur):
            image = F.gaussian_blur(image, [3, 3], [numbers.uniform("blur/sigma", low=0.1, high=2.0).item()])
        elif isinstance(step, RandomSolarize):
            image = F.solarize(image, 0.5)
        elif isinstance(step, ColourJitter):
            adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
            levels = numbers.uniform("colour/level", 4, low=-1, high=1)[0].tolist()
            for slot in numbers.uniform("colour/order", 4).argsort(dim=1)[0].tolist():
                _, centre, half_width = step._steps[slot]
                image = adjust[slot](image, centre + half_width * levels[slot])
    return image


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "pirl"])
def test_pixels_are_torchvisions_at_the_numbers_drawn(name: str) -> None:
    images, pipeline = torch.stack([photograph(48, 40, seed) for seed in range(40)]), PIPELINES[name](SIZE)
    ours = run(pipeline, images)
    off = [(ours[i] - at_the_numbers_drawn(pipeline, images[i], i)).abs() for i in range(40)]
    # torchvision's grey weighs by 0.2989 where ours has 0.299: 1e-4, which a jitter of hue or a solarize may amplify
    assert torch.stack(off).quantile(0.99) < 1e-3
    assert sum(float(each.max()) < 5e-3 for each in off) >= 38


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.7, 1.0, 1.8])
def test_jitters_operations_are_torchvisions_on_floats(factor: float) -> None:
    images, level = photograph().expand(2, 3, SIZE, SIZE), torch.full((2,), factor)
    for ours, theirs in (
        (colour.brightness, F.adjust_brightness),
        (colour.contrast, F.adjust_contrast),
        (colour.saturation, F.adjust_saturation),
    ):
        torch.testing.assert_close(ours(images, level), theirs(images, factor), atol=2e-4, rtol=0)
    turned = colour.shift_hue(images, level / 4)
    torch.testing.assert_close(turned, F.adjust_hue(images, factor / 4), atol=2e-4, rtol=0)


# --- knobs


@pytest.mark.parametrize("name", ["simclr", "moco_v1", "moco_v2", "byol", "moco_v3", "pirl"])
def test_none_is_the_papers_number_and_zero_leaves_out(name: str) -> None:
    build = getattr(views, name)
    which = {"view": 2} if name in ("byol", "moco_v3") else {}
    own, given = build(SIZE, **which), build(SIZE, **which, **OWN)
    assert [type(step) for step in own] == [type(step) for step in given]
    picture = photograph(40, 40).expand(64, 3, 40, 40)
    assert torch.equal(run(own, picture), run(given, picture))
    none = {"solarise": 0.0} if which else {}
    bare = build(SIZE, **which, **none, strength=0.0, blur=0.0, flip=0.0, crop=[0.5, 0.6])
    assert {type(step) for step in bare} == {RandomResizedCrop, RandomGrey}
    assert bare[0].scale == (0.5, 0.6)
    half = build(SIZE, **which, strength=0.5, blur=0.3)
    ranges = [[step[2] for step in s._steps] for p in (own, half) for s in p if isinstance(s, ColourJitter)]
    assert ranges[1] == pytest.approx([0.5 * level for level in ranges[0]])
    assert [step.probability for step in half if isinstance(step, GaussianBlur)] == [0.3]


def test_digits_keep_their_side_and_colour() -> None:
    """No flip, no colour, no inversion: grey stays grey, and a stroke stays on its side."""
    images = torch.zeros(500, 3, 28, 28)
    images[:, :, 6:22, 8:12] = 1.0  # left of the middle
    augmented = run(views.digits(28), images)
    assert augmented.shape == images.shape
    assert (augmented.mean((2, 3)).amax(1) - augmented.mean((2, 3)).amin(1)).max() < 0.02  # the noise's doing
    left, right = augmented[..., :14].sum((1, 2, 3)), augmented[..., 14:].sum((1, 2, 3))
    assert (left > right).float().mean() > 0.9
    assert not [step for step in views.digits(28) if isinstance(step, RandomFlip | RandomGrey | RandomSolarize)]
    fitted = run(views.digits(20), images)
    assert fitted.shape == (500, 3, 20, 20)
    calm = views.digits(28, strength=0.0, blur=0.0)
    cut = run(calm, images)  # nothing is left but the cutout
    assert ((cut - images).abs() < 1e-5).flatten(1).float().mean() > 0.9


def test_labelled_pictures_are_flipped_and_moved_and_nothing_else() -> None:
    assert [type(step) for step in views.labelled()] == [RandomFlip, RandomAffine, ElasticDeformation]
    assert [type(step) for step in views.labelled(flip=0.0)] == [RandomAffine, ElasticDeformation]
    assert [step.probability for step in views.labelled()] == [0.5, 1.0, 0.5]
    assert views.labelled(flip=0.3)[0].probability == 0.3
    for strength, s in ((None, 1.0), (0.5, 0.5), (2.0, 2.0)):
        _, moved, deformed = views.labelled(strength=strength)
        assert (moved.degrees, moved.translate, moved.shear) == pytest.approx((15 * s, 0.1 * s, 10 * s))
        assert moved.scale == pytest.approx((0.85**s, 0.85**-s))
        assert (deformed.amplitude, deformed.of_side) == (pytest.approx(0.08 * s), True)
        assert moved.fill is deformed.fill is None, "reflected"


@pytest.mark.parametrize("size", [(28, 28), (40, 36)])
def test_labelled_pictures_keep_their_size_range_and_colours(size: tuple[int, int]) -> None:
    pictures = torch.stack([photograph(*size, seed=seed) for seed in range(50)])
    seen = run(views.labelled(strength=2.0), pictures)
    assert seen.shape == pictures.shape
    assert 0 <= seen.min() < seen.max() <= 1
    assert (seen.amin((2, 3)) >= pictures.amin((2, 3)) - 1e-5).all(), "no margin comes in from outside"
    grey = run(views.labelled(), pictures.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert torch.equal(grey[:, 0], grey[:, 2])
    white = torch.ones(50, 3, *size)
    torch.testing.assert_close(run(views.labelled(), white), white)


def test_labelled_views_are_the_same_for_the_same_numbers_and_otherwise_others() -> None:
    pictures = photograph().expand(30, 3, SIZE, SIZE)
    seen, again, later = (run(views.labelled(), pictures, step) for step in (0, 0, 1))
    assert torch.equal(seen, again)
    assert (seen != later).flatten(1).any(1).all()
    assert (seen[0] != seen[1:]).flatten(1).any(1).all(), "every image has numbers of its own"


def test_without_strength_labelled_pictures_are_flipped_or_as_they_were() -> None:
    pictures = photograph().expand(200, 3, SIZE, SIZE)
    torch.testing.assert_close(run(views.labelled(flip=0.0, strength=0.0), pictures), pictures, rtol=0, atol=1e-4)
    seen = run(views.labelled(strength=0.0), pictures)
    same, mirrored = ((seen - other).abs().flatten(1).amax(1) < 1e-4 for other in (pictures, pictures.flip(3)))
    assert (same != mirrored).all()
    assert 70 < int(mirrored.sum()) < 130  # half of 200, four deviations of 7
    assert not [step for step in views.labelled(flip=0.0) if isinstance(step, RandomFlip)]


def test_a_labelled_stroke_without_flips_stays_on_its_side() -> None:
    images = torch.zeros(300, 3, 28, 28)
    images[:, :, 6:22, 8:12] = 1.0  # left of the middle
    shares = []
    for flip in (0.0, None):
        seen = run(views.labelled(flip=flip), images)
        shares.append((seen[..., :14].sum((1, 2, 3)) > seen[..., 14:].sum((1, 2, 3))).float().mean().item())
    assert shares[0] > 0.9
    assert 0.35 < shares[1] < 0.65


@pytest.mark.parametrize(
    ("names", "types"),
    [
        ([], ["CentreFit"]),
        (["crop"], ["RandomResizedCrop"]),
        (["jitter", "crop"], ["ColourJitter", "RandomResizedCrop"]),
        (["cutout", "noise"], ["CentreFit", "RandomCutout", "GaussianNoise"]),
        (["rotate", "sobel"], ["CentreFit", "RandomQuarterTurn", "RandomSobel"]),
        (
            ["crop", "flip", "jitter", "grey", "blur", "solarise", "channel_drop", "elastic"],
            [
                *["RandomResizedCrop", "RandomFlip", "ColourJitter", "RandomGrey", "GaussianBlur", "RandomSolarize"],
                *["ChannelDrop", "ElasticDeformation"],
            ],
        ),
    ],
)
def test_chosen_operations_and_no_others(names: list[str], types: list[str]) -> None:
    pipeline = views.chosen(SIZE, names)
    assert [type(step).__name__ for step in pipeline] == types
    assert run(pipeline, photograph(40, 56).expand(20, 3, 40, 56)).shape == (20, 3, SIZE, SIZE)


def test_chosen_are_simclrs() -> None:
    picture = photograph(40, 56).expand(50, 3, 40, 56)
    assert torch.equal(
        run(views.chosen(SIZE, ["crop", "flip", "jitter", "grey", "blur"]), picture), run(views.simclr(SIZE), picture)
    )


# --- Views


def pair(**options: Any) -> Views:
    return Views([views.simclr(SIZE), views.simclr(SIZE)], image_size=SIZE, **{**PLAIN, **options})


def test_without_augmentation_it_normalises() -> None:
    images = (photograph() * 255).round().to(torch.uint8).expand(4, 3, SIZE, SIZE)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    first, second = Views([[], []], image_size=SIZE, mean=mean, std=std)(images, randomness(4))
    torch.testing.assert_close(first, F.normalize(images / 255, list(mean), list(std)))
    assert torch.equal(first, second)
    (again,) = Views([[]], image_size=SIZE, mean=mean, std=std)(images.float() / 255, randomness(4))
    assert torch.equal(again, first)


def test_views_draw_numbers_of_their_own() -> None:
    picture = photograph(40, 40).expand(200, 3, 40, 40)
    first, second = pair()(picture, randomness(200))
    assert (first != second).flatten(1).any(1).all()
    for of in MEASURES.values():  # unrelated, not merely different
        assert abs(stats.spearmanr(of(first).numpy(), of(second).numpy()).statistic) < 4.5 / 200**0.5
    third, _ = pair()(picture, randomness(200, step=1))
    assert (first != third).flatten(1).any(1).all()


def test_a_view_does_not_depend_on_the_others() -> None:
    picture = photograph(40, 40).expand(8, 3, 40, 40)
    alone = Views([views.simclr(SIZE)], image_size=SIZE, **PLAIN)(picture, randomness(8))
    two = pair()(picture, randomness(8))
    mixed = Views([views.simclr(SIZE), views.byol(SIZE, view=2), []], image_size=40, **PLAIN)
    assert torch.equal(alone[0], two[0])
    with pytest.raises(ValueError, match="a view is 32x32 px after its augmentations, image_size is 40"):
        mixed(picture, randomness(8))


def test_no_stream_is_drawn_twice_nor_shares_its_hash() -> None:
    recorder, picture = Recorder(4), photograph().expand(4, 3, SIZE, SIZE)
    everything = views.chosen(SIZE, ["crop", "flip", "jitter", "grey", "blur", "solarise", "cutout", "noise", "sobel"])
    both = Views([everything, everything, views.pirl(SIZE)], image_size=SIZE, channel_drop=0.5, elastic=0.5, **PLAIN)
    both(picture, recorder)
    jigsaw = JigsawViews(views.pirl(SIZE), views.pirl(None), image_size=SIZE, channel_drop=0.5, elastic=0.5, **PLAIN)
    jigsaw(picture, recorder)
    assert len(recorder.times) > 60
    assert set(recorder.times.values()) == {1}
    assert len({zlib.crc32(stream.encode()) for stream in recorder.times}) == len(recorder.times)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Views([], image_size=8, **PLAIN), "pipelines is empty: pass a list of augmentations for each view"),
        (lambda: Views([[RandomFlip(), RandomFlip()]], image_size=8, **PLAIN), "two steps draw from the stream 'flip'"),
        (lambda: pair(channel_drop=1.5), "probability is between 0 and 1, got 1.5"),
        (lambda: pair(elastic=-0.1), "probability is between 0 and 1, got -0.1"),
        (lambda: Views([[]], image_size=30, **PLAIN)(torch.rand(1, 3, 40, 40), randomness(1)), "image_size is 30: let"),
        (lambda: pair()(torch.rand(1, 3, 40, 40), randomness(2)), "the randomness is for 2 images, got 1"),
        (lambda: views.byol(SIZE, view=0), "BYOL's view is 1 or 2, got 0"),
        (lambda: views.chosen(SIZE, ["crop", "colour"]), "unknown augmentation 'colour': choose among crop, flip"),
        (lambda: views.chosen(SIZE, ["crop", "crop"]), "named twice in crop, crop: name each at most once"),
        (lambda: views.simclr(SIZE, crop=[0.5, 2]), "scale lies within 0 .. 1"),
        (
            lambda: JigsawViews([], [], image_size=32, cell=10, tile_size=11, **PLAIN),
            "a tile of 11 px doesn't fit a cell of 10 px: lower `tile_size`",
        ),
        (
            lambda: JigsawViews([], [CentreFit(8)], image_size=32, **PLAIN)(torch.rand(1, 3, 32, 32), randomness(1)),
            "a tile is 8x8 px after its augmentations, tile_size is 9",
        ),
        (
            lambda: JigsawViews([], [], image_size=32, **PLAIN)(torch.rand(1, 3, 40, 40), randomness(1)),
            "the image view is 40x40 px after its augmentations, image_size is 32",
        ),
    ],
)
def test_errors_are_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)


# --- PIRL's jigsaw


def jigsaw(tiles: list[nn.Module] | None = None, **options: Any) -> JigsawViews:
    """No augmentation, and the whole image as the source: scale (1, 1) of a square image is the image."""
    return JigsawViews([CentreFit(36)], tiles or [], **{"image_size": 36, "scale": (1.0, 1.0), **PLAIN, **options})


def coordinates(n: int, side: int) -> Tensor:
    """Images whose first channel is the row, and whose second the column, of a pixel: n 3 side side."""
    row = torch.arange(side, dtype=torch.float32).view(side, 1).expand(side, side)
    return torch.stack([row, row.T, torch.zeros(side, side)]).expand(n, 3, side, side)


def test_the_tiles_are_the_images_cells_each_once() -> None:
    image, tiles = jigsaw(cell=12, tile_size=8)(coordinates(300, 36), randomness(300))
    assert torch.equal(image, coordinates(300, 36))
    assert tiles.shape == (300, 9, 3, 8, 8)
    top, left = tiles[:, :, 0, 0, 0].round().long(), tiles[:, :, 1, 0, 0].round().long()
    window = coordinates(1, 36)[0].unfold(1, 8, 1).unfold(2, 8, 1)  # 3 places places 8 8
    torch.testing.assert_close(tiles, window[:, top, left].movedim(0, 2), atol=1e-4, rtol=0)
    cell = top // 12 * 3 + left // 12
    assert torch.equal(cell.sort(dim=1).values, torch.arange(9).expand(300, 9))
    assert (top % 12 <= 4).all()  # within its cell
    assert (left % 12 <= 4).all()


def test_orders_are_uniform_and_windows_too() -> None:
    _, tiles = jigsaw(cell=12, tile_size=8)(coordinates(6000, 36), randomness(6000))
    top, left = tiles[:, :, 0, 0, 0].round().long(), tiles[:, :, 1, 0, 0].round().long()
    order = top // 12 * 3 + left // 12
    for slot in range(9):
        assert stats.chisquare(torch.bincount(order[:, slot], minlength=9).numpy()).pvalue > 1e-3
    pairs = torch.bincount(order[:, 0] * 9 + order[:, 1], minlength=81).view(9, 9)
    assert not pairs.diagonal().any()
    assert stats.chisquare(pairs[~torch.eye(9, dtype=torch.bool)].numpy()).pvalue > 1e-3
    parity = torch.stack([order[:, i] > order[:, j] for i in range(9) for j in range(i + 1, 9)]).sum(0) % 2
    assert stats.binomtest(int(parity.sum()), 6000, 0.5).pvalue > 1e-3  # odd and even permutations alike
    assert len(set(map(tuple, order.tolist()))) > 5900  # of 362,880
    places = top % 12 * 5 + left % 12
    assert (
        stats.chisquare(
            torch.bincount(places.flatten(), minlength=60)[[5 * i + j for i in range(5) for j in range(5)]].numpy()
        ).pvalue
        > 1e-3
    )
    assert abs(torch.corrcoef(torch.stack([top[:, 0] % 12, top[:, 1] % 12]).float())[0, 1]) < 4.5 / 6000**0.5


@pytest.mark.parametrize(
    ("image_size", "cell", "tile"), [(224, 85, 64), (32, 12, 9), (28, 11, 8), (64, 24, 18), (96, 36, 27)]
)
def test_sizes_keep_the_papers_proportions(image_size: int, cell: int, tile: int) -> None:
    module = JigsawViews(views.pirl(image_size), views.pirl(None), image_size=image_size, **PLAIN)
    assert (module.cell, module.tile_size, module.source.size) == (cell, tile, (3 * cell, 3 * cell))
    assert (module.source.scale, module.window.size) == ((0.6, 1.0), (tile, tile))
    image, tiles = module(photograph(image_size + 8, image_size).expand(2, 3, -1, -1), randomness(2))
    assert image.shape == (2, 3, image_size, image_size)
    assert tiles.shape == (2, 9, 3, tile, tile)


@pytest.mark.parametrize(("cell", "tile"), [(10, 8), (11, 11)])
def test_cells_and_tiles_may_be_given(cell: int, tile: int) -> None:
    module = JigsawViews(views.pirl(32), views.pirl(None), image_size=32, cell=cell, tile_size=tile, **PLAIN)
    assert module(photograph().expand(2, 3, 32, 32), randomness(2))[1].shape == (2, 9, 3, tile, tile)


def test_every_tile_draws_numbers_of_its_own() -> None:
    """On a flat picture tiles differ by their colours only; of nine, two may be grey or jittered alike, not more."""
    flat = torch.tensor([0.6, 0.4, 0.2]).view(1, 3, 1, 1).expand(100, 3, 36, 36)
    _, tiles = jigsaw(views.pirl(None), cell=12)(flat, randomness(100))
    colours = tiles.mean((3, 4)).mul(200).round()
    assert min(len(set(map(tuple, of_image))) for of_image in colours.tolist()) >= 6


def test_the_jigsaw_is_normalised_last() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    images = (photograph(36, 36) * 255).round().to(torch.uint8).expand(8, 3, 36, 36)
    plain = jigsaw(cell=12)(images.float() / 255, randomness(8))
    for ours, expected in zip(jigsaw(cell=12, mean=mean, std=std)(images, randomness(8)), plain, strict=True):
        torch.testing.assert_close(ours, F.normalize(expected, list(mean), list(std)))


def test_the_jigsaws_source_is_another_crop_than_the_image() -> None:
    picture = coordinates(200, 64)
    module = JigsawViews([RandomResizedCrop(64)], [], image_size=64, cell=21, tile_size=21, **PLAIN)
    image, tiles = module(picture, randomness(200))
    of_image, of_tiles = image[:, 0].mean((1, 2)), tiles[:, :, 0].mean((1, 2, 3))
    assert abs(stats.spearmanr(of_image.numpy(), of_tiles.numpy()).statistic) < 0.32
    spread = tiles[:, :, 0].amax((1, 2, 3)) - tiles[:, :, 0].amin((1, 2, 3))  # rows that the source spans
    assert (spread > 0.6 * 64 * 0.75**0.5).float().mean() > 0.9


# --- the recipes in configs/views

RECIPES: dict[str, list[str]] = {
    "simclr": ["simclr", "simclr"],
    "simclr_v2": ["simclr", "simclr"],
    "margin": ["simclr", "simclr"],
    "moco_v1": ["moco_v1", "moco_v1"],
    "moco_v2": ["moco_v2", "moco_v2"],
    "simsiam": ["moco_v2", "moco_v2"],
    "moco_v3": ["moco_v3 1", "moco_v3 2"],
    "byol": ["byol 1", "byol 2"],
    "raft": ["byol 1", "byol 2"],
    "byol_prime": ["byol 1", "byol 2"],
    "supervised": ["supervised"],
}
each_recipe = pytest.mark.parametrize("name", [*RECIPES, "pirl", "digits", "pirl_digits"])


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., nn.Module]:
    """`recipe("simclr", "views.elastic=0.2")`: what a tool would build from configs/views/simclr.yaml."""
    (tmp_path / "main.yaml").write_text(
        "defaults:\n  - _self_\n  - views: ???\n"
        f"hydra: {{searchpath: ['file://{CONFIGS}']}}\n"
        f"image_size: {SIZE}\nmean: [0.0, 0.0, 0.0]\nstd: [1.0, 1.0, 1.0]\n"
        "augmentation: {strength: null, blur: null, flip: null, crop: null, solarise: null}\n"
    )

    def build(name: str, *overrides: str, convert: str = "all") -> nn.Module:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
            config = hydra.compose("main", [f"views={name}", *overrides])
        return hydra.utils.instantiate(config.views, _convert_=convert)

    return build


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_papers_pipelines(name: str, recipe: Callable[..., nn.Module]) -> None:
    images = photograph(40, 36).expand(16, 3, 40, 36)
    expected = Views([PIPELINES[view](SIZE) for view in RECIPES[name]], image_size=SIZE, **PLAIN)
    for convert in ("all", "none"):
        seen = recipe(name, convert=convert)(images, randomness(16))
        assert len(seen) == len(RECIPES[name])
        for ours, theirs in zip(seen, expected(images, randomness(16)), strict=True):
            assert torch.equal(ours, theirs)


def test_pirls_recipe_is_the_authors(recipe: Callable[..., nn.Module]) -> None:
    images = photograph(40, 36).expand(16, 3, 40, 36)
    expected = JigsawViews(views.pirl(SIZE), views.pirl(None), image_size=SIZE, **PLAIN)(images, randomness(16))
    for ours, theirs in zip(recipe("pirl")(images, randomness(16)), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("overrides", "flip"), [([], None), (["augmentation.flip=0"], 0.0)])
def test_labelleds_recipe_is_one_view_and_flips_as_told(
    overrides: list[str], flip: float | None, recipe: Callable[..., nn.Module]
) -> None:
    images = torch.stack([photograph(seed=seed) for seed in range(16)])
    module = recipe("labelled", *overrides)
    (seen,) = module(images, randomness(16))
    (expected,) = Views([views.labelled(flip=flip)], image_size=SIZE, **PLAIN)(images, randomness(16))
    assert torch.equal(seen, expected)
    (alone,) = module(images[7:8], Randomness(0, 0, torch.tensor([7])))
    assert torch.equal(alone, seen[7:8])
    (on_a_device,) = module(torch.empty(16, 3, SIZE, SIZE, device="meta"), randomness(16))
    assert on_a_device.is_meta


@each_recipe
def test_a_recipes_views_are_the_same_alone_and_in_a_batch(name: str, recipe: Callable[..., nn.Module]) -> None:
    module = recipe(name, "views.channel_drop=0.5", "views.elastic=0.5")
    images = torch.stack([photograph(seed=seed) for seed in range(12)])
    whole = module(images, Randomness(5, 3, torch.arange(100, 112)))
    alone = module(images[7:8], Randomness(5, 3, torch.tensor([107])))
    rest = module(images[8:], Randomness(5, 3, torch.arange(108, 112)))
    assert all(view.isfinite().all() for view in whole)
    for of_whole, of_one, of_rest in zip(whole, alone, rest, strict=True):
        assert torch.equal(of_whole[7:8], of_one)
        assert torch.equal(of_whole[8:], of_rest)


@each_recipe
def test_the_additions_reach_every_view(name: str, recipe: Callable[..., nn.Module]) -> None:
    images = torch.stack([photograph(seed=seed) for seed in range(30)]) * 0.8 + 0.1
    calm, elastic, dropped = (
        recipe(name, *overrides)(images, randomness(30))
        for overrides in ([], ["views.elastic=1.0"], ["views.channel_drop=1.0"])
    )
    for before, moved, lost in zip(calm, elastic, dropped, strict=True):
        images_of = before.flatten(0, 1) if before.ndim == 5 else before
        assert (moved.reshape_as(images_of) != images_of).flatten(1).any(1).float().mean() > 0.95
        dark = (lost.reshape_as(images_of) == 0).flatten(2).all(2)
        assert (dark.sum(1) >= 2).all()
        kept = ~dark.unsqueeze(-1).unsqueeze(-1)
        assert torch.equal(lost.reshape_as(images_of), images_of * kept)  # all else is as it was


@each_recipe
def test_one_knob_sets_both_views(name: str, recipe: Callable[..., nn.Module]) -> None:
    knobs = ["augmentation.strength=0.5", "augmentation.blur=0.3", "augmentation.flip=0", "augmentation.crop=[0.5,0.6]"]
    module = recipe(name, *knobs, "augmentation.solarise=0.1")
    pipelines = module.pipelines if isinstance(module, Views) else (module.image, module.tiles)
    for pipeline in pipelines:
        steps = {type(step): step for step in pipeline}
        assert RandomFlip not in steps
        if name == "supervised":
            assert set(steps) == {RandomResizedCrop}
        else:
            assert steps[GaussianBlur].probability == 0.3
        if name in ("byol", "byol_prime", "raft", "moco_v3"):
            assert steps[RandomSolarize].probability == 0.1
        if RandomResizedCrop in steps:
            assert steps[RandomResizedCrop].scale == (0.5, 0.6)
        else:
            assert "digits" in name or pipeline is pipelines[1]
        if "digits" in name:
            assert steps[GaussianNoise].std == pytest.approx(0.05)
    assert not [step for pipeline in pipelines for step in pipeline if isinstance(step, RandomCrop)]


@each_recipe
def test_recipes_use_no_global_generator_and_no_cpu_tensor_on_a_device(
    name: str, recipe: Callable[..., nn.Module]
) -> None:
    module, state = recipe(name, "views.channel_drop=0.5", "views.elastic=0.5"), torch.get_rng_state()
    for view in module(torch.empty(16, 3, 40, 36, device="meta"), randomness(16)):
        assert view.is_meta
    assert torch.equal(state, torch.get_rng_state())
