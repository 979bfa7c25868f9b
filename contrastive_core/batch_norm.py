"""Batch normalisation over the batch of all processes.

With BatchNorm in every process by itself, the positive of a query was normalised by statistics that the query's own
process shaped, and most negatives by others: a network can tell which keys come from its own process without looking
at what they show, and the loss falls while the features do not improve (SimCLR, section 2.2, "Global BN"). The papers
know three ways out:

- statistics over all processes: SimCLR, and BYOL and SimSiam after it; this module;
- shuffling: MoCo gives each process other images' keys to encode than queries, so that the two never share statistics.
  Statistics over all processes don't replace that where negatives come from a queue: they still mark the current
  batch, of which the positive is the only key;
- no batch statistics at all: CPC v2's LayerNorm (`cpc.encoders`).

accelerate has nothing for this, and torch's SyncBatchNorm refuses the CPU, where a run on several processes should give
what it gives elsewhere. Here one class serves all devices, so that a model can be converted before it is placed: on
CUDA it calls the function inside SyncBatchNorm, whose kernels read a batch once; elsewhere, its own below.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules._functions import SyncBatchNorm as _OnCuda
from torch.nn.modules.batchnorm import _BatchNorm

from contrastive_core.gather import world

_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GlobalBatchNorm(_BatchNorm):
    """y = weight * (x - mean) / sqrt(variance + eps) + bias, per channel, with the statistics of the joint batch.

    The arguments, the `state_dict` and, on one process, the numbers are those of torch's BatchNorm. Input and output
    are `b c ...` (`b c`, `b c h w`), of any float dtype; statistics are computed in float32, in float64 for a float64
    input. b and the positions may differ between processes and be 0 on some: what counts is the number of values.

    In train mode all processes take part in every forward, with one exchange, and in every backward, with another.
    The gradient that reaches the input is that of the sum of all processes' losses, through the statistics too; those
    of weight and bias are this process's, as all parameters' are, for DDP to average. So a loss that is weighted by
    `contrastive_core.gather.mean_weight` has the gradient of the mean over the joint batch. The running statistics are
    the same on all processes, and those that one process would have.

    In eval mode, and with one process, nothing is exchanged; with `track_running_stats=False` eval mode takes the
    statistics of this process's batch.

    Under `grad_cache` the i-th micro-batches of all processes are normalised together: more than one process's, less
    than the step's batch.

    Raises ValueError for an input without a batch and a channel axis and, on all processes, where a channel has fewer
    than 2 values in all, NotImplementedError for second derivatives across processes.

    Example: on two processes that hold [[0.]] and [[2.]], `GlobalBatchNorm(1, eps=0)` gives [[-1.]] and [[1.]].
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"the input has shape {tuple(input.shape)}: pass b c, or b c and positions")

    def forward(self, input: Tensor) -> Tensor:
        """`b c ...` -> `b c ...`."""
        if not self.training or world()[1] == 1:
            return super().forward(input)
        self._check_input_dim(input)
        if input.is_cuda:
            return self._on_cuda(input)
        mean, variance, total = joint_moments(input)
        self._track_(mean, variance, total)
        invstd = (variance + self.eps).rsqrt()
        output: Tensor = _Normalise.apply(input, self.weight, self.bias, mean, invstd, total)
        return output

    def _averaging_factor(self) -> float:
        """The share of the new statistics in the running ones; `momentum=None` is a mean over all batches."""
        if not self.track_running_stats or self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum

    @torch.no_grad()
    def _track_(self, mean: Tensor, variance: Tensor, total: int) -> None:
        factor = self._averaging_factor()
        if self.running_mean is None or self.running_var is None or not self.track_running_stats:
            return
        unbiased = variance * (total / (total - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.mul_(1 - factor).add_(new.to(running.dtype), alpha=factor)

    def _on_cuda(self, input: Tensor) -> Tensor:
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        # torch's sends an empty batch's zeros in the batch's dtype, where the other processes send the statistics'
        rows = input if input.numel() else input.to(_statistics_dtype(input))
        output: Tensor = _OnCuda.apply(
            rows,
            self.weight,
            self.bias,
            *running,
            self.eps,
            self._averaging_factor(),
            dist.group.WORLD,
            world()[1],
        )
        if not input.numel():  # of which torch's leaves no gradients behind, where other processes have some
            shape = (1, -1, *[1] * (rows.ndim - 2))
            output = output + (rows * self.weight.view(shape) + self.bias.view(shape) if self.affine else rows)
        return output.to(input.dtype)


def globalize_batch_norm(module: nn.Module) -> nn.Module:
    """Turn every BatchNorm1d, 2d and 3d of `module` into `GlobalBatchNorm`, and return it.

    In place: a layer stays the object that it is, with its parameters, buffers, settings, mode and hooks, and becomes
    of another class, as torch's lazy modules do. So it may come before or after the optimizer, and a layer used in two
    places stays one.

    Raises ValueError, with nothing changed, for another kind of BatchNorm: a subclass may do more than normalise.

    Example: `globalize_batch_norm(nn.BatchNorm2d(8))` is a `GlobalBatchNorm` with the same `state_dict`.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    for name, layer in layers.items():
        if type(layer) not in (*_CONVERTED, GlobalBatchNorm):
            raise ValueError(
                f"{name or 'the module'} is a {type(layer).__name__}, whose own forward would be lost: "
                f"build it with BatchNorm1d, BatchNorm2d or BatchNorm3d"
            )
    for layer in layers.values():
        layer.__class__ = GlobalBatchNorm
    return module


def joint_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel over all processes, and how many values they are of.

    Each process sends the mean, the sum of squared deviations from it, and the count. They are combined by the count
    (Chan, Golub, LeVeque 1979), about the largest part's mean: E[x^2] - E[x]^2 loses all digits of a variance that is
    small beside the mean. All processes compute it from the same numbers, so they agree to the last bit.

    Args:
        x: `b c ...`; may hold no value on some processes.

    Returns `c`, `c` and the count, with no gradient: tensors in float32, in float64 for a float64 x.

    Raises ValueError, on all processes, where a channel has fewer than 2 values.

    Example: on two processes that hold [[0.]] and [[2.]]: mean [1.], variance [1.], 2.
    """
    x = x.detach().to(_statistics_dtype(x))
    channels, count = x.shape[1], x.numel() // max(x.shape[1], 1)
    if count:
        variance, mean = torch.var_mean(x, _all_but_channels(x), correction=0)
    else:
        variance = mean = x.new_zeros(channels)
    means, deviations, counts = _everyone(torch.cat([mean, variance * count, x.new_tensor([count])])).split(
        [channels, channels, 1], dim=1
    )
    total = int(counts.sum())
    if total < 2:
        raise ValueError(f"a channel has {total} values in the batch of all processes: pass at least 2")
    about = means[counts.argmax()]
    shift = (counts * (means - about)).sum(0) / total
    mean = about + shift
    variance = (deviations + counts * (means - mean).square()).sum(0) / total
    return mean, variance, total


class _Normalise(torch.autograd.Function):
    """(x - mean) * invstd * weight + bias, differentiated as what it is: mean and invstd are functions of x.

    With n values of a channel over all processes, and sums over all of them:

        dx = weight * invstd * (g - (sum g + xhat * sum g xhat) / n)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, total: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.total = total
        # the mean is taken off first: x * scale + (bias - mean * scale) would lose the digits of a small variance
        y = x.to(mean.dtype) - _over(mean, x)
        y.mul_(_over(invstd if weight is None else invstd * weight, x))
        if bias is not None:
            y.add_(_over(bias, x))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("joint statistics have no second derivatives: compute them in one process")
        x, weight, mean, invstd = ctx.saved_tensors
        g = gradients[0].to(mean.dtype)
        normal = (x.to(mean.dtype) - _over(mean, x)).mul_(_over(invstd, x))
        rest = _all_but_channels(x)
        own = torch.stack([g.sum(rest), (g * normal).sum(rest)])
        for_x = None
        if ctx.needs_input_grad[0]:
            first, second = _summed(own) / ctx.total
            scale = invstd if weight is None else invstd * weight
            for_x = (g - _over(first, x)).sub_(normal.mul_(_over(second, x))).mul_(_over(scale, x)).to(x.dtype)
        for_bias, for_weight = (sums.to(mean.dtype if weight is None else weight.dtype) for sums in own)
        wanted = ctx.needs_input_grad
        return for_x, for_weight if wanted[1] else None, for_bias if wanted[2] else None, None, None, None


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _over(channels: Tensor, x: Tensor) -> Tensor:
    """`c` -> `1 c 1 ...`, so that it broadcasts over x."""
    return channels.view(1, -1, *[1] * (x.ndim - 2))


def _everyone(row: Tensor) -> Tensor:
    """`n` of this process -> `processes n`."""
    if world()[1] == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(world()[1])]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def _summed(own: Tensor) -> Tensor:
    """The sum over processes; `own` stays as it is."""
    total = own.clone()
    if world()[1] > 1:
        dist.all_reduce(total)
    return total
