"""Optimisation: LARS, parameter groups, and learning rates as pure functions of progress.

A rate is a function of the share of steps done, so that there is no scheduler to prepare, save or step too often:
`set_learning_rate_` sets every group to a factor of its own base rate. `parameter_groups` tells apart what the papers
treat differently: biases and normalisation, which neither decay nor take LARS's trust ratio, and parameters whose rate
stays constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Group = dict[str, Any]

CONVENTIONS = ("simclr", "moco_v3")

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


# ---- learning rates ----


def constant(progress: float) -> float:
    """The base learning rate throughout (CPC v2)."""
    return 1.0


def warmup_cosine(progress: float, *, warmup: float = 0.0) -> float:
    """Linear warm-up over the first `warmup` share of the run, then half a cosine down to 0.

    Args:
        progress: share of the optimizer steps done, 0..1.
        warmup: share of the run, 0..1.

    Returns the factor on the base learning rate, 0..1. Raises ValueError for a warm-up outside 0..1.

    Example: `warmup_cosine(0.5) == 0.5`.
    """
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup={warmup}: pass a share of the run from 0 to 1")
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-12)))


def step_decay(progress: float, *, at: Sequence[float] = (0.6, 0.8), factor: float = 0.1) -> float:
    """`factor` once more from each share in `at` on (MoCo v1: 0.1 at epochs 120 and 160 of 200).

    Args:
        progress: share of the optimizer steps done, 0..1.
        at: shares of the run, 0..1, in any order.
        factor: what a rate is multiplied by.

    Returns the factor on the base learning rate. Example: `step_decay(0.7) == 0.1`.
    """
    return factor ** sum(progress >= share for share in at)


def linear_scaling(rate: float, batch_size: int, base: int = 256) -> float:
    """rate * batch_size / base: the rate for the global batch, given that for `base` images (Goyal et al. 2017).

    SimCLR's is `linear_scaling(0.3, batch_size)`. Example: `linear_scaling(0.3, 4096) == 4.8`.
    """
    return rate * batch_size / base


def square_root_scaling(rate: float, batch_size: int) -> float:
    """rate * sqrt(batch_size): better for small batches and few epochs (SimCLR, table B.1).

    SimCLR's is `square_root_scaling(0.075, batch_size)`, equal to its linear rule at 4096.
    Example: `square_root_scaling(0.075, 4096) == 4.8`.
    """
    return rate * math.sqrt(batch_size)


def set_learning_rate_(optimizer: Optimizer, factor: float) -> float:
    """Set every group to `factor` times its own base rate; returns the rate of the first group that follows `factor`.

    A group's base rate is the one that it was built with, kept in it as `initial_lr`. A group with
    `constant_rate=True` (`parameter_groups`) stays at its base rate.
    """
    for group in optimizer.param_groups:
        base = group.setdefault("initial_lr", group["lr"])
        group["lr"] = base if group.get("constant_rate") else base * factor
    following = [group for group in optimizer.param_groups if not group.get("constant_rate")]
    return float((following or optimizer.param_groups)[0]["lr"])


class Together(Optimizer):
    """Several optimizers as one: CPC v2 fine-tunes its classifier by SGD while its encoder has Adam (section A.4).

    Args: `optimizers`: each with parameters of its own, whose groups this one lists as its own.

    Raises ValueError for none, and for a parameter that two of them have.

    Example: `Together([SGD(a.parameters(), 0.1), Adam(b.parameters(), 1e-3)]).step()` steps both.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        parameters = [id(parameter) for group in groups for parameter in group["params"]]
        if not groups or len(set(parameters)) < len(parameters):
            raise ValueError(f"{len(optimizers)} optimizers of {len(parameters)} parameters: pass some, and none twice")
        self.optimizers = list(optimizers)
        super().__init__(groups, {})
        self.param_groups = groups  # the optimizers' own, so that rates set here reach them

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each; a closure, which would be called once for each, is refused."""
        if closure is not None:
            raise ValueError("several optimizers cannot share a closure: call backward before step")
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """As one optimizer has it, whose parameters are all of them, numbered in order."""
        state: dict[int, Any] = {}
        groups: list[Group] = []
        first = 0
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            state |= {first + i: entry for i, entry in own["state"].items()}
            groups += [group | {"params": [first + i for i in group["params"]]} for group in own["param_groups"]]
            first += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave; ValueError for other groups."""
        sizes, own = ([len(g["params"]) for g in groups] for groups in (state_dict["param_groups"], self.param_groups))
        if sizes != own:
            raise ValueError(f"the state of groups of {sizes} parameters for {own}: pass that of optimizers like these")
        groups = iter(state_dict["param_groups"])
        for optimizer in self.optimizers:
            mine = [next(groups) for _ in optimizer.param_groups]
            numbers = {number for group in mine for number in group["params"]}
            state = {number: entry for number, entry in state_dict["state"].items() if number in numbers}
            optimizer.load_state_dict({"state": state, "param_groups": mine})  # by order, whatever the numbers
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


