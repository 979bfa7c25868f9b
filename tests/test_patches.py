import pytest
import torch

from cpc.patches import extract_patches, grid_side, tile_patches


@pytest.mark.parametrize(
    ("pixels", "size", "stride", "side"), [(260, 80, 36, 6), (256, 64, 32, 7), (28, 8, 4, 6), (16, 16, 5, 1)]
)
def test_known_geometries(pixels, size, stride, side):
    assert grid_side(pixels, size, stride) == side
    patches = extract_patches(torch.zeros(2, 3, pixels, pixels), size, stride)
    assert patches.shape == (2, side, side, 3, size, size)


def test_every_patch_is_its_crop():
    images = torch.rand(2, 3, 20, 26)
    patches = extract_patches(images, 8, 6)
    assert patches.shape[1:3] == (3, 4)
    for row in range(3):
        for col in range(4):
            crop = images[:, :, row * 6 : row * 6 + 8, col * 6 : col * 6 + 8]
            assert torch.equal(patches[:, row, col], crop)


def test_patches_are_views_of_the_image():
    images = torch.zeros(1, 3, 12, 12)
    patches = extract_patches(images, 8, 4)
    images[0, 0, 0, 0] = 7
    assert patches[0, 0, 0, 0, 0, 0] == 7


@pytest.mark.parametrize(
    ("shape", "size", "stride", "words"),
    [
        ((2, 3, 79, 79), 80, 36, "79 px is smaller than one patch of 80 px: pass 80 px or more"),
        ((2, 3, 260, 261), 80, 36, "261 px leave 1 px unused .* 260 px .6 patches. or 296 px .7 patches."),
        ((2, 3, 64, 64), 0, 8, "must both be at least 1"),
        ((2, 3, 64, 64), 16, 0, "must both be at least 1"),
        ((3, 64, 64), 16, 8, r"shape \(3, 64, 64\): pass b c h w"),
        ((1, 2, 3, 64, 64), 16, 8, "pass b c h w"),
    ],
)
def test_what_does_not_fit_is_named(shape, size, stride, words):
    with pytest.raises(ValueError, match=words):
        extract_patches(torch.zeros(shape), size, stride)


@pytest.mark.parametrize("pixels", [80, 116, 260, 1000, 1001, 1035])
def test_the_sizes_named_do_fit(pixels):
    try:
        grid_side(pixels, 80, 36)
    except ValueError as error:
        named = [int(word) for word in str(error).split() if word.isdigit()]
        fitting = [size for size in named if size > 80]
        assert fitting[-2:] != []
        for size in [n for n in fitting if n != pixels]:
            grid_side(size, 80, 36)


def test_tiling_puts_each_patch_in_its_place():
    patches = torch.rand(2, 3, 3, 4, 4)
    picture = tile_patches(patches, gap=1, fill=0.5)
    assert picture.shape == (3, 9, 14)
    assert torch.equal(picture[:, 5:9, 10:14], patches[1, 2])
    assert (picture[:, 4] == 0.5).all()
