"""The known short-cuts of patch prediction, and how much of a trained CPC's success they are.

A patch can be predicted without knowing what is in the image: by the pixels that it shares with the context, by the
image's colours and light (Doersch et al. 2015, section 3; Henaff et al. 2020, appendix A), by what batch statistics
tell of the patches that were encoded beside it (Henaff et al. 2020, section 3 and figure 3: LayerNorm in place of
BatchNorm), and, where the negatives are of other images, by anything that all patches of an image have in common. Each
detector takes one of these away, or lets it in, and measures the method's own loss and accuracy again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from contrastive_core.augment.colour import grey
from contrastive_core.losses import SigmoidLoss, cosine_info_nce
from contrastive_core.method import Batch
from contrastive_core.metrics import spread_rows
from contrastive_core.randomness import Randomness
from cpc.method import CPC
from cpc.negatives import Compared, at_random, of_other_images, of_the_same_image, query_keys
from cpc.prediction import first_disjoint_offset
from cpc.views import PatchViews

MARGIN = 0.02
"""Of accuracies: less is luck. 128 predictions a batch, direction and offset are looked at."""

KNOWN = 0.05
"""Nats below chance: a method that knows less has learned nothing that could be told apart."""

LARGEST_SHARE = 0.1
"""Of the nats that a method knows may hang on colour, or on the pixels that a target shares with its context."""

MOVED = 0.01
"""Of the largest latent: more is no rounding, not even that of TF32, whose numbers have 10 bits."""


class Score(NamedTuple):
    """Means over batches, directions and offsets: `loss` in nats with what it is for scores of 0; `accuracy` 0..1 with
    what guessing has, 1 / (1 + negatives)."""

    loss: float
    chance_loss: float
    accuracy: float
    chance: float

    @property
    def known(self) -> float:
        """Nats below chance. Example: `Score(1.5, 2.0, 0.5, 0.1).known` is 0.5."""
        return self.chance_loss - self.loss

    def row(self, case: str) -> dict[str, Any]:
        """A row of a table. Example: `Score(1.0, 2.0, 0.5, 0.1).row("grey")["case"] == "grey"`."""
        return {"case": case, **self._asdict()}


@dataclass(frozen=True)
class Finding:
    """What one detector found: whether the short-cut is taken, in one plain line, and the rows that it was read off.

    found: None = cannot be told of this run or these images.
    """

    shortcut: str
    found: bool | None
    verdict: str
    rows: list[dict[str, Any]]


# ---- measuring ----


def varied(method: CPC, **changes: Any) -> CPC:
    """The same method with other attributes (offsets, negatives, encoder ...); weights are shared, the given one stays.

    Example: `varied(method, negatives="same_image")` contrasts with patches of the same image alone.
    """
    other = copy.copy(method)
    other._modules = dict(method._modules)  # a module that is set would land in both
    for name, value in changes.items():
        other._modules.pop(name, None)  # else a loss that is a module could only give way to another module
        setattr(other, name, value)
    return other


@torch.no_grad()
def measure(method: CPC, batches: Sequence[Batch]) -> Score:
    """The method's own loss and accuracy on batches whose view is a patch grid; raises its ValueErrors."""
    return _mean([_score(method, method.represent(batch)) for batch in batches])


def _score(method: CPC, representations: dict[str, Tensor]) -> Score:
    loss, metrics = method.contrast(representations)
    chance = 1 / (1 + float(metrics["negatives"]))
    return Score(float(loss), float(metrics["chance_loss"]), float(metrics["accuracy"]), chance)


def _mean(scores: Sequence[Score]) -> Score:
    return Score(*torch.tensor(scores, dtype=torch.float64).mean(0).tolist())


