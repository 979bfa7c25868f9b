"""What everything beside the encoder costs, against what one would use instead and against the machine's own limits.

    python benchmarks/speed.py --photos caltech101-train.parquet       # make bench; 5 minutes on two quiet cores
    python benchmarks/speed.py --parts step patches                    # some of it; the rest of the file stays
    python benchmarks/speed.py --plot                                  # docs/speed.png from what was recorded

    step       a step of CPC v2 at STL-10's size (64 px, 49 patches of 16 px, ResNet-14, 16 images, four context
               networks of five blocks, all positions as candidates) against its encoder, its context networks, and a
               plain version that we wrote in the manner of public ones, whose loss has 16 sampled negatives
    encoder    its operations a second against those of products of the same shapes
    compiled   encoder and context network against themselves under torch.compile
    patches    CPC v2's augmentation of 80 px patches against kornia's modules of the same operations and probabilities
    views      SimCLR's two views of 96 px against kornia's and torchvision's v2 on tensors
    loader     decoding 500x375 and 640x427 JPEGs against torchvision's ImageFolder, Resize, CenterCrop, ToTensor
    losses     NT-Xent of 256 images against lightly and pytorch-metric-learning (which wants 34 GB for 1,024)

Sides take turns, the first turn is not counted; a ratio is of one turn, its median and range over all turns. The
limits, a product of 2,048 squares and a copy of 256 MiB, are measured in the same run. Writes results/speed.json.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import kornia.augmentation as K
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from record import RESULTS, ROOT, machine, write
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive_core.augment import Seeded, Views
from contrastive_core.augment.views import simclr
from contrastive_core.data import ImageDataset, imagefolder, parquet
from contrastive_core.losses import nt_xent
from contrastive_core.method import Batch
from contrastive_core.plots import BLUE, INK, RUST, new_figure, save_figure, tidy_axes
from contrastive_core.randomness import Randomness
from cpc.context import DIRECTIONS, ContextNetwork, turn
from cpc.encoders import resnet_small
from cpc.entry import config_search
from cpc.patch_augment import patch_augment_v2
from cpc.pretrain import build_method

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STL10 = ["method=cpc", "load_size=64", "image_size=64", "patch={size: 16, stride: 8}", "steps=1", "batch_size=16"]
STL10 += ["encoder.width=64", "encoder.blocks=[2,2,2]"]
IMAGES, GRID, PATCH, OFFSETS = 16, 7, 16, (2, 3, 4)
Times = dict[str, list[float]]


def turns(sides: dict[str, Callable[[int], Any]], rounds: int) -> Times:
    """Seconds of every side in every turn; a side gets the number of its turn."""
    times: Times = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side(round_)
            if round_:
                times[name].append(time.perf_counter() - began)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {
        name: float(f"{of(values):.4g}") for name, of in (("median", statistics.median), ("least", min), ("most", max))
    }


def ratios(times: Times, below: str) -> dict[str, dict[str, float]]:
    """Every side's time in units of one side's, turn by turn."""
    return {name: spread([a / b for a, b in zip(each, times[below], strict=True)]) for name, each in times.items()}


def limits(rounds: int) -> dict[str, Any]:
    """GFLOP/s of a large product, GB/s of a large copy."""
    square, block = torch.rand(2048, 2048), torch.rand(1 << 26)
    target = torch.empty_like(block)
    times = turns({"product": lambda _: square @ square, "copy": lambda _: target.copy_(block)}, rounds)
    return {
        "matrix_gflops": spread([2 * 2048**3 / seconds / 1e9 for seconds in times["product"]]),
        "copy_gb_a_second": spread([2 * block.nbytes / seconds / 1e9 for seconds in times["copy"]]),
    }


# ---- the step ----


class PlainCPC(nn.Module):
    """CPC v2 as public versions write it: channels first, GroupNorm and ReLU apart, one context network for all
    directions, the scores of 16 sampled negatives of each prediction by a batched product. Written for this comparison.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = resnet_small(width=64, blocks=(2, 2, 2))
        self.encoder.feature_map = partial(self._channels_first)  # type: ignore[method-assign]
        self.context = ContextNetwork(256, width=256, layers=5)
        self.heads = nn.ModuleList(nn.Linear(256, 64) for _ in DIRECTIONS for _ in OFFSETS)
        self.target = nn.Linear(256, 64, bias=False)

    def _channels_first(self, images: Tensor) -> Tensor:
        maps = self.encoder.stem(images)
        for stack in self.encoder.stacks:
            for block in stack:  # type: ignore[attr-defined]
                maps = block(maps)
        return F.relu(self.encoder.final_norm(maps))

    def forward(self, patches: Tensor) -> Tensor:
        flat = rearrange(patches, "b r c k h w -> (b r c) k h w").contiguous()
        latents = self.encoder(flat).view(len(patches), GRID, GRID, -1)
        losses = []
        for place, (direction, offset) in enumerate((d, o) for d in DIRECTIONS for o in OFFSETS):
            grid = turn(latents, direction)
            context = self.context(grid)[:, : GRID - offset]
            queries = self.heads[place](context).flatten(0, 2)
            positives = self.target(grid[:, offset:]).flatten(0, 2)
            everything = self.target(latents).flatten(0, 2)
            negatives = everything[torch.randint(len(everything), (len(queries), 16))]
            scores = torch.cat([positives[:, None], negatives], 1) @ queries[:, :, None]
            losses.append(F.cross_entropy(scores.squeeze(2) / 10, torch.zeros(len(queries), dtype=torch.int64)))
        return torch.stack(losses).mean()


