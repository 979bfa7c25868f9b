import pytest
import torch

from contrastive_core.encoders import TimmTrunk, TorchvisionTrunk
from cpc.encoders import ChannelNorm, PatchResNet, normalisation, resnet50, resnet101_v1, resnet161, resnet_small

torch.manual_seed(0)


def parameters(encoder):
    return sum(parameter.numel() for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("build", "millions", "tolerance", "dim"),
    [(resnet161, 305, 0.01, 4096), (resnet50, 24, 0.03, 2048), (resnet101_v1, 28, 0.03, 1024)],
)
def test_the_papers_parameter_counts(build, millions, tolerance, dim):
    with torch.device("meta"):
        encoder = build()
    assert parameters(encoder) / 1e6 == pytest.approx(millions, rel=tolerance)
    assert encoder.dim == dim


def test_depth_of_resnet161():
    """53 bottlenecks of three convolutions and a stem: 160, and the linear classifier on top makes 161."""
    with torch.device("meta"):
        encoder = resnet161()
    blocks = [block for stack in encoder.stacks for block in stack]
    assert sum(len(block.convolutions) for block in blocks) + 1 == 160
    assert [len(stack) for stack in encoder.stacks] == [3, 4, 46]
    third = encoder.stacks[2][1].convolutions
    assert (third[0].in_channels, third[0].out_channels, third[2].out_channels) == (4096, 512, 4096)


@pytest.mark.parametrize(("build", "map_side"), [(resnet161, 5), (resnet101_v1, 5), (resnet50, 3)])
def test_an_80_px_patch_gives_the_papers_map(build, map_side):
    with torch.device("meta"):
        encoder = build(norm="none")
        maps = encoder.feature_map(torch.zeros(1, 3, 80, 80))
    assert maps.shape == (1, encoder.dim, map_side, map_side)


@pytest.mark.parametrize("pixels", [17, 24, 80, 161, 260])
@pytest.mark.parametrize("norm", ["layer", "channel"])
def test_any_patch_size_and_a_whole_image(pixels, norm):
    encoder = PatchResNet([1, 1, 2], [16, 32, 48], bottlenecks=[4, 8, 12], norm=norm)
    small = resnet_small(8, norm=norm)
    images = torch.rand(2, 3, pixels, pixels + 7)
    assert encoder(images).shape == (2, 48)
    assert small(images).shape == (2, 32)
    torch.testing.assert_close(small(images), small.feature_map(images).mean((2, 3)))


@pytest.mark.parametrize("norm", ["layer", "channel", "none"])
def test_no_latent_depends_on_another_patch(norm):
    encoder = resnet_small(8, norm=norm).double()
    patches = torch.randn(4, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(encoder(patches)[1].sum(), patches)
    assert gradient[1].ne(0).any()
    assert gradient[[0, 2, 3]].eq(0).all()


def test_batch_norm_does_couple_patches():
    """The other side of the test above: that it can fail, and why the paper leaves BatchNorm out."""
    encoder = resnet_small(8, norm="batch").double()
    patches = torch.randn(4, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(encoder(patches)[1].square().sum(), patches)
    assert gradient[[0, 2, 3]].ne(0).any()


def test_layer_norm_is_over_channels_and_pixels_of_one_patch():
    norm = normalisation("layer", 6)
    images = torch.randn(3, 6, 5, 4) * 3 + 2
    expected = (images - images.mean((1, 2, 3), keepdim=True)) / (
        images.var((1, 2, 3), keepdim=True, correction=0) + 1e-5
    ).sqrt()
    torch.testing.assert_close(norm(images), expected)


def test_channel_norm_is_over_channels_of_one_position():
    images = torch.randn(3, 6, 5, 4) * 3 + 2
    expected = (images - images.mean(1, keepdim=True)) / (images.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(ChannelNorm(6)(images), expected)


def test_a_block_of_zero_weights_is_the_identity():
    """Pre-activation: the residual branch is added to an untouched stream."""
    encoder = resnet_small(4, blocks=(1,))
    block = encoder.stacks[0][0]
    torch.nn.init.zeros_(block.convolutions[-1].weight)
    images = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(images), images)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"norm": "group"}, "norm='group' is not one of layer, channel, batch, none"),
        ({"stem": "large"}, 'stem=\'large\': pass "imagenet" or "small"'),
        ({"bottlenecks": [4]}, "differ in length"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        PatchResNet([1, 1], [8, 16], **arguments)


@pytest.mark.parametrize("trunk", [TorchvisionTrunk("resnet18"), TimmTrunk("resnet18")])
def test_other_peoples_trunks(trunk):
    assert trunk.dim == 512
    trunk.eval()
    images = torch.rand(2, 3, 64, 64)
    assert trunk(images).shape == (2, 512)
    torch.testing.assert_close(trunk(images), trunk.feature_map(images).mean((2, 3)))


def test_a_trunk_of_tokens_has_features_but_no_map():
    trunk = TimmTrunk("vit_tiny_patch16_224", img_size=32)
    assert trunk(torch.rand(2, 3, 32, 32)).shape == (2, trunk.dim)
    with pytest.raises(ValueError, match="has no feature map"):
        trunk.feature_map(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("build", [resnet161, resnet50, resnet101_v1])
@pytest.mark.parametrize("pixels", [17, 64, 80, 260])
def test_the_papers_encoders_take_any_patch_and_a_whole_image(build, pixels):
    with torch.device("meta"):
        encoder = build(norm="layer").eval()
        assert encoder(torch.zeros(2, 3, pixels, pixels)).shape == (2, encoder.dim)
