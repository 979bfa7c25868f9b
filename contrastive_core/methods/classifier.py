"""A classifier on an encoder: supervised training, fine-tuning and a linear probe are one class.

    supervised      Classifier(encoder, classes=10)
    fine-tuning     the same, with the encoder of a run; from inside the head: Classifier(..., head=run_head.upto(1))
    linear probe    frozen=True

SimCLRv2 (Chen et al. 2020b, section 2) fine-tunes from the first layer of its three-layer head where labels are few.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive_core.gather import row_counts
from contrastive_core.method import Batch, Method
from contrastive_core.methods.two_views import encoder_dim, one
from contrastive_core.metrics import feature_std
from contrastive_core.sweep import full_precision


class Classifier(Method):
    """Cross-entropy of the labels, from one view `b c h w` of every image; images without a label (-1) are passed over.

    Args:
        encoder: `b c h w` -> `b d`, with an int attribute `dim`.
        classes: how many.
        head: layers kept between the encoder and the classifier (`ProjectionHead.upto`); None = none.
        frozen: train the classifier alone; encoder and head stay as they are, in eval mode.
        label_smoothing: 0..1.

    The classifier starts at zero, so that the first prediction is uniform (as SimCLRv2's fine-tuning does).

    Raises ValueError for fewer than 2 classes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        classes: int,
        head: nn.Module | None = None,
        frozen: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"{classes} classes: pass labelled data of at least 2")
        self.encoder, self.head = encoder, nn.Identity() if head is None else head
        linear = [layer for layer in self.head.modules() if isinstance(layer, nn.Linear)]
        self.classifier = nn.Linear(linear[-1].out_features if linear else encoder_dim(encoder), classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.frozen, self.label_smoothing = frozen, label_smoothing
        if frozen:
            self.encoder.requires_grad_(False)
            self.head.requires_grad_(False)
            self.train()

    def train(self, mode: bool = True) -> Classifier:
        """As `nn.Module.train`, but what is frozen stays in eval mode: BatchNorm as it was."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
            self.head.eval()
        return self

    @property
    def classes(self) -> int:
        """How many it tells apart."""
        return self.classifier.out_features

    def logits(self, images: Tensor) -> Tensor:
        """`b c h w` -> `b classes`."""
        logits: Tensor = self.classifier(self.head(self.encoder(images)))
        return logits

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy over the images of all processes that have a label, for each micro-batch by itself."""
        features = self.encoder(one(batch.views))
        logits = self.classifier(self.head(features))
        metrics = label_metrics(logits, batch.labels) | {"feature_std": feature_std(features)}
        return label_loss(logits, batch.labels, self.label_smoothing), metrics


def label_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the images that have a label, of all processes; 0 where there are none.

    Args:
        logits: `b classes`. labels: `b` int64, -1 = none. smoothing: 0..1.

    Example: flat logits of 10 classes give log 10.
    """
    logits = full_precision(logits)
    losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none", label_smoothing=smoothing)
    counts = row_counts(int((labels >= 0).sum()))
    if sum(counts) == 0:
        return losses.sum()  # zeros, with a graph: every process goes backward
    # DDP averages over the processes, whose numbers of labelled images differ
    return losses.sum() * (len(counts) / sum(counts))


def label_metrics(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a log shows of `label_loss`: `accuracy`, and `chance_loss`, log classes, which flat logits have."""
    chance = torch.tensor(float(logits.shape[1])).log()
    return {"accuracy": accuracy(logits, labels), "chance_loss": chance}


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of this process's labelled images whose class scores highest; NaN where none is labelled."""
    right = logits.argmax(1) == labels
    return right.sum() / (labels >= 0).sum()
