"""Which images make up which batch, and how they get there.

The order of samples is a pure function of (seed, epoch) and the global batch one of (seed, step), so the state of
the sampler is the step: a run resumes exactly, and does the same on one process or on several. Each process takes
its slice of the global batch; no loader is handed to accelerate to prepare, whose sharding would make the batch
size count per process and repeat samples to even out.
"""

from __future__ import annotations

import copy
import functools
import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from contrastive_core.data.images import ImageDataset, Sample
from contrastive_core.randomness import Randomness

if TYPE_CHECKING:
    from contrastive_core.data.worker_views import WorkerViews  # loads torchvision

logger = logging.getLogger(__name__)


LINGER = 20
"""Seconds that a worker goes on after a SIGTERM, if it is not told to end before."""


class LoadedBatch(NamedTuple):
    """Images of one micro-batch, on the CPU.

    images: `b 3 s s` uint8; labels: `b` int64, -1 = unlabelled; indices: `b` int64, into the data set;
    places: `b` int64, where each stands in the global batch (the address of its random numbers);
    faults: the name and reason of each image that could not be decoded, often empty; views: the images augmented,
    a `b 3 h w` float a view, where the loader was asked for them.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    places: Tensor
    faults: list[str]
    views: tuple[Tensor, ...] | None = None


class Shards(NamedTuple):
    """In which of several files each image lies, `n` int64, and of how many files images are mixed at a time."""

    of_image: Tensor
    at_a_time: int


@functools.lru_cache(maxsize=2)  # a step asks for its epoch's order again
def _order(count: int, seed: int, epoch: int, of_image: Tensor | None = None, at_a_time: int = 0) -> Tensor:
    keys = Randomness(seed, epoch, torch.arange(count)).integers("sample order", 1 << 62)
    order = keys.argsort(stable=True)
    if of_image is None:
        return order
    shard_keys = Randomness(seed, epoch, torch.arange(int(of_image.max()) + 1)).integers("shard order", 1 << 62)
    group = shard_keys.argsort(stable=True).argsort() // at_a_time  # of each shard
    return order[group[of_image[order]].argsort(stable=True)]


def sample_order(count: int, seed: int, epoch: int, shards: Shards | None = None) -> Tensor:
    """The order in which an epoch visits the images: a permutation of 0 .. count - 1, `count` int64.

    The images are sorted by a random number each, drawn as `Randomness(seed, epoch, image)`: the same on every
    machine and in every version of torch. With `shards` these are put in an order likewise, cut into groups of so many
    at a time, and the images sorted within each group.

    Example: `sample_order(1, seed, epoch)` is `[0]`.
    """
    return _order(count, seed, epoch, *(shards or ())).clone()


def batch_indices(count: int, batch_size: int, seed: int, step: int, shards: Shards | None = None) -> Tensor:
    """The global batch of optimizer step `step`, counted from 0: `batch_size` int64 indices, all different.

    Each epoch of count // batch_size steps is a new permutation. The images left over are dropped (another epoch
    has others): filling up the last batch would repeat images, each the false negative of its copy.

    Raises ValueError when the batch is larger than the data set.

    Example: with count = batch_size = 4, every step holds 0, 1, 2 and 3 in some order.
    """
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size {batch_size} for {count} images: pass 1 to {count}")
    epoch, place = divmod(step, count // batch_size)
    return _order(count, seed, epoch, *(shards or ()))[place * batch_size :][:batch_size].clone()


def check_shares(batch_size: int, world: int, accumulate: int) -> None:
    """Raise ValueError where a batch cannot be shared out evenly over `world` processes x `accumulate` micro-batches.

    Example: `check_shares(64, 4, 2)` is None, eight images each; 60 are refused.
    """
    if batch_size % (world * accumulate):
        raise ValueError(
            f"batch_size {batch_size} does not split evenly over {world} processes x {accumulate} micro-batches: "
            f"pass a multiple of {world * accumulate}"
        )


def training_batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    start: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    workers: int = 0,
    views: WorkerViews | None = None,
) -> Iterator[list[LoadedBatch]]:
    """One list of `accumulate` micro-batches per optimizer step, from step `start` up to, not including, `steps`.

    Args:
        dataset: the images; a cached one is indexed directly and needs no workers, but for views.
        batch_size: images per optimizer step over all processes and micro-batches.
        rank, world: this process, and how many there are. Its micro-batch a holds the places
            [(a * world + rank) * m, + m) of the global batch, m = batch_size / (world * accumulate).
        workers: processes that decode ahead, two batches each; 0 = decode in this one. The batches are the same.
        views: made by the workers as well, or in this process where there are none. They are what
            `views(batch.images, Randomness(seed, step, batch.places))` gives, bit for bit. Workers share the pixels
            of a cached data set. A batch of 512 images with two views of 224 px takes 0.6 GB of shared memory.

    An image that cannot be decoded is replaced by the next one that can, and named in `faults`.

    Raises ValueError, before the first batch, when the sizes do not fit, those of the views included.

    Example: the places of a step, put together over ranks and micro-batches, are 0 .. batch_size - 1.
    """
    batch_indices(len(dataset), batch_size, seed, 0)  # complains about a batch larger than the data set
    check_shares(batch_size, world, accumulate)
    if not (0 <= rank < world and 0 <= start <= steps and workers >= 0):
        raise ValueError(f"rank {rank} of {world}, steps {start} to {steps}, {workers} workers: not a run")
    size = batch_size // (world * accumulate)
    places = [torch.arange(size) + (a * world + rank) * size for a in range(accumulate)]
    shards = None if dataset.shards is None else Shards(dataset.shards, dataset.shards_at_a_time)
    indices = (
        batch_indices(len(dataset), batch_size, seed, step, shards)[mine]
        for step in range(start, steps)
        for mine in places
    )
    if views is None:
        return _steps(_load(dataset, indices, workers), places)
    randomness = (Randomness(seed, step, mine) for step in range(start, steps) for mine in places)
    return _steps(_load_viewed(dataset, views, indices, randomness, workers), places)


def _steps(batches: Iterator[LoadedBatch], places: list[Tensor]) -> Iterator[list[LoadedBatch]]:
    step: list[LoadedBatch] = []
    for batch in batches:
        step.append(batch._replace(places=places[len(step)]))
        if len(step) == len(places):
            yield step
            step = []


def evaluation_batches(
    dataset: ImageDataset, *, batch_size: int, workers: int = 0, at: Tensor | None = None
) -> Iterator[LoadedBatch]:
    """Every image once, or those `at` `m` int64, in order; what cannot be decoded is left out and named in `faults`.

    `places` equals `indices`. A batch may be smaller than `batch_size`, and empty.
    """
    order = (torch.arange(len(dataset)) if at is None else at).split(batch_size)
    for wanted, batch in zip(order, _load(dataset, iter(order), workers), strict=True):
        decodable = batch.indices == wanted  # a stand-in has another index: its image has its own turn
        indices = batch.indices[decodable]
        yield LoadedBatch(batch.images[decodable], batch.labels[decodable], indices, indices, batch.faults)


def _load(dataset: ImageDataset, indices: Iterator[Tensor], workers: int) -> Iterator[LoadedBatch]:
    if dataset.pixels is not None:
        return (_index(dataset, dataset.pixels, chosen) for chosen in indices)
    return _fetch(dataset, (chosen.tolist() for chosen in indices), _stack, workers)


def _load_viewed(
    dataset: ImageDataset,
    views: WorkerViews,
    indices: Iterator[Tensor],
    randomness: Iterator[Randomness],
    workers: int,
) -> Iterator[LoadedBatch]:
    # what does not fit is told here, in one line: a worker's error arrives wrapped in its traceback
    views(torch.zeros(1, 3, dataset.size, dataset.size, dtype=torch.uint8), Randomness(0, 0, torch.zeros(1)))
    wanted = (
        list(zip(chosen.tolist(), views.seeds(numbers).tolist(), strict=True))
        for chosen, numbers in zip(indices, randomness, strict=True)
    )
    return _fetch(_Viewed(dataset, views), wanted, _stack_viewed, workers)


def _fetch(
    dataset: Dataset[Any], lists: Iterator[list[Any]], stack: Callable[[list[Any]], LoadedBatch], workers: int
) -> Iterator[LoadedBatch]:
    """A batch a list of what the data set is asked for, in this process or by workers."""
    if workers == 0:
        return (stack([dataset[wanted] for wanted in each]) for each in lists)
    loader = DataLoader(
        dataset,
        batch_sampler=_OnDemand(lists),
        num_workers=workers,  # torch gives each worker one thread
        collate_fn=stack,
        generator=torch.Generator(),  # else the loader draws from the global one, and workers=0 does not
        worker_init_fn=_outlive_signals,
    )
    return iter(loader)


def _outlive_signals(_: int) -> None:
    """A queue, or Ctrl-C, signals all of a run's processes, and the run needs its workers for the step it ends with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LINGER))


