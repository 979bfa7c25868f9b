"""CPC's view of a batch: what is done in which order."""

import pytest
import torch

from contrastive_core.augment import RandomCrop
from contrastive_core.randomness import Randomness
from cpc.patches import extract_patches
from cpc.views import PatchViews, normalise, to_float

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def views(**options):
    return PatchViews(**{"image_size": 12, "patch_size": 4, "stride": 4, "mean": MEAN, "std": STD, **options})


def numbers(count, step=0):
    return Randomness(0, step, torch.arange(count))


@pytest.fixture
def images():
    return torch.randint(256, (2, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_without_augmentation_it_cuts_and_normalises(images):
    (patches,) = views()(images, numbers(2))
    assert patches.shape == (2, 3, 3, 3, 4, 4)
    whole = (images.double() / 255 - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(patches.double(), extract_patches(whole, 4, 4), rtol=0, atol=1e-5)
    (again,) = views()(images.float() / 255, numbers(2))
    assert torch.equal(again, patches)


def test_the_augmentations_see_0_to_1_in_order_and_normalisation_comes_last(images):
    seen = []

    def on_image(batch, randomness):
        seen.append(("image", batch.shape, float(batch.min()), float(batch.max()), batch.dtype))
        return batch

    def on_patches(patches, randomness):
        seen.append(("patches", patches.shape, float(patches.min()), float(patches.max()), patches.dtype))
        return torch.zeros_like(patches)

    images[0, 0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    (patches,) = views(image_augment=[on_image, on_image], patch_augment=on_patches)(images, numbers(2))
    shapes = [("image", (2, 3, 12, 12)), ("image", (2, 3, 12, 12)), ("patches", (2, 3, 3, 3, 4, 4))]
    assert seen == [(*what, 0.0, 1.0, torch.float32) for what in shapes]
    expected = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    assert torch.allclose(patches, expected[:, None, None].expand_as(patches))


def test_no_patch_depends_on_another(images):
    crop = views(image_augment=[RandomCrop(12, padding=2)], patch_augment=lambda patches, randomness: patches * 2)
    (together,) = crop(images, numbers(2))
    alone = [crop(images[i : i + 1], Randomness(0, 0, torch.tensor([i])))[0] for i in range(2)]
    assert torch.equal(together, torch.cat(alone))


def test_sizes_that_do_not_fit_say_what_to_do():
    with pytest.raises(ValueError, match=r"pass images of 12 px \(3 patches\) or 16 px \(4 patches\)"):
        views(image_size=14)
    with pytest.raises(
        ValueError, match="images are 16x16 px before cutting, image_size is 12: end image_augment with"
    ):
        views()(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), numbers(1))
    (cropped,) = views(image_augment=[RandomCrop(12)])(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), numbers(1))
    assert cropped.shape == (1, 3, 3, 3, 4, 4)


def test_normalising_a_known_pixel():
    pixel = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([(1 - 0.5) / 0.2, -0.4 / 0.25, (0.2 - 0.3) / 0.5]).view(1, 3, 1, 1)
    torch.testing.assert_close(normalise(to_float(pixel), MEAN, STD), expected)
