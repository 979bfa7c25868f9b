import copy
import itertools
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet50 as torchvision_resnet50

from contrastive_core import encoders
from contrastive_core.checkpoint import export_encoder
from contrastive_core.encoders import (
    ENCODERS,
    MoCoViT,
    SmallCNN,
    TimmTrunk,
    TorchvisionTrunk,
    sincos_positions,
    small_cnn_for,
)
from contrastive_core.simclr_resnet import Bottleneck, PairMean, SelectiveKernel, SimCLRResNet, simclr_resnet
from cpc.encoder_card import build_encoder
from cpc.encoders import ChannelNorm, PatchResNet, normalisation, resnet50, resnet101_v1, resnet161, resnet_small
from cpc.features import load_encoder, untrained_encoder
from cpc.views import normalise

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


@pytest.mark.parametrize("norm", ["layer", "channel", "none"])
def test_recomputed_blocks_give_the_same_gradients_and_keep_less(norm):
    torch.manual_seed(0)
    encoder = PatchResNet([2, 9], [16, 64], bottlenecks=[4, 8], stem="small", stem_width=16, norm=norm)
    images = torch.rand(2, 3, 32, 32)

    def step():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            loss = encoder(images).square().sum()
        return torch.autograd.grad(loss, list(encoder.parameters())), sum(kept)

    gradients, kept = step()
    encoder.recompute = True
    again, kept_then = step()
    assert all(map(torch.equal, again, gradients))
    assert kept_then < 0.45 * kept
    assert not any("recompute" in name for name in encoder.state_dict())


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


@pytest.mark.parametrize(("width", "count", "side"), [(4, 32, 28), (6, 32, 28), (8, 2, 64), (12, 2, 64), (16, 2, 64)])
def test_narrow_trunks_have_the_same_gradients_in_either_memory_layout(width, count, side):
    """Below 8 channels on AVX2, and below 16 on AVX-512, oneDNN's strided 1x1 corrupted the heap here: wrong gradients,
    then an abort."""
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        trunk = resnet_small(width=width, norm="none").to(memory_format=layout)
        images = torch.rand(count, 3, side, side).to(memory_format=layout)
        for _ in range(5):
            trunk.zero_grad()
            trunk(images).square().sum().backward()
        gradients.append([p.grad for p in trunk.parameters()])
    for usual, last in zip(*gradients, strict=True):
        torch.testing.assert_close(last, usual, rtol=1e-3, atol=1e-3 * float(usual.abs().max()))


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


# --- SimCLR v2's ResNets


@pytest.mark.parametrize(
    ("depth", "width", "sk", "millions"),
    [
        (50, 1, False, 24),
        (50, 1, True, 35),
        (50, 2, False, 94),
        (50, 2, True, 140),
        (101, 1, False, 43),
        (101, 1, True, 65),
        (101, 2, False, 170),
        (101, 2, True, 257),
        (152, 1, False, 58),
        (152, 1, True, 89),
        (152, 2, False, 233),
        (152, 2, True, 354),
        (152, 3, True, 795),
    ],
)
def test_simclr_v2s_table_1(depth, width, sk, millions):
    """Parameters and moving statistics without the classifier: counted otherwise, some rows round to another number."""
    with torch.device("meta"):
        encoder = simclr_resnet(depth, width, sk)
    statistics = sum(buffer.numel() for name, buffer in encoder.named_buffers() if "running" in name)
    assert round((parameters(encoder) + statistics) / 1e6) == millions
    assert encoder.dim == 2048 * width


