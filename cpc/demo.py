"""`make demo`: the main job on the bundled digits, then how good the encoder is, in a table and three pictures.

With 100 labels (10 a class), a linear probe on the frozen latents is held against the same encoder at random
initialisation and against logistic regression and a Gaussian support vector machine on the pixels. All set
themselves by cross-validation on the same 100 labels; test images are used for nothing but the final number. Then a
small label sweep: the curve of frozen features, and one fine-tuned point against a network from scratch.
"""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from contrastive_core.data import ImageDataset, Splits, evaluation_batches, labels_per_class, sample_ids
from contrastive_core.evaluate.baselines import logistic_probe, pixel_features, svm_probe
from contrastive_core.evaluate.features import extract_features
from contrastive_core.evaluate.linear import linear_probe
from contrastive_core.evaluate.report import LabelledFeatures, few_label_row
from contrastive_core.plots import format_table, plot_confusion, plot_loss, plot_retrieval
from contrastive_core.run_log import read_metrics
from cpc.entry import build, check_complete, command, config_search
from cpc.evaluate import labelled
from cpc.fast_precision import fast_precision
from cpc.features import load_encoder, untrained_encoder
from cpc.finetune import overrides
from cpc.frozen_encoder import FrozenEncoder
from cpc.pretrain import PretrainSchema, pretrain
from cpc.sweep_labels import sweep


def latents_of(encoder: FrozenEncoder, splits: Splits) -> LabelledFeatures:
    """Latent grids of training and test images."""
    assert splits.test is not None
    return LabelledFeatures(*extract_features(encoder, splits.train), *extract_features(encoder, splits.test))


