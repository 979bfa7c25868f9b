"""Weighted nearest-neighbour classification of features: no training, so it can watch a run.

Wu, Xiong, Yu and Lin 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

LARGEST_TABLE = 1 << 24
"""Entries of the largest table of similarities held at once: 64 MB in float32."""


def knn_predictions(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    neighbours: int = 20,
    temperature: float = 0.1,
) -> Tensor:
    """The class of each test feature by the vote of its nearest training features.

    The k nearest by cosine similarity s_i vote for their class with weight exp(s_i / temperature), eq. 7 of section
    3.4 (which has k = 200 and temperature 0.07 for ImageNet).

    Args:
        train_features, test_features: `n d` and `m d`, any float type and length; a zero vector is similar to none.
        train_labels: `n` int64 from 0.
        neighbours: k; all, where there are fewer.

    Returns `m` int64. Of equal votes the lowest class wins.

    Raises ValueError for shapes that do not fit, unlabelled rows, values that are not finite, a temperature <= 0.

    Example: with `neighbours=1` each training feature is given its own label.
    """
    _check(train_features, train_labels, test_features)
    if neighbours < 1 or not temperature > 0:
        raise ValueError(f"neighbours {neighbours}, temperature {temperature}: pass at least 1, and more than 0")
    keys = normalize(train_features.float(), dim=1)
    classes = int(train_labels.max()) + 1
    rows = max(1, LARGEST_TABLE // len(keys))
    predictions = []
    for chunk in test_features.split(rows):
        similarity = normalize(chunk.float(), dim=1) @ keys.T
        nearest, index = similarity.topk(min(neighbours, len(keys)), dim=1)
        # relative to the nearest: exp(1 / 0.01) is beyond float32
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = torch.zeros(len(chunk), classes, device=weights.device).scatter_add_(1, train_labels[index], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    neighbours: int = 20,
    temperature: float = 0.1,
) -> float:
    """The share of `test_labels` (`m`) that `knn_predictions` gets right, 0 to 1.

    Example: features that are their own class's axis give 1.0.
    """
    if test_labels.shape != test_features.shape[:1]:
        raise ValueError(f"{len(test_features)} test features with labels {tuple(test_labels.shape)}: pass one each")
    predictions = knn_predictions(
        train_features, train_labels, test_features, neighbours=neighbours, temperature=temperature
    )
    return (predictions == test_labels).double().mean().item()


def _check(train_features: Tensor, train_labels: Tensor, test_features: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (train_features, train_labels, test_features)]
    if (
        [len(shape) for shape in shapes] != [2, 1, 2]
        or shapes[0][0] != shapes[1][0]
        or shapes[0][1] != shapes[2][1]
        or 0 in shapes[0] + shapes[2]
    ):
        raise ValueError(f"train features {shapes[0]}, labels {shapes[1]}, test features {shapes[2]}: pass n d, n, m d")
    if int(train_labels.min()) < 0:
        raise ValueError(f"{int((train_labels < 0).sum())} training labels are negative: leave unlabelled images out")
    if not (train_features.isfinite().all() and test_features.isfinite().all()):
        raise ValueError("features hold NaN or infinity: the encoder has diverged, or overflowed its float type")