def filled(encoder, seed=0):
    """Away from the initialisation, in which every block is its shortcut and all norms are alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers()):
        if tensor.ndim == 1:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + (0.0 if "bias" in name else 0.5))
    return encoder


def test_without_selective_kernels_it_is_the_resnet_that_everybody_has():
    ours, theirs = filled(simclr_resnet()).eval(), torchvision_resnet50(weights=None).eval()
    state = ours.state_dict().values()
    names = [name for name in theirs.state_dict() if not name.startswith("fc.")]
    theirs.load_state_dict(dict(zip(names, state, strict=True)), strict=False)
    theirs.fc = nn.Identity()
    images = torch.rand(2, 3, 65, 48)
    torch.testing.assert_close(ours(images), theirs(images))


def test_a_selective_kernel_by_hand():
    kernel = filled(SelectiveKernel(6, 64, stride=2, norm="batch")).double().eval()
    images = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    branches, squeeze = kernel.branches, kernel.squeeze
    assert squeeze[0].weight.shape == (32, 64, 1, 1)  # a sixteenth would be 4, of which there are at least 32
    halves = []
    for part in (slice(0, 64), slice(64, 128)):
        convolved = F.conv2d(images, branches[0].weight[part], stride=2, padding=1)
        norm = [getattr(branches[1], name)[part] for name in ("running_mean", "running_var", "weight", "bias")]
        halves.append(F.batch_norm(convolved, *norm).relu())
    expected = torch.zeros_like(halves[0])
    for i in range(3):
        total = sum(half[i].mean((1, 2)) for half in halves)
        squeezed = squeeze[1]((squeeze[0].weight[:, :, 0, 0] @ total)[None, :, None, None]).relu().flatten()
        logits = kernel.expand.weight[:, :, 0, 0] @ squeezed
        for d in range(64):
            first, second = logits[d].exp(), logits[d + 64].exp()
            expected[i, d] = (first * halves[0][i, d] + second * halves[1][i, d]) / (first + second)
    torch.testing.assert_close(kernel(images), expected)


def test_selective_attention_sums_to_one():
    kernel = filled(SelectiveKernel(8, 16, stride=1, norm="batch")).eval()
    attention = kernel.attention(torch.randn(5, 16, 7, 3) * 10)
    assert attention.shape == (2, 5, 16, 1, 1)
    torch.testing.assert_close(attention.sum(0), torch.ones(5, 16, 1, 1))
    assert attention.std() > 0.01
    nn.init.zeros_(kernel.expand.weight)
    assert (kernel.attention(torch.randn(5, 16, 7, 3)) == 0.5).all()


@pytest.mark.parametrize(("filters", "squeezed"), [(64, 32), (512, 32), (1024, 64), (1536, 96)])
def test_how_far_a_selective_kernel_squeezes(filters, squeezed):
    with torch.device("meta"):
        assert SelectiveKernel(8, filters, stride=1, norm="batch").expand.in_channels == squeezed


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 4), (5, 4), (6, 7)])
def test_pair_mean_is_over_the_pixels_that_exist(stride, h, w):
    images = torch.randn(2, 3, h, w)
    found = PairMean(stride)(images)
    assert found.shape == (2, 3, math.ceil(h / stride), math.ceil(w / stride))
    for r, c in itertools.product(range(found.shape[2]), range(found.shape[3])):
        top, left = r * stride, c * stride
        expected = images[:, :, top : top + 2, left : left + 2].mean((2, 3))
        torch.testing.assert_close(found[:, :, r, c], expected)


@pytest.mark.parametrize("sk", [False, True])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_new_block_is_its_shortcut(sk, norm):
    images = torch.rand(3, 32, 5, 6)
    assert torch.equal(Bottleneck(32, 8, projection=False, sk=sk, norm=norm)(images), images)
    block = Bottleneck(32, 16, stride=2, projection=True, sk=sk, norm=norm)
    torch.testing.assert_close(block(images), block.shortcut(images).relu())


@pytest.mark.parametrize("sk", [False, True])
@pytest.mark.parametrize("pixels", [1, 8, 17, 32, 33])
def test_simclr_resnets_of_any_size_of_images(sk, pixels):
    images = torch.rand(2, 3, pixels, pixels + 6)
    for stem, stride in {"imagenet": 8, "cifar": 2}.items():
        encoder = filled(SimCLRResNet([1, 1], 8, sk=sk, stem=stem)).eval()
        maps = encoder.feature_map(images)
        assert maps.shape == (2, 64, math.ceil(pixels / stride), math.ceil((pixels + 6) / stride))
        torch.testing.assert_close(encoder(images), maps.mean((2, 3)))
        assert encoder(images).shape == (2, encoder.dim)


@pytest.mark.parametrize("sk", [False, True])
def test_the_stems(sk):
    with torch.device("meta"):
        stems = {stem: simclr_resnet(width=2, sk=sk, stem=stem).stem for stem in ("imagenet", "cifar")}
        assert stems["imagenet"](torch.zeros(2, 3, 224, 224)).shape == (2, 128, 56, 56)
        assert stems["cifar"](torch.zeros(2, 3, 32, 32)).shape == (2, 128, 32, 32)
    plans = {
        stem: [(layer.kernel_size[0], layer.stride[0], layer.out_channels) for layer in convolutions(module)]
        for stem, module in stems.items()
    }
    assert plans["imagenet"] == ([(3, 2, 64), (3, 1, 64), (3, 1, 128)] if sk else [(7, 2, 128)])
    assert plans["cifar"] == [(3, 1, 128)]


def convolutions(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def small_networks():
    return [
        SimCLRResNet([1, 2], 8),
        SimCLRResNet([1, 2], 8, sk=True),
        SimCLRResNet([1, 2], 8, sk=True, stem="cifar"),
        TorchvisionTrunk("resnet18", small_stem=True),
    ]


@pytest.mark.parametrize("encoder", small_networks())
def test_every_batch_norm_can_be_replaced(encoder):
    """As for statistics over all processes: the layers are torch's, found by type, and are called as modules."""
    counted = []

    class Counted(nn.Module):
        def forward(self, images):
            counted.append(images.shape)
            return images

    norms = [name for name, module in encoder.named_modules() if isinstance(module, nn.BatchNorm2d)]
    without = [layer for name, layer in encoder.named_modules() if name.endswith(".expand")]
    assert len(norms) == len(convolutions(encoder)) - len(without)
    for name in norms:
        encoder.set_submodule(name, Counted())
    encoder(torch.rand(2, 3, 16, 16))
    assert len(counted) == len(norms)
    assert not [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]


