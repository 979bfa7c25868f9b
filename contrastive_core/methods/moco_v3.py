"""MoCo v3 (Chen, Xie and He 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", algorithm 1).

q_v = predictor(g(f(x_v))), k_v = g'(f'(x_v)) without a gradient, for the two views v of every image
ctr(q, k) = -2 T mean_i log( exp(cos(q_i, k_i) / T) / sum_j exp(cos(q_i, k_j) / T) ),  j: all images of all processes
L = ctr(q_1, k_2) + ctr(q_2, k_1)

No queue. f', g': moving averages, whose momentum rises to 1 along a cosine. For a ViT the patch projection stays at its
random start (`contrastive_core.encoders.MoCoViT`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from contrastive_core.gather import row_counts
from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import info_nce, normalize
from contrastive_core.method import Batch, Method
from contrastive_core.methods.two_views import encoder_dim, two, two_view_metrics
from contrastive_core.momentum import check_momentum, cosine_momentum, ema_update_, teacher_of


class MoCoV3(Method):
    """Each view's prediction picks the other view's key, among the keys of all images of all processes.

    Args:
        encoder: `b c h w` -> `b d`, with an int attribute `dim`.
        head: `head(dim)` builds the projection head, with an int attribute `dim`: two layers for a ResNet, three for a
            ViT in the paper, hidden 4096, out 256.
        predictor: `predictor(dim)` maps projections to predictions of the same width; for a ViT it ends in a norm too.
        momentum: of the teacher at the start, 0.99.
        temperature: 1.0 for a ResNet, 0.2 for a ViT.
    """

    least_images = 2

    def __init__(
        self,
        encoder: nn.Module,
        *,
        head: Callable[[int], nn.Module] = partial(ProjectionHead, hidden=4096, out=256, output_norm="plain"),
        predictor: Callable[[int], nn.Module] = partial(ProjectionHead, hidden=4096, out=256, output_bias=False),
        momentum: float = 0.99,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head(encoder_dim(encoder))
        self.predictor = predictor(encoder_dim(self.head))
        self.teacher = teacher_of(nn.Sequential(self.encoder, self.head))
        self.momentum, self.temperature = check_momentum(momentum), temperature

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions and keys of both views, and the first view's features."""
        features = [self.encoder(view) for view in two(batch.views)]
        q1, q2 = (self.predictor(self.head(one)) for one in features)
        with torch.no_grad():
            k1, k2 = (self.teacher(view) for view in batch.views)
        return {"q1": q1, "q2": q2, "k1": k1, "k2": k2, "features": features[0].detach()}

    def contrast(self, representations: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over all images, and its metrics."""
        q1, q2, k1, k2 = (normalize(representations[name]) for name in ("q1", "q2", "k1", "k2"))
        pairs = torch.arange(len(q1), device=q1.device)
        ctr = partial(info_nce, positive=pairs, temperature=self.temperature)
        # the keys have no gradient by themselves, and are leaves that want none where a cached step joins batches
        loss = 2 * self.temperature * (ctr(q1, k2.detach()) + ctr(q2, k1.detach()))
        images = sum(row_counts(len(q1)))
        metrics = two_view_metrics(q1, k2, representations["features"])
        metrics["chance_loss"] = torch.tensor(4 * self.temperature * math.log(images))
        metrics["negatives"] = torch.tensor(images - 1.0)
        return loss, metrics

    def after_step(self, progress: float) -> None:
        """The teacher follows, ever more slowly."""
        momentum = cosine_momentum(progress, self.momentum)
        ema_update_(self.teacher, nn.Sequential(self.encoder, self.head), momentum, buffers="keep")
