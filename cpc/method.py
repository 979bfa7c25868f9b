"""CPC v2: predict the patches ahead from the patches behind, in four directions (Henaff et al. 2020, section 3.1).

z = encoder(patch)                   for every patch of every image
c = context(z read in a direction)   a cell sees its own row and those behind it
prediction = W_k c                   of the cell k ahead
L = -log softmax_over_all_cells_of_all_images(prediction . target / T)[the cell k ahead]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from contrastive_core.gather import all_gather, first_row, mean_weight, row_counts
from contrastive_core.losses import info_nce
from contrastive_core.method import Batch, Method
from contrastive_core.metrics import contrast_accuracy, feature_std, spread_metrics
from cpc.context import DIRECTIONS, ContextNetwork, turn
from cpc.prediction import PredictionHeads, check_offsets, positive_cells


class CPC(Method):
    """Contrastive predictive coding on patch grids.

    Args:
        encoder: `b c h w` -> `b d`, with an int attribute `dim`; it sees every patch by itself.
        offsets: how many cells ahead to predict; every offset has its own head. The paper's is 3, the first that
            shares no pixel with the context cell (`cpc.prediction.first_disjoint_offset`).
        directions: ways of reading the grid; each has its own context network and heads.
        target_dim: dimension of predictions and targets (64 in the paper's pseudo-code).
        context: `context(dim)` builds a network that reads downward, `b rows cols d -> b rows cols d`.
        share_context: one context network for all directions (the paper's are separate as far as known).
        gather: contrast with the patches of all processes; False = of this one alone, an n-th of the negatives.
        loss: `loss(queries, keys, positive, gather=False) -> scalar`; temperature 10 is the paper's scale of 0.1.

    The view of a batch is a patch grid `b rows cols c ph pw`. Every position of every image in the global batch is a
    candidate; none is sampled, none is left out.

    Differs from the pseudo-code: losses are averaged over offsets and directions (there: summed), so that chance is
    log(candidates); the target projection has no bias, which adds the same to all logits of a row and so has no
    gradient but, through Adam, a drift; it is shared by the directions (there: unstated).
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        offsets: Sequence[int],
        directions: Sequence[str] = DIRECTIONS,
        target_dim: int = 64,
        context: Callable[[int], nn.Module] = ContextNetwork,
        share_context: bool = False,
        gather: bool = True,
        loss: Callable[..., Tensor] = partial(info_nce, temperature=10.0),
    ) -> None:
        super().__init__()
        unknown = [direction for direction in directions if direction not in DIRECTIONS]
        if unknown or not directions or len(set(directions)) < len(directions):
            raise ValueError(f"directions={list(directions)}: pass one or more of {', '.join(DIRECTIONS)}, each once")
        dim: int = encoder.dim  # type: ignore[assignment]  # nn.Module types every attribute as Tensor | Module
        self.encoder = encoder
        self.offsets, self.directions, self.loss = tuple(offsets), tuple(directions), loss
        self.gather = gather
        self.context_of = {d: "shared" if share_context else d for d in directions}
        self.contexts = nn.ModuleDict({name: context(dim) for name in dict.fromkeys(self.context_of.values())})
        self.heads = nn.ModuleDict({d: PredictionHeads(dim, target_dim, offsets) for d in directions})
        self.target_projection = nn.Linear(dim, target_dim, bias=False)

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """Targets `b rows cols d`, predictions of every direction and offset on the turned grid, the mean latent."""
        (patches,) = batch.views
        rows, cols = patches.shape[1:3]
        check_offsets(self.offsets, rows, cols)
        features = self.encoder(rearrange(patches, "b rows cols c ph pw -> (b rows cols) c ph pw"))
        latents = rearrange(features, "(b rows cols) d -> b rows cols d", rows=rows, cols=cols)
        representations = {"targets": self.target_projection(latents), "mean": latents.detach().mean((1, 2))}
        for direction in self.directions:
            context = self.contexts[self.context_of[direction]](turn(latents, direction))
            for offset in self.offsets:
                representations[f"{direction}_{offset}"] = self.heads[direction](context, offset)
        return representations

    def contrast(self, representations: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics: the paper's pseudo-code."""
        b, rows, cols, _ = representations["targets"].shape
        local = rearrange(representations["targets"], "b rows cols d -> (b rows cols) d")
        counts = row_counts(len(local))
        if min(counts) == 0:  # on all processes alike
            raise ValueError(f"processes hold {counts} patches: give every process at least one image")
        targets, first = (all_gather(local, counts), first_row(counts)) if self.gather else (local, 0)
        losses, metrics = [], {}
        for direction in self.directions:
            for offset in self.offsets:
                predictions = rearrange(representations[f"{direction}_{offset}"], "b rows cols d -> (b rows cols) d")
                positive = positive_cells(b, rows, cols, offset, direction, local.device) + first
                losses.append(self.loss(predictions, targets, positive, gather=False))
                metrics[f"accuracy/{direction}_{offset}"] = contrast_accuracy(predictions, targets, positive)
        metrics["accuracy"] = torch.stack(list(metrics.values())).mean()
        metrics["chance_loss"] = self._chance_loss(predictions, targets, positive)
        metrics |= spread_metrics(local)
        metrics["feature_std"] = feature_std(representations["mean"])
        metrics["negatives"], metrics["ranks"] = torch.tensor(len(targets) - 1.0), torch.tensor(float(len(counts)))
        return torch.stack(losses).mean() * mean_weight(counts), metrics

    @torch.no_grad()
    def _chance_loss(self, predictions: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
        """The loss where every score is 0: log(candidates), or what it is for another loss."""
        return self.loss(torch.zeros_like(predictions), torch.zeros_like(targets), positive, gather=False)