def patch_batches(images: Tensor, batch_size: int, views: PatchViews, device: torch.device) -> list[Batch]:
    """Batches of the grids of images `n 3 s s` uint8; a last one that is not full is left out, unless it is the only.

    Random negatives are drawn by seed 0 and the batch's number, so that all measurements draw the same.
    """
    full = [part for part in images.split(batch_size) if len(part) == min(batch_size, len(images))]
    batches = []
    for step, part in enumerate(full):
        places = torch.arange(len(part))
        randomness = Randomness(0, step, places)
        batches.append(Batch(views(part.to(device), randomness), places, torch.full_like(places, -1), randomness))
    return batches


# ---- 1 overlap ----


_AHEAD = {"down": (-2, 0), "up": (-2, -1), "right": (-1, 0), "left": (-1, -1)}
"""By direction: the axis of pixels that it runs along, and the side of a target that the context is on: 0 = first."""


def without_strip(patches: Tensor, direction: str, width: int, *, near: bool) -> Tensor:
    """Patches `... ph pw` whose `width` pixels nearest to the context, or farthest from it, are the mean of the rest.

    Raises ValueError for a width that is not 1 .. side - 1.

    Example: downward the nearest are the upper rows: `without_strip(torch.tensor([[1.0], [0.0], [2.0]]), "down", 1,
    near=True).flatten()` is [1, 0, 2].
    """
    axis, side = _AHEAD[direction]
    pixels = patches.shape[axis]
    if not 0 < width < pixels:
        raise ValueError(f"width={width}: pass 1 to {pixels - 1} of {pixels} px")
    widths = (width, pixels - width)
    if (side == 0) == near:
        strip, rest = patches.split(widths, axis)
        return torch.cat([rest.mean((-2, -1), keepdim=True).expand_as(strip), rest], axis)
    rest, strip = patches.split(widths[::-1], axis)
    return torch.cat([rest, rest.mean((-2, -1), keepdim=True).expand_as(strip)], axis)


@torch.no_grad()
def stripped_accuracy(method: CPC, batches: Sequence[Batch], offset: int, width: int, *, near: bool) -> Score:
    """The score at one offset where all targets lack a strip; contexts see their patches whole."""
    scores = []
    for batch in batches:
        (grid,) = batch.views
        seen = method.represent(batch)
        for direction in method.directions:
            changed = replace(batch, views=(without_strip(grid, direction, width, near=near),))
            targets = method.represent(changed)["targets"]
            one = varied(method, offsets=(offset,), directions=(direction,))
            scores.append(_score(one, {**seen, "targets": targets}))
    return _mean(scores)


def overlap(method: CPC, batches: Sequence[Batch], size: int, stride: int) -> Finding:
    """Accuracy by offset, beside how many pixels its target shares with the context cell: max(0, size - k stride).

    The context of a cell sees that cell, so up to `first_disjoint_offset(size, stride)` - 1 a part of the target is
    known already, pixel for pixel. Candidates are the same at every offset, so accuracies can be compared. What is
    nearer is also easier to guess: so the shared pixels are taken out of the targets, and then as many on their far
    side, and the verdict goes by the offset where the largest share is

    copied = (loss without the shared - loss without the far) / (chance loss - loss)

    Args: size, stride: of the patches, in pixels.
    """
    rows = []
    for offset in sorted(method.offsets):
        shared = max(0, size - offset * stride)
        case = f"offset {offset}, " + (f"{shared} of {size} px shared" if shared else "no pixel shared")
        rows.append({"offset": offset, "shared_pixels": shared, **measure(_of(method, offset), batches).row(case)})
    disjoint = first_disjoint_offset(size, stride)
    inside = [row for row in rows if row["offset"] < disjoint]
    beyond = [row for row in rows if row["offset"] >= disjoint]
    if not inside:
        verdict = f"no: every offset predicted is at least {disjoint}, the first that shares no pixel with the context"
        return Finding("overlap", False, verdict, rows)
    told = []
    for row in inside:
        without = {
            near: stripped_accuracy(method, batches, row["offset"], row["shared_pixels"], near=near)
            for near in (True, False)
        }
        rows.append(without[True].row(f"offset {row['offset']} without the shared px"))
        rows.append(without[False].row(f"offset {row['offset']} without as many far px"))
        known = row["chance_loss"] - row["loss"]
        told.append(((without[True].loss - without[False].loss) / known if known > KNOWN else -math.inf, row, without))
    # of equal ones, as where nothing is known, the last
    copied, last, without = max(reversed(told), key=lambda each: each[0])
    found = copied > LARGEST_SHARE if copied > -math.inf else None
    then = (
        f"offset {beyond[0]['offset']}, which shares none, {_share(beyond[0]['accuracy'])}"
        if beyond
        else f"no offset without shared ones is predicted (pass method.offsets=[{disjoint}] or more)"
    )
    verdict = (
        f"{_yes(found)}: offset {last['offset']} shares {last['shared_pixels']} of {size} px with its context and is "
        f"right {_share(last['accuracy'])} of the time, {then}; without the shared px it is right "
        f"{_share(without[True].accuracy)}, without as many on the far side {_share(without[False].accuracy)}"
    )
    return Finding("overlap", found, verdict, rows)


