"""SimCLRv2's third step: a student learns what a fine-tuned teacher predicts (Chen et al. 2020b, equation 2).

L = - (1 - a) sum_labelled log P_S(label; 1) - a sum_x sum_y P_T(y | x; T) log P_S(y | x; T)

a = 1, no labels at all, is the paper's default. T is 0.1 where the student is the teacher's own kind
(self-distillation) and 1 where a big network teaches a small one.

Differs from the paper: both sums are means, over the labelled images and over all, of every micro-batch.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor, nn

from contrastive_core.losses import distillation
from contrastive_core.method import Batch, Method
from contrastive_core.methods.classifier import Classifier, accuracy, label_loss
from contrastive_core.methods.two_views import one


class Teacher(Protocol):
    """What is learned from: a `Classifier`, or any other module that classifies the same views."""

    @property
    def classes(self) -> int:
        """How many it tells apart."""

    def logits(self, images: Tensor) -> Tensor:
        """A view `b c h w` -> `b classes`."""

    def eval(self) -> Self:
        """As `nn.Module.eval`."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As `nn.Module.requires_grad_`."""


class Distill(Method):
    """A student classifier follows a frozen teacher, on images with or without labels.

    Args:
        student: a `Classifier`; its encoder is what is kept.
        teacher: a fine-tuned classifier of as many classes; it gets no gradient and stays in eval mode.
        temperature: T.
        weight: a, of the teacher's predictions against the labels; 1 = labels are never looked at.

    Raises ValueError for a weight outside 0..1 or another number of classes.
    """

    def __init__(self, student: Classifier, teacher: Teacher, *, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__()
        mine, theirs = student.classes, teacher.classes
        if mine != theirs or not 0 <= weight <= 1:
            raise ValueError(
                f"a student of {mine} and a teacher of {theirs} classes, weight={weight}: pass as many, and 0 to 1"
            )
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.temperature, self.weight = temperature, weight
        self.train()

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The student's."""
        return self.student.encoder

    def train(self, mode: bool = True) -> Distill:
        """As `nn.Module.train`, but the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher and the student see the same view."""
        images = one(batch.views)
        with torch.no_grad():
            taught = self.teacher.logits(images)
        learned = self.student.logits(images)
        loss = self.weight * distillation(learned, taught, temperature=self.temperature)
        if self.weight < 1:
            loss = loss + (1 - self.weight) * label_loss(learned, batch.labels)
        metrics = {"agreement": (learned.argmax(1) == taught.argmax(1)).float().mean()}
        metrics["accuracy"] = accuracy(learned.detach(), batch.labels)
        return loss, metrics
