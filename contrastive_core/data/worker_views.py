"""Views made on the CPU, an image at a time, by torchvision v2 transforms: in a loader's workers, or in the process.

Where there is no GPU, or its host has idle cores, workers can augment as well as decode: hand a `WorkerViews` to
`training_batches(..., views=...)`. The random numbers are data there too. torchvision draws from torch's generator,
so that is seeded for each image and view, from the run's seed, the step and the place in the global batch: a run is
the same with any number of workers and processes, after resuming, and where its views are made in the main process.

The pipelines are the papers': SimCLR (Chen et al. 2020, arXiv 2002.05709, appendix A), MoCo v2 (Chen et al. 2020,
arXiv 2003.04297), BYOL (Grill et al. 2020, arXiv 2006.07733, appendix B), and what a supervised ResNet trains with.
Their knobs are those of `contrastive_core.augment.views`, None = the paper's. They crop and flip bytes, which
torchvision resizes fastest, and go on in floats. This module loads torchvision; its package does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from contrastive_core.augment.blur import tenth_of
from contrastive_core.augment.channel_drop import ChannelDrop
from contrastive_core.augment.elastic import ElasticDeformation
from contrastive_core.augment.rows import check_probability
from contrastive_core.augment.views import AMPLITUDE, normalise, to_float
from contrastive_core.randomness import Randomness
from contrastive_core.transfer import to_device

Transform = Callable[[Tensor], Tensor]
"""uint8 `3 s s` -> uint8, or float in 0..1, `3 image_size image_size`; its numbers come from torch's generator."""

_SEEDS = 1 << 32  # torch's CPU generator looks at the lower 32 bits of a seed


class WorkerViews(nn.Module):
    """Each image once through each transform: uint8 `b 3 s s` -> a `b 3 image_size image_size` float a view.

    Args:
        transforms: one a view. They draw from torch's generator only; numpy's and Python's are not seeded here.
        mean, std: per channel, of images in 0..1; normalisation comes last.
        image_size: pixels a side that every transform must leave.
        channel_drop: probability of `ChannelDrop` in each view, after its transform.
        elastic: probability of `ElasticDeformation` in each view, after its transform and before channel drop, by up
            to AMPLITUDE of the side. Ours and not torchvision's, which takes 30 times as long at 224 px and whose
            alpha is not an amplitude in pixels.

    Made in the process, the images are moved to the CPU and the views to where the images were.

    Raises ValueError for no transforms, images that are not uint8 `b 3 s s`, views of another size.

    Example: `WorkerViews([nn.Identity()], mean=[0] * 3, std=[1] * 3, image_size=8)` gives white images as ones.
    """

    def __init__(
        self,
        transforms: Sequence[Transform],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        channel_drop: float = 0.0,
        elastic: float = 0.0,
    ) -> None:
        super().__init__()
        if not transforms:
            raise ValueError("no transforms: pass a list of them, one a view")
        self.transforms, self.image_size = tuple(transforms), image_size
        self.mean, self.std = tuple(mean), tuple(std)
        added = (ElasticDeformation(elastic, AMPLITUDE, of_side=True), ChannelDrop(channel_drop))
        self.added = tuple(FromGenerator(augmentation) for augmentation in added)

    def seeds(self, randomness: Randomness) -> Tensor:
        """What `one` wants for each image: `b views` int64."""
        return randomness.integers("worker views", _SEEDS, len(self.transforms))

    def forward(self, images: Tensor, randomness: Randomness) -> tuple[Tensor, ...]:
        seeds = self.seeds(randomness).tolist()
        if len(seeds) != len(images):
            raise ValueError(
                f"the randomness is for {len(seeds)} images, got {len(images)}: build it with their places"
            )
        made = [self.one(image, its) for image, its in zip(images.cpu(), seeds, strict=True)]
        return tuple(to_device(torch.stack(view), images.device) for view in zip(*made, strict=True))

    def one(self, image: Tensor, seeds: Sequence[int]) -> tuple[Tensor, ...]:
        """The views of one image, uint8 `3 s s` on the CPU, with a seed a view; torch's generator stays as it was."""
        if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
            raise ValueError(f"an image is {image.dtype} of shape {tuple(image.shape)}: pass uint8 `3 s s`")
        with _as_in_a_worker():
            return tuple(self._view(image, view, seed) for view, seed in enumerate(seeds))

    def _view(self, image: Tensor, view: int, seed: int) -> Tensor:
        # torch.manual_seed would seed CUDA's generators as well, which belong to the model
        torch.default_generator.manual_seed(seed)
        made = to_float(self.transforms[view](image))
        if made.shape != (3, self.image_size, self.image_size):
            raise ValueError(
                f"view {view + 1} of an image of {image.shape[-1]} px is {tuple(made.shape)}, image_size is "
                f"{self.image_size}: end its transform with a crop or resize to {self.image_size} px"
            )
        for augment in self.added:
            made = augment(made)
        return normalise(made, self.mean, self.std)


