"""The classifier on a grid of latents: closed forms, the paper's size, and what it sees of where things are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cpc.latent_classifier import LatentClassifier


def grids(count: int = 3, rows: int = 4, cols: int = 5, dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, rows, cols, dim, generator=torch.Generator().manual_seed(seed))


def filled(classifier: LatentClassifier) -> LatentClassifier:
    """With a linear layer as after some steps: it starts at zero, and says nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in classifier.linear.parameters():
        nn.init.normal_(parameter, generator=generator)
    return classifier


@pytest.mark.parametrize("options", [{"blocks": 0}, {"blocks": 2, "width": 8}, {"width": 8, "bottleneck": 4}])
def test_the_first_prediction_is_uniform(options):
    classifier = LatentClassifier(6, 7, **options)
    logits = classifier(100 * grids())
    assert torch.equal(logits, torch.zeros(3, 7))
    assert nn.functional.cross_entropy(logits, torch.tensor([0, 3, 6])).item() == pytest.approx(math.log(7))


def test_without_blocks_it_is_the_mean_and_a_linear_layer():
    classifier, latents = filled(LatentClassifier(6, 7, blocks=0)).double(), grids().double()
    expected = latents.mean((1, 2)) @ classifier.linear.weight.T + classifier.linear.bias
    torch.testing.assert_close(classifier(latents), expected)
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 6 * 7 + 7, "and nothing else"


def test_by_hand():
    """Latents of 1 and 3 below zero as well: without blocks no ReLU is in the way."""
    classifier = LatentClassifier(2, 2, blocks=0)
    with torch.no_grad():
        classifier.linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 10.0]]))
        classifier.linear.bias.copy_(torch.tensor([0.0, 0.5]))
    latents = torch.tensor([[1.0, -1.0], [3.0, -3.0]]).view(1, 1, 2, 2)
    assert classifier(latents).tolist() == [[2.0, -19.5]]


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 2), (7, 7), (3, 8)])
@pytest.mark.parametrize(
    "options",
    [{"blocks": 0}, {"width": 8}, {"blocks": 2, "width": 6, "norm": "layer"}, {"width": 8, "bottleneck": 3}],
)
def test_any_grid(rows, cols, options):
    classifier = filled(LatentClassifier(6, 7, **options))
    logits = classifier(grids(rows=rows, cols=cols))
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()


def test_the_papers_resnet_33():
    with torch.device("meta"):
        classifier = LatentClassifier(4096, 1000, blocks=11, width=4096, bottleneck=1024)
        assert classifier(torch.zeros(2, 7, 7, 4096)).shape == (2, 1000)
    below = sum(parameter.numel() for parameter in classifier.parameters()) - 1000 * 4097
    convolutions = [module for module in classifier.blocks.modules() if isinstance(module, nn.Conv2d)]
    assert below / 1e6 == pytest.approx(196, abs=0.5)
    assert sum(convolution.weight.numel() for convolution in convolutions) == 11 * (2 * 4096 + 9 * 1024) * 1024
    assert len(convolutions) == 33
    assert {convolution.stride for convolution in convolutions} == {(1, 1)}


@pytest.mark.parametrize("options", [{"blocks": 0}, {"blocks": 2, "width": 8}, {"width": 6, "bottleneck": 4}])
def test_gradients_reach_the_latents_and_every_weight(options):
    classifier, latents = LatentClassifier(6, 7, **options), grids().requires_grad_()
    classifier(latents)[:, 0].sum().backward()
    assert latents.grad.eq(0).all(), "the linear layer starts at zero"
    assert classifier.linear.weight.grad[0].ne(0).any()
    filled(classifier).zero_grad()
    latents.grad = None
    classifier(latents).square().sum().backward()
    assert latents.grad.flatten(1).abs().sum(1).gt(0).all()
    assert not [name for name, weight in classifier.named_parameters() if not weight.grad.abs().sum() > 0]


@pytest.mark.parametrize(("blocks", "sees"), [(0, False), (1, True), (2, True)])
def test_blocks_see_where_things_are(blocks, sees):
    classifier, latents = filled(LatentClassifier(6, 7, blocks=blocks, width=8)).eval(), grids()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    moved = latents.flatten(1, 2)[:, order].unflatten(1, (4, 5))
    difference = (classifier(latents) - classifier(moved)).abs().amax(1)
    assert (difference > 1e-3).all() if sees else (difference < 1e-5).all()


def test_rows_are_rows():
    """A 1 x 5 grid is no 5 x 1 grid: the axes are not swapped on the way to the convolutions."""
    classifier = filled(LatentClassifier(6, 7, width=8)).eval()
    with torch.no_grad():
        for convolution in classifier.blocks[0].convolutions:
            convolution.weight[:, :, [0, 2]] = 0  # looks left and right alone
    latents = grids()
    classifier_by_row = torch.stack([classifier(latents[:, row : row + 1]) for row in range(4)]).mean(0)
    torch.testing.assert_close(classifier(latents), classifier_by_row)


def test_dropout_is_of_training_alone():
    classifier, latents = filled(LatentClassifier(6, 7, blocks=0, dropout=0.5)), grids()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(classifier(latents), classifier(latents))
    classifier.eval()
    assert torch.equal(classifier(latents), classifier(latents))


@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (3, 6, 4, 5), (3, 20, 6), (3, 6), (2, 3, 4, 5, 6)])
def test_latents_that_do_not_fit_are_named(shape):
    with pytest.raises(ValueError, match=r"^latents \(.*\): pass `b rows cols d` with d = 6$"):
        LatentClassifier(6, 7, width=8)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 1}, r"^1 classes, blocks=1: pass at least 2 classes, and blocks from 0$"),
        ({"classes": 0}, r"^0 classes, blocks=1: pass at least 2 classes"),
        ({"blocks": -1}, r"^7 classes, blocks=-1: pass at least 2 classes, and blocks from 0$"),
        ({"norm": "group"}, r"^norm='group' is not one of .*$"),
    ],
)
def test_wrong_arguments_are_named_in_a_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        LatentClassifier(**({"dim": 6, "classes": 7, "width": 8} | arguments))
    assert "\n" not in str(error.value)
