"""CPC v2's fine-tuning: an encoder and a `LatentClassifier` on its grid of latents (Henaff et al. 2020, A.4).

`contrastive_core.methods.classifier.Classifier` is the other one, a linear layer on what an encoder gives for the whole
image. The paper has two phases: `frozen=True` first, then both together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from contrastive_core.method import Batch, Method
from contrastive_core.methods.classifier import label_loss, label_metrics
from contrastive_core.methods.two_views import one
from contrastive_core.metrics import feature_std
from cpc.frozen_encoder import Latents
from cpc.latent_classifier import LatentClassifier


class GridClassifier(Method):
    """Cross-entropy of the labels, from one view `b 3 h w` of every image; images without a label (-1) are passed over.

    Args:
        latents: views -> a grid `b rows cols d`: readout "grid" or "context".
        classifier: of such grids.
        frozen: train the classifier alone; encoder and context networks stay as they are, in eval mode.
        label_smoothing: 0..1.

    Raises ValueError for a readout without a grid, and grids of another width than the classifier's.
    """

    def __init__(
        self,
        latents: Latents,
        classifier: LatentClassifier,
        *,
        frozen: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if latents.readout == "mean" or latents.grid_dim != classifier.dim:
            raise ValueError(
                f"readout={latents.readout!r} of width {latents.grid_dim} for a classifier of grids of width "
                f'{classifier.dim}: pass readout="grid" or "context", and dim={latents.grid_dim}'
            )
        self.latents, self.classifier = latents, classifier
        self.frozen, self.label_smoothing = frozen, label_smoothing
        if frozen:
            self.latents.requires_grad_(False)
            self.train()

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """What is exported: of patches, or of whole images."""
        return self.latents.encoder

    @property
    def classes(self) -> int:
        """How many it tells apart."""
        return self.classifier.linear.out_features

    @property
    def described(self) -> dict[str, Any]:
        """What a card says of it beside the classes: how to build the classifier, and what is read off for it."""
        return {"arguments": self.classifier.arguments, "readout": self.latents.readout}

    def train(self, mode: bool = True) -> GridClassifier:
        """As `nn.Module.train`, but what is frozen stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.latents.eval()
        return self

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images `b 3 h w` -> `b classes`."""
        logits: Tensor = self.classifier(self.latents(images))
        return logits

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy over the images of all processes that have a label, for each micro-batch by itself."""
        grid = self.latents(one(batch.views))
        logits = self.classifier(grid)
        metrics = label_metrics(logits, batch.labels) | {"feature_std": feature_std(grid.mean((1, 2)))}
        return label_loss(logits, batch.labels, self.label_smoothing), metrics
