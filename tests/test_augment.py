"""The operations against other libraries, closed forms and the identity; the modules against their promises."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import kornia
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import ImageOps
from scipy import stats
from torch import Tensor, nn

from contrastive_core.augment import (
    AUTOAUGMENT,
    SIXTEEN,
    AutoAugmentPrimitives,
    CentreFit,
    ChannelDrop,
    ColourJitter,
    ElasticDeformation,
    GaussianBlur,
    GaussianNoise,
    HistogramRemap,
    InceptionColour,
    RandomAffine,
    RandomCrop,
    RandomCutout,
    RandomFlip,
    RandomGrey,
    RandomPhotometric,
    RandomQuarterTurn,
    RandomResizedCrop,
    RandomSobel,
    RandomSolarize,
    SpatialJitter,
    colour,
    drop_channels,
    elastic,
    geometry,
)
from contrastive_core.augment.blur import blur, tenth_of
from contrastive_core.augment.elastic import displacement
from contrastive_core.augment.geometry import affine, affine_matrix
from contrastive_core.augment.noise import noise_like
from contrastive_core.augment.primitives import partners
from contrastive_core.augment.rows import by_group, on_chosen, per_image
from contrastive_core.randomness import Randomness


def pictures(n: int = 8, c: int = 3, h: int = 20, w: int = 20, seed: int = 0) -> Tensor:
    """Smooth coloured pictures in whole levels of 255, so that 8-bit references read exactly the same pixels."""
    coarse = torch.rand(n, c, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear", align_corners=True)
    return (smooth * 255).round() / 255


def to_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def randomness(n: int, step: int = 0) -> Randomness:
    return Randomness(0, step, torch.arange(n))


def same(numbers: float, n: int = 8) -> Tensor:
    return torch.full((n,), numbers)


# --- pure functions: a parameter for the identity


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: colour.brightness(x, same(1.0)),
        lambda x: colour.contrast(x, same(1.0)),
        lambda x: colour.saturation(x, same(1.0)),
        lambda x: colour.brighten(x, same(0.0)),
        lambda x: colour.channel_contrast(x, same(1.0)),
        lambda x: colour.hsv_saturation(x, same(1.0)),
        lambda x: colour.shift_hue(x, same(0.0)),
        lambda x: colour.shift_hue(x, same(1.0)),
        lambda x: colour.shift_hue(x, same(-2.0)),
        lambda x: colour.sharpen(x, same(1.0)),
        lambda x: colour.solarize(x, same(1.01)),
        lambda x: colour.posterize(x, same(8)),
        lambda x: colour.invert(colour.invert(x)),
        lambda x: colour.remap_histogram(x, torch.ones(8, 3, 4)),
        lambda x: affine(x, affine_matrix(angle=same(0.0))),
        lambda x: affine(x, affine_matrix(angle=same(360.0), scale=same(1.0)), fill=None),
        lambda x: elastic(x, torch.zeros(8, 2, 4, 4)),
        lambda x: geometry.crop(x, torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64), (20, 24)),
        lambda x: geometry.resized_crop(x, torch.tensor([[0, 0, 20, 24]]).expand(8, 4), (20, 24)),
        lambda x: geometry.resized_crop(x, torch.tensor([[0, 0, 20, 24]]).expand(8, 4), (20, 24), antialias=True),
        lambda x: blur(x, same(0.0), 5),
        lambda x: blur(x, torch.linspace(0.1, 3.0, 8), 1),
        lambda x: geometry.flip(geometry.flip(x)),
        lambda x: geometry.cut_out(x, same(0.5), same(0.5), same(0.0)),
        lambda x: geometry.mix(x, 1 - x, same(0.0)),
    ],
)
def test_the_identity(operation: Callable[[Tensor], Tensor]) -> None:
    images = pictures(w=24)
    torch.testing.assert_close(operation(images), images, atol=1e-5, rtol=0)


# --- pure functions: the same numbers as PIL's operations, through torchvision, an image at a time


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.5, 1.0, 1.3, 1.9])
@pytest.mark.parametrize(
    ("ours", "theirs", "levels"),
    [
        (colour.brightness, tv.adjust_brightness, 1),
        (colour.saturation, tv.adjust_saturation, 2),  # torchvision rounds the grey image to levels first
        (colour.contrast, tv.adjust_contrast, 2),
        (colour.sharpen, tv.adjust_sharpness, 2),
    ],
)
def test_enhancements_are_torchvisions(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], levels: int, factor: float
) -> None:
    images = pictures()
    expected = theirs(to_bytes(images), factor).float() / 255
    assert (ours(images, same(factor)) - expected).abs().max() <= levels / 255 + 1e-6


def test_each_image_has_its_own_number() -> None:
    images, factor = pictures(), torch.linspace(0, 2, 8)
    together = colour.sharpen(images, factor)
    alone = torch.cat([colour.sharpen(images[i : i + 1], factor[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("threshold", [0, 1, 60, 128, 255, 256])
def test_solarize_is_torchvisions(threshold: int) -> None:
    images = pictures()
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    expected = to_bytes(images) if threshold == 256 else tv.solarize(to_bytes(images), threshold)
    assert torch.equal(to_bytes(colour.solarize(images, same(threshold / 255))), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize_is_torchvisions(bits: int) -> None:
    levels = torch.arange(256).view(1, 1, 16, 16).repeat(8, 3, 1, 1)  # every level there is
    ours = colour.posterize(levels / 255, same(bits))
    assert torch.equal(to_bytes(ours), tv.posterize(levels.to(torch.uint8), bits))
    torch.testing.assert_close(ours * 255, (ours * 255).round(), atol=1e-4, rtol=0)


def test_invert_and_auto_contrast_are_torchvisions() -> None:
    images = pictures() * 0.5 + 0.2
    images = to_bytes(images) / 255
    assert torch.equal(to_bytes(colour.invert(images)), tv.invert(to_bytes(images)))
    expected = tv.autocontrast(to_bytes(images)).float() / 255
    stretched = colour.auto_contrast(images)
    assert (stretched - expected).abs().max() <= 1 / 255 + 1e-6
    assert torch.equal(stretched.amin((2, 3)), torch.zeros(8, 3))
    torch.testing.assert_close(stretched.amax((2, 3)), torch.ones(8, 3))


def test_equalize_is_pils_where_pil_has_enough_pixels() -> None:
    images = pictures(4, h=256, w=256)
    expected = tv.equalize(to_bytes(images)).float() / 255
    # PIL's step is rounded down to a whole number of pixels; with 65,536 pixels that shifts a level by 1 or 2
    assert (colour.equalize(images) - expected).abs().max() <= 3 / 255


def test_equalize_on_paper() -> None:
    image = torch.tensor([10, 10, 20, 30, 30, 30, 30, 40.0]).view(1, 1, 2, 4) / 255
    expected = torch.tensor([0, 0, 2, 3, 3, 3, 3, 7.0]).view(1, 1, 2, 4) / 7  # pixels below, of 7 below the highest
    torch.testing.assert_close(colour.equalize(image), expected)


@pytest.mark.parametrize("operation", [colour.equalize, colour.auto_contrast])
def test_a_flat_channel_stays(operation: Callable[[Tensor], Tensor]) -> None:
    flat = torch.full((2, 3, 12, 12), 0.4)
    flat[0, 1, 0, 0] += 1e-4  # less than a level: interpolation noise, which must not be stretched to [0, 1]
    torch.testing.assert_close(operation(flat), flat)


def test_hue_and_saturation_are_kornias_and_torchvisions() -> None:
    images = pictures()
    for turns in (-0.5, -0.2, 0.0, 0.1, 1 / 3, 0.5):
        ours = colour.shift_hue(images, same(turns))
        torch.testing.assert_close(ours, tv.adjust_hue(images, turns), atol=2e-4, rtol=0)
        torch.testing.assert_close(ours, kornia.enhance.adjust_hue(images, turns * 2 * math.pi), atol=2e-4, rtol=0)
    for factor in (0.0, 0.5, 1.5, 4.0):
        ours = colour.hsv_saturation(images, same(factor))
        torch.testing.assert_close(ours, kornia.enhance.adjust_saturation(images, factor), atol=2e-4, rtol=0)


def test_a_third_of_a_turn_takes_red_to_green() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    green = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(colour.shift_hue(red, torch.tensor([1 / 3])), green, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_grey_pixels_have_no_hue(value: float) -> None:
    images = torch.full((1, 3, 4, 4), value)
    torch.testing.assert_close(colour.shift_hue(images, torch.tensor([0.3])), images)
    torch.testing.assert_close(colour.hsv_saturation(images, torch.tensor([1.5])), images)


def test_luminance_is_the_eyes() -> None:
    images = pictures()
    torch.testing.assert_close(
        colour.luminance(images), tv.rgb_to_grayscale(images, num_output_channels=1), atol=2e-4, rtol=0
    )
    assert torch.equal(colour.grey(images[:, :1]), images[:, :1])


def test_the_histogram_curve_on_paper() -> None:
    image = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).view(1, 1, 1, 5)
    slopes = torch.tensor([3.0, 1.0]).view(1, 1, 2)
    expected = torch.tensor([0.0, 0.375, 0.75, 0.875, 1.0]).view(1, 1, 1, 5)
    torch.testing.assert_close(colour.remap_histogram(image, slopes), expected)
    torch.testing.assert_close(colour.remap_histogram(image, 7 * slopes), expected)


# --- geometry


def test_a_quarter_turn() -> None:
    images = pictures()
    turned = affine(images, affine_matrix(angle=same(90.0)))
    torch.testing.assert_close(turned, torch.rot90(images, 1, (2, 3)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("angle", [-30.0, 7.0, 30.0])
@pytest.mark.parametrize("size", [(20, 20), (17, 24)])
def test_turns_are_torchvisions(angle: float, size: tuple[int, int]) -> None:
    images = pictures(h=size[0], w=size[1])
    expected = tv.rotate(images, angle, interpolation=tv.InterpolationMode.BILINEAR)
    torch.testing.assert_close(affine(images, affine_matrix(angle=same(angle))), expected, atol=1e-4, rtol=0)


def test_the_composition_is_torchvisions() -> None:
    images = pictures(h=17, w=24)
    matrix = affine_matrix(angle=same(-20.0), scale=same(1.2), shift_x=same(3.0), shift_y=same(-2.0))
    expected = tv.affine(
        images, angle=20.0, scale=1.2, translate=[3, -2], shear=[0.0, 0.0], interpolation=tv.InterpolationMode.BILINEAR
    )
    torch.testing.assert_close(affine(images, matrix), expected, atol=1e-4, rtol=0)


def test_the_matrix_is_the_product_of_its_parts() -> None:
    """Reading from shear @ turn @ (position - shift) / scale, multiplied out a matrix at a time in float64."""
    u = randomness(50).uniform("level", 6, low=-1, high=1).double()
    angle, shear_x, shear_y, shift_x, shift_y, log_scale = u.unbind(1)
    matrix = affine_matrix(
        angle=90 * angle, shear_x=shear_x, shear_y=shear_y, shift_x=shift_x, shift_y=shift_y, scale=log_scale.exp()
    )
    for i in range(50):
        a = math.radians(90 * angle[i])
        turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)
        shear = torch.tensor([[1, shear_x[i]], [shear_y[i], 1]], dtype=torch.float64)
        linear = shear @ turn / log_scale[i].exp()
        torch.testing.assert_close(matrix[i, :, :2], linear)
        torch.testing.assert_close(matrix[i, :, 2], -linear @ torch.stack([shift_x[i], shift_y[i]]))


def test_a_shear_is_pils() -> None:
    """PIL's AFFINE reads row y from x + slope y, about the corner; ours about the centre: a shift of slope centre."""
    images = pictures(1, h=21, w=21)
    ours = affine(images, affine_matrix(shear_x=torch.tensor([0.3])))
    image = tv.to_pil_image(to_bytes(images)[0])
    theirs = image.transform((21, 21), 0, (1, 0.3, -0.3 * 10.5, 0, 1, 0), resample=2)
    inside = slice(4, 17)
    assert (ours[0] - tv.to_image(theirs) / 255)[:, inside, inside].abs().max() < 2 / 255
    down = affine(images, affine_matrix(shear_y=torch.tensor([0.3])))
    across = affine(images.transpose(2, 3), affine_matrix(shear_x=torch.tensor([0.3]))).transpose(2, 3)
    torch.testing.assert_close(down, across, atol=1e-5, rtol=0)


