"""An encoder as its users run it: patch by patch or over whole images, with its normalisation and its readout."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

from cpc.context import Contexts
from cpc.patches import extract_patches, grid_side
from cpc.views import normalise

READOUTS = ("mean", "grid", "context")
MODES = ("patches", "image")


class Latents(nn.Module):
    """What an encoder makes of normalised images `b 3 h w`.

    Args:
        encoder: of patches, or of whole images.
        patch_size, stride: the grid it was trained on; None for an encoder of whole images.
        mode: "patches" encodes every patch of the grid; "image" runs the encoder over the whole image.
        readout: "mean" gives `b d`, "grid" gives `b rows cols d` (patch grid, or the encoder's feature map), "context"
            the patch grid with its n contexts, `b rows cols (1 + n) d` (`cpc.context.Contexts`).
        context: the context networks, of an encoder of patches that has them.

    `readout` and `mode` are plain attributes and may be changed at any time.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        patch_size: int | None = None,
        stride: int | None = None,
        mode: str | None = None,
        readout: str = "mean",
        context: Contexts | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.context = encoder, context
        self.dim: int = encoder.dim  # type: ignore[assignment]  # nn.Module types attributes as Tensor | Module
        self.patch_size, self.stride = patch_size, stride
        self.mode = mode or ("patches" if patch_size else "image")
        self.readout = readout
        self._check_names()

    @property
    def grid_dim(self) -> int:
        """The width of a grid's cells, as the readout stands."""
        if self.readout == "context" and isinstance(self.context, Contexts):
            return self.context.dim
        return self.dim

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        images = images.to(next(self.encoder.parameters(), images).dtype)
        if self.mode == "patches":
            patches = extract_patches(images, self.patch_size or 0, self.stride or 0)
            features = self.encoder(rearrange(patches, "b rows cols c ph pw -> (b rows cols) c ph pw"))
            grid = rearrange(features, "(b rows cols) d -> b rows cols d", rows=patches.shape[1], cols=patches.shape[2])
            if self.readout == "context":
                contexts: Tensor = self.context(grid)  # type: ignore[misc]  # checked
                return contexts
            return grid if self.readout == "grid" else grid.mean((1, 2))
        if self.readout == "grid":
            return rearrange(self.encoder.feature_map(images), "b d rows cols -> b rows cols d")  # type: ignore[operator]
        whole: Tensor = self.encoder(images)
        return whole

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images have shape {tuple(images.shape)} and dtype {images.dtype}: pass floats b 3 h w in [0, 1]"
            )
        self._check_names()

    def _check_names(self) -> None:
        if self.mode not in MODES or self.readout not in READOUTS:
            raise ValueError(f"mode={self.mode!r}, readout={self.readout!r}: pass one of {MODES} and one of {READOUTS}")
        if self.mode == "patches" and not self.patch_size:
            raise ValueError('this encoder was trained on whole images and has no patch grid: pass mode="image"')
        if self.readout == "context" and (self.context is None or self.mode != "patches"):
            raise ValueError('readout="context" wants the context networks of a CPC run and its patches: pass "grid"')


class FrozenEncoder(Latents):
    """Features of images `b 3 h w` in [0, 1]; another size is resized on its short side and cropped at the centre.

    Args:
        encoder: as pre-training left it.
        image_size: pixels a side that it is fed.
        load_size: pixels that the short side of another image is resized to before the crop, so that things are as
            large as they were in training; where that is less than image_size, whose views were enlarged in training,
            the image is, too. None = image_size.
        mean, std: normalisation.
        patch_size, stride, mode, readout, context: as `Latents`'.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        image_size: int,
        load_size: int | None = None,
        mean: Sequence[float],
        std: Sequence[float],
        patch_size: int | None = None,
        stride: int | None = None,
        mode: str | None = None,
        readout: str = "mean",
        context: Contexts | None = None,
    ) -> None:
        super().__init__(encoder, patch_size=patch_size, stride=stride, mode=mode, readout=readout, context=context)
        self.image_size, self.load_size = image_size, load_size or image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self._learns = [name for name, weight in self.named_parameters() if weight.requires_grad]

    def thawed(self) -> FrozenEncoder:
        """A copy that learns, but for what is fixed as it is built: the patch projection of MoCo's ViT."""
        copied = copy.deepcopy(self)
        for name in self._learns:
            copied.get_parameter(name).requires_grad_(True)
        return copied

    @property
    def batch_size(self) -> int:
        """Images at a time for feature extraction: about 2,300 patches, which ResNet-161 encodes in 2 GiB."""
        if not self.patch_size:
            return 64
        return max(1, 2304 // grid_side(self.image_size, self.patch_size, self.stride or 1) ** 2)

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        return super().forward(normalise(self._fit(images), self.mean, self.std))

    def _fit(self, images: Tensor) -> Tensor:
        if images.shape[-2:] == (self.image_size, self.image_size):
            return images
        from torchvision.transforms.v2 import functional as vision  # not with `import cpc`: half a second

        short = max(self.load_size, self.image_size)  # of less center_crop would make a picture in a black frame
        if min(images.shape[-2:]) != short:
            images = vision.resize(images, [short], antialias=True).clamp(0, 1)
        return vision.center_crop(images, [self.image_size, self.image_size])
