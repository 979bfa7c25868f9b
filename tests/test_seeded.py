"""Other libraries' augmentations in our pipelines: repeatable, and no trace left in torch's generator."""

from __future__ import annotations

import kornia.augmentation as K
import pytest
import torch
from torch import nn

from contrastive_core.augment import ChannelDrop, Seeded, Views
from contrastive_core.randomness import Randomness
from cpc.entry import build


def at_step(step: int, images: int = 8) -> Randomness:
    return Randomness(0, step, torch.arange(images))


@pytest.fixture
def photographs() -> torch.Tensor:
    return torch.rand(8, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def kornia_simclr(size: int) -> nn.Module:
    jitter = K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    return nn.Sequential(K.RandomResizedCrop((size, size)), K.RandomHorizontalFlip(), jitter, K.RandomGrayscale(p=0.2))


def test_it_does_what_the_module_does(photographs):
    flipped = Seeded(K.RandomHorizontalFlip(p=1.0))(photographs, at_step(0))
    assert torch.equal(flipped, photographs.flip(3))


def test_the_address_decides_the_numbers_and_nothing_else_does(photographs):
    augment = Seeded(kornia_simclr(16))
    first = augment(photographs, at_step(3))
    torch.rand(5)
    assert torch.equal(first, augment(photographs, at_step(3)))
    assert not torch.equal(first, augment(photographs, at_step(4)))
    assert not torch.equal(first, Seeded(augment.module, stream="other")(photographs, at_step(3)))


def test_torchs_generator_goes_on_as_if_nothing_had_been(photographs):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Seeded(kornia_simclr(16))(photographs, at_step(0))
    assert torch.equal(torch.rand(3), expected)


def test_its_views_are_unlike_and_end_in_our_own_steps(photographs):
    views = Views([[Seeded(kornia_simclr(16))]] * 2, mean=[0, 0, 0], std=[1, 1, 1], image_size=16, channel_drop=1.0)
    one, other = views(photographs, at_step(0))
    assert not torch.equal(one, other)
    assert all((view.amax((2, 3)) == 0).sum(1).ge(2).all() for view in (one, other))


def test_two_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two steps draw from the stream 'seeded'"):
        Views([[Seeded(nn.Identity()), Seeded(nn.Identity())]], mean=[0] * 3, std=[1] * 3, image_size=16)


def test_bytes_are_refused_and_no_images_are_none():
    with pytest.raises(ValueError, match="divide uint8 by 255"):
        Seeded(nn.Identity())(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), at_step(0, 1))
    assert len(Seeded(kornia_simclr(4))(torch.zeros(0, 3, 4, 4), at_step(0, 0))) == 0


def test_kornias_pipeline_comes_by_configuration(compose, photographs):
    cfg = compose("method=simclr", "views=kornia_simclr", "image_size=16", "views.channel_drop=1.0", name="pretrain")
    views = build(cfg.views)
    assert [type(step) for step in views.pipelines[0]] == [Seeded, ChannelDrop]
    assert [view.shape for view in views(photographs, at_step(0))] == [(8, 3, 16, 16)] * 2