def our_step() -> tuple[nn.Module, Tensor]:
    """The method at STL-10's size as a run has it, and patches."""
    with config_search():
        method, _ = build_method(hydra.compose("pretrain", [*STL10, f"method.offsets={list(OFFSETS)}"]))
    patches = torch.rand(IMAGES, GRID, GRID, 3, PATCH, PATCH, generator=torch.Generator().manual_seed(0))
    return method.to(memory_format=torch.channels_last), patches


def step(rounds: int) -> dict[str, Any]:
    """The step over its encoder, over its arithmetic, and the plain one over it."""
    sides = steps_sides(*our_step()) | plain_sides()
    if machine()["bf16_flags"]:
        sides |= {f"{name}, bf16": in_bf16(side) for name, side in sides.items()}
    times = turns(sides, rounds)
    found: dict[str, Any] = {"seconds": {name: spread(each) for name, each in times.items()}}
    for mark in ("", ", bf16"):
        if f"step{mark}" not in times:
            continue
        ours, contexts = (times[f"{name}{mark}"] for name in ("step", "context networks"))
        rest = times[f"step without its encoder{mark}"]
        beyond = [(r - c) / s for r, c, s in zip(rest, contexts, ours, strict=True)]
        found |= {
            f"over_the_encoder{mark}": ratios(times, f"encoder{mark}")[f"step{mark}"],
            f"beyond_encoder_and_context{mark}": spread(beyond),
            f"plain_over_ours{mark}": ratios(times, f"step{mark}")[f"plain{mark}"],
        }
    if "step, bf16" in times:
        found["plain_in_fp32_over_ours_in_bf16"] = ratios(times, "step, bf16")["plain"]
    return found


def steps_sides(method: nn.Module, patches: Tensor) -> dict[str, Callable[[int], Any]]:
    """Our step, its encoder and its context networks by themselves, and the step where the latents are there already:
    forward and backward. What is beyond encoder and context is the last less the contexts: a difference of two small
    times, where the step less its encoder would be one of two large ones.
    """
    places = torch.arange(IMAGES)
    latents = torch.rand(IMAGES, GRID, GRID, 256, requires_grad=True)
    without = copy.deepcopy(method)
    without.encoder = Given(latents)

    def contexts(_: int) -> None:
        for direction in DIRECTIONS:
            method.contexts[direction](turn(latents, direction)).sum().backward()  # type: ignore[index]

    return {
        "encoder": lambda _: method.encoder(patches.flatten(0, 2)).sum().backward(),  # type: ignore[operator]
        "context networks": contexts,
        "step": lambda _: method(Batch((patches,), places, places))[0].backward(),
        "step without its encoder": lambda _: without(Batch((patches,), places, places))[0].backward(),
    }


