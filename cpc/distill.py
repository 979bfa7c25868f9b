"""Distillation from the command line: `accelerate launch tools/distill.py teacher=DIR [overrides]`.

SimCLRv2's third step (Chen et al. 2020b, section 2): a student learns a fine-tuned run's predictions on all training
images; of labels it sees those of a few where weight < 1, and none by default. The student starts from scratch, as the
teacher's kind or as encoder=NAME, or where student=DIR left off. Where the paper's starts is not known to us.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from contrastive_core.data import ImageDataset, LabelSplit, Splits, only_labelled
from contrastive_core.methods.classifier import Classifier
from contrastive_core.methods.distill import Distill
from cpc.encoder_card import classifier_card, read_card
from cpc.entry import build, command, warn_of_unread_keys
from cpc.features import read_classifier, read_encoder
from cpc.finetune import (
    WHICH_LABELS,
    architecture_node,
    check_which_labels,
    chosen_labels,
    labelled_test,
    let_classifier_decay_,
    overrides,
    refuse_what_a_run_decides,
    take_over_,
    write_tests,
)
from cpc.pretrain import PretrainSchema, encoder_card
from cpc.run import Pieces, check_recipe, train_run


@dataclass(kw_only=True)
class DistillSchema(PretrainSchema):
    """Types of the top-level keys of configs/distill.yaml."""

    teacher: str
    student: str | None
    temperature: Any  # a number; a recipe for pre-training has a mapping here, which the YAML replaces
    weight: float
    fraction: float | None
    labels: int | None
    labels_per_class: int | None
    label_list: str | None
    label_seed: int
    encoder: Any = None
    data: Any = None
    augmentation: dict[str, Any] = field(default_factory=lambda: {"crop": None, "flip": None})


def check_asked(cfg: DictConfig) -> None:
    """Raise ValueError for what is wrong whoever the teacher is: no run is read."""
    if not isinstance(cfg.temperature, int | float) or not cfg.temperature > 0:
        raise ValueError(f"temperature={cfg.temperature}: pass a number above 0")
    if cfg.weight < 1:
        check_which_labels(cfg)
    elif any(cfg[name] is not None for name in WHICH_LABELS):
        raise ValueError(f"weight={cfg.weight} looks at no label: leave {', '.join(WHICH_LABELS)} out, or lower it")
    if cfg.student is not None and cfg.encoder is not None:
        raise ValueError("student=DIR has an encoder: leave encoder=NAME out")


def settle_(cfg: DictConfig) -> None:
    """Fill in what the teacher decides, and check what needs no data."""
    if OmegaConf.is_missing(cfg, "teacher"):
        raise ValueError("not given: teacher; pass teacher=DIR, the folder of a run of tools/finetune.py")
    check_asked(cfg)
    _, teachers = read_classifier(cfg.teacher)
    if cfg.student is not None:
        _check_fed_alike(read_card(cfg.student)[1]["input"], teachers["input"], cfg.student)
        cfg.encoder = architecture_node(read_card(cfg.student)[1])
    elif cfg.encoder is None:
        cfg.encoder = architecture_node(teachers)
    take_over_(cfg, cfg.teacher)
    check_recipe(cfg)
    build_distillation(cfg)


def _check_fed_alike(mine: dict[str, Any], theirs: dict[str, Any], student: str) -> None:
    differing = [name for name in ("image_size", "mean", "std") if mine[name] != theirs[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"student={student} was fed images of {name} {mine[name]}, the teacher of {theirs[name]}, and both see the "
            f"same: pass runs of one recipe"
        )


def build_distillation(cfg: DictConfig) -> tuple[Distill, dict[str, Any]]:
    """The method, and what the card says of the student's classifier.

    Raises ValueError where the two know different numbers of classes.
    """
    teacher, card = read_classifier(cfg.teacher)
    names = card["classifier"]["class_names"]
    described = classifier_card(names)
    if cfg.student is not None and read_card(cfg.student)[1].get("classifier"):
        student, own = read_classifier(cfg.student)
        if not isinstance(student, Classifier):
            raise ValueError(f"student={cfg.student} classifies grids of latents: pass a run without protocol=cpc_v2")
        described = {"classifier": {**own["classifier"], "class_names": names}}
    else:
        encoder: nn.Module = build(cfg.encoder) if cfg.student is None else read_encoder(cfg.student)[0]
        student = Classifier(encoder, classes=len(names))
    return Distill(student, teacher, temperature=cfg.temperature, weight=cfg.weight), described


def distilled_images(cfg: DictConfig, train: ImageDataset) -> tuple[ImageDataset, LabelSplit]:
    """All training images, with the labels that may be seen, and which these are."""
    split = chosen_labels(cfg, train) if cfg.weight < 1 else LabelSplit(torch.empty(0, dtype=torch.int64), "")
    return only_labelled(train, split.indices), split


def distill(cfg: DictConfig) -> Path:
    """Run one configuration to its end, test of student and teacher included; returns the run's folder."""
    settle_(cfg)
    splits: Splits = build(cfg.data)
    classes = len(read_card(cfg.teacher)[1]["classifier"]["class_names"])
    images, split = distilled_images(cfg, splits.train)
    if splits.train.classes not in (0, classes):
        raise ValueError(f"the data has {splits.train.classes} classes, the teacher knows {classes}: pass its own data")
    test = labelled_test(splits, classes)

    def pieces() -> Pieces:
        method, described = build_distillation(cfg)
        return Pieces(method, build(cfg.views), images, encoder_card(cfg, method) | described)

    run_dir = train_run(cfg, pieces)
    write_tests(cfg, run_dir, {"student": run_dir, "teacher": Path(cfg.teacher)}, test, split)
    return run_dir


def _from_the_command_line(cfg: DictConfig) -> Path:
    refuse_what_a_run_decides(None if OmegaConf.is_missing(cfg, "teacher") else cfg.teacher)
    let_classifier_decay_(cfg, overrides())
    warn_of_unread_keys(cfg)
    return distill(cfg)


main = command("distill", _from_the_command_line, schema=DistillSchema)

if __name__ == "__main__":
    main()
