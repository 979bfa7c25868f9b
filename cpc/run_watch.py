"""What is told of a run while it goes: rows of metrics, the online probe, an alarm where the projections collapse."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from contrastive_core.data import BadImages, ImageDataset
from contrastive_core.evaluate.features import extract_features
from contrastive_core.evaluate.knn import knn_accuracy
from contrastive_core.metrics import collapsed
from contrastive_core.run_log import RunLog
from contrastive_core.training import StepResult
from cpc.frozen_encoder import FrozenEncoder


def probe_sets(dataset: ImageDataset, count: int) -> tuple[ImageDataset, ImageDataset] | None:
    """A bank and queries for the online probe, four to one, all of them training images; None where unlabelled.

    Test images are never touched, so that watching the probe is not looking at the test set.
    """
    labelled = torch.nonzero(dataset.labels >= 0).flatten()
    if len(labelled) < 20:
        return None
    chosen = labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))[:count]]
    split = len(chosen) // 5
    return dataset.subset(chosen[split:]), dataset.subset(chosen[:split])


class OnlineProbe:
    """kNN accuracy of the mean latents of some training images among others.

    Args: `encoder`: looked at as it stands. `dataset`: the training images; unlabelled ones have no accuracy. `count`:
    how many of them are used. `bad_images`: the share of these that may be undecodable.
    """

    def __init__(
        self, encoder: FrozenEncoder, dataset: ImageDataset, accelerator: Accelerator, *, count: int, bad_images: float
    ) -> None:
        self._encoder, self._accelerator, self._bad_images = encoder, accelerator, bad_images
        self._sets = probe_sets(dataset, count)

    def accuracy(self) -> float | None:
        """As the encoder stands now; None where there are no labels to go by."""
        if self._sets is None:
            return None
        options = {"batch_size": self._encoder.batch_size, "device": self._accelerator.device}
        with self._accelerator.autocast():
            bank, queries = (
                extract_features(self._encoder, images, bad_images=BadImages(self._bad_images), **options)
                for images in self._sets
            )
        return float(knn_accuracy(*bank, *queries))


class Throughput:
    """Images a second since the last time it was asked, without what is done inside `paused`."""

    def __init__(self) -> None:
        self.images, self.since = 0, time.perf_counter()

    def rate(self) -> float:
        """The rate since the last call."""
        now = time.perf_counter()
        rate, self.images, self.since = self.images / max(now - self.since, 1e-9), 0, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock, for a probe or a checkpoint."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began


class CollapseAlarm:
    """Whether the projections have collapsed, as the last logged step saw it; `line` says so, "" = they have not."""

    def __init__(self) -> None:
        self.line = ""

    def rings(self, row: dict[str, float]) -> bool:
        """Look at a row of metrics; True where they have collapsed since the last row."""
        before, self.line = self.line, collapsed(row.get("spread", math.nan), row.get("effective_rank", math.nan))
        return bool(self.line) and not before


def has_row(step: int, *, every: int, steps: int) -> bool:
    """Whether a step gets a row of metrics: the first, each `every`-th and the last do."""
    return step in (1, steps) or step % every == 0


def metrics_row(result: StepResult, accelerator: Accelerator, rate: float) -> dict[str, float]:
    """A row of `metrics.jsonl`: means over the processes."""
    names = sorted(result.metrics)
    values = torch.stack([result.metrics[name].double().to(accelerator.device) for name in names])
    means = accelerator.reduce(values, reduction="mean").tolist()
    return {"step": result.step, **dict(zip(names, means, strict=True)), "images_per_second": float(f"{rate:.4g}")}


class RunWatch:
    """Counts, writes down and says what a run does; every process has one, and the main one alone a log.

    Args: `log`: None on the other processes. `rows`: which steps get one, by their numbers. `images`: of a step, on all
    processes. `bad_images`: the share of them that may be undecodable.
    """

    def __init__(
        self,
        log: RunLog | None,
        accelerator: Accelerator,
        *,
        rows: Callable[[int], bool],
        images: int,
        bad_images: float,
    ) -> None:
        self._log, self._accelerator, self._rows, self._images = log, accelerator, rows, images
        self._bad_images, self._throughput, self._alarm = BadImages(bad_images), Throughput(), CollapseAlarm()

    @property
    def collapsed(self) -> str:
        """What is wrong with the projections, as the last row had them; "" where nothing is."""
        return self._alarm.line

    def remember(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """What the run had written down before it was interrupted: a collapse is told once."""
        for row in rows:
            if "loss" in row:
                self._alarm.rings({name: value for name, value in row.items() if value is not None})

    def see(self, result: StepResult, *, last: bool) -> None:
        """A step was taken. Every process has to call it: a row's numbers are means over all of them.

        Raises TooManyBadImages where more could not be decoded than may.
        """
        self._bad_images.count(result.faults, seen=self._images // self._accelerator.num_processes)
        self._throughput.images += self._images
        if self._rows(result.step):
            row = metrics_row(result, self._accelerator, self._throughput.rate())
            if self._log is not None:
                self._log.write(row)
                if self._alarm.rings(row) or (last and self._alarm.line):
                    self.say(f"step {result.step}: {self._alarm.line}", warning=True)
        if self._log is not None:
            self._log.advance()

    def probe(self, step: int, probe: OnlineProbe | None) -> None:
        """Look at what the encoder has learned, where there is a probe, and write it down."""
        if self._log is not None and probe is not None and (accuracy := probe.accuracy()) is not None:
            self._log.write({"step": step, "knn": accuracy})
            self.say(f"step {step}: kNN accuracy among training images {accuracy:.3f}")

    def sync(self) -> None:
        """Bring what was written down so far to the disk."""
        if self._log is not None:
            self._log.sync()

    def paused(self) -> AbstractContextManager[None]:
        """What is done inside does not count as a step's time."""
        return self._throughput.paused()

    def say(self, text: str, *, warning: bool = False) -> None:
        """A line for whoever watches the main process."""
        if self._log is not None:
            self._log.say(text, warning=warning)