def _of(method: CPC, offset: int) -> CPC:
    return varied(method, offsets=(offset,))


# ---- 2 colour ----


class GreyPatches(nn.Module):
    """Every patch grey, `b rows cols 3 ph pw` in [0, 1]: y = 0.299 r + 0.587 g + 0.114 b in all three channels."""

    def forward(self, patches: Tensor, randomness: Randomness) -> Tensor:
        flat = rearrange(patches, "b rows cols c ph pw -> (b rows cols) c ph pw")
        return grey(flat).reshape(patches.shape)


class LevelledPatches(nn.Module):
    """Every patch and channel brought to the same mean and contrast: x' = m + s (x - mean x) / max(std x, 0.01).

    Args: mean, std: m and s, three numbers each; the data's own leave a patch where the encoder expects it.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, patches: Tensor, randomness: Randomness) -> Tensor:
        mean, std = (patches.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        spread, level = torch.std_mean(patches, (-2, -1), correction=0, keepdim=True)
        return mean + std * (patches - level) / spread.clamp_min(0.01)


def colour(method: CPC, images: Tensor, batches_of: Callable[[Tensor, nn.Module | None], Sequence[Batch]]) -> Finding:
    """Loss and accuracy where every patch is grey, or has its own light, contrast and colour cast taken away.

    share = (loss without - loss) / (chance loss - loss), of the nats that are known

    The verdict goes by grey: light and contrast are what an image is made of, so levelled patches also lack content.

    Args:
        images: `n 3 s s` uint8.
        batches_of: grids of them, with a module that changes patches in [0, 1] before normalisation, or None.
    """
    whole = images.float() / 255
    std, mean = torch.std_mean(whole, (0, 2, 3))
    cases = {
        "unchanged": None,
        "every patch grey": GreyPatches(),
        "every patch levelled": LevelledPatches(mean.tolist(), std.tolist()),
    }
    scores = {case: measure(method, batches_of(images, change)) for case, change in cases.items()}
    rows = [score.row(case) for case, score in scores.items()]
    plain, in_grey, levelled = scores.values()
    if plain.known < KNOWN:
        verdict = f"cannot be told: the loss is {plain.loss:.3f}, by chance {plain.chance_loss:.3f}"
        return Finding("colour", None, verdict, rows)
    lost, also = (min(1.0, max(0.0, (score.loss - plain.loss) / plain.known)) for score in (in_grey, levelled))
    levelling = f"levelling each patch's light and contrast as well takes {_share(also)}"
    if bool((whole - grey(whole)).abs().max() < 0.01):
        verdict = f"no: these images have none; of the nats below chance {levelling}"
        return Finding("colour", False, verdict, rows)
    found = lost > LARGEST_SHARE
    verdict = (
        f"{_yes(found)}: grey takes {_share(lost)} of the nats below chance (right {_share(plain.accuracy)} of the "
        f"time, in grey {_share(in_grey.accuracy)}), {levelling}"
    )
    return Finding("colour", found, verdict, rows)


# ---- 3 batch statistics ----


class InCompany(nn.Module):
    """An encoder whose patches come some at a time and in another order: `n c ph pw` -> `n d`, in the order given.

    features[order] = concatenation of encoder(patches[order]) over groups of `group` patches

    Args:
        encoder: `n c ph pw` -> `n d`.
        group: patches that are encoded together.
        shuffle: whether a group's patches are drawn from the whole batch, always the same of as many; False: as they
            come, so that as many patches as an image has are one image's.

    An encoder that sees every patch by itself gives the same in any company.
    """

    def __init__(self, encoder: nn.Module, group: int, *, shuffle: bool) -> None:
        super().__init__()
        self.encoder, self.group, self.shuffle = encoder, group, shuffle
        self.dim: int = encoder.dim  # type: ignore[assignment]  # nn.Module types attributes as Tensor | Module

    def order(self, n: int) -> Tensor:
        """A permutation of n places, int64."""
        return torch.randperm(n, generator=torch.Generator().manual_seed(0)) if self.shuffle else torch.arange(n)

    def forward(self, patches: Tensor) -> Tensor:
        order = self.order(len(patches)).to(patches.device)
        features = torch.cat([self.encoder(part) for part in patches[order].split(self.group)])
        return features[order.argsort()]


def in_training(encoder: nn.Module) -> nn.Module:
    """A copy whose batch norms take the statistics of what they are given; all else stays in eval mode."""
    copied = copy.deepcopy(encoder)
    for module in copied.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    return copied


def batch_statistics(method: CPC, batches: Sequence[Batch]) -> Finding:
    """The loss in training mode, by which patches are encoded together: the batch's, an image's, or any.

    moved = max |z of any - z of an image's| / max |z of an image's|, over the latents z of the first batch

    An encoder without batch statistics gives the same latents, and so the same loss, in any company. Where patches are
    normalised by those that they are encoded with, a latent says something of the others, its target among them. The
    order alone changes nothing: batch statistics know none, so a whole batch in one call is the same however shuffled.
    """
    (grid,) = batches[0].views
    cells = grid.shape[1] * grid.shape[2]
    training = in_training(method.encoder)
    alone, mixed = (InCompany(training, cells, shuffle=shuffle) for shuffle in (False, True))
    encoders = {
        "evaluation mode": method.encoder,
        "the whole batch together": training,
        "an image's patches together": alone,
        "as many of any image": mixed,
    }
    scores = {case: measure(varied(method, encoder=encoder), batches) for case, encoder in encoders.items()}
    rows = [score.row(case) for case, score in scores.items()]
    with torch.no_grad():
        patches = rearrange(grid, "b rows cols c ph pw -> (b rows cols) c ph pw")
        latents, others = alone(patches), mixed(patches)
    moved = float((others - latents).abs().max() / latents.abs().max().clamp_min(1e-12))
    rows[-1]["latents_moved"] = moved
    _, together, of_image, of_any = scores.values()
    if not moved > MOVED:
        verdict = (
            f"no: a patch's latent is the same whichever patches it is encoded with (to {moved:.1g} of the largest)"
        )
        return Finding("batch statistics", False, verdict, rows)
    verdict = (
        f"yes: patches see each other: other company moves latents by {_share(moved)} of the largest, "
        f"and the loss is {together.loss:.3f} together, {of_image.loss:.3f} by image, {of_any.loss:.3f} among any"
    )
    return Finding("batch statistics", True, verdict, rows)


# ---- 4 whole-image statistics ----


@torch.no_grad()
def image_mean_accuracy(targets: Tensor, negatives: str, k: int) -> float:
    """How often the mean of an image's targets is nearest to each of them: what knowing the image alone finds.

    score(cell, j) = cos(mean of the image's targets but j - m, target j - m),  m the mean of all

    Args:
        targets: `b rows cols d`.
        negatives: what the cell is found among: all, other_images, same_image or random, as `CPC`'s.
        k: how many random ones.

    A candidate is left out of the mean: with a target in its own mean, patches that have nothing in common would be
    found. The score is the same for all cells of an image, so among the same image's it finds one of them at most,
    which is chance (a tie is a miss).

    Example: `image_mean_accuracy(torch.randn(2, 2, 2, 8), "same_image", 3)` is 0.25, one of the four.
    """
    b, rows, cols, _ = targets.shape
    cells, flat = rows * cols, rearrange(targets, "b rows cols d -> (b rows cols) d").double()
    centred = flat - flat.mean(0)
    keys = nn.functional.normalize(centred)
    sums = rearrange(centred, "(b cells) d -> b cells d", b=b).sum(1)
    positive = torch.arange(len(keys), device=keys.device)
    image = positive // cells
    scores = nn.functional.normalize(sums) @ keys.T
    scores[image, positive] = (nn.functional.normalize(sums[image] - centred) * keys).sum(1)
    compared: dict[str, Callable[[], Compared | None]] = {
        "all": lambda: None,
        "other_images": lambda: of_other_images(positive, cells, len(keys)),
        "same_image": lambda: of_the_same_image(positive, cells, len(keys)),
        "random": lambda: at_random(positive, _keys(b, len(keys), keys.device), k, positive),
    }
    chosen, among = spread_rows(len(keys), keys.device, 2048), compared[negatives]()
    found = scores[image[chosen]]
    own = found.gather(1, chosen[:, None]).squeeze(1)
    if among is not None:
        found.masked_fill_(~among(chosen), -torch.inf)
    return float((own > found.scatter_(1, chosen[:, None], -torch.inf).amax(1)).double().mean())


def _keys(b: int, n: int, device: torch.device) -> Tensor:
    randomness = Randomness(0, 0, torch.arange(b))
    return query_keys(randomness.integers("image mean", 1 << 62).to(device), n, "image mean")


def whole_image(method: CPC, batches: Sequence[Batch]) -> Finding:
    """Accuracy by which patches are told apart, beside what the image's mean latent alone finds.

    Random negatives are as many as those of the same image, so the two are told apart by chance equally often: what is
    right among random ones and not among the image's own is knowing the image, not the place.

    The sigmoid loss cannot leave candidates out: the loss is InfoNCE by cosine at its temperature instead.
    """
    (grid,) = batches[0].views
    cells = grid.shape[1] * grid.shape[2]
    if isinstance(method.loss, SigmoidLoss):
        method = varied(method, loss=partial(cosine_info_nce, temperature=float(method.loss.temperature())))
    with torch.no_grad():
        targets = [method.represent(batch)["targets"] for batch in batches]
    rows = []
    scores = {}
    for negatives in ("all", "other_images", "same_image", "random"):
        k = cells - 1
        changed = varied(method, negatives=negatives, negatives_k=k if negatives == "random" else None)
        scores[negatives] = measure(changed, batches)
        by_mean = sum(image_mean_accuracy(each, negatives, k) for each in targets) / len(targets)
        case = "negatives: " + (f"random {k}" if negatives == "random" else negatives)
        rows.append({**scores[negatives].row(case), "image_mean_accuracy": by_mean})
    same, random = (scores[name].accuracy - scores[name].chance for name in ("same_image", "random"))
    others, by_mean = scores["other_images"].accuracy, rows[1]["image_mean_accuracy"]
    also = f"among other images' it is right {_share(others)} of the time, the image's mean alone {_share(by_mean)}"
    if random < MARGIN:
        return Finding(
            "whole image", None, f"cannot be told: among random patches it is no better than chance; {also}", rows
        )
    found = same < random / 2
    verdict = (
        f"{_yes(found)}: among {cells - 1} of the same image it is right {_share(scores['same_image'].accuracy)} of "
        f"the time, among as many random ones {_share(scores['random'].accuracy)} (chance {_share(1 / cells)}); {also}"
    )
    return Finding("whole image", found, verdict, rows)


def _yes(found: bool | None) -> str:
    return "cannot be told" if found is None else "yes" if found else "no"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