class Given(nn.Module):
    """In an encoder's place: latents that are there already, with a gradient."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents, self.dim = latents, latents.shape[-1]

    def forward(self, _: Tensor) -> Tensor:
        return self.latents.flatten(0, 2)


def plain_sides() -> dict[str, Callable[[int], Any]]:
    """The plain version's step, and its encoder's share of it."""
    plain, (_, patches) = PlainCPC(), our_step()
    return {
        "plain": lambda _: plain(patches).backward(),
        "plain encoder": lambda _: plain.encoder(patches.flatten(0, 2).contiguous()).sum().backward(),
    }


def in_bf16(side: Callable[[int], Any]) -> Callable[[int], Any]:
    """The same under autocast, as accelerate has it."""

    def run(round_: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            side(round_)

    return run


def encoder(rounds: int) -> dict[str, Any]:
    """The encoder's operations a second over those of products of its convolutions' shapes."""
    method, patches = our_step()
    net, flat = method.encoder, patches.flatten(0, 2)
    shapes = convolutions(net, flat)  # type: ignore[arg-type]
    found = {"fp32": against_products(partial(_forth_and_back, net, flat), shapes, torch.float32, rounds)}
    if machine()["bf16_flags"]:
        side = in_bf16(partial(_forth_and_back, net, flat))
        found["bf16"] = against_products(side, shapes, torch.bfloat16, rounds)
    return found


def _forth_and_back(net: Any, images: Tensor, _: int) -> None:
    net(images).sum().backward()


def convolutions(net: nn.Module, images: Tensor) -> list[tuple[int, int, int]]:
    """Every convolution as a product, rows x inner x columns, in the order in which they are used."""
    shapes: list[tuple[int, int, int]] = []

    def note(layer: nn.Module, _: Any, out: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        shapes.append((out.shape[0] * out.shape[2] * out.shape[3], layer.weight[0].numel(), layer.out_channels))

    hooks = [layer.register_forward_hook(note) for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    net(images)
    for hook in hooks:
        hook.remove()
    return shapes


def against_products(
    side: Callable[[int], Any], shapes: list[tuple[int, int, int]], dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """A network's forward and backward pass over the products that its convolutions are: one forward, two backward.

    "share_of_the_best" is of the rate of the fastest of these products; "share_of_its_own" is the time that the same
    products take one after the other, each at the rate of its own shape, over the network's.
    """
    m, k, n = shapes[0]
    products = [shape for a, b, c in shapes for shape in ((a, b, c), (b, a, c), (a, c, b))]
    products.remove((m, n, k))  # no gradient of the images
    sides: dict[str, Callable[[int], Any]] = {"encoder": side}
    for shape in sorted(set(products)):
        sides[_name(shape)] = partial(_product, *_operands(shape, dtype))
    times = turns(sides, rounds)
    rates = {shape: [_operations(shape) / s for s in times[_name(shape)]] for shape in set(products)}
    best = rates[max(rates, key=lambda shape: statistics.median(rates[shape]))]
    operations = sum(map(_operations, products))
    alone = [sum(times[_name(shape)][turn_] for shape in products) for turn_ in range(rounds)]
    return {
        "gflops": spread([operations / s / 1e9 for s in times["encoder"]]),
        "products_gflops": {_name(shape): spread([rate / 1e9 for rate in rates[shape]]) for shape in sorted(rates)},
        "share_of_the_best": spread([operations / s / b for s, b in zip(times["encoder"], best, strict=True)]),
        "share_of_its_own": spread([a / s for a, s in zip(alone, times["encoder"], strict=True)]),
    }


def _operations(shape: tuple[int, int, int]) -> int:
    return 2 * shape[0] * shape[1] * shape[2]


def _name(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))


def _operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.rand(shape[0], shape[1], dtype=dtype), torch.rand(shape[1], shape[2], dtype=dtype)


def _product(left: Tensor, right: Tensor, _: int) -> Tensor:
    return left @ right


def compiled(rounds: int) -> dict[str, Any]:
    """Whether `torch.compile` pays here: the encoder and the context networks as they are, over them compiled."""
    method, patches = our_step()
    images, latents = patches.flatten(0, 2), torch.rand(IMAGES, GRID, GRID, 256, requires_grad=True)
    context = method.contexts[DIRECTIONS[0]]  # type: ignore[index]
    sides = {
        "encoder": partial(_forth_and_back, method.encoder, images),
        "encoder, compiled": partial(_forth_and_back, torch.compile(method.encoder), images),
        "context network": partial(_forth_and_back, context, latents),
        "context network, compiled": partial(_forth_and_back, torch.compile(context), latents),
    }
    if machine()["bf16_flags"]:
        sides |= {f"{name}, bf16": in_bf16(side) for name, side in sides.items()}
    times = turns(sides, rounds)  # whose first turn compiles
    plain = [name for name in sides if "compiled" not in name]
    named = {
        name: name.replace("encoder", "encoder, compiled").replace("network", "network, compiled") for name in plain
    }
    return {
        "seconds": {name: spread(each) for name, each in times.items()},
        "over_compiled": {name: ratios(times, other)[name] for name, other in named.items()},
    }


# ---- augmentation ----


def kornias_patches() -> nn.Module:
    """AutoAugment's operations, each on one patch in eight, then the paper's list, as kornia's modules have them."""
    each = 2 / 16
    geometric = [
        K.RandomShear((-17, 17, 0.0, 0.0), p=each),
        K.RandomShear((0.0, 0.0, -17, 17), p=each),
        K.RandomTranslate((-0.3, 0.3), None, p=each),
        K.RandomTranslate(None, (-0.3, 0.3), p=each),
        K.RandomRotation(30, p=each),
    ]
    colours = [
        K.RandomAutoContrast(p=each),
        K.RandomInvert(p=each),
        K.RandomEqualize(p=each),
        K.RandomSolarize(0.5, 0.0, p=each),
        K.RandomPosterize((4, 8), p=each),
        K.RandomContrast((0.1, 1.9), p=each),
        K.RandomSaturation((0.1, 1.9), p=each),
        K.RandomBrightness((0.1, 1.9), p=each),
        K.RandomSharpness(0.9, p=each),
        K.RandomErasing((0.01, 0.06), p=each),
    ]
    papers = [
        K.RandomElasticTransform((23, 23), (4.0, 4.0), (1.0, 1.0), p=0.2),
        K.RandomShear((-11, 11, -11, 11), p=0.2),
        K.ColorJitter(32 / 255, 0.5, 0.5, 0.2, p=0.8),
        K.RandomGrayscale(p=0.25),
        K.RandomChannelDropout(num_drop_channels=2, p=1.0),
    ]
    return nn.Sequential(*geometric, *colours, *papers)


