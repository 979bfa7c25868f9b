"""Features of a frozen encoder, for every image of a data set."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from contrastive_core.data.images import ImageDataset
from contrastive_core.data.loading import BadImages, evaluation_batches

logger = logging.getLogger(__name__)


def extract_features(
    encode: Callable[[Tensor], Tensor],
    dataset: ImageDataset,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    workers: int = 0,
    bad_images: BadImages | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode every image of a data set once, in order, without gradients.

    Args:
        encode: images `b 3 h w` float32 in [0, 1] -> `b ...`, e.g. `b d` or a grid `b rows cols d`. A module is put in
            eval mode meanwhile; whoever passes a lambda around a module does that before.
        batch_size: images at a time; has no influence on the result beyond rounding.
        autocast: `torch.bfloat16` to encode under autocast; None = as the encoder is.
        bad_images: counts the images that cannot be decoded, and stops above its share; by default 1 %.

    Returns features `n ...` float32 and labels `n` int64 on the CPU. Images that cannot be decoded are left out of
    both, so n may be less than `len(dataset)`.

    Raises TooManyBadImages, and ValueError when no image is left.

    Example: `extract_features(lambda images: images.mean((2, 3)), dataset)` gives each image's mean colour, `n 3`.
    """
    bad_images = BadImages() if bad_images is None else bad_images
    features, labels, done = torch.empty(0), [], 0
    # not inference_mode: whatever a module computes once and keeps would be unfit for training ever after
    with torch.no_grad(), _eval_mode(encode):
        for batch in evaluation_batches(dataset, batch_size=batch_size, workers=workers):
            bad_images.count(batch.faults, seen=len(batch.labels) + len(batch.faults))
            if len(batch.labels) == 0:
                continue
            images = batch.images.to(device, non_blocking=True).float() / 255
            with _autocast(images.device.type, autocast):
                encoded = encode(images)
            if done == 0:  # one allocation: torch.cat over a list would hold everything twice
                features = torch.empty(len(dataset), *encoded.shape[1:])
            features[done : done + len(encoded)] = encoded
            labels.append(batch.labels)
            done += len(encoded)
    if done == 0:
        raise ValueError(f"none of the {len(dataset)} images could be decoded: nothing to evaluate")
    if done < len(dataset):
        logger.warning("evaluated on %d of %d images: the others cannot be decoded", done, len(dataset))
    return features[:done], torch.cat(labels)


def _autocast(device_type: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device_type, dtype)


@contextlib.contextmanager
def _eval_mode(encode: object) -> Iterator[None]:
    if not isinstance(encode, nn.Module):
        yield
        return
    before = [(module, module.training) for module in encode.modules()]
    encode.eval()
    try:
        yield
    finally:
        # through `train`, which is more than a flag for torchvision's feature extractors; parents come before their
        # children, so that frozen parts in eval mode have the last word
        for module, training in before:
            module.train(training)


def pool_grid(latents: Tensor, cells: int) -> Tensor:
    """Average a grid of latents into `cells` x `cells` cells and put these side by side.

    latents: `b rows cols d` -> `b (cells cells d)` float32, row by row. Where `cells` does not divide the grid the
    cells overlap, as in `adaptive_avg_pool2d`. `cells=1` is the mean over the grid.

    Raises ValueError when the grid has fewer rows or columns than cells, or the tensor is not a grid.

    Example: a 2 x 2 grid of scalars 1, 2, 3, 4 gives [2.5] for one cell and [1, 2, 3, 4] for two.
    """
    if latents.dim() != 4 or not 1 <= cells <= min(latents.shape[1:3]):
        raise ValueError(
            f"latents {tuple(latents.shape)} into {cells} x {cells} cells: pass `b rows cols d`, cells <= rows, cols"
        )
    pooled = adaptive_avg_pool2d(rearrange(latents.float(), "b rows cols d -> b d rows cols"), cells)
    return rearrange(pooled, "b d i j -> b (i j d)")