@contextmanager
def _as_in_a_worker() -> Iterator[None]:
    """One thread, as a loader's workers have (a mean over others rounds differently), and torch's generator put back.

    For a single image of up to 96 px more threads gain nothing.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        if threads > 1:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if threads > 1:
                torch.set_num_threads(threads)


class FromGenerator(nn.Module):
    """One of our augmentations as a torchvision transform: float `c h w` in 0..1, numbers by way of torch's generator.

    Args:
        augmentation: `forward(images n c h w in [0, 1], randomness) -> n c h w`, of `contrastive_core.augment`.

    It draws one number from the generator whatever it does, so a probability of 0 leaves those after it as they were.
    """

    def __init__(self, augmentation: nn.Module) -> None:
        super().__init__()
        self.augmentation = augmentation

    def forward(self, image: Tensor) -> Tensor:
        key = int(torch.randint(1 << 62, ()))
        if getattr(self.augmentation, "probability", 1) == 0:  # a fifth of the time of a view of 32 px
            return image
        images: Tensor = self.augmentation(image[None], Randomness(key, 0, torch.zeros(1, dtype=torch.int64)))
        return images[0]


class SeparableBlur(v2.GaussianBlur):
    """torchvision's GaussianBlur in two passes, rows and columns: the same picture, at 224 px 30 times as fast."""

    def transform(self, inpt: Tensor, params: dict[str, list[float]]) -> Tensor:
        """Along x, then along y; floats only, since bytes would be rounded twice."""
        across, down = self.kernel_size
        return F.gaussian_blur(F.gaussian_blur(inpt, [across, 1], params["sigma"]), [1, down], params["sigma"])


# brightness, contrast, saturation, hue
_SIMCLR_JITTER = (0.8, 0.8, 0.8, 0.2)
_MOCO_JITTER = (0.4, 0.4, 0.4, 0.1)
_BYOL_JITTER = (0.4, 0.4, 0.2, 0.1)


def simclr(
    size: int,
    *,
    strength: float | None = None,
    blur: float | None = None,
    flip: float | None = None,
    crop: Sequence[float] | None = None,
) -> v2.Compose:
    """SimCLR's, the same for both views: crop, flip, jitter, grey, blur (appendix A); uint8 `3 s s` -> `3 size size`.

    Args, None = the paper's:
        size: pixels a side of the view.
        strength: s of the jitter's ranges 0.8 s, 0.8 s, 0.8 s, 0.2 s, of probability 0.8; 1. For CIFAR-10 (appendix
            B.9) 0.5.
        blur: probability; 0.5, for CIFAR-10 0. Sigma 0.1 to 2 px, kernel `tenth_of` the side, reflected border.
        flip: probability; 0.5.
        crop: range of the crop's share of the area; 0.08 .. 1. Resized by bicubic interpolation, as in the official
            code, antialiased.

    The result is float32 in 0..1. Raises ValueError for a strength, probability or range that cannot be meant.

    Example: with strength, blur and flip 0 and crop (1, 1), a view is the image, grey in one case of five.
    """
    return _pipeline(size, crop, 0.08, flip, _jitter(strength, _SIMCLR_JITTER), _or(blur, 0.5))


