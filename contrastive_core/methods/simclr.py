"""SimCLR (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", algorithm 1).

h_i = f(t_i(x)), z_i = g(h_i)             two views of every image, one encoder, one head
l(i, j) = -log( exp(cos(z_i, z_j) / T) / sum_{k != i} exp(cos(z_i, z_k) / T) )
L = mean of l(i, j) over both orders of the two views of every image

h is kept, g is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from contrastive_core.gather import row_counts
from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import nt_xent
from contrastive_core.method import Batch, Method
from contrastive_core.methods.two_views import encoder_dim, two, two_view_metrics


class SimCLR(Method):
    """Two views `b c h w` of every image, told apart from those of all other images.

    Args:
        encoder: `b c h w` -> `b d`, with an int attribute `dim`.
        head: `head(dim)` builds the projection head; the paper's has two layers, and its published code BatchNorm at
            the end as well (with a scale and no shift; here with both).
        loss: `loss(z1, z2) -> scalar` over the images of all processes. The paper's temperature is 0.1 for ImageNet
            and 0.5 for CIFAR-10.

    Both views pass the encoder as one batch, as in the published code: BatchNorm sees 2b images.
    """

    least_images = 2

    def __init__(
        self,
        encoder: nn.Module,
        *,
        head: Callable[[int], nn.Module] = partial(ProjectionHead, output_norm="norm"),
        loss: Callable[..., Tensor] = partial(nt_xent, temperature=0.1),
    ) -> None:
        super().__init__()
        self.encoder, self.loss = encoder, loss
        self.head = head(encoder_dim(encoder))

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """Both views' projections, and the first view's features without a gradient."""
        features = self.encoder(torch.cat(two(batch.views)))
        z1, z2 = self.head(features).chunk(2)
        return {"z1": z1, "z2": z2, "features": features.detach().chunk(2)[0]}

    def contrast(self, representations: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over all images, and its metrics; chance is the loss where every score is 0."""
        z1, z2 = representations["z1"], representations["z2"]
        metrics = two_view_metrics(z1, z2, representations["features"])
        with torch.no_grad():
            metrics["chance_loss"] = self.loss(torch.zeros_like(z1), torch.zeros_like(z2))
        counts = row_counts(len(z1))
        metrics["negatives"] = torch.tensor(2.0 * sum(counts) - 2)
        metrics["ranks"] = torch.tensor(float(len(counts)))
        return self.loss(z1, z2), metrics
