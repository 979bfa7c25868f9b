"""Few labels from the command line: `accelerate launch tools/finetune.py run=DIR fraction=0.1 [overrides]`.

SimCLRv2's second step (Chen et al. 2020b, section 2), for any run: a classifier on its encoder, and where asked for on
the first layers of its projection head, both trained on with the labels of a few training images. With run=null the
same from scratch, which is the baseline.

protocol=cpc_v2 is CPC v2's (Henaff et al. 2020, A.4): a `LatentClassifier` on the grid of latents, first with the
encoder frozen, then both together. The first phase is a run of its own, in a folder within the second's.

Test images are looked at once, at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from contrastive_core.data import (
    BadImages,
    ImageDataset,
    LabelAmount,
    LabelSplit,
    Splits,
    labels_listed,
    sample_ids,
    split_digest,
)
from contrastive_core.evaluate.features import extract_features
from contrastive_core.methods.classifier import Classifier
from cpc.encoder_card import classifier_card, known_architecture, read_card
from cpc.entry import build, command, start_accelerator, warn_of_unread_keys
from cpc.features import FrozenClassifier, load_classifier, load_head, read_encoder
from cpc.mirroring import labelled_flip, run_crop_and_flip
from cpc.pretrain import PretrainSchema, encoder_card
from cpc.run import Pieces, as_written, check_recipe, plain, take_data_of_, train_run
from cpc.two_phases import settle_grid_, two_phases

LARGEST_CONFUSION = 100
"""Classes up to which the confusion matrix is written down."""

WHICH_LABELS = ("fraction", "labels", "labels_per_class", "label_list")


@dataclass(kw_only=True)
class FinetuneSchema(PretrainSchema):
    """Types of the top-level keys of configs/finetune.yaml."""

    run: str | None
    fraction: float | None
    labels: int | None
    labels_per_class: int | None
    label_list: str | None
    label_seed: int
    head_layer: int
    frozen: bool
    label_smoothing: float
    grid: Any = None
    encoder: Any = None
    data: Any = None
    augmentation: dict[str, Any] = field(default_factory=lambda: {"crop": None, "flip": None})


def recipe_of(data: str | None) -> str:
    """The recipe that a data set brings, by the name of its configuration: the choice of the group `recipe`."""
    return "none" if data in (None, "None", "null") else f"images/{data}"


OmegaConf.register_new_resolver("recipe_of", recipe_of, replace=True)


# ---- what a run that is gone on from decides ----


def take_over_(cfg: DictConfig, run: str) -> None:
    """Fill in what a run decides: what images its encoder is fed, and where none are given, its data and its flips.

    Raises FileNotFoundError and ValueError where it is no run, or says of its data what cannot be followed.
    """
    fed = read_card(run)[1]["input"]
    cfg.image_size, cfg.load_size = fed["image_size"], fed.get("load_size") or fed["image_size"]
    cfg.mean, cfg.std = list(fed["mean"]), list(fed["std"])
    take_data_of_(cfg, run)
    if cfg.augmentation.get("crop") is None:
        cfg.augmentation.crop = run_crop_and_flip(run)["crop"]
    if cfg.augmentation.get("flip") is None:
        cfg.augmentation.flip = labelled_flip(plain(cfg.data), [run], as_written(cfg.views))


def architecture_node(card: dict[str, Any]) -> dict[str, Any]:
    """The encoder of a card as a configuration writes it; ValueError for one that is not ours."""
    name, arguments = known_architecture(card["architecture"])
    return {"_target_": name, **arguments}


# ---- which labels, and which test images ----


def check_which_labels(cfg: DictConfig) -> None:
    """Raise ValueError unless exactly one of WHICH_LABELS is given."""
    given = [f"{name}={cfg[name]}" for name in WHICH_LABELS if cfg[name] is not None]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'no labels'} asked for: pass one of {', '.join(WHICH_LABELS)}")


def chosen_labels(cfg: DictConfig, train: ImageDataset) -> LabelSplit:
    """The training images whose labels are used.

    Raises ValueError where there are not enough, or `cfg.labels` is no multiple of the number of classes;
    FileNotFoundError where `cfg.label_list` is no file.
    """
    ids = sample_ids(train)
    if cfg.label_list is not None:
        indices = labels_listed(train, cfg.label_list)
    else:
        kind = next(name for name in WHICH_LABELS if cfg[name] is not None)
        indices = LabelAmount(kind, cfg[kind]).choose(train.labels, seed=cfg.label_seed, ids=ids)
    return LabelSplit(indices, split_digest(ids, train.labels, indices))


def labelled_test(splits: Splits, classes: int) -> ImageDataset:
    """The test images that have a label, which must be one of `classes`; ValueError for less than one a process."""
    if splits.test is None:
        raise ValueError("there are no test images: pass data.test=FILE, or a folder with train/ and test/")
    chosen = (splits.test.labels >= 0).nonzero().flatten()
    if not len(chosen):
        raise ValueError("no test image has a label: the data needs a `label` column or class folders")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if len(chosen) < processes:  # each tests a share of them, after the training
        raise ValueError(f"{len(chosen)} test images for {processes} processes: pass one for each, or use fewer")
    highest = int(splits.test.labels.max())
    if highest >= classes:
        raise ValueError(f"the test images have classes up to {highest}, there are {classes}: pass data of as many")
    return splits.test.subset(chosen)


# ---- how good it is ----


def confusion(
    classifier: FrozenClassifier, images: ImageDataset, accelerator: Accelerator, *, workers: int, bad_images: float
) -> Tensor:
    """How many images of each class (rows) were taken for each (columns): `classes classes` int64, of all processes.

    Each process classifies every so-manieth image, in eval mode.
    """
    mine = images.subset(torch.arange(accelerator.process_index, len(images), accelerator.num_processes))
    with accelerator.autocast():
        logits, labels = extract_features(
            classifier.to(accelerator.device),
            mine,
            batch_size=classifier.encoder.batch_size,
            device=accelerator.device,
            workers=workers,
            bad_images=BadImages(bad_images),
        )
    classes = len(classifier.class_names)
    counts = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
    summed: Tensor = accelerator.reduce(counts.to(accelerator.device), reduction="sum")
    return summed.cpu().reshape(classes, classes)


def accuracy_of(table: Tensor) -> float:
    """The share of images on the diagonal of a confusion matrix. Example: the identity gives 1."""
    return (table.diagonal().sum().double() / table.sum()).item()


def write_tests(cfg: DictConfig, run_dir: Path, runs: dict[str, Path], images: ImageDataset, split: LabelSplit) -> None:
    """Test what each of `runs` (a name, a folder) exported and write `run_dir/test.json`; all processes call it.

    A row each, and the first one's confusion matrix. `split`: the labels that the run in `run_dir` has seen.
    """
    accelerator = start_accelerator(
        precision=cfg.precision, device=cfg.device, threads=cfg.threads, accumulate=cfg.accumulate
    )
    options = {"workers": cfg.workers, "bad_images": cfg.bad_images}
    classifiers = {name: load_classifier(folder) for name, folder in runs.items()}
    tables = {name: confusion(each, images, accelerator, **options) for name, each in classifiers.items()}
    if accelerator.is_main_process:
        read = {
            name: {"mode": each.encoder.mode, "readout": each.encoder.readout} for name, each in classifiers.items()
        }
        rows = [
            {"encoder": name, **read[name], "probe": "classifier", "accuracy": accuracy_of(table)}
            for name, table in tables.items()
        ]
        record: dict[str, Any] = {"run": str(run_dir), "torch": torch.__version__}
        record |= {"labels": len(split.indices), "label_split": split.digest}
        record |= {"test_images": len(images), "rows": rows}
        first = next(iter(runs))
        if len(tables[first]) <= LARGEST_CONFUSION:
            record["class_names"] = list(classifiers[first].class_names)
            record["confusion"] = tables[first].tolist()
        (run_dir / "test.partial").write_text(json.dumps(record) + "\n")
        (run_dir / "test.partial").rename(run_dir / "test.json")
        for row in rows:
            print(f"{row['encoder']}: test accuracy {row['accuracy']:.4f}" + (f" ({split})" if row is rows[0] else ""))
        print(f"written to {run_dir / 'test.json'}")
    accelerator.wait_for_everyone()


# ---- the run ----


def settle_(cfg: DictConfig) -> None:
    """Fill in what the run decides, and check what needs no data."""
    if OmegaConf.is_missing(cfg, "run"):
        raise ValueError("not given: run; pass run=DIR, a finished run's folder, or run=null to train from scratch")
    check_which_labels(cfg)
    if cfg.run is None:
        if cfg.encoder is None or cfg.data is None:
            raise ValueError("run=null trains from scratch: pass encoder=NAME and data=NAME, or run=DIR")
        if cfg.head_layer != 0:
            raise ValueError(f"head_layer={cfg.head_layer} with run=null, which has no head: pass head_layer=0")
        if cfg.grid is not None:
            raise ValueError("protocol=cpc_v2 goes on from a run: pass run=DIR (from scratch: tools/sweep_labels.py)")
    else:
        if cfg.encoder is not None:
            raise ValueError("the encoder is that of run=DIR: leave encoder=NAME out, or pass run=null")
        cfg.encoder = architecture_node(read_card(cfg.run)[1])
        take_over_(cfg, cfg.run)
    check_recipe(cfg)
    if cfg.grid is not None:
        settle_grid_(cfg)
    else:
        build_classifier(cfg, 2)  # a head without such a layer, or another's weights


def build_classifier(cfg: DictConfig, classes: int) -> tuple[Classifier, dict[str, Any] | None]:
    """What is trained, and the arguments of the head whose first layers it keeps, None where it keeps none."""
    options = {"classes": classes, "frozen": cfg.frozen, "label_smoothing": cfg.label_smoothing}
    if cfg.run is None:
        return Classifier(build(cfg.encoder), **options), None
    head = load_head(cfg.run) if cfg.head_layer != 0 else None
    kept = None if head is None else head.upto(cfg.head_layer)
    encoder, _ = read_encoder(cfg.run)
    return Classifier(encoder, head=kept, **options), None if head is None else head.arguments


def fitting_batch(cfg: DictConfig, images: int) -> int:
    """`cfg.batch_size`, or where there are fewer images the most that processes and micro-batches can share evenly.

    Raises ValueError where there is not one image for each.
    """
    shares = cfg.accumulate * int(os.environ.get("WORLD_SIZE", 1))
    if images >= cfg.batch_size:
        return int(cfg.batch_size)
    if images < shares:
        raise ValueError(
            f"{images} labelled images for {shares} processes and micro-batches: use fewer, or more labels"
        )
    return images // shares * shares


def finetune(cfg: DictConfig) -> Path:
    """Run one configuration to its end, test included; returns the run's folder."""
    settle_(cfg)
    splits: Splits = build(cfg.data)
    split = chosen_labels(cfg, splits.train)
    few, test = splits.train.subset(split.indices), labelled_test(splits, splits.train.classes)
    cfg.batch_size = fitting_batch(cfg, len(few))
    runs = two_phases(cfg, few) if cfg.grid is not None else one_phase(cfg, few)
    run_dir = next(iter(runs.values()))
    write_tests(cfg, run_dir, runs, test, split)
    return run_dir


