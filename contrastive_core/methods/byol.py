"""BYOL (Grill et al. 2020, "Bootstrap Your Own Latent", section 3.1).

p_v = predictor(g(f(x_v))), z'_v = g'(f'(x_v)) without a gradient, for the two views v of every image
L = || p_1/|p_1| - z'_2/|z'_2| ||^2 + || p_2/|p_2| - z'_1/|z'_1| ||^2,  each 2 - 2 cos
f', g' = m f', g' + (1 - m) f, g after every step, m = 1 - (1 - m_0) (cos(pi progress) + 1) / 2

No negatives: what keeps all images from one point is the predictor together with the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import negative_cosine
from contrastive_core.method import Batch, Method
from contrastive_core.methods.two_views import encoder_dim, two, two_view_metrics
from contrastive_core.momentum import check_momentum, cosine_momentum, ema_update_, teacher_of


class BYOL(Method):
    """A prediction from one view of what a moving average of the network makes of the other.

    Args:
        encoder: `b c h w` -> `b d`, with an int attribute `dim`.
        head: `head(dim)` builds the projection head, with an int attribute `dim`; in the paper two layers, hidden 4096,
            out 256, no norm at the end.
        predictor: `predictor(dim)` maps projections to predictions of the same width.
        momentum: of the teacher at the start: 0.996 for 1000 epochs, 0.99 for 300 and 100, 0.97 for 40.

    The teacher's BatchNorm statistics are those of its own batches.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        head: Callable[[int], nn.Module] = partial(ProjectionHead, hidden=4096, out=256, output_bias=False),
        predictor: Callable[[int], nn.Module] = partial(ProjectionHead, hidden=4096, out=256, output_bias=False),
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head(encoder_dim(encoder))
        self.predictor = predictor(encoder_dim(self.head))
        self.teacher = teacher_of(nn.Sequential(self.encoder, self.head))
        self.momentum = check_momentum(momentum)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Both views predict the other's target."""
        features = [self.encoder(view) for view in two(batch.views)]
        p1, p2 = (self.predictor(self.head(one)) for one in features)
        with torch.no_grad():
            target1, target2 = (self.teacher(view) for view in batch.views)
        loss = 4 + 2 * (negative_cosine(p1, target2) + negative_cosine(p2, target1))
        return loss, two_view_metrics(p1.detach(), target2, features[0].detach())

    def after_step(self, progress: float) -> None:
        """The teacher follows, ever more slowly."""
        momentum = cosine_momentum(progress, self.momentum)
        ema_update_(self.teacher, nn.Sequential(self.encoder, self.head), momentum, buffers="keep")