def test_a_whole_shift_moves_pixels_and_fills() -> None:
    images = pictures()
    moved = affine(images, affine_matrix(shift_x=same(3.0), shift_y=same(-2.0)), fill=0.25)
    torch.testing.assert_close(moved[:, :, :-2, 3:], images[:, :, 2:, :-3], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[:, :, :, :3], torch.full_like(moved[:, :, :, :3], 0.25), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[:, :, -2:], torch.full_like(moved[:, :, -2:], 0.25), atol=1e-5, rtol=0)


def test_crops_read_their_windows() -> None:
    for h, w in ((20, 17), (19, 33)):
        images, top, left = pictures(h=h, w=w), torch.arange(8), torch.arange(8).flip(0)
        crops = geometry.crop(images, top, left, (12, 10))
        for i in range(8):
            assert torch.equal(crops[i], images[i, :, i : i + 12, 7 - i : 17 - i])
        beyond = geometry.crop(images, top + h - 2, left * 0 + w - 1, (4, 3))
        assert torch.equal(beyond[7], images[7, :, -1:, -1:].expand(3, 4, 3))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(16, 20), (40, 60), (7, 7)])
def test_resized_crops_are_torchvisions(size: tuple[int, int], antialias: bool) -> None:
    images = pictures(5, h=50, w=37)
    box = torch.tensor([[3, 4, 20, 30], [0, 0, 50, 37], [10, 0, 5, 7], [49, 36, 1, 1], [1, 7, 49, 30]])
    ours = geometry.resized_crop(images, box, size, antialias)
    for i, (top, left, height, width) in enumerate(box.tolist()):
        theirs = tv.resized_crop(images[i], top, left, height, width, list(size), antialias=antialias)
        torch.testing.assert_close(ours[i], theirs, atol=2e-5, rtol=0)


