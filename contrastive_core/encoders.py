"""Other people's trunks as encoders: `forward(images: b c h w) -> features: b d` and the int `dim`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TorchvisionTrunk(nn.Module):
    """A torchvision classifier up to its last feature map.

    Args:
        name: of `torchvision.models`, e.g. "resnet18".
        node: the node whose output is the feature map; "layer4" is a ResNet's last stack.

    Example: `TorchvisionTrunk("resnet18").dim == 512`.
    """

    dim: int

    def __init__(self, name: str, node: str = "layer4", **arguments: Any) -> None:
        super().__init__()
        from torchvision.models import get_model
        from torchvision.models.feature_extraction import create_feature_extractor

        self.trunk = create_feature_extractor(get_model(name, weights=None, **arguments), {node: "map"})
        with torch.no_grad():
            self.dim = self.eval().feature_map(torch.zeros(1, 3, 64, 64)).shape[1]
        self.train()

    def feature_map(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d h' w'`."""
        features: Tensor = self.trunk(images)["map"]
        return features

    def forward(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d`, the spatial mean of the feature map."""
        return self.feature_map(images).mean((2, 3))


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


ENCODERS = ("TorchvisionTrunk", "TimmTrunk")
"""What an `encoder.json` may name."""
