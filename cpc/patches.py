"""Images to grids of overlapping patches, and back for pictures.

CPC v2 cuts a 260 px image into 6x6 patches of 80 px at stride 36 (Henaff et al. 2020, appendix A); CPC v1 a 256 px
one into 7x7 patches of 64 px at stride 32 (van den Oord et al. 2018, section 3.2).
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def grid_side(pixels: int, size: int, stride: int) -> int:
    """How many patches of `size` px at `stride` px fit exactly along `pixels` px.

    Raises ValueError if the image is too small or pixels are left over, naming the sizes that fit.
    Example: `grid_side(260, 80, 36) == 6`.
    """
    if size < 1 or stride < 1:
        raise ValueError(f"patch size {size} and stride {stride} must both be at least 1 px")
    if pixels < size:
        raise ValueError(f"an image of {pixels} px is smaller than one patch of {size} px: pass {size} px or more")
    steps, left_over = divmod(pixels - size, stride)
    if left_over:
        below, above = size + steps * stride, size + (steps + 1) * stride
        raise ValueError(
            f"{pixels} px leave {left_over} px unused with patches of {size} px at stride {stride}: "
            f"pass images of {below} px ({steps + 1} patches) or {above} px ({steps + 2} patches)"
        )
    return steps + 1


def extract_patches(images: Tensor, size: int, stride: int) -> Tensor:
    """Cut images into overlapping square patches, row 0 at the top.

    patches[b, row, col] = images[b, :, row * stride : row * stride + size, col * stride : col * stride + size]

    Args:
        images: `b c h w`, any dtype.
        size: side of a patch in pixels.
        stride: pixels from one patch to the next.

    Returns:
        `b rows cols c ph pw`, a view of `images`: nothing is copied.

    Raises:
        ValueError: not four axes, an image smaller than a patch, or pixels left over (names the sizes that fit).

    Example: `extract_patches(torch.zeros(2, 3, 260, 260), 80, 36).shape == (2, 6, 6, 3, 80, 80)`.
    """
    if images.ndim != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}: pass b c h w")
    for pixels in images.shape[2:]:
        grid_side(pixels, size, stride)
    windows = images.unfold(2, size, stride).unfold(3, size, stride)
    return rearrange(windows, "b c rows cols ph pw -> b rows cols c ph pw")


def tile_patches(patches: Tensor, gap: int = 2, fill: float = 1.0) -> Tensor:
    """Lay one image's patch grid out as a picture: `rows cols c ph pw` -> `c h w`, `gap` px between patches.

    Overlapping pixels are shown as often as they were cut. Example: a 6x6 grid of 80 px with gap 2 gives 490 px.
    """
    rows, cols, channels, height, width = patches.shape
    picture = patches.new_full((channels, rows * (height + gap) - gap, cols * (width + gap) - gap), fill)
    for row in range(rows):
        for col in range(cols):
            top, left = row * (height + gap), col * (width + gap)
            picture[:, top : top + height, left : left + width] = patches[row, col]
    return picture