def one_phase(cfg: DictConfig, few: ImageDataset) -> dict[str, Path]:
    """SimCLRv2's: everything together, or with frozen=true the classifier alone. Returns the run's folder."""

    def pieces() -> Pieces:
        method, head = build_classifier(cfg, few.classes)
        card = encoder_card(cfg, method) | classifier_card(few.class_names, head, cfg.head_layer)
        return Pieces(method, build(cfg.views), few, card)

    return {"fine-tuned" if cfg.run else "from scratch": train_run(cfg, pieces)}


# ---- what the command line says ----


OF_THE_RUN = ("load_size", "image_size", "mean", "std", "patch")


def overrides() -> dict[str, str]:
    """The overrides of the command line by their keys. Example: of `a.b=1 +c=2` {"a.b": "a.b=1", "c": "+c=2"}."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return {override.lstrip("+~").partition("=")[0]: override for override in given}


def refuse_what_a_run_decides(run: str | None) -> None:
    """Raise ValueError where the command line says how large images are, and a run has said so before."""
    taken = [override for key, override in overrides().items() if run and key.partition(".")[0] in OF_THE_RUN]
    if taken:
        raise ValueError(f"{', '.join(taken)}: images are fed as to {run}, leave it out")


def let_classifier_decay_(cfg: DictConfig, given: Collection[str]) -> None:
    """Have a weight decay that was asked for reach the linear classifier; `given`: the keys that were.

    By itself a configuration leaves the classifier out (`exclude_also`), which keeps the decay that comes with an
    optimizer to the encoder. It has to for LARS alone, whose ratio would hold what starts at zero.
    """
    lars = str(cfg.optimizer._target_).endswith(".LARS")
    if "optimizer.weight_decay" in given and "exclude_also" not in given and not lars:
        cfg.exclude_also = []


def _from_the_command_line(cfg: DictConfig) -> Path:
    refuse_what_a_run_decides(None if OmegaConf.is_missing(cfg, "run") else cfg.run)
    let_classifier_decay_(cfg, overrides())
    warn_of_unread_keys(cfg)
    return finetune(cfg)


main = command("finetune", _from_the_command_line, schema=FinetuneSchema)

if __name__ == "__main__":
    main()
