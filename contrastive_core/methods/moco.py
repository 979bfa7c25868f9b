"""MoCo v1 and v2 (He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", algorithm 1;
Chen et al. 2020c, "Improved Baselines with Momentum Contrastive Learning").

q = f_q(t(x)), k = f_k(t'(x)) without a gradient      both on the unit sphere
L = -log( exp(q.k / T) / (exp(q.k / T) + sum_m exp(q.m / T)) ),  m: the keys of the last K images
f_k = m f_k + (1 - m) f_q after every step, then the keys enter the queue

v1: a linear head, T 0.07. v2: two layers without BatchNorm, T 0.2, and more augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from contrastive_core.batch_norm import GlobalBatchNorm
from contrastive_core.gather import all_gather, first_row, row_counts
from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import info_nce, normalize
from contrastive_core.memory import FeatureQueue
from contrastive_core.method import Batch, Method
from contrastive_core.methods.two_views import encoder_dim, two, two_view_metrics
from contrastive_core.momentum import check_momentum, ema_update_, teacher_of
from contrastive_core.randomness import mix64


class MoCo(Method):
    """The first view queries, the second is the key; negatives are the keys of earlier batches.

    Args:
        encoder: `b c h w` -> `b d`, with an int attribute `dim`.
        head: `head(dim)` builds the projection head, with an int attribute `dim`.
        queue_size: K, 65,536 in the papers, of any relation to the batch.
        momentum: m, of the teacher, 0.999 in the papers.
        temperature: 0.07 in v1, 0.2 in v2.
        bn_groups: BatchNorm sees the batch of all processes in so many groups of its own statistics each, which for the
            keys are drawn anew: or a query would find its key by the statistics they share (section 3.3; the papers'
            8 GPUs are 8 groups). A number of groups, not of processes, so that a run is the same on 1 or on 8. 1 = one
            group and no shuffling: right only without BatchNorm.

    The queue is written, and the teacher moved, once an optimizer step; keys of a forward in evaluation mode are not
    written. The teacher's BatchNorm statistics are those of its own batches, as in the published code; that moves the
    teacher before the keys are made, which after the first step is the same. Running statistics are those of a
    process's own groups: they take no part in training.

    Raises ValueError for bn_groups below 1 and, on all processes, where a batch does not split into so many groups of
    at least 2 or `GlobalBatchNorm` would join them.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        head: Callable[[int], nn.Module] = partial(ProjectionHead, norm=False),
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        bn_groups: int = 8,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head(encoder_dim(encoder))
        if bn_groups < 1:
            raise ValueError(f"bn_groups={bn_groups}: pass at least 1, which is right without BatchNorm")
        self.teacher = teacher_of(nn.Sequential(self.encoder, self.head))
        self.queue = FeatureQueue(queue_size, encoder_dim(self.head))
        self.momentum, self.temperature, self.bn_groups = check_momentum(momentum), temperature, bn_groups
        self.written: list[Tensor] = []

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Algorithm 1. The queue is read here and written in `after_step`: no query meets its own key twice."""
        query_view, key_view = two(batch.views)
        counts = row_counts(len(query_view))
        groups = self._own_groups(counts)
        features = in_groups(self.encoder, query_view, groups)
        q = normalize(in_groups(self.head, features, groups))
        with torch.no_grad():
            k = normalize(self._keys(key_view, batch.indices, counts, groups))
        if self.training:
            self.written.append(k)

        loss = info_nce(q, None, k, shared_keys=self.queue.keys(), temperature=self.temperature)
        negatives = float(len(self.queue.features))
        metrics = two_view_metrics(q.detach(), k, features.detach())
        metrics |= {"chance_loss": torch.tensor(math.log(negatives + 1)), "negatives": torch.tensor(negatives)}
        return loss, metrics

    def after_step(self, progress: float) -> None:
        """The teacher follows, and the step's keys take the place of the oldest."""
        ema_update_(self.teacher, nn.Sequential(self.encoder, self.head), self.momentum, buffers="keep")
        for keys in self.written:
            self.queue.append_(keys)
        self.written.clear()

    def _own_groups(self, counts: list[int]) -> int:
        groups, remainder = divmod(self.bn_groups, len(counts))
        if self.bn_groups > 1 and (remainder or len(set(counts)) > 1 or counts[0] < 2 * groups or counts[0] % groups):
            raise ValueError(
                f"bn_groups={self.bn_groups} for {counts} images a process: pass a multiple of {len(counts)} that "
                f"splits them evenly into groups of at least 2, or 1 for a network without BatchNorm"
            )
        # one group over all processes is what the groups are there to prevent
        if groups and len(counts) > 1 and any(isinstance(layer, GlobalBatchNorm) for layer in self.modules()):
            raise ValueError(f"GlobalBatchNorm joins the bn_groups={self.bn_groups} of all processes: leave it out")
        return max(groups, 1)

    def _keys(self, images: Tensor, indices: Tensor, counts: list[int], groups: int) -> Tensor:
        """The teacher's projections; with groups, of images that were shuffled over all processes and are put back."""
        if self.bn_groups == 1:
            return self.teacher(images)
        # sorted by a number that image and time decide: the same order on every process, and never asked of the device
        order = mix64(all_gather(indices, counts) + mix64(self.queue.written)).argsort(stable=True)
        mine = slice(first_row(counts), first_row(counts) + len(images))
        shuffled = all_gather(images, counts)[order[mine]]
        keys = all_gather(in_groups(self.teacher, shuffled, groups), counts)
        return keys[order.argsort()[mine]]


def in_groups(module: nn.Module, images: Tensor, groups: int) -> Tensor:
    """`module(images)`, a group of consecutive images at a time: each with BatchNorm statistics of its own."""
    return module(images) if groups == 1 else torch.cat([module(group) for group in images.chunk(groups)])
