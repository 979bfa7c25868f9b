"""The siamese baseline: the margin losses of 2005 and 2006 on two views of every image.

Hadsell, Chopra and LeCun 2006, "Dimensionality Reduction by Learning an Invariant Mapping": pairs of a kind are pulled
together, others pushed at least a margin apart. Chopra, Hadsell and LeCun 2005 push by an exponential. Here two views
of an image are a pair of a kind, and views of different images are not:

L = mean over i of l(z_1i, z_2i, same) + mean over i and s of l(z_1i, z_2(i+s), different),  s = 1 .. negatives

The two means are apart, or the pairs of different images, of which there are so many more, would decide everything.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from contrastive_core.gather import all_gather, first_row, mean_weight, row_counts
from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import margin_contrastive, normalize
from contrastive_core.method import Batch, Method
from contrastive_core.methods.two_views import encoder_dim, two, two_view_metrics


class Siamese(Method):
    """Pairs of views, of one image or of two.

    Args:
        encoder: `b c h w` -> `b d`, with an int attribute `dim`.
        head: `head(dim)` builds the projection head.
        loss: `loss(z1, z2, same: n bool) -> scalar`: `margin_contrastive` (2006) or `exponential_contrastive` (2005).
        negatives: other images that each image is paired with, at most all but itself, over all processes.

    Projections are normalised, so that they are at most 2 apart; the papers' were not, and had their margins set by
    hand.
    """

    least_images = 2

    def __init__(
        self,
        encoder: nn.Module,
        *,
        head: Callable[[int], nn.Module] = ProjectionHead,
        loss: Callable[..., Tensor] = partial(margin_contrastive, margin=1.0),
        negatives: int = 8,
    ) -> None:
        super().__init__()
        if negatives < 1:
            raise ValueError(f"negatives={negatives}: pass at least 1")
        self.encoder, self.head = encoder, head(encoder_dim(encoder))
        self.loss, self.negatives = loss, negatives

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """Both views' projections on the unit sphere, and the first view's features."""
        features = self.encoder(torch.cat(two(batch.views)))
        z1, z2 = normalize(self.head(features)).chunk(2)
        return {"z1": z1, "z2": z2, "features": features.detach().chunk(2)[0]}

    def contrast(self, representations: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over pairs of all processes' images, and its metrics."""
        z1, z2 = representations["z1"], representations["z2"]
        counts = row_counts(len(z1))
        images, count = sum(counts), min(self.negatives, sum(counts) - 1)
        if count < 1:
            raise ValueError("one image has no other to be told from: pass a batch of at least 2")
        own = first_row(counts) + torch.arange(len(z1), device=z1.device)
        partners = (own[:, None] + 1 + torch.arange(count, device=z1.device)) % images
        others = all_gather(z2, counts)[partners.flatten()]
        same = torch.ones(len(z1), dtype=torch.bool, device=z1.device)
        together = self.loss(z1, z2, same)
        apart = self.loss(z1.repeat_interleave(count, 0), others, ~same.repeat_interleave(count))
        metrics = two_view_metrics(z1, z2, representations["features"])
        metrics |= {"together": together.detach(), "apart": apart.detach(), "negatives": torch.tensor(float(count))}
        return (together + apart) * mean_weight(counts), metrics
