"""RAFT, Run Away From your Teacher, and BYOL' (Shi et al. 2020, "Run Away From your Teacher: Understanding BYOL by a
Novel Self-Supervised Approach").

p_v = predictor(g(f(x_v))), z'_v = g'(f'(x_v)) without a gradient, for the two views v of every image
align = || p_1 - p_2 ||^2                            all on the unit sphere
cross = 1/2 sum_v || p_v - z'_v ||^2                 the same view through both networks; BYOL takes the other one
RAFT: align - cross      BYOL': align + cross; BYOL's loss is at most 4 times that, by the triangle inequality

The terms are those of the paper's abstract and of published research code; the exact statement of BYOL' is believed,
not verified.
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
from contrastive_core.momentum import check_momentum, ema_update_, teacher_of


class RAFT(Method):
    """Align the predictions of two views, and run away from (or towards) a moving average of the network.

    Args:
        encoder: `b c h w` -> `b d`, with an int attribute `dim`.
        head: `head(dim)` builds the projection head, with an int attribute `dim`.
        predictor: `predictor(dim)` maps projections to predictions of the same width; without one nothing keeps all
            images from one point.
        align, cross: weights of the two terms: 1 and -1 for RAFT, 1 and 1 for BYOL'. The terms are bounded by 4 each,
            since all is on the sphere.
        momentum: of the teacher, constant, 0.996.

    Differs from the published code: squared distances are summed over the dimensions, not averaged, which scales the
    whole loss by their number.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        head: Callable[[int], nn.Module] = partial(ProjectionHead, hidden=4096, out=256, output_bias=False),
        predictor: Callable[[int], nn.Module] = partial(ProjectionHead, hidden=4096, out=256, output_bias=False),
        align: float = 1.0,
        cross: float = -1.0,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head(encoder_dim(encoder))
        self.predictor = predictor(encoder_dim(self.head))
        self.teacher = teacher_of(nn.Sequential(self.encoder, self.head))
        self.align, self.cross, self.momentum = align, cross, check_momentum(momentum)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The two terms and their weighted sum."""
        features = [self.encoder(view) for view in two(batch.views)]
        p1, p2 = (self.predictor(self.head(one)) for one in features)
        with torch.no_grad():
            target1, target2 = (self.teacher(view) for view in batch.views)
        align = squared_distance(p1, p2)
        cross = (squared_distance(p1, target1) + squared_distance(p2, target2)) / 2
        metrics = two_view_metrics(p1.detach(), p2.detach(), features[0].detach())
        metrics |= {"align": align.detach(), "cross": cross.detach()}
        return self.align * align + self.cross * cross, metrics

    def after_step(self, progress: float) -> None:
        """The teacher follows."""
        ema_update_(self.teacher, nn.Sequential(self.encoder, self.head), self.momentum, buffers="keep")


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over rows of || a/|a| - b/|b| ||^2 = 2 - 2 cos, for `n d` both. Example: opposite rows give 4."""
    return 2 + 2 * negative_cosine(a, b)
