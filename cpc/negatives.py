"""What a prediction is compared with beside its target: all patches, or some of them.

CPC v2 takes every patch of every image of the batch (Henaff et al. 2020, section 3.1). Which negatives there are
decides what has to be known to find the target: among patches of other images alone the image will do, its colours or
its light; among those of the same image alone it is the place that counts.

A choice is said as a function, numbers of queries `r` -> bool `r m`, True = compared, so that a loss asks for a block
of the mask at a time (`as_mask`). Targets are numbered `(b rows cols)`, as `cpc.prediction.positive_cells` does.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from contrastive_core.randomness import mix64, words
from contrastive_core.sweep import Mask

NEGATIVES = ("all", "other_images", "same_image", "random")

Compared = Callable[[Tensor], Tensor]
"""Numbers of queries, `r` int64 -> which of the m targets each is compared with, its own among them: bool `r m`."""


def check_choice(negatives: str, k: int | None) -> None:
    """Raise ValueError for a choice that there is not, and for a number without use or missing."""
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives={negatives}: pass one of {', '.join(NEGATIVES)}")
    if negatives == "random" and (k is None or k < 1):
        raise ValueError(f"negatives=random negatives_k={k}: pass negatives_k=N, at least 1 a prediction")
    if negatives != "random" and k is not None:
        raise ValueError(f"negatives={negatives} negatives_k={k}: leave negatives_k out, or pass negatives=random")


def check_masked(loss: Callable[..., Any], negatives: str) -> None:
    """Raise ValueError for a loss that takes no mask, which all choices but "all" need."""
    function = loss.forward if isinstance(loss, nn.Module) else loss
    parameters = inspect.signature(function).parameters
    takes = "mask" in parameters or any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if negatives != "all" and not takes:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ValueError(f"negatives={negatives}: {name} takes no mask; pass negatives=all, or loss=info_nce")


def count_negatives(negatives: str, k: int | None, images: int, cells: int) -> int:
    """How many a prediction has, among so many images of so many cells: its chance loss is the log of one more.

    `contrastive_core.metrics.count_negatives` is another: it asks a loss how many each query truly has.

    Raises ValueError where there are none, or fewer than are to be drawn.

    Example: of 2 images of 9 cells, 17 of all, 9 of the other image, 8 of the same one.
    """
    there = images * cells - 1
    if negatives == "other_images":
        if images < 2:
            raise ValueError(f"negatives=other_images, and {images} image is contrasted: pass at least 2, or all")
        return there - cells + 1
    if negatives == "same_image":
        return cells - 1
    if negatives == "random":
        if k is None or k > there:
            raise ValueError(
                f"negatives_k={k}, and beside the positive there are {there} patches ({images} images of {cells}): "
                f"pass at most {there}"
            )
        return k
    return there


def of_other_images(positive: Tensor, cells: int, m: int) -> Compared:
    """The targets of all images but the query's, and its own target. `positive`: `n`, its number."""
    image = torch.arange(m, device=positive.device) // cells

    def compared(rows: Tensor) -> Tensor:
        own = positive[rows, None]
        return (image != own // cells).scatter_(1, own, True)

    return compared


def of_the_same_image(positive: Tensor, cells: int, m: int) -> Compared:
    """The targets of the query's image alone. `positive`: `n`, its number."""
    image = torch.arange(m, device=positive.device) // cells
    return lambda rows: image == positive[rows, None] // cells


def at_random(positive: Tensor, keys: Tensor, count: int, number: Tensor) -> Compared:
    """`count` different targets of each query's own drawing, and its own target, which is not drawn.

    Args:
        positive: `n`, each query's own target, by where it stands.
        keys: `n` random int64, all that the drawing depends on beside the numbers.
        count: at most m - 1.
        number: `m`, the number of the target that stands at each place: what is drawn are numbers, so that it does not
            matter in which order processes hold the targets.

    The draws are uniform over all sets: numbers are drawn one after the other, and those that came before let pass. Of
    more than half of the targets those are drawn that are left out.
    """
    m = len(number)
    left_out = 2 * count > m - 1
    wanted = m - 1 - count if left_out else count

    def compared(rows: Tensor) -> Tensor:
        own = number[positive[rows]][:, None]
        # the own target is taken from the start, so that it is never drawn
        taken = torch.zeros(len(rows), m, dtype=torch.bool, device=number.device).scatter_(1, own, True)
        missing, drawn = torch.full_like(own, wanted), 0
        while bool(missing.any()):
            draws = (words(keys[rows], drawn, wanted) & (2**62 - 1)) % (m - 1)
            draws += draws >= own
            new = ~taken.gather(1, draws) & first_of_their_kind(draws)
            new &= new.cumsum(1) <= missing
            taken.scatter_(1, torch.where(new, draws, own), True)
            missing -= new.sum(1, keepdim=True)
            drawn += wanted
        chosen = taken.logical_not_().scatter_(1, own, True) if left_out else taken
        return chosen[:, number]

    return compared


def query_keys(keys: Tensor, queries: int, what: str) -> Tensor:
    """A random int64 for each query, from one for each image: `b` -> `n`, n a multiple of b, image after image.

    what: whose numbers they are, such as a direction and an offset; others get others.
    """
    per_image = queries // max(1, len(keys))
    return words(mix64(keys ^ zlib.crc32(what.encode())), 0, per_image).flatten()


def first_of_their_kind(numbers: Tensor) -> Tensor:
    """Where a number stands for the first time in its row. Example: [[3, 1, 3]] gives [[True, True, False]]."""
    ordered, places = numbers.sort(dim=1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(first).scatter_(1, places, first)


def as_mask(compared: Compared, device: torch.device) -> Mask:
    """The same as losses ask for it, in blocks: (row slice, column slice) -> bool."""
    return lambda rows, cols: compared(torch.arange(rows.start, rows.stop, device=device))[:, cols]