class _OnDemand:
    """What the batches are made of, when it is asked for: a run's worth at once would be steps x batch_size items."""

    def __init__(self, lists: Iterable[list[Any]]) -> None:
        self.lists = lists

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.lists)


class _Viewed(Dataset[tuple[Sample, tuple[Tensor, ...]]]):
    """Asked for an index and a seed a view: the sample, or its stand-in, and the views of it."""

    def __init__(self, dataset: ImageDataset, views: WorkerViews) -> None:
        self.dataset, self.views = dataset, views
        if dataset.pixels is not None:
            # a worker that is not forked gets a copy of all but tensors, which it shares: leave out what is not needed
            self.dataset = copy.copy(dataset)
            self.dataset.source = ()

    def __getitem__(self, wanted: tuple[int, list[int]]) -> tuple[Sample, tuple[Tensor, ...]]:
        index, seeds = wanted
        sample = self.dataset[index]
        return sample, self.views.one(sample.image, seeds)


def _index(dataset: ImageDataset, pixels: Tensor, chosen: Tensor) -> LoadedBatch:
    faults = [dataset.faults[i] for i in chosen.tolist() if i in dataset.faults] if dataset.faults else []
    indices = dataset.stand_ins(chosen)
    return LoadedBatch(pixels[indices], dataset.labels[indices], indices, indices, faults)