def pixels_of(splits: Splits) -> LabelledFeatures:
    """The pixels themselves, `n d` in 0..1."""

    def both(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
        batches = list(evaluation_batches(dataset, batch_size=1000))
        images = torch.cat([batch.images for batch in batches])
        return pixel_features(images), torch.cat([batch.labels for batch in batches])

    assert splits.test is not None
    return LabelledFeatures(*both(splits.train), *both(splits.test))


def few_label_rows(
    encoders: dict[str, LabelledFeatures], splits: Splits, *, per_class: int = 10, draws: int = 5
) -> list[dict[str, Any]]:
    """Accuracy with few labels: of each encoder's latents, by its name, and of the pixels."""
    rows: list[dict[str, Any]] = []
    ids = sample_ids(splits.train)
    for name, latents in encoders.items():
        for cells, readout in ((2, "2x2-pooled"), (1, "mean-pooled")):
            row = few_label_row(latents.pooled(cells), per_class, draws, ids=ids)
            rows.append({"features": f"{name}, {readout}", "probe": "logistic regression", **row})
    for probe, classifier in (("logistic regression", logistic_probe), ("Gaussian SVM", svm_probe)):
        row = few_label_row(pixels_of(splits), per_class, draws, classifier, ids=ids)
        rows.append({"features": "pixels", "probe": probe, **row})
    return rows


def draw_pictures(run_dir: Path, splits: Splits, latents: LabelledFeatures, *, per_class: int = 10) -> list[Path]:
    """Loss curve, confusions with few labels, and the training images that are nearest some test images in latents."""
    assert splits.test is not None
    paths = [run_dir / name for name in ("loss.png", "confusion.png", "retrieval.png")]
    plot_loss(read_metrics(run_dir), paths[0])

    features = latents.pooled(2)
    chosen = labels_per_class(features.train_labels, per_class, ids=sample_ids(splits.train))
    few = features._replace(train=features.train[chosen], train_labels=features.train_labels[chosen])
    plot_confusion(features.test_labels, linear_probe(*few).predictions, paths[1], splits.train.class_names)

    queries = labels_per_class(features.test_labels, 1, ids=sample_ids(splits.test))
    queries = queries[features.test_labels[queries].argsort()]
    centred = [part - features.train.mean(0) for part in (features.test[queries], features.train)]
    scores = torch.nn.functional.normalize(centred[0]) @ torch.nn.functional.normalize(centred[1]).T
    nearest = scores.topk(8).indices
    neighbours = torch.stack([torch.stack([splits.train[int(i)].image for i in row]) for row in nearest])
    plot_retrieval(
        torch.stack([splits.test[int(i)].image for i in queries]),
        neighbours,
        paths[2],
        query_labels=features.test_labels[queries],
        neighbour_labels=features.train_labels[nearest],
        class_names=splits.train.class_names,
    )
    return paths


CURVE = (2, 4, 10, 20)
"""Labels a class of the curves of frozen features and of pixels."""
POINT = (4,)
"""Labels a class of the fine-tuned point and of the network from scratch: its minutes are the longest of the sweep."""

SHORTER = "scratch_times=4"
"""Of all three, whose cells are in one folder; ten times, as by default, are a point better with 40 digits."""
FROZEN = [
    SHORTER, "draws=2", "readout=grid", "protocols=[linear]", "scratch=[logistic,svm]", "random=[]",
    "settings.linear=[{cells:2}]",
]  # fmt: skip
ONE_POINT = [
    SHORTER, "draws=1", "readout=context", "protocols=[finetune]", "scratch=[cnn]", "random=[]",
    "settings.finetune=[{lr:0.1,weight_decay:1e-3,encoder_lr:5e-4}]", "settings.scratch=[{lr:2e-3,weight_decay:0.05}]",
]  # fmt: skip
"""With settings that were fixed beforehand: choosing takes five times as long."""


def sweeps_of(run_dir: Path, cfg: DictConfig, splits: Splits) -> tuple[DictConfig, DictConfig]:
    """The curve of frozen features, and the point, as far as there are labels for them; both into `run_dir/labels`.

    With half of the threads: two are at work at once.
    """
    fewest = int(splits.train.labels[splits.train.labels >= 0].unique(return_counts=True)[1].min())
    with config_search():
        parts = [hydra.compose("sweep_labels", overrides) for overrides in (FROZEN, ONE_POINT)]
    for part, counts in zip(parts, (CURVE, POINT), strict=True):
        part.runs, part.out = [str(run_dir)], str(run_dir / "labels")
        part.labels_per_class = [count for count in counts if count <= fewest]
        part.device, part.precision = cfg.device, cfg.precision
        part.threads = cfg.threads or max(1, torch.get_num_threads() // 2)
    return parts[0], parts[1]


def swept(part: DictConfig, **lists: list[str]) -> None:
    """Sweep it, where it has labels, with some of its lists in place of its own."""
    if part.labels_per_class:
        part = copy.deepcopy(part)
        part.update(lists)
        sweep(part)


@contextmanager
def swept_beside(part: DictConfig, **lists: list[str]) -> Iterator[None]:
    """The same meanwhile, in a silent process of its own: a small network leaves one core of two idle.

    Cells that it leaves undone, for whatever reason, are left to who sweeps them next, and is told the reason.
    """
    child = multiprocessing.get_context("spawn").Process(target=_swept_silently, args=(part, lists), daemon=True)
    child.start()
    try:
        yield
        child.join()
    finally:
        child.terminate()


def _swept_silently(part: DictConfig, lists: dict[str, list[str]]) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), suppress(Exception, KeyboardInterrupt):
        swept(part, **lists)


def demo(cfg: DictConfig) -> Path:
    """Pre-train, evaluate, draw; returns the run's folder."""
    if "precision" not in overrides():  # of a process there is one; networks from scratch are what gains by it
        cfg.precision = fast_precision(cfg.device)
    check_complete(cfg)
    splits = labelled(build(cfg.data))
    run_dir = pretrain(cfg)
    curve, point = sweeps_of(run_dir, cfg, splits)
    with swept_beside(point, protocols=[]):  # the network from scratch, which takes as long as all that follows
        pictures = evaluated(run_dir, splits)
        print("\nhow many labels that saves:\n", flush=True)
        swept(curve)
        swept(point, scratch=[])
    swept(point)
    print("\npictures:")
    for picture in (*pictures, run_dir / "labels" / "label_efficiency.png"):
        print(f"  {picture}")
    print(f"everything: {run_dir}")
    return run_dir


def evaluated(run_dir: Path, splits: Splits) -> list[Path]:
    """Print and write down the accuracies with few labels, and draw three pictures, whose files are returned."""
    assert splits.test is not None
    latents = latents_of(load_encoder(run_dir, readout="grid"), splits)
    untrained = latents_of(untrained_encoder(run_dir, readout="grid"), splits)
    rows = few_label_rows({"CPC": latents, "random encoder": untrained}, splits)
    (run_dir / "evaluation.json").write_text(json.dumps({"run": str(run_dir), "rows": rows}, indent=1) + "\n")
    pictures = draw_pictures(run_dir, splits, latents)
    draws = len(rows[0]["draws"])
    print(f"\nAccuracy on {len(splits.test)} test images, mean and deviation over {draws} label draws:\n")
    print(format_table([{key: value for key, value in row.items() if key != "draws"} for row in rows]))
    return pictures


main = command("pretrain_cpc", demo, schema=PretrainSchema)

if __name__ == "__main__":
    main()