def test_an_antialiased_crop_is_exact_under_autocast() -> None:
    images, box = pictures(2, h=50, w=37), torch.tensor([[3, 4, 20, 30], [0, 0, 50, 37]])
    expected = geometry.resized_crop(images, box, (8, 8), antialias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(geometry.resized_crop(images, box, (8, 8), antialias=True), expected)
    assert geometry.resized_crop(images.to("meta"), box, (8, 8), antialias=True).is_meta  # no CPU tensor is mixed in


def test_a_cut_on_paper() -> None:
    cut = geometry.cut_out(torch.ones(1, 1, 8, 8), *torch.tensor([[0.5], [0.25], [0.5]]), fill=0.0)
    assert cut[0, 0, 0:4, 2:6].sum() == 0
    assert cut.sum() == 64 - 16
    assert geometry.cut_out(torch.ones(1, 1, 8, 8), *torch.tensor([[0.0], [0.0], [0.5]])).sum() == 64 - 4  # clipped


def test_the_jitters_window_lands_in_the_middle() -> None:
    image = torch.arange(36.0).view(1, 1, 6, 6) / 36
    jittered = geometry.shift_window(image, torch.tensor([2]), torch.tensor([0]), (4, 4), fill=0.5)
    assert torch.equal(jittered[:, :, 1:5, 1:5], image[:, :, 2:6, 0:4])
    assert (jittered == 0.5).sum() >= 20
    assert torch.equal(jittered[:, :, 0], torch.full((1, 1, 6), 0.5))


# --- blur


@pytest.mark.parametrize(("size", "kernel"), [((20, 20), 3), ((20, 27), 9), ((33, 24), 23), ((5, 8), 9)])
def test_blur_is_torchvisions_and_kornias(size: tuple[int, int], kernel: int) -> None:
    images, sigma = torch.rand(6, 3, *size, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 2.0, 6)
    ours = blur(images, sigma, kernel)
    for i in range(6):
        theirs = tv.gaussian_blur(images[i], [kernel, kernel], [sigma[i].item()])
        torch.testing.assert_close(ours[i], theirs, atol=1e-5, rtol=0)
    each = torch.stack([sigma, sigma], dim=1)
    theirs = kornia.filters.gaussian_blur2d(images, (kernel, kernel), each, border_type="reflect")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_blur_on_paper() -> None:
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 1
    quarters = torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0])
    half = torch.tensor([1 / math.sqrt(2 * math.log(2))])  # exp(-1 / (2 sigma^2)) = 1/2
    torch.testing.assert_close(blur(image, half, 3)[0, 0], torch.outer(quarters, quarters))


def test_blur_keeps_constants_means_and_precision() -> None:
    images, sigma = pictures(), torch.linspace(0.1, 2.0, 8)
    torch.testing.assert_close(blur(torch.full_like(images, 0.3), sigma, 7), torch.full_like(images, 0.3))
    expected = blur(images, sigma, 7)
    assert expected.min() >= 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(blur(images, sigma, 7), expected)
    torch.testing.assert_close(blur(images.double(), sigma, 7).float(), expected, atol=1e-6, rtol=0)


