"""SimCLR v2's ResNets: post-activation bottlenecks, any width, with or without selective kernels.

Chen et al. 2020, "Big Self-Supervised Models are Strong Semi-Supervised Learners" (table 1 lists depth, width and
parameters), where the paper is silent as in the code published with it. A selective kernel (Li et al. 2019,
"Selective Kernel Networks") lets each image weigh two 3x3 convolutions against each other, channel by channel. The
networks that have it also have ResNet-D's stem and shortcut (He et al. 2019, "Bag of Tricks for Image Classification
with Convolutional Neural Networks").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive_core.layer_norm import LayerNorm

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_SK_RATIO = 0.0625  # of a bottleneck's width ...
_SK_LEAST = 32  # ... but at least this many channels decide between the two branches


class SelectiveKernel(nn.Module):
    """Two 3x3 convolutions, mixed for every image and channel by what both see in the whole image.

    With u_1, u_2 the branches (convolution, norm, ReLU) and s = mean over pixels of u_1 + u_2:
    y = a_1 u_1 + a_2 u_2, (a_1, a_2) = softmax over the branches of W_2 relu(norm(W_1 s)), no biases.
    Differs from Li et al. 2019, as SimCLR v2 does: both branches are 3x3 (theirs are 3x3 and a dilated 5x5), computed
    as one convolution of twice the filters.

    Args:
        channels: of the input.
        filters: of the output; s is squeezed to max(filters / 16, 32).
        stride: of the convolution.
        norm: see `SimCLRResNet`.
    """

    def __init__(self, channels: int, filters: int, *, stride: int, norm: str) -> None:
        super().__init__()
        squeezed = max(int(filters * _SK_RATIO), _SK_LEAST)
        self.branches = _convolution(channels, 2 * filters, 3, stride=stride, norm=norm)
        self.squeeze = _convolution(filters, squeezed, 1, norm=norm)
        self.expand = nn.Conv2d(squeezed, 2 * filters, 1, bias=False)

    def attention(self, total: Tensor) -> Tensor:
        """The sum of the branches, `b d h w` -> their weights, `2 b d 1 1`, whose sum over the first axis is one."""
        first, second = self.expand(self.squeeze(total.mean((2, 3), keepdim=True))).chunk(2, dim=1)
        return torch.stack((first, second)).softmax(0)

    def forward(self, images: Tensor) -> Tensor:
        """`b c h w` -> `b d h' w'`."""
        first, second = self.branches(images).chunk(2, dim=1)
        to_first, to_second = self.attention(first + second)
        return to_first * first + to_second * second


class PairMean(nn.Module):
    """The mean of a pixel and its neighbours right, below and diagonal, those that exist: ResNet-D's shortcut.

    `b c h w` -> `b c h w` at stride 1, `b c ceil(h/2) ceil(w/2)` at stride 2. The published code pools at stride 1
    too, where ResNet-D has the identity. Differs from it: at stride 2 and an odd side it counts a border of zeros in.

    Example: on a row [0, 2, 6] (one pixel high) stride 1 gives [1, 4, 6], stride 2 gives [1, 6].
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        if self.stride == 2:
            return F.avg_pool2d(images, 2, ceil_mode=True, count_include_pad=False)
        return F.avg_pool2d(images, 2, stride=1, padding=1, count_include_pad=False)[:, :, 1:, 1:]


class Bottleneck(nn.Module):
    """Post-activation residual block (He et al. 2016): relu(shortcut(x) + norm(conv(...conv(x)))).

    The convolutions are 1x1, 3x3 (with the stride; or a selective kernel) and 1x1 to 4 `filters`. A `projection`
    replaces the identity in a stack's first block. The last norm's scale starts at zero, so that every block starts
    as its shortcut.
    """

    def __init__(
        self, channels: int, filters: int, *, stride: int = 1, projection: bool, sk: bool = False, norm: str = "batch"
    ) -> None:
        super().__init__()
        middle: nn.Module
        if sk:
            middle = SelectiveKernel(filters, filters, stride=stride, norm=norm)
        else:
            middle = _convolution(filters, filters, 3, stride=stride, norm=norm)
        last = _convolution(filters, 4 * filters, 1, norm=norm, relu=False)
        nn.init.zeros_(last[1].get_parameter("weight"))
        self.residual = nn.Sequential(_convolution(channels, filters, 1, norm=norm), middle, last)
        self.shortcut: nn.Module = nn.Identity()
        if projection and sk:
            self.shortcut = nn.Sequential(
                PairMean(stride), *_convolution(channels, 4 * filters, 1, norm=norm, relu=False)
            )
        elif projection:
            self.shortcut = _convolution(channels, 4 * filters, 1, stride=stride, norm=norm, relu=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.shortcut(images) + self.residual(images))