def patches(rounds: int) -> dict[str, Any]:
    """Augmentation: 144 patches of 80 px, those of four images."""
    given = torch.rand(4, 6, 6, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    ours, theirs = patch_augment_v2(), kornias_patches()
    without = (
        patch_augment_v2(elastic=0.0),
        nn.Sequential(*(m for m in theirs if not isinstance(m, K.RandomElasticTransform))),
    )
    sides: dict[str, Callable[[int], Any]] = {
        "ours": lambda i: ours(given, Randomness(0, i, torch.arange(4))),
        "kornia": lambda _: theirs(given.flatten(0, 2)),
        "ours without elastic": lambda i: without[0](given, Randomness(0, i, torch.arange(4))),
        "kornia without elastic": lambda _: without[1](given.flatten(0, 2)),
    }
    with torch.no_grad():
        times = turns(sides, rounds)
    count = given.flatten(0, 2).shape[0]
    return {
        "patches_a_second": {name: spread([count / s for s in each]) for name, each in times.items()},
        "kornia_over_ours": ratios(times, "ours")["kornia"],
        "kornia_over_ours_without_elastic": ratios(times, "ours without elastic")["kornia without elastic"],
    }


def views(rounds: int) -> dict[str, Any]:
    """Views: two views each of 64 images of 96 px; torchvision an image at a time, as it must."""
    from torchvision.transforms import v2

    images = torch.randint(256, (64, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    recipe = partial(simclr, 96, strength=1.0, blur=0.5)
    ours = Views([recipe(), recipe()], image_size=96, mean=MEAN, std=STD)
    kernel = (9, 9)  # a tenth of the side, as SimCLR has it
    steps = [K.RandomResizedCrop((96, 96)), K.RandomHorizontalFlip(), K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8)]
    steps += [K.RandomGrayscale(p=0.2), K.RandomGaussianBlur(kernel, (0.1, 2.0), p=0.5)]
    kornias = Views([[Seeded(nn.Sequential(*steps))]] * 2, image_size=96, mean=MEAN, std=STD)
    one = v2.Compose([
        v2.RandomResizedCrop(96, antialias=True), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 0.5), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    sides: dict[str, Callable[[int], Any]] = {
        "ours": lambda i: ours(images, Randomness(0, i, torch.arange(64))),
        "kornia": lambda i: kornias(images, Randomness(0, i, torch.arange(64))),
        "torchvision": lambda _: [torch.stack([one(image) for image in images]) for _ in range(2)],
    }
    with torch.no_grad():
        times = turns(sides, rounds)
    over = ratios(times, "ours")
    return {
        "images_a_second": {name: spread([64 / s for s in each]) for name, each in times.items()},
        "kornia_over_ours": over["kornia"],
        "torchvision_over_ours": over["torchvision"],
    }


# ---- data ----


def photographs(source: Path | None) -> dict[str, list[bytes]]:
    """JPEGs of quality 90: scikit-learn's two of 640x427, and, of a parquet file, 200 brought to 500x375."""
    from sklearn.datasets import load_sample_images

    found = {"scikit-learn's two, 640x427": [_jpeg(Image.fromarray(each)) for each in load_sample_images().images] * 20}
    if source is not None:
        dataset = parquet(source, size=96, cache=False).train.source
        pictures = [Image.open(io.BytesIO(dataset[i])).convert("RGB").resize((500, 375)) for i in range(200)]
        found["photographs brought to 500x375"] = [_jpeg(each) for each in pictures]
    return found


def _jpeg(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return content.getvalue()


def decoding(files: list[bytes], size: int, rounds: int) -> dict[str, Any]:
    """One core: every image of a folder, decoded to the size that a network takes."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "photos").mkdir()
        for place, content in enumerate(files):
            (Path(folder) / "photos" / f"{place:04d}.jpg").write_bytes(content)
        theirs = ImageFolder(folder, Compose([Resize(size), CenterCrop(size), ToTensor()]))
        ours: ImageDataset = imagefolder(folder, size=size, cache=False).train
        sides: dict[str, Callable[[int], Any]] = {
            "ours": lambda _: [ours[i].image for i in range(len(ours))],
            "torchvision": lambda _: [theirs[i][0] for i in range(len(theirs))],
        }
        times = turns(sides, rounds)
        apart = np.mean(
            [np.abs(ours[i].image.numpy() / 255 - theirs[i][0].numpy()).mean() for i in range(0, len(ours), 5)]
        )
    return {
        "images_a_second": {name: spread([len(files) / s for s in each]) for name, each in times.items()},
        "torchvision_over_ours": ratios(times, "ours")["torchvision"],
        "mean_difference_in_0_to_1": round(float(apart), 5),
    }


def loader(rounds: int, source: Path | None = None) -> dict[str, Any]:
    """The loader, at sizes that networks take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {
        f"{name}, to {size} px": decoding(files, size, rounds)
        for name, files in photographs(source).items()
        for size in (96, 160, 224)
    }
    torch.set_num_threads(threads)
    return found


# ---- losses ----


def losses(rounds: int) -> dict[str, Any]:
    """NT-Xent, forward and backward; figures of their own are in benchmarks/losses.py."""
    from lightly.loss import NTXentLoss as Lightly
    from pytorch_metric_learning.losses import NTXentLoss as MetricLearning
    from pytorch_metric_learning.losses import SelfSupervisedLoss

    z1, z2 = (torch.rand(256, 128, requires_grad=True) for _ in range(2))
    lightly, metric = Lightly(temperature=0.1), SelfSupervisedLoss(MetricLearning(temperature=0.1))
    sides: dict[str, Callable[[int], Any]] = {
        "ours": lambda _: nt_xent(z1, z2, temperature=0.1).backward(),
        "lightly": lambda _: lightly(z1, z2).backward(),
        "pytorch-metric-learning": lambda _: metric(z1, z2).backward(),
    }
    times = turns(sides, rounds)
    return {
        "seconds": {name: spread(each) for name, each in times.items()},
        "over_ours": {name: each for name, each in ratios(times, "ours").items() if name != "ours"},
    }


# ---- the picture ----

BARS = (
    ("a step of CPC v2, 64 px", "a plain one of ours", ("step", "plain_over_ours")),
    ("CPC v2's patches, augmented", "kornia", ("patches", "kornia_over_ours")),
    ("SimCLR's two views, 96 px", "kornia", ("views", "kornia_over_ours")),
    ("SimCLR's two views, 96 px", "torchvision v2", ("views", "torchvision_over_ours")),
    (
        "500x375 JPEGs to 96 px",
        "torchvision",
        ("loader", "photographs brought to 500x375, to 96 px", "torchvision_over_ours"),
    ),
    (
        "500x375 JPEGs to 224 px",
        "torchvision",
        ("loader", "photographs brought to 500x375, to 224 px", "torchvision_over_ours"),
    ),
    ("NT-Xent of 256 images", "lightly", ("losses", "over_ours", "lightly")),
)
"""What is compared, with what, and where the ratio stands in the record."""


def plot(parts: dict[str, Any], path: Path) -> None:
    """How many times our time each of the others takes, median and range over turns, to a PNG."""
    figure, grid = new_figure(1, 1, (7.6, 3.3))
    axes = grid[0, 0]
    for place, (what, other, keys) in enumerate(BARS):
        found: Any = parts
        for key in keys:
            found = found[key]
        middle = found["median"]
        axes.barh(place, middle, height=0.62, color=BLUE)
        axes.plot([found["least"], found["most"]], [place, place], color=INK, linewidth=1.2)
        axes.text(found["most"] + 0.08, place, f"{middle:.1f}x  {other}", va="center", color=INK, fontsize=9)
        axes.text(-0.08, place, what, va="center", ha="right", color=INK, fontsize=9)
    axes.axvline(1, color=RUST, linewidth=1.2)
    axes.text(1.04, -0.62, "ours = 1", color=RUST, fontsize=9, va="center")
    axes.set_ylim(len(BARS) - 0.5, -0.95)
    axes.set_xlim(0, 1.5 * max(1.0, *(patch.get_width() for patch in axes.patches)))
    axes.set_yticks([])
    tidy_axes(axes, "times our time, two threads (JPEGs: one)", "")
    axes.grid(visible=False)
    save_figure(figure, path)


PARTS: dict[str, tuple[Callable[..., dict[str, Any]], int]] = {
    "step": (step, 7), "encoder": (encoder, 7), "compiled": (compiled, 7), "patches": (patches, 7), "views": (views, 7),
    "loader": (loader, 5), "losses": (losses, 7),
}  # fmt: skip


def main() -> None:
    """Measure the parts that are asked for, and keep the others of before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--photos", type=Path, help="a parquet file of photographs, for the loader")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", action="store_true", help="only draw docs/speed.png")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    file = asked.out / "speed.json"
    if asked.plot:
        plot(json.loads(file.read_text())["parts"], ROOT / "docs" / "speed.png")
        return
    kept = json.loads(file.read_text())["parts"] if file.is_file() else {}
    for name in asked.parts:
        measure, rounds = PARTS[name]
        options = {"source": asked.photos} if name == "loader" else {}
        kept[name] = {"limits": limits(5), **measure(rounds, **options)}
        print(name, json.dumps(kept[name], indent=1), flush=True)
    write(
        "speed", "python benchmarks/speed.py --photos FILE", {"threads": asked.threads, "parts": kept}, folder=asked.out
    )


if __name__ == "__main__":
    main()
