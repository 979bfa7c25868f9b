"""Keys that outlive their batch: MoCo's queue and PIRL's memory bank.

Both give `info_nce` its `shared_keys`: many candidates that cost no encoding and get no gradient. That is right only
where every process compares with the same rows. So the start comes from a generator of their own with a fixed seed,
and what is written is gathered over processes: rank 0's rows in their order, then rank 1's, and so on, any number of
rows each. With every write the processes compare a fingerprint of all that was written before, and where they don't
agree (another checkpoint on one of them, a write with `gather=False`) all of them raise.

`gather`: None or True = whenever torch.distributed is initialised, and then all processes must call; False = only
this process's rows, without a word to the others: for evaluation on one process, or rows that are the same everywhere.

The state is in buffers, so in `state_dict`: a run goes on exactly where it stopped. DDP sends buffers from rank 0 to
all at each forward, unless `broadcast_buffers=False`: harmless here, since all hold the same, but a queue's worth of
traffic. What is read is a copy, which no later write (or broadcast, which is one) takes from under a graph that has
yet to go backward.

Momentum Contrast: He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning". Memory bank:
Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"; PIRL: Misra and van der
Maaten 2020, "Self-Supervised Learning of Pretext-Invariant Representations".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contrastive_core.gather import agree, all_gather, world
from contrastive_core.losses import normalize
from contrastive_core.randomness import Randomness

_SEED = 0
_ODD = 0x2545F4914F6CDD1D  # odd, so that multiplying by it modulo 2^64 loses nothing


class FeatureQueue(nn.Module):
    """The latest features, first in first out: MoCo's dictionary (He et al. 2020, section 3.2).

    Args:
        size: rows kept, K (65,536 in the paper), of any relation to the batch size.
        dim: d.

    It starts with random unit vectors, as MoCo does; `queue.keys()[: queue.filled]` are those since written. Rows are
    stored as they come: MoCo appends unit vectors, and does so after the loss, or a query would meet its own key
    among the negatives.

    Raises ValueError where size or dim is below 1.

    Example: `queue = FeatureQueue(3, 1)`; after `queue.append_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))`
    `queue.keys()` is [[4], [2], [3]].
    """

    features: Tensor
    written: Tensor
    history: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", _random_unit_rows(size, dim))
        self.register_buffer("written", _zero(self.features))  # rows since the start; the next is number written % size
        self.register_buffer("history", _zero(self.features))
        _remember_(self.history, torch.tensor([size, dim]))

    @property
    def filled(self) -> int:
        """How many rows were written, at most `size`; asked of the device, so not for every step."""
        return min(int(self.written), len(self.features))

    def keys(self) -> Tensor:
        """A copy of all rows, `size d`, without a gradient; in no order that matters to a loss."""
        return self.features.clone()

    @torch.no_grad()
    def append_(self, features: Tensor, *, gather: bool | None = None) -> None:
        """Write the rows of all processes over the oldest ones; of more than `size` the last remain.

        Args:
            features: `n d`, n from 0 on, other numbers on other processes; detached, cast to the queue's dtype.
            gather: see the module's docstring.

        Raises ValueError where the features of any process are not floats `n d`, RuntimeError where the processes'
        queues differ: on all processes.
        """
        problem = _features_problem(features, self.features.shape[1])
        counts = _agreed_counts(problem, features, self.history, gather)
        rows = _joint(features.to(self.features), counts)
        _remember_(self.history, rows)

        last = rows[-len(self.features) :]
        places = torch.arange(len(rows) - len(last), len(rows), device=rows.device)
        self.features.index_copy_(0, (self.written + places) % len(self.features), last)
        self.written += len(rows)


class MemoryBank(nn.Module):
    """A unit vector for each image of the data set, the moving average of its features.

    m_i = (a m_i + (1 - a) f_i) / |a m_i + (1 - a) f_i|   (Wu et al. 2018; PIRL section 3.3, a = 0.5)

    Args:
        images: number of images, N.
        dim: d.
        momentum: a, from 0 (the latest feature) to 1 (never changes).

    It starts with random unit vectors. A row that becomes zero (f_i = -m_i at a = 0.5) stays zero until it is
    next updated.

    Raises ValueError where images or dim is below 1, or momentum outside 0..1.

    Example: with `bank, last = MemoryBank(5, 2, momentum=0.0), torch.tensor([4])`, after
    `bank.update_(last, torch.tensor([[3.0, 4.0]]))`, `bank.rows(last)` is [[0.6, 0.8]].
    """

    features: Tensor
    written: Tensor
    history: Tensor

    def __init__(self, images: int, dim: int, momentum: float = 0.5) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum}: pass a number from 0 (the latest feature) to 1 (never changes)")
        self.momentum = momentum
        self.register_buffer("features", _random_unit_rows(images, dim))
        self.register_buffer("written", _zero(self.features))  # rows since the start
        self.register_buffer("history", _zero(self.features))
        _remember_(self.history, torch.tensor([images, dim, momentum]))

    @torch.no_grad()
    def update_(self, indices: Tensor, features: Tensor, *, gather: bool | None = None) -> None:
        """Move the rows of the joint batch's images towards their features.

        An image that occurs more than once counts once, with the last of its features in the order of the joint batch.
        (Writing to an index twice is undefined on CUDA, and a mean's sum has an order that CUDA does not fix: either
        way the processes' banks would drift apart.)

        Args:
            indices: `n` int64, each image's place in the data set.
            features: `n d`, unit vectors in the papers; n may differ between processes, or be 0.
            gather: see the module's docstring.

        Raises ValueError where shapes, dtypes or an index of any process don't fit, RuntimeError where the processes'
        banks differ: on all processes.
        """
        problem = _features_problem(features, self.features.shape[1]) or self._indices_problem(indices, len(features))
        counts = _agreed_counts(problem, features, self.history, gather)
        indices = _joint(indices.to(self.features.device), counts)
        rows = _joint(features.to(self.features), counts)
        _remember_(self.history, indices, rows)

        # a dict keeps the last value of a key, whatever the device
        last_rows = {image: row for row, image in enumerate(indices.tolist())}.values()
        last = torch.tensor(list(last_rows), dtype=torch.int64)
        images = indices[last]
        moved = self.momentum * self.features[images] + (1 - self.momentum) * rows[last]
        self.features.index_copy_(0, images, normalize(moved).to(self.features.dtype))
        self.written += len(rows)

    def rows(self, indices: Tensor) -> Tensor:
        """A copy of these images' rows, without a gradient: `n` int64 -> `n d`.

        Raises ValueError where an index is not in 0 .. images - 1.
        """
        if problem := self._indices_problem(indices):
            raise ValueError(problem)
        return self.features[indices]

    def sample(self, count: int, *, exclude: Tensor | None = None, gather: bool | None = None) -> tuple[Tensor, Tensor]:
        """Images drawn uniformly with replacement, `count` int64, and a copy of their rows, `count d`.

        The draw is a function of how many rows have been written: the same on every process, after resuming, and
        until the next update. PIRL draws 32,000, and its published code lets them meet the batch's own images, which
        `exclude` forbids: a query's own row is among so many draws from ImageNet once in 40 steps, from 5,000 images
        nearly always.

        Args:
            count: how many, also more than there are images.
            exclude: `n` int64, images not to draw, gathered over processes: the batch's own.
            gather: see the module's docstring; it concerns `exclude` only.

        Raises ValueError where an excluded index is not in 0 .. images - 1 or no image is left, RuntimeError where
        the processes' banks differ: on all processes.

        Example: `MemoryBank(3, 2).sample(4, exclude=torch.tensor([0, 2]))[0]` is [1, 1, 1, 1].
        """
        excluded = torch.empty(0, dtype=torch.int64)
        if exclude is not None:
            counts = _agreed_counts(self._indices_problem(exclude), exclude, self.history, gather)
            excluded = _joint(exclude.to(self.features.device), counts).unique().cpu()
        left = len(self.features) - len(excluded)
        if left == 0:
            raise ValueError(f"all {len(self.features)} images are excluded: exclude fewer")
        drawn = Randomness(_SEED, int(self.written), torch.tensor([0])).integers("memory bank", left, count)[0]
        # the j-th image left is j plus the excluded ones before it, and excluded[i] has excluded[i] - i left before it
        before = torch.searchsorted(excluded - torch.arange(len(excluded)), drawn, right=True)
        indices = (drawn + before).to(self.features.device)
        return indices, self.features[indices]

    def _indices_problem(self, indices: Tensor, count: int | None = None) -> str:
        if indices.ndim != 1 or indices.dtype != torch.int64 or count not in (None, len(indices)):
            wanted = "n int64" if count is None else f"{count} int64, one for each row of features"
            return f"indices have shape {tuple(indices.shape)} and dtype {indices.dtype}: pass {wanted}"
        outside = indices[(indices < 0) | (indices >= len(self.features))]
        if len(outside):
            images = len(self.features)
            return f"index {int(outside[0])} is outside the bank of {images} images: pass 0 to {images - 1}"
        return ""


def _random_unit_rows(count: int, dim: int) -> Tensor:
    """The same on every process and device, whatever the global generator and the default dtype are."""
    if count < 1 or dim < 1:
        raise ValueError(f"{count} rows of {dim} numbers: pass at least 1 of each")
    generator = torch.Generator().manual_seed(_SEED)
    return normalize(torch.randn(count, dim, generator=generator, dtype=torch.float32, device="cpu"))


def _zero(features: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=features.device)


def _features_problem(features: Tensor, dim: int) -> str:
    if features.ndim == 2 and features.shape[1] == dim and features.is_floating_point():
        return ""
    return f"features have shape {tuple(features.shape)} and dtype {features.dtype}: pass floats n d with d = {dim}"


def _agreed_counts(problem: str, rows: Tensor, history: Tensor, gather: bool | None) -> list[int]:
    """The number of rows of every process that takes part. What is wrong on one raises on all: none waits for it."""
    if gather not in (None, False, True):
        raise ValueError(f"gather={gather!r}: pass None, True or False")
    if gather is False or world()[1] == 1:
        if problem:
            raise ValueError(problem)
        return [len(rows)]
    everyone = agree(problem, 0 if problem else len(rows), int(history))
    for rank, (_, past) in enumerate(everyone):
        if past != everyone[0][1]:
            raise RuntimeError(
                f"processes 0 and {rank} hold different rows: load the same state on all, "
                f"and write with gather=False only what is the same on all"
            )
    return [count for count, _ in everyone]


def _joint(rows: Tensor, counts: list[int]) -> Tensor:
    return all_gather(rows, counts) if len(counts) > 1 else rows


def _remember_(history: Tensor, *written: Tensor) -> None:
    """Mix what is written into the fingerprint: integers only, whose sums are the same in any order."""
    for rows in written:
        bits = rows.float().contiguous().view(torch.int32) if rows.is_floating_point() else rows
        places = torch.arange(1, rows.numel() + 1, device=rows.device) * _ODD
        history.mul_(_ODD).add_((bits.flatten() * places).sum() + rows.numel())
