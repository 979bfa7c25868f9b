"""Weights, gradients and optimizer state split over the processes: each holds an n-th (torch's `fully_shard`, FSDP2).

A block's weights are brought together for its forward pass and again for its backward pass, and its gradients go to the
processes that hold them. The step is the same as with everything everywhere, to rounding. What is split is a DTensor;
`whole` puts one together, which all processes have to do at once.

torch's part of it is imported where it is used: it takes as long as a fifth of all else that a command loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from contrastive_core.gather import world
from contrastive_core.losses import Temperature


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with modules of their own that stand in a Sequential or a ModuleList, in order.

    Those are a network's blocks: residual ones, a transformer's, CPC's context networks. A traced trunk (torchvision's
    feature extraction) has none, since it calls its layers one by one.

    Example: of `nn.Sequential(nn.Linear(2, 2), Block())` the second, if a Block holds layers.
    """
    for child in module.children() if not isinstance(module, GraphModule) else ():
        listed = isinstance(module, nn.Sequential | nn.ModuleList)
        composite = not isinstance(child, nn.Sequential | nn.ModuleList) and any(True for _ in child.children())
        if listed and composite and any(True for _ in child.parameters()):
            yield child
        else:
            yield from blocks_of(child)


def shard_(module: nn.Module, device: torch.device) -> None:
    """Split a module's parameters over all processes in place, a block at a time; what is in no block goes together.

    Every process has to call it, with equal weights on `device`. Optimizers are made of the parameters afterwards.
    Weights in channels_last become contiguous, as `fully_shard` wants them. Learned temperatures stay within bounds.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(device.type, (world()[1],))
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if any(isinstance(part, Temperature) for part in module.modules()):
        module.register_forward_pre_hook(_bound_, prepend=True)


def _bound_(module: nn.Module, _: Any) -> None:
    """Put learned temperatures back to their bounds, before weights are gathered: what a forward writes is lost."""
    for part in module.modules():
        if isinstance(part, Temperature):
            part.bound_()


def whole(tensor: Tensor) -> Tensor:
    """A split tensor put together, on every process, which all must ask for at once; any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all hold, split as `like` is; as it is where `like` is not split."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    own = tensor.to(like.device)
    if own.ndim == 0:  # a learned number, as it was saved while it had no rows
        own = own.reshape(like.shape)
    return distribute_tensor(own, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole_(target: nn.Module, source: nn.Module) -> None:
    """Copy parameters and buffers of a split module into a whole one like it; every process has to call it."""
    pairs = zip(target.state_dict(keep_vars=True).values(), source.state_dict(keep_vars=True).values(), strict=True)
    for own, other in pairs:
        own.copy_(whole(other))
