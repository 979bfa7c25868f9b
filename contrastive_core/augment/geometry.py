"""Geometry: where each output pixel is read from. One resampling however many transformations are composed.

Coordinates are in pixels from the image's centre, x to the right and y down; a matrix maps an output position to
the position it is read from. Bilinear, by torch's grid_sample: kornia's warp_affine, which inverts its matrices and
builds the positions by homogeneous products, takes two and a half times as long.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_core.augment.rows import check_images, per_image
from contrastive_core.transfer import to_device


def affine_matrix(
    *,
    angle: Tensor | float = 0.0,
    shear_x: Tensor | float = 0.0,
    shear_y: Tensor | float = 0.0,
    shift_x: Tensor | float = 0.0,
    shift_y: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """The matrices n 2 3 that read a picture turned, scaled, sheared and shifted about its centre.

    Args:
        angle: degrees, (n) or one for all; the picture turns counter-clockwise.
        shear_x, shear_y: slopes; a row at y reads from x + shear_x y (PIL's and AutoAugment's sense, about the centre).
        shift_x, shift_y: pixels by which the picture moves to the right and down.
        scale: of the picture, > 0; 2 shows the centre twice as large.

    Example: `affine_matrix(shift_x=torch.tensor([1.0]))` is [[[1, 0, -1], [0, 1, 0]]].
    """
    numbers = [torch.as_tensor(number) for number in (angle, shear_x, shear_y, shift_x, shift_y, scale)]
    turn, slope_x, slope_y, right, down, size = torch.broadcast_tensors(*numbers)
    cos, sin = torch.cos(torch.deg2rad(turn)) / size, torch.sin(torch.deg2rad(turn)) / size
    # source = [[1, slope_x], [slope_y, 1]] @ [[cos, -sin], [sin, cos]] @ (output - shift)
    a, b = cos + slope_x * sin, slope_x * cos - sin
    c, d = slope_y * cos + sin, cos - slope_y * sin
    rows = [torch.stack([a, b, -(a * right + b * down)], -1), torch.stack([c, d, -(c * right + d * down)], -1)]
    return torch.stack(rows, -2).reshape(-1, 2, 3)


def sampling_grid(images: Tensor, matrix: Tensor) -> Tensor:
    """Where an affine map reads each pixel from: n 2 h w, x then y, in pixels from the centre; matrix n 2 3."""
    if matrix.shape != (len(images), 2, 3):
        raise ValueError(f"expected matrices {len(images)} 2 3, one an image, got {tuple(matrix.shape)}")
    h, w = images.shape[2:]
    x = (torch.arange(w, device=images.device) - (w - 1) / 2).to(images.dtype)
    y = (torch.arange(h, device=images.device) - (h - 1) / 2).to(images.dtype).unsqueeze(1)
    moved = to_device(matrix, images.device, images.dtype)
    of_x, of_y, constant = moved[:, :, :, None, None].unbind(2)  # each n 2 1 1
    # no matrix product: under autocast or with TF32 it would be off by up to a pixel
    return torch.addcmul(of_y * y + constant, of_x, x)


def resample(images: Tensor, positions: Tensor, fill: float | None = 0.0) -> Tensor:
    """Bilinear values of images n c h w at positions n 2 *size (see `sampling_grid`), n c *size.

    Outside the image lies `fill`, or with None the picture reflected at the border.
    """
    h, w = images.shape[2:]
    grid = torch.stack([positions[:, 0] * (2 / w), positions[:, 1] * (2 / h)], dim=3)
    if fill is None:
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if fill == 0:
        return F.grid_sample(images, grid, align_corners=False)
    return F.grid_sample(images - fill, grid, align_corners=False).add_(fill)


def affine(images: Tensor, matrix: Tensor, fill: float | None = 0.0) -> Tensor:
    """Images n c h w resampled through matrix n 2 3 (see `affine_matrix`); fill None reflects at the border.

    Example: a square image through `affine_matrix(angle=torch.tensor([90.0]))` equals `torch.rot90(image, 1, (2, 3))`.
    """
    check_images(images)
    return resample(images, sampling_grid(images, matrix), fill)


def flip(images: Tensor) -> Tensor:
    """Left and right swapped."""
    return images.flip(3)


def crop(images: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """The size (rows, columns) window of each image whose upper left corner is at top (n), left (n).

    A window that reaches over the border reads the nearest pixel; `crop` is one gather, with no loop over images.
    """
    check_images(images)
    n, c, h, w = images.shape
    top, left = (to_device(place, images.device)[:, None] for place in (top, left))
    y = (top + torch.arange(size[0], device=images.device)).clamp_(0, h - 1)
    x = (left + torch.arange(size[1], device=images.device)).clamp_(0, w - 1)
    pixels = (y[:, :, None] * w + x[:, None, :]).reshape(n, 1, -1)
    return images.flatten(2).gather(2, pixels.expand(-1, c, -1)).reshape(n, c, *size)


def resized_crop(images: Tensor, box: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """The box of each image, resized to size (rows, columns), bilinear; what lies outside the box is not read.

    Args:
        images: n c h w.
        box: n 4, top, left, height, width in pixels, within the image.
        size: rows and columns of the result.
        antialias: whether a box larger than `size` is smoothed by a triangle as wide as the reduction (PIL's way), by
            two matrix products an image; else two pixels along each axis are read however large the box is.

    Example: the box (0, 0, h, w) at the image's own size is the identity.
    """
    check_images(images)
    if box.shape != (len(images), 4):
        raise ValueError(f"expected boxes {len(images)} 4, one an image, got {tuple(box.shape)}")
    top, left, height, width = to_device(box.float(), images.device).unbind(1)
    if antialias:
        along = _triangles(images, top, height, images.shape[2], size[0])
        across = _triangles(images, left, width, images.shape[3], size[1])
        with _full_precision(images.device.type):
            return along @ images @ across.transpose(2, 3)
    y = _places(top, height, size[0]) * (2 / images.shape[2]) - 1
    x = _places(left, width, size[1]) * (2 / images.shape[3]) - 1
    grid = torch.stack([x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], dim=3)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)


def _full_precision(device: str) -> AbstractContextManager[object]:
    """No autocast, which would round weights and pixels to 8 bits; nothing to do where a device knows none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _places(start: Tensor, length: Tensor, count: int) -> Tensor:
    """Where `count` pixels spread over start .. start + length (n) are read, n count, kept to the pixels' centres."""
    places = start[:, None] + (torch.arange(count, device=start.device) + 0.5) / count * length[:, None]
    return places.clamp(start[:, None] + 0.5, (start + length)[:, None] - 0.5)


def _triangles(images: Tensor, start: Tensor, length: Tensor, pixels: int, count: int) -> Tensor:
    """The weight of each of the image's pixels along a side in each of `count` resized ones: n 1 count pixels."""
    scale = (length / count)[:, None, None]
    centre = start[:, None, None] + (torch.arange(count, device=start.device)[:, None] + 0.5) * scale
    source = torch.arange(pixels, device=start.device) + 0.5
    inside = (source > start[:, None]) & (source < (start + length)[:, None])
    weight = (1 - (source - centre).abs() / scale.clamp(min=1)).clamp_(min=0) * inside[:, None, :]
    weight = weight / weight.sum(2, keepdim=True)
    return weight.unsqueeze(1).to(images.dtype)


def cut_out(images: Tensor, x: Tensor, y: Tensor, side: Tensor, fill: float = 0.0) -> Tensor:
    """A square of `side` (n) as a share of the image's side, centred at x (n), y (n), shares too, set to fill.

    A pixel is cut when its centre lies in the square; at the border the square is clipped, as in AutoAugment.
    """
    check_images(images)
    h, w = images.shape[2:]
    across = (torch.arange(w, device=images.device) + 0.5) / w
    along = (torch.arange(h, device=images.device) + 0.5) / h
    x, y, side = (to_device(share, images.device)[:, None] for share in (x, y, side))
    in_x = (across - x).abs() < side / 2
    in_y = (along - y).abs() < side / 2
    return images.masked_fill((in_y[:, :, None] & in_x[:, None, :]).unsqueeze(1), fill)


def shift_window(images: Tensor, top: Tensor, left: Tensor, size: tuple[int, int], fill: float = 0.0) -> Tensor:
    """The size (rows, columns) window at top (n), left (n), put at the centre of an image that is fill elsewhere."""
    window = crop(images, top, left, size)
    h, w = images.shape[2:]
    before_y, before_x = (h - size[0]) // 2, (w - size[1]) // 2
    return F.pad(window, (before_x, w - size[1] - before_x, before_y, h - size[0] - before_y), value=fill)


def mix(images: Tensor, others: Tensor, weight: Tensor) -> Tensor:
    """(1 - weight) images + weight others, weight (n) in 0 .. 1."""
    return torch.lerp(images, others, per_image(weight, images))
