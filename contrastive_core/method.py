"""The whole plug-in contract: what a method gets, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from contrastive_core.randomness import Randomness


@dataclass(frozen=True)
class Batch:
    """What a method sees of one micro-batch.

    views: augmented versions of the same images, each `b c h w` (CPC: one, a patch grid `b rows cols c ph pw`).
    indices: `b` int64, each image's place in its data set (a memory bank's row).
    labels: `b` int64, -1 = not labelled; only supervised methods look.
    randomness: the step's numbers for these images, of methods that draw; None where nobody gave any.
    """

    views: tuple[Tensor, ...]
    indices: Tensor
    labels: Tensor
    randomness: Randomness | None = None


class Method(nn.Module):
    """A pre-training method: the one class to inherit from.

    A subclass is final. It takes its pieces in its constructor, keeps the encoder that is worth exporting as
    `self.encoder`, and writes `forward`; `after_step` only if something is updated once an optimizer step.

    A method that compares images with one another writes `forward` in two halves, `represent` and `contrast`. What
    lies between them is all that images need to know of each other, so that a batch larger than the memory can be
    contrasted as a whole (`contrastive_core.grad_cache`).
    """

    encoder: nn.Module
    least_images: ClassVar[int] = 1
    """Of a batch that is contrasted: 2 where other images of the batch are the negatives, and one has none."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss to minimise, and detached scalars to log."""
        return self.contrast(self.represent(batch))

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """What the loss compares, each tensor `b ...`: everything with parameters lies before, but a temperature."""
        raise NotImplementedError(f"{type(self).__name__} must say what its loss is, in forward or in two halves")

    def contrast(self, representations: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics from the representations of one batch, or of several joined along b."""
        raise NotImplementedError(f"{type(self).__name__} must say what its loss is, in forward or in two halves")

    def after_step(self, progress: float) -> None:
        """Called once after every optimizer step; progress is the share of the steps before it: from 0 to below 1."""
