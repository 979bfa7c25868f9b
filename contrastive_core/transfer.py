"""Tensors from the host to a device, without waiting for what the device is still doing."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` on the device, and of the dtype if one is given; one that is there already is returned as it is.

    CUDA copies a larger piece of ordinary memory only when all work before has been done, and the host waits for that.
    So the tensor goes by way of pinned memory, which torch keeps until the copy is done.

    Example: on a CPU `to_device(tensor, torch.device("cpu"))` is `tensor`.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)
