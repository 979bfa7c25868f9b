"""A picture of what the method sees: an image with its patch grid, the patches, and the patches as augmented.

python tools/show_patches.py --image photo.jpg --size 80 --stride 36 --image-size 260 --seed 0 --out patches.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from contrastive_core.data.images import as_rgb
from contrastive_core.plots import save_figure
from contrastive_core.randomness import Randomness
from cpc.patch_augment import PatchAugment, patch_augment_digits, patch_augment_v1, patch_augment_v2
from cpc.patches import extract_patches, tile_patches

if TYPE_CHECKING:  # drawing is loaded when something is drawn
    from matplotlib.figure import Figure
    from PIL import Image

RECIPES: dict[str, Callable[[], PatchAugment]] = {
    "v1": patch_augment_v1,
    "v2": patch_augment_v2,
    "digits": patch_augment_digits,
}


def open_image(file: Path | None) -> Image.Image:
    """The image in a file as RGB; None: the photograph that scikit-learn bundles.

    Raises:
        ValueError: in one line, if there is no such file or it holds no image.
    """
    from PIL import Image, ImageOps

    if file is None:
        from sklearn.datasets import load_sample_images

        return Image.fromarray(load_sample_images().images[0])
    try:
        with Image.open(file) as opened:
            return as_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise ValueError(f"no file {file}: pass --image with a picture, or leave it out for a bundled one") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise ValueError(f"{file} can't be read as an image ({fault}): pass a JPEG or PNG") from None


def centre_square(image: Image.Image, side: int) -> Tensor:
    """The image resized to `side` px on its shorter side and cropped at the centre: 1 3 side side in [0, 1].

    Raises:
        ValueError: if the image is smaller than that; enlarged pixels would show nothing.
    """
    from torchvision.transforms.v2 import functional as F

    if min(image.size) < side:
        raise ValueError(
            f"the image is {image.width}x{image.height} px, --image-size is {side}: lower it, and --size and --stride"
        )
    return F.to_dtype(F.pil_to_tensor(F.center_crop(F.resize(image, [side]), [side])), scale=True)[None]


def draw(image: Tensor, patches: Tensor, augmented: Tensor, stride: int, recipe: str) -> Figure:
    """Three panels: the image c h w with its grid, the patches rows cols c ph pw, the augmented patches."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows, cols, _, size, _ = patches.shape
    overlap = f"{size - stride} px shared by neighbours" if stride < size else "no pixel shared"
    gap = max(1, size // 16)
    panels = [
        (image, f"image, {image.shape[2]}x{image.shape[1]} px"),
        (tile_patches(patches, gap), f"{rows}x{cols} patches of {size} px at stride {stride}\n{overlap}"),
        (tile_patches(augmented, gap), f"augmented ({recipe})\neach patch on its own"),
    ]
    figure = Figure(figsize=(15, 5.45), layout="constrained")
    for axes, (picture, title) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=13)
        axes.axis("off")
        axes.set_anchor("S")  # the space that is left goes to the titles
        if picture is image:
            for row in range(rows):
                for col in range(cols):
                    corner = (col * stride - 0.5, row * stride - 0.5)
                    axes.add_patch(
                        Rectangle(corner, size, size, fill=False, edgecolor="white", linewidth=0.7, alpha=0.7)
                    )
            axes.add_patch(Rectangle((-0.5, -0.5), size, size, fill=False, edgecolor="gold", linewidth=2.5))
    return figure


def show_patches(
    file: Path | None,
    out: Path,
    *,
    image_size: int,
    size: int,
    stride: int,
    seed: int,
    augment: PatchAugment,
    recipe: str,
) -> None:
    """Write the picture of `draw` for one image to `out`, PNG.

    Raises:
        ValueError: in one line, for a missing or unreadable file, an image too small, or a grid that doesn't fit.
    """
    image = centre_square(open_image(file), image_size)
    patches = extract_patches(image, size, stride)
    augmented = augment(patches, Randomness(seed, step=0, places=torch.tensor([0])))
    figure = draw(image[0], patches[0], augmented[0], stride, recipe)
    save_figure(figure, out)


EPILOG = """examples:
  python tools/show_patches.py                                            a bundled photograph, as the paper cuts it
  python tools/show_patches.py --image photo.jpg --out mine.png           your own
  python tools/show_patches.py --image-size 64 --size 16 --stride 8       as the recipe for small photographs cuts it

exit codes: 0 done, 2 a mistake"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; a fault in what it is given is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="show_patches",
        description=__doc__.partition("\n")[0] if __doc__ else None,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="picture to cut (default: one that scikit-learn bundles)"
    )
    parser.add_argument("--image-size", type=int, default=260, help="pixels a side of the square cut from it")
    parser.add_argument("--size", type=int, default=80, help="pixels a side of a patch")
    parser.add_argument("--stride", type=int, default=36, help="pixels from one patch to the next")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="v2", help="which augmentations")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other augmentations")
    parser.add_argument("--out", type=Path, default=Path("patches.png"), metavar="FILE", help="PNG to write")
    asked = parser.parse_args(arguments)
    try:
        show_patches(
            asked.image,
            asked.out,
            image_size=asked.image_size,
            size=asked.size,
            stride=asked.stride,
            seed=asked.seed,
            augment=RECIPES[asked.recipe](),
            recipe=asked.recipe,
        )
    except (ValueError, OSError) as fault:
        print(f"show_patches: {fault}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {asked.out}")


if __name__ == "__main__":
    main()
