"""A trunk of torchvision's or timm's as those libraries write it: a plain state dict that their own model loads.

Ours wrap the trunk, so that the names begin with "trunk."; the rest is theirs already. Whether it fits is not guessed:
the library's model is built, the weights are loaded strictly, and the features are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from contrastive_core.encoders import MoCoViT, TimmTrunk, TorchvisionTrunk

LIBRARIES = ("torchvision", "timm")

_ONLY_AT_THE_START = ("zero_init_residual",)  # arguments that matter to the first weights alone


@dataclass(frozen=True)
class PlainTrunk:
    """A model of another library, without its classifier.

    library: "torchvision" or "timm". name, arguments: as the library's `get_model` or `create_model` takes them.
    small_stem: a 3x3 first convolution and no max-pool, which neither library has a name for.
    classifier: the child that torchvision's model ends with, e.g. "fc"; "" for timm, which leaves it out itself.

    Example: `PlainTrunk("torchvision", "resnet18", classifier="fc").build()` gives features `b 512`.
    """

    library: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    small_stem: bool = False
    classifier: str = ""

    def code(self) -> str:
        """The lines that build `model`; `build` runs the same steps."""
        given = "".join(f", {key}={value!r}" for key, value in self.arguments.items())
        if self.library == "timm":
            lines = ["import timm", "", f"model = timm.create_model({self.name!r}, num_classes=0{given})"]
        else:
            lines = ["import torchvision", "", f"model = torchvision.models.get_model({self.name!r}{given})"]
        if self.classifier:
            lines.append(f"model.{self.classifier} = torch.nn.Flatten()  # pre-training has no classifier")
        if self.small_stem:
            lines.append("model.conv1 = torch.nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)")
            lines.append("model.maxpool = torch.nn.Identity()")
        return "\n".join(["import torch", *lines])

    def build(self) -> nn.Module:
        """The library's model at random weights, `b 3 h w` normalised -> `b d`."""
        model: Any
        if self.library == "timm":
            import timm

            model = timm.create_model(self.name, num_classes=0, **self.arguments)
        else:
            from torchvision.models import get_model

            model = get_model(self.name, weights=None, **self.arguments)
        if self.classifier:
            setattr(model, self.classifier, nn.Flatten())
        if self.small_stem:
            model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
        return model


def plain_state(encoder: nn.Module) -> dict[str, Tensor]:
    """The trunk's weights by its library's own names.

    Example: `plain_state(TorchvisionTrunk("resnet18"))` has "conv1.weight", and no "fc.weight".
    """
    return {name.removeprefix("trunk."): tensor for name, tensor in encoder.state_dict().items()}


def plain_trunk(encoder: nn.Module, arguments: dict[str, Any], library: str) -> PlainTrunk:
    """The model of `library` that has this encoder's weights; its features are still to be compared.

    Args:
        encoder: a `TorchvisionTrunk`, `TimmTrunk` or `MoCoViT` (which is a timm vision transformer).
        arguments: of the encoder's constructor, as its card has them.
        library: "torchvision" or "timm"; a ResNet of the one is a ResNet of the other.

    Raises ValueError for another encoder, and for a library that has no such model.
    """
    if isinstance(encoder, MoCoViT):
        described = _vision_transformer(encoder, library)
    elif isinstance(encoder, TorchvisionTrunk | TimmTrunk):
        described = _by_name(isinstance(encoder, TimmTrunk), dict(arguments), library)
    else:
        raise ValueError(
            f"format={library}: the trunk of this run is {type(encoder).__name__}, which {library} does not have: "
            f"pass format=hub, onnx or torch_export"
        )
    _check_loads(described, encoder)
    return described


def _vision_transformer(encoder: MoCoViT, library: str) -> PlainTrunk:
    if library != "timm":
        raise ValueError(f"format={library}: MoCo v3's vision transformer is built on timm's: pass format=timm")
    trunk = encoder.trunk
    sizes = {"img_size": encoder.image_size, "patch_size": encoder.patch_size, "embed_dim": encoder.dim}
    return PlainTrunk(
        "timm",
        "vit_small_patch16_224",
        {**sizes, "depth": len(trunk.blocks), "num_heads": trunk.blocks[0].attn.num_heads},
    )


def _by_name(is_timms: bool, arguments: dict[str, Any], library: str) -> PlainTrunk:
    name = str(arguments.pop("name"))
    node, small_stem = arguments.pop("node", "layer4"), bool(arguments.pop("small_stem", False))
    for each in _ONLY_AT_THE_START:
        arguments.pop(each, None)
    if is_timms != (library == "timm") and arguments:
        raise ValueError(
            f"format={library}: the trunk was built with {', '.join(arguments)}, which are "
            f"{'timm' if is_timms else 'torchvision'}'s: pass format={'timm' if is_timms else 'torchvision'}"
        )
    if library == "timm":
        return PlainTrunk(library, name, arguments, small_stem)
    from torchvision.models import get_model, list_models

    if name not in list_models():
        raise ValueError(f"format=torchvision: torchvision has no model {name!r}: pass format=timm")
    with torch.device("meta"):
        classifier = list(get_model(name, weights=None, **arguments).named_children())[-1][0]
    trunk = PlainTrunk(library, name, arguments, small_stem, classifier)
    if not is_timms and name.startswith(("resnet", "resnext", "wide_resnet")) and node != "layer4":
        raise ValueError(f"format=torchvision: the trunk ends at {node}, not before {classifier}: pass format=onnx")
    return trunk


def _check_loads(trunk: PlainTrunk, encoder: nn.Module) -> None:
    """Raise ValueError in one line where the library has no such model, or it wants other weights."""
    wanted = _described(trunk)
    found = {name: tuple(tensor.shape) for name, tensor in plain_state(encoder).items()}
    wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if wrong:
        theirs, ours = (shapes.get(wrong[0], "missing") for shapes in (wanted, found))
        raise ValueError(
            f"format={trunk.library}: {len(wrong)} weights of {trunk.library}'s {trunk.name} differ from this trunk's, "
            f"{wrong[0]} is {theirs} there and {ours} here: pass format=hub, onnx or torch_export"
        )


def _described(trunk: PlainTrunk) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in trunk.build().state_dict().items()}
    except ImportError:
        raise ImportError('timm is not installed: pip install "cpc-images[vit]"') from None
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"format={trunk.library}: {trunk.library} has no model {trunk.name!r} ({first})") from None


def loaded(trunk: PlainTrunk, state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The library's model with these weights, strictly loaded, in eval mode."""
    model = trunk.build()
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
