"""SimSiam (Chen and He 2021, "Exploring Simple Siamese Representation Learning", algorithm 1).

z_v = g(f(x_v)), p_v = predictor(z_v)              for the two views v of every image
L = -cos(p_1, stop(z_2)) / 2 - cos(p_2, stop(z_1)) / 2

No negatives and no teacher: what keeps all images from one point is the predictor together with the stopped gradient.
The predictor's learning rate does not decay in the paper: `constant_rate: [predictor]`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import negative_cosine
from contrastive_core.method import Batch, Method
from contrastive_core.methods.two_views import encoder_dim, two, two_view_metrics


class SimSiam(Method):
    """A prediction from one view of the other's projection, which gets no gradient.

    Args:
        encoder: `b c h w` -> `b d`, with an int attribute `dim`.
        head: `head(dim)` builds the projection head, with an int attribute `dim`; in the paper three layers of 2048
            (two for CIFAR-10), in its code with BatchNorm without scale and shift at the end.
        predictor: `predictor(dim)` maps projections to predictions of the same width, narrow inside.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        head: Callable[[int], nn.Module] = partial(ProjectionHead, layers=3, out=2048, output_norm="plain"),
        predictor: Callable[[int], nn.Module] = partial(ProjectionHead, hidden=512, out=2048),
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head(encoder_dim(encoder))
        self.predictor = predictor(encoder_dim(self.head))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Both views predict the other; the loss is at least -1."""
        features = [self.encoder(view) for view in two(batch.views)]
        z1, z2 = (self.head(one) for one in features)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        loss = (negative_cosine(p1, z2.detach()) + negative_cosine(p2, z1.detach())) / 2
        return loss, two_view_metrics(z1.detach(), z2.detach(), features[0].detach())