def test_the_kernel_is_simclrs_tenth_of_the_side() -> None:
    """SimCLR's code: radius = int(kernel_size / 2) with kernel_size = height // 10; ours is at least 3."""
    for side in range(20, 600):
        assert tenth_of(side) == 2 * int((side // 10) / 2) + 1
    assert [tenth_of(side) for side in (8, 32, 96, 224)] == [3, 3, 9, 23]
    images = pictures(h=64, w=50)
    sigma = randomness(8).uniform("blur/sigma", low=0.1, high=2.0)
    assert torch.equal(GaussianBlur(1.0)(images, randomness(8)), blur(images, sigma, 5))
    assert torch.equal(GaussianBlur(1.0, kernel=9)(images, randomness(8)), blur(images, sigma, 9))


# --- solarize, photometric changes, edges, turns, cutout, fitting


def test_solarize_modules_are_pils_default() -> None:
    levels = torch.arange(256).view(1, 1, 16, 16).repeat(2000, 3, 1, 1).to(torch.uint8)
    changed = to_bytes(RandomSolarize(0.2)(levels / 255, randomness(2000)))
    solarized = (changed != levels).flatten(1).any(1)
    assert stats.binomtest(int(solarized.sum()), 2000, 0.2).pvalue > 1e-3
    theirs = tv.pil_to_tensor(ImageOps.solarize(tv.to_pil_image(levels[0])))  # at 128
    assert torch.equal(changed[solarized], theirs.expand(int(solarized.sum()), -1, -1, -1))


def test_photometric_changes_are_torchvisions_in_turn() -> None:
    images = pictures(400)
    changed = RandomPhotometric()(images, randomness(400))
    chosen = randomness(400).bernoulli("photometric/chosen", 0.66)
    assert stats.binomtest(int(chosen.sum()), 400, 0.66).pvalue > 1e-3
    assert torch.equal(changed[~chosen], images[~chosen])
    bits = 4 + randomness(400).integers("photometric/bits", 5)
    factor = randomness(400).uniform("photometric/sharpness", low=0.1, high=1.9)
    threshold = randomness(400).integers("photometric/threshold", 257)
    assert bits.unique().tolist() == [4, 5, 6, 7, 8]
    assert stats.kstest(threshold.numpy(), stats.randint(0, 257).cdf).pvalue > 1e-3
    for i in chosen.nonzero().flatten().tolist()[:50]:
        expected = tv.posterize(to_bytes(images[i]), int(bits[i]))
        sharp = colour.sharpen(expected[None] / 255, factor[i : i + 1])
        expected = colour.auto_contrast(colour.solarize(sharp, threshold[i : i + 1] / 255))[0]
        torch.testing.assert_close(changed[i], expected, atol=1e-5, rtol=0)


def test_sobel_is_kornias_of_the_luminance() -> None:
    images = pictures()
    edges = colour.sobel(images)
    theirs = kornia.filters.sobel(colour.luminance(images), eps=0.0)
    torch.testing.assert_close(edges, theirs.expand_as(images), atol=1e-5, rtol=0)
    ramp = (torch.arange(8.0) / 10).expand(1, 1, 8, 8)
    torch.testing.assert_close(colour.sobel(ramp)[..., 1:-1], torch.full((1, 1, 8, 6), 0.1))


def test_quarter_turns_are_each_as_likely() -> None:
    images = pictures(1, h=6, w=6).expand(2000, 3, 6, 6)
    turned = RandomQuarterTurn()(images, randomness(2000))
    matches = torch.stack([(turned == torch.rot90(images, k, (2, 3))).flatten(1).all(1) for k in range(4)], dim=1)
    assert torch.equal(matches.sum(1), torch.ones(2000, dtype=torch.int64))
    assert stats.chisquare(matches.sum(0).numpy()).pvalue > 1e-3


def test_cutout_cuts_a_square_of_the_side_asked_for() -> None:
    cut = RandomCutout(0.4, (0.5, 0.5))(torch.ones(3000, 1, 16, 16), randomness(3000))[:, 0] == 0
    assert stats.binomtest(int(cut.flatten(1).any(1).sum()), 3000, 0.4).pvalue > 1e-3
    assert cut.sum((1, 2)).max() == 64
    assert torch.equal(cut, cut.any(1, keepdim=True) & cut.any(2, keepdim=True))  # a box
    assert not RandomCutout(1.0, (2.0, 2.0))(torch.ones(9, 1, 16, 16), randomness(9)).any()


def test_fitting_is_torchvisions_resize_and_centre_crop() -> None:
    for h, w in ((20, 20), (33, 50), (51, 34), (12, 30)):
        images = pictures(2, h=h, w=w)
        expected = tv.center_crop(tv.resize(images, [20], antialias=True), [20, 20])
        torch.testing.assert_close(CentreFit(20)(images, randomness(2)), expected, atol=1e-6, rtol=0)


# --- elastic deformation


def test_a_constant_field_is_a_shift() -> None:
    images = pictures()
    moved = elastic(images, torch.ones(8, 2, 4, 4) * torch.tensor([2.0, -1.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(moved[:, :, 1:, :-2], images[:, :, :-1, 2:], atol=1e-4, rtol=0)


def test_an_elastic_shear_is_the_affine_one() -> None:
    images, slopes = pictures(), torch.tensor([[0.2, -0.1]]).expand(8, 2)
    matrix = affine_matrix(shear_x=slopes[:, 0], shear_y=slopes[:, 1])
    torch.testing.assert_close(elastic(images, torch.zeros(8, 2, 3, 3), slopes), affine(images, matrix, fill=None))


@pytest.mark.parametrize(("size", "points"), [((12, 12), 4), ((80, 80), 4), ((81, 60), 2), ((9, 9), 5), ((1, 3), 3)])
def test_displacements_are_bounded_and_measured(size: tuple[int, int], points: int) -> None:
    field = Randomness(0, 0, torch.arange(400)).uniform("field", 2, points, points, low=-3, high=3)
    moved = displacement(field, size)
    assert moved.shape == (400, 2, *size)
    assert moved.abs().max() <= 3
    torch.testing.assert_close(displacement(torch.full_like(field, 3), size), torch.full_like(moved, 3))
    if min(size) > 1:  # the corners are control points
        torch.testing.assert_close(
            moved[:, :, :: size[0] - 1, :: size[1] - 1], field[:, :, :: points - 1, :: points - 1]
        )


def test_the_amplitude_is_in_pixels() -> None:
    """Measured on the picture: a ramp from left to right shows how far its pixels were moved."""
    ramp = (torch.arange(80.0) / 79).expand(256, 1, 80, 80)
    for module, pixels in ((ElasticDeformation(1.0, 4.0), 4.0), (ElasticDeformation(1.0, 0.05, of_side=True), 4.0)):
        moved = (module(ramp, randomness(256)) - ramp)[..., 8:-8] * 79
        assert 0.95 * pixels < moved.abs().max() <= pixels + 1e-3
        assert 0.38 * pixels < moved.square().mean().sqrt() < 0.46 * pixels


# --- colour dropping


@pytest.mark.parametrize("fill", ["zero", "repeat", "noise"])
def test_channel_drop_keeps_exactly_one_channel(fill: str) -> None:
    images = pictures(300) * 0.4 + 0.05
    dropped = ChannelDrop(fill=fill)(images, randomness(300))
    kept = (dropped == images).flatten(2).all(2)
    assert torch.equal(kept.sum(1), torch.ones(300, dtype=torch.int64))
    assert stats.chisquare(kept.sum(0).numpy()).pvalue > 1e-3
    channel = images[kept].unsqueeze(1)
    others = dropped[~kept].view(300, 2, 20, 20)
    if fill == "zero":
        assert not others.any()
    elif fill == "repeat":
        assert torch.equal(others, channel.expand_as(others))
    else:
        noise = (others - 0.5) / channel.std((2, 3), keepdim=True, correction=0) * 100
        assert stats.kstest(noise.flatten()[::16].numpy(), "norm").pvalue > 1e-3
        assert not torch.equal(others[:, 0], others[:, 1])


def test_channel_drop_on_paper() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    rank, key = torch.tensor([[0, 2, 1]]), torch.zeros(1, dtype=torch.int64)
    assert drop_channels(red, rank, 2, "zero", key).flatten().tolist() == [1, 0, 0]
    assert drop_channels(red, rank, 2, "repeat", key).flatten().tolist() == [1, 1, 1]
    assert drop_channels(red + 0.1, rank, 1, "zero", key).flatten().tolist() == pytest.approx([1.1, 0, 0.1])


def test_channel_drop_keeps_its_probability() -> None:
    images = torch.ones(4000, 3, 1, 1)
    changed = int((ChannelDrop(0.3)(images, randomness(4000)) != images).flatten(1).any(1).sum())
    assert stats.binomtest(changed, 4000, 0.3).pvalue > 1e-3


# --- noise


def test_noise_is_normal_and_its_keys_unrelated() -> None:
    noise = noise_like(torch.zeros(2, 3, 100, 100), torch.tensor([5, 6]))
    assert stats.kstest(noise[0].flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1]) < 5 / 30000**0.5
    assert torch.equal(noise_like(torch.zeros(1, 3, 100, 100), torch.tensor([6]))[0], noise[1])


def test_the_standard_deviation_is_the_one_asked_for() -> None:
    grey = torch.full((200, 1, 32, 32), 0.5)
    spread = (GaussianNoise(0.1)(grey, randomness(200)) - grey).flatten(1).std(1)
    assert stats.kstest(spread.numpy(), "uniform", args=(0, 0.1)).pvalue > 1e-3


# --- crops and flips


def test_random_crops_are_windows_at_every_place_alike() -> None:
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(4000, 1, 8, 8) / 64
    crops = RandomCrop(6)(images, randomness(4000))
    corner = (crops[:, 0, 0, 0] * 64).round().long()
    row, col = corner // 8, corner % 8
    assert torch.equal(crops, geometry.crop(images, row, col, (6, 6)))
    assert stats.chisquare(torch.bincount(row * 3 + col, minlength=9).numpy()).pvalue > 1e-3


def test_a_padded_crop_reflects() -> None:
    images = pictures(200, h=8, w=8)
    crops = RandomCrop(8, padding=2)(images, randomness(200))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="reflect")
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1).flatten(2, 3).movedim(2, 1)  # n 25 c 8 8
    matches = (windows == crops[:, None]).flatten(2).all(2)
    assert torch.equal(matches.sum(1), torch.ones(200, dtype=torch.int64))
    assert matches.any(0).all()


def test_resized_crops_keep_area_and_ratio() -> None:
    """Measured on a picture of its own coordinates: x in one channel, y in the other."""
    coordinate = (torch.arange(64.0) + 0.5) / 64
    images = torch.stack([coordinate.expand(64, 64), coordinate[:, None].expand(64, 64)])[None].repeat(1000, 1, 1, 1)
    crops = RandomResizedCrop(16, scale=(0.2, 0.48), ratio=(0.5, 2.0))(images, randomness(1000))  # every box fits
    width = (crops[:, 0, 0, -2] - crops[:, 0, 0, 1]) * 16 / 13
    height = (crops[:, 1, -2, 0] - crops[:, 1, 1, 0]) * 16 / 13
    area, ratio = width * height, width / height
    assert stats.kstest(area.numpy(), "uniform", args=(0.2, 0.28)).pvalue > 1e-3
    assert stats.kstest(torch.log2(ratio).numpy(), "uniform", args=(-1, 2)).pvalue > 1e-3


def test_flips_and_affine_jitter_keep_their_probability() -> None:
    images = torch.arange(4.0).view(1, 1, 2, 2).expand(4000, 1, 2, 2) / 4
    for module, probability in ((RandomFlip(0.5), 0.5), (RandomAffine(0.3, degrees=45), 0.3)):
        changed = int((module(images, randomness(4000)) != images).flatten(1).any(1).sum())
        assert stats.binomtest(changed, 4000, probability).pvalue > 1e-3
    flipped = RandomFlip(1.0)(images, randomness(4000))
    assert torch.equal(flipped, images.flip(3))
    assert RandomFlip(None).probability == RandomFlip().probability == 0.5  # as recipes have it that say nothing


def test_affine_jitter_stays_in_its_ranges() -> None:
    """A bright dot at the centre shows the shift, and the area of a disc the scale."""
    y, x = torch.meshgrid(torch.arange(41) - 20.0, torch.arange(41) - 20.0, indexing="ij")
    disc = ((x**2 + y**2) < 64).float().expand(400, 1, 41, 41)
    moved = RandomAffine(translate=0.1, scale=(0.8, 1.2))(disc, randomness(400))
    mass = moved.sum((1, 2, 3))
    assert (mass / disc[0].sum()).sqrt().amin() == pytest.approx(0.8, abs=0.03)
    assert (mass / disc[0].sum()).sqrt().amax() == pytest.approx(1.2, abs=0.03)
    shifts = torch.stack([(moved[:, 0] * axis).sum((1, 2)) / mass for axis in (x, y)])
    for shift in shifts:
        assert stats.kstest((shift / 41).numpy(), "uniform", args=(-0.1, 0.2)).pvalue > 1e-3
    assert torch.corrcoef(torch.stack([*shifts, mass])).triu(1).abs().max() < 5 / 20  # each drawn on its own


# --- AutoAugment's primitives


@pytest.mark.parametrize("name", AUTOAUGMENT)
def test_every_primitive_works_on_colour_and_grey_and_stays_in_range(name: str) -> None:
    for c in (1, 3):
        images = pictures(64, c)
        changed = AutoAugmentPrimitives(1, [name])(images, randomness(64))
        assert changed.shape == images.shape
        assert changed.isfinite().all()
        assert changed.min() >= 0
        assert changed.max() <= 1 + 1e-6
        share = (changed != images).flatten(1).any(1).float().mean()
        if not (name == "Color" and c == 1):
            assert share > 0.7, f"{name} changed only {share:.0%} of the images"


@pytest.mark.parametrize("name", [name for name in SIXTEEN if name not in ("AutoContrast", "Invert", "Equalize")])
def test_magnitude_zero_is_the_identity(name: str) -> None:
    images = pictures(64)
    changed = AutoAugmentPrimitives(2, [name], magnitude=0.0)(images, randomness(64))
    torch.testing.assert_close(changed, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ShearX", -0.3, 0.3),
        ("ShearY", -0.3, 0.3),
        ("TranslateX", -150 / 331, 150 / 331),
        ("TranslateY", -150 / 331, 150 / 331),
        ("Rotate", -30, 30),
        ("Solarize", 0, 256 / 255),
        ("Posterize", 4, 8),
        ("Contrast", 0.1, 1.9),
        ("Color", 0.1, 1.9),
        ("Brightness", 0.1, 1.9),
        ("Sharpness", 0.1, 1.9),
        ("Cutout", 0, 60 / 331),
        ("SamplePairing", 0, 0.4),
    ],
)
def test_levels_fill_autoaugments_ranges(name: str, low: float, high: float) -> None:
    module = AutoAugmentPrimitives(1, [name])
    level = module._levels(torch.zeros(2000, dtype=torch.int64), randomness(2000).uniform("level"))
    assert stats.kstest(level.numpy(), "uniform", args=(low, high - low)).pvalue > 1e-3
    half = AutoAugmentPrimitives(1, [name], magnitude=0.5)
    shrunk = half._levels(torch.zeros(2000, dtype=torch.int64), randomness(2000).uniform("level"))
    assert shrunk.max() - shrunk.min() == pytest.approx((high - low) / 2, rel=0.01)


REFERENCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # images n c 20 24, level n, place n 2
    "ShearX": lambda x, level, place: affine(x, affine_matrix(shear_x=level), 0.5),
    "ShearY": lambda x, level, place: affine(x, affine_matrix(shear_y=level), 0.5),
    "TranslateX": lambda x, level, place: affine(x, affine_matrix(shift_x=level * 24), 0.5),
    "TranslateY": lambda x, level, place: affine(x, affine_matrix(shift_y=level * 20), 0.5),
    "Rotate": lambda x, level, place: affine(x, affine_matrix(angle=level), 0.5),
    "AutoContrast": lambda x, level, place: colour.auto_contrast(x),
    "Invert": lambda x, level, place: 1 - x,
    "Equalize": lambda x, level, place: colour.equalize(x),
    "Solarize": lambda x, level, place: colour.solarize(x, level),
    "Posterize": lambda x, level, place: colour.posterize(x, level.round()),
    "Contrast": lambda x, level, place: colour.contrast(x, level),
    "Color": lambda x, level, place: colour.saturation(x, level),
    "Brightness": lambda x, level, place: colour.brightness(x, level),
    "Sharpness": lambda x, level, place: colour.sharpen(x, level),
    "Cutout": lambda x, level, place: geometry.cut_out(x, place[:, 0], place[:, 1], level, 0.5),
}


