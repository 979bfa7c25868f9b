"""SimCLRv2's first step: SimCLR with a deeper head and a memory of negatives (Chen et al. 2020b, "Big Self-Supervised
Models are Strong Semi-Supervised Learners", section 2).

z_i = g(f(t_i(x))), g of three layers
l(i, j) = -log( exp(cos(z_i, z_j) / T) / (sum_{k != i} exp(cos(z_i, z_k) / T) + sum_m exp(cos(z_i, m) / T)) )

m: what a moving average of f and g made of earlier batches, 65,536 of them, as in MoCo. The second and third step,
fine-tuning from inside the head and distilling, are `contrastive_core.methods.classifier` and `distill`.

In a short run here the memory did harm (benchmarks/README.md): it is another network's, and being unlike that network
takes no image apart from another. memory=0 is SimCLR with three layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from contrastive_core.gather import row_counts
from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import normalize, nt_xent
from contrastive_core.memory import FeatureQueue
from contrastive_core.method import Batch, Method
from contrastive_core.methods.two_views import encoder_dim, two, two_view_metrics
from contrastive_core.momentum import check_momentum, ema_update_, teacher_of


class SimCLRv2(Method):
    """NT-Xent over both views of all images and a memory of earlier ones.

    Args:
        encoder: `b c h w` -> `b d`, with an int attribute `dim`.
        head: `head(dim)` builds the projection head, with an int attribute `dim`; the paper's has three layers.
        memory: negatives kept, 65,536 in the paper; 0 = none, and no moving average either.
        momentum: of the moving average, 0.999 in the paper.
        temperature: 0.1.

    The paper says that the memory holds negatives and no more; which views the averaged network sees is unstated: here
    both, and their keys are written after the optimizer step. Those of a forward in evaluation mode are not written.
    """

    least_images = 2

    def __init__(
        self,
        encoder: nn.Module,
        *,
        head: Callable[[int], nn.Module] = partial(ProjectionHead, layers=3, output_norm="norm"),
        memory: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head(encoder_dim(encoder))
        self.momentum, self.temperature = check_momentum(momentum), temperature
        self.teacher = teacher_of(nn.Sequential(self.encoder, self.head)) if memory else None
        self.queue = FeatureQueue(memory, encoder_dim(self.head)) if memory else None
        self.written: list[Tensor] = []

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """Both views' projections, the averaged network's of the same, and the first view's features."""
        views = two(batch.views)
        features = self.encoder(torch.cat(views))
        z1, z2 = self.head(features).chunk(2)
        representations = {"z1": z1, "z2": z2, "features": features.detach().chunk(2)[0]}
        if self.teacher is not None:
            with torch.no_grad():
                representations["key1"], representations["key2"] = normalize(self.teacher(torch.cat(views))).chunk(2)
        return representations

    def contrast(self, representations: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over all images and the memory, and its metrics."""
        z1, z2 = representations["z1"], representations["z2"]
        memory = None
        if self.queue is not None:
            memory = self.queue.keys()
            # image by image, which is the same order whatever the processes and micro-batches
            keys = torch.stack([representations["key1"], representations["key2"]], 1)
            if self.training:
                self.written.append(keys.flatten(0, 1).detach())
        loss = nt_xent(z1, z2, shared_keys=memory, temperature=self.temperature)
        images = sum(row_counts(len(z1)))
        negatives = 2.0 * images - 2 + (0 if memory is None else len(memory))
        metrics = two_view_metrics(z1, z2, representations["features"])
        metrics |= {"chance_loss": torch.tensor(math.log(negatives + 1)), "negatives": torch.tensor(negatives)}
        return loss, metrics

    def after_step(self, progress: float) -> None:
        """The averaged network follows, and what it made of the step's images goes into the memory."""
        if self.teacher is not None and self.queue is not None:
            ema_update_(self.teacher, nn.Sequential(self.encoder, self.head), self.momentum, buffers="keep")
            for keys in self.written:
                self.queue.append_(keys)
        self.written.clear()
