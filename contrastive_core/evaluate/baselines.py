"""What the labels alone give, without an encoder: the numbers a pre-trained one has to beat.

Each classifier has the signature of `linear_probe` and chooses its settings by cross-validation on the training rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from contrastive_core.evaluate.linear import Probe, check_rows, few_rows_a_class, folds_of, linear_probe, scored

RIDGE_STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-6, 11))
SVM_COSTS = (1.0, 10.0, 100.0)
SVM_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Factors of gamma = 1 / (d * variance), scikit-learn's "scale"."""


def svm_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, folds: int = 5, seed: int = 0
) -> Probe:
    """Support vectors with a Gaussian kernel; cost C and width gamma by cross-validation. `regularisation` is 1 / C.

    x: `n d` and `m d`, not standardised: pixels in [0, 1] as they are. Meant for a few thousand rows at most.

    Of the settings within a standard error of the best, the nearest to C = 10 and scikit-learn's gamma: with 40 digits
    the best of fifteen is mostly luck, and 4 points worse than those two as they are.
    """
    from sklearn.svm import SVC

    check_rows(train_x, train_y, test_x, test_y)
    train, labels = train_x.float().numpy(), train_y.numpy()
    scale = 1 / (train.shape[1] * max(float(train.var()), 1e-12))
    parts = folds_of(labels, folds, seed)
    settings = [(cost, width * scale) for cost in SVM_COSTS for width in SVM_WIDTHS]

    def fitted(cost: float, gamma: float, rows: Any) -> Any:
        with few_rows_a_class():
            return SVC(C=cost, gamma=gamma).fit(train[rows], labels[rows])

    def score(setting: tuple[float, float]) -> float:
        return float(np.mean([fitted(*setting, fit).score(train[held], labels[held]) for fit, held in parts]))

    scores = {setting: score(setting) if parts else 0.0 for setting in settings}
    best = max(scores.values())
    error = math.sqrt(best * (1 - best) / max(1, sum(len(held) for _, held in parts)))
    as_good = [setting for setting in settings if scores[setting] >= best - error]
    cost, gamma = min(as_good, key=lambda setting: abs(math.log(setting[0] / 10)) + abs(math.log(setting[1] / scale)))
    model = fitted(cost, gamma, slice(None))
    return scored(model.predict(test_x.float().numpy()), test_y, 1 / cost)


def logistic_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Probe:
    """`linear_probe` for pixels, all divided by one deviation: 3 points better than each by its own at 100 digits."""
    return linear_probe(train_x, train_y, test_x, test_y, per_feature=False)


def ridge_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Probe:
    """Least squares onto +1 / -1 of each class with an L2 penalty, its strength by leave-one-out; x as it is."""
    from sklearn.linear_model import RidgeClassifierCV

    check_rows(train_x, train_y, test_x, test_y)
    model = RidgeClassifierCV(alphas=RIDGE_STRENGTHS).fit(train_x.double().numpy(), train_y.numpy())
    return scored(model.predict(test_x.double().numpy()), test_y, float(model.alpha_))


def pixel_features(images: Tensor) -> Tensor:
    """Images `n 3 h w` uint8 -> all pixels `n d` in [0, 1]; images without colour keep one channel of the three."""
    grey = bool((images[:, :1] == images).all())
    return rearrange(images[:, :1] if grey else images, "n c h w -> n (c h w)").float() / 255


def thumbnail_features(images: Tensor, *, side: int = 8, bins: int = 8) -> Tensor:
    """A small RGB thumbnail beside a colour histogram: images `n 3 h w` uint8 -> `n (3 side side + bins^3)`.

    The thumbnail is averaged from the pixels, in [0, 1]. The histogram counts colours in `bins` x `bins` x `bins`
    boxes; what stands in the features is twice the square root of each share: the Hellinger kernel, weighted so that
    ridge regression gets most out of CIFAR-10: 0.343 at 500 labels, 0.335 unweighted, 0.315 with one a channel.

    Example: a black image gives zeros, and 2 in the first box.
    """
    thumbnail = torch.cat([adaptive_avg_pool2d(part.float() / 255, side) for part in images.split(1000)])
    binned = (images.flatten(2).int() * bins).div(256, rounding_mode="floor")
    box = (binned[:, 0] * bins + binned[:, 1]) * bins + binned[:, 2]
    counts = torch.zeros(len(images), bins**3).scatter_add_(1, box.long(), torch.ones(box.shape))
    return torch.cat([thumbnail.flatten(1), 2 * (counts / box.shape[1]).sqrt()], dim=1)
