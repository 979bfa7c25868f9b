"""LayerNorm over the channels and pixels of each image, and the ReLU behind it: on a GPU in one kernel.

`torch.group_norm` knows channels-first alone on a GPU, and under autocast float32 alone; in a pre-activation ResNet in
channels_last the copies to and fro take more time than all convolutions. `contrastive_core.triton_layer_norm` has what
is used there instead; everywhere else it is torch's.
"""

from __future__ import annotations

from os import environ

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from contrastive_core.kernels import has_triton

_HALVES = (torch.float16, torch.bfloat16)


class LayerNorm(nn.GroupNorm):
    """y = weight * (x - mean) / sqrt(variance + 1e-5) + bias, moments over c, h and w: `n c h w` -> `n c h w`.

    Ba et al. 2016, with an affine pair a channel: torch's GroupNorm of one group, whose `state_dict` it has.

    Args:
        channels: c.

    On a GPU the result has the input's dtype under autocast as well, where GroupNorm gives float32; moments are
    float32's everywhere.

    Example: a constant image gives `bias` everywhere.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)

    def forward(self, images: Tensor) -> Tensor:
        return self._fused(images, relu=False) if supported(images) else super().forward(images)

    def rectified(self, images: Tensor) -> Tensor:
        """`relu(forward(images))`."""
        return self._fused(images, relu=True) if supported(images) else F.relu(super().forward(images))

    def _fused(self, images: Tensor, relu: bool) -> Tensor:
        in_order = images.contiguous(memory_format=torch.channels_last)
        result: Tensor = _layer_norm(in_order, self.weight, self.bias, self.eps, relu)[0]
        return result


def rectified(norm: nn.Module, images: Tensor) -> Tensor:
    """`relu(norm(images))`, in one kernel where the norm has one.

    Example: `rectified(nn.Identity(), images)` is `images.relu()`.
    """
    return norm.rectified(images) if isinstance(norm, LayerNorm) else F.relu(norm(images))


def supported(images: Tensor) -> bool:
    """Whether the kernels take these: a GPU that Triton compiles for, not float64, `n c h w` with a value or more.

    With TRITON_INTERPRET=1 in the environment from the start also on a CPU, slowly: how they are tested without a GPU.

    Example: `supported(torch.ones(1, 2, 3, 3))` is False, there being no GPU in it.
    """
    if torch.compiler.is_compiling():  # a graph has its own fusion, and cannot look into ours
        return False
    if images.ndim != 4 or not images.numel() or images.dtype not in (torch.float32, *_HALVES) or not has_triton():
        return False
    if images.device.type == "cpu":
        return environ.get("TRITON_INTERPRET") == "1"
    if images.device.type != "cuda" or torch.version.hip is not None:
        return False
    if isinstance(images, FakeTensor):  # a plan for a GPU that is elsewhere
        return True

    from contrastive_core.triton_sweep import runs_on

    return runs_on(images.device)


@torch.library.custom_op("contrastive_core::layer_norm", mutates_args=())
def _layer_norm(images: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and 1 / std of each image; images in channels_last."""
    from contrastive_core.triton_layer_norm import forward

    return forward(images, weight, bias, eps, relu)


@torch.library.custom_op("contrastive_core::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    gradient: Tensor, images: Tensor, weight: Tensor, bias: Tensor, means: Tensor, scales: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of images, weight and bias."""
    from contrastive_core.triton_layer_norm import backward

    in_order = gradient.contiguous(memory_format=torch.channels_last)
    d_images, d_weight, d_bias = backward(in_order, images, weight, bias, means, scales, relu)
    return d_images, d_weight.to(weight.dtype, copy=True), d_bias.to(bias.dtype, copy=True)


@_layer_norm.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    means, scales = (images.new_empty(len(images), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(images), means, scales


@_layer_norm_backward.register_fake
def _(
    gradient: Tensor, images: Tensor, weight: Tensor, bias: Tensor, means: Tensor, scales: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(images), torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    images, weight, bias, _, ctx.relu = inputs
    ctx.save_for_backward(images, weight, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, *of_moments):  # type: ignore[no-untyped-def]
    if gradient is None:
        return (None,) * 5
    return *_layer_norm_backward(gradient, *ctx.saved_tensors, ctx.relu), None, None


_layer_norm.register_autograd(_backward, setup_context=_keep)
