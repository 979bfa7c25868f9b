"""Elastic deformation: a smooth field of displacements, drawn on a coarse grid of control points.

Simard et al. (2003) smooth per-pixel noise; for the 18,432 patches of a CPC v2 batch that noise alone is 0.94 GB,
and its amplitude in pixels depends on the smoothing (kornia's defaults move an 80 px patch by 0.3 px). Here a few
displacements an image are drawn, in pixels, and blended between by Perlin's (1985) value noise: the weights are
never negative and sum to one, so no pixel moves further than the amplitude.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from contrastive_core.augment.geometry import affine_matrix, resample, sampling_grid
from contrastive_core.augment.rows import check_images, check_probability, on_chosen
from contrastive_core.randomness import Randomness
from contrastive_core.transfer import to_device


@lru_cache(maxsize=64)
def _blending(pixels: int, points: int) -> Tensor:
    """The weight of each of the control points, which span the side evenly, at each pixel: pixels points."""
    position = torch.linspace(0, points - 1, pixels) if pixels > 1 else torch.tensor([(points - 1) / 2])
    distance = (position[:, None] - torch.arange(points)).abs().clamp(max=1)
    return 1 - distance**2 * (3 - 2 * distance)


def displacement(field: Tensor, size: tuple[int, int]) -> Tensor:
    """A field at control points n 2 gy gx (x first) at every pixel of size (rows, columns): n 2 h w, in its unit."""
    weights = (_blending(pixels, points) for pixels, points in zip(size, field.shape[2:], strict=True))
    along, across = (to_device(weight, field.device, field.dtype) for weight in weights)
    return along @ field @ across.T


def elastic(images: Tensor, field: Tensor, shear: Tensor | None = None, fill: float | None = None) -> Tensor:
    """Each pixel read from its own position plus a displacement, and sheared, in one bilinear resampling.

    Args:
        images: n c h w.
        field: n 2 gy gx, displacements in pixels (x, then y) at gy x gx control points, the outermost at the corners.
        shear: n 2, slopes along x and y (see `affine_matrix`).
        fill: what lies outside; None reflects the picture.

    Raises:
        ValueError: if the field doesn't fit the images, or has fewer than 2 x 2 points.

    Example: a field of ones reads each pixel from one pixel to the right and below; a field of zeros is the identity.
    """
    check_images(images)
    if field.ndim != 4 or field.shape[:2] != (len(images), 2) or min(field.shape[2:]) < 2:
        raise ValueError(f"expected a field {len(images)} 2 gy gx, gy and gx at least 2, got {tuple(field.shape)}")
    slopes = torch.zeros(len(images), 2) if shear is None else shear
    positions = sampling_grid(images, affine_matrix(shear_x=slopes[:, 0], shear_y=slopes[:, 1]))
    field = to_device(field, images.device, images.dtype)
    moved = displacement(field, (images.shape[2], images.shape[3]))
    return resample(images, positions + moved, fill)


class ElasticDeformation(nn.Module):
    """Elastic deformation, and shearing if asked: `forward(images n c h w in [0, 1], randomness) -> n c h w`.

    Each control point is displaced by up to `amplitude` along x and along y, uniformly. No pixel moves further than
    that along either; the root mean square is 0.4 to 0.45 of it (more near the control points).

    Args:
        probability: of changing an image.
        amplitude: largest displacement along each axis, in pixels; with of_side, as a share of the shorter side.
        grid: control points along each side, at least 2; more give shorter waves. Keep amplitude under a third of
            their distance, side / (grid - 1): beyond, the picture can fold.
        shear: largest slope of shearing along x and along y, in the same resampling; 0 shears nothing.
        of_side: whether amplitude is a share of the shorter side.
        fill: what lies outside the picture; None reflects it.

    Raises:
        ValueError: for a probability outside 0 .. 1, a negative amplitude or shear, or grid < 2.

    Example: `ElasticDeformation(1.0, amplitude=0.0)` is the identity.
    """

    def __init__(
        self,
        probability: float = 0.2,
        amplitude: float = 2.0,
        grid: int = 4,
        shear: float = 0.0,
        of_side: bool = False,
        fill: float | None = None,
        stream: str = "elastic",
    ) -> None:
        super().__init__()
        if amplitude < 0 or shear < 0 or grid < 2:
            raise ValueError(
                f"amplitude and shear are at least 0 and grid at least 2, got amplitude={amplitude}, shear={shear}, "
                f"grid={grid}"
            )
        self.probability, self.amplitude, self.grid = check_probability(probability), amplitude, grid
        self.shear, self.of_side, self.fill, self.stream = shear, of_side, fill, stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images)
        chosen = randomness.bernoulli(f"{self.stream}/chosen", self.probability)
        pixels = self.amplitude * (min(images.shape[2:]) if self.of_side else 1)
        field = randomness.uniform(f"{self.stream}/field", 2, self.grid, self.grid, low=-pixels, high=pixels)
        shear = randomness.uniform(f"{self.stream}/shear", 2, low=-self.shear, high=self.shear)
        return on_chosen(images, chosen, lambda x, f, s: elastic(x, f, s, self.fill), field, shear)
