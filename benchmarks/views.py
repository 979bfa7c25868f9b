"""SimCLR's view of a batch: ours against kornia's and torchvision's modules with the same parameters.

    python benchmarks/views.py

256 images of 32 px (no blur, as on CIFAR-10) and 32 of 224 px (blur of half of them, kernel 23), two threads, random
pixels: the cost of a view hardly depends on the picture. All three have batches on the device; torchvision's v2
draws one set of numbers a batch, so it is called an image at a time, as in a loader. They take turns; the first turn
is not counted. Writes benchmarks/results/views.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import kornia.augmentation as K
import torch
from record import takes_no_arguments, write
from torch import Tensor, nn

from contrastive_core.augment import Seeded, Views
from contrastive_core.augment.views import simclr
from contrastive_core.data import worker_views
from contrastive_core.randomness import Randomness

ROUNDS = 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = {"32 px": (256, 32, 0.5, 0.0), "224 px": (32, 224, 1.0, 0.5)}
"""images, pixels a side, strength, probability of blur"""


def kornias(size: int, strength: float, blur: float) -> nn.Module:
    """SimCLR's pipeline of kornia's modules."""
    steps: list[nn.Module] = [K.RandomResizedCrop((size, size)), K.RandomHorizontalFlip()]
    jitter = K.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength, p=0.8)
    steps += [jitter, K.RandomGrayscale(p=0.2)]
    if blur:
        steps.append(K.RandomGaussianBlur((23, 23), (0.1, 2.0), p=blur))
    return nn.Sequential(*steps)


def sides(size: int, strength: float, blur: float) -> dict[str, nn.Module]:
    """One view of each, normalised."""
    common = {"mean": MEAN, "std": STD, "image_size": size}
    loader = worker_views.simclr(size, strength=strength, blur=blur)
    return {
        "ours": Views([simclr(size, strength=strength, blur=blur)], **common),
        "kornia": Views([[Seeded(kornias(size, strength, blur))]], **common),
        "torchvision, an image at a time": worker_views.WorkerViews([loader], **common),
    }


def milliseconds(view: Callable[[Tensor, Randomness], tuple[Tensor, ...]], images: Tensor, step: int) -> float:
    """One batch."""
    randomness = Randomness(0, step, torch.arange(len(images)))
    began = time.perf_counter()
    view(images, randomness)
    return 1000 * (time.perf_counter() - began)


def compare(count: int, size: int, strength: float, blur: float) -> dict[str, object]:
    """Times of every turn, their medians, and ours against each of the others, turn by turn."""
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = sides(size, strength, blur)
    times: dict[str, list[float]] = {name: [] for name in views}
    for step in range(ROUNDS + 1):
        for name, view in views.items():
            took = milliseconds(view, images, step)
            if step:
                times[name].append(took)
    ratios = {}
    for name in views:
        each = sorted(theirs / mine for theirs, mine in zip(times[name], times["ours"], strict=True))
        ratios[name] = {"median": statistics.median(each), "least": each[0], "most": each[-1]}
    rows = {name: {"ms": values, "median": statistics.median(values)} for name, values in times.items()}
    return {"images": count, "rows": rows, "times_ours": ratios}


def main() -> None:
    """Take turns, print, record."""
    takes_no_arguments(__doc__)
    torch.set_num_threads(2)
    results = {name: compare(*shape) for name, shape in SHAPES.items()}
    for name, result in results.items():
        print(name, result["times_ours"])
    write("views", "python benchmarks/views.py", {"shapes": results})


if __name__ == "__main__":
    main()