# ---- parameter groups ----


def parameter_groups(
    module: nn.Module, *, exclude: bool = True, exclude_also: Sequence[str] = (), constant_rate: Sequence[str] = ()
) -> list[Group]:
    """The parameters that learn, in the groups that an optimizer takes: each parameter once, no group empty.

    Args:
        module: parameters that do not require a gradient are left out.
        exclude: put biases and normalisation (every parameter of at most one dimension, and all of a BatchNorm,
            InstanceNorm, GroupNorm, LayerNorm or RMSNorm) in groups with `weight_decay=0.0, adapt=False`: without decay
            and without LARS's trust ratio, as SimCLR and BYOL have it. False: one rule for all (SimSiam, MoCo v1).
        exclude_also: the beginnings of names, in whole parts ("predictor" is "predictor.0.weight", and not
            "predictors.weight"), of parameters that join those left out: a classifier that starts at zero, whose steps
            the trust ratio would hold at a thousandth of next to nothing (google-research/simclr's `head_supervised`).
        constant_rate: likewise, for groups with `constant_rate=True`, which `set_learning_rate_` leaves at the base
            rate (SimSiam's predictor).

    The order is fixed: constant rates last, decayed before excluded, and in a group the module's own. torch's
    optimizers keep the keys that they do not know.

    Raises ValueError for a name in `exclude_also` or `constant_rate` that no such parameter begins with.

    Example: `parameter_groups(nn.Linear(3, 2))` is [{"params": [weight]},
    {"params": [bias], "weight_decay": 0.0, "adapt": False}].
    """
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for argument, beginnings in {"exclude_also": exclude_also, "constant_rate": constant_rate}.items():
        for beginning in beginnings:
            if not any(_begins(name, beginning) for name in learning):
                known = ", ".join(dict.fromkeys(name.split(".")[0] for name in learning))
                raise ValueError(f"{argument}={beginning!r} begins no learned parameter's name: pass one of {known}")
    norms = {id(p) for layer in module.modules() if isinstance(layer, _NORMS) for p in layer.parameters()}
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in learning.items():
        constant = any(_begins(name, beginning) for beginning in constant_rate)
        excluded = exclude and (parameter.ndim <= 1 or id(parameter) in norms)
        excluded = excluded or any(_begins(name, beginning) for beginning in exclude_also)
        found.setdefault((constant, excluded), []).append(parameter)
    return [
        {"params": found[constant, excluded]}
        | ({"weight_decay": 0.0, "adapt": False} if excluded else {})
        | ({"constant_rate": True} if constant else {})
        for constant, excluded in sorted(found)
    ]


def _begins(name: str, beginning: str) -> bool:
    return f"{name}.".startswith(f"{beginning.rstrip('.')}.")


# ---- LARS ----


