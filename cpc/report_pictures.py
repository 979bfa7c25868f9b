"""The pictures of a report, from a finished run's export and its data: neighbours, what CPC predicts and is fed."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive_core.data import ImageDataset, Splits, evaluation_batches
from contrastive_core.metrics import contrast_hits
from contrastive_core.plots import BLUE, INK, new_figure, plot_retrieval, save_figure
from contrastive_core.randomness import Randomness
from cpc.context import turn, turn_back
from cpc.encoder_card import read_card
from cpc.features import load_encoder
from cpc.method import CPC
from cpc.patches import extract_patches
from cpc.prediction import positive_cells
from cpc.trained_cpc import load_cpc

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUERIES, BANK, NEIGHBOURS = 8, 1000, 7
"""Images asked about, images looked through, and images shown for each."""

PLACED, TOGETHER = 256, 32
"""Images whose predictions are placed on the grid, and how many of them are compared with one another."""

AUGMENTED, DRAWS = 4, 9
"""Patches that are augmented, and how often each."""


def as_data(draw: Callable[[Path], object]) -> str:
    """The PNG that `draw(path)` writes, as a data URI."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        draw(file)
        return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def some(dataset: ImageDataset, count: int) -> Tensor:
    """Images `n 3 h w` uint8, at most so many, drawn from the whole: folders are sorted by class."""
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
    return torch.cat([batch.images for batch in evaluation_batches(dataset.subset(drawn), batch_size=250)])


def encoded(encoder: Callable[[Tensor], Tensor], images: Tensor, at_once: int) -> Tensor:
    """Of uint8 images, some at a time."""
    with torch.inference_mode():
        return torch.cat([encoder(part.float() / 255) for part in images.split(at_once)])


def neighbours(run: Path, splits: Splits, file: Path) -> None:
    """Held-out images, where there are any, and the training images nearest to them by the mean of their latents."""
    encoder = load_encoder(run)
    bank = some(splits.train, BANK)
    queries = some(splits.train if splits.test is None else splits.test, QUERIES)
    features = [encoded(encoder, images, encoder.batch_size) for images in (queries, bank)]
    centred = [F.normalize(part - features[1].mean(0)) for part in features]
    nearest = (centred[0] @ centred[1].T).topk(NEIGHBOURS + 1).indices
    nearest = nearest[:, 1:] if splits.test is None else nearest[:, :-1]  # not the image itself
    plot_retrieval(queries, bank[nearest], file)