def moco_v2(
    size: int,
    *,
    strength: float | None = None,
    blur: float | None = None,
    flip: float | None = None,
    crop: Sequence[float] | None = None,
) -> v2.Compose:
    """MoCo v2's and SimSiam's, the same for both views (as in the authors' code): uint8 `3 s s` -> `3 size size`.

    Args: as `simclr`'s. The paper's are jitter ranges 0.4, 0.4, 0.4, 0.1 times strength, of probability 0.8, grey 0.2,
    blur 0.5 and crops of 0.2 .. 1, resized bilinearly. Differs from the code: the blur's kernel ends at a tenth of the
    side, where PIL's has no edge; a difference on small images only.
    """
    bilinear = v2.InterpolationMode.BILINEAR
    return _pipeline(size, crop, 0.2, flip, _jitter(strength, _MOCO_JITTER), _or(blur, 0.5), interpolation=bilinear)


def byol(
    size: int,
    *,
    view: int,
    strength: float | None = None,
    blur: float | None = None,
    flip: float | None = None,
    crop: Sequence[float] | None = None,
    solarise: float | None = None,
) -> v2.Compose:
    """BYOL's for view 1 or 2, and MoCo v3's with crop (0.2, 1) (appendix B): uint8 `3 s s` -> `3 size size`.

    Args: as `simclr`'s, and the probability of solarisation at 0.5. The paper's are jitter ranges 0.4, 0.4, 0.2, 0.1
    times strength, of probability 0.8, grey 0.2, crops of 0.08 .. 1, bicubic; blur 1 for view 1 and 0.1 for view 2,
    solarise 0 and 0.2.
    """
    if view not in (1, 2):
        raise ValueError(f"BYOL's view is 1 or 2, got {view}")
    blur = _or(blur, 1.0 if view == 1 else 0.1)
    solarise = _or(solarise, 0.0 if view == 1 else 0.2)
    return _pipeline(size, crop, 0.08, flip, _jitter(strength, _BYOL_JITTER), blur, solarise)


def supervised(size: int, *, flip: float | None = None, crop: Sequence[float] | None = None) -> v2.Compose:
    """Crop of 0.08 .. 1, bilinear, and flip, 0.5: what networks are trained with on labels. Args: as `simclr`'s."""
    return v2.Compose(_crop_and_flip(size, crop, 0.08, flip, v2.InterpolationMode.BILINEAR))


def _pipeline(
    size: int,
    crop: Sequence[float] | None,
    least: float,
    flip: float | None,
    jitter: v2.ColorJitter,
    blur: float,
    solarise: float = 0.0,
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC,
) -> v2.Compose:
    return v2.Compose(
        [
            *_crop_and_flip(size, crop, least, flip, interpolation),
            v2.RandomApply([jitter], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([SeparableBlur(tenth_of(size), sigma=(0.1, 2.0))], p=check_probability(blur, "blur")),
            v2.RandomSolarize(0.5, p=check_probability(solarise, "solarise")),
        ]
    )


def _crop_and_flip(
    size: int, crop: Sequence[float] | None, least: float, flip: float | None, interpolation: v2.InterpolationMode
) -> list[nn.Module]:
    low, high = (least, 1.0) if crop is None else crop
    if not 0 < low <= high <= 1:
        raise ValueError(f"crop {low} .. {high}: pass a range of shares of the area within 0 .. 1, low end first")
    return [
        v2.RandomResizedCrop(size, scale=(low, high), interpolation=interpolation, antialias=True),
        v2.RandomHorizontalFlip(check_probability(_or(flip, 0.5), "flip")),
        v2.ToDtype(torch.float32, scale=True),
    ]


def _jitter(strength: float | None, ranges: Sequence[float]) -> v2.ColorJitter:
    s, most = _or(strength, 1.0), 0.5 / ranges[3]
    if not 0 <= s <= most:
        raise ValueError(f"strength {s}: pass 0 to {most:g}, where the hue turns by up to half the circle either way")
    return v2.ColorJitter(*(s * each for each in ranges))


def _or(value: float | None, papers: float) -> float:
    return papers if value is None else value
