"""An encoder as its users want it, images in [0, 1] in, features out, read back from a run's folder.

Patch geometry and normalisation travel with the weights in `encoder.json` (`cpc.encoder_card`), so that nobody has to
remember them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from contrastive_core.heads import ProjectionHead
from contrastive_core.methods.classifier import Classifier
from cpc.context import ContextNetwork, Contexts
from cpc.encoder_card import LARGEST_DEPTH, MISFITS, build_encoder, check_bounds, parts_of, read_card
from cpc.patches import extract_patches, grid_side
from cpc.views import normalise

Built = TypeVar("Built", bound=nn.Module)

READOUTS = ("mean", "grid", "context")
MODES = ("patches", "image")


class FrozenEncoder(nn.Module):
    """Features of images `b 3 h w` in [0, 1]; another size is resized on its short side and cropped at the centre.

    Args:
        encoder: as pre-training left it.
        image_size: pixels a side that it is fed.
        load_size: pixels that the short side of another image is resized to before the crop, so that things are as
            large as they were in training; where that is less than image_size, whose views were enlarged in training,
            the image is, too. None = image_size.
        patch_size, stride: the grid it was trained on; None for an encoder of whole images.
        mean, std: normalisation.
        mode: "patches" encodes every patch of the grid; "image" runs the encoder over the whole image.
        readout: "mean" gives `b d`, "grid" gives `b rows cols d` (patch grid, or the encoder's feature map), "context"
            the patch grid with its n contexts, `b rows cols (1 + n) d` (`cpc.context.Contexts`).
        context: the context networks, of an encoder of patches that has them.

    `readout` and `mode` are plain attributes and may be changed at any time.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        image_size: int,
        load_size: int | None = None,
        mean: Sequence[float],
        std: Sequence[float],
        patch_size: int | None = None,
        stride: int | None = None,
        mode: str | None = None,
        readout: str = "mean",
        context: Contexts | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.context = encoder, context
        self.dim: int = encoder.dim  # type: ignore[assignment]  # nn.Module types attributes as Tensor | Module
        self.image_size, self.patch_size, self.stride = image_size, patch_size, stride
        self.load_size = load_size or image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.mode = mode or ("patches" if patch_size else "image")
        self.readout = readout
        self._learns = [name for name, weight in self.named_parameters() if weight.requires_grad]

    def thawed(self) -> FrozenEncoder:
        """A copy that learns, but for what is fixed as it is built: the patch projection of MoCo's ViT."""
        copied = copy.deepcopy(self)
        for name in self._learns:
            copied.get_parameter(name).requires_grad_(True)
        return copied

    @property
    def batch_size(self) -> int:
        """Images at a time for feature extraction: about 2,300 patches, which ResNet-161 encodes in 2 GiB."""
        if not self.patch_size:
            return 64
        return max(1, 2304 // grid_side(self.image_size, self.patch_size, self.stride or 1) ** 2)

    @property
    def grid_dim(self) -> int:
        """The width of a grid's cells, as the readout stands."""
        if self.readout == "context" and isinstance(self.context, Contexts):
            return self.context.dim
        return self.dim

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        images = normalise(self._fit(images), self.mean, self.std)
        images = images.to(next(self.encoder.parameters(), images).dtype)
        if self.mode == "patches":
            patches = extract_patches(images, self.patch_size or 0, self.stride or 0)
            features = self.encoder(rearrange(patches, "b rows cols c ph pw -> (b rows cols) c ph pw"))
            grid = rearrange(features, "(b rows cols) d -> b rows cols d", rows=patches.shape[1], cols=patches.shape[2])
            if self.readout == "context":
                contexts: Tensor = self.context(grid)  # type: ignore[misc]  # checked
                return contexts
            return grid if self.readout == "grid" else grid.mean((1, 2))
        if self.readout == "grid":
            return rearrange(self.encoder.feature_map(images), "b d rows cols -> b rows cols d")  # type: ignore[operator]
        whole: Tensor = self.encoder(images)
        return whole

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images have shape {tuple(images.shape)} and dtype {images.dtype}: pass floats b 3 h w in [0, 1]"
            )
        if self.mode not in MODES or self.readout not in READOUTS:
            raise ValueError(f"mode={self.mode!r}, readout={self.readout!r}: pass one of {MODES} and one of {READOUTS}")
        if self.mode == "patches" and not self.patch_size:
            raise ValueError('this encoder was trained on whole images and has no patch grid: pass mode="image"')
        if self.readout == "context" and (self.context is None or self.mode != "patches"):
            raise ValueError('readout="context" wants the context networks of a CPC run and its patches: pass "grid"')

    def _fit(self, images: Tensor) -> Tensor:
        if images.shape[-2:] == (self.image_size, self.image_size):
            return images
        from torchvision.transforms.v2 import functional as vision  # not with `import cpc`: half a second

        short = max(self.load_size, self.image_size)  # of less center_crop would make a picture in a black frame
        if min(images.shape[-2:]) != short:
            images = vision.resize(images, [short], antialias=True).clamp(0, 1)
        return vision.center_crop(images, [self.image_size, self.image_size])


def load_encoder(
    path: str | Path, *, readout: str = "mean", mode: str | None = None, encoder: nn.Module | None = None
) -> FrozenEncoder:
    """Read a run's encoder back, ready for use.

    Args:
        path: the run's folder, or its `encoder.safetensors`; `encoder.json` must stand beside it.
        readout: "mean" -> features `b d`; "grid" -> `b rows cols d`; "context" -> the grid with the n contexts of
            a CPC run, `b rows cols (1 + n) d`.
        mode: "patches" (the default where the encoder was trained on patches) or "image".
        encoder: the module to put the weights into, for an architecture that is not one of ours.

    Returns an `nn.Module` in eval mode: images `b 3 h w` in [0, 1] of any size -> features.

    Raises FileNotFoundError where a file is missing, ValueError where the card names an unknown encoder or the
    weights are another's.

    Example:
        encoder = cpc.load_encoder("runs/mnist5k-...")
        features = encoder(images)
    """
    encoder, card = read_encoder(path, encoder)
    context = load_contexts(path) if readout == "context" else None
    return _frozen(encoder, card, readout, mode, context)


def read_encoder(path: str | Path, encoder: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The bare encoder of a run with its weights, as trainable as it was built, and its card; `load_encoder`'s errors.

    It takes normalised images or patches; `FrozenEncoder(encoder, **card["input"])` feeds it.
    """
    weights, card = read_card(path)
    if encoder is None:
        encoder = _built_to_fit(lambda: build_encoder(card["architecture"]), weights, "encoder")
    _load_weights_(encoder, weights, "encoder")
    return encoder, card


def untrained_encoder(
    path: str | Path, *, seed: int = 0, readout: str = "mean", mode: str | None = None
) -> FrozenEncoder:
    """The same encoder at random initialisation: what `load_encoder(path)` has to beat with the same readout."""
    _, card = read_card(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(card["architecture"])
        context = build_contexts(card) if readout == "context" else None
    return _frozen(encoder, card, readout, mode, context)


def _load_weights_(module: nn.Module, weights: Path, kind: str) -> None:
    _check_there(weights)
    try:
        module.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights in {weights} are not those of the {kind} that its card describes: {error}"
        ) from None


def _check_there(weights: Path) -> None:
    if not weights.is_file():
        raise FileNotFoundError(f"no {weights.name} in {weights.parent}, though its card tells of one: copy it too")


def _built_to_fit(
    build: Callable[[], Built],
    weights: Path,
    kind: str,
    stored: Callable[[Built], nn.Module] = lambda built: built,
) -> Built:
    """What `build` builds, once it is seen without memory that the file's tensors are its: a card may say anything.

    stored: the part of it that is in the file.
    """
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in stored(build()).state_dict().items()}
    _check_there(weights)
    try:
        with safe_open(weights, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"the weights in {weights} cannot be read: {error}") from None
    wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if wrong:
        of_file, of_card = (shapes.get(wrong[0], "missing") for shapes in (found, wanted))
        raise ValueError(
            f"the weights in {weights} are not those of the {kind} that its card describes: {wrong[0]} is {of_file} in "
            f"the file, {of_card} by the card"
        )
    return build()


def _frozen(
    encoder: nn.Module, card: dict[str, Any], readout: str, mode: str | None, context: Contexts | None
) -> FrozenEncoder:
    channels_last = encoder.to(memory_format=torch.channels_last)
    frozen = FrozenEncoder(channels_last, **card["input"], mode=mode, readout=readout, context=context)
    return frozen.eval().requires_grad_(False)


# ---- what stands beside an encoder: the head that pre-training had, the classifier that fine-tuning left ----


def load_head(path: str | Path) -> ProjectionHead:
    """Read the projection head of a run's pre-training back, features `b d` -> projections `b out`, in train mode.

    Args: `path`: as `load_encoder`'s.

    Raises FileNotFoundError where a file is missing, ValueError where the run has no head or its card is another's.
    """
    weights, card = read_card(path)
    if not card.get("head"):
        raise ValueError(
            f"the run in {weights.parent} has no projection head ({card.get('method')}): pass head_layer=0"
        )
    weights = weights.with_name("head.safetensors")
    head = _built_to_fit(lambda: _build_head(card["head"]), weights, "head")
    _load_weights_(head, weights, "head")
    return head


def build_contexts(card: dict[str, Any]) -> Contexts:
    """The context networks that a card describes, at random weights; ValueError where it describes none, or badly."""
    described = card.get("context")
    if not described:
        raise ValueError(f'this run has no context networks ({card.get("method")}): pass readout="grid"')
    try:
        if len(described["networks"]) > LARGEST_DEPTH:
            raise ValueError(f"{len(described['networks'])} networks")
        for arguments in described["networks"].values():
            check_bounds(arguments)
        networks = {name: ContextNetwork(**arguments) for name, arguments in described["networks"].items()}
        return Contexts(nn.ModuleDict(networks), {d: str(described["context_of"][d]) for d in described["context_of"]})
    except MISFITS as error:
        raise ValueError(f"encoder.json describes context networks that cannot be built: {error!r}") from error


def load_contexts(path: str | Path) -> Contexts:
    """Read the context networks of a CPC run back, latents `b rows cols d` -> `b rows cols (1 + n) d`.

    Args: `path`: as `load_encoder`'s. Raises as `load_head`.
    """
    weights, card = read_card(path)
    weights = weights.with_name("context.safetensors")
    networks = _built_to_fit(lambda: build_contexts(card).networks, weights, "context networks")
    _load_weights_(networks, weights, "context networks")
    return Contexts(networks, card["context"]["context_of"])


def read_classifier(path: str | Path) -> tuple[Classifier, dict[str, Any]]:
    """The bare classifier of a fine-tuned or distilled run, as trainable as it was built, and the run's card.

    Raises ValueError for a run that has none, else as `load_encoder`.
    """
    weights, card = read_card(path)
    described = card.get("classifier")
    if not described:
        raise ValueError(
            f"the run in {weights.parent} has no classifier ({card.get('method')}): pass a fine-tuned one's folder"
        )
    encoder, card = read_encoder(path)
    weights = weights.with_name("classifier.safetensors")

    def stored(classifier: nn.Module) -> nn.Module:
        return parts_of(classifier)["classifier"]

    classifier = _built_to_fit(lambda: _build_classifier(encoder, described), weights, "classifier", stored)
    _load_weights_(stored(classifier), weights, "classifier")
    return classifier, card


def _build_classifier(encoder: nn.Module, described: dict[str, Any]) -> Classifier:
    try:
        kept = _build_head(described["head"]).upto(described["head_layer"]) if described["head"] else None
        return Classifier(encoder, classes=len(described["class_names"]), head=kept)
    except MISFITS as error:
        raise ValueError(f"encoder.json describes a classifier that cannot be built: {error!r}") from error


def load_classifier(path: str | Path) -> FrozenClassifier:
    """Read a fine-tuned or distilled run back, ready for use: images `b 3 h w` in [0, 1] -> logits `b classes`.

    Args: `path`: as `load_encoder`'s. Raises as `read_classifier`.

    Example:
        classes = load_classifier("runs/finetuned")(images).argmax(1)
    """
    classifier, card = read_classifier(path)
    classifier.to(memory_format=torch.channels_last)
    frozen = FrozenClassifier(classifier, card["input"], card["classifier"]["class_names"])
    return frozen.eval().requires_grad_(False)


class FrozenClassifier(nn.Module):
    """Logits of images `b 3 h w` in [0, 1]; another size is resized and cropped as `FrozenEncoder` does.

    Args:
        classifier: of whole images.
        fed: what a card calls `input`: image_size, mean, std and perhaps load_size.
        class_names: a name a class.
    """

    def __init__(self, classifier: Classifier, fed: dict[str, Any], class_names: Sequence[str]) -> None:
        super().__init__()
        self.encoder = FrozenEncoder(classifier.encoder, **fed, mode="image")
        self.head, self.classifier = classifier.head, classifier.classifier
        self.class_names = tuple(class_names)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.head(self.encoder(images)))
        return logits


def _build_head(arguments: dict[str, Any]) -> ProjectionHead:
    try:
        check_bounds(arguments)
        return ProjectionHead(**arguments)
    except MISFITS as error:
        raise ValueError(f"the card's head is no ProjectionHead's: {error}") from None
