import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from contrastive_core.losses import info_nce, negative_cosine, nt_xent
from contrastive_core.metrics import (
    collapsed,
    contrast_accuracy,
    count_negatives,
    effective_rank,
    feature_std,
    spread_metrics,
)
from cpc.encoders import resnet_small

torch.manual_seed(0)


def test_contrast_accuracy_counts_only_clear_wins():
    eye = torch.eye(4)
    assert contrast_accuracy(eye, eye, torch.arange(4)) == 1
    assert contrast_accuracy(eye, eye, torch.tensor([0, 1, 3, 2])) == 0.5
    assert contrast_accuracy(torch.ones(3, 4), torch.ones(5, 4), torch.arange(3)) == 0  # ties
    many = torch.eye(1000)
    half = torch.arange(1000)
    half[500:] = 0
    assert contrast_accuracy(many, many, half, limit=100) == pytest.approx(0.5, abs=0.02)


def test_feature_std():
    assert feature_std(torch.ones(10, 4)) == 0
    assert feature_std(torch.zeros(10, 4)) == 0
    assert float(feature_std(torch.randn(4000, 64))) == pytest.approx(1 / 8, rel=0.02)


def test_contrast_accuracy_is_not_rounded_under_autocast():
    """Scores that differ by a thousandth tie in bf16, and a tie is a miss."""
    queries = torch.ones(8, 4)
    keys = torch.full((8, 4), 10.0)
    keys[3] += 0.01
    with torch.autocast("cpu", torch.bfloat16):
        assert contrast_accuracy(queries, keys, torch.full((8,), 3)) == 1


def test_negatives_are_counted_by_the_loss_itself():
    queries, keys, positive = torch.randn(4, 3), torch.randn(7, 3), torch.arange(4)
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2] = False
    mask[2, 2] = True
    assert count_negatives(info_nce, queries, keys, positive, temperature=0.1).tolist() == [6, 6, 6, 6]
    assert count_negatives(info_nce, queries, keys, positive, mask=mask).tolist() == [6, 3, 0, 6]
    assert count_negatives(info_nce, queries[:1], keys[:1], positive[:1]).tolist() == [0]
    assert count_negatives(info_nce, queries, None, queries, shared_keys=keys).tolist() == [7] * 4
    assert count_negatives(nt_xent, queries, queries).tolist() == [6] * 8
    assert count_negatives(nt_xent, queries.half(), queries.half()).tolist() == [6] * 8
    many = count_negatives(info_nce, queries, torch.randn(100_000, 3), positive)
    assert many.tolist() == [99_999] * 4
    millions = count_negatives(info_nce, torch.zeros(1, 1), torch.zeros(2_000_003, 1), torch.tensor([0]))
    assert millions.tolist() == [2_000_002]  # in float32 it would be one too few


# ---- the collapse alarm ----


def rank_by_hand(features):
    """The paper's equation from all singular values, without its epsilon."""
    singular = torch.linalg.svdvals(features.double())
    shares = [float(s / singular.sum()) for s in singular]
    return math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_effective_rank_of_known_singular_values(dtype):
    assert effective_rank(torch.ones(10, 4, dtype=dtype)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.eye(6, dtype=dtype)) == pytest.approx(6)
    for r in (1, 3, 16):  # r directions, as often
        rows = torch.eye(16, dtype=dtype)[:r].repeat(5, 1)
        assert effective_rank(rows) == pytest.approx(r, rel=1e-4)
    two = torch.tensor([[3.0, 0, 0], [0, 1, 0]], dtype=dtype)  # shares 3/4 and 1/4
    assert effective_rank(two) == pytest.approx(4 / 3**0.75, rel=1e-5)
    assert effective_rank(torch.zeros(5, 3, dtype=dtype)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.ones(1, 8, dtype=dtype)) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (30, 30), (200, 2048)])
@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
def test_effective_rank_is_that_of_all_singular_values(shape, mean):
    features = torch.randn(shape) + mean
    rank = effective_rank(features)
    assert rank.ndim == 0
    assert rank == pytest.approx(rank_by_hand(features), rel=2e-3)  # the epsilon
    assert 1 <= rank <= min(shape)


def test_effective_rank_does_not_take_the_mean_away():
    features = torch.randn(100, 16)
    assert effective_rank(features + 10) < 4 < 12 < effective_rank(features)


def test_effective_rank_knows_no_scale_rotation_or_order():
    features = torch.randn(30, 12)
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    expected = pytest.approx(float(effective_rank(features)), rel=1e-5)
    for other in (features * 1e30, features * 1e-30, features @ rotation, features.flip(0), features.flip(1)):
        assert effective_rank(other) == expected
    assert effective_rank(features.double() * 1e200) == expected


