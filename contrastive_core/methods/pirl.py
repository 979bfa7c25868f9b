"""PIRL (Misra and van der Maaten 2020, "Self-Supervised Learning of Pretext-Invariant Representations", section 3).

v = f(x), u = g(nine tiles of x in random order)   both on the unit sphere; m: a row of a memory bank for every image
h(m, u) = exp(m.u / T) / ( exp(m.u / T) + sum_{x'} exp(u.m' / T) ),  m': rows of other images, drawn at random
NCE:      L(m, u) = -log h(m, u) - sum_{x'} log(1 - h(m', u))
InfoNCE:  L(m, u) = -log h(m, u)
L = w L(m, g(tiles)) + (1 - w) L(m, f(x)),  w = 1/2

After a step the bank's rows move half-way towards v.

In the NCE form h is read as in noise-contrastive estimation, which the published code does: P_noise is uniform over the
images and the normaliser Z is estimated from the first batch and kept. That is
    h(m, u) = exp(m.u / T) / (exp(m.u / T) + c),  c = Z K / N,  K negatives, N images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive_core.gather import mean_weight, row_counts, world
from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import info_nce, normalize
from contrastive_core.memory import MemoryBank
from contrastive_core.method import Batch, Method
from contrastive_core.methods.two_views import encoder_dim, two, two_view_metrics

FORMS = ("nce", "info_nce")


class PIRL(Method):
    """An image, and its tiles in another order, both pick the image's row out of a memory bank.

    The views of a batch are the image `b c h w` and its tiles `b 9 c th tw`.

    Args:
        encoder: `b c h w` -> `b d`, with an int attribute `dim`; images and tiles pass it.
        images: training images N, a row of the bank each.
        head: `head(dim)` builds f's projection of the image's features, with an int attribute `dim`; linear in the
            paper.
        tile_head: `tile_head(dim)` builds g's projection of a tile's features, with an int attribute `dim`; a linear
            map of all nine together follows.
        tiles: how many there are, 9.
        negatives: rows drawn from the bank for every batch, 32,000 in the paper; never those of the batch's own images
            (which the published code allows).
        temperature: 0.07.
        momentum: of the bank's rows, 0.5.
        weight: of the tiles' loss against the image's, 0.5.
        form: "nce" or "info_nce".

    Every micro-batch of a step draws the same rows but for its own images': under accumulation a negative may be an
    image of another micro-batch. A forward in evaluation mode leaves bank and normaliser as they are.

    Raises ValueError for another form, and for another number of tiles.
    """

    normaliser: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        images: int,
        head: Callable[[int], nn.Module] = partial(ProjectionHead, layers=1),
        tile_head: Callable[[int], nn.Module] = partial(ProjectionHead, layers=1),
        tiles: int = 9,
        negatives: int = 32000,
        temperature: float = 0.07,
        momentum: float = 0.5,
        weight: float = 0.5,
        form: str = "nce",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form={form!r}: pass one of {', '.join(FORMS)}")
        if negatives < 1:
            raise ValueError(f"negatives={negatives}: pass at least 1")
        self.encoder, self.head, self.tile_head = encoder, head(encoder_dim(encoder)), tile_head(encoder_dim(encoder))
        dim = encoder_dim(self.head)
        self.join = nn.Linear(tiles * encoder_dim(self.tile_head), dim)
        self.bank = MemoryBank(images, dim, momentum)
        self.register_buffer("normaliser", torch.zeros(()))  # Z; 0 = not estimated yet
        self.negatives, self.temperature, self.weight, self.form = negatives, temperature, weight, form
        self.tiles = tiles
        self.written: list[tuple[Tensor, Tensor]] = []

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Section 3.2's loss of both; the bank is read here and written in `after_step`."""
        image, tiles = two(batch.views)
        features = self.encoder(image)
        v = normalize(self.head(features))
        u = normalize(self._joined(tiles))
        own = self.bank.rows(batch.indices)
        drawn = self.bank.sample(self.negatives, exclude=batch.indices)[1]
        if self.training:
            self.written.append((batch.indices, v.detach()))

        loss = self.weight * self._loss(u, own, drawn) + (1 - self.weight) * self._loss(v, own, drawn)
        metrics = two_view_metrics(u.detach(), v.detach(), features.detach())
        if self.form == "info_nce":
            metrics["chance_loss"] = torch.tensor(math.log(self.negatives + 1))
        metrics["negatives"] = torch.tensor(float(self.negatives))
        return loss, metrics

    def after_step(self, progress: float) -> None:
        """The rows of the step's images move towards f(x), and never towards g(tiles)."""
        for indices, features in self.written:
            self.bank.update_(indices, features)
        self.written.clear()

    def _joined(self, tiles: Tensor) -> Tensor:
        if tiles.ndim != 5 or tiles.shape[1] != self.tiles:
            shape = " ".join(map(str, tiles.shape))
            raise ValueError(f"tiles have the shape {shape}: pass b {self.tiles} c h w")
        b = len(tiles)
        features = self.tile_head(self.encoder(rearrange(tiles, "b tiles c h w -> (b tiles) c h w")))
        return self.join(rearrange(features, "(b tiles) d -> b (tiles d)", b=b))

    def _loss(self, queries: Tensor, own: Tensor, drawn: Tensor) -> Tensor:
        if self.form == "info_nce":
            return info_nce(queries, None, own, shared_keys=drawn, temperature=self.temperature)
        with torch.autocast(queries.device.type, enabled=False):
            positive = (queries * own).sum(1) / self.temperature
            negative = queries @ drawn.T / self.temperature
            constant = self._log_normaliser(negative.detach()) + math.log(len(drawn) / len(self.bank.features))
            losses = F.softplus(constant - positive) + F.softplus(negative - constant).sum(1)
        return losses.mean() * mean_weight(row_counts(len(queries)))

    def _log_normaliser(self, scores: Tensor) -> Tensor:
        """log Z = log( N mean exp(score) ), estimated once, over all processes, from the first tiles and negatives."""
        if self.normaliser != 0:
            return self.normaliser.log()
        mean = scores.double().exp().mean()
        if world()[1] > 1:
            torch.distributed.all_reduce(mean)
            mean /= world()[1]
        estimate = (mean * len(self.bank.features)).to(self.normaliser)
        if self.training:
            self.normaliser.copy_(estimate)
        return estimate.log()
