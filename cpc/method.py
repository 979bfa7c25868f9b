"""CPC v2: predict the patches ahead from the patches behind, in four directions (Henaff et al. 2020, section 3.1).

z = encoder(patch)                   for every patch of every image
c = context(z read in a direction)   a cell sees its own row and those behind it
prediction = W_k c                   of the cell k ahead
L = -log softmax_over_all_cells_of_all_images(prediction . target / T)[the cell k ahead]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from contrastive_core.gather import all_gather, first_row, mean_weight, row_counts
from contrastive_core.losses import info_nce, normalize
from contrastive_core.method import Batch, Method
from contrastive_core.metrics import contrast_hits, feature_std, spread_metrics, spread_rows
from contrastive_core.transfer import to_device
from cpc.context import DIRECTIONS, ContextNetwork, turn
from cpc.negatives import (
    Compared,
    as_mask,
    at_random,
    check_choice,
    check_masked,
    count_negatives,
    of_other_images,
    of_the_same_image,
    query_keys,
)
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
        negatives: what a prediction is compared with beside its target. "all" is the paper's: every position of every
            image in the global batch, none is sampled, none is left out. "other_images" leaves out the other patches
            of the same image, "same_image" takes no others, "random" draws for every prediction anew.
        negatives_k: how many "random" draws, all different.
        loss: `loss(queries, keys, positive, gather=False) -> scalar`, a mean over queries, of which a call has those of
            several directions; temperature 10 is the paper's scale of 0.1. With other negatives than all it gets a
            `mask`, too (`contrastive_core.losses.info_nce`).

    The view of a batch is a patch grid `b rows cols c ph pw`. What is drawn at random is a function of the batch's
    `randomness`: the same on any number of processes, and after a resume.

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
        negatives: str = "all",
        negatives_k: int | None = None,
        loss: Callable[..., Tensor] = partial(info_nce, temperature=10.0),
    ) -> None:
        super().__init__()
        unknown = [direction for direction in directions if direction not in DIRECTIONS]
        if unknown or not directions or len(set(directions)) < len(directions):
            raise ValueError(f"directions={list(directions)}: pass one or more of {', '.join(DIRECTIONS)}, each once")
        check_choice(negatives, negatives_k)
        check_masked(loss, negatives)
        own = loss.keywords.get("gather") if isinstance(loss, partial) else None
        if own:
            raise ValueError(f"the loss has gather={own!r}, and CPC gathers targets itself: leave it out")
        dim: int = encoder.dim  # type: ignore[assignment]  # nn.Module types every attribute as Tensor | Module
        self.encoder = encoder
        self.offsets, self.directions, self.loss = tuple(offsets), tuple(directions), loss
        self.gather = gather and negatives != "same_image"  # of which every process holds its own
        self.negatives, self.negatives_k = negatives, negatives_k
        self.context_of = {d: "shared" if share_context else d for d in directions}
        self.contexts = nn.ModuleDict({name: context(dim) for name in dict.fromkeys(self.context_of.values())})
        self.heads = nn.ModuleDict({d: PredictionHeads(dim, target_dim, offsets) for d in directions})
        self.target_projection = nn.Linear(dim, target_dim, bias=False)

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """Targets `b rows cols d`, predictions of every direction and offset on the turned grid, the mean latent."""
        (patches,) = batch.views
        rows, cols = patches.shape[1:3]
        check_offsets(self.offsets, rows, cols, self.directions)
        features = self.encoder(rearrange(patches, "b rows cols c ph pw -> (b rows cols) c ph pw"))
        latents = rearrange(features, "(b rows cols) d -> b rows cols d", rows=rows, cols=cols)
        representations = {"targets": self.target_projection(latents), "mean": latents.detach().mean((1, 2))}
        if self.negatives == "random":
            representations |= self._keys(batch, patches.device)
        for direction in self.directions:
            context = self.contexts[self.context_of[direction]](turn(latents, direction))
            for offset, predictions in self.heads[direction](context).items():
                representations[f"{direction}_{offset}"] = predictions
        return representations

    def _keys(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Where each image stands in the global batch, and a random number of it: what "random" draws by."""
        if batch.randomness is None:
            raise ValueError("negatives=random draws by the step: pass Batch(..., Randomness(seed, step, places))")
        keys = batch.randomness.integers("negatives", 1 << 62)
        return {"places": to_device(batch.randomness.places, device), "keys": to_device(keys, device)}

    def contrast(self, representations: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics: the paper's pseudo-code."""
        b, rows, cols, _ = representations["targets"].shape
        local = rearrange(representations["targets"], "b rows cols d -> (b rows cols) d")
        counts = row_counts(len(local))
        if min(counts) == 0:  # on all processes alike
            raise ValueError(f"processes hold {counts} patches: give every process at least one image")
        targets, first = (all_gather(local, counts), first_row(counts)) if self.gather else (local, 0)
        held = sum(counts) if self.gather else min(counts)  # the same on all processes, which raise alike
        number_of_negatives = count_negatives(self.negatives, self.negatives_k, held // (rows * cols), rows * cols)
        compared_by = self._choice(representations, len(targets))
        ranked = self.ranked(local)
        ranked_targets = ranked(targets)
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for offset in self.offsets:
            for directions in self._alike(rows, cols):
                names = [f"{direction}_{offset}" for direction in directions]
                parts = [rearrange(representations[name], "b rows cols d -> (b rows cols) d") for name in names]
                cells = [positive_cells(b, rows, cols, offset, each, local.device) + first for each in directions]
                predictions, positive = torch.cat(parts), torch.cat(cells)
                compared = compared_by(positive, names)
                options = {} if compared is None else {"mask": as_mask(compared, local.device)}
                loss = self.loss(predictions, targets, positive, gather=False, **options)
                losses.append(loss * len(directions) / (len(self.directions) * len(self.offsets)))
                metrics |= self._accuracies(names, ranked(predictions), ranked_targets, positive, compared)
        metrics["accuracy"] = torch.stack(list(metrics.values())).mean()
        metrics["chance_loss"] = self._chance_loss(predictions, targets, positive, **options)
        metrics |= spread_metrics(local)
        metrics["feature_std"] = feature_std(representations["mean"])
        metrics["negatives"] = torch.tensor(float(number_of_negatives))
        metrics["ranks"] = torch.tensor(float(len(counts) if self.gather else 1))
        return torch.stack(losses).sum() * mean_weight(counts), metrics

    def _alike(self, rows: int, cols: int) -> list[list[str]]:
        """Directions with equally many predictions, of which one call has the mean: on a square grid, all of them."""
        turned = [direction for direction in self.directions if direction in ("right", "left")]
        upright = [direction for direction in self.directions if direction not in turned]
        return [list(self.directions)] if rows == cols else [group for group in (upright, turned) if group]

    def _accuracies(
        self, names: list[str], predictions: Tensor, targets: Tensor, positive: Tensor, compared: Compared | None
    ) -> dict[str, Tensor]:
        """Of each of several directions, whose predictions follow one another: how often the target scores highest."""
        of_each = spread_rows(len(predictions) // len(names), positive.device)
        starts = torch.arange(len(names), device=positive.device) * (len(predictions) // len(names))
        chosen = (starts[:, None] + of_each).flatten()
        mask = None if compared is None else compared(chosen)
        hits = contrast_hits(predictions[chosen], targets, positive[chosen], mask=mask)
        return dict(zip([f"accuracy/{name}" for name in names], hits.view(len(names), -1).float().mean(1), strict=True))

    def _choice(self, representations: dict[str, Tensor], m: int) -> Callable[[Tensor, list[str]], Compared | None]:
        """By the positives of some directions and an offset, and their names: each prediction's candidates; None = all.

        m: targets.
        """
        _, rows, cols, _ = representations["targets"].shape
        cells = rows * cols
        if self.negatives == "other_images":
            return lambda positive, _: of_other_images(positive, cells, m)
        if self.negatives == "same_image":
            return lambda positive, _: of_the_same_image(positive, cells, m)
        if self.negatives == "random":
            keys, places, count = representations["keys"], representations["places"], self.negatives_k or 0
            # images by their place in the global batch: micro-batches that are joined stand in another order
            image = (all_gather(places) if self.gather else places).argsort().argsort()
            number = (image[:, None] * cells + torch.arange(cells, device=image.device)).flatten()

            def drawn(positive: Tensor, names: list[str]) -> Compared:
                of_each = [query_keys(keys, len(positive) // len(names), name) for name in names]
                return at_random(positive, torch.cat(of_each), count, number)

            return drawn
        return lambda positive, _: None

    @torch.no_grad()
    def ranked(self, targets: Tensor) -> Callable[[Tensor], Tensor]:
        """Makes of rows those whose dot product ranks as the loss does: unit ones where their lengths do not matter.

        Args: `targets`: `... d`, of any values; what is looked for is whether the loss knows a row from its double.

        Example: with the usual loss `ranked(targets)(targets)` equals `targets`; with a cosine's, `normalize(targets)`.
        """
        one = torch.ones_like(targets.flatten(0, -2)[:1])
        first, second = (
            self.loss(one, torch.cat([one, 2 * one]), torch.full((1,), place, device=one.device), gather=False)
            for place in (0, 1)
        )
        by_angle = torch.isclose(first, second, rtol=1e-4)  # where, not if: a GPU is not waited for

        def as_ranked(rows: Tensor) -> Tensor:
            rows = rows.detach()
            return torch.where(by_angle, normalize(rows.flatten(0, -2)).view_as(rows), rows)

        return as_ranked

    @torch.no_grad()
    def _chance_loss(self, predictions: Tensor, targets: Tensor, positive: Tensor, **options: Any) -> Tensor:
        """The loss where every score is 0: log(candidates), or what it is for another loss.

        Of one query: all have as many candidates.
        """
        one = torch.zeros_like(predictions[:1])
        return self.loss(one, torch.zeros_like(targets), positive[:1], gather=False, **options)
