"""Work on the drawn rows of a batch only.

kornia's modules compute an operation for every image and then select; its `p` saves no time for elastic, shear,
colour or equalise. Here the rows are known on the CPU, before any pixel is touched, so an operation that is
applied with probability 0.2 costs a fifth, and no device is asked which rows were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from contrastive_core.transfer import to_device


def check_images(images: Tensor, channels: tuple[int, ...] | None = None) -> None:
    """Raise ValueError in one line unless images are floating `n c h w` (with c among `channels`, if given)."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"expected floating images n c h w in [0, 1], got {images.dtype} of shape {tuple(images.shape)}: "
            "add the batch dimension, or divide uint8 by 255"
        )
    if channels is not None and images.shape[1] not in channels:
        raise ValueError(
            f"expected {' or '.join(map(str, channels))} channels, got {images.shape[1]} in images of shape "
            f"{tuple(images.shape)}: repeat a grey image's channel, or leave this operation out"
        )


def check_probability(probability: float, name: str = "probability") -> float:
    """The probability itself, or ValueError unless 0 <= probability <= 1."""
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"{name} is between 0 and 1, got {probability}")
    return probability


def per_image(numbers: Tensor, images: Tensor) -> Tensor:
    """Numbers `n *rest` on the images' device and in their type, `n *rest 1 1 ...`, to broadcast over n c h w.

    Raises:
        ValueError: if there isn't one number an image.

    Example: numbers of shape (n) become (n, 1, 1, 1), those of shape (n, c) become (n, c, 1, 1).
    """
    if numbers.ndim == 0 or len(numbers) != len(images):
        raise ValueError(f"expected {len(images)} numbers, one an image, got numbers of shape {tuple(numbers.shape)}")
    moved = to_device(numbers, images.device, images.dtype)
    return moved.reshape(*moved.shape, *(1,) * (images.ndim - moved.ndim))


def on_chosen(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *numbers: Tensor) -> Tensor:
    """Images with `operation(images[chosen], *(number[chosen] for each))` in the chosen rows, the others untouched.

    Args:
        images: n c h w.
        chosen: n bool, on the CPU.
        operation: images m c h w and m of each of the numbers -> images m c h w.
        numbers: `n *rest`, on the CPU.

    Example: `on_chosen(images, torch.tensor([True, False]), brightness, torch.tensor([0.0, 0.0]))` blackens the first.
    """
    if len(chosen) != len(images):
        raise ValueError(f"the randomness is for {len(chosen)} images, got {len(images)}: build it with their places")
    rows = chosen.nonzero().squeeze(1)
    if len(rows) == 0:
        return images
    if len(rows) == len(images):
        return operation(images, *numbers)
    index = to_device(rows, images.device)
    return images.index_copy(0, index, operation(images.index_select(0, index), *(number[rows] for number in numbers)))


def by_group(images: Tensor, group: Tensor, operations: Sequence[Callable[[Tensor, Tensor], Tensor]]) -> Tensor:
    """Each image through the operation of its group: one sort and one gather, however many groups there are.

    Args:
        images: n c h w.
        group: n int64 on the CPU, an index into operations.
        operations: each takes images m c h w and their rows m (int64, on the CPU) and returns m c h w.

    Example: `by_group(images, torch.zeros(n, dtype=torch.int64), [lambda x, rows: 1 - x])` inverts every image.
    """
    if len(group) != len(images):
        raise ValueError(f"the randomness is for {len(group)} images, got {len(images)}: build it with their places")
    order = torch.argsort(group, stable=True)
    counts = torch.bincount(group, minlength=len(operations)).tolist()
    index = to_device(order, images.device)
    gathered = images.index_select(0, index)
    result = torch.empty_like(gathered)
    for operation, piece, rows, places in zip(
        operations, gathered.split(counts), order.split(counts), index.split(counts), strict=True
    ):
        if len(rows):
            result.index_copy_(0, places, operation(piece, rows))
    return result
