"""Encoders of whole images, mostly other people's: `forward(images: b c h w) -> features: b d` and the int `dim`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn


class TorchvisionTrunk(nn.Module):
    """A torchvision classifier up to its last feature map.

    Args:
        name: of `torchvision.models`, e.g. "resnet18".
        node: the node whose output is the feature map; "layer4" is a ResNet's last stack.
        small_stem: a 3x3 stride 1 first convolution and no max-pool, for images of about 32 px (SimCLR appendix B.9,
            SimSiam appendix D); only where the model has `conv1` and `maxpool`, as torchvision's ResNets have.

    Further arguments go to the model, e.g. `zero_init_residual=True`.

    Raises ValueError for a name of no classifier, and for `small_stem` with a model of another build.

    Example: `TorchvisionTrunk("resnet18").dim == 512`.
    """

    dim: int

    def __init__(self, name: str, node: str = "layer4", small_stem: bool = False, **arguments: Any) -> None:
        super().__init__()
        import torchvision.models
        from torchvision.models import get_model, list_models
        from torchvision.models.feature_extraction import create_feature_extractor

        if name.lower() not in list_models(torchvision.models):  # a detector's builder fetches its trunk's weights
            raise ValueError(f"{name!r} is none of torchvision's classifiers: pass resnet18, say")
        model = get_model(name, weights=None, **arguments)
        if small_stem:
            _shrink_stem_(model)
        self.trunk = create_feature_extractor(model, {node: "map"})
        with torch.no_grad():  # in eval mode: BatchNorm's statistics stay as they are
            self.dim = self.eval().feature_map(torch.zeros(1, 3, 64, 64)).shape[1]
        self.train()

    def feature_map(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d h' w'`."""
        features: Tensor = self.trunk(images)["map"]
        return features

    def forward(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d`, the spatial mean of the feature map."""
        return self.feature_map(images).mean((2, 3))


def _shrink_stem_(model: nn.Module) -> None:
    first = getattr(model, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(model, "maxpool"):
        raise ValueError(
            f"small_stem=True: {type(model).__name__} has no convolution conv1 and maxpool: pass a ResNet's name, "
            f"or small_stem=False"
        )
    model.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNets
    model.maxpool = nn.Identity()


class TimmTrunk(nn.Module):
    """A timm model without its classifier (`pip install "cpc-images[vit]"`).

    Further arguments go to `timm.create_model`.

    Example: `TimmTrunk("resnet18").dim == 512`.
    """

    dim: int

    def __init__(self, name: str, **arguments: Any) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ImportError('timm is not installed: pip install "cpc-images[vit]"') from None
        self.trunk: Any = timm.create_model(name, num_classes=0, **arguments)
        self.dim = self.trunk.num_features  # type: ignore[assignment]  # timm types it Tensor | Module

    def feature_map(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d h' w'`; raises ValueError for a trunk of tokens, which has none."""
        features: Tensor = self.trunk.forward_features(images)
        if features.ndim != 4:
            raise ValueError(f"{type(self.trunk).__name__} has no feature map: use forward, or a convolutional trunk")
        return features

    def forward(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d`, pooled as the model pools."""
        features: Tensor = self.trunk(images)
        return features


class SmallCNN(nn.Module):
    """An ordinary convolutional network for small images: what is trained from scratch where labels are few.

    A 3x3 convolution, BatchNorm and ReLU for each width, a 2x2 max-pool behind each but the first.

    Args:
        widths: channels; the last is `dim`.
        stem: "small", the first convolution as the others, or "imagenet", 7x7 with stride 2 and a 3x3 max-pool with
            stride 2 behind it. `small_cnn_for` has both for a size of images.

    Raises ValueError for no widths, and a stem of another name.

    Example: the usual one makes a 4 x 4 map of 32 px, and its `dim` is 128; with stem="imagenet" a 3 x 3 map of 96 px.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 128), stem: str = "small") -> None:
        super().__init__()
        if not widths:
            raise ValueError("widths=[]: pass the channels of one convolution or more")
        if stem not in ("imagenet", "small"):
            raise ValueError(f'stem={stem!r}: pass "imagenet" or "small"')
        large = stem == "imagenet"
        kernel, stride = (7, 2) if large else (3, 1)
        first = nn.Conv2d(3, widths[0], kernel, stride, padding=kernel // 2, bias=False)
        layers: list[nn.Module] = [first, nn.BatchNorm2d(widths[0])]
        layers += [nn.MaxPool2d(3, stride=2, padding=1)] if large else []
        layers.append(nn.ReLU())
        for inner, outer in pairwise(widths):
            layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer)]
            # the largest rectified is the rectified largest, to the bit, at a quarter of the places
            layers += [nn.MaxPool2d(2), nn.ReLU()]
        self.layers, self.dim = nn.Sequential(*layers), widths[-1]

    def feature_map(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d h' w'`."""
        features: Tensor = self.layers(images.contiguous(memory_format=torch.channels_last))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d`, the spatial mean of the feature map."""
        return self.feature_map(images).mean((2, 3))


def small_cnn_for(image_size: int) -> dict[str, Any]:
    """Arguments of a `SmallCNN` that sees most of an image: another width above 48 px, the other stem above 80.

    On photographs of 96 px the other stem was 3 points better with 5 labels a class than one of 3x3 [ours].

    Example: `small_cnn_for(32)` is the usual one, and of 28, 64, 96 and 224 px the maps are 3, 4, 3 and 7 px a side.
    """
    if image_size > 80:
        return {"widths": [32, 64, 128, 256], "stem": "imagenet"}
    return {"widths": [32, 64, 128, 128, *([128] if image_size > 48 else [])]}


_VIT_SIZES = {"small": (384, 12, 12), "base": (768, 12, 12)}  # dim, depth, heads


class MoCoViT(nn.Module):
    """MoCo v3's vision transformer (`pip install "cpc-images[vit]"`); its features are the class token.

    Chen, Xie, He 2021, "An Empirical Study of Training Self-Supervised Vision Transformers": fixed 2-D sin-cos
    positions, and a patch projection frozen at its random initialisation (section 4.2, for stable training). Its ViT-S
    has 12 heads, not the usual 6. Weights start uniform after Xavier, with queries, keys and values as three matrices
    and the patch projection as one of 3 * patch_size^2 inputs, biases at zero [the published code].

    Args:
        size: "small" (dim 384) or "base" (768), both of 12 blocks with 12 heads.
        image_size: pixels a side of the square images, a multiple of patch_size.
        patch_size: pixels a side of what becomes one token.
        dim, depth, heads: where they differ from those of `size`; dim is a multiple of 4 and of heads.

    The positions are a buffer, so that no optimizer, weight decay or fine-tuning reaches them.

    Raises ImportError without timm, ValueError for numbers that don't fit each other.

    Example: `MoCoViT().dim == 384`; an image of 224 px becomes 14 x 14 tokens and the class token.
    """

    def __init__(
        self,
        size: str = "small",
        *,
        image_size: int = 224,
        patch_size: int = 16,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        if size not in _VIT_SIZES:
            raise ValueError(f'size={size!r}: pass "small" or "base"')
        numbers = zip((dim, depth, heads), _VIT_SIZES[size], strict=True)
        self.dim, depth, heads = (usual if own is None else own for own, usual in numbers)
        self.image_size, self.patch_size = image_size, patch_size
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size}, patch_size={patch_size}: pass a patch_size that divides it")
        if self.dim % 4 or self.dim % heads:
            raise ValueError(f"dim={self.dim}, heads={heads}: pass a dim that 4 (for the positions) and heads divide")
        try:
            from timm.models.vision_transformer import VisionTransformer
        except ImportError:
            raise ImportError('timm is not installed: pip install "cpc-images[vit]"') from None
        self.trunk: Any = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=self.dim,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            weight_init="moco",
        )
        self._freeze_patches_and_positions()

    def _freeze_patches_and_positions(self) -> None:
        projection, side = self.trunk.patch_embed.proj, self.image_size // self.patch_size
        bound = math.sqrt(6 / (3 * self.patch_size**2 + self.dim))
        nn.init.uniform_(projection.weight, -bound, bound)
        nn.init.zeros_(projection.bias)
        projection.requires_grad_(False)
        positions = sincos_positions(side, side, self.dim)
        del self.trunk.pos_embed
        self.trunk.register_buffer("pos_embed", torch.cat((positions.new_zeros(1, self.dim), positions))[None])

    def _tokens(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b tokens d`, the class token first, after the last LayerNorm."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} px: this ViT was built for {self.image_size} x "
                f"{self.image_size}, pass those or another image_size"
            )
        tokens: Tensor = self.trunk.forward_features(images)
        return tokens

    def feature_map(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d rows cols`, the patch tokens; `forward` is not their mean."""
        rows = self.image_size // self.patch_size
        return rearrange(self._tokens(images)[:, 1:], "b (rows cols) d -> b d rows cols", rows=rows)

    def forward(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d`, the class token. Raises ValueError for images of another size than `image_size`."""
        return self._tokens(images)[:, 0]


def sincos_positions(rows: int, cols: int, dim: int) -> Tensor:
    """Fixed positions of a grid's cells, row by row: `(rows cols) d`.

    With w_i = 10000^(-i / (d/4)), i = 0 .. d/4 - 1, cell (r, c) has [sin(r w), cos(r w), sin(c w), cos(c w)]
    (Vaswani et al. 2017, once an axis; the order of MoCo v3's published code on its square grids).

    Example: `sincos_positions(1, 1, 4)` is [[0, 1, 0, 1]].
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    down, right = (torch.arange(count)[:, None] * frequencies for count in (rows, cols))
    return torch.cat(
        (
            repeat(torch.cat((down.sin(), down.cos()), 1), "rows d -> (rows cols) d", cols=cols),
            repeat(torch.cat((right.sin(), right.cos()), 1), "cols d -> (rows cols) d", rows=rows),
        ),
        dim=1,
    )


ENCODERS = ("TorchvisionTrunk", "TimmTrunk", "MoCoViT", "SmallCNN")
"""What an `encoder.json` may name."""
