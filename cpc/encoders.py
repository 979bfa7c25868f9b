"""Patch encoders: pre-activation ResNets with LayerNorm in place of every BatchNorm.

CPC v2 (Henaff et al. 2020, section 3 and figure 3) found that BatchNorm lets patches see each other through the
batch statistics, a shortcut past the prediction task that larger networks find. LayerNorm has no such statistics.
The paper does not state the axes; here `norm="layer"` has statistics over the channels and pixels of one patch, an
affine pair per channel (`contrastive_core.layer_norm`), and accepts a patch of any size and a whole image as well.

Every encoder has the two members that the rest relies on: `forward(images: b c h w) -> features: b d` and the int
`dim`; ours also has `feature_map(images) -> b d h w`, of which `forward` is the spatial mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from contrastive_core.layer_norm import LayerNorm, rectified

NORMS = ("layer", "channel", "batch", "none")


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each position (`b c h w`), the named alternative to `norm="layer"`.

    y = weight * (x - mean_c x) / sqrt(var_c x + 1e-5) + bias. Example: a constant image gives `bias` everywhere.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, images: Tensor) -> Tensor:
        channels_last = images.movedim(1, -1)
        return F.layer_norm(channels_last, self.weight.shape, self.weight, self.bias).movedim(-1, 1)


def normalisation(kind: str, channels: int) -> nn.Module:
    """The normalisation called `kind`: "layer", "channel", "batch" (couples patches: CPC v1) or "none"."""
    if kind == "layer":
        return LayerNorm(channels)
    if kind == "channel":
        return ChannelNorm(channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"norm={kind!r} is not one of {', '.join(NORMS)}")


class ResidualBlock(nn.Module):
    """Pre-activation residual block (He et al. 2016b): x + conv(relu(norm(...conv(relu(norm(x)))))).

    With `bottleneck` the convolutions are 1x1, 3x3, 1x1 with that width inside; without, two 3x3. The stride sits
    on the first 3x3. Where the shape changes, a 1x1 convolution of the first activation replaces the identity.
    """

    def __init__(self, channels: int, width: int, *, stride: int, bottleneck: int | None, norm: str) -> None:
        super().__init__()
        plan = [(1, bottleneck), (3, bottleneck), (1, width)] if bottleneck else [(3, width), (3, width)]
        strided = 1 if bottleneck else 0
        self.norms, self.convolutions = nn.ModuleList(), nn.ModuleList()
        inner = channels
        for i, (kernel, outer) in enumerate(plan):
            self.norms.append(normalisation(norm, inner))
            step = stride if i == strided else 1
            self.convolutions.append(
                nn.Conv2d(inner, outer, kernel, stride=step, padding=kernel // 2, bias=norm == "none")
            )
            inner = outer
        self.shortcut = None
        if stride != 1 or channels != width:
            # every other pixel and then a 1x1 is a 1x1 of stride 2. With channels_last and fewer channels than a vector
            # has lanes, 16 with AVX-512, oneDNN 3.12 writes past the end of its memory in the latter's backward pass
            # (its issue 6035)
            self.every = stride if channels < 16 else 1
            self.shortcut = nn.Conv2d(channels, width, 1, stride=stride // self.every, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        activation = rectified(self.norms[0], images)
        identity = images
        if self.shortcut is not None:
            identity = self.shortcut(activation[:, :, :: self.every, :: self.every])
        residual = self.convolutions[0](activation)
        for norm, convolution in zip(self.norms[1:], self.convolutions[1:], strict=True):
            residual = convolution(rectified(norm, residual))
        return identity + residual


class PatchResNet(nn.Module):
    """A pre-activation ResNet that encodes patches of any size, and whole images.

    Args:
        blocks: residual blocks in each stack.
        widths: channels that each stack puts out; the last one is `dim`.
        bottlenecks: inner width of each stack's bottleneck blocks; None for blocks of two 3x3 convolutions.
        stem: "imagenet" (7x7 stride 2, then a 3x3 max-pool stride 2) or "small" (3x3, stride `stem_stride`).
        stem_width: channels of the stem.
        stem_stride: of the "small" stem.
        norm: "layer" (the paper's), "channel", "batch" or "none".

    `recompute` is a plain attribute: where it is True, blocks keep only what comes into them, and are computed again
    for the backward pass (Chen et al. 2016, "Training deep nets with sublinear memory cost"): the same gradients, for
    about a third more time, in less memory. Not with norm="batch": its running statistics would count a batch twice.

    The first stack keeps the resolution, each later one halves it. A last norm and ReLU come before the mean, as
    pre-activation needs. Example: `resnet161().dim == 4096`.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        bottlenecks: Sequence[int] | None = None,
        stem: str = "imagenet",
        stem_width: int = 64,
        stem_stride: int = 1,
        norm: str = "layer",
    ) -> None:
        super().__init__()
        inner = [None] * len(blocks) if bottlenecks is None else list(bottlenecks)
        if not len(blocks) == len(widths) == len(inner):
            raise ValueError(f"blocks {list(blocks)}, widths {list(widths)} and bottlenecks {inner} differ in length")
        numbers = {"blocks": blocks, "widths": widths, "stem_width": [stem_width], "stem_stride": [stem_stride]}
        for name, values in numbers.items():
            if not values or min(values) < 1:
                raise ValueError(f"{name}={list(values)}: pass at least 1, for at least one stack")
        if stem not in ("imagenet", "small"):
            raise ValueError(f'stem={stem!r}: pass "imagenet" or "small"')
        self.dim = widths[-1]
        self.recompute = False
        if stem == "imagenet":
            self.stem: nn.Module = nn.Sequential(
                nn.Conv2d(3, stem_width, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)
            )
        else:
            self.stem = nn.Conv2d(3, stem_width, 3, stride=stem_stride, padding=1, bias=False)
        self.stacks = nn.ModuleList()
        channels = stem_width
        for i, (count, width, bottleneck) in enumerate(zip(blocks, widths, inner, strict=True)):
            stack = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stack.append(ResidualBlock(channels, width, stride=stride, bottleneck=bottleneck, norm=norm))
                channels = width
            self.stacks.append(stack)
        self.final_norm = normalisation(norm, channels)

    def feature_map(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d h' w'`, before the mean."""
        maps = self.stem(images.contiguous(memory_format=torch.channels_last))
        for stack in self.stacks:
            for block in stack:  # type: ignore[attr-defined]  # nn.Sequential, to mypy a Module
                # nothing in a block draws random numbers
                maps = (
                    checkpoint(block, maps, use_reentrant=False, preserve_rng_state=False)
                    if self.recompute
                    else block(maps)
                )
        return rectified(self.final_norm, maps)

    def forward(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d`, the spatial mean of the feature map."""
        return self.feature_map(images).mean((2, 3))


def resnet161(norm: str = "layer") -> PatchResNet:
    """The paper's encoder: stacks of 3, 4 and 46 blocks, the third 4096 wide with a 512 bottleneck; no fourth stack.

    Henaff et al. 2020: 305 M parameters, 80 px patches to a 5x5 map (stride 16). (The parameter count is quoted
    from table 6 of Chen et al. 2020.)
    """
    return PatchResNet([3, 4, 46], [256, 512, 4096], bottlenecks=[64, 128, 512], norm=norm)


def resnet50(norm: str = "layer") -> PatchResNet:
    """The ResNet-50 variant of the paper's table 1: four stacks, stride 32, 24 M parameters, `dim` 2048."""
    return PatchResNet([3, 4, 6, 3], [256, 512, 1024, 2048], bottlenecks=[64, 128, 256, 512], norm=norm)


def resnet101_v1(norm: str = "batch") -> PatchResNet:
    """CPC v1's ResNet-v2-101 cut after its third stack: stride 16, `dim` 1024 (van den Oord et al. 2018, 3.2).

    Differs from v1: it used no BatchNorm (`norm="none"`); BatchNorm is where CPC v2's ladder of figure 3 starts.
    """
    return PatchResNet([3, 4, 23], [256, 512, 1024], bottlenecks=[64, 128, 256], norm=norm)


def resnet_small(
    width: int = 32, blocks: Sequence[int] = (1, 1, 1), stem_stride: int = 1, norm: str = "layer"
) -> PatchResNet:
    """A ResNet for patches of 8 to 24 px that a laptop can train: 3x3 stem, stacks of two-convolution blocks.

    The stacks are `width`, 2 `width`, 4 `width`, ... wide; the last one is `dim`. With `blocks=(1, 1, 1)` it is a
    ResNet-8, with (2, 2, 2) a ResNet-14. Example: `resnet_small(width=32).dim == 128`.
    """
    widths = [width * 2**i for i in range(len(blocks))]
    return PatchResNet(blocks, widths, stem="small", stem_width=width, stem_stride=stem_stride, norm=norm)


ENCODERS = ("PatchResNet", "resnet161", "resnet50", "resnet101_v1", "resnet_small")
"""What an `encoder.json` may name."""
