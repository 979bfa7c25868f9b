"""A run's frozen encoder as a transformer of scikit-learn: images in, one row of features an image out.

make_pipeline(CPCFeatures("runs/mnist5k-..."), StandardScaler(), LogisticRegression()).fit(images, labels)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from torch import Tensor

from contrastive_core.data.images import UndecodableImage, decode_square
from contrastive_core.evaluate.features import pool_grid
from cpc.features import load_encoder
from cpc.frozen_encoder import READOUTS, FrozenEncoder

Images = np.ndarray | Sequence[Image.Image | str | Path]
"""`n h w 3` uint8, `n 3 h w` floats in [0, 1], or a list of PIL images and paths of files, of any sizes."""


class CPCFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features of images by the frozen encoder of a run: it learns nothing, so `transform` works without `fit`.

    Args:
        path: the run's folder, as `cpc.load_encoder`'s; also one that `tools/export.py format=hub` wrote.
        readout: "mean" -> d columns; "2x2" (or any NxN) -> the grid averaged into that many cells, side by side; "grid"
            -> every cell; "context" -> every cell with the contexts of a CPC run.
        mode: "patches" or "image"; None = as it was trained.
        batch_size: images at a time; no influence on the features beyond rounding.
        device: that encodes, e.g. "cuda".

    The encoder is read when it is first needed. Neither `clone` nor pickle carries it along, but the path only: a
    pickled pipeline wants the folder where it was.

    Files and PIL images are resized on their short side as in training; arrays that are of another size, as
    `FrozenEncoder` does it.

    Example: `CPCFeatures(run).transform(np.zeros((2, 28, 28, 3), np.uint8)).shape == (2, d)`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        readout: str = "mean",
        mode: str | None = None,
        batch_size: int = 64,
        device: str = "cpu",
    ) -> None:
        self.path = path
        self.readout = readout
        self.mode = mode
        self.batch_size = batch_size
        self.device = device

    def fit(self, X: Images, y: Any = None) -> Self:
        """Read the encoder and look at the images' type; nothing is learned. Raises as `transform`."""
        self._checked_encoder()
        _check_kind(X)
        return self

    def transform(self, X: Images) -> np.ndarray:
        """Images -> features `n columns` float32.

        Raises ValueError for images of another kind, an unknown readout or a batch_size below 1, UndecodableImage for a
        file that is none, and `cpc.load_encoder`'s errors.
        """
        encoder = self._checked_encoder()
        _check_kind(X)
        features = np.empty((len(X), self._n_features_out), np.float32)
        for first in range(0, len(X), self.batch_size):
            images = _as_tensor(X[first : first + self.batch_size], encoder.load_size)
            features[first : first + len(images)] = self._encode(encoder, images)
        return features

    def _encode(self, encoder: FrozenEncoder, images: Tensor) -> np.ndarray:
        with torch.no_grad():
            encoded = encoder(images.to(self.device))
            if cells := _cells(self.readout):
                encoded = pool_grid(encoded, cells)
        rows: np.ndarray = rearrange(encoded, "b ... -> b (...)").float().cpu().numpy()
        return rows

    def _checked_encoder(self) -> FrozenEncoder:
        """The encoder of these parameters, read again where they have changed since."""
        if self.readout not in READOUTS and not _cells(self.readout):
            raise ValueError(f"readout={self.readout!r}: pass one of {READOUTS}, or 2x2")
        if not isinstance(self.batch_size, int | np.integer) or self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: pass at least 1")
        key = (str(self.path), self.readout, self.mode, self.device)
        known: tuple[Any, FrozenEncoder] | None = self.__dict__.get("_read")
        if known is None or known[0] != key:
            readout = "grid" if _cells(self.readout) else self.readout
            encoder = load_encoder(self.path, readout=readout, mode=self.mode).to(self.device)
            known = self._read = (key, encoder)
        return known[1]

    @property
    def _n_features_out(self) -> int:
        """How many columns there are, by encoding one black image; what get_feature_names_out counts."""
        encoder = self._checked_encoder()
        return self._encode(encoder, torch.zeros(1, 3, encoder.image_size, encoder.image_size)).shape[1]

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True  # scikit-learn's word for whatever has more than two axes
        tags.input_tags.string = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_read", None)
        return state


def _cells(readout: str) -> int:
    """2 of "2x2", 0 of a readout that is no number of cells."""
    found = re.fullmatch(r"([1-9]\d*)x\1", readout)
    return int(found[1]) if found else 0


def _check_kind(images: Any) -> None:
    """Raise ValueError, which says what came, for what are no images."""
    if isinstance(images, np.ndarray) and images.dtype != object and images.dtype.kind != "U":
        bytes_last = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
        floats_first = images.dtype.kind == "f" and images.ndim == 4 and images.shape[1] == 3
        if not (bytes_last or floats_first):
            came = f"an array {images.shape} of {images.dtype}"
        elif not len(images):
            came = "no image"
        elif floats_first and not (images.min() >= 0 and images.max() <= 1):
            came = f"floats from {images.min():g} to {images.max():g}"
        else:
            return
    elif isinstance(images, np.ndarray | list | tuple):
        wrong = [type(image).__name__ for image in images if not isinstance(image, Image.Image | str | Path)]
        if not wrong and len(images):
            return
        came = f"a list with a {wrong[0]}" if wrong else "no image"
    else:
        came = f"a {type(images).__name__}"
    raise ValueError(
        f"images are {came}: pass an array n h w 3 of uint8 or n 3 h w of floats in [0, 1], or a list of PIL images or "
        f"of paths"
    )


def _as_tensor(images: Any, size: int) -> Tensor:
    """Images of a kind that was checked, `b 3 h w` float32 in [0, 1]; files and PIL images have `size` px then."""
    if isinstance(images, np.ndarray) and images.dtype.kind == "f":
        return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8):
        return torch.stack([_square(image, size) for image in images]).float() / 255
    return rearrange(torch.from_numpy(np.ascontiguousarray(images)), "b h w c -> b c h w").float() / 255


def _square(image: Any, size: int) -> Tensor:
    try:
        return decode_square(image if isinstance(image, Image.Image) else Path(image), size)
    except MemoryError:
        raise
    except Exception as error:  # PIL raises almost anything
        name = "a PIL image" if isinstance(image, Image.Image) else str(image)
        raise UndecodableImage(f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from error
