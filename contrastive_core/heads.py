"""Projection and prediction heads: the small MLPs between the features that are kept and the loss.

All are stacks of a linear map, a BatchNorm and a ReLU, and the papers differ in what comes last:

    SimCLR      2 layers, hidden as wide as the features, out 128, BatchNorm at the end (its published code)
    SimCLRv2    3 layers, the same; fine-tuning starts inside the head, see `ProjectionHead.upto`
    MoCo v1     1 layer; v2: 2 layers without BatchNorm; out 128
    MoCo v3     2 layers (ViT: 3), hidden 4096, out 256, BatchNorm without scale and shift at the end
    BYOL        2 layers, hidden 4096, out 256, nothing at the end
    SimSiam     3 layers of 2048, BatchNorm without scale and shift at the end; its predictor narrows to 512
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

OUTPUT_NORMS = ("none", "norm", "plain")


class ProjectionHead(nn.Module):
    """An MLP `b dim -> b out`, with BatchNorm and ReLU after every layer but the last.

    Args:
        dim: of the features that come in.
        layers: linear maps, at least 1.
        hidden: width of all layers but the last; None = dim.
        out: width of the last layer, kept as `dim`.
        norm: whether the hidden layers have BatchNorm.
        output_norm: after the last layer: "none", "norm" (BatchNorm), or "plain" (BatchNorm without scale and shift).
        output_bias: of the last layer, where no norm follows that would take it away.

    A linear map before a norm has no bias: the norm subtracts it. (BYOL's code keeps one there, to no effect.)

    `arguments` are those it was built with, as they are: `ProjectionHead(**head.arguments)` is another of its kind.

    Raises ValueError for layers or widths below 1, or another output_norm.

    Example: `ProjectionHead(512)(torch.rand(4, 512))` has the shape 4 128.
    """

    def __init__(
        self,
        dim: int,
        *,
        layers: int = 2,
        hidden: int | None = None,
        out: int = 128,
        norm: bool = True,
        output_norm: str = "none",
        output_bias: bool = True,
    ) -> None:
        super().__init__()
        if layers < 1 or output_norm not in OUTPUT_NORMS:
            raise ValueError(
                f"layers={layers}, output_norm={output_norm!r}: pass at least 1 and one of {', '.join(OUTPUT_NORMS)}"
            )
        if min(dim, out, 1 if hidden is None else hidden) < 1:
            raise ValueError(f"dim={dim}, hidden={hidden}, out={out}: pass at least 1 each")
        self.dim = out
        self.arguments: dict[str, Any] = {
            "dim": dim,
            "layers": layers,
            "hidden": hidden,
            "out": out,
            "norm": norm,
            "output_norm": output_norm,
            "output_bias": output_bias,
        }
        widths = [dim] + [hidden or dim] * (layers - 1)
        blocks: list[nn.Module] = [_hidden_layer(a, b, norm) for a, b in pairwise(widths)]
        last = OrderedDict[str, nn.Module](
            linear=nn.Linear(widths[-1], out, bias=output_bias and output_norm == "none")
        )
        if output_norm != "none":
            last["norm"] = nn.BatchNorm1d(out, affine=output_norm == "norm")
        self.layers = nn.Sequential(*blocks, nn.Sequential(last))

    def forward(self, features: Tensor) -> Tensor:
        projections: Tensor = self.layers(features)
        return projections

    def upto(self, layer: int) -> nn.Sequential:
        """The first `layer` layers as a module that shares their weights: 0 = none, -1 = all.

        SimCLRv2 fine-tunes from the first layer of its head where labels are few (Chen et al. 2020b, section 2).

        Raises ValueError for a layer that the head does not have.
        """
        if not -1 <= layer <= len(self.layers):
            raise ValueError(
                f"the head has {len(self.layers)} layers, got layer {layer}: pass -1 to {len(self.layers)}"
            )
        return self.layers if layer == -1 else self.layers[:layer]


def _hidden_layer(inner: int, outer: int, norm: bool) -> nn.Sequential:
    parts = OrderedDict[str, nn.Module](linear=nn.Linear(inner, outer, bias=not norm))
    if norm:
        parts["norm"] = nn.BatchNorm1d(outer)
    parts["relu"] = nn.ReLU()
    return nn.Sequential(parts)
