"""Linear probes: what a linear classifier reads off frozen features, with all labels or with a few.

`linear_probe` is the fast one for every day, on cached features; `paper_linear_probe` is the paper's, on a cached
grid of latents. Both take labels only of the training rows they are given: the strength of the regulariser is chosen
by cross-validation on these, never on the test rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from contrastive_core.data.fractions import labels_per_class
from contrastive_core.data.loading import sample_order

REGULARISATIONS = tuple(10.0 ** (exponent / 2) for exponent in range(8, -5, -1))
"""Strengths that `linear_probe` tries, strongest first: 10,000 to 0.01 in half decades."""

HELD_OUT_FROM = 5000
"""Rows from which on one held-out part replaces the folds: its loss is then known well enough."""

MOST_ROWS_TO_CHOOSE = 10_000
"""Rows that the strength is chosen with at most. As the precision of a prior it should not depend on their number."""

ONE_THREAD_UP_TO = 2_000_000
"""Numbers in the training features up to which a fit runs on one thread."""


class Probe(NamedTuple):
    """Accuracy on the test rows, 0 to 1; the regulariser's strength; the class given to each test row, `m` int64."""

    accuracy: float
    regularisation: float
    predictions: Tensor


ProbeFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Probe]
"""(train_x `n d`, train_y `n`, test_x `m d`, test_y `m`) -> Probe."""


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    regularisations: Sequence[float] = REGULARISATIONS,
    folds: int = 5,
    seed: int = 0,
    per_feature: bool = True,
) -> Probe:
    """Multinomial logistic regression on standardised features.

    Minimises sum_i -log softmax(W x_i + b)[y_i] + a/2 |W|^2 by L-BFGS, x standardised by the training rows' mean and
    deviation (of two classes only the second has a W, as scikit-learn has it). The strength a is the one with the
    least log loss over stratified folds of the training rows; choosing by the folds' accuracy, which is coarse, cost
    1.4 points at 100 labels. From HELD_OUT_FROM rows on, one held-out part takes the place of the folds. Then all
    rows are fitted again.

    Args:
        train_x, test_x: `n d` and `m d`, any float type.
        train_y, test_y: `n` and `m` int64.
        regularisations: strengths a to try, > 0, from the strongest down until the loss has risen twice. A single
            one is taken as it is; the middle one, when a class has one row and there is nothing to hold out.
        folds: as many as the rarest class has rows, if that is fewer.
        seed: of the folds.
        per_feature: divide each feature by its own deviation; False = all by the mean one. Pixels want False, where
            those that hardly vary would be blown up.

    Raises ValueError for shapes that do not fit, unlabelled rows, fewer than two classes, values not finite.

    Example: classes that a plane separates give accuracy 1.0.
    """
    check_rows(train_x, train_y, test_x, test_y)
    if not regularisations or min(regularisations) <= 0:
        raise ValueError(f"regularisations {list(regularisations)}: pass at least one, all above 0")
    train, test = in_row_space(*standardise(train_x, test_x, per_feature=per_feature))
    with _threads_for(train):
        regularisation = _choose(train, train_y.numpy(), sorted(regularisations, reverse=True), folds, seed)
        model = _fit(_logistic_regression(regularisation), train, train_y.numpy())
    return scored(model.predict(test), test_y, regularisation)


def _threads_for(x: np.ndarray) -> AbstractContextManager[Any]:
    """One BLAS thread for small problems: 100 x 784 took 20 times as long on two, which spend it on meeting."""
    from threadpoolctl import threadpool_limits

    limit: AbstractContextManager[Any] = threadpool_limits(1 if x.size < ONE_THREAD_UP_TO else None)
    return limit