class LARS(Optimizer):
    """Momentum SGD whose step is scaled, tensor by tensor, to the size of the weights (You et al. 2017).

    g = gradient + weight_decay * w;  r = trust * |w| / |g|, and 1 where |w| or |g| is 0;

        convention="simclr":    v = momentum * v + lr * r * g;  w = w - v         (google-research/simclr)
        convention="moco_v3":   v = momentum * v + r * g;       w = w - lr * v    (facebookresearch/moco-v3)

    At a constant rate both take the same steps. Where the rate changes, "simclr" lets a step keep the rate that it was
    taken with, as Caffe and You et al. do, and "moco_v3" applies today's to all, as torch.optim.SGD does.

    Args:
        params: parameters, or groups of them; a group with `adapt=False` has r = 1 (`parameter_groups`).
        lr: learning rate, at least 0; SimCLR's is 0.3 for each 256 images of the global batch.
        momentum: 0 (none) to below 1.
        weight_decay: at least 0; inside r, so it is not decoupled.
        trust: eta, above 0.
        convention: see above.
        nesterov: take the step from where the momentum leads, momentum * v + (the new term of v), in place of v.

    A parameter without a gradient is left as it is, its momentum included. The norms stay on the device, those of
    half-precision tensors in float32. The only state is v, as `momentum_buffer`.

    Raises ValueError for a number out of its range or another convention, RuntimeError for a sparse gradient.

    Example: w = (3, 4) with gradient (0, 2), lr 1 and no weight decay has r = 0.001 * 5 / 2 and moves to (3, 3.995).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        convention: Literal["simclr", "moco_v3"] = "simclr",
        nesterov: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "convention": convention,
            "nesterov": nesterov,
            "adapt": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """As every optimizer's; raises ValueError for a number out of its range."""
        _check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; `closure`, where given, computes the loss and the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._move_(weights, group)
        return loss

    def _move_(self, weights: list[Tensor], group: Group) -> None:
        gradients = [w.grad for w in weights if w.grad is not None]
        if any(g.is_sparse for g in gradients):
            raise RuntimeError("LARS got a sparse gradient: build the embedding with sparse=False")
        rate_inside, rate_after = (group["lr"], 1.0) if group["convention"] == "simclr" else (1.0, group["lr"])
        updates = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        if group["adapt"]:
            torch._foreach_mul_(updates, _trust_ratios(weights, updates, group["trust"]))
        torch._foreach_mul_(updates, rate_inside)
        moves = self._with_momentum(weights, updates, group) if group["momentum"] else updates
        torch._foreach_add_(weights, moves, alpha=-rate_after)

    def _with_momentum(self, weights: list[Tensor], updates: list[Tensor], group: Group) -> list[Tensor]:
        velocities = [self._velocity(w) for w in weights]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates)
        if not group["nesterov"]:
            return velocities
        return list(torch._foreach_add(updates, velocities, alpha=group["momentum"]))

    def _velocity(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def _check_group(group: Group) -> None:
    if group["lr"] < 0:
        raise ValueError(f"lr={group['lr']}: pass a learning rate of at least 0")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum={group['momentum']}: pass a number from 0 (none) to below 1")
    if group["weight_decay"] < 0:
        raise ValueError(f"weight_decay={group['weight_decay']}: pass a number of at least 0")
    if group["trust"] <= 0:
        raise ValueError(f"trust={group['trust']}: pass a number above 0, or adapt=False in the group")
    if group["convention"] not in CONVENTIONS:
        raise ValueError(f"convention={group['convention']!r}: pass one of {', '.join(CONVENTIONS)}")
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov=True needs momentum: pass a momentum above 0")


def _trust_ratios(weights: Sequence[Tensor], updates: Sequence[Tensor], trust: float) -> list[Tensor]:
    """trust * |w| / |g| of each pair, 1 where a norm is 0; on the device, so that the host waits for nothing."""
    sizes, steepness = _norms(weights), _norms(updates)
    ratios = torch.where((sizes > 0) & (steepness > 0), trust * sizes / steepness, 1.0)
    return list(ratios.unbind())


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """|t| of each tensor, at least in float32: float16 ends at 65,504 and has nothing below 6e-8."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.stack(norms)