@pytest.mark.parametrize("draws", [1, 2, 3])
@pytest.mark.parametrize("operations", [AUTOAUGMENT, ("Invert", "Rotate"), ("Cutout", "Color"), ("ShearX",)])
def test_a_mixed_draw_is_each_images_operations_in_turn(draws: int, operations: tuple[str, ...]) -> None:
    """Sorting, grouping and the shared resampling change nothing: an image at a time, in order, gives the same."""
    images, module = pictures(150, w=24), AutoAugmentPrimitives(draws, operations)
    which = randomness(150).integers("primitives/operation", len(module.operations), draws)
    numbers = randomness(150).uniform("primitives/numbers", draws, 3)
    expected = images.clone()
    for draw in range(draws):
        level = module._levels(which[:, draw], numbers[:, draw, 0])
        for i in range(150):
            reference = REFERENCES[module.operations[which[i, draw]]]
            expected[i : i + 1] = reference(expected[i : i + 1], level[i : i + 1], numbers[i : i + 1, draw, 1:])
    assert len(which.unique()) == len(operations)
    torch.testing.assert_close(module(images, randomness(150)), expected, atol=1e-5, rtol=0)


def test_pairing_mixes_in_another_image() -> None:
    images = torch.eye(8).view(8, 1, 1, 8).expand(8, 1, 8, 8)  # image i is lit in column i only
    mixed = AutoAugmentPrimitives(1, ["SamplePairing"])(images, randomness(8))
    weight = mixed[:, 0, 0]
    own = weight.diagonal()
    assert ((own >= 0.6) & (own <= 1)).all()
    torch.testing.assert_close(weight.sum(1), torch.ones(8))
    assert torch.equal((weight > 0).sum(1), torch.full((8,), 2))