class SimCLRResNet(nn.Module):
    """A post-activation ResNet of bottlenecks, for images of any size.

    Args:
        blocks: bottlenecks in each stack; the first stack keeps the resolution, each later one halves it.
        filters: inner width of the first stack, doubled by each later one, and the stem's width. `dim`, the last
            stack's output, is 4 * filters * 2^(stacks - 1).
        sk: selective kernels, and ResNet-D's stem and shortcuts.
        stem: "imagenet" (7x7 stride 2, with `sk` three 3x3 of which the first has stride 2, then a 3x3 max-pool
            stride 2) or "cifar" (one 3x3 stride 1, with or without `sk`).
        norm: "batch" (the paper's), or "layer": over the channels and pixels of one image,
            for patches that must not see each other.

    With `sk` and norm="batch" a selective kernel normalises one number an image and channel over the batch: in
    training mode torch then refuses a batch of one. Differs from the published code: its max-pool pads an even side
    behind only, torch's on both sides, so that the maps are one pixel of the stem apart.

    Raises ValueError for an unknown stem or norm.

    Example: `SimCLRResNet([1, 1], 8).dim == 64`.
    """

    def __init__(
        self, blocks: Sequence[int], filters: int, *, sk: bool = False, stem: str = "imagenet", norm: str = "batch"
    ) -> None:
        super().__init__()
        self.stem = _stem(stem, filters, sk=sk, norm=norm)
        self.stacks = nn.ModuleList()
        channels = filters
        for i, count in enumerate(blocks):
            inner, stack = filters * 2**i, nn.Sequential()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stack.append(Bottleneck(channels, inner, stride=stride, projection=j == 0, sk=sk, norm=norm))
                channels = 4 * inner
            self.stacks.append(stack)
        self.dim = channels

    def feature_map(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d h' w'`, before the mean; h' = h / 32 with four stacks, h / 8 with the stem for CIFAR."""
        maps = self.stem(images.contiguous(memory_format=torch.channels_last))
        for stack in self.stacks:
            maps = stack(maps)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """`b 3 h w` -> `b d`, the spatial mean of the feature map."""
        return self.feature_map(images).mean((2, 3))


def simclr_resnet(
    depth: int = 50, width: int = 1, sk: bool = False, stem: str = "imagenet", norm: str = "batch"
) -> SimCLRResNet:
    """A network of SimCLR v2's table 1; the largest is `simclr_resnet(152, 3, sk=True)`.

    The table's numbers of parameters leave out the classifier and count BatchNorm's moving statistics: only so do all
    of them come out.

    Args:
        depth: 50, 101 or 152.
        width: multiplies all widths, the stem's included: 1, 2 or 3 in the paper.
        sk, stem, norm: see `SimCLRResNet`.

    Raises ValueError for another depth, a width below 1, an unknown stem or norm.

    Example: `simclr_resnet(50, 2).dim == 4096`, of 94 M parameters.
    """
    if depth not in _BLOCKS:
        raise ValueError(f"depth={depth}: pass one of {', '.join(map(str, _BLOCKS))}")
    if width < 1:
        raise ValueError(f"width={width}: pass 1 or more")
    return SimCLRResNet(_BLOCKS[depth], 64 * width, sk=sk, stem=stem, norm=norm)


def _stem(kind: str, width: int, *, sk: bool, norm: str) -> nn.Sequential:
    if kind == "cifar":
        return _convolution(3, width, 3, norm=norm)
    if kind != "imagenet":
        raise ValueError(f'stem={kind!r}: pass "imagenet" or "cifar"')
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    if not sk:
        return nn.Sequential(_convolution(3, width, 7, stride=2, norm=norm), pool)
    return nn.Sequential(
        _convolution(3, width // 2, 3, stride=2, norm=norm),
        _convolution(width // 2, width // 2, 3, norm=norm),
        _convolution(width // 2, width, 3, norm=norm),
        pool,
    )


def _convolution(
    channels: int, filters: int, kernel: int, *, stride: int = 1, norm: str, relu: bool = True
) -> nn.Sequential:
    """Convolution without bias, norm and, unless told otherwise, ReLU."""
    convolution = nn.Conv2d(channels, filters, kernel, stride=stride, padding=kernel // 2, bias=False)
    _lecun_normal_(convolution.weight)
    layers = nn.Sequential(convolution, _normalisation(norm, filters))
    return layers.append(nn.ReLU(inplace=True)) if relu else layers


def _lecun_normal_(weight: Tensor) -> None:
    """Variance 1 / fan-in, cut at two standard deviations of the uncut normal: the published code's initialisation."""
    std = weight[0].numel() ** -0.5 / 0.8796256610342398  # the spread that cutting leaves of a standard normal
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _normalisation(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "layer":
        return LayerNorm(channels)
    raise ValueError(f'norm={kind!r}: pass "batch" or "layer"')


ENCODERS = ("SimCLRResNet", "simclr_resnet")
"""What an `encoder.json` may name."""