def test_effective_rank_looks_at_some_rows_spread_evenly():
    features = torch.eye(4).repeat_interleave(1000, 0)
    assert effective_rank(features, limit=8) == pytest.approx(4, rel=1e-5)
    assert effective_rank(torch.randn(1000, 500), limit=20) <= 20


def test_effective_rank_is_not_rounded_under_autocast():
    features = torch.ones(64, 32) + 1e-3 * torch.randn(64, 32)
    expected = rank_by_hand(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert effective_rank(features) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_effective_rank_of_what_is_not_finite_is_nan(value):
    features = torch.ones(4, 3)
    features[1, 2] = value
    assert effective_rank(features).isnan()


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4)])
def test_effective_rank_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"pass b d, at least one row"):
        effective_rank(torch.ones(shape))


def alarm(vectors):
    spread = feature_std(vectors) * math.sqrt(vectors.shape[1])
    return collapsed(float(spread), float(effective_rank(vectors)))


def test_collapsed_says_both_numbers():
    assert collapsed(0.002, 1.1) == (
        "collapsed: the projections' spread is 0.002 (0 = one point, 1 = even over the sphere), "
        "their effective rank 1.1"
    )
    assert collapsed(0.9, 40.0) == ""
    assert collapsed(math.nan, math.nan) == ""


def test_spread_metrics_are_what_collapsed_takes():
    same = {name: float(value) for name, value in spread_metrics(torch.ones(4, 8)).items()}
    assert same == {"spread": pytest.approx(0, abs=1e-6), "effective_rank": pytest.approx(1, abs=1e-4)}
    even = spread_metrics(torch.randn(4000, 16))
    assert float(even["spread"]) == pytest.approx(1, rel=0.02)
    assert 12 < float(even["effective_rank"]) <= 16
    assert float(spread_metrics(torch.randn(4000, 500))["effective_rank"]) <= 64


@pytest.mark.parametrize("d", [64, 512, 2048])
def test_each_of_the_two_numbers_sees_what_the_other_does_not(d):
    direction = torch.randn(1, d)
    assert alarm(direction.expand(256, d))
    line = direction * torch.tensor([1.0, -1.0]).repeat(128)[:, None]
    assert float(feature_std(line)) > 0.7 / math.sqrt(d)
    assert alarm(line)
    point_with_noise = direction + 0.005 * torch.randn(256, d)
    assert float(effective_rank(point_with_noise)) > (1.5 if d > 64 else 1)
    assert alarm(point_with_noise)
    assert alarm(torch.zeros(64, d))  # a network that has died


@pytest.mark.parametrize("d", [64, 128, 512, 2048])
@pytest.mark.parametrize("b", [32, 256])
def test_no_alarm_for_random_vectors(b, d):
    for vectors in (torch.randn(b, d), torch.rand(b, d), torch.randn(b, d).relu(), 0.1 * torch.randn(b, d) + 1):
        assert not alarm(vectors)


def smooth(b, size):
    return sum(F.interpolate(torch.randn(b, 3, k, k) / k, size=size, mode="bicubic") for k in (2, 4, 8, 16))


def resnet18_features():
    trunk = resnet18()
    trunk.fc = nn.Identity()
    return trunk


@pytest.mark.parametrize("images", [torch.rand(64, 3, 32, 32) / 0.2 - 2, smooth(64, 32)], ids=["noise", "smooth"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: resnet_small(16),
        lambda: resnet_small(16, norm="batch"),
        lambda: resnet_small(16, norm="channel"),
        lambda: resnet_small(32, blocks=(1, 1, 1, 1)),
        resnet18_features,
    ],
    ids=["layer", "batch", "channel", "deeper", "ResNet-18"],
)
@torch.no_grad()
def test_no_alarm_for_untrained_encoders_and_heads(build, images):
    features = build()(images)
    d = features.shape[1]
    assert not alarm(features)
    assert not alarm(nn.Linear(d, 64, bias=False)(features))  # CPC's targets
    hidden = nn.Linear(d, d)(features)
    assert not alarm(nn.Linear(d, 128)(F.batch_norm(hidden, None, None, training=True).relu()))
    assert not alarm(nn.Linear(d, 128)(hidden.relu()))  # MoCo v2's, without a norm


@pytest.mark.parametrize(("loss", "expected"), [(nt_xent, False), (negative_cosine, True)])
def test_the_alarm_tells_training_without_negatives_from_training_with_them(loss, expected):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    images = torch.randn(64, 20)
    for _ in range(200):
        z1, z2 = (network(images + 0.3 * torch.randn(64, 20)) for _ in range(2))
        optimizer.zero_grad()
        loss(z1, z2).backward()
        optimizer.step()
    assert bool(alarm(network(images).detach())) == expected