def predicted_scores(run: Path, images: Tensor, direction: str, offset: int) -> tuple[Tensor, tuple[int, int]]:
    """For each image the scores of all patches of all images, `n n rows cols`, and the context's cell on the grid.

    The context stands as far behind as the offset wants and in the middle across; the grid is the image's own. Raises
    KeyError for a direction or offset that the run has not.
    """
    encoder, method = load_encoder(run, readout="grid"), load_cpc(run)
    latents = encoded(encoder, images, encoder.batch_size)
    rows, cols = latents.shape[1:3]
    cell = ((rows - offset) // 2, cols // 2)
    with torch.inference_mode():
        targets, prediction = _contrasted(method, latents, direction, offset)
        scores = torch.einsum("q d, n r c d -> q n r c", prediction[:, cell[0], cell[1]], targets)
    return scores, cell


def _contrasted(method: CPC, latents: Tensor, direction: str, offset: int) -> tuple[Tensor, Tensor]:
    """Targets `b rows cols d'` and predictions `b rows - offset cols d'` of the turned grid, as the loss ranks them."""
    targets = method.target_projection(latents)
    ranked = method.ranked(targets)
    context = method.contexts[method.context_of[direction]](turn(latents, direction))
    return ranked(targets), ranked(method.heads[direction](context)[offset])


def predictions(run: Path, splits: Splits, file: Path, *, offset: int, count: int = 5) -> None:
    """What CPC expects `offset` rows below a cell: the image, the score of each of its patches, the best of others'."""
    images = some(splits.train if splits.test is None else splits.test, 40)
    scores, (row, col) = predicted_scores(run, images, "down", offset)
    given = read_card(run)[1]["input"]
    whole = _fit(images, given["image_size"])
    patches = extract_patches(whole, given["patch_size"], given["stride"]).flatten(0, 2)
    shown = range(0, min(count * 7, len(images)), 7)
    figure, grid = new_figure(len(shown), 2 + NEIGHBOURS, (0.95 * (2 + NEIGHBOURS), 1.02 * len(shown) + 0.3))
    for line, image in enumerate(shown):
        _framed(grid[line, 0], whole[image], given, (row, col), (row + offset, col))
        grid[line, 1].imshow(scores[image, image].numpy(), cmap="viridis")
        grid[line, 1].plot(col, row + offset, "s", markersize=9, markerfacecolor="none", color="white")
        others = scores[image].clone()
        others[image] = -torch.inf
        best = others.flatten().topk(NEIGHBOURS).indices
        for place, index in enumerate(best):
            patch = patches[int(index)]
            grid[line, 2 + place].imshow(patch.permute(1, 2, 0).numpy(), interpolation="nearest")
        for axes in grid[line]:
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, title in zip(grid[0], ["image", "fit", "of other images, best first"], strict=False):
        axes.set_title(title, fontsize=9, color=INK, loc="left").set_in_layout(False)
    save_figure(figure, file)


def positions(
    run: Path, images: Tensor, offsets: Sequence[int], *, together: int = TOGETHER
) -> dict[str, list[list[float]]]:
    """How often each cell of the grid is told from all cells of some images, by the direction it is predicted in.

    For each direction `rows cols` shares, means over the offsets that reach the cell from within the grid; NaN where
    none does. The images, uint8 `n 3 h w`, are compared in equal groups (or of one fewer) of at most `together`.

    Example: with `offsets=[2]` the first two rows of "down" are NaN.
    """
    encoder, method = load_encoder(run, readout="grid"), load_cpc(run)
    latents = encoded(encoder, images, encoder.batch_size)
    groups = latents.tensor_split(-(-len(latents) // together))
    found = {}
    with torch.inference_mode():
        for direction in method.directions:
            hits = torch.zeros_like(turn(latents[..., 0], direction))  # on the turned grid
            reached = torch.zeros_like(hits)
            for offset in offsets:
                hits[:, offset:] += torch.cat([_told(method, group, direction, offset) for group in groups])
                reached[:, offset:] += 1
            shares = hits.sum(0, keepdim=True) / reached.sum(0, keepdim=True)  # 0 / 0 is NaN
            found[direction] = turn_back(shares, direction)[0].tolist()
    return found


def _told(method: CPC, latents: Tensor, direction: str, offset: int) -> Tensor:
    """1.0 where the prediction scores its target highest of all, `b rows - offset cols` of the turned grid."""
    b, rows, cols, _ = latents.shape
    targets, predictions = _contrasted(method, latents, direction, offset)
    positive = positive_cells(b, rows, cols, offset, direction)
    hit = contrast_hits(predictions.flatten(0, 2), targets.flatten(0, 2), positive)
    return hit.float().view(predictions.shape[:3])


def augmented(run: Path, augment: nn.Module, splits: Splits, file: Path) -> None:
    """Some patches of training images, each as it is and as the run's augmentation draws it `DRAWS` times.

    `augment(patches b rows cols c ph pw in [0, 1], randomness)`. Of each image the patch with the most in it is taken.
    """
    given = read_card(run)[1]["input"]
    images = _fit(some(splits.train, AUGMENTED), given["image_size"]).float() / 255
    patches = extract_patches(images, given["patch_size"], given["stride"]).flatten(1, 2)
    busiest = patches.flatten(2).std(2).argmax(1)
    chosen = patches[torch.arange(len(patches)), busiest]
    alike = repeat(chosen, "b c ph pw -> b 1 draws c ph pw", draws=DRAWS)
    drawn = augment(alike, Randomness(0, 0, torch.arange(len(chosen))))[:, 0]
    figure, grid = new_figure(len(chosen), 1 + DRAWS, (0.72 * (1 + DRAWS) + 0.3, 0.72 * len(chosen) + 0.1))
    for line, patch in enumerate(chosen):
        for axes, shown in zip(grid[line], (patch, *drawn[line]), strict=True):
            axes.imshow(shown.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
    save_figure(figure, file)


def _fit(images: Tensor, size: int) -> Tensor:
    """The centre of images that are loaded larger than they are cut; smaller ones are enlarged, as for the encoder."""
    from torchvision.transforms.v2 import functional as vision

    if min(images.shape[-2:]) < size:
        images = vision.resize(images, [size], antialias=True)
    fitted: Tensor = vision.center_crop(images, [size, size])
    return fitted


def _framed(
    axes: Axes, image: Tensor, given: dict[str, int], context: tuple[int, int], target: tuple[int, int]
) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    for (row, col), colour in ((context, BLUE), (target, "white")):
        corner = (col * given["stride"] - 0.5, row * given["stride"] - 0.5)
        size = given["patch_size"]
        axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=colour, linewidth=1.8))
