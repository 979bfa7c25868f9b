"""Projection heads: shapes, which layers have a bias or a norm, and their first layers by themselves."""

import pytest
import torch
from torch import nn

from contrastive_core.heads import ProjectionHead

RULES = {  # options: widths of the linear maps, biases, norms ("affine", "plain" or "-"), ReLUs
    "SimCLR": ({"output_norm": "norm"}, [6, 128], [False, False], ["affine", "affine"]),
    "SimCLRv2": ({"layers": 3, "output_norm": "norm"}, [6, 6, 128], [False] * 3, ["affine"] * 3),
    "MoCo v1": ({"layers": 1}, [128], [True], ["-"]),
    "MoCo v2": ({"norm": False}, [6, 128], [True, True], ["-", "-"]),
    "MoCo v3": (
        {"hidden": 4096, "out": 256, "output_norm": "plain"},
        [4096, 256],
        [False, False],
        ["affine", "plain"],
    ),
    "BYOL": ({"hidden": 4096, "out": 256, "output_bias": False}, [4096, 256], [False, False], ["affine", "-"]),
    "SimSiam": (
        {"layers": 3, "hidden": 2048, "out": 2048, "output_norm": "plain"},
        [2048, 2048, 2048],
        [False] * 3,
        ["affine", "affine", "plain"],
    ),
    "SimSiam's predictor": ({"hidden": 512, "out": 2048}, [512, 2048], [False, True], ["affine", "-"]),
    "a norm at the end only": ({"norm": False, "output_norm": "norm"}, [6, 128], [True, False], ["-", "affine"]),
    "a bias that a norm forbids": ({"output_norm": "plain", "output_bias": True}, [6, 128], [False] * 2, None),
}


def norm_of(layer):
    norms = [part for part in layer if isinstance(part, nn.BatchNorm1d)]
    return "-" if not norms else "affine" if norms[0].affine else "plain"


@pytest.mark.parametrize(("options", "widths", "biases", "norms"), RULES.values(), ids=RULES.keys())
def test_layers_are_those_of_the_paper(options, widths, biases, norms):
    head = ProjectionHead(6, **options)
    linear = [layer.linear for layer in head.layers]
    assert [one.out_features for one in linear] == widths
    assert [one.in_features for one in linear] == [6, *widths[:-1]]
    assert [one.bias is not None for one in linear] == biases
    assert [isinstance(layer[-1], nn.ReLU) for layer in head.layers] == [True] * (len(widths) - 1) + [False]
    assert norms is None or [norm_of(layer) for layer in head.layers] == norms
    assert head.dim == widths[-1]
    assert head(torch.randn(4, 6)).shape == (4, widths[-1])


def test_forward_is_linear_norm_relu():
    torch.manual_seed(0)
    head, x = ProjectionHead(6, hidden=5, out=3).double(), torch.randn(8, 6, dtype=torch.float64)
    first, last = head.layers[0], head.layers[1]
    hidden = x @ first.linear.weight.T
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + first.norm.eps).sqrt()
    expected = hidden.clamp_min(0) @ last.linear.weight.T + last.linear.bias
    torch.testing.assert_close(head(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layer", "shape"), [(0, (4, 6)), (1, (4, 5)), (2, (4, 5)), (3, (4, 3)), (-1, (4, 3))])
def test_first_layers_by_themselves(layer, shape):
    head, x = ProjectionHead(6, layers=3, hidden=5, out=3), torch.randn(4, 6)
    expected = x
    for block in head.layers if layer == -1 else head.layers[:layer]:
        expected = block(expected)
    part = head.upto(layer)
    assert part(x).shape == shape
    torch.testing.assert_close(part(x), expected)
    shared = {id(parameter) for parameter in head.parameters()}
    assert all(id(parameter) in shared for parameter in part.parameters())


def test_the_first_layer_ends_in_its_relu():
    """What SimCLRv2 fine-tunes from."""
    assert ProjectionHead(6, layers=3).upto(1)(torch.randn(9, 6)).min() == 0


@pytest.mark.parametrize("layer", [-2, 3])
def test_a_layer_that_is_not_there_is_named(layer):
    with pytest.raises(ValueError, match=f"the head has 2 layers, got layer {layer}: pass -1 to 2"):
        ProjectionHead(6).upto(layer)


@pytest.mark.parametrize("options", [{"layers": 0}, {"output_norm": "batch"}, {"layers": -1}])
def test_what_does_not_fit_is_named(options):
    with pytest.raises(ValueError, match=r"layers=.*, output_norm=.*: pass at least 1 and one of none, norm, plain"):
        ProjectionHead(6, **options)