@pytest.mark.parametrize("sk", [False, True])
def test_layer_norm_keeps_images_apart(sk):
    encoder = filled(SimCLRResNet([1, 1], 8, sk=sk, norm="layer")).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(encoder(images)[1].sum(), images)
    assert gradient[1].ne(0).any()
    assert gradient[[0, 2]].eq(0).all()


def test_every_parameter_of_a_simclr_resnet_learns():
    encoder = filled(SimCLRResNet([2, 1], 8, sk=True))
    encoder(torch.rand(4, 3, 24, 24)).square().sum().backward()
    assert not [name for name, parameter in encoder.named_parameters() if not parameter.grad.abs().sum() > 0]


def test_simclrs_first_weights():
    """Variance 1 / fan-in; nothing beyond two standard deviations of the normal that was cut."""
    encoder = simclr_resnet()
    weight = encoder.stacks[3][1].residual[1][0].weight
    assert weight.shape == (512, 512, 3, 3)
    scaled = weight.detach() * math.sqrt(512 * 9)
    assert scaled.std() == pytest.approx(1, rel=2e-3)
    assert 2.2 < scaled.abs().max() <= 2 / 0.8796


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"depth": 18}, "depth=18: pass one of 50, 101, 152"),
        ({"width": 0}, "width=0: pass 1 or more"),
        ({"stem": "small"}, 'stem=\'small\': pass "imagenet" or "cifar"'),
        ({"norm": "group"}, 'norm=\'group\': pass "batch" or "layer"'),
    ],
)
def test_wrong_arguments_of_simclrs_resnet_are_named(arguments, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        simclr_resnet(**arguments)


# --- torchvision's


@pytest.mark.parametrize(("name", "dim"), [("resnet18", 512), ("resnet50", 2048)])
def test_a_small_stem_keeps_small_images_large(name, dim):
    with torch.device("meta"):
        small, usual = (TorchvisionTrunk(name, small_stem=small) for small in (True, False))
        assert small.dim == usual.dim == dim
        assert small.feature_map(torch.zeros(2, 3, 32, 32)).shape == (2, dim, 4, 4)
        assert small.feature_map(torch.zeros(2, 3, 33, 27)).shape == (2, dim, 5, 4)
        assert usual.feature_map(torch.zeros(2, 3, 32, 32)).shape == (2, dim, 1, 1)
    first, larger = convolutions(small)[0], convolutions(usual)[0]
    assert (first.kernel_size, first.stride, first.padding, first.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert parameters(small) == parameters(usual) - larger.weight.numel() + first.weight.numel()
    assert not [module for module in small.modules() if isinstance(module, nn.MaxPool2d)]


def test_a_small_stem_starts_as_the_others_do():
    first = convolutions(TorchvisionTrunk("resnet50", small_stem=True))[0].weight
    assert first.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)


@pytest.mark.parametrize("name", ["vgg11", "shufflenet_v2_x0_5", "mobilenet_v2"])
def test_a_small_stem_is_for_resnets(name):
    with torch.device("meta"), pytest.raises(ValueError, match=r"small_stem=True: \w+ has no convolution conv1 and"):
        TorchvisionTrunk(name, node="features", small_stem=True)


def test_arguments_reach_torchvisions_model():
    trunk = TorchvisionTrunk("resnet18", small_stem=True, zero_init_residual=True)
    state = trunk.state_dict()
    assert state["trunk.layer3.1.bn2.weight"].eq(0).all()
    assert state["trunk.layer3.1.bn1.weight"].eq(1).all()
    assert TorchvisionTrunk("resnet18").state_dict()["trunk.layer3.1.bn2.weight"].eq(1).all()


def test_finding_dim_leaves_batch_norm_as_it_was():
    trunk = TorchvisionTrunk("resnet18", small_stem=True)
    norms = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20
    for norm in norms:
        assert norm.training
        assert norm.num_batches_tracked == 0
        assert norm.running_mean.eq(0).all()
        assert norm.running_var.eq(1).all()
    trunk(torch.rand(2, 3, 32, 32))
    assert all(norm.num_batches_tracked == 1 for norm in norms)


# --- MoCo v3's vision transformer


def tiny_vit(**arguments):
    torch.manual_seed(3)
    return MoCoViT(**({"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "heads": 3} | arguments))


@pytest.mark.parametrize(("size", "dim", "millions"), [("small", 384, 22), ("base", 768, 86)])
def test_moco_v3s_vits(size, dim, millions):
    with torch.device("meta"):
        encoder = MoCoViT(size)
        images = torch.zeros(2, 3, 224, 224)
        assert encoder(images).shape == (2, encoder.dim) == (2, dim)
        assert encoder.feature_map(images).shape == (2, dim, 14, 14)
    assert round(parameters(encoder) / 1e6) == millions
    assert len(encoder.trunk.blocks) == 12
    assert {block.attn.num_heads for block in encoder.trunk.blocks} == {12}
    assert {block.norm1.eps for block in encoder.trunk.blocks} == {1e-6}


def test_sincos_positions_in_closed_form():
    rows, cols, dim = 3, 5, 12
    positions = sincos_positions(rows, cols, dim)
    assert positions.shape == (15, 12)
    for r, c, i in itertools.product(range(rows), range(cols), range(3)):
        frequency = 10000 ** (-i / 3)
        found = positions[r * cols + c, i::3].tolist()
        expected = [math.sin(r * frequency), math.cos(r * frequency), math.sin(c * frequency), math.cos(c * frequency)]
        assert found == pytest.approx(expected, abs=1e-6)


def test_positions_are_fixed():
    encoder = tiny_vit()
    assert "trunk.pos_embed" not in dict(encoder.named_parameters())
    assert "trunk.pos_embed" in encoder.state_dict()
    positions = encoder.trunk.pos_embed
    assert positions.shape == (1, 17, 24)
    assert positions[0, 0].eq(0).all()  # the class token's
    assert torch.equal(positions[0, 1:], sincos_positions(4, 4, 24))
    encoder.requires_grad_(True)  # as fine-tuning does
    assert not positions.requires_grad


def test_the_patch_projection_is_frozen():
    encoder = tiny_vit()
    projection = encoder.trunk.patch_embed.proj
    first = projection.weight.clone()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.5)
    encoder(torch.rand(3, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    frozen = [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    assert frozen == ["trunk.patch_embed.proj.weight", "trunk.patch_embed.proj.bias"]
    assert projection.weight.grad is None
    assert torch.equal(projection.weight, first)
    assert torch.equal(tiny_vit().trunk.patch_embed.proj.weight, first)  # the same for a seed ...
    torch.manual_seed(4)
    other = MoCoViT(image_size=16, patch_size=4, dim=24, depth=2, heads=3).trunk.patch_embed.proj.weight
    assert not torch.equal(other, first)  # ... and random
    without = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert without == frozen


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("blocks.0.attn.qkv", 6 / (48 + 48)),  # queries, keys and values as three square matrices
        ("blocks.1.attn.proj", 6 / (48 + 48)),
        ("blocks.1.mlp.fc1", 6 / (48 + 4 * 48)),
        ("blocks.0.mlp.fc2", 6 / (48 + 4 * 48)),
        ("patch_embed.proj", 6 / (48 + 3 * 64)),
    ],
)
def test_moco_v3s_first_weights(name, bound):
    layer = tiny_vit(patch_size=8, dim=48).trunk.get_submodule(name)
    assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(bound), rel=0.01)
    assert layer.weight.abs().max() <= math.sqrt(bound)
    assert layer.bias.eq(0).all()


def test_the_class_token_starts_near_zero():
    token = tiny_vit(dim=384).trunk.cls_token
    assert token.std().item() == pytest.approx(1e-6, rel=0.2)


def test_which_token_is_which():
    """With attention and MLPs silenced a token is its patch's alone, and the class token nobody's."""
    encoder = tiny_vit(image_size=12)
    for block in encoder.trunk.blocks:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.mlp.fc2.weight)
    images = torch.rand(2, 3, 12, 12)
    changed = images.clone()
    changed[:, :, 0:4, 8:12] += 1  # row 0, column 2
    difference = (encoder.feature_map(images) - encoder.feature_map(changed)).abs().sum(1)
    assert difference[:, 0, 2].gt(0).all()
    difference[:, 0, 2] = 0
    assert difference.eq(0).all()
    assert torch.equal(encoder(images), encoder(torch.rand(2, 3, 12, 12)))
    assert not torch.equal(tiny_vit()(torch.zeros(1, 3, 16, 16)), tiny_vit()(torch.ones(1, 3, 16, 16)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": "huge"}, 'size=\'huge\': pass "small" or "base"'),
        ({"image_size": 28}, "image_size=28, patch_size=16: pass a patch_size that divides it"),
        ({"image_size": 8}, "image_size=8, patch_size=16: pass a patch_size that divides it"),
        ({"dim": 42, "heads": 3}, "dim=42, heads=3: pass a dim that 4 .* and heads divide"),
        ({"dim": 40, "heads": 3}, "dim=40, heads=3: pass a dim that 4 .* and heads divide"),
    ],
)
def test_wrong_arguments_of_the_vit_are_named(arguments, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        MoCoViT(**arguments)


def test_images_of_another_size_than_the_vits_are_named():
    for read in (tiny_vit(), tiny_vit().feature_map):
        with pytest.raises(ValueError, match=r"images of 16 x 20 px: this ViT was built for 16 x 16, pass those or"):
            read(torch.rand(2, 3, 16, 20))


@pytest.mark.parametrize("build", [MoCoViT, lambda: TimmTrunk("resnet18")])
def test_timm_may_be_missing(monkeypatch, build):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(ImportError, match=r'^timm is not installed: pip install "cpc-images\[vit\]"$'):
        build()


# --- the small convolutional network


@pytest.mark.parametrize(
    ("widths", "pixels", "side"),
    [((32, 64, 128, 128), 32, 4), ((32, 64, 128, 128), 28, 3), ((5,), 9, 9), ((4, 6), 9, 4), ((3, 4, 5), 16, 4)],
)
def test_small_cnns_halve_behind_every_convolution_but_the_first(widths, pixels, side):
    encoder = SmallCNN(widths)
    images = torch.rand(2, 3, pixels, pixels)
    maps = encoder.feature_map(images)
    assert maps.shape == (2, widths[-1], side, side)
    assert maps.min() >= 0
    assert encoder.dim == widths[-1]
    assert [layer.weight.shape for layer in convolutions(encoder)] == [
        (outer, inner, 3, 3) for inner, outer in itertools.pairwise([3, *widths])
    ]


def test_a_small_cnn_for_photographs_begins_as_resnets_do():
    encoder = SmallCNN([8, 16, 32], stem="imagenet")
    assert encoder.feature_map(torch.rand(2, 3, 96, 64)).shape == (2, 32, 6, 4)
    first, pool = encoder.layers[0], encoder.layers[2]
    reference = torchvision_resnet50()
    assert str(first) == str(reference.conv1).replace("64", "8")
    assert str(pool) == str(reference.maxpool)
    assert len(convolutions(encoder)) == 3


@pytest.mark.parametrize(("pixels", "side"), [(28, 3), (32, 4), (48, 6), (49, 3), (64, 4), (80, 5), (81, 2), (224, 7)])
def test_a_small_cnn_for_a_size_makes_a_map_of_a_few_places(pixels, side):
    encoder = SmallCNN(**small_cnn_for(pixels))
    assert encoder.feature_map(torch.rand(1, 3, pixels, pixels)).shape[2:] == (side, side)


def test_a_small_cnn_of_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match=r"^stem='large': pass \"imagenet\" or \"small\"$"):
        SmallCNN([8], stem="large")


def test_a_small_cnns_features_are_the_mean_of_its_map():
    encoder, images = SmallCNN().eval(), torch.rand(2, 3, 32, 24)
    torch.testing.assert_close(encoder(images), encoder.feature_map(images).mean((2, 3)))
    assert encoder(images).shape == (2, 128) == (2, encoder.dim)


def test_a_small_cnn_of_one_width_in_closed_form():
    """A convolution that looks at its own pixel alone, BatchNorm at its start and a ReLU: the mean of what is left."""
    encoder, images = SmallCNN([3]).double().eval(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        convolutions(encoder)[0].weight.zero_()[:, :, 1, 1] = torch.eye(3)
    torch.testing.assert_close(encoder(images), images.clamp(min=0).mean((2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_pooling_before_rectifying_changes_no_bit_of_features_and_gradients(stem):
    encoder = SmallCNN([4, 6, 8], stem=stem)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.5)  # BatchNorms that turn signs round, too
    usual = copy.deepcopy(encoder)
    layers = list(usual.layers)
    for place in reversed(range(len(layers) - 1)):
        if isinstance(layers[place], nn.MaxPool2d):
            layers[place : place + 2] = layers[place + 1], layers[place]
    usual.layers = nn.Sequential(*layers)
    assert str(usual.layers) != str(encoder.layers)

    images = torch.randn(4, 3, 32, 32)
    for network in (encoder, usual):
        network(images).square().sum().backward()
    assert torch.equal(encoder(images), usual(images))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(encoder.parameters(), usual.parameters(), strict=True))


def test_every_parameter_of_a_small_cnn_learns():
    encoder = SmallCNN([4, 6, 8])
    encoder(torch.rand(4, 3, 16, 16)).square().sum().backward()
    assert not [name for name, parameter in encoder.named_parameters() if not parameter.grad.abs().sum() > 0]


@pytest.mark.parametrize("widths", [[], ()])
def test_a_small_cnn_of_no_widths_is_refused(widths):
    with pytest.raises(ValueError, match=r"^widths=\[\]: pass the channels of one convolution or more$"):
        SmallCNN(widths)


# --- written down and read back

ROUND_TRIPS = {
    "contrastive_core.simclr_resnet.SimCLRResNet": {"blocks": [1, 1], "filters": 8, "sk": True, "stem": "cifar"},
    "contrastive_core.encoders.TorchvisionTrunk": {"name": "resnet18", "node": "layer2", "small_stem": True},
    "contrastive_core.encoders.MoCoViT": {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 1, "heads": 3},
    "contrastive_core.encoders.SmallCNN": {"widths": [4, 8], "stem": "imagenet"},
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_what_was_trained_is_what_is_read(tmp_path, name):
    architecture = {"name": name, "arguments": ROUND_TRIPS[name]}
    inputs = {"image_size": 16, "patch_size": None, "stride": None, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    encoder = filled(build_encoder(architecture))
    encoder(torch.rand(4, 3, 16, 16))  # moves BatchNorm's statistics
    card = {"architecture": architecture, "input": inputs, "dim": encoder.dim}
    export_encoder(tmp_path, encoder, card)
    images = torch.rand(3, 3, 16, 16)
    expected = encoder.eval()(normalise(images, inputs["mean"], inputs["std"])).detach()
    read = load_encoder(tmp_path)
    torch.testing.assert_close(read(images), expected, rtol=1e-4, atol=1e-5)
    read.readout = "grid"
    assert read(images).shape[::3] == (3, encoder.dim)
    assert not torch.isclose(untrained_encoder(tmp_path)(images), expected).all()


def test_a_card_may_name_simclrs_networks():
    with torch.device("meta"):
        architecture = {"name": "contrastive_core.simclr_resnet.simclr_resnet", "arguments": {"depth": 101, "width": 2}}
        assert build_encoder(architecture).dim == 4096


def test_all_encoders_that_a_card_may_name_are_there():
    assert "SmallCNN" in ENCODERS
    assert all(hasattr(encoders, name) for name in ENCODERS)
