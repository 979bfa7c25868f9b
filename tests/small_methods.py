"""Every method on a network of a few hundred weights, and batches for it: shared by the tests of the methods.

`build(name, norm=...)` makes one, always with the same weights; `batch_of(name)` a batch of random pictures, every view
a noisy copy. Teachers are moved apart from their models, as they are in the middle of a run.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import nt_xent
from contrastive_core.method import Batch
from contrastive_core.methods.byol import BYOL
from contrastive_core.methods.classifier import Classifier
from contrastive_core.methods.distill import Distill
from contrastive_core.methods.moco import MoCo
from contrastive_core.methods.moco_v3 import MoCoV3
from contrastive_core.methods.pirl import PIRL
from contrastive_core.methods.raft import RAFT
from contrastive_core.methods.siamese import Siamese
from contrastive_core.methods.simclr import SimCLR
from contrastive_core.methods.simclr_v2 import SimCLRv2
from contrastive_core.methods.simsiam import SimSiam

IMAGES, CLASSES, TILE = 12, 3, 4


class Pixels(nn.Module):
    """One convolution, a norm and the mean over pixels: images of any size."""

    dim = 6

    def __init__(self, norm="none"):
        super().__init__()
        norms = {"none": nn.Identity, "group": partial(nn.GroupNorm, 2, 6), "batch": partial(nn.BatchNorm2d, 6)}
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), norms[norm](), nn.Tanh())

    def forward(self, images):
        return self.layers(images).mean((2, 3))


def _head(norm, **options):
    return partial(ProjectionHead, hidden=8, out=4, norm=norm == "batch", **options)


def _linear(dim):
    return ProjectionHead(dim, layers=1, out=4)


def _free(norm):
    """Without a bias at the end, which a norm that follows would take away."""
    return _head(norm, output_bias=False)


def _plain(norm):
    return "plain" if norm == "batch" else "none"


def _classifier(norm, **options):
    classifier = Classifier(Pixels(norm), classes=CLASSES, **options)
    nn.init.normal_(classifier.classifier.weight)  # it starts at zero, where many mistakes make no difference
    return classifier


METHODS = {
    "SimCLR": lambda norm: SimCLR(Pixels(norm), head=_head(norm), loss=partial(nt_xent, temperature=0.3)),
    "SimCLRv2": lambda norm: SimCLRv2(
        Pixels(norm), head=_head(norm, layers=3), memory=14, momentum=0.9, temperature=0.3
    ),
    "MoCo": lambda norm: MoCo(
        Pixels(norm), head=_head(norm), queue_size=14, momentum=0.9, bn_groups=2 if norm == "batch" else 1
    ),
    "MoCoV3": lambda norm: MoCoV3(
        Pixels(norm), head=_head(norm, output_norm=_plain(norm)), predictor=_head(norm), momentum=0.9, temperature=0.4
    ),
    "PIRL": lambda norm: PIRL(
        Pixels(norm), images=IMAGES, head=_linear, tile_head=_linear, tiles=4, negatives=7, temperature=0.5, weight=0.3
    ),
    "PIRL by InfoNCE": lambda norm: PIRL(
        Pixels(norm),
        images=IMAGES,
        head=_linear,
        tile_head=_linear,
        tiles=4,
        negatives=7,
        temperature=0.5,
        form="info_nce",
    ),
    "BYOL": lambda norm: BYOL(Pixels(norm), head=_free(norm), predictor=_free(norm), momentum=0.9),
    "SimSiam": lambda norm: SimSiam(Pixels(norm), head=_head(norm, output_norm=_plain(norm)), predictor=_head(norm)),
    "RAFT": lambda norm: RAFT(Pixels(norm), head=_free(norm), predictor=_free(norm), momentum=0.9),
    "BYOL'": lambda norm: RAFT(Pixels(norm), head=_free(norm), predictor=_free(norm), momentum=0.9, cross=1.0),
    "Siamese": lambda norm: Siamese(Pixels(norm), head=_head(norm), negatives=2),
    "Classifier": lambda norm: _classifier(norm, label_smoothing=0.1),
    "Classifier, frozen": lambda norm: _classifier(norm, frozen=True),
    "Distill": lambda norm: Distill(_classifier(norm), _classifier(norm), temperature=0.7, weight=0.6),
}

TEACHERS = [name for name, make in METHODS.items() if hasattr(make("none"), "teacher")]


def build(name, norm="none", dtype=torch.float64, seed=0):
    """A method with weights of its own; its teacher's are others."""
    torch.manual_seed(seed)
    method = METHODS[name](norm).to(dtype)
    with torch.no_grad():
        for parameter in getattr(method, "teacher", nn.Module()).parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for part in ("queue", "bank"):
            if getattr(method, part, None) is not None:  # of length 1 in this precision too
                rows = getattr(method, part).features
                rows.copy_(F.normalize(rows))
    return method


def views_of(name, images, noise):
    """The views that a method asks for, of images `b 3 8 8`: noisy copies, or for PIRL four tiles in another order."""
    first, second = images + 0.3 * noise.to(images)
    if name.startswith(("Classifier", "Distill")):
        return (first,)
    if name.startswith("PIRL"):
        tiles = [second[..., i : i + TILE, j : j + TILE] for i in (0, TILE) for j in (0, TILE)]
        return first, torch.stack([tiles[place] for place in (2, 0, 3, 1)], 1)
    return first, second


def batch_of(name, count=8, seed=1, dtype=torch.float64):
    """`count` of the images 0 .. 11, with one in four not labelled."""
    generator = torch.Generator().manual_seed(seed)
    images, *noise = torch.randn(3, count, 3, 2 * TILE, 2 * TILE, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.arange(count) % (CLASSES + 1) - 1
    return Batch(
        views_of(name, images, torch.stack(noise)), torch.randperm(IMAGES, generator=generator)[:count], labels
    )
