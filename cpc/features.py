"""An encoder as its users want it: images in [0, 1] in, features out; and how it is written down and read back.

Patch geometry and normalisation travel with the weights in `encoder.json`, so that nobody has to remember them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision

import contrastive_core.encoders
import cpc.encoders
from cpc.patches import extract_patches, grid_side
from cpc.views import normalise

READOUTS = ("mean", "grid")
MODES = ("patches", "image")


class FrozenEncoder(nn.Module):
    """Features of images `b 3 h w` in [0, 1]; another size is resized on its short side and cropped at the centre.

    Args:
        encoder: as pre-training left it.
        image_size: pixels a side that it is fed.
        load_size: pixels that the short side of another image is resized to before the crop, so that things are as
            large as they were in training; None = image_size.
        patch_size, stride: the grid it was trained on; None for an encoder of whole images.
        mean, std: normalisation.
        mode: "patches" encodes every patch of the grid; "image" runs the encoder over the whole image.
        readout: "mean" gives `b d`, "grid" gives `b rows cols d` (patch grid, or the encoder's feature map).

    `readout` and `mode` are plain attributes and may be changed at any time.
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
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.dim: int = encoder.dim  # type: ignore[assignment]  # nn.Module types attributes as Tensor | Module
        self.image_size, self.patch_size, self.stride = image_size, patch_size, stride
        self.load_size = load_size or image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.mode = mode or ("patches" if patch_size else "image")
        self.readout = readout

    @property
    def batch_size(self) -> int:
        """Images at a time for feature extraction: about 2,300 patches, which ResNet-161 encodes in 2 GiB."""
        if not self.patch_size:
            return 64
        return max(1, 2304 // grid_side(self.image_size, self.patch_size, self.stride or 1) ** 2)

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        images = normalise(self._fit(images), self.mean, self.std)
        images = images.to(next(self.encoder.parameters(), images).dtype)
        if self.mode == "patches":
            patches = extract_patches(images, self.patch_size or 0, self.stride or 0)
            features = self.encoder(rearrange(patches, "b rows cols c ph pw -> (b rows cols) c ph pw"))
            grid = rearrange(features, "(b rows cols) d -> b rows cols d", rows=patches.shape[1], cols=patches.shape[2])
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
        if self.mode not in MODES or self.readout not in READOUTS:
            raise ValueError(f"mode={self.mode!r}, readout={self.readout!r}: pass one of {MODES} and one of {READOUTS}")
        if self.mode == "patches" and not self.patch_size:
            raise ValueError('this encoder was trained on whole images and has no patch grid: pass mode="image"')

    def _fit(self, images: Tensor) -> Tensor:
        if images.shape[-2:] == (self.image_size, self.image_size):
            return images
        if min(images.shape[-2:]) != self.load_size:
            images = vision.resize(images, [self.load_size], antialias=True).clamp(0, 1)
        return vision.center_crop(images, [self.image_size, self.image_size])


# where a trunk's first weights came from: the file's own take their place, so nothing is fetched
_FIRST_WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")


def constructors() -> dict[str, Callable[..., nn.Module]]:
    """The encoders that an `encoder.json` may name: no other code is ever called on a file's say-so."""
    modules = (cpc.encoders, contrastive_core.encoders)
    return {f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in module.ENCODERS}


def build_encoder(architecture: dict[str, Any]) -> nn.Module:
    """The encoder of a card's `architecture`: {"name": "cpc.encoders.resnet_small", "arguments": {"width": 32}}."""
    known = constructors()
    if architecture["name"] not in known:
        raise ValueError(
            f"encoder {architecture['name']!r} is not one of {', '.join(sorted(known))}: "
            f"pass load_encoder(path, encoder=MODULE) with a module of that architecture"
        )
    arguments = {name: value for name, value in architecture["arguments"].items() if name not in _FIRST_WEIGHTS}
    return known[architecture["name"]](**arguments)


def load_encoder(
    path: str | Path, *, readout: str = "mean", mode: str | None = None, encoder: nn.Module | None = None
) -> FrozenEncoder:
    """Read a run's encoder back, ready for use.

    Args:
        path: the run's folder, or its `encoder.safetensors`; `encoder.json` must stand beside it.
        readout: "mean" -> features `b d`; "grid" -> `b rows cols d`.
        mode: "patches" (the default where the encoder was trained on patches) or "image".
        encoder: the module to put the weights into, for an architecture that is not one of ours.

    Returns an `nn.Module` in eval mode: images `b 3 h w` in [0, 1] of any size -> features.

    Raises FileNotFoundError where a file is missing, ValueError where the card names an unknown encoder or the
    weights are another's.

    Example:
        encoder = cpc.load_encoder("runs/mnist5k-...")
        features = encoder(images)
    """
    weights, card = read_card(path)
    encoder = build_encoder(card["architecture"]) if encoder is None else encoder
    try:
        encoder.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights in {weights} are not those of the encoder that its card describes: {error}"
        ) from None
    return _frozen(encoder, card, readout, mode)


def untrained_encoder(
    path: str | Path, *, seed: int = 0, readout: str = "mean", mode: str | None = None
) -> FrozenEncoder:
    """The same encoder at random initialisation: what `load_encoder(path)` has to beat with the same readout."""
    _, card = read_card(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(card["architecture"])
    return _frozen(encoder, card, readout, mode)


def read_card(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The path of the weights and the parsed card, of a run's folder or of its `encoder.safetensors`."""
    weights = Path(path) / "encoder.safetensors" if Path(path).is_dir() else Path(path)
    card = weights.with_suffix(".json")
    for file in (weights, card):
        if not file.is_file() or weights.suffix != ".safetensors":
            raise FileNotFoundError(
                f"no {file.name} in {file.parent}: pass the folder of a finished run, or its encoder.safetensors"
            )
    try:
        parsed: dict[str, Any] = json.loads(card.read_text())
        described = {"name", "arguments"} <= parsed["architecture"].keys() and "image_size" in parsed["input"]
    except (ValueError, KeyError, TypeError, AttributeError):
        described = False
    if not described:
        raise ValueError(f"{card} is not an encoder's card: it holds no architecture {{name, arguments}} and input")
    return weights, parsed


def _frozen(encoder: nn.Module, card: dict[str, Any], readout: str, mode: str | None) -> FrozenEncoder:
    channels_last = encoder.to(memory_format=torch.channels_last)
    return FrozenEncoder(channels_last, **card["input"], mode=mode, readout=readout).eval().requires_grad_(False)