def standardise(train_x: Tensor, test_x: Tensor, *, per_feature: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Both with the training rows' mean taken off and their deviation divided out, float32.

    A feature without any deviation in the training rows is only centred.
    """
    train, test = train_x.float().numpy(), test_x.float().numpy()
    mean, deviation = train.mean(0), train.std(0)
    if not per_feature:
        deviation = np.full_like(deviation, np.sqrt(np.square(deviation).mean()))
    deviation[deviation <= 1e-6 * deviation.max()] = 1
    return (train - mean) / deviation, (test - mean) / deviation


def in_row_space(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fewer features for the same fit: coordinates in the space that the training rows span, where they are fewer.

    Args: `train`: `n d`; `test`: `m d`. Returns `n min(n, d)` and `m min(n, d)`.

    A linear model with an L2 penalty has no weights outside that space, and the penalty does not mind a rotation: loss
    and optimum are the same, with 100 labels and 2,560 features in a twenty-fifth of the numbers. L-BFGS comes a little
    nearer to it, since it stops by the gradient's largest component; where the loss is flat, that may choose another
    strength.

    Example: one row (3, 4) becomes a number, 5 or -5, and a test row (4, -3) 0.
    """
    if len(train) >= train.shape[1]:
        return train, test
    basis, coordinates = np.linalg.qr(train.T)
    return np.ascontiguousarray(coordinates.T), test @ basis


def scored(predictions: np.ndarray, test_y: Tensor, regularisation: float) -> Probe:
    """The predictions with their share of right ones."""
    classes = torch.as_tensor(predictions, dtype=torch.int64)
    return Probe((classes == test_y).double().mean().item(), regularisation, classes)


def check_rows(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """ValueError in one line when features and labels do not fit each other."""
    shapes = [tuple(tensor.shape) for tensor in (train_x, train_y, test_x, test_y)]
    if (
        [len(shape) for shape in shapes] != [2, 1, 2, 1]
        or shapes[0][0] != shapes[1][0]
        or shapes[2][0] != shapes[3][0]
        or shapes[0][1] != shapes[2][1]
        or 0 in shapes[0] + shapes[2]
    ):
        raise ValueError(f"train x {shapes[0]}, y {shapes[1]}, test x {shapes[2]}, y {shapes[3]}: pass n d, n, m d, m")
    if int(train_y.min()) < 0 or len(train_y.unique()) < 2:
        raise ValueError(
            f"training labels {train_y.unique().tolist()}: pass two classes or more, and no unlabelled rows"
        )
    if not (train_x.isfinite().all() and test_x.isfinite().all()):
        raise ValueError("features hold NaN or infinity: the encoder has diverged, or overflowed its float type")


def folds_of(labels: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows to fit, rows held out) of each stratified fold; empty where fewer than two classes have several rows.

    The only row of a class is in every fit and never held out. From HELD_OUT_FROM rows on there is one such pair, of at
    most MOST_ROWS_TO_CHOOSE rows, a fifth held out; where that is less than a row a class, the first fold of all rows.
    """
    from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    several, alone = np.flatnonzero(counts[place] > 1), np.flatnonzero(counts[place] == 1)
    folds = min(folds, int(counts[counts > 1].min(initial=folds)))
    if folds < 2 or (counts > 1).sum() < 2:
        return []
    rows = np.zeros(len(several))  # scikit-learn wants features, and looks at their number only
    classes = labels[several]
    most = min(len(several), MOST_ROWS_TO_CHOOSE)
    if len(several) < HELD_OUT_FROM or most // 5 < (counts > 1).sum():
        split = StratifiedKFold(folds, shuffle=True, random_state=seed).split(rows, classes)
        parts = islice(split, folds if len(several) < HELD_OUT_FROM else 1)
    else:
        split = StratifiedShuffleSplit(1, train_size=most - most // 5, test_size=most // 5, random_state=seed)
        parts = split.split(rows, classes)
    return [(np.concatenate([several[fit], alone]), several[held]) for fit, held in parts]


def _choose(x: np.ndarray, y: np.ndarray, strengths: Sequence[float], folds: int, seed: int) -> float:
    """The strength with the least log loss over the folds."""
    parts = folds_of(y, folds, seed) if len(strengths) > 1 else []
    if not parts:
        return strengths[len(strengths) // 2]
    models = [_logistic_regression(strengths[0]) for _ in parts]
    losses: list[float] = []
    for strength in strengths:  # each fit starts from the last, stronger one
        for model, (fit, _) in zip(models, parts, strict=True):
            _fit(model.set_params(C=1 / strength), x[fit], y[fit])
        losses.append(sum(_log_loss(model, x[held], y[held]) for model, (_, held) in zip(models, parts, strict=True)))
        if len(losses) > 2 and losses[-3] < losses[-2] < losses[-1]:
            break  # the loss falls, then rises; the weak end takes most of the time
    return strengths[int(np.argmin(losses))]


def _log_loss(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Summed over the rows; from the logits, since scikit-learn's log-probabilities are -inf where exp underflows."""
    logits = torch.from_numpy(model.decision_function(x)).double()
    if logits.dim() == 1:  # two classes: the logit of the second
        logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
    return cross_entropy(logits, torch.from_numpy(np.searchsorted(model.classes_, y)), reduction="sum").item()


def _logistic_regression(regularisation: float) -> Any:
    """scikit-learn's L-BFGS: three to five times as fast as ours on torch, at the same optimum."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1 / regularisation, max_iter=2000, warm_start=True)


@contextmanager
def few_rows_a_class() -> Iterator[None]:
    """Without scikit-learn's warning that with one row a class `y` might be a regression's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")
        yield


def _fit(model: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """In float32, half the time; in float64 where that is too coarse for L-BFGS to see the loss fall any more."""
    from sklearn.exceptions import ConvergenceWarning

    with few_rows_a_class():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return model.fit(x, y)
        except ConvergenceWarning:
            pass
        warnings.simplefilter("default", ConvergenceWarning)
        return model.fit(x.astype(np.float64), y)


def paper_linear_probe(
    train_latents: Tensor,
    train_y: Tensor,
    test_latents: Tensor,
    test_y: Tensor,
    *,
    epochs: int = 50,
    batch_size: int = 512,
    learning_rate: float = 5e-4,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Probe:
    """CPC v2's linear classification, on cached latents: the head at each grid position, then the mean of the logits.

    BatchNorm over all positions without a learned scale (its offset would be one with the linear layer's), a 1x1
    convolution to the classes, the spatial mean of the logits; Adam, 5e-4, 512 images. The paper states no number of
    epochs that we could find. Differs from the paper: the latents are cached, so they are not augmented anew.

    Args: latents `n rows cols d` and `m rows cols d`, labels `n` and `m` int64. The result depends on the seed, not
    on torch's global generator.

    Raises ValueError for shapes that do not fit.
    """
    if train_latents.dim() != 4 or test_latents.dim() != 4:
        raise ValueError(f"latents {tuple(train_latents.shape)}, {tuple(test_latents.shape)}: pass `n rows cols d`")
    check_rows(train_latents.flatten(1), train_y, test_latents.flatten(1), test_y)
    classes, dim = int(train_y.max()) + 1, train_latents.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # momentum=None: the plain mean over all batches; the usual one still holds its initial 0 and 1 in a short run
        normalise = nn.BatchNorm1d(dim, affine=False, momentum=None)
        head = nn.Sequential(normalise, nn.Linear(dim, classes)).to(device)
    optimizer = torch.optim.Adam(head.parameters(), learning_rate)
    parts = -(-len(train_y) // batch_size)
    for epoch in range(epochs):
        for rows in sample_order(len(train_y), seed, epoch).tensor_split(parts):  # even: no batch of one to normalise
            loss = cross_entropy(_mean_logits(head, train_latents[rows].to(device)), train_y[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    head.eval()
    with torch.no_grad():
        logits = torch.cat([_mean_logits(head, part.to(device)).cpu() for part in test_latents.split(batch_size)])
    return scored(logits.argmax(1).numpy(), test_y, 0.0)


def _mean_logits(head: nn.Module, latents: Tensor) -> Tensor:
    positions = latents.shape[1] * latents.shape[2]
    logits = head(rearrange(latents.float(), "b rows cols d -> (b rows cols) d"))
    return reduce(logits, "(b positions) classes -> b classes", "mean", positions=positions)


def few_label_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    per_class: int,
    draws: int = 5,
    ids: Tensor | None = None,
    classifier: ProbeFunction = linear_probe,
) -> list[float]:
    """Accuracy on all test rows of a classifier given `per_class` labels of each class, one for each draw.

    Draw i is `labels_per_class(..., seed=i, ids=ids)`, as everywhere, so that asking for more leaves the first ones as
    they were.

    ids: `n` int64, the images' identities (`sample_ids`); None = their places among the rows.
    classifier: `linear_probe`, or one from `baselines`; it sets itself by cross-validation on the labels it is given.

    Example: with as many labels as there are, every draw gives the same number.
    """
    chosen = [labels_per_class(train_y, per_class, seed=draw, ids=ids) for draw in range(draws)]
    return [classifier(train_x[rows], train_y[rows], test_x, test_y).accuracy for rows in chosen]
