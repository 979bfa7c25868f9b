"""Detection transfer: an encoder's feature map under torchvision's Faster R-CNN (Henaff et al. 2020, section 4.4).

The encoder runs over the whole image. Its feature map, of one scale, goes to a region proposal network and to a box
head that starts at random; frozen it stays as pre-training left it, fine-tuned it learns with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_area, roi_align

from contrastive_core.data.boxes import BoxDataset, Boxes
from contrastive_core.data.loading import batch_indices
from contrastive_core.optim import set_learning_rate_

ROI_CELLS = 7
"""Cells a side that a region is pooled to, as in Ren et al. 2015."""

RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors, as in Ren et al. 2015."""


class EncoderBackbone(nn.Module):
    """An encoder as torchvision's detectors take one: normalised images -> its feature map, of `out_channels`.

    Args:
        encoder: has `feature_map(b 3 h w) -> b d rows cols` and `dim`.
        trainable: False keeps it bit by bit as it is.

    Batch norms keep the statistics of pre-training in either case: two images are no batch to take them from.

    Each image is encoded without what the batch pads it with, and its map is padded instead: padding would be in
    LayerNorm's statistics, which are of the whole map, and an image's features would depend on what it stands beside.
    `told_sizes`, a hook of torchvision's transform, says how large the images are in the next batch.
    """

    def __init__(self, encoder: nn.Module, *, trainable: bool) -> None:
        super().__init__()
        if not hasattr(encoder, "feature_map"):
            raise ValueError(
                f"{type(encoder).__name__} has no feature map to detect with: pass a run with another encoder"
            )
        self.encoder = encoder.requires_grad_(trainable)
        self.trainable = trainable
        self.out_channels: int = encoder.dim  # type: ignore[assignment]  # nn.Module types attributes as Tensor | Module
        self.sizes: list[tuple[int, int]] | None = None
        self.cell: tuple[int, int] | None = None

    def told_sizes(self, transform: nn.Module, given: Any, made: tuple[ImageList, Any]) -> None:
        """Take down how large each image of the next batch is, without its padding: a hook's three arguments."""
        self.sizes = made[0].image_sizes

    def train(self, mode: bool = True) -> EncoderBackbone:
        super().train(mode)
        for module in self.encoder.modules():
            if not self.trainable or isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        whole = (images.shape[-2], images.shape[-1])
        sizes, self.sizes = self.sizes or [whole] * len(images), None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            if all(size == whole for size in sizes):
                maps: Tensor = self.encoder.feature_map(images)  # type: ignore[operator]
                self.scale = maps.shape[-1] / whole[-1]
                return maps
            return self._padded_after(images, sizes)

    def _padded_after(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Maps of images that a batch pads, those of one size at a time, with their last cells repeated beyond them.

        With zeros beyond them a detector of four canvases of 48 px, padded to 64, found next to nothing [ours]: what
        the proposal network proposed was across the edge, and the box head learned from little else.
        """
        if self.cell is None:
            self.cell = self._measured_cell(images[:1])
        stride, step = self.cell
        self.scale = 1 / stride
        rows, cols = (side // stride for side in images.shape[-2:])
        found: dict[int, Tensor] = {}
        for size in dict.fromkeys(sizes):
            places = [place for place, each in enumerate(sizes) if each == size]
            height, width = (-(-side // step) * step for side in size)
            maps = self.encoder.feature_map(images[places, :, :height, :width])  # type: ignore[operator]
            beyond = (0, cols - maps.shape[-1], 0, rows - maps.shape[-2])
            maps = nn.functional.pad(maps, beyond, mode="replicate")
            found |= zip(places, maps.split(1), strict=True)
        return torch.cat([found[place] for place in range(len(sizes))])

    def _measured_cell(self, image: Tensor) -> tuple[int, int]:
        """A cell's pixels a side, and what the sides of an image have to be multiples of.

        That is 1 where a cell that is not filled is in the map, too. A trunk that leaves it out, as one with max-pools
        of 2, would not see the last pixels of an image whose sides are no multiples of the cell's.
        """
        cells, beyond = (
            self.encoder.feature_map(each).shape[-1]  # type: ignore[operator]
            for each in (image, nn.functional.pad(image, (0, 1, 0, 1)))
        )
        stride = image.shape[-1] // cells
        return stride, 1 if beyond > cells else stride


class RegionPool(MultiScaleRoIAlign):
    """RoIAlign on the backbone's map, by the scale that the backbone measured on what it was given.

    torchvision's guesses it from the images before they are padded to a multiple of 32, which at 40 px, padded to 64,
    is twice what it is.
    """

    def __init__(self, backbone: EncoderBackbone) -> None:
        super().__init__(["0"], output_size=ROI_CELLS, sampling_ratio=2)
        self._backbone = (backbone,)  # in a tuple it is not a part of this module

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return roi_align(x["0"], boxes, self.output_size, self._backbone[0].scale, self.sampling_ratio)


def detector(
    encoder: nn.Module,
    classes: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    trainable: bool = False,
    sides: tuple[int, int] = (600, 1000),
    anchors: Sequence[int] = (64, 128, 256, 512),
    head_width: int = 1024,
    proposals: int = 1000,
    regions: int = 512,
) -> FasterRCNN:
    """Faster R-CNN on one feature map.

    Args:
        encoder: bare, of normalised images, with `feature_map` and `dim`.
        classes: without the background, which torchvision counts as class 0.
        mean, std: the encoder's normalisation, which the detector does: images come in [0, 1].
        trainable: whether the encoder learns, too.
        sides: the short side that images are brought to, and the most that the long one may have then.
        anchors: sides of the anchors in those pixels.
        head_width: of the box head's two layers.
        proposals: that the box head sees of an image; regions: that it learns from.

    Raises ValueError for no classes or anchors, or an encoder without a feature map.
    """
    if classes < 1 or not anchors or min(anchors) < 1:
        raise ValueError(f"classes={classes}, anchors={list(anchors)}: pass at least one class and one anchor's side")
    backbone = EncoderBackbone(encoder, trainable=trainable)
    model = FasterRCNN(
        backbone,
        min_size=sides[0],
        max_size=sides[1],
        image_mean=list(mean),
        image_std=list(std),
        rpn_anchor_generator=AnchorGenerator((tuple(anchors),), (RATIOS,)),
        rpn_post_nms_top_n_train=proposals,
        rpn_post_nms_top_n_test=proposals,
        box_roi_pool=RegionPool(backbone),
        box_head=TwoMLPHead(backbone.out_channels * ROI_CELLS**2, head_width),
        box_predictor=FastRCNNPredictor(head_width, classes + 1),
        box_batch_size_per_image=regions,
    )
    model.transform.register_forward_hook(backbone.told_sizes)
    return model


def to_learn_from(image: Tensor, boxes: Boxes, *, flipped: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """What torchvision's detector trains on: an image in [0, 1], the boxes that count, and labels from 1.

    Example: flipped, a box from x = 0 to 2 in an image of 10 pixels is from 8 to 10.
    """
    sides = boxes.boxes.clone()
    if flipped:
        image, width = image.flip(2), image.shape[2]
        sides[:, [0, 2]] = width - sides[:, [2, 0]]
    counted = ~boxes.difficult
    return image.float() / 255, {"boxes": sides[counted], "labels": boxes.labels[counted] + 1}


def fit(
    model: FasterRCNN,
    optimizer: Optimizer,
    dataset: BoxDataset,
    *,
    steps: int,
    batch_size: int,
    schedule: Callable[[float], float],
    flip: bool,
    seed: int,
    clip: float | None,
    told: Callable[[int, dict[str, float]], None],
) -> None:
    """Train a detector for so many steps; `told(step, losses)` after each. Images and flips are the seed's.

    Raises FloatingPointError where the loss is no number, before it reaches the weights.
    """
    device = next(model.parameters()).device
    coins = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        chosen = batch_indices(len(dataset), batch_size, seed, step)
        flips = (torch.rand(len(chosen), generator=coins) < 0.5).logical_and(torch.tensor(flip))
        pairs = [to_learn_from(*dataset[i], flipped=f) for i, f in zip(chosen.tolist(), flips.tolist(), strict=True)]
        images = [image.to(device) for image, _ in pairs]
        losses = model(images, [{name: each.to(device) for name, each in target.items()} for _, target in pairs])
        total = torch.stack(list(losses.values())).sum()
        if not bool(torch.isfinite(total)):
            raise FloatingPointError(f"the loss is {total.item()} in step {step + 1}: pass a smaller optimizer.lr")
        set_learning_rate_(optimizer, schedule((step + 0.5) / steps))
        optimizer.zero_grad()
        total.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        told(step + 1, {"loss": float(total.detach())} | {name: float(loss.detach()) for name, loss in losses.items()})


Found = dict[str, Tensor]
"""Of an image: boxes `n 4` in its own pixels, labels `n` from 0, scores `n`."""


@torch.no_grad()
def find(model: FasterRCNN, images: Sequence[Tensor]) -> list[Found]:
    """What a detector sees in images `3 h w` uint8 of any size; as many results as images.

    Those of one size go through it together: the features are an image's own in any batch, but regions are proposed
    from its padding, too, and an image's boxes would depend on what it stands beside.
    """
    device = next(model.parameters()).device
    model.eval()
    found: dict[int, Found] = {}
    for size in dict.fromkeys(image.shape for image in images):
        places = [place for place, image in enumerate(images) if image.shape == size]
        found |= zip(places, model([images[place].to(device).float() / 255 for place in places]), strict=True)
    return [
        {**{name: each.cpu() for name, each in one.items()}, "labels": one["labels"].cpu() - 1}
        for one in (found[place] for place in range(len(images)))
    ]


def mean_average_precision(found: Sequence[Found], truth: Sequence[Boxes], classes: int) -> dict[str, Any]:
    """COCO's, by torchmetrics: the mean over classes of the area under precision and recall at 101 recalls.

    Returns "map" (the mean over overlaps of 0.5, 0.55, ... 0.95), "map_50", "map_75" and "per_class", of "map".
    Difficult boxes are not to be found, and finding them is no mistake. A class without a box is not in the means.

    Differs from VOC 2007's own, which takes 11 recalls and an overlap of 0.5: "map_50" comes near it.
    """
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(backend="faster_coco_eval", class_metrics=True)
    metric.warn_on_many_detections = False
    metric.update([dict(one) for one in found], [_wanted(one) for one in truth])
    result = metric.compute()
    means = {name: max(0.0, float(result[name])) for name in ("map", "map_50", "map_75")}
    per_class: list[float | None] = [None] * classes
    for label, value in zip(result["classes"].reshape(-1), result["map_per_class"].reshape(-1), strict=True):
        per_class[int(label)] = float(value) if value >= 0 else None
    return {**means, "per_class": per_class}


def _wanted(one: Boxes) -> dict[str, Tensor]:
    """Of an image, for torchmetrics. A crowd is overlapped by the share of the find that lies in it.

    What is difficult by itself is overlapped as all else is: it is left out as of a size that is not asked for.
    """
    if one.crowds:
        return {"boxes": one.boxes, "labels": one.labels, "iscrowd": one.difficult.long()}
    area = box_area(one.boxes).masked_fill(one.difficult.bool(), 1e12)  # COCO's "all" ends at 1e10
    return {"boxes": one.boxes, "labels": one.labels, "area": area}


def evaluate(model: FasterRCNN, dataset: BoxDataset, batch_size: int) -> dict[str, Any]:
    """`mean_average_precision` over a whole data set, a batch of images in memory at a time."""
    found: list[Found] = []
    for first in range(0, len(dataset), batch_size):
        found += find(model, [dataset[i][0] for i in range(first, min(first + batch_size, len(dataset)))])
    truth = [dataset[i][1] for i in range(len(dataset))]
    return mean_average_precision(found, truth, len(dataset.class_names))