def _stack(samples: list[Sample]) -> LoadedBatch:
    indices = torch.tensor([sample.index for sample in samples])
    return LoadedBatch(
        images=torch.stack([sample.image for sample in samples]),
        labels=torch.tensor([sample.label for sample in samples]),
        indices=indices,
        places=indices,
        faults=[sample.fault for sample in samples if sample.fault],
    )


def _stack_viewed(viewed: list[tuple[Sample, tuple[Tensor, ...]]]) -> LoadedBatch:
    samples, views = zip(*viewed, strict=True)
    return _stack(list(samples))._replace(views=tuple(map(torch.stack, zip(*views, strict=True))))


class TooManyBadImages(RuntimeError):
    """More of the images cannot be decoded than the run accepts."""


class BadImages:
    """Counts the images that could not be decoded, names each once in the log, and stops above a share.

    Args:
        limit_share: the share of the images seen that may be bad, 0 to 1.
        grace: the share is taken of at least this many images, so that one bad image among the first ten does not
            stop a run: at 1 % and 1,000, the eleventh bad image among the first thousand does.

    An image seen in two epochs counts twice, in both numbers. Each process counts its own.

    Example: `BadImages(0.5, grace=2)` accepts `count(["a: empty"], seen=2)`, and raises TooManyBadImages at the next
    `count(["b: empty", "c: empty"], seen=2)`: 3 of 4.
    """

    def __init__(self, limit_share: float = 0.01, *, grace: int = 1000) -> None:
        if not 0 <= limit_share <= 1:
            raise ValueError(f"limit_share {limit_share}: pass a share from 0 to 1")
        self.limit_share, self.grace = limit_share, grace
        self.bad = self.seen = 0
        self._named: set[str] = set()

    def count(self, faults: list[str], seen: int) -> None:
        """Adds `seen` images, of which `faults` could not be decoded."""
        self.seen += seen
        self.bad += len(faults)
        for fault in faults:
            if fault not in self._named:
                self._named.add(fault)
                logger.warning("bad image left out: %s", fault)
        if self.bad > self.limit_share * max(self.seen, self.grace):
            raise TooManyBadImages(
                f"{self.bad} of {self.seen} images seen cannot be decoded, more than the accepted "
                f"{self.limit_share:.2%} (see the log for their names): mend the data or raise the limit"
            )


def decodable(dataset: ImageDataset, bad_images: BadImages, workers: int) -> ImageDataset:
    """The data set without the images that cannot be decoded (`decodable_rows`).

    Raises TooManyBadImages above the accepted share.

    Example: where all can be decoded, the same data set.
    """
    good = decodable_rows(dataset, bad_images, workers)
    return dataset if len(good) == len(dataset) else dataset.subset(good)


def decodable_rows(dataset: ImageDataset, bad_images: BadImages, workers: int, at: Tensor | None = None) -> Tensor:
    """The images that can be decoded, of all or of those `at` `m` int64: indices. What is not cached is decoded to see.

    Raises TooManyBadImages above the accepted share.

    Example: of three images of which the second is broken, [0, 2]; of those at [1, 2], [2].
    """
    at = torch.arange(len(dataset)) if at is None else at
    if dataset.pixels is not None:
        faults = [dataset.faults.get(index, "") for index in at.tolist()]
        bad_images.count([fault for fault in faults if fault], seen=len(at))
        return at[torch.tensor([not fault for fault in faults], dtype=torch.bool)]
    parts = []
    for batch in evaluation_batches(dataset, batch_size=256, workers=workers, at=at):
        bad_images.count(batch.faults, seen=len(batch.labels) + len(batch.faults))
        parts.append(batch.indices)
    return torch.cat(parts)