def test_partners_are_uniform_over_the_other_images() -> None:
    u = randomness(12).uniform("partner", 2000)
    chosen = torch.stack([partners(12, 3, u[:, i]) for i in range(2000)], 1)
    assert not (chosen // 3 == torch.arange(12)[:, None] // 3).any()
    for part in range(12):
        counts = torch.bincount(chosen[part], minlength=12)
        assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-4
        assert (counts > 0).sum() == 9


# --- every module

MODULES: list[tuple[str, Callable[[float], nn.Module]]] = [
    ("channel_drop", ChannelDrop),
    ("channel_drop noise", lambda p: ChannelDrop(p, fill="noise")),
    ("elastic", lambda p: ElasticDeformation(p, 2.0, shear=0.2)),
    ("histogram", HistogramRemap),
    ("inception", InceptionColour),
    ("colour", ColourJitter),
    ("grey", RandomGrey),
    ("noise", lambda p: GaussianNoise(0.1, p)),
    ("affine", lambda p: RandomAffine(p, 20, 0.1, (0.8, 1.2), 10)),
    ("flip", RandomFlip),
    ("primitives", lambda p: AutoAugmentPrimitives(2 if p else 0)),
    ("crop", lambda p: RandomCrop(20, padding=3 if p else 0)),
    ("jitter", lambda p: SpatialJitter(0.8 if p else 1.0)),
    ("blur", GaussianBlur),
    ("solarize", RandomSolarize),
    ("photometric", RandomPhotometric),
    ("sobel", RandomSobel),
    ("cutout", RandomCutout),
    ("resized_crop", lambda p: RandomResizedCrop(20, scale=(0.2, 1) if p else (1, 1), ratio=(1, 1))),
]
each_module = pytest.mark.parametrize("build", [build for _, build in MODULES], ids=[name for name, _ in MODULES])


@each_module
def test_an_image_alone_is_the_same_as_in_a_batch(build: Callable[[float], nn.Module]) -> None:
    images, module = pictures(16), build(1.0)
    whole = module(images, randomness(16))
    for place in (0, 5, 15):
        alone = module(images[place : place + 1], Randomness(0, 0, torch.tensor([place])))
        assert torch.equal(alone[0], whole[place])


@each_module
def test_modules_stay_in_range_and_shape_and_leave_their_input_alone(build: Callable[[float], nn.Module]) -> None:
    images, before = pictures(32), pictures(32)
    for probability in (0.5, 1.0):
        changed = build(probability)(images, randomness(32))
        assert changed.shape == images.shape
        assert changed.min() >= 0
        assert changed.max() <= 1 + 1e-6
        assert not torch.equal(changed, images)
        changed.fill_(7)  # and hand out no alias of it
        assert torch.equal(images, before)


@each_module
def test_switched_off_is_the_identity(build: Callable[[float], nn.Module]) -> None:
    images = pictures(8)
    torch.testing.assert_close(build(0.0)(images, randomness(8)), images, atol=1e-5, rtol=0)


@each_module
def test_another_step_draws_other_numbers(build: Callable[[float], nn.Module]) -> None:
    images = pictures(32)
    module = build(0.5)
    assert not torch.equal(module(images, randomness(32, 0)), module(images, randomness(32, 1)))


@each_module
def test_the_global_generator_is_not_used(build: Callable[[float], nn.Module]) -> None:
    state = torch.get_rng_state()
    build(1.0)(pictures(8), randomness(8))
    assert torch.equal(state, torch.get_rng_state())


@each_module
def test_no_operation_mixes_devices_or_waits_for_one(build: Callable[[float], nn.Module]) -> None:
    """The meta device stands in for a GPU: it refuses tensors from the CPU, and has no values to wait for."""
    images = torch.empty(16, 3, 20, 20, device="meta")
    for probability in (0.5, 1.0):
        changed = build(probability)(images, randomness(16))
        assert changed.is_meta
        assert changed.shape == images.shape


class Recorder(Randomness):
    """A randomness that keeps what was drawn."""

    def __init__(self, places: Tensor) -> None:
        super().__init__(0, 0, places)
        self.drawn: dict[str, Tensor] = {}

    def uniform(self, stream: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        self.drawn[stream] = super().uniform(stream, *shape, low=low, high=high)
        return self.drawn[stream]


@pytest.mark.parametrize("build", [InceptionColour, ColourJitter])
def test_colour_takes_every_order_and_level(build: Callable[..., nn.Module]) -> None:
    """The module against its operations applied one image at a time, in the order and at the levels drawn."""
    images, recorder = pictures(240), Recorder(torch.arange(240))
    module = build(1.0)
    result = module(images, recorder)
    stream = module.stream
    orders = recorder.drawn[f"{stream}/order"].argsort(dim=1)
    assert len({tuple(order) for order in orders.tolist()}) == 24
    u = 2 * Randomness(0, 0, torch.arange(240)).uniform(f"{stream}/level", 4) - 1
    for i in range(0, 240, 7):
        expected = images[i : i + 1]
        for slot in orders[i].tolist():
            operation, centre, half_width = module._steps[slot]
            expected = operation(expected, centre + half_width * u[i : i + 1, slot])
        torch.testing.assert_close(result[i : i + 1], expected, atol=1e-5, rtol=0)


def test_a_colour_strength_of_zero_leaves_the_other_levels_alone() -> None:
    images = pictures(64)
    full = ColourJitter(1.0, 0.4, 0.0, 0.0, 0.0)(images, randomness(64))
    u = randomness(64).uniform("colour/level", 4, low=-1, high=1)
    torch.testing.assert_close(full, colour.brightness(images, 1 + 0.4 * u[:, 0]), atol=1e-6, rtol=0)


def test_groups_are_applied_to_their_rows() -> None:
    images, group = pictures(9), torch.tensor([2, 0, 1, 2, 2, 0, 1, 0, 2])
    result = by_group(images, group, [lambda x, rows: x, lambda x, rows: 1 - x, lambda x, rows: x * per_image(rows, x)])
    for i, k in enumerate(group.tolist()):
        expected = (images[i], 1 - images[i], images[i] * i)[k]
        assert torch.equal(result[i], expected)


def test_only_drawn_rows_are_computed() -> None:
    seen = []

    def note(images: Tensor, number: Tensor) -> Tensor:
        seen.append((len(images), number.tolist()))
        return images * 0

    images, chosen = torch.ones(5, 1, 2, 2), torch.tensor([False, True, False, True, False])
    assert on_chosen(images, chosen, note, torch.arange(5)).sum() == 3 * 4
    assert seen == [(2, [1, 3])]
    assert on_chosen(images, torch.zeros(5, dtype=torch.bool), note, torch.arange(5)) is images
    assert len(seen) == 1


# --- errors: one line, what came, what to pass

ONE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChannelDrop(fill="mean"), "fill is one of zero, noise, repeat, got 'mean'"),
        (lambda: ChannelDrop(drop=0), "drop is at least 1"),
        (lambda: ChannelDrop(1.5), "probability is between 0 and 1, got 1.5"),
        (lambda: ChannelDrop()(ONE[:, :2], randomness(1)), "can't drop 2 of 2 channels"),
        (lambda: ChannelDrop()(ONE, randomness(2)), "the randomness is for 2 images, got 1"),
        (lambda: RandomGrey(1.0)(ONE[:, :2], randomness(1)), "expected 1 or 3 channels, got 2"),
        (lambda: RandomGrey(-0.1), "got -0.1"),
        (lambda: InceptionColour(1.0)(ONE[:, :1], randomness(1)), "expected 3 channels, got 1"),
        (lambda: colour.brightness(ONE, torch.ones(2)), "expected 1 numbers, one an image, got numbers of shape (2,)"),
        (lambda: colour.brightness(ONE, torch.tensor(1.0)), "got numbers of shape ()"),
        (lambda: colour.remap_histogram(ONE, torch.ones(1, 2, 4)), "expected slopes n c k"),
        (lambda: HistogramRemap(strength=0.5), "strength is at least 1"),
        (lambda: ElasticDeformation(grid=1), "grid at least 2, got amplitude=2.0, shear=0.0, grid=1"),
        (lambda: elastic(ONE, torch.zeros(1, 3, 4, 4)), "expected a field 1 2 gy gx"),
        (lambda: elastic(ONE[0], torch.zeros(1, 2, 4, 4)), "got torch.float32 of shape (3, 8, 8)"),
        (lambda: RandomFlip()(ONE.to(torch.uint8), randomness(1)), "divide uint8 by 255"),
        (lambda: affine(ONE, torch.zeros(2, 2, 3)), "expected matrices 1 2 3, one an image, got (2, 2, 3)"),
        (lambda: RandomCrop(9)(ONE, randomness(1)), "a crop of (9, 9) doesn't fit an image of (8, 8)"),
        (lambda: RandomCrop(8, padding=8)(ONE, randomness(1)), "padding 8 reflects more than"),
        (lambda: RandomResizedCrop(8, scale=(0.5, 1.5)), "scale lies within 0 .. 1"),
        (lambda: RandomAffine(scale=(1.2, 0.8)), "low end first"),
        (lambda: RandomResizedCrop(8)(ONE, randomness(2)), "the randomness is for 2 images, got 1"),
        (lambda: GaussianBlur(sigma=(0.0, 1.0)), "sigma is a range above 0, low end first, got (0.0, 1.0)"),
        (lambda: GaussianBlur(sigma=(2.0, 1.0)), "low end first, got (2.0, 1.0)"),
        (lambda: GaussianBlur(kernel=4), "kernel is an odd number of pixels, got 4: pass 5"),
        (lambda: GaussianBlur(1.0, kernel=17)(ONE, randomness(1)), "at most 15 for images of 8x8 px, got 17"),
        (lambda: blur(ONE, torch.ones(2), 3), "expected 1 numbers, one an image"),
        (lambda: blur(ONE, torch.ones(1), 2), "kernel is odd and at most 15"),
        (lambda: RandomSolarize(threshold=128), "threshold is between 0 and 1, got 128: divide one of 8 bits by 255"),
        (lambda: RandomSobel(1.0)(ONE[:, :2], randomness(1)), "expected 1 or 3 channels, got 2"),
        (lambda: RandomCutout(side=(0.5, 0.2)), "low end first, got (0.5, 0.2)"),
        (lambda: RandomQuarterTurn()(ONE[..., :7], randomness(1)), "a quarter turn needs square images, got (8, 7)"),
        (lambda: SpatialJitter(60), "60 of 64 pixels is 0.9375"),
        (lambda: GaussianNoise(-1.0), "std is at least 0"),
        (lambda: AutoAugmentPrimitives(2, ["Colour"]), "unknown operations Colour: choose among ShearX"),
        (lambda: AutoAugmentPrimitives(-1), "draws is at least 0"),
        (lambda: AutoAugmentPrimitives(2, magnitude=2.0), "magnitude within 0 .. 1"),
        (lambda: AutoAugmentPrimitives(1, SIXTEEN)(ONE, randomness(1)), "SamplePairing needs a second image"),
        (lambda: AutoAugmentPrimitives(1)(ONE, randomness(3)), "the randomness is for 3 images, got 1"),
        (lambda: geometry.resized_crop(ONE, torch.zeros(1, 3), (8, 8)), "expected boxes 1 4, one an image, got (1, 3)"),
        (lambda: noise_like(ONE, torch.zeros(2)), "expected a key an image, 1 in all, got (2,)"),
    ],
)
def test_errors_are_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)
