import pytest
import torch

from contrastive_core.losses import info_nce, nt_xent
from contrastive_core.metrics import contrast_accuracy, count_negatives, feature_std

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
    assert count_negatives(info_nce, queries, None, queries, shared_keys=keys).tolist() == [7] * 4
    assert count_negatives(nt_xent, queries, queries).tolist() == [6] * 8
    assert count_negatives(nt_xent, queries.half(), queries.half()).tolist() == [6] * 8
    many = count_negatives(info_nce, queries, torch.randn(100_000, 3), positive)
    assert many.tolist() == [99_999] * 4
    millions = count_negatives(info_nce, torch.zeros(1, 1), torch.zeros(2_000_003, 1), torch.tensor([0]))
    assert millions.tolist() == [2_000_002]  # in float32 it would be one too few
