"""Triton kernels for LayerNorm and ReLU of images in channels_last, forward and backward, on a GPU.

One program has one image: it reads it for the moments and again, from the cache, for what it writes. So a forward pass
reads a map once from memory and writes one in the map's own precision, where `torch.group_norm` under autocast copies
the map to float32 and to channels-first, and its result back. Sums are made in float32 in a fixed order: results repeat
to the bit. The gradients of weight and bias are summed over pixels here and over images by torch.

This module imports triton; `contrastive_core.layer_norm` imports it where it is first needed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tile(pixels, channels, pixel, channel, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places in an image `pixels channels` of the tile that starts at (pixel, channel), and which of them it has."""
    rows = pixel + tl.arange(0, ROWS)
    cols = channel + tl.arange(0, COLS)
    return rows[:, None] * channels + cols[None, :], (rows < pixels)[:, None] & (cols < channels)[None, :]


@triton.jit(do_not_specialize=["pixels"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    images, weight, bias, out, means, scales,
    pixels, channels, eps,
    ROWS: tl.constexpr, COLS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) / std * weight + bias, and ReLU of it; mean and 1 / std of each image are kept."""
    image = tl.program_id(0)
    start = image.to(tl.int64) * pixels * channels
    count = 0.0
    mean = 0.0
    squares = 0.0  # of distances from the mean, put together tile by tile (Chan, Golub and LeVeque 1979)
    for channel in range(0, channels, COLS):
        for pixel in range(0, pixels, ROWS):
            places, inside = _tile(pixels, channels, pixel, channel, ROWS, COLS)
            x = tl.load(images + start + places, mask=inside, other=0.0).to(tl.float32)
            own = (tl.minimum(pixels - pixel, ROWS) * tl.minimum(channels - channel, COLS)).to(tl.float32)
            own_mean = tl.sum(x) / own
            away = tl.where(inside, x - own_mean, 0.0)
            step = own_mean - mean
            total = count + own
            squares += tl.sum(away * away) + step * step * count * own / total
            mean += step * own / total
            count = total
    scale = 1 / tl.sqrt(squares / count + eps)
    tl.store(means + image, mean)
    tl.store(scales + image, scale)

    for channel in range(0, channels, COLS):
        cols = channel + tl.arange(0, COLS)
        w = tl.load(weight + cols, mask=cols < channels, other=0.0).to(tl.float32)
        b = tl.load(bias + cols, mask=cols < channels, other=0.0).to(tl.float32)
        for pixel in range(0, pixels, ROWS):
            places, inside = _tile(pixels, channels, pixel, channel, ROWS, COLS)
            x = tl.load(images + start + places, mask=inside, other=0.0).to(tl.float32)
            y = (x - mean) * scale * w[None, :] + b[None, :]
            if RELU:
                y = tl.where(y < 0, 0.0, y)  # NaN stays NaN
            tl.store(out + start + places, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    images, weight, bias, means, scales, gradient, d_images, d_weight, d_bias,
    pixels, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """With z = (x - mean) / std and g the gradient of z: dx = (g - mean(g) - z mean(g z)) / std."""
    image = tl.program_id(0)
    start = image.to(tl.int64) * pixels * channels
    own_row = image.to(tl.int64) * channels
    mean = tl.load(means + image)
    scale = tl.load(scales + image)
    along = 0.0
    total = 0.0
    for channel in range(0, channels, COLS):
        cols = channel + tl.arange(0, COLS)
        w = tl.load(weight + cols, mask=cols < channels, other=0.0).to(tl.float32)
        b = tl.load(bias + cols, mask=cols < channels, other=0.0).to(tl.float32)
        dw = tl.zeros([ROWS, COLS], tl.float32)  # added up over its rows at the end: programs wait for their threads
        db = tl.zeros([ROWS, COLS], tl.float32)
        for pixel in range(0, pixels, ROWS):
            places, inside = _tile(pixels, channels, pixel, channel, ROWS, COLS)
            z = (tl.load(images + start + places, mask=inside, other=0.0).to(tl.float32) - mean) * scale
            dy = tl.load(gradient + start + places, mask=inside, other=0.0).to(tl.float32)
            if RELU:
                dy = tl.where(z * w[None, :] + b[None, :] <= 0, 0.0, dy)
            dw += dy * z
            db += dy
        of_weight = tl.sum(dw, 0)
        of_bias = tl.sum(db, 0)
        tl.store(d_weight + own_row + cols, of_weight, mask=cols < channels)
        tl.store(d_bias + own_row + cols, of_bias, mask=cols < channels)
        along += tl.sum(of_weight * w)
        total += tl.sum(of_bias * w)

    count = (pixels * channels).to(tl.float32)
    along = along / count
    total = total / count
    for channel in range(0, channels, COLS):
        cols = channel + tl.arange(0, COLS)
        w = tl.load(weight + cols, mask=cols < channels, other=0.0).to(tl.float32)
        b = tl.load(bias + cols, mask=cols < channels, other=0.0).to(tl.float32)
        for pixel in range(0, pixels, ROWS):
            places, inside = _tile(pixels, channels, pixel, channel, ROWS, COLS)
            z = (tl.load(images + start + places, mask=inside, other=0.0).to(tl.float32) - mean) * scale
            dy = tl.load(gradient + start + places, mask=inside, other=0.0).to(tl.float32)
            if RELU:
                dy = tl.where(z * w[None, :] + b[None, :] <= 0, 0.0, dy)
            dx = (dy * w[None, :] - total - z * along) * scale
            tl.store(d_images + start + places, dx.to(d_images.dtype.element_ty), mask=inside)


ELEMENTS, WARPS = 2048, 4
"""Of a tile, and of a program: the fastest of six for ResNet-161's maps on an H200."""


def _shape(pixels: int, channels: int) -> dict[str, int]:
    """The tile for images of so many pixels and channels: as wide as these where it can be, to read in one piece."""
    cols = min(triton.next_power_of_2(channels), 1024)
    rows = min(triton.next_power_of_2(pixels), max(ELEMENTS // cols, 1))
    return {"ROWS": rows, "COLS": cols, "num_warps": WARPS}


def forward(images: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of images `n c h w` in channels_last, each with a value or more: the result like them, mean `n`, 1 / std `n`."""
    n, c, h, w = images.shape
    out = torch.empty_like(images)
    means, scales = (torch.empty(n, device=images.device) for _ in range(2))
    kernel: Any = _forward_kernel
    with torch.cuda.device_of(images):
        kernel[(n,)](images, weight, bias, out, means, scales, h * w, c, eps, RELU=relu, **_shape(h * w, c))
    return out, means, scales


def backward(
    gradient: Tensor, images: Tensor, weight: Tensor, bias: Tensor, means: Tensor, scales: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of images, weight and bias; `gradient` is `n c h w` in channels_last."""
    n, c, h, w = images.shape
    d_images = torch.empty_like(images)
    parts = torch.empty(2, n, c, device=images.device)
    tensors = (images, weight, bias, means, scales, gradient, d_images, parts[0], parts[1])
    kernel: Any = _backward_kernel
    with torch.cuda.device_of(images):
        kernel[(n,)](*tensors, h * w, c, RELU=relu, **_shape(h * w, c))
    d_weight, d_bias = parts.sum(1).unbind()
    return d_images, d_weight, d_bias
