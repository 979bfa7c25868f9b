"""Gaussian blur of a width drawn for each image (SimCLR's, Chen et al. 2020, appendix A)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_core.augment.rows import check_images, check_probability, on_chosen, per_image
from contrastive_core.randomness import Randomness


def tenth_of(side: int) -> int:
    """SimCLR's kernel: a tenth of the side, made odd, and at least 3: 23 for 224 px, 9 for 96 px, 3 for 32 px.

    Differs from SimCLR's code below 20 px, where its kernel is a single pixel and changes nothing.
    """
    return max(1, side // 10 // 2) * 2 + 1


def blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Each image convolved with exp(-(x^2 + y^2) / (2 sigma^2)), cut to kernel x kernel pixels and scaled to sum to 1.

    Args:
        images: n c h w.
        sigma: n, in pixels; 0 is the identity.
        kernel: pixels a side, odd; the border is reflected, so at most 2 min(h, w) - 1.

    Raises:
        ValueError: for a kernel that is even or too large.

    Sums of shifted images, along y and then along x: on a CPU as fast as a grouped convolution (kornia's
    gaussian_blur2d) or faster, unchanged by autocast and TF32, and an image's numbers don't depend on the batch.

    Example: a lone 1 among zeros, with kernel 3 and a sigma at which exp(-1 / (2 sigma^2)) is 1/2, becomes the
    outer product of (1/4, 1/2, 1/4) with itself.
    """
    check_images(images)
    h, w = images.shape[2:]
    if kernel % 2 == 0 or not 0 < kernel < 2 * min(h, w):
        raise ValueError(f"kernel is odd and at most {2 * min(h, w) - 1} for images of {h}x{w} px, got {kernel}")
    reach = kernel // 2
    distance = torch.arange(-reach, reach + 1) / sigma.to("cpu", torch.float32).clamp(min=1e-3).unsqueeze(1)
    weight = per_image(torch.softmax(-(distance**2) / 2, dim=1), images).unsqueeze(4)  # n kernel 1 1 1
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    for axis, side in ((2, h), (3, w)):
        result = padded.narrow(axis, reach, side) * weight[:, reach]
        for shift in range(kernel):
            if shift != reach:
                result.addcmul_(padded.narrow(axis, shift, side), weight[:, shift])
        padded = result
    return padded


class GaussianBlur(nn.Module):
    """Blurred with a probability: `forward(images n c h w in [0, 1], randomness) -> n c h w`.

    Args:
        probability: of blurring an image; 0.5 in SimCLR.
        sigma: range of the width, in pixels of the image as it is now, drawn uniformly.
        kernel: pixels a side, odd; None = a tenth of the shorter side (see `tenth_of`), as in SimCLR's and BYOL's code.
            MoCo's and SimSiam's use PIL's filter, which has no edge: at 224 px no difference, since a kernel of 23
            holds 5.5 sigmas either way; on small images a larger kernel is closer to it.

    Raises:
        ValueError: for a probability outside 0 .. 1, a range of sigma that isn't positive, low end first, or a kernel
            that is even or too large for the images.

    Example: a constant image stays as it is.
    """

    def __init__(
        self,
        probability: float = 0.5,
        sigma: tuple[float, float] = (0.1, 2.0),
        kernel: int | None = None,
        stream: str = "blur",
    ) -> None:
        super().__init__()
        if not 0 < sigma[0] <= sigma[1]:
            raise ValueError(f"sigma is a range above 0, low end first, got {tuple(sigma)}")
        if kernel is not None and (kernel < 1 or kernel % 2 == 0):
            raise ValueError(f"kernel is an odd number of pixels, got {kernel}: pass {max(1, kernel + 1)}")
        self.probability, self.sigma = check_probability(probability), (sigma[0], sigma[1])
        self.kernel, self.stream = kernel, stream

    def forward(self, images: Tensor, randomness: Randomness) -> Tensor:
        if self.probability == 0:
            return images
        check_images(images)
        chosen = randomness.bernoulli(f"{self.stream}/chosen", self.probability)
        sigma = randomness.uniform(f"{self.stream}/sigma", low=self.sigma[0], high=self.sigma[1])
        kernel = self.kernel or tenth_of(min(images.shape[2:]))
        return on_chosen(images, chosen, lambda x, s: blur(x, s, kernel), sigma)
